"""Launches every kernel of moecore.ops on odd shapes, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool synccheck --error-exitcode 1 python tests/gpu/sanitize.py

Every tensor is an allocation of its own, so that a step past its end is one past its memory. With `--large` also those
numbers of tokens that take three launches, which the tools need minutes for. Inputs come from the CPU: torch's own
kernels are not under test.
"""

from __future__ import annotations

import itertools
import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when torch is imported

import torch
from moecore import ops
from torch import Tensor

TOKENS = [0, 1, 31, 33, 127, 129]
EXPERTS = [1, 7, 60, 160, 385]
KS = [1, 3, 10]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCORINGS = ["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk"]
#: Numbers of a row: a multiple of 16 bytes, otherwise odd.
WIDTHS = {torch.float32: [4, 12, 516], torch.bfloat16: [8, 24, 1032], torch.float16: [8, 40, 264]}
LARGE = [300, 1025, 4100, 9000, 70000]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).cuda()


def gates(tokens: int, experts: int, k: int, number: int) -> None:
    """gate, route and index in one of many ways."""
    dtype, scoring = DTYPES[number % 3], SCORINGS[number % 4]
    logits = torch.randn(tokens, experts)
    logits[torch.rand(tokens, experts) < 0.02] = torch.nan
    logits[torch.rand(tokens, experts) < 0.3] = 0.5
    logits = logits.to(dtype).cuda()
    groups = next((g for g in (5, 4, 7) if number % 2 and experts % g == 0 and experts // g >= max(k, 2)), 1)
    bias = randn(experts) if number % 3 == 1 else None
    valid = torch.tensor([tokens * 2 // 3], dtype=torch.int32).cuda() if number % 5 == 2 else None
    options = {
        "scoring": scoring,
        "bias": bias,
        "groups": groups,
        "top_groups": min(groups, 2),
        "group_score": "top2" if number % 4 < 2 and groups > 1 else "max",
        "renormalize": number % 2 == 0,
        "valid": valid,
        "weights_dtype": DTYPES[number % 2],
        "ids_dtype": torch.int64 if number % 7 == 3 else torch.int32,
    }
    ops.gate(logits, k, **options)
    places = torch.randperm(experts + 3)[:experts].int().cuda() if number % 3 == 2 else None
    bins = experts + 3 if number % 3 == 2 else None
    route = ops.route(logits, k, bin_of=places, bins=bins, **options)
    ops.index(route.ids, experts, bin_of=places, bins=bins)
    moved = DTYPES[(number + 1) % 3]
    x = randn(tokens, 128 * (1 + number % 3), dtype=moved)
    ops.route_permute(x, logits, k, fp8=number % 2 == 1, bin_of=places, bins=bins, **options)


def rows(tokens: int, k: int, number: int) -> None:
    """permute and combine of every format."""
    for dtype in DTYPES:
        for width in WIDTHS[dtype]:
            count = tokens * k + 3
            inverse = torch.randperm(count)[: tokens * k].view(tokens, k).int()
            inverse[torch.rand(tokens, k) < 0.1] = -1
            inverse[torch.rand(tokens, k) < 0.1] = count
            inverse = inverse.cuda()
            x = randn(tokens, width, dtype=dtype)
            moved = ops.permute(x, inverse, count)
            weights = (None, torch.rand(tokens, k).cuda(), torch.rand(tokens, k).to(dtype).cuda())[number % 3]
            ops.combine(moved, inverse, weights, shared=x if number % 2 else None, residual=x, scale=1.5)
        ends, _, sorted_ = ops.index(torch.rand(tokens, 40).topk(k).indices.int().cuda(), 40)
        ops.align(ends, sorted_, 16)
        ops.permute_fp8(randn(tokens, 384, dtype=dtype), inverse, count)


def matrices(tokens: int, k: int, number: int) -> None:
    """expert_matvec with rows that begin anywhere."""
    for dtype, (width, half) in itertools.product(DTYPES, [(13, 7), (40, 24)]):
        ids = torch.stack([torch.randperm(11)[:k] for _ in range(tokens)] or [torch.empty(0, k)]).view(tokens, k).int()
        ids[torch.rand(tokens, k) < 0.1] = -1
        act = ("silu", "gelu", "gelu_tanh", "relu")[number % 4]
        ops.expert_matvec(
            randn(tokens, width, dtype=dtype), ids.cuda(), torch.rand(tokens, k).cuda(),
            randn(11, 2 * half, width, dtype=dtype), randn(11, width, half, dtype=dtype), act=act,
        )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    number = 0
    for tokens, experts, k in itertools.product(TOKENS, EXPERTS, KS):
        if k <= experts:
            for _ in range(3):
                gates(tokens, experts, k, number)
                number += 1
    for tokens, k in itertools.product(TOKENS, KS):
        rows(tokens, k, number)
        matrices(min(tokens, 5), k, number)
        number += 1
    for tokens in LARGE if "--large" in sys.argv else []:
        for experts, k in [(7, 3), (60, 1), (385, 10)]:
            gates(tokens, experts, k, number)
            number += 1
        rows(min(tokens, 4100), 3, number)
    torch.cuda.synchronize()
    print(f"{number} rounds")


if __name__ == "__main__":
    main()
