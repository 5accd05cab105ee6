"""The ops as torch knows them: `torch.ops.moecore.*` for CUDA, the CPU, fake tensors, and autograd, which refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import check, launch, reference
from .check import FP8_BLOCK, Gating

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_GATE = """
    int k, str scoring="softmax", Tensor? bias=None, int groups=1, int top_groups=1, str group_score="max",
    bool renormalize=False, float scale=1.0, float eps=0.0, Tensor? valid=None, ScalarType weights_dtype=float,
    ScalarType ids_dtype=int
"""
_BINS = "Tensor? bin_of=None, int? bins=None"

SCHEMAS = {
    "gate": f"(Tensor logits, {_GATE}) -> (Tensor weights, Tensor ids)",
    "route": f"(Tensor logits, {_GATE}, {_BINS}) -> "
    "(Tensor weights, Tensor ids, Tensor ends, Tensor source, Tensor inverse)",
    "index": f"(Tensor ids, int experts, {_BINS}) -> (Tensor ends, Tensor source, Tensor inverse)",
    "align": "(Tensor ends, Tensor inverse, int block) -> (Tensor order, Tensor owner, Tensor places)",
    "permute": "(Tensor x, Tensor inverse, SymInt rows) -> Tensor",
    "permute_fp8": "(Tensor x, Tensor inverse, SymInt rows) -> (Tensor rows, Tensor scales)",
    # Without fp8 there are no scales: [0, 0].
    "route_permute": f"(Tensor x, Tensor logits, bool fp8, {_GATE}, {_BINS}) -> "
    "(Tensor weights, Tensor ids, Tensor ends, Tensor source, Tensor inverse, Tensor rows, Tensor scales)",
    "combine": "(Tensor rows, Tensor? inverse, Tensor? weights=None, Tensor? shared=None, Tensor? residual=None, "
    "float scale=1.0) -> Tensor",
    "expert_matvec": "(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, str act=\"silu\") -> Tensor",
}  # fmt: skip
"""What each op takes and gives. Sizes and meanings are those of the functions in :mod:`moecore.ops`."""


_GATE_FIELDS = Gating._fields.index("bin_of")


# On CUDA, where the schema is flat and the launch is not.


def _gate_cuda(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return launch.gate(logits, Gating(*options))


def _route_cuda(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return launch.route(logits, Gating(*options))


def _route_permute_cuda(x: Tensor, logits: Tensor, fp8: bool, *options: Any) -> tuple[Tensor, ...]:
    route, rows, scales = launch.route_permute(x, logits, fp8, Gating(*options))
    return *route, rows, _no_scales(x) if scales is None else scales


# On the CPU: the same checks, then the specification.


def _gate_cpu(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    check.gate(logits, Gating(*options))
    return reference.gate(logits, *options[:_GATE_FIELDS])


def _route_cpu(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    g = Gating(*options)
    check.route(logits, g)
    weights, ids = reference.gate(logits, *options[:_GATE_FIELDS])
    return weights, ids, *reference.index(ids, logits.shape[1], g.bin_of, g.bins)


def _route_permute_cpu(x: Tensor, logits: Tensor, fp8: bool, *options: Any) -> tuple[Tensor, ...]:
    check.route_permute(x, logits, Gating(*options), fp8=fp8)
    route = _route_cpu(logits, *options)
    inverse = route[-1]
    if fp8:
        return *route, *reference.permute_fp8(x, inverse, inverse.numel())
    return *route, reference.permute(x, inverse, inverse.numel()), _no_scales(x)


def _index_cpu(ids: Tensor, experts: int, bin_of: Tensor | None = None, bins: int | None = None) -> tuple[Tensor, ...]:
    check.index(ids, experts, bin_of, bins)
    return reference.index(ids, experts, bin_of, bins)


def _align_cpu(ends: Tensor, inverse: Tensor, block: int) -> tuple[Tensor, ...]:
    check.align(ends, inverse, block)
    return reference.align(ends, inverse, block)


def _permute_cpu(x: Tensor, inverse: Tensor, rows: int) -> Tensor:
    check.permute(x, inverse, rows, fp8=False)
    return reference.permute(x, inverse, rows)


def _permute_fp8_cpu(x: Tensor, inverse: Tensor, rows: int) -> tuple[Tensor, ...]:
    check.permute(x, inverse, rows, fp8=True)
    return reference.permute_fp8(x, inverse, rows)


def _combine_cpu(
    rows: Tensor,
    inverse: Tensor | None,
    weights: Tensor | None = None,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    check.combine(rows, inverse, weights, shared, residual)
    return reference.combine(rows, inverse, weights, shared, residual, scale)


def _expert_matvec_cpu(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str = "silu"
) -> Tensor:
    check.expert_matvec(x, ids, weights, gate_up, down, act)
    return reference.expert_matvec(x, ids, weights, gate_up, down, act)


# For fake tensors: the same checks, then shapes and dtypes alone.


def _gate_fake(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    g = Gating(*options)
    check.gate(logits, g)
    shape = (logits.shape[0], g.k)
    return logits.new_empty(shape, dtype=g.weights_dtype), logits.new_empty(shape, dtype=g.ids_dtype)


def _route_fake(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    g = Gating(*options)
    check.route(logits, g)
    bins = logits.shape[1] if g.bins is None else g.bins
    return *_gate_fake(logits, *options), *_empty_index(logits, logits.shape[0], g.k, bins)


def _route_permute_fake(x: Tensor, logits: Tensor, fp8: bool, *options: Any) -> tuple[Tensor, ...]:
    g = Gating(*options)
    check.route_permute(x, logits, g, fp8=fp8)
    rows = logits.shape[0] * g.k
    moved = _empty_fp8(x, rows) if fp8 else (x.new_empty((rows, x.shape[1])), _no_scales(x))
    return *_route_fake(logits, *options), *moved


def _index_fake(ids: Tensor, experts: int, bin_of: Tensor | None = None, bins: int | None = None) -> tuple[Tensor, ...]:
    check.index(ids, experts, bin_of, bins)
    return _empty_index(ids, ids.shape[0], ids.shape[1], experts if bins is None else bins)


def _align_fake(ends: Tensor, inverse: Tensor, block: int) -> tuple[Tensor, ...]:
    check.align(ends, inverse, block)
    room = check.capacity(inverse.shape[0] * inverse.shape[1], ends.shape[0], block)
    return ends.new_empty(room), ends.new_empty(room // block), ends.new_empty(1)


def _permute_fake(x: Tensor, inverse: Tensor, rows: int) -> Tensor:
    check.permute(x, inverse, rows, fp8=False)
    return x.new_empty((rows, x.shape[1]))


def _permute_fp8_fake(x: Tensor, inverse: Tensor, rows: int) -> tuple[Tensor, ...]:
    check.permute(x, inverse, rows, fp8=True)
    return _empty_fp8(x, rows)


def _combine_fake(
    rows: Tensor,
    inverse: Tensor | None,
    weights: Tensor | None = None,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    check.combine(rows, inverse, weights, shared, residual)
    pairs = weights if inverse is None else inverse
    assert pairs is not None  # noqa: S101  # checked above
    return rows.new_empty((pairs.shape[0], rows.shape[1]))


def _expert_matvec_fake(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str = "silu"
) -> Tensor:
    check.expert_matvec(x, ids, weights, gate_up, down, act)
    return torch.empty_like(x)


def _empty_index(like: Tensor, tokens: int, k: int, bins: int) -> tuple[Tensor, ...]:
    return (
        like.new_empty((bins,), dtype=torch.int32),
        like.new_empty((tokens * k,), dtype=torch.int32),
        like.new_empty((tokens, k), dtype=torch.int32),
    )


def _empty_fp8(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    return (
        x.new_empty((rows, x.shape[1]), dtype=torch.float8_e4m3fn),
        x.new_empty((rows, x.shape[1] // FP8_BLOCK), dtype=torch.float32),
    )


def _no_scales(x: Tensor) -> Tensor:
    return x.new_empty((0, 0), dtype=torch.float32)


def _refusing(name: str) -> Callable[..., Any]:
    """The op for autograd: it goes on to the device if no gradient can be asked of it."""
    op = getattr(torch.ops.moecore, name).default

    def refusing(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if torch.is_grad_enabled() or check.has_tangent(*tensors):
            check.refuse_gradients(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return refusing


#: Lives as long as the process: an op goes when its library does.
_library = torch.library.Library("moecore", "FRAGMENT")
for _name, _cuda, _cpu, _fake in (
    ("gate", _gate_cuda, _gate_cpu, _gate_fake),
    ("route", _route_cuda, _route_cpu, _route_fake),
    ("route_permute", _route_permute_cuda, _route_permute_cpu, _route_permute_fake),
    ("index", launch.index, _index_cpu, _index_fake),
    ("permute", launch.permute, _permute_cpu, _permute_fake),
    ("permute_fp8", launch.permute_fp8, _permute_fp8_cpu, _permute_fp8_fake),
    ("align", launch.align, _align_cpu, _align_fake),
    ("combine", launch.combine, _combine_cpu, _combine_fake),
    ("expert_matvec", launch.expert_matvec, _expert_matvec_cpu, _expert_matvec_fake),
):
    _library.define(f"{_name}{SCHEMAS[_name]}")
    _library.impl(_name, _cuda, "CUDA")
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _refusing(_name), "Autograd")
    torch.library.register_fake(f"moecore::{_name}", _fake, lib=_library)
