"""index, permute, combine and expert_matvec on the CPU, against loops, NumPy and float64."""

from __future__ import annotations

import numpy as np
import plain_ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecore import ops
from torch import Tensor


@st.composite
def routed(draw: st.DrawFn) -> tuple[list[list[int]], int, list[int] | None, int]:
    """ids with strangers among them, experts, bin_of, bins."""
    experts = draw(st.integers(1, 12))
    known = list(range(experts))
    k = draw(st.integers(1, experts))
    tokens = draw(st.integers(0, 9))
    strangers = draw(st.booleans())
    ids = [draw(st.permutations(known))[:k] for _ in range(tokens)]
    if strangers:
        ids = [[draw(st.sampled_from([one, one, -1, experts, experts + 7, -5])) for one in row] for row in ids]
    if draw(st.booleans()):
        return ids, experts, None, experts
    bins = draw(st.integers(1, 15))
    places = [*draw(st.permutations(range(bins))), *[-1] * experts, bins + 3][:experts]
    return ids, experts, draw(st.permutations(places)), bins


def tensor(ids: list[list[int]], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(ids, dtype=dtype).reshape(len(ids), len(ids[0]) if ids else 1)


@settings(max_examples=200, deadline=None)
@given(routed(), st.sampled_from([torch.int32, torch.int64]))
def test_index(call: tuple[list[list[int]], int, list[int] | None, int], dtype: torch.dtype) -> None:
    ids, experts, bin_of, bins = call
    table = None if bin_of is None else torch.tensor(bin_of, dtype=torch.int32)
    got = ops.index(tensor(ids, dtype), experts, bin_of=table, bins=None if bin_of is None else bins)
    ends, source, inverse = plain_ops.index(ids, experts, bin_of, bins)
    assert all(one.dtype == torch.int32 for one in got)
    assert (got[0].tolist(), got[1].tolist(), got[2].tolist()) == (ends, source, inverse)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 20), st.booleans())
def test_route_is_gate_and_index_that_fit_together(seed: int, tokens: int, experts: int, limited: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = int(torch.randint(1, experts + 1, (1,), generator=generator))
    logits = torch.randint(-2, 3, (tokens, experts), generator=generator).float()
    valid = torch.tensor([tokens // 2], dtype=torch.int32) if limited else None
    route = ops.route(logits, k, valid=valid)
    weights, ids = ops.gate(logits, k, valid=valid)
    assert torch.equal(route.weights, weights)
    assert torch.equal(route.ids, ids)
    rows = (tokens // 2 if limited else tokens) * k
    assert route.ends.tolist() == ids[ids >= 0].long().bincount(minlength=experts).cumsum(0).tolist()
    assert (route.ends[-1] == rows).all()
    named = route.inverse >= 0
    assert torch.equal(named, ids >= 0)
    assert route.inverse[named].sort().values.tolist() == list(range(rows))
    token = torch.arange(tokens)[:, None].expand_as(ids)
    assert torch.equal(route.source[route.inverse[named].long()], token[named].int())
    assert (route.source[rows:] == -1).all()
    begin = 0
    for end in route.ends.tolist():
        assert (route.source[begin:end].diff() > 0).all()  # stable, and a token comes once
        begin = end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_permute(dtype: torch.dtype) -> None:
    x = torch.randn(5, 24).to(dtype)
    x[3, :2] = torch.tensor([torch.nan, -0.0])
    inverse = torch.tensor([[7, 0], [-1, 2], [3, 99], [4, 1], [-7, 10]], dtype=torch.int32)
    out = ops.permute(x, inverse, 10)
    named = {7: 0, 0: 0, 2: 1, 3: 2, 4: 3, 1: 3}
    assert torch.equal(out[list(named)].view(torch.uint8), x[list(named.values())].view(torch.uint8))
    assert out[[5, 6, 8, 9]].isnan().all()
    assert ops.permute(x, torch.arange(10, dtype=torch.int32).view(5, 2)).shape == (10, 24)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 300.0, 1e30]))
def test_permute_fp8_rounds_to_the_nearest_and_saturates(seed: int, size: float) -> None:
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(seed)) * size
    x[1, :128] = 0
    rows, scales = ops.permute_fp8(x, torch.tensor([[1], [0]], dtype=torch.int32))
    for row, token in ((1, 0), (0, 1)):
        for block in range(2):
            part = x[token, block * 128 : (block + 1) * 128].numpy()
            largest = np.abs(part).max()
            scale = np.float32(largest / np.float32(448)) if largest else np.float32(1)
            assert scales[row, block].item() == scale
            got = rows[row, block * 128 : (block + 1) * 128].float().tolist()
            assert got == [plain_ops.to_e4m3(float(np.float32(one / scale))) for one in part]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 6),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_combine(seed: int, tokens: int, k: int, dtype: torch.dtype, given_: list[bool]) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens * k + 3, 8, generator=generator).to(dtype)
    order = torch.randperm(tokens * k + 3, generator=generator).int()
    inverse = order[: tokens * k].view(tokens, k)
    inverse[torch.rand(tokens, k, generator=generator) < 0.2] = -1
    unnamed = torch.ones(rows.shape[0], dtype=torch.bool)
    unnamed[inverse[inverse >= 0].long()] = False
    rows[unnamed] = torch.nan
    weights = torch.randn(tokens, k, generator=generator) if given_[0] else None
    shared = torch.randn(tokens, 8, generator=generator).to(dtype) if given_[1] else None
    residual = torch.randn(tokens, 8, generator=generator).to(dtype) if given_[2] else None
    scale = 1.75 if given_[3] else 1.0
    out = ops.combine(rows, inverse, weights, shared=shared, residual=residual, scale=scale)
    exact, size = torch.zeros(tokens, 8, dtype=torch.float64), torch.zeros(tokens, 8, dtype=torch.float64)
    for token in range(tokens):
        for j in range(k):
            if inverse[token, j] >= 0:
                term = rows[inverse[token, j]].double() * (1.0 if weights is None else weights[token, j].double())
                exact[token] += term * scale
                size[token] += (term * scale).abs()
    for one in (shared, residual):
        if one is not None:
            exact += one.double()
            size += one.double().abs()
    assert out.dtype == dtype
    error = size * (k + 3) * 2**-24 + exact.abs() * torch.finfo(dtype).eps / 2 * 1.001
    assert ((out.double() - exact).abs() <= error + 1e-7 * (dtype == torch.float16)).all()


