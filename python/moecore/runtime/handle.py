"""``model.moecore``: what a person asks a running model, and how they end it."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from moecore.errors import ConfigError, DeviceError, MoecoreError

from .stats import Stats, table

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor, nn

    from moecore.ops.check import Gating

    from .families import Taken
    from .rows import Store


class Backend(Protocol):
    """What runs the experts of one kind of device."""

    path: str

    def run(self, layer: int, taken: Taken, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """One call of a layer."""

    def route(self, layer: int, taken: Taken, logits: Tensor, gating: Gating) -> tuple[Tensor, Tensor] | None:
        """The router's choice, where the backend makes it together with the fetch; else None."""

    def forget(self) -> None:
        """The ids of the next call may not be those that `route` gave."""

    def row(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The parts of one expert, copied out."""

    def stats(self) -> Stats:
        """What was counted."""

    def reset_stats(self) -> None:
        """Counts from zero."""

    def close(self) -> None:
        """Ends threads and frees memory."""


class Handle:
    """The experts of one model. Made by :func:`moecore.load` and :func:`moecore.wrap`; closes as a context manager."""

    def __init__(self, model: nn.Module, store: Store, backend: Backend, taken: list[Taken], notes: list[str]) -> None:
        self.store = store
        self.backend = backend
        self.taken = taken
        self.notes = notes
        self.closed = False
        self.layer_of = {id(one.module): number for number, one in enumerate(taken)}
        self._model_class = type(model).__name__
        self._lock = threading.Lock()
        self._forked = False
        LIVE.add(self)

    def run(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """One call of an experts module: hidden [T, H], index and weights [T, k] -> [T, H]."""
        self.check()
        layer = self.layer_of.get(id(module))
        if layer is None:
            raise ConfigError("this experts module belongs to a copy of the model; wrap the copy itself")
        try:
            return self.backend.run(layer, self.taken[layer], hidden, index, weights)
        except Exception as error:
            if not self.closed:
                raise
            raise self._is_closed() from error  # by another thread, meanwhile

    def choose(self, module: nn.Module, logits: Tensor, gating: Gating) -> tuple[Tensor, Tensor] | None:
        """What the router beside an experts module chooses, where that begins its fetch: weights and ids [T, k]."""
        self.check()
        layer = self.layer_of.get(id(module))
        if layer is None:
            return None
        try:
            return self.backend.route(layer, self.taken[layer], logits, gating)
        except Exception as error:
            if not self.closed:
                raise
            raise self._is_closed() from error  # as above

    def check(self) -> None:
        """Raises where the experts cannot run any more."""
        if self.closed:
            raise self._is_closed()
        if self._forked:
            raise DeviceError(
                f"this process was forked from the one that runs this {self._model_class}, and the threads that bring "
                "its experts did not come along; load the model in this process, or start it by 'spawn'"
            )

    def _is_closed(self) -> MoecoreError:
        return MoecoreError(f"the experts of this {self._model_class} were closed; load or wrap the model again")

    def stats(self) -> Stats:
        """Counters since the start or the last :meth:`reset_stats`."""
        return self.backend.stats()

    def reset_stats(self) -> None:
        """Counts from zero. What is resident stays."""
        self.backend.reset_stats()

    def report(self) -> str:
        """The counters as a table, how misses are served, and how an ``"auto"`` budget came about."""
        return table(self.stats(), self.notes)

    def close(self) -> None:
        """Ends threads and frees the memory of the experts. The model cannot run afterwards. May be called twice."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        if self._forked:
            return
        self.backend.close()
        if self.store.spill is not None:
            self.store.spill.close()

    def __enter__(self) -> Handle:
        """The handle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """Threads and arenas cannot be copied: a copy of the model has to be wrapped itself."""
        raise ConfigError("a model that moecore runs cannot be copied; call moecore.unwrap(model) first")

    def __reduce__(self) -> Any:
        """Nor pickled."""
        raise ConfigError("a model that moecore runs cannot be pickled; call moecore.unwrap(model) first")


#: Every handle of this process that somebody still has.
LIVE: weakref.WeakSet[Handle] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child: no handle may ask the parent's threads for anything, nor wait for their end, not even at exit."""
    for handle in list(LIVE):
        handle._forked = True
        handle._lock = threading.Lock()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle.backend))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
