"""The ops said a second time, as loops over Python numbers: nothing is shared with the specification in torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def score(x: float, row: Sequence[float], scoring: str) -> float:
    """One expert's score in float64."""
    if scoring == "softmax":
        if any(math.isnan(one) for one in row) or math.inf in row or all(one == -math.inf for one in row):
            return math.nan
        top = max(row)
        return math.exp(x - top) / math.fsum(math.exp(one - top) for one in row)
    if scoring == "sigmoid":
        return math.nan if math.isnan(x) else 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    if scoring == "sqrtsoftplus":
        return math.sqrt(x) if x > 700 else math.sqrt(math.log1p(math.exp(x)))
    return x


def rank(values: Sequence[float]) -> list[int]:
    """Positions, best first: NaN last, of equals the lowest first."""
    return sorted(
        range(len(values)), key=lambda i: (math.isnan(values[i]), 0 if math.isnan(values[i]) else -values[i], i)
    )


def choose(values: Sequence[float], k: int, groups: int, top_groups: int, group_score: str) -> list[int]:
    """The k best of one row of float32 values, out of the best groups."""
    size = len(values) // groups
    members = [list(values[g * size : (g + 1) * size]) for g in range(groups)]
    scores = []
    for group in members:
        order = [np.float32(group[i]) for i in rank(group)]
        with np.errstate(invalid="ignore"):
            scores.append(float(order[0] + order[1] if group_score == "top2" and groups > 1 else order[0]))
    open_ = set(rank(scores)[:top_groups])
    return [expert for expert in rank(values) if expert // size in open_][:k]


def index(
    ids: Sequence[Sequence[int]], experts: int, bin_of: Sequence[int] | None, bins: int
) -> tuple[list[int], list[int], list[list[int]]]:
    """ends, source, inverse."""
    rows: list[list[tuple[int, int]]] = [[] for _ in range(bins)]
    for token, choices in enumerate(ids):
        for j, expert in enumerate(choices):
            bin_ = -1 if not 0 <= expert < experts else expert if bin_of is None else bin_of[expert]
            if 0 <= bin_ < bins:
                rows[bin_].append((token, j))
    flat = [pair for bin_ in rows for pair in bin_]
    inverse = [[-1] * len(choices) for choices in ids]
    for row, (token, j) in enumerate(flat):
        inverse[token][j] = row
    total = sum(len(choices) for choices in ids)
    ends = [sum(len(bin_) for bin_ in rows[: b + 1]) for b in range(bins)]
    return ends, [token for token, _ in flat] + [-1] * (total - len(flat)), inverse


def e4m3() -> list[float]:
    """All finite numbers from 0 up: 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    numbers = [mantissa / 8 * 2**-6 for mantissa in range(8)]
    numbers += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return numbers[:-1]  # the last code is NaN


def to_e4m3(x: float) -> float:
    """The nearest of them, of two as near the one with an even code; what is larger than all becomes the largest."""
    numbers = e4m3()
    nearest = min(range(len(numbers)), key=lambda code: (abs(numbers[code] - abs(x)), code % 2))
    return math.copysign(numbers[nearest], x)
