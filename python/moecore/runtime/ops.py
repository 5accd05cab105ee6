"""What transformers calls in place of an experts module's own forward."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moecore.errors import ConfigError

from . import resident
from .routers import REPLICATE

if TYPE_CHECKING:
    from torch import nn

    from .handle import Handle

#: Experts modules by number: a compiled graph holds a number, never an object.
MODULES: dict[int, weakref.ref[nn.Module]] = {}
_NUMBERS = itertools.count()


def attach(module: nn.Module, handle: Handle) -> None:
    """Has calls of an experts module go to `handle`."""
    number = next(_NUMBERS)
    MODULES[number] = weakref.ref(module, lambda _: MODULES.pop(number, None))
    # Past nn.Module's own bookkeeping: none of these is a part of the model.
    vars(module)["_moecore"] = handle
    vars(module)["_moecore_number"] = number
    vars(module)["_moecore_guard"] = module.register_state_dict_pre_hook(refuse_state)
    vars(module)[REPLICATE] = refuse_replica


def detach(module: nn.Module) -> None:
    """Undoes :func:`attach`. Harmless when called twice."""
    MODULES.pop(vars(module).pop("_moecore_number", -1), None)
    if vars(module).pop("_moecore", None) is not None:
        vars(module).pop("_moecore_guard").remove()
        del vars(module)[REPLICATE]


def refuse_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before the state of an experts module is taken, whoever asks: a parent that was not wrapped itself, for one."""
    name = prefix.rstrip(".") or type(module).__name__
    raise ConfigError(
        f"{name}: moecore runs these experts, and they are not part of the model's state: a checkpoint made of it "
        "would be without experts; call moecore.unwrap(model) on what was wrapped first"
    )


def refuse_replica() -> nn.Module:
    """In place of `_replicate_for_data_parallel`: slots are those of one GPU."""
    raise ConfigError(
        "a model whose experts moecore runs cannot be replicated by torch.nn.DataParallel: they are on one GPU; start "
        "a process for each GPU and load the model there"
    )


def run(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
    """hidden [T, H], index int64 [T, k], weights [T, k] -> [T, H]. Registered with transformers for all models."""
    if "_moecore" not in vars(module):
        return resident.run(module, hidden, index, weights)
    if torch.compiler.is_compiling():
        return torch.ops.moecore.experts(hidden, index, weights, module._moecore_number)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _NoBackward.apply(hidden, index, weights, module)
    return _call(module, hidden, index, weights)


def _call(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    handle: Handle = vars(module)["_moecore"]
    if module._forward_pre_hooks:
        handle.backend.forget()
    with torch.no_grad():
        return handle.run(module, hidden, index, weights)


class _NoBackward(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """Experts that come and go keep nothing for a backward pass; saying so beats gradients that are wrong."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor, weights: Tensor, module: nn.Module) -> Tensor:
        return _call(module, hidden, index, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("moecore runs experts for inference only; call moecore.unwrap(model) before training")


@torch.library.custom_op("moecore::experts", mutates_args=())  # type: ignore[untyped-decorator]
def experts(hidden: Tensor, index: Tensor, weights: Tensor, number: int) -> Tensor:
    """The opaque form for `torch.compile`."""
    module = MODULES.get(number, lambda: None)()
    if module is None:
        raise gone()
    return _call(module, hidden, index, weights)


def gone() -> ConfigError:
    """What a compiled graph without its model raises."""
    return ConfigError("this compiled graph belongs to a model that is gone or unwrapped; compile the model again")


@experts.register_fake  # type: ignore[untyped-decorator]
def _(hidden: Tensor, index: Tensor, weights: Tensor, number: int) -> Tensor:
    return torch.empty_like(hidden)