def test_combine_adds_in_order_and_by_fused_steps() -> None:
    big = 2.0**24
    rows = torch.tensor([[1.0], [big], [-big]]).expand(3, 4).contiguous()
    inverse = torch.tensor([[0, 1, 2], [1, 2, 0], [1, 0, 2]], dtype=torch.int32)
    assert ops.combine(rows, inverse)[:, 0].tolist() == [0.0, 1.0, 0.0]
    # 1 + 2^-12 squared is 1 + 2^-11 + 2^-24: only a fused step keeps the last part.
    one = torch.full((2, 4), 1 + 2**-12)
    one[1] = 1 + 2**-11
    weights = torch.tensor([[-1.0, 1 + 2**-12]])
    assert ops.combine(one, torch.tensor([[1, 0]], dtype=torch.int32), weights)[0, 0].item() == 2**-24


def test_combine_without_inverse_and_without_weights() -> None:
    rows, weights = torch.randn(6, 4), torch.rand(3, 2)
    inverse = torch.arange(6, dtype=torch.int32).view(3, 2)
    assert torch.equal(ops.combine(rows, None, weights), ops.combine(rows, inverse, weights))
    assert torch.equal(ops.combine(rows, inverse), ops.combine(rows, inverse, torch.ones(3, 2)))


def test_combine_undoes_permute() -> None:
    x, logits = torch.randn(9, 8), torch.randn(9, 6)
    route, rows, scales = ops.route_permute(x, logits, 3, renormalize=True)
    assert scales is None
    assert torch.equal(rows, ops.permute(x, route.inverse))
    assert torch.equal(rows, x[route.source.long()])
    torch.testing.assert_close(ops.combine(rows, route.inverse, route.weights), x)


def test_route_permute_fp8() -> None:
    x, logits = torch.randn(3, 128), torch.randn(3, 6)
    route, rows, scales = ops.route_permute(x, logits, 2, fp8=True)
    want_rows, want_scales = ops.permute_fp8(x, route.inverse)
    assert scales is not None
    assert torch.equal(rows.float(), want_rows.float())
    assert torch.equal(scales, want_scales)


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_matvec(dtype: torch.dtype, act: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 24, generator=generator).to(dtype)
    gate_up = (torch.randn(5, 14, 24, generator=generator) / 5).to(dtype)
    down = (torch.randn(5, 24, 7, generator=generator) / 3).to(dtype)
    ids = torch.tensor([[0, 4], [3, -1], [2, 1], [-1, -1]], dtype=torch.int32)
    weights = torch.rand(4, 2, generator=generator)
    out = ops.expert_matvec(x, ids, weights, gate_up, down, act=act)
    exact = torch.zeros(4, 24, dtype=torch.float64)
    for token in range(4):
        for j in range(2):
            if (expert := int(ids[token, j])) >= 0:
                up = gate_up[expert].double() @ x[token].double()
                between = ACTIVATIONS[act](up[:7]) * up[7:]
                exact[token] += weights[token, j].double() * (down[expert].double() @ between)
    assert out.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    assert (out[3] == 0).all()


def test_rows_weighted_by_float32_are_not_rounded() -> None:
    x = torch.ones(1, 1).bfloat16()
    gate_up, down = torch.ones(2, 2, 1).bfloat16(), torch.ones(2, 1, 1).bfloat16()
    ids = torch.tensor([[1, 0]], dtype=torch.int32)
    # 1 + 2^-8 is half way between two numbers of bfloat16, and rounds to 1; with another 2^-8 the sum is one of them.
    weights = torch.tensor([[1 + 2**-8, 2**-8]])
    assert ops.expert_matvec(x, ids, weights, gate_up, down, act="relu").item() == 1 + 2**-7
    assert ops.expert_matvec(x, ids, weights.bfloat16(), gate_up, down, act="relu").item() == 1
