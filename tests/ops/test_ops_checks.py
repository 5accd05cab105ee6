"""Arguments that cannot be used are named, with what they are and what they must be."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from moecore import ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def logits(tokens: int = 3, experts: int = 8) -> Tensor:
    return torch.zeros(tokens, experts)


def ints(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


#: op, arguments that are good.
GOOD: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "gate": ((logits(), 2), {}),
    "route": ((logits(), 2), {}),
    "index": ((ints(3, 2), 8), {}),
    "permute": ((torch.zeros(3, 8), ints(3, 2)), {}),
    "permute_fp8": ((torch.zeros(3, 128), ints(3, 2)), {}),
    "route_permute": ((torch.zeros(3, 128), logits(), 2), {}),
    "combine": ((torch.zeros(6, 8), ints(3, 2), torch.zeros(3, 2)), {}),
    "expert_matvec": (
        (torch.zeros(3, 8), ints(3, 2), torch.zeros(3, 2), torch.zeros(4, 6, 8), torch.zeros(4, 8, 3)),
        {},
    ),
}

#: op, argument (by place or name), what it is made, error, message.
BAD: list[tuple[str, int | str, Any, type[Exception], str]] = [
    ("gate", 0, "logits", TypeError, "logits: str, must be a Tensor"),
    ("gate", 0, torch.zeros(3, 8, dtype=torch.float64), TypeError,
     "logits: dtype float64, must be float32, bfloat16 or float16"),
    ("gate", 0, torch.zeros(8), ValueError, "logits: shape [8], must be [T, E]"),
    ("gate", 0, torch.zeros(2, 0), ValueError, "logits: 0 experts, must be from 1 to 1024"),
    ("gate", 0, torch.zeros(2, 1025), ValueError, "logits: 1025 experts, must be from 1 to 1024"),
    ("gate", 0, torch.zeros(8, 3).t(), ValueError, "logits: strides (1, 3), must be rows without gaps"),
    ("gate", 0, torch.zeros(3, 8).to_sparse(), TypeError, "logits: layout torch.sparse_coo, must be strided"),
    ("gate", 0, torch.zeros(1, 8).expand(2**31, 8), ValueError,
     "logits: 2147483648 tokens with 2 experts each, must be at most 2147483647 pairs"),
    ("gate", 1, 0, ValueError, "k: 0, must be from 1 to 8"),
    ("gate", 1, 9, ValueError, "k: 9, must be from 1 to 8: at most the 8 experts, and at most 32"),
    ("gate", "scoring", "softmin", ValueError,
     "scoring: 'softmin', must be one of softmax, sigmoid, sqrtsoftplus, softmax_topk"),
    ("gate", "groups", 0, ValueError, "groups: 0, must be from 1 to 32"),
    ("gate", "groups", 3, ValueError, "groups: 3, must be a divisor of the 8 experts"),
    ("gate", "top_groups", 2, ValueError, "top_groups: 2, must be 1 where there is one group"),
    ("gate", "group_score", "mean", ValueError, "group_score: 'mean', must be max or top2"),
    ("gate", "eps", -1.0, ValueError, "eps: -1.0, must be 0 or more"),
    ("gate", "eps", float("nan"), ValueError, "eps: nan, must be 0 or more"),
    ("gate", "bias", torch.zeros(7), ValueError, "bias: shape [7], must be [E] = [8]"),
    ("gate", "bias", torch.zeros(8).bfloat16(), TypeError, "bias: dtype bfloat16, must be float32"),
    ("gate", "bias", torch.zeros(16)[::2], ValueError, "bias: strides (2,), must be contiguous"),
    ("gate", "bias", torch.zeros(8, device="meta"), ValueError, "bias: on meta, must be on cpu, as logits"),
    ("gate", "valid", torch.zeros(1), TypeError, "valid: dtype float32, must be int32"),
    ("gate", "valid", ints(2), ValueError, "valid: shape [2], must be [1] = [1]"),
    ("gate", "valid", torch.zeros(1, dtype=torch.int32, device="meta"), ValueError, "valid: on meta, must be on cpu"),
    ("gate", "weights_dtype", torch.float64, TypeError, "weights_dtype: float64, must be float32, bfloat16 or float16"),
    ("gate", "ids_dtype", torch.int16, TypeError, "ids_dtype: int16, must be int32 or int64"),
    ("route", 1, 9, ValueError, "k: 9, must be"),
    ("route", "bins", 5, ValueError, "bins: 5, must be left out, or the 8 experts, where bin_of is not given"),
    ("route", "bin_of", ints(8), ValueError, "bins: None, must be from 1 to 1024 where bin_of is given"),
    ("index", 0, torch.zeros(3, 2), TypeError, "ids: dtype float32, must be int32 or int64"),
    ("index", 0, ints(3), ValueError, "ids: shape [3], must be [T, k]"),
    ("index", 0, ints(2, 3).t(), ValueError, "ids: strides (1, 3), must be contiguous"),
    ("index", 0, ints(3, 0), ValueError, "ids: 0 experts of a token, must be from 1 to 32"),
    ("index", 0, ints(3, 33), ValueError, "ids: 33 experts of a token, must be from 1 to 32"),
    ("index", 1, 0, ValueError, "experts: 0, must be from 1 to 1024"),
    ("index", 1, 1025, ValueError, "experts: 1025, must be from 1 to 1024"),
    ("index", "bin_of", ints(7), ValueError, "bin_of: shape [7], must be [E] = [8]"),
    ("index", "bin_of", torch.zeros(8, dtype=torch.int64), TypeError, "bin_of: dtype int64, must be int32"),
    ("permute", 0, torch.zeros(3, 8, dtype=torch.int8), TypeError, "x: dtype int8, must be"),
    ("permute", 0, torch.zeros(3, 6), ValueError,
     "x: rows of 6 numbers, 24 bytes, must be rows whose bytes are a multiple of 16: of 4 numbers"),
    ("permute", 0, torch.zeros(3, 12).half(), ValueError, "x: rows of 12 numbers, 24 bytes"),
    ("permute", 0, torch.zeros(3, 0), ValueError, "x: rows of 0 numbers"),
    ("permute", 0, torch.zeros(3, 16)[:, :8], ValueError, "x: strides (16, 1), must be contiguous"),
    ("permute", 0, torch.zeros(3, 8, 1), ValueError, "x: shape [3, 8, 1], must be [T, H]"),
    ("permute", 1, ints(4, 2), ValueError, "inverse: shape [4, 2], must be [T, k] with the 3 tokens of x"),
    ("permute", 1, torch.zeros(3, 2, dtype=torch.int64), TypeError, "inverse: dtype int64, must be int32"),
    ("permute", 1, ints(2, 3).t(), ValueError, "inverse: strides"),
    ("permute", 1, ints(3, 0), ValueError, "inverse: 0 experts of a token, must be from 1 to 32"),
    ("permute", 1, ints(3, 33), ValueError, "inverse: 33 experts of a token, must be from 1 to 32"),
    ("permute", 1, torch.zeros(3, 2, dtype=torch.int32, device="meta"), ValueError, "inverse: on meta, must be on cpu"),
    ("permute", "rows", -1, ValueError, "rows: -1, must be 0 or more"),
    ("permute", "rows", 2**31, ValueError, "rows: 2147483648, must be at most 2147483647"),
    ("permute_fp8", 0, torch.zeros(3, 192), ValueError,
     "x: rows of 192 numbers, must be a multiple of 128, the numbers of one scale"),
    ("route_permute", 0, torch.zeros(4, 128), ValueError, "logits: shape [3, 8], must be [T, E] with the 4 tokens"),
    ("route_permute", 0, torch.zeros(3, 6), ValueError, "x: rows of 6 numbers"),
    ("route_permute", 1, torch.zeros(3, 8).double(), TypeError, "logits: dtype float64"),
    ("route_permute", 1, torch.zeros(3, 8, device="meta"), ValueError, "logits: on meta, must be on cpu, as x"),
    ("combine", 0, torch.zeros(6, 6), ValueError, "rows: rows of 6 numbers"),
    ("combine", 0, torch.zeros(6, 8).double(), TypeError, "rows: dtype float64"),
    ("combine", 1, ints(3, 3), ValueError, "weights: shape [3, 2], must be [T, k] = [3, 3]"),
    ("combine", 1, ints(6), ValueError, "inverse: shape [6], must be [T, k]"),
    ("combine", 1, ints(3, 33), ValueError, "inverse: 33 experts of a token, must be from 1 to 32"),
    ("combine", 1, torch.zeros(3, 2), TypeError, "inverse: dtype float32, must be int32"),
    ("combine", 2, torch.zeros(3, 2).double(), TypeError, "weights: dtype float64"),
    ("combine", 2, torch.zeros(2, 3).t(), ValueError, "weights: strides (1, 3), must be contiguous"),
    ("combine", "shared", torch.zeros(3, 4), ValueError, "shared: shape [3, 4], must be [T, H] = [3, 8]"),
    ("combine", "residual", torch.zeros(3, 8).half(), TypeError, "residual: dtype float16, must be float32"),
    ("combine", "residual", torch.zeros(3, 8, device="meta"), ValueError, "residual: on meta, must be on cpu, as rows"),
    ("expert_matvec", 0, torch.zeros(3, 7), ValueError, "gate_up: shape [4, 6, 8], must be [E, 2 * I, H] with H = 7"),
    ("expert_matvec", 0, torch.zeros(3, 16)[:, ::2], ValueError, "x: strides (16, 2), must be contiguous"),
    ("expert_matvec", 1, ints(2, 2), ValueError, "ids: shape [2, 2], must be [T, k] with the 3 tokens of x"),
    ("expert_matvec", 2, torch.zeros(3, 2).half(), TypeError, "weights: dtype float16, must be float32"),
    ("expert_matvec", 2, torch.zeros(3, 1), ValueError, "weights: shape [3, 1], must be [T, k] = [3, 2]"),
    ("expert_matvec", 3, torch.zeros(4, 5, 8), ValueError, "gate_up: shape [4, 5, 8], must be [E, 2 * I, H]"),
    ("expert_matvec", 3, torch.zeros(4, 6, 8).half(), TypeError, "gate_up: dtype float16, must be float32"),
    ("expert_matvec", 3, torch.zeros(4, 8, 6).transpose(1, 2), ValueError, "gate_up: strides (48, 1, 6), must be one"),
    ("expert_matvec", 4, torch.zeros(4, 8, 4), ValueError, "down: shape [4, 8, 4], must be [E, H, I] = [4, 8, 3]"),
    ("expert_matvec", 4, torch.zeros(4, 3, 8).transpose(1, 2), ValueError, "down: strides (24, 1, 8), must be one"),
    ("expert_matvec", 4, torch.zeros(4, 8, 3, device="meta"), ValueError, "down: on meta, must be on cpu, as x"),
    ("expert_matvec", "act", "swish", ValueError, "act: 'swish', must be one of silu, gelu, gelu_tanh, relu"),
]  # fmt: skip


def call(op: str, change: dict[int | str, Any]) -> Any:
    args, options = GOOD[op]
    places = [change.get(place, one) for place, one in enumerate(args)]
    return getattr(ops, op)(*places, **options, **{key: one for key, one in change.items() if isinstance(key, str)})


@pytest.mark.parametrize("op", list(GOOD))
def test_good_arguments(op: str) -> None:
    call(op, {})


@pytest.mark.parametrize(
    ("op", "place", "value", "error", "message"), BAD, ids=[f"{b[0]}-{b[1]}-{i}" for i, b in enumerate(BAD)]
)
def test_bad_arguments(op: str, place: int | str, value: Any, error: type[Exception], message: str) -> None:
    if (isinstance(value, Tensor) and value.is_sparse) or value == "logits":
        # torch's dispatcher turns these away before anything of ours is asked; the check stands for direct launches.
        with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
            call(op, {place: value})
        return
    with pytest.raises(error, match=re.escape(message)):
        call(op, {place: value})


def test_the_most_that_fits() -> None:
    """Each limit itself is inside."""
    weights, ids = ops.gate(logits(1, 1024), 32, groups=32, top_groups=1)
    assert (weights.shape, ids.shape) == ((1, 32), (1, 32))
    assert ops.index(ints(1, 32), 1024)[0].shape == (1024,)
    assert ops.index(ints(1, 1), 1, bin_of=ints(1), bins=1024)[0].shape == (1024,)
    assert ops.permute(torch.zeros(1, 8), torch.arange(32, dtype=torch.int32)[None]).shape == (32, 8)
    assert ops.align(ints(1024), ints(1, 2), 1024)[0].shape == (2048,)
    pairs = torch.zeros(1, 8).expand(2**31 - 1, 8)  # as many as int32 counts, without their memory
    with FakeTensorMode() as mode:
        assert ops.gate(mode.from_tensor(pairs), 1)[1].shape == (2**31 - 1, 1)


def test_more_places_than_int32_counts() -> None:
    """Of pairs that it does count: what the bins' last blocks leave over is counted, too."""
    most = 2**31 - 1024 * 1023 - 1
    with FakeTensorMode() as mode:
        ends = mode.from_tensor(ints(1024))
        assert ops.align(ends, torch.empty(most, 1, dtype=torch.int32), 1024)[0].shape == (2**31 - 1024,)
        with pytest.raises(ValueError, match=f"inverse: {most + 1} pairs, must be few enough for places below"):
            ops.align(ends, torch.empty(most + 1, 1, dtype=torch.int32), 1024)


