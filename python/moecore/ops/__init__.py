"""What lies between a router's logits and the products of its experts: choose, sort, move, and sum up again.

>>> from moecore import ops
>>> route = ops.route(logits, 8, renormalize=True)                                 # doctest: +SKIP
>>> rows = ops.permute(hidden, route.inverse)                                      # doctest: +SKIP
>>> out = experts(rows, offs=route.ends)                                           # doctest: +SKIP
>>> hidden = ops.combine(out, route.inverse, route.weights, residual=hidden)       # doctest: +SKIP

On CUDA these are moecore's own kernels, one to three launches a call, on torch's current stream, without a wait for the
GPU: they can be captured in a CUDA graph. On the CPU they are plain torch (:mod:`moecore.ops.reference`), which is also
the specification of what the kernels compute. All are known to `torch.compile` as `torch.ops.moecore.*`. Results do not
change from run to run: no order depends on which thread came first.

For inference: there are no gradients, and asking for them is a RuntimeError. A tensor that cannot be used is a
ValueError or a TypeError that names it, before anything is launched; a launch that fails is a
:class:`moecore.DeviceError`.

T is tokens, E experts, k experts of a token, H hidden width, I intermediate width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import define as define
from . import launch
from .check import Gating, refuse_gradients

__all__ = [
    "Route",
    "align",
    "combine",
    "expert_matvec",
    "gate",
    "index",
    "permute",
    "permute_fp8",
    "route",
    "route_permute",
]


class Route(NamedTuple):
    """Who goes where. Rows are pairs (token, choice), sorted by bin, in a bin by token.

    A bin is an expert, or the place that `bin_of` gives it.

    Attributes:
        weights: [T, k].
        ids: [T, k] int32 or int64, best expert first; -1 is nobody.
        ends: [bins] int32: rows of bins 0..=b, the `offs` of `grouped_mm`.
        source: [T * k] int32: the token of each row; -1 from ends[-1] on.
        inverse: [T, k] int32: the row of each pair, or -1.
    """

    weights: Tensor
    ids: Tensor
    ends: Tensor
    source: Tensor
    inverse: Tensor


#: So that an exported program that returns a route can be saved.
torch.utils._pytree._register_namedtuple(Route, serialized_type_name="moecore.ops.Route")


def gate(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    scale: float = 1.0,
    eps: float = 0.0,
    valid: Tensor | None = None,
    weights_dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, Tensor]:
    """Chooses the k best experts of each token. One launch.

    Args:
        logits: [T, E] float32, bfloat16 or float16; E from 1 to 1024. Rows may lie apart, their numbers may not.
        k: experts of a token, from 1 to 32 and at most E.
        scoring: `softmax` over all experts, `sigmoid`, `sqrtsoftplus` = sqrt(log(1 + exp(x))), or `softmax_topk`: the
            softmax over the chosen logits.
        bias: [E] float32, added to the scores (`softmax_topk`: to the logits) for the choice, never to the weights.
        groups: experts are so many groups of neighbours, of which only the best `top_groups` may be chosen from.
            Divides E, at most 32.
        top_groups: from 1 to `groups`; they must hold k experts.
        group_score: a group's score is its best expert's (`max`) or the sum of its two best (`top2`).
        renormalize: weights are divided by their sum + `eps`.
        scale: factor of the weights, after that.
        eps: 0 or more.
        valid: [1] int32: tokens that count, on the device, so that a captured graph can serve fewer. The others get
            id -1 and weight 0.
        weights_dtype: float32, bfloat16 or float16.
        ids_dtype: int32 or int64.

    Returns:
        weights [T, k] and ids [T, k], best first. Of equal experts the one with the lowest id comes first; NaN comes
        last. A token's ids are distinct.

    Raises:
        ValueError, TypeError: an argument cannot be used.
        RuntimeError: an input asks for gradients.
        DeviceError: the launch failed.
    """
    if _direct(logits, bias, valid):
        if torch.is_grad_enabled():
            refuse_gradients(logits, bias)
        return launch.gate(
            logits,
            Gating(k, scoring, bias, groups, top_groups, group_score, renormalize, scale, eps, valid, weights_dtype,
                   ids_dtype),
        )  # fmt: skip
    weights, ids = torch.ops.moecore.gate.default(
        logits, k, scoring, bias, groups, top_groups, group_score, renormalize, scale, eps, valid, weights_dtype,
        ids_dtype,
    )  # fmt: skip
    return weights, ids


def route(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    scale: float = 1.0,
    eps: float = 0.0,
    valid: Tensor | None = None,
    weights_dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int32,
    bin_of: Tensor | None = None,
    bins: int | None = None,
) -> Route:
    """:func:`gate` and :func:`index` in one go: one launch for few tokens, two or three for many.

    Args:
        logits, k, scoring, bias, groups, top_groups, group_score, renormalize, scale, eps, valid, weights_dtype,
            ids_dtype: as :func:`gate`.
        bin_of, bins: as :func:`index`.

    Raises: as :func:`gate`.
    """
    if _direct(logits, bias, valid, bin_of):
        if torch.is_grad_enabled():
            refuse_gradients(logits, bias)
        return Route._make(
            launch.route(
                logits,
                Gating(k, scoring, bias, groups, top_groups, group_score, renormalize, scale, eps, valid,
                       weights_dtype, ids_dtype, bin_of, bins),
            )
        )  # fmt: skip
    return Route(
        *torch.ops.moecore.route.default(
            logits, k, scoring, bias, groups, top_groups, group_score, renormalize, scale, eps, valid, weights_dtype,
            ids_dtype, bin_of, bins,
        )
    )  # fmt: skip


def index(
    ids: Tensor, experts: int, *, bin_of: Tensor | None = None, bins: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts pairs (token, choice) by expert, or by bin. Stable, and without a sort: one to three launches.

    Args:
        ids: [T, k] int32 or int64, k from 1 to 32. A token's ids must be distinct, as any top-k gives them: where they
            are not, what comes out is not specified. Ids that are not in 0..experts are nobody's.
        experts: E, from 1 to 1024.
        bin_of: [E] int32: the bin of each expert, such as the slot it lies in; below 0: nobody. Bins of two experts
            must differ.
        bins: how many, from 1 to 1024. Given if `bin_of` is.

    Returns:
        ends [bins], source [T * k] and inverse [T, k], as in :class:`Route`.

    Raises: as :func:`gate`.
    """
    if _direct(ids, bin_of):
        return launch.index(ids, experts, bin_of, bins)
    ends, source, inverse = torch.ops.moecore.index.default(ids, experts, bin_of, bins)
    return ends, source, inverse


