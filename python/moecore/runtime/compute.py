"""The arithmetic of experts on tensors that moecore placed: one expert, a wave of them, and the weighted sum.

Every row of a result depends on its own expert and token only. So experts may come in any order and in waves of any
size: `begin` makes the table of rows, `accumulate` fills those of the experts that are there, `combine` sums them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .adapters import Taken

GROUPS = 1024
"""A grouped product takes fewer groups than this."""


@dataclass(frozen=True)
class Routing:
    """Who goes where: rows of the table, token-major, sorted by expert.

    Attributes:
        order: rows in the order of their experts; within an expert ascending.
        starts: where each expert's rows begin in `order`, and the end of the last one's.
        top_k: columns of the index.
    """

    order: Tensor
    starts: list[int]
    top_k: int

    @classmethod
    def of(cls, taken: Taken, index: Tensor) -> Routing:
        """Sorts an index [T, k]. Sentinels and identity experts come last and belong to nobody."""
        flat = index.reshape(-1)
        served = torch.where((flat < 0) | (flat >= taken.num_experts), taken.num_experts, flat)
        counts = torch.bincount(served, minlength=taken.num_experts + 1)[: taken.num_experts]
        starts = [0, *torch.cumsum(counts, 0).tolist()]
        return cls(torch.sort(served, stable=True).indices, starts, index.shape[-1])

    def rows(self, expert: int) -> Tensor:
        """Rows of the table that belong to an expert."""
        return self.order[self.starts[expert] : self.starts[expert + 1]]

    def asked(self) -> list[int]:
        """Experts that have at least one row."""
        return [expert for expert in range(len(self.starts) - 1) if self.starts[expert] < self.starts[expert + 1]]


def expert_rows(taken: Taken, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """One expert on rows `x` [n, H], not weighted. `weights` holds the expert's parts, stored or plain."""
    plain = weights if taken.decode is None else taken.decode(weights)
    return taken.adapter.expert(taken.module, plain, x)


def wave(taken: Taken, weights: dict[str, Tensor], hidden: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Several experts at once, not weighted.

    Args:
        weights: part name -> [C, ...], one row for each of the C experts; rows may have any stride.
        hidden: [T, H].
        rows: tokens, grouped by expert.
        offsets: [C] int32, where each expert's rows end.

    On CUDA in bfloat16 these are the grouped products of transformers' `grouped_mm`; elsewhere one expert at a time.
    """
    x = hidden[rows]
    if can_group(taken, weights, hidden):
        return grouped(taken, weights, x, offsets)
    out, start = torch.empty(x.shape[0], x.shape[1], dtype=result_dtype(taken, hidden), device=x.device), 0
    for group, end in enumerate(offsets.tolist()):
        if start < end:
            out[start:end] = expert_rows(taken, {name: part[group] for name, part in weights.items()}, x[start:end])
        start = end
    return out


def can_group(taken: Taken, weights: dict[str, Tensor], hidden: Tensor) -> bool:
    """Whether grouped products can run straight over the parts."""
    groups = next(iter(weights.values())).shape[0]
    return (
        hidden.is_cuda
        and taken.decode is None
        and taken.dtype == torch.bfloat16
        and groups < GROUPS
        and hasattr(functional, "grouped_mm")
        and taken.adapter.can_group(taken.module)
    )


def grouped(taken: Taken, weights: dict[str, Tensor], x: Tensor, offsets: Tensor) -> Tensor:
    """The grouped path of a module with the interface's layout, in the order of `grouped_mm_experts_forward`."""
    module: Any = taken.module
    bias = getattr(module, "has_bias", False)
    gate = getattr(module, "has_gate", True)  # a module without the interface's marks has the plain layout
    transposed = getattr(module, "is_transposed", False)
    group = torch.bucketize(torch.arange(x.shape[0], device=x.device), offsets, right=True) if bias else None

    def linear(name: str, x: Tensor) -> Tensor:
        weight = weights[name] if transposed else weights[name].transpose(-2, -1)
        out = functional.grouped_mm(x.to(weight.dtype), weight, offs=offsets)
        if group is not None:
            # Rows past the last offset hold nothing; the clamp keeps their look-up inside.
            out.add_(weights[f"{name}_bias"][group.clamp(max=offsets.shape[0] - 1)])
        return out

    hidden = linear("gate_up_proj" if gate else "up_proj", x)
    hidden = module._apply_gate(hidden) if gate else module.act_fn(hidden)
    out = linear("down_proj", hidden)
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def result_dtype(taken: Taken, hidden: Tensor) -> torch.dtype:
    """Dtype of a row before it is weighted: the weights' own, or the hidden states' where weights are one byte."""
    return taken.dtype if taken.dtype.itemsize > 1 else hidden.dtype


def begin(taken: Taken, hidden: Tensor, index: Tensor) -> Tensor:
    """The table of rows [T * k, H], with those rows filled that no expert with weights serves."""
    out = torch.empty(index.numel(), hidden.shape[-1], dtype=result_dtype(taken, hidden), device=hidden.device)
    taken.adapter.without_weights(taken.module, hidden, index, out)
    return out


def accumulate(
    taken: Taken,
    hidden: Tensor,
    index: Tensor | Routing,
    experts: Iterable[int],
    views: Callable[[int], dict[str, Tensor]],
    out: Tensor,
) -> None:
    """Fills the rows of `out` that belong to `experts`.

    Args:
        hidden: [T, H].
        index: [T, k], or what `Routing.of` made of it, so that waves of one call sort once.
        views: expert -> its parts by name.
        out: the table from `begin`.
    """
    routing = index if isinstance(index, Routing) else Routing.of(taken, index)
    for expert in experts:
        rows = routing.rows(expert)
        if rows.numel():
            out[rows] = expert_rows(taken, views(expert), hidden[rows // routing.top_k])


def combine(
    taken: Taken,
    y: Tensor,
    weights: Tensor,
    tokens: int,
    dtype: torch.dtype | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """The weighted sum over k, [T, H], rounded as transformers rounds it.

    As its grouped path does: the product has the wider dtype of row and weight, the sum over k is cast once. A family
    that transformers runs by its own loop only is summed as that loop does it, if `index` [T, k] is given: each term is
    cast, and terms are added in the order of their experts.
    """
    scale = weights.reshape(-1, 1)
    if taken.adapter.rounds_weights:
        scale = scale.to(y.dtype)
    terms = (y * scale).view(tokens, weights.shape[-1], y.shape[-1])
    dtype = dtype or y.dtype
    if taken.adapter.served_by_interface or index is None:
        return terms.sum(dim=1).to(dtype)
    by_expert = index.argsort(dim=1, stable=True).unsqueeze(-1).expand_as(terms)
    terms = terms.to(dtype).gather(1, by_expert)
    total = torch.zeros_like(terms[:, 0])
    for column in terms.unbind(1):
        total += column
    return total
