"""Taking over a model's experts, and giving them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moecore._core import check_policy
from moecore.errors import BudgetError, ConfigError, DeviceError, MoecoreError, TargetError

from . import ahead, budget, ops, resident, routers, rows
from .families import pretrained, take_over
from .handle import Handle
from .host import HostBackend
from .memory import auto_budget

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from moecore._core import HostRows

    from .families import Taken
    from .handle import Backend
    from .rows import Store

    #: Layer and expert -> the expert's parts.
    Row = Callable[[int, int], dict[str, Tensor]]

#: Under this name a model keeps the paths of the routers that were exchanged for it.
ROUTERS = "_moecore_routers"

#: Methods that write a checkpoint.
SAVES = ("save_pretrained", "push_to_hub")

#: Evicts by frequency over recency over the wait until the layer's next turn: the best mean on real traces
#: (benches/results/policies.md).
DEFAULT_POLICY = "cyclic"


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


def check_options(options: Options) -> None:
    """Raises for what no model could be run with.

    Raises:
        TargetError: there is no such policy, or `max_model_len` is no number of tokens.
        BudgetError: a budget is not understood.
    """
    check_policy(options.policy)
    for name, value in (("expert_memory", options.expert_memory), ("host_memory", options.host_memory)):
        if value != "auto":
            budget.parse(value, budget.LARGEST, name)
    tokens = options.max_model_len
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise TargetError(f"max_model_len must be a positive number of tokens, not {tokens!r}")


def check_device(device: torch.device) -> None:
    """Raises DeviceError for a kind of device that nobody runs experts on."""
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(
            f"moecore runs experts on the CPU and on NVIDIA GPUs, not on {device}; move the model there with .to(...), "
            "or name another device"
        )


def count_slots(
    model: nn.Module, store: Store, device: torch.device, options: Options, notes: list[str], freed: int = 0
) -> int:
    """How many experts may be on the device at a time. `freed`: see :func:`auto_budget`.

    Raises:
        BudgetError: none.
    """
    if options.expert_memory == "auto":
        sum_ = auto_budget(model, device, store.bytes, options.max_model_len, freed)
        memory = sum_.budget
        notes.append(f"budget: {sum_}")
    else:
        memory = budget.parse(options.expert_memory, store.bytes, "expert_memory")
    slots = min(memory // store.slot_bytes, store.core.experts)
    if slots < 1:
        raise BudgetError(
            f"expert_memory of {memory:,} bytes holds no expert; the smallest that works is {store.slot_bytes:,} "
            f"bytes, and {store.min_slots * store.slot_bytes:,} hold the experts of one token"
        )
    return int(slots)


def start(
    model: nn.Module,
    store: Store,
    taken: list[Taken],
    device: torch.device,
    options: Options,
    below: HostRows | None = None,
    notes: list[str] | None = None,
) -> Handle:
    """Starts the experts of a model whose parameters are out of it, and leads its calls to them.

    `below` has the experts already; default: they come from the store's files.
    """
    notes = [] if notes is None else notes
    slots = count_slots(model, store, device, options, notes)
    backend = open_backend(store, slots, device, options, below, notes)
    try:
        handle = Handle(model, store, backend, taken, notes)
        take_over(model, ops.run, taken)
        for one in taken:
            ops.attach(one.module, handle)
        vars(model)[ROUTERS] = ahead.lead(model, taken) if device.type == "cuda" else []
    except BaseException:
        backend.close()
        release(model, taken)
        raise
    vars(model)["moecore"] = handle
    for part in savers(model):
        vars(part).update(dict.fromkeys(SAVES, refuse_to_save))
    return handle


def open_backend(
    store: Store, slots: int, device: torch.device, options: Options, below: HostRows | None, notes: list[str]
) -> Backend:
    """What runs experts on this kind of device."""
    if device.type == "cpu":
        return HostBackend(store, slots, options.policy)
    from .cuda import CudaBackend, host_rows

    return CudaBackend(store, slots, device, options, below or host_rows(store, device, options, notes))


def savers(model: nn.Module) -> list[nn.Module]:
    """The model and the models inside it: each can write a checkpoint of its own."""
    return [model, *pretrained(model)]


def refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of `save_pretrained`: without its experts a checkpoint would be worthless, and look whole."""
    raise ConfigError(
        "this model's experts are run by moecore and are not part of its state: saving it would write a checkpoint "
        "without experts; call moecore.unwrap(model) first"
    )