@pytest.mark.parametrize("k", [33, 64])
def test_k_of_more_than_32(k: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"k: {k}, must be from 1 to 32")):
        ops.gate(logits(1, 64), k)


def test_groups() -> None:
    with pytest.raises(ValueError, match="groups: 64, must be from 1 to 32"):
        ops.gate(logits(1, 64), 1, groups=64)
    with pytest.raises(ValueError, match="top_groups: 0, must be from 1 to the 4 groups"):
        ops.gate(logits(1, 64), 1, groups=4, top_groups=0)
    with pytest.raises(ValueError, match="top_groups: 5, must be from 1 to the 4 groups"):
        ops.gate(logits(1, 64), 1, groups=4, top_groups=5)
    with pytest.raises(ValueError, match=re.escape("top_groups: 1 of 4 experts each, must be enough for k = 5")):
        ops.gate(logits(1, 8), 5, groups=2, top_groups=1)
    with pytest.raises(ValueError, match="group_score: 'top2' of groups of one expert"):
        ops.gate(logits(1, 8), 1, groups=8, group_score="top2")


def test_combine_needs_something_that_tells_the_tokens() -> None:
    with pytest.raises(ValueError, match="weights: missing, must be given where inverse is not"):
        ops.combine(torch.zeros(6, 8), None)
    with pytest.raises(ValueError, match=re.escape("rows: shape [5, 8], must be [R, H] with at least T * k = 6 rows")):
        ops.combine(torch.zeros(5, 8), None, torch.zeros(3, 2))


#: The same table for tensors without memory: a compiler must hear the same.
PLAIN = [
    b
    for b in BAD
    if isinstance(b[2], Tensor) and b[2].device.type == "cpu" and not b[2].is_sparse and b[2].numel() < 10000
]


@pytest.mark.parametrize(
    ("op", "place", "value", "error", "message"), PLAIN, ids=[f"{b[0]}-{b[1]}-{i}" for i, b in enumerate(PLAIN)]
)
def test_bad_fake_arguments(op: str, place: int | str, value: Tensor, error: type[Exception], message: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error, match=re.escape(message)):
        call(op, {place: mode.from_tensor(value)})
