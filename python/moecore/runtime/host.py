"""A model on the CPU: slots are plain memory, the tier below is a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moecore._core import HostEngine

from . import compute
from .stats import Stats, collect

if TYPE_CHECKING:
    from torch import Tensor

    from moecore.ops.check import Gating

    from .families import Taken
    from .rows import Layout, Store

#: Up to this many tokens a call is a decode step, whose experts go through the cache; above it is a prefill, which
#: streams. The limit does not depend on the budget, so the same kernels run whatever is resident.
DECODE_TOKENS = 16

#: Slots begin at multiples of this, as direct reads demand.
PAGE = 4096


class HostBackend:
    """Experts in memory of the host, `slots` of them at a time."""

    path = "host memory over files"

    def __init__(self, store: Store, slots: int, policy: str, threads: int = 8) -> None:
        self.store = store
        self.layouts = store.layouts
        stride = store.slot_bytes
        # Untouched pages of a fresh mapping take no memory: an arena grows as its slots are filled.
        whole = torch.empty(slots * stride + PAGE, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGE
        self.arena = whole[start : start + slots * stride].view(slots, stride)
        self.engine = HostEngine(
            store.core, address=self.arena.data_ptr(), bytes=slots * stride, owner=whole, policy=policy, threads=threads
        )
        self.slots = slots
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._last: Stats | None = None

    def route(self, layer: int, taken: Taken, logits: Tensor, gating: Gating) -> tuple[Tensor, Tensor] | None:
        """None: on the CPU the model's own routers choose."""
        return None

    def forget(self) -> None:
        """Nothing is routed ahead."""

    def run(self, layer: int, taken: Taken, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """One call of a layer: hidden [T, H], index and weights [T, k] -> [T, H]."""
        routing = compute.Routing.of(taken, index)
        experts = routing.asked()
        out = compute.begin(taken, hidden, index)
        tokens = [routing.starts[expert + 1] - routing.starts[expert] for expert in experts]
        layout = self.layouts[layer]
        prefill = hidden.shape[0] > DECODE_TOKENS
        # Where every expert has a slot there is nothing for a prefill to disturb.
        cached = len(experts) <= self.slots and (not prefill or self.slots == self.store.core.experts)
        if experts and cached:
            rows = self.engine.acquire(layer, experts, tokens, prefill)
            try:
                self._accumulate(taken, layout, hidden, routing, experts, rows.slots, out)
            finally:
                rows.release()
        elif experts:
            waves = self.engine.stream(layer, experts, tokens, prefill)
            try:
                for wave, slots in waves:
                    self._accumulate(taken, layout, hidden, routing, wave, slots, out)
            finally:
                waves.close()
        return compute.combine(taken, out, weights, hidden.shape[0], hidden.dtype, index)

    def _accumulate(
        self,
        taken: Taken,
        layout: Layout,
        hidden: Tensor,
        routing: compute.Routing,
        experts: list[int],
        slots: list[int],
        out: Tensor,
    ) -> None:
        where = dict(zip(experts, slots, strict=True))
        compute.accumulate(taken, hidden, routing, experts, lambda expert: self.views(layout, where[expert]), out)

    def views(self, layout: Layout, slot: int) -> dict[str, Tensor]:
        """The parts of the expert in a slot, as tensors over the arena."""
        key = (layout.number, slot)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = layout.views(self.arena[slot])
        return views

    def row(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The parts of one expert, copied out."""
        rows = self.engine.acquire(layer, [expert], [0], False)
        try:
            return {name: part.clone() for name, part in self.views(self.layouts[layer], rows.slots[0]).items()}
        finally:
            rows.release()

    def stats(self) -> Stats:
        """What the engine has counted."""
        return self._last or collect(
            self.engine.stats(),
            [layout.experts for layout in self.layouts],
            slots=self.slots,
            resident=self.engine.resident,
            slot_bytes=self.store.slot_bytes,
            path=self.path,
        )

    def reset_stats(self) -> None:
        """Counts from zero."""
        if self._last is None:
            self.engine.reset_stats()

    def close(self) -> None:
        """Ends threads and reads, and lets the memory go. What was counted stays."""
        self._last = self.stats()
        self.engine.close()
        del self.engine  # it owns the memory
        self._views.clear()
        self.arena = torch.empty(0, 0, dtype=torch.uint8)