def release(model: nn.Module, taken: list[Taken]) -> None:
    """Leads calls back to the model's own code."""
    routers.restore(model, vars(model).pop(ROUTERS, []))
    for module in model.modules():
        if "_moecore_chooser" in vars(module):  # a router that somebody else has exchanged, or wrapped
            routers.lead_to(module, None)
    for one in taken:
        one.restore()
        ops.detach(one.module)
    vars(model).pop("moecore", None)
    for part in savers(model):
        for name in SAVES:
            vars(part).pop(name, None)


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
        raise ConfigError(
            "moecore does not run this model; only what moecore.wrap or moecore.load returned can be unwrapped"
        )
    if handle.closed:
        raise MoecoreError("the experts of this model were closed and cannot be given back; load the model again")
    handle.check()
    if any(one.decode is not None for one in handle.taken):
        raise ConfigError(
            "the experts are stored quantised and run in that form only; load the model with transformers"
        )
    resident.unfuse(model)
    device = device_of(model)
    whole = [restored(number, one, handle.backend.row, device) for number, one in enumerate(handle.taken)]
    release(model, handle.taken)
    for one, params in zip(handle.taken, whole, strict=True):
        put_params(one, params)
    handle.close()
    return model


def restored(layer: int, taken: Taken, row: Row, device: torch.device) -> dict[str, torch.nn.Parameter]:
    """The parameters of an experts module, filled from its rows."""
    originals: dict[str, Original] = vars(taken.module).get("_moecore_originals", {})
    whole = {
        param.name: torch.empty(taken.num_experts, *param.shape, dtype=param.dtype, device=device)
        for param in taken.params
    }
    for expert in range(taken.num_experts):
        for name, part in row(layer, expert).items():
            whole[name][expert].copy_(part)
    params = {}
    for name, tensor in whole.items():
        original = originals.get(name)
        if original and original.shape.numel() > tensor.numel():  # rows that no call reads, as of identity experts
            tensor = torch.cat([tensor, tensor.new_zeros(original.shape[0] - taken.num_experts, *tensor.shape[1:])])
        shaped = tensor.view(original.shape) if original else tensor
        trains = original.requires_grad if original else tensor.is_floating_point()
        params[name] = torch.nn.Parameter(shaped, requires_grad=trains)
    return params


def wrap_model(model: nn.Module, options: Options, found: list[Taken]) -> Handle:
    """Moves the experts of a loaded model out of it and starts them."""
    device = device_of(model)
    check_device(device)
    plan = rows.held(found)
    # An automatic budget is worked out anew when the experts are out, of what is free then: no more than here.
    count_slots(model, plan, device, options, [], freed=plan.bytes)
    if device.type == "cuda":
        return wrap_on_gpu(model, options, found, device)
    store = rows.from_modules(found, free_params, options.spill_dir)
    try:
        return start(model, store, found, device, options)
    except BaseException:
        backend = HostBackend(store, store.min_slots, "lru", threads=1)
        give_back(found, lambda number, expert: backend.row(number, expert), device)
        backend.close()
        if store.spill is not None:
            store.spill.close()
        raise


def wrap_on_gpu(model: nn.Module, options: Options, found: list[Taken], device: torch.device) -> Handle:
    """As :func:`wrap_model`: to pinned host rows, and to a file only where these do not hold every expert."""
    from . import cuda

    notes: list[str] = []
    store = rows.held(found)
    below = cuda.host_rows(store, device, options, notes)
    if below.rows < store.core.experts:
        del below
        store = rows.from_modules(found, free_params, options.spill_dir)
        below = cuda.host_rows(store, device, options, notes := [])
    else:
        cuda.put(below, store, found)
        for one in found:
            free_params(one)
    torch.cuda.empty_cache()
    try:
        return start(model, store, found, device, options, below, notes)
    except BaseException:
        give_back(found, lambda number, expert: cuda.copied_row(below, store.layouts[number], expert), device)
        raise


def give_back(taken: list[Taken], row: Row, device: torch.device) -> None:
    """After a failure: the model gets its experts again."""
    for number, one in enumerate(taken):
        put_params(one, restored(number, one, row, device))


def put_params(taken: Taken, params: dict[str, torch.nn.Parameter]) -> None:
    """Puts parameters where :func:`free_params` took them from."""
    for path, param in params.items():
        owner, name = owner_of(taken, path)
        owner._parameters[name] = param
    vars(taken.module).pop("_moecore_originals", None)
