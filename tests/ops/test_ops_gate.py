"""gate on the CPU: what is chosen exactly as loops over Python numbers choose it, weights within float32 of float64."""

from __future__ import annotations

import math

import numpy as np
import plain_ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecore import ops
from moecore.ops import reference

SCORINGS = ["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk"]
NUMBERS = [-math.inf, -90.0, -2.5, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0 + 2**-20, 3.0, 25.0, math.inf, math.nan]


@st.composite
def calls(draw: st.DrawFn) -> tuple[torch.Tensor, int, dict]:
    """Logits full of ties, and arguments."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    size = draw(st.integers(1, 9))
    experts = groups * size
    top_groups = draw(st.integers(1, groups))
    k = draw(st.integers(1, min(32, top_groups * size)))
    numbers = st.sampled_from(draw(st.sampled_from([NUMBERS, NUMBERS[1:-2], [0.0, 1.0], [2.0], [math.nan, 1.0]])))
    tokens = draw(st.integers(0, 4))
    logits = draw(st.lists(st.lists(numbers, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    bias = draw(st.none() | st.lists(st.sampled_from([-2.0, 0.0, 0.25, 8.0]), min_size=experts, max_size=experts))
    return (
        torch.tensor(logits).reshape(tokens, experts),
        k,
        {
            "scoring": draw(st.sampled_from(SCORINGS)),
            "bias": None if bias is None else torch.tensor(bias),
            "groups": groups,
            "top_groups": top_groups,
            "group_score": draw(st.sampled_from(["max", "top2"] if size > 1 else ["max"])),
            "renormalize": draw(st.booleans()),
            "scale": draw(st.sampled_from([1.0, 2.5])),
            "eps": draw(st.sampled_from([0.0, 1e-20, 0.5])),
        },
    )


@settings(max_examples=200, deadline=None)
@given(calls())
def test_choice_and_weights(call: tuple[torch.Tensor, int, dict]) -> None:
    logits, k, options = call
    weights, ids = ops.gate(logits, k, **options)
    scoring, bias = options["scoring"], options["bias"]
    by_score = scoring != "softmax_topk" and (
        bias is not None or (options["groups"] > 1 and options["group_score"] == "top2")
    )
    # Scores themselves are compared below; here they are given, so that the choice must agree to the last bit.
    values = reference.score(logits, scoring) if by_score else logits
    values = values if bias is None else values + bias
    for token, row in enumerate(logits.tolist()):
        want = plain_ops.choose(
            values[token].tolist(), k, options["groups"], options["top_groups"], options["group_score"]
        )
        assert ids[token].tolist() == want
        if scoring == "softmax_topk":
            chosen = [plain_ops.score(row[i], [row[j] for j in want], "softmax") for i in want]
        else:
            chosen = [plain_ops.score(row[i], row, scoring) for i in want]
        exact = np.array(chosen)
        with np.errstate(all="ignore"):
            if options["renormalize"]:
                exact = exact / (exact.sum() + options["eps"])
        if options["renormalize"] and 0 < sum(chosen) + options["eps"] < 1e-30:
            continue  # float32 has few digits left there
        torch.testing.assert_close(
            weights[token].double(), torch.from_numpy(exact) * options["scale"], rtol=2e-6, atol=1e-37, equal_nan=True
        )


@pytest.mark.parametrize("scoring", SCORINGS[:3])
def test_scores_are_float32_of_the_exact_ones(scoring: str) -> None:
    x = torch.cat([torch.linspace(-80, 80, 1001), torch.randn(23, generator=torch.Generator().manual_seed(1))])[None]
    exact = torch.tensor([plain_ops.score(one, x[0].tolist(), scoring) for one in x[0].tolist()], dtype=torch.float64)
    torch.testing.assert_close(
        reference.score(x, scoring)[0].double(), exact, rtol=1e-5, atol=1e-38
    )  # x - top is rounded too


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("row", [[math.nan] * 8, [1.5] * 8, [-math.inf] * 8, [math.inf] * 8])
def test_equal_rows_choose_the_first_experts(scoring: str, row: list[float]) -> None:
    ids = ops.gate(torch.tensor([row]), 5, scoring=scoring)[1]
    assert ids.tolist() == [[0, 1, 2, 3, 4]]
    ids = ops.gate(torch.tensor([row]), 5, scoring=scoring, groups=4, top_groups=3, group_score="top2")[1]
    assert ids.tolist() == [[0, 1, 2, 3, 4]]


def test_order_of_special_numbers() -> None:
    row = torch.tensor([[math.nan, -math.inf, 1.0, 1.0, math.inf, -0.0, 0.0]])
    assert ops.gate(row, 7)[1].tolist() == [[4, 2, 3, 5, 6, 1, 0]]


def test_a_group_is_scored_by_its_two_best_even_if_equal() -> None:
    row = torch.tensor([[2.0, 2.0, 0.0, 3.0, 0.5, 0.0]])
    ids = ops.gate(row, 2, scoring="softmax_topk", groups=2, top_groups=1, group_score="top2")[1]
    assert ids.tolist() == [[0, 1]]
    ids = ops.gate(row, 2, scoring="softmax_topk", groups=2, top_groups=1, group_score="max")[1]
    assert ids.tolist() == [[3, 4]]


def test_logits_that_differ_are_ranked_where_their_scores_do_not() -> None:
    row = torch.tensor([[30.0, 31.0, 40.0]])  # their sigmoids are all 1
    assert ops.gate(row, 3, scoring="sigmoid")[1].tolist() == [[2, 1, 0]]
    assert ops.gate(row, 3, scoring="sigmoid", bias=torch.zeros(3))[1].tolist() == [[0, 1, 2]]


def test_experts_outside_of_the_best_groups_never_come_in() -> None:
    row = torch.tensor([[-math.inf, -math.inf, 5.0, 1.0], [math.nan, 6.0, 5.0, 5.0]])
    weights, ids = ops.gate(row, 2, scoring="sigmoid", groups=2, top_groups=1)
    assert ids.tolist() == [[2, 3], [1, 0]]
    assert weights[1, 1].isnan()


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_valid(count: int) -> None:
    logits = torch.randn(3, 8)
    weights, ids = ops.gate(logits, 2, valid=torch.tensor([count], dtype=torch.int32))
    all_weights, all_ids = ops.gate(logits, 2)
    assert torch.equal(ids[:count], all_ids[:count])
    assert torch.equal(weights[:count], all_weights[:count])
    assert (ids[count:] == -1).all()
    assert (weights[count:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 16).to(dtype)
    want_weights, want_ids = ops.gate(logits.float(), 4, renormalize=True)
    weights, ids = ops.gate(logits, 4, renormalize=True, weights_dtype=dtype, ids_dtype=torch.int64)
    assert (weights.dtype, ids.dtype) == (dtype, torch.int64)
    assert torch.equal(weights, want_weights.to(dtype))
    assert torch.equal(ids, want_ids.long())


def test_rows_may_lie_apart() -> None:
    wide = torch.randn(6, 40)
    assert torch.equal(ops.gate(wide[::2, 8:24], 4)[1], ops.gate(wide[::2, 8:24].contiguous(), 4)[1])
