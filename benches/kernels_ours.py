"""moecore's side of `kernels.py`: the public functions of `moecore.ops`, with what each row asks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moecore import ops

if TYPE_CHECKING:
    from torch import Tensor


def gate(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax, top-k, renormalised."""
    return ops.gate(logits, k, renormalize=True)


#: DeepSeek-V3's choice: sigmoid, bias, groups by their two best.
GROUPED: dict[str, Any] = {"scoring": "sigmoid", "group_score": "top2", "renormalize": True, "eps": 1e-20}


def grouped(logits: Tensor, bias: Tensor, groups: int, top: int, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """As :data:`GROUPED` says."""
    return ops.gate(logits, k, bias=bias, groups=groups, top_groups=top, scale=scale, **GROUPED)


def route(logits: Tensor, k: int) -> Any:
    """Gate and index: weights, ids, ends, source, inverse."""
    return ops.route(logits, k, renormalize=True)


def route_permute(logits: Tensor, x: Tensor, k: int) -> Any:
    """Gate, index and the copy of the rows: the route, rows, scales."""
    return ops.route_permute(x, logits, k, renormalize=True)
