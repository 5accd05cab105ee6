"""The gate in float64, vectorised, on the device whose kernels it judges; logits that are hard to choose from."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from moecore.ops import reference
from torch import Tensor

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCORINGS = ["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk"]
KS = [1, 2, 3, 4, 6, 8, 10, 16, 22, 32]
ULP = 2.0**-23


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def levels(tokens: int, experts: int) -> Tensor:
    """Logits of few levels, so that ties abound; scores of two levels and sums of two of them are far apart."""
    table = torch.tensor([-3.7, -1.3, 0.2, 1.1, 2.9], device=DEVICE).half().float()
    return table[torch.randint(5, (tokens, experts), device=DEVICE)]


def special(tokens: int, experts: int) -> Tensor:
    """NaN, infinities, both zeros, rows of one number."""
    table = torch.tensor([math.nan, -math.inf, math.inf, -0.0, 0.0, 1.5, -2.0], device=DEVICE)
    x = table[torch.randint(7, (tokens, experts), device=DEVICE)]
    finite = torch.arange(tokens, device=DEVICE) % 3 == 1
    x[finite] = levels(tokens, experts)[finite]
    rows = torch.arange(tokens, device=DEVICE) % 3 == 2
    x[rows] = table[torch.arange(tokens, device=DEVICE) % 7][:, None].expand(tokens, experts)[rows]
    return x


class Exact:
    """gate in float64. `near` says how far float32 may be from it, for each expert."""

    def __init__(self, logits: Tensor, k: int, options: dict[str, Any]) -> None:
        self.k, self.options = k, options
        self.scoring, self.bias, groups = options["scoring"], options["bias"], options["groups"]
        self.x = logits.double()
        self.scores = {
            "softmax": lambda x: x.softmax(-1),
            "sigmoid": torch.sigmoid,
            # log(1 + e^x) = -log(sigmoid(-x)), without an overflow.
            "sqrtsoftplus": lambda x: x.clamp(min=0).add(torch.log1p(torch.exp(-x.abs()))).sqrt(),
            "softmax_topk": lambda x: x,
        }[self.scoring](self.x)
        self.by_score = self.scoring != "softmax_topk" and (
            self.bias is not None or (groups > 1 and options["group_score"] == "top2")
        )
        self.values = self.scores if self.by_score else self.x
        if self.bias is not None:
            self.values = self.values + self.bias.double()
        size = self.values.abs() + (self.scores.abs() if self.bias is not None else 0)
        spread = (self.x.amax(-1, keepdim=True) - self.x) if self.scoring == "softmax" else 0
        self.near = (4 + spread) * ULP * size
        out = None
        self.clear = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        if groups > 1:
            out = reference.outside(self.values, groups, options["top_groups"], options["group_score"])
            self.clear = self.groups_are_clear(groups, options["top_groups"])
        self.out = out
        self.order = reference.best(self.values, out)

    def groups_are_clear(self, groups: int, top_groups: int) -> Tensor:
        """Rows whose last group is well above the first that is left out, or exactly as good."""
        if self.options["group_score"] == "max" and not self.by_score and self.bias is None:
            return torch.ones_like(self.values[:, 0], dtype=torch.bool)  # nothing is rounded
        each = self.values.unflatten(-1, (groups, self.values.shape[-1] // groups))
        count = 2 if self.options["group_score"] == "top2" else 1
        scores = each.nan_to_num(-math.inf, math.inf, -math.inf).topk(count).values.sum(-1)
        scores = scores.sort(descending=True).values
        if top_groups == groups:
            return torch.ones_like(scores[:, 0], dtype=torch.bool)
        gap = scores[:, top_groups - 1] - scores[:, top_groups]
        return ~((gap > 0) & (gap <= 2 * self.near.nan_to_num(0, 0, 0).amax(-1)))

    def check(self, weights: Tensor, ids: Tensor, exact: bool) -> None:
        """`exact`: ids must be those of float64; else neighbours that float32 cannot tell apart may swap."""
        index = ids.long()
        assert ((index >= 0) & (index < self.x.shape[1])).all()
        assert (index.sort().values.diff() > 0).all(), "ids are not distinct"
        want = self.order[:, : self.k]
        if exact:
            assert torch.equal(index, want), self.options
        else:
            got, best = self.values.gather(1, index), self.values.gather(1, want)
            close = index == want
            if self.by_score or self.bias is not None:
                close |= (got - best).abs() <= self.near.gather(1, index) + self.near.gather(1, want)
            assert close[self.clear].all(), self.options
        self.check_weights(weights, index)

    def check_weights(self, weights: Tensor, index: Tensor) -> None:
        want = self.scores.gather(1, index)
        if self.scoring == "softmax_topk":
            want = want.softmax(-1)
        if self.options["renormalize"]:
            total = want.sum(-1, keepdim=True) + self.options["eps"]
            want = (want / total).masked_fill(total < 1e-30, math.nan)  # float32 has no digits left: anything goes
        want = want * self.options["scale"]
        rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[weights.dtype]
        spread = self.x.amax(-1) - self.x.amin(-1)
        tolerance = want.abs() * (rounding + ULP * (16 + spread.nan_to_num(0, 0, 0)[:, None])) + 6e-8
        right = ((weights.double() - want).abs() <= tolerance) | (weights == want) | want.isnan()
        assert right.all(), self.options
        if not self.options["renormalize"]:
            assert torch.equal(weights.isnan(), want.isnan()), self.options


def options_of(experts: int, k: int, number: int) -> dict[str, Any]:
    """The number-th way to call gate; 96 of them differ."""
    kinds = itertools.product(SCORINGS, [False, True], [0, 1, 2], [False, True], [torch.float32, torch.bfloat16])
    scoring, biased, grouped, renormalize, weights_dtype = list(kinds)[number % 96]
    sizes = [g for g in (2, 4, 8, 3, 5, 6, 32, 16) if experts % g == 0 and experts // g >= 2]
    groups, top_groups = 1, 1
    if grouped and sizes:
        groups = sizes[number // 7 % len(sizes)]
        top_groups = max(1, -(-k // (experts // groups)), groups // 2)
    return {
        "scoring": scoring,
        "bias": randn(experts) / 8 if biased else None,
        "groups": groups,
        "top_groups": top_groups,
        "group_score": "top2" if grouped == 2 else "max",
        "renormalize": renormalize,
        "scale": 2.5 if number % 2 else 1.0,
        "eps": 1e-20 if number % 3 else 0.0,
        "weights_dtype": weights_dtype,
        "ids_dtype": torch.int64 if number % 5 == 0 else torch.int32,
    }
