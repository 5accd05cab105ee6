"""What the routing kernels compute, as plain torch: the specification, and the implementation on the CPU.

Nothing here is fast. T is tokens, E experts, k experts of a token, H hidden width, I intermediate width. Arguments are
as :mod:`moecore.ops` documents them, and checked before they come here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .check import FP8_BLOCK, capacity

if TYPE_CHECKING:
    from collections.abc import Callable

FP8_MAX = 448.0
"""The largest finite number of e4m3."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def gate(
    logits: Tensor,
    k: int,
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
    """logits [T, E] -> weights [T, k], ids [T, k], best expert first.

    All arithmetic is float32. Three steps:

    1. Each expert gets a *rank value*. `softmax_topk` ranks the logits. A bias, or groups that are scored by `top2`,
       rank the scores. Everything else ranks the logits too: the scorings are monotone, and two logits that differ may
       round to one score. The bias, if any, is added to what is ranked.
    2. The best k are chosen (:func:`best`), if there are groups out of the best groups only (:func:`outside`).
    3. Weights are the chosen experts' scores without bias; `softmax_topk`: the softmax over the chosen logits. Then
       `w / (sum + eps)` if `renormalize`, then `w * scale`, then one rounding to `weights_dtype`.

    NaN ranks last, below -inf; the weight of a NaN is what the arithmetic gives. Tokens from `valid` on get id -1 and
    weight 0.

    Sources: Mixtral, Qwen-MoE, OLMoE are `softmax` (`renormalize` as `norm_topk_prob` says); DeepSeek-V2 adds groups by
    `max`; DeepSeek-V3, GLM-4.5, Kimi-K2 are `sigmoid` with bias, groups by `top2`, `renormalize` with eps 1e-20 and
    `scale`; MiniMax-M2 is `sigmoid` with bias; DeepSeek-V4 is `sqrtsoftplus` with bias; gpt-oss and Granite are
    `softmax_topk`.
    """
    x = logits.float()
    scores = score(x, scoring)
    by_score = scoring != "softmax_topk" and (bias is not None or (groups > 1 and group_score == "top2"))
    values = scores if by_score else x
    if bias is not None:
        values = values + bias.float()
    out = outside(values, groups, top_groups, group_score) if groups > 1 else None
    ids = best(values, out)[:, :k].contiguous()
    chosen = scores.gather(-1, ids)
    weights = chosen.softmax(-1) if scoring == "softmax_topk" else chosen
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = weights * scale
    if valid is not None:
        over = torch.arange(logits.shape[0], device=logits.device) >= valid
        weights = weights.masked_fill(over[:, None], 0.0)
        ids = ids.masked_fill(over[:, None], -1)
    return weights.to(weights_dtype), ids.to(ids_dtype)


def score(x: Tensor, scoring: str) -> Tensor:
    """float32 logits [T, E] -> float32 scores [T, E]; of `softmax_topk` the logits themselves."""
    if scoring == "softmax":
        return x.softmax(-1)
    if scoring == "sigmoid":
        return x.sigmoid()
    if scoring == "sqrtsoftplus":
        return functional.softplus(x).sqrt()
    return x


def best(values: Tensor, out: Tensor | None = None) -> Tensor:
    """Positions [T, n] of float32 values [T, n], best first: largest value, then lowest position.

    NaN comes after -inf, and what `out` [T, n] marks after everything. -0.0 equals +0.0.
    """
    missing = values.isnan()
    values = values.masked_fill(missing, -torch.inf).masked_fill(values == 0, 0.0)
    by_value = values.sort(dim=-1, descending=True, stable=True).indices
    late = missing.int() if out is None else missing.int() + 2 * out.int()
    return by_value.gather(-1, late.gather(-1, by_value).sort(dim=-1, stable=True).indices)