def align(ends: Tensor, inverse: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts a sorted order into blocks of one bin each, as fused expert products take it. One launch.

    Args:
        ends: [bins] int32, from 1 to 1024 bins.
        inverse: [T, k] int32; both as :class:`Route` has them.
        block: places of a block, from 1 to 1024.

    Returns:
        order [capacity] int32: the pair t * k + j of each place, by row, each bin filled up with T * k to whole blocks;
        owner [capacity / block] int32: the bin of each block, -1 behind the last one; places [1] int32: those of all
        blocks that have a bin. capacity = T * k + min(T * k, bins) * (block - 1), less what makes no whole block: it
        suffices for any ends, so no size depends on the GPU's numbers.

    Raises: as :func:`gate`.
    """
    if _direct(ends, inverse):
        return launch.align(ends, inverse, block)
    order, owner, places = torch.ops.moecore.align.default(ends, inverse, block)
    return order, owner, places


def permute(x: Tensor, inverse: Tensor, rows: int | None = None) -> Tensor:
    """Copies each token's row to where its pairs are: out[inverse[t, j]] = x[t]. One launch; each row is read once.

    Args:
        x: [T, H] float32, bfloat16 or float16; the bytes of a row are a multiple of 16.
        inverse: [T, k] int32, k from 1 to 32; what is not in 0..rows is nobody.
        rows: of the result, T * k if left out.

    Returns:
        [rows, H] of x's dtype. Rows that nobody names are not written: they hold anything.

    Raises: as :func:`gate`.
    """
    rows = inverse.numel() if rows is None else rows
    if _direct(x, inverse):
        if torch.is_grad_enabled():
            refuse_gradients(x)
        return launch.permute(x, inverse, rows)
    return torch.ops.moecore.permute.default(x, inverse, rows)


def permute_fp8(x: Tensor, inverse: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`permute`, quantised on the way: each 128 numbers of a row get a scale, the largest of them / 448.

    Args:
        x, inverse, rows: as :func:`permute`; H is a multiple of 128.

    Returns:
        [rows, H] float8_e4m3fn and scales [rows, H / 128] float32: x is about their product. Rows and scales that
        nobody names are not written.

    Raises: as :func:`gate`.
    """
    rows = inverse.numel() if rows is None else rows
    if _direct(x, inverse):
        if torch.is_grad_enabled():
            refuse_gradients(x)
        return launch.permute_fp8(x, inverse, rows)
    out, scales = torch.ops.moecore.permute_fp8.default(x, inverse, rows)
    return out, scales


def route_permute(
    x: Tensor,
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    scale: float = 1.0,
    eps: float = 0.0,
    valid: Tensor | None = None,
    weights_dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int32,
    bin_of: Tensor | None = None,
    bins: int | None = None,
    fp8: bool = False,
) -> tuple[Route, Tensor, Tensor | None]:
    """:func:`route` and :func:`permute` in one go: two launches, three for very many tokens.

    Args:
        x: [T, H] as :func:`permute`, with `fp8` as :func:`permute_fp8`.
        logits, ...: as :func:`route`.
        fp8: rows are quantised as :func:`permute_fp8` does it.

    Returns:
        The route, rows [T * k, H], and scales [T * k, H / 128], or None without `fp8`.

    Raises: as :func:`gate`.
    """
    if _direct(x, logits, bias, valid, bin_of):
        if torch.is_grad_enabled():
            refuse_gradients(x, logits, bias)
        done, rows, scales = launch.route_permute(
            x,
            logits,
            fp8,
            Gating(k, scoring, bias, groups, top_groups, group_score, renormalize, scale, eps, valid, weights_dtype,
                   ids_dtype, bin_of, bins),
        )  # fmt: skip
        return Route._make(done), rows, scales
    *parts, rows, scales = torch.ops.moecore.route_permute.default(
        x, logits, fp8, k, scoring, bias, groups, top_groups, group_score, renormalize, scale, eps, valid,
        weights_dtype, ids_dtype, bin_of, bins,
    )  # fmt: skip
    return Route(*parts), rows, scales if fp8 else None


def combine(
    rows: Tensor,
    inverse: Tensor | None,
    weights: Tensor | None = None,
    *,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sums up each token's rows: residual + shared + scale * sum over j of weights[t, j] * rows[inverse[t, j]].

    One launch, float32, j from 0 up, one rounding at the end. A row that `inverse` does not name is never read, so it
    may hold anything.

    Args:
        rows: [R, H] float32, bfloat16 or float16; the bytes of a row are a multiple of 16.
        inverse: [T, k] int32, k from 1 to 32; what is not in 0..R is left out. None: pair (t, j) is row t * k + j.
        weights: [T, k] float32, bfloat16 or float16. None: 1; then inverse must be given.
        shared: [T, H] of the rows' dtype: the shared expert's result.
        residual: [T, H] of the rows' dtype.
        scale: factor of the weighted sum alone.

    Returns:
        [T, H] of the rows' dtype.

    Raises: as :func:`gate`.
    """
    if _direct(rows, inverse, weights, shared, residual):
        if torch.is_grad_enabled():
            refuse_gradients(rows, weights, shared, residual)
        return launch.combine(rows, inverse, weights, shared, residual, scale)
    return torch.ops.moecore.combine.default(rows, inverse, weights, shared, residual, scale)


def expert_matvec(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, act: str = "silu"
) -> Tensor:
    """All experts of few tokens: gate and up, activation, down, weighted sum. Two launches.

    Each token reads its experts' matrices for itself, at the rate of the memory; for many tokens `grouped_mm` is
    faster. Rounds where transformers' `grouped_mm` rounds.

    Args:
        x: [T, H] float32, bfloat16 or float16.
        ids: [T, k] int32 or int64. One that is not in 0..E adds nothing.
        weights: [T, k] float32, or of x's dtype.
        gate_up: [E, 2 * I, H] of x's dtype: gate over up.
        down: [E, H, I] of x's dtype.
        act: `silu`, `gelu`, `gelu_tanh` or `relu`, of the gate.

    Returns:
        [T, H] of x's dtype.

    Raises: as :func:`gate`.
    """
    if _direct(x, ids, weights, gate_up, down):
        if torch.is_grad_enabled():
            refuse_gradients(x, weights, gate_up, down)
        return launch.expert_matvec(x, ids, weights, gate_up, down, act)
    return torch.ops.moecore.expert_matvec.default(x, ids, weights, gate_up, down, act)


_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_transforms = torch._C._functorch.maybe_current_level
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
"""Types whose memory is where they say. Others may have none: an address of 0 would pass for an argument left out."""


def _direct(x: Tensor, *beside: Tensor | None) -> bool:
    """Whether a call may pass by torch's dispatcher, which costs host time: plain CUDA memory, and nobody watches.

    `torch.jit.trace` would write down the memory, but not the launch; under `vmap` and its like there is no memory.
    """
    if _compiling() or type(x) is not Tensor or not x.is_cuda or _modes():
        return False
    if _tracing() is not None or _transforms() is not None or forward_ad._current_level >= 0:
        return False
    for one in beside:  # noqa: SIM110  # half the time of all()
        if type(one) not in _PLAIN:
            return False
    return True
