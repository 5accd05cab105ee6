"""gate: choices as the specification makes them, weights to the last bits of float32, under every schedule the same."""

from __future__ import annotations

import guarded
import pytest
import torch
from emulated import SCHEDULES, GateArgs, library
from gating import IDS_I64, Gate, check_ids, check_weights, format_of, hard_rows, kernel, rule
from guarded import DTYPES, Launch, Memory
from moecore.ops import reference

EXPERTS = (1, 2, 8, 16, 60, 64, 72, 96, 128, 160, 256, 384, 512, 896, 1024)


def choices(experts: int) -> list[int]:
    return sorted({k for k in (1, 3, 8, 10, 32, experts) if k <= min(experts, 32)})


def run_gate(
    gate: Gate,
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weights_dtype: torch.dtype = torch.float32,
    i64: bool = False,
    valid: int | None = None,
    gap: int = 0,
    off: int = 0,
    grid: int = 3,
    block: int = 0,
    short: bool = True,
    schedules: tuple[int, ...] = SCHEDULES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of a launch. `gap`: numbers between rows. `off`: bytes by which the logits are not aligned.
    `short`: by the short way, if there is one.
    """
    tokens, experts = logits.shape
    way = rule(gate, logits, experts + gap, bias is not None, off) if short else 0
    name = kernel("gate", logits.dtype, experts, way)
    lib, memory = library("gate.cu"), Memory()
    wide = torch.full((tokens, experts + gap), 99.0).to(logits.dtype)
    wide[:, :experts] = logits
    # The last row has no gap behind it.
    given = memory.input(wide.view(-1)[: wide.numel() - gap], off)
    weights = memory.output((tokens, gate.k), weights_dtype)
    ids = memory.output((tokens, gate.k), torch.int64 if i64 else torch.int32)
    fields = gate.fields()
    fields["flags"] = gate.flags | (IDS_I64 if i64 else 0) | way
    args = GateArgs(
        logits=given, bias=memory.input(bias), weights=weights, ids=ids, stride=experts + gap, tokens=tokens,
        experts=experts, weights_format=format_of(weights), **fields,
        valid=memory.input(None if valid is None else torch.tensor([valid], dtype=torch.int32)),
    )  # fmt: skip
    guarded.run(memory, [Launch(lib, name, grid, (args,), block)], schedules)
    return weights, ids


@pytest.mark.parametrize("format_", DTYPES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_plain(experts: int, format_: str) -> None:
    """No bias, no groups: the logits rank. Each k with another scoring, scale and epsilon."""
    logits = hard_rows(experts, DTYPES[format_], experts)
    for turn, k in enumerate(choices(experts)):
        for second in range(2):
            pick = turn + 2 * second + experts
            gate = Gate(
                k, ("softmax", "sigmoid", "softmax_topk", "sqrtsoftplus")[pick % 4],
                renormalize=(turn + second) % 2 == 0, scale=(1.0, 2.5)[turn % 2],
                eps=(0.0, 1e-20)[(turn + experts) // 2 % 2],
            )  # fmt: skip
            weights, ids = run_gate(gate, logits, schedules=SCHEDULES if second else (3,), gap=turn % 2 * 3)
            check_ids(gate, logits, None, ids)
            check_weights(gate, logits, ids, weights)


def alike(values: torch.Tensor, k: int, run: int, shift: int) -> torch.Tensor:
    """Rows of which `run` values around the k-th best differ in their last bits alone.

    The best of them has the highest expert: words that give up their last bits have them the other way around.
    """
    for row in values:
        order = row.argsort(descending=True)
        first = max(0, min(k - run // 2 - shift, len(row) - run))
        among = order[first : first + run].sort().values
        bits = (row[order[first]].view(torch.int32) & ~0x1FF) | 0x80
        up = 1 if row[order[first]] > 0 else -1
        row[among] = (bits + up * torch.arange(len(among), dtype=torch.int32)).view(torch.float32)
    return values


@pytest.mark.parametrize("experts", [8, 60, 128, 256, 384, 512])
def test_logits_that_begin_alike(experts: int) -> None:
    """Around the last choice: some of those that begin as it does are in, some are out."""
    generator = torch.Generator().manual_seed(experts)
    for k in [k for k in (1, 3, 8, 10, 31) if k < experts]:
        for run in (2, 3, min(experts, 20)):
            logits = alike(torch.randn(6, experts, generator=generator), k, run, run % 2)
            weights, ids = run_gate(Gate(k, renormalize=True), logits, schedules=(3,))
            assert torch.equal(ids.long(), reference.best(logits)[:, :k])
            check_weights(Gate(k, renormalize=True), logits, ids, weights)


@pytest.mark.parametrize(("format_", "owned"), [("f32", 4), ("bf16", 8)])
def test_more_choices_than_a_list_holds(format_: str, owned: int) -> None:
    """Of 512 experts a lane owns 16 and keeps 8: here it has the best 12. `owned`: neighbours that it loads at once."""
    row = torch.linspace(-2, 0, 512)
    mine = torch.cat([first + torch.arange(owned) for first in range(3 * owned, 512, 32 * owned)])[:12]
    row[mine] = torch.arange(1.0, 13.0)
    logits = row[None].to(DTYPES[format_])
    for k in (8, 9, 10, 16):
        _, ids = run_gate(Gate(k), logits, schedules=(3,))
        assert torch.equal(ids.long(), reference.best(logits.float())[:, :k])


def test_groups_whose_score_is_no_number() -> None:
    """Two best that are +inf and -inf: such a group comes last."""
    bias = torch.zeros(64)
    bias[:16] = -torch.inf
    bias[3] = torch.inf
    gate = Gate(8, "sigmoid", groups=4, top_groups=2, group_score="top2")
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    _, ids = run_gate(gate, logits, bias, schedules=(3,))
    assert torch.equal(ids.long(), gate.reference(logits, bias)[1].long())


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk"])
@pytest.mark.parametrize("short", [False, True])
def test_epsilon_counts(short: bool, scoring: str) -> None:
    gate = Gate(2, scoring, renormalize=True, eps=0.5)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0] * 2, [-88.0, -87.5, -90.0, -95.0] * 2])
    weights, ids = run_gate(gate, logits, short=short, schedules=(3,))
    want, chosen = gate.reference(logits, None)
    assert torch.equal(ids.long(), chosen.long())
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-38)


def test_the_smallest_sigmoids() -> None:
    """Below 2^-126: they still weigh against each other."""
    logits = torch.tensor([[-95.0, -87.6, -87.9, -96.0]])
    weights, ids = run_gate(Gate(2, "sigmoid", renormalize=True), logits, schedules=(3,))
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.5744, 0.4256]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("experts", [8, 60, 128, 256, 384, 512])
def test_scores_that_begin_alike(experts: int) -> None:
    """The same by scores: they are all 0.5, and a bias makes of them numbers from 0.5 to 1, without rounding."""
    generator = torch.Generator().manual_seed(experts)
    for k in [k for k in (1, 3, 8, 10, 31) if k < experts]:
        for run in (2, 3, min(experts, 20)):
            values = alike(torch.rand(1, experts, generator=generator) * 0.49 + 0.5, k, run, run % 2)
            _, ids = run_gate(Gate(k, "sigmoid"), torch.zeros(1, experts), values[0] - 0.5, schedules=(3,))
            assert torch.equal(ids.long(), reference.best(values)[:, :k])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_bias(experts: int, scoring: str) -> None:
    """A bias chooses, and does not weigh. It has few distinct values, so that there are ties."""
    format_ = ("f32", "bf16", "f16")[experts % 3]
    generator = torch.Generator().manual_seed(experts)
    bias = torch.randint(-3, 4, (experts,), generator=generator) * 0.25
    logits = hard_rows(experts, DTYPES[format_], experts + 1, more=6)
    logits[:6] = (logits[:6].float() * 4).round().to(logits.dtype) / 4
    for k in choices(experts):
        gate = Gate(k, scoring, renormalize=k % 2 == 0, scale=2.5, eps=1e-20)
        weights, ids = run_gate(gate, logits, bias, schedules=(1, 3))
        check_ids(gate, logits, bias, ids)
        check_weights(gate, logits, ids, weights)


@pytest.mark.parametrize("experts", [8, 60, 72, 160, 384])
def test_scores_below_zero(experts: int) -> None:
    """All of them, by the bias: they are better than what lies past the last expert all the same."""
    generator = torch.Generator().manual_seed(experts)
    bias = -2.0 - torch.randperm(experts, generator=generator) / 512.0
    gate = Gate(min(experts, 31), "sigmoid", renormalize=True)
    _, ids = run_gate(gate, torch.zeros(2, experts), bias, schedules=(3,))
    assert torch.equal(ids.long(), bias.argsort(descending=True)[: gate.k].expand(2, -1))


#: Experts, groups, groups that stay, k: sizes that are whole lanes, three of them, a part of one, one, no power of two.
GROUPS = [
    (8, 2, 1, 3), (16, 8, 3, 4), (60, 4, 2, 6), (64, 8, 4, 8), (64, 32, 9, 10), (72, 8, 4, 6), (96, 8, 4, 8),
    (96, 4, 2, 8), (24, 24, 6, 5), (96, 32, 5, 8), (128, 8, 4, 8), (160, 8, 3, 6), (256, 8, 4, 8), (256, 16, 2, 32),
    (256, 1, 1, 8), (384, 8, 2, 8), (512, 8, 3, 10), (896, 7, 3, 8), (1024, 32, 4, 32), (12, 6, 4, 8), (256, 32, 32, 8),
    (200, 25, 2, 9),
]  # fmt: skip


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("experts", "groups", "top_groups", "k"), GROUPS)
def test_groups(experts: int, groups: int, top_groups: int, k: int, with_bias: bool, group_score: str) -> None:
    format_ = ("f32", "bf16", "f16")[(experts + k) % 3]
    generator = torch.Generator().manual_seed(experts)
    logits = hard_rows(experts, DTYPES[format_], experts + 2, more=8)
    # Ties inside of groups and between them.
    logits[:4] = logits[:4].float().round().to(logits.dtype)
    bias = torch.randint(-2, 3, (experts,), generator=generator) * 0.25 if with_bias else None
    clear = []
    for scoring in ("sigmoid", "softmax", "sqrtsoftplus"):
        gate = Gate(k, scoring, groups, top_groups, group_score, renormalize=True, scale=2.5, eps=1e-20)
        weights, ids = run_gate(gate, logits, bias, schedules=(0, 3))
        clear.append(check_ids(gate, logits, bias, ids))
        check_weights(gate, logits, ids, weights)
    assert max(clear) > 0.2, "hardly a row tells right from wrong"


@pytest.mark.parametrize("experts", [60, 64, 128, 256, 300])
@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_group_of_equals(experts: int, group_score: str) -> None:
    """All experts alike: the first groups stay, and of them the first experts. And one better expert decides."""
    logits = torch.zeros(3, experts)
    logits[1, experts - 1] = 1.0
    logits[2, experts // 2 :: 2] = -1.0
    gate = Gate(4, "sigmoid", 4, 2, group_score)
    weights, ids = run_gate(gate, logits)
    assert ids[0].tolist() == [0, 1, 2, 3]
    assert ids[1].tolist() == [experts - 1, 0, 1, 2]
    check_ids(gate, logits, None, ids)
    check_weights(gate, logits, ids, weights)


@pytest.mark.parametrize("format_", DTYPES)
@pytest.mark.parametrize("experts", [2, 16, 60, 64, 96, 128, 130, 256, 513])
def test_any_address(format_: str, experts: int) -> None:
    """Rows that begin anywhere, as slices of larger tensors do: nothing is read beside them."""
    logits, gate = hard_rows(experts, DTYPES[format_], 5)[:9], Gate(min(experts, 4))
    size = logits.element_size()
    _, expected = gate.reference(logits, None)
    for off, gap in ((size, 0), (2 * size, 1), (4 * size, 0), (0, 4), (0, 6), (0, 7), (0, 8), (8, 5), (0, 1)):
        _, ids = run_gate(gate, logits, off=off, gap=gap, schedules=(3,))
        assert torch.equal(ids, expected), f"{off} bytes off, {gap} numbers between rows"


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("i64", [False, True])
@pytest.mark.parametrize("valid", [None, -5, 0, 1, 20, 33, 34, 2**31 - 1])
def test_what_is_written(weights_dtype: torch.dtype, i64: bool, valid: int | None) -> None:
    logits, gate = torch.randn(33, 40, generator=torch.Generator().manual_seed(1)), Gate(5, "sigmoid", renormalize=True)
    weights, ids = run_gate(gate, logits, weights_dtype=weights_dtype, i64=i64, valid=valid)
    some = 33 if valid is None else min(max(valid, 0), 33)
    check_ids(gate, logits[:some], None, ids[:some])
    check_weights(gate, logits[:some], ids[:some], weights[:some])
    assert (ids[some:] == -1).all()
    assert (weights[some:] == 0).all()


@pytest.mark.parametrize("tokens", [0, 1, 3, 33, 64, 129])
@pytest.mark.parametrize("grid", [1, 2, 200])
@pytest.mark.parametrize("block", [32, 128])
def test_any_grid(tokens: int, grid: int, block: int) -> None:
    logits, gate = torch.randn(tokens, 72, generator=torch.Generator().manual_seed(2)), Gate(6, renormalize=True)
    weights, ids = run_gate(gate, logits, grid=grid, block=block)
    assert torch.equal(ids, gate.reference(logits, None)[1])
    check_weights(gate, logits, ids, weights)


@pytest.mark.parametrize("name", ["weights", "ids"])
def test_results_that_nobody_wants(name: str) -> None:
    logits, memory = torch.randn(9, 60), Memory()
    x, lib = memory.input(logits), library("gate.cu")
    out = {
        "weights": None,
        "ids": None,
        name: memory.output((9, 4), torch.float32 if name == "weights" else torch.int32),
    }
    args = GateArgs(logits=x, stride=60, tokens=9, experts=60, **Gate(4).fields(), **out)
    guarded.run(memory, [Launch(lib, "moecore_gate_f32", 3, (args,))])
    weights, ids = Gate(4).reference(logits, None)
    expected = {"weights": weights, "ids": ids}[name]
    torch.testing.assert_close(out[name], expected, rtol=2e-6, atol=0)