def outside(values: Tensor, groups: int, top_groups: int, group_score: str) -> Tensor:
    """Which of values [T, E] are not in their token's best groups: bool [T, E].

    Groups are E / groups neighbours each. A group's score is its best value, or with `top2` the sum of its two best
    (which may be equal). Groups rank as experts do: NaN last, of equal ones the lowest first.
    """
    each = values.unflatten(-1, (groups, values.shape[-1] // groups))
    first = best(each.flatten(0, 1)).view_as(each)[..., : 2 if group_score == "top2" else 1]
    order = best(each.gather(-1, first).sum(-1))
    out = torch.ones(order.shape, dtype=torch.bool, device=values.device)
    out.scatter_(-1, order[:, :top_groups], False)
    return out.repeat_interleave(each.shape[-1], dim=-1)


def index(
    ids: Tensor, experts: int, bin_of: Tensor | None = None, bins: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, k] -> ends [bins], source [T * k], inverse [T, k], all int32: pairs (token, choice) sorted by bin.

    A pair's bin is its id, or `bin_of[id]`. Pairs whose id is not in 0..experts, or whose bin is not in 0..bins, belong
    to nobody. The others get a row each: by bin, in a bin by token.

    ends: rows of bins 0..=b, as `grouped_mm` wants its offsets. source: the token of each row, -1 from ends[-1] on.
    inverse: the row of each pair, or -1.
    """
    bins = experts if bin_of is None or bins is None else bins
    flat = ids.flatten().long()
    somebody = (flat >= 0) & (flat < experts)
    bin_ = flat.masked_fill(~somebody, 0)
    if bin_of is not None:
        bin_ = bin_of.long()[bin_]
        somebody &= (bin_ >= 0) & (bin_ < bins)
    bin_ = bin_.masked_fill(~somebody, bins)
    order = bin_.sort(stable=True).indices
    ends = bin_.bincount(minlength=bins + 1)[:bins].cumsum(0)
    source = (order // max(ids.shape[1], 1)).masked_fill(~somebody[order], -1)
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel(), device=ids.device)
    inverse = row.masked_fill(~somebody, -1).view_as(ids)
    return ends.int(), source.int(), inverse.int()


def align(ends: Tensor, inverse: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """ends [bins], inverse [T, k] -> order [capacity], owner [capacity / block], places [1], all int32.

    The pairs t * k + j by their rows, each bin filled up to whole blocks of `block` places. order: the pair of each
    place, or T * k where there is none. owner: the bin of each block, -1 behind the last. places: how many the bins'
    blocks have together. Source: vLLM's `moe_align_block_size`, whose order inside a bin is left open; here it is the
    rows'.
    """
    pairs, bins = inverse.numel(), ends.numel()
    room = capacity(pairs, bins, block)
    order = torch.full((room,), pairs, dtype=torch.int32)
    owner = torch.full((room // block,), -1, dtype=torch.int32)
    pair_of = {row: pair for pair, row in enumerate(inverse.flatten().tolist()) if row >= 0}
    place = start = 0
    for number, end in enumerate(ends.tolist()):
        for at, row in enumerate(range(start, end)):
            order[place + at] = pair_of[row]
        blocks = -(-(end - start) // block)
        owner[place // block : place // block + blocks] = number
        place, start = place + blocks * block, end
    return order, owner, torch.tensor([place], dtype=torch.int32)


def permute(x: Tensor, inverse: Tensor, rows: int) -> Tensor:
    """x [T, H], inverse [T, k] -> [rows, H] with out[inverse[t, j]] = x[t].

    An inverse that is not in 0..rows is nobody's. Rows that nobody names are not written by the kernel; here they are
    NaN, so that whoever reads them notices.
    """
    named = (inverse >= 0) & (inverse < rows)
    token, _ = named.nonzero(as_tuple=True)
    out = torch.full((rows, x.shape[1]), torch.nan, dtype=torch.float32, device=x.device).to(x.dtype)
    # Copied as bytes: float8 has no indexing everywhere, and a copy has no arithmetic.
    out.view(torch.uint8)[inverse[named].long()] = x.contiguous().view(torch.uint8)[token]
    return out


def permute_fp8(x: Tensor, inverse: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """As :func:`permute`, but rows are float8_e4m3fn [rows, H] with float32 scales [rows, H / 128]."""
    q, scales = quantize(x)
    return permute(q, inverse, rows), permute(scales, inverse, rows)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, H] -> float8_e4m3fn [T, H] and float32 scales [T, H / 128], with x ~ q * scale.

    For each 128 columns: scale = max |x| / 448 (1 where all are zero), q = x / scale, rounded to nearest even and
    saturated. What a block with NaN or inf gives is not specified. Source: DeepSeek-V3's 1 x 128 activation blocks.
    """
    blocks = x.float().unflatten(-1, (x.shape[1] // FP8_BLOCK, FP8_BLOCK))
    largest = blocks.abs().amax(-1)
    # By a tensor: a GPU multiplies by the reciprocal of a plain number.
    scales = (largest / torch.full_like(largest, FP8_MAX)).masked_fill(largest == 0, 1.0)
    q = (blocks / scales[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return q.flatten(1).to(torch.float8_e4m3fn), scales


def combine(
    rows: Tensor,
    inverse: Tensor | None,
    weights: Tensor | None = None,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """rows [R, H] -> [T, H]: residual + shared + scale * sum over j of weights[t, j] * rows[inverse[t, j]].

    In float32, in this order: one fused multiply-add for each j from 0 up, the product with `scale`, + shared,
    + residual, and one rounding to the rows' dtype. Without inverse, pair (t, j) is row t * k + j. A pair whose inverse
    is not in 0..R is left out, and nothing is read for it. Without weights they are 1.

    Source: every MoE block; `scale` is DeepSeek's `routed_scaling_factor` where it was not applied to the weights.
    """
    if inverse is None:
        assert weights is not None  # noqa: S101  # checked by the caller
        inverse = torch.arange(weights.numel(), device=rows.device).view_as(weights)
    tokens, k = inverse.shape
    total = torch.zeros(tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    for j in range(k):
        row = inverse[:, j].long()
        token = ((row >= 0) & (row < rows.shape[0])).nonzero().flatten()
        term = rows[row[token]].double()
        if weights is not None:
            term = weights[token, j, None].double() * term
        # A product of two float32 is exact in float64, so this is a fused multiply-add.
        total[token] = (total[token].double() + term).float()
    total = total * scale
    if shared is not None:
        total = total + shared.float()
    if residual is not None:
        total = total + residual.float()
    return total.to(rows.dtype)


def expert_matvec(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str = "silu") -> Tensor:
    """x [T, H], ids [T, k], weights [T, k], gate_up [E, 2 * I, H], down [E, H, I] -> [T, H].

    With a = gate_up[e] x: the sum over j of weights[t, j] * down[e] (act(a[:I]) * a[I:]), e = ids[t, j]. Ids that are
    not in 0..E add nothing.

    Sums are float32. The model's dtype is rounded to where transformers' `grouped_mm` rounds: both products, the
    activation, its product with a[I:], and, unless the weights are float32, each weighted row. The sum over j is
    float32, j from 0 up, and rounded once.
    """
    experts, half = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for token in range(x.shape[0]):
        for choice, expert in enumerate(ids[token].tolist()):
            if not 0 <= expert < experts:
                continue
            up = (gate_up[expert].float() @ x[token].float()).to(x.dtype)
            between = ACTIVATIONS[act](up[:half].float()).to(x.dtype) * up[half:]
            row = (down[expert].float() @ between.float()).to(x.dtype)
            out[token] += (row * weights[token, choice, None]).float()
    return out.to(x.dtype)
