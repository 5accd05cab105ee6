"""Taking over a model's experts, and giving them back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moecore.errors import BudgetError, ConfigError, MoecoreError

from . import budget, ops, rows
from .families import take_over
from .handle import Handle
from .host import HostBackend
from .memory import auto_budget

if TYPE_CHECKING:
    from torch import nn

    from .families import Taken
    from .handle import Backend
    from .rows import Store

#: Evicts the expert with the fewest recent uses: the best mean on real traces (benches/results/policies.md).
DEFAULT_POLICY = "lfru"


@dataclass(frozen=True)
class Options:
    """What a person may choose; see :func:`moecore.load`."""

    expert_memory: budget.Budget = "auto"
    host_memory: budget.Budget = "auto"
    policy: str = DEFAULT_POLICY
    max_model_len: int | None = None
    spill_dir: Path | None = None


@dataclass(frozen=True)
class Original:
    """A parameter as the model had it before its experts went."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


def free_params(taken: Taken) -> None:
    """Takes the parameters of a loaded experts module out of it; remembers how to make room for them again."""
    originals = {}
    for param in taken.params:
        owner, name = owner_of(taken, param.name)
        whole = owner._parameters[name]
        originals[param.name] = Original(whole.shape, whole.dtype, whole.requires_grad)
        owner._parameters[name] = None
    vars(taken.module)["_moecore_originals"] = originals


def owner_of(taken: Taken, path: str) -> tuple[Any, str]:
    """The module that holds a parameter, and its name there."""
    owner, _, name = path.rpartition(".")
    return (taken.module.get_submodule(owner) if owner else taken.module), name


def start(model: nn.Module, store: Store, taken: list[Taken], device: torch.device, options: Options) -> Handle:
    """Starts the experts of a model whose parameters are out of it, and leads its calls to them."""
    notes = []
    if options.expert_memory == "auto":
        sum_ = auto_budget(model, device, store.bytes, options.max_model_len)
        memory = sum_.budget
        notes.append(f"budget: {sum_}")
    else:
        memory = budget.parse(options.expert_memory, store.bytes, "expert_memory")
    slots = min(memory // store.slot_bytes, store.core.experts)
    if slots < 1:
        raise BudgetError(
            f"expert_memory of {memory:,} bytes holds no expert; the smallest that works is {store.slot_bytes:,} bytes, "
            f"and {store.min_slots * store.slot_bytes:,} hold the experts of one token"
        )
    backend = open_backend(store, slots, device, options, notes)
    try:
        handle = Handle(model, store, backend, taken, notes)
        take_over(model, ops.run, taken)
        for one in taken:
            ops.attach(one.module, handle)
    except BaseException:
        backend.close()
        release(model, taken)
        raise
    vars(model)["moecore"] = handle
    vars(model)["save_pretrained"] = refuse_to_save
    return handle


def open_backend(store: Store, slots: int, device: torch.device, options: Options, notes: list[str]) -> Backend:
    """What runs experts on this kind of device."""
    if device.type == "cpu":
        return HostBackend(store, slots, options.policy)
    if device.type == "cuda":
        from .cuda import CudaBackend

        return CudaBackend(store, slots, device, options, notes)
    raise ConfigError(f"moecore runs experts on the CPU and on CUDA devices, not on {device.type!r}")


def refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of `save_pretrained`: without its experts a checkpoint would be worthless, and look whole."""
    raise ConfigError(
        "this model's experts are run by moecore and are not part of its state: saving it would write a checkpoint "
        "without experts; call moecore.unwrap(model) first"
    )


def release(model: nn.Module, taken: list[Taken]) -> None:
    """Leads calls back to the model's own code."""
    for one in taken:
        one.restore()
        ops.detach(one.module)
    vars(model).pop("moecore", None)
    vars(model).pop("save_pretrained", None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes."""
    return next((param.device for param in model.parameters() if not param.is_meta), torch.device("cpu"))


def unwrap(model: nn.Module) -> nn.Module:
    """Gives the model back as it was before :func:`moecore.wrap`, with all its experts in its own memory.

    A model that :func:`moecore.load` has loaded gets its experts for the first time.

    Returns:
        The same model.

    Raises:
        ConfigError: moecore does not run this model, or its experts are stored quantised.
    """
    handle: Handle | None = vars(model).get("moecore")
    if not isinstance(handle, Handle):
        raise ConfigError("moecore does not run this model; only what moecore.wrap or moecore.load returned can be unwrapped")
    if handle.closed:
        raise MoecoreError("the experts of this model were closed and cannot be given back; load the model again")
    if any(one.decode is not None for one in handle.taken):
        raise ConfigError("the experts are stored quantised and run in that form only; load the model with transformers")
    device = device_of(model)
    whole = [restored(handle, number, one, device) for number, one in enumerate(handle.taken)]
    release(model, handle.taken)
    for one, params in zip(handle.taken, whole, strict=True):
        for path, param in params.items():
            owner, name = owner_of(one, path)
            owner._parameters[name] = param
        vars(one.module).pop("_moecore_originals", None)
    handle.close()
    return model


def restored(handle: Handle, layer: int, taken: Taken, device: torch.device) -> dict[str, torch.nn.Parameter]:
    """The parameters of an experts module, filled from its rows."""
    originals: dict[str, Original] = vars(taken.module).get("_moecore_originals", {})
    whole = {
        param.name: torch.empty(taken.num_experts, *param.shape, dtype=param.dtype, device=device)
        for param in taken.params
    }
    for expert in range(taken.num_experts):
        for name, part in handle.backend.row(layer, expert).items():
            whole[name][expert].copy_(part)
    params = {}
    for name, tensor in whole.items():
        original = originals.get(name)
        shaped = tensor.view(original.shape) if original else tensor
        params[name] = torch.nn.Parameter(shaped, requires_grad=bool(original and original.requires_grad))
    return params


def wrap_model(model: nn.Module, options: Options, found: list[Taken]) -> Handle:
    """Moves the experts of a loaded model out of it and starts them."""
    device = device_of(model)
    store = rows.from_modules(found, free_params, options.spill_dir)
    try:
        return start(model, store, found, device, options)
    except BaseException:
        give_back(store, found, device)
        raise


def give_back(store: Store, taken: list[Taken], device: torch.device) -> None:
    """After a failure: the model gets its experts again, from the file that was just written."""
    backend = HostBackend(store, store.min_slots, "lru", threads=1)
    handle = Handle(torch.nn.Module(), store, backend, taken, [])
    for number, one in enumerate(taken):
        for path, param in restored(handle, number, one, device).items():
            owner, name = owner_of(one, path)
            owner._parameters[name] = param
        vars(one.module).pop("_moecore_originals", None)
    handle.close()
