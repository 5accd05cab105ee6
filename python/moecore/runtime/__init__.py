"""Running a Mixture-of-Experts model in a fraction of its memory. Needs ``pip install "moecore[torch]"``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moecore.errors import ConfigError

from . import rows
from .families import find, refuse
from .handle import Handle
from .resident import REPORT, Fused, fuse, register, unfuse
from .skeleton import load_skeleton
from .stats import Counters, Stats
from .takeover import (
    DEFAULT_POLICY,
    Options,
    check_device,
    check_options,
    count_slots,
    start,
    unwrap,
    wrap_model,
)

if TYPE_CHECKING:
    import os

    from torch import nn

    from .budget import Budget

__all__ = ["Counters", "Fused", "Handle", "Stats", "fuse", "load", "register", "unfuse", "unwrap", "wrap"]

# A fused model, or a part of one, may come out of a pickle, which imports this package alone.
register()


def load(
    repo_or_path: str | os.PathLike[str],
    *,
    expert_memory: Budget = "auto",
    host_memory: Budget = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    policy: str = DEFAULT_POLICY,
    max_model_len: int | None = None,
    spill_dir: str | os.PathLike[str] | None = None,
    **from_pretrained_kwargs: Any,
) -> Any:
    """Loads a transformers MoE model of which a part of the experts is on the device at any time.

    Experts are never materialised while the model loads: the loader does not read their bytes.

    Args:
        repo_or_path: a folder with a checkpoint in safetensors, or a repo of the hub.
        expert_memory: device memory for experts: bytes, ``"12GiB"``, a share of all experts as in ``"25%"``, or
            ``"auto"``: what is free less what the KV cache of `max_model_len` tokens and activations need.
        host_memory: on a GPU, pinned host memory for experts that are not on the device; the rest stays on disk.
        device: ``"cpu"``, ``"cuda"``, ...; default: CUDA where there is one.
        dtype: of the model's weights; default: as they are stored.
        policy: which expert gives way: ``"cyclic"``, ``"lru"``, ``"lfu"``, ``"lfru"`` or ``"ema"``.
        max_model_len: tokens that the KV cache must have room for, with ``expert_memory="auto"``.
        spill_dir: folder for experts whose stored bytes are not their final form.
        from_pretrained_kwargs: for transformers' ``from_pretrained``.

    Returns:
        The model, with a :class:`Handle` as ``model.moecore``.

    Raises:
        ConfigError: the model has no experts that moecore can take over, or its checkpoint cannot be used.
        BudgetError: a budget is not understood, or holds no expert.
        TargetError: there is no such policy, or `max_model_len` is no number of tokens.
        DeviceError: the device is none that moecore runs experts on, or has failed.
        FileError: a file cannot be read.
    """
    options = _options(expert_memory, host_memory, policy, max_model_len, spill_dir)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype is not None:
        from_pretrained_kwargs["dtype"] = dtype
    check_device(where)
    model, index = load_skeleton(repo_or_path, **from_pretrained_kwargs)
    if "device_map" not in from_pretrained_kwargs:
        model = model.to(where)
    count_slots(model, rows.without_files(rows.layouts_of(index)), where, options, [])  # before rows are written
    store = rows.from_index(index, options.spill_dir)
    try:
        start(model, store, [layer.taken for layer in index.layers], where, options)
    except BaseException:
        if store.spill is not None:
            store.spill.close()
        raise
    return model.eval()


def wrap(
    model: nn.Module,
    *,
    expert_memory: Budget = "auto",
    host_memory: Budget = "auto",
    policy: str = DEFAULT_POLICY,
    max_model_len: int | None = None,
    spill_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Takes over the experts of a model that is already loaded, and frees their memory.

    On the CPU the experts go to a file without a name in `spill_dir` (default: the temporary folder); on a GPU to
    pinned host memory. Arguments as for :func:`load`; where one is wrong nothing is written, and the model stays as it
    is.

    The model, and every module that it is a part of, has no state until :func:`unwrap`: `state_dict` raises, so that no
    checkpoint is written without experts.

    Returns:
        The same model, with a :class:`Handle` as ``model.moecore``.

    Raises:
        ConfigError: the model has no experts that moecore can take over, or is run by it already.
        BudgetError: a budget is not understood, or holds no expert.
        TargetError: there is no such policy, or `max_model_len` is no number of tokens.
        DeviceError: the model's device is none that moecore runs experts on, or has failed.
        FileError: experts cannot be written to `spill_dir`.
    """
    options = _options(expert_memory, host_memory, policy, max_model_len, spill_dir)
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"wrap takes a model that is loaded, not {type(model).__name__}; moecore.load takes a name")
    if any("_moecore" in vars(module) for module in model.modules()):
        raise ConfigError("moecore runs this model, or a part of it, already; call moecore.unwrap on what was wrapped")
    if any(REPORT in vars(module) for module in model.modules()):
        raise ConfigError("moecore.fuse has changed this model; call moecore.unfuse(model) before moecore.wrap(model)")
    refuse(model)
    found = find(model)
    if not found:
        from .families import take_over

        take_over(model, found=[])  # says what is missing
    wrap_model(model, options, found)
    return model


def _options(
    expert_memory: Budget,
    host_memory: Budget,
    policy: str,
    max_model_len: int | None,
    spill_dir: str | os.PathLike[str] | None,
) -> Options:
    options = Options(
        expert_memory, host_memory, str(policy), max_model_len, None if spill_dir is None else Path(spill_dir)
    )
    check_options(options)
    return options
