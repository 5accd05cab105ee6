"""moecore.ops on the GPU: choices against float64, everything else against the specification, which runs there too."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import need  # noqa: F401
import pytest
import torch
from exact_gate import DEVICE, DTYPES, KS, SCORINGS, ULP, Exact, levels, options_of, randn, special
from moecore import ops
from moecore.ops import launch, reference
from torch import Tensor

EXPERTS = [1, 2, 8, 16, 60, 64, 72, 96, 128, 160, 256, 384, 512, 896, 1024]

TUNING = Path(__file__).parents[2] / "cuda/tuning.cuh"


def edges() -> list[int]:
    """Numbers of tokens at which another way is taken, and one more and less."""
    number = {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)", TUNING.read_text())}
    at = [number["ROUTE_CLUSTER_FROM"], number["ROUTE_ALONE_TOKENS"], number["ROUTE_SMALL_TOKENS"]]
    at += [number["GATE_SMALL_TOKENS"], number["ROUTE_TILE32_TOKENS"], 2 * number["ROUTE_TILE32_TOKENS"]]
    at += [128 * number["ROUTE_SCAN_TILES"]]
    return sorted({max(1, one + step) for one in at for step in (-1, 0, 1)})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


#: Tokens, and how many of the 96 ways.
SOME = [(1, 96), (3, 24), (64, 96), (1000, 12), (4096, 6), (65536, 2)]


@pytest.mark.parametrize("experts", EXPERTS)
def test_gate(experts: int) -> None:
    ks = [k for k in KS if k <= experts]
    number = experts
    for tokens, ways in SOME:
        for _ in range(ways):
            number += 5  # has nothing in common with 96
            k = ks[number // 3 % len(ks)]
            options = options_of(experts, k, number)
            logits = (randn(tokens, experts) * 2).to(DTYPES[number % 3])
            weights, ids = ops.gate(logits, k, **options)
            assert (weights.shape, weights.dtype) == ((tokens, k), options["weights_dtype"])
            assert (ids.shape, ids.dtype) == ((tokens, k), options["ids_dtype"])
            Exact(logits, k, options).check(weights, ids, exact=False)


@pytest.mark.parametrize("experts", EXPERTS)
def test_gate_of_ties_and_special_numbers(experts: int) -> None:
    ks = [k for k in KS if k <= experts]
    for number in range(96):
        k = ks[number // 3 % len(ks)]
        options = options_of(experts, k, number)
        tokens = (3, 67, 2050)[number % 3]
        if options["bias"] is not None:  # two levels, far from any difference of scores
            options["bias"] = torch.where(options["bias"] > 0, 0.5625, 0.0)
            # (a + bias) + b and a + (b + bias) are equal, but not when they are rounded.
            options["group_score"] = "max"
        logits = levels(tokens, experts).to(DTYPES[number % 3])
        Exact(logits, k, options).check(*ops.gate(logits, k, **options), exact=True)
        logits = special(tokens, experts).to(DTYPES[number % 3])
        weights, ids = ops.gate(logits, k, **options)
        exact = Exact(logits, k, options)
        index = ids.long()
        assert ((index >= 0) & (index < experts)).all()
        assert (index.sort().values.diff() > 0).all()
        if not exact.by_score:
            exact.check(weights, ids, exact=True)


def test_the_smallest_sigmoids_weigh_against_each_other() -> None:
    """Below 2^-126, where the reciprocal's approximation ends."""
    logits = torch.tensor([[-95.0, -87.6, -87.9, -96.0]], device=DEVICE)
    weights, ids = ops.gate(logits, 2, scoring="sigmoid", renormalize=True)
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.5744, 0.4256]]), rtol=1e-3, atol=0)


def test_gate_of_neighbours_in_float32() -> None:
    """Words of a sort that give up low bits would fail here."""
    logits = 1 + torch.stack([torch.randperm(256) for _ in range(512)]).to(DEVICE) * ULP
    for scoring in SCORINGS:
        ids = ops.gate(logits, 8, scoring=scoring)[1]
        assert torch.equal(ids.long(), reference.best(logits)[:, :8])
    wide = randn(64, 1000)[:, 3:250]  # rows that lie apart and begin anywhere
    assert torch.equal(ops.gate(wide, 7)[1].long(), reference.best(wide)[:, :7])


@pytest.mark.parametrize("tokens", [1, 64, 300, 5000])
def test_valid(tokens: int) -> None:
    logits, x = randn(tokens, 60), randn(tokens, 64)
    full = ops.route(logits, 4)
    for count in (0, 1, tokens // 2, tokens, tokens + 5):
        valid = torch.tensor([count], dtype=torch.int32, device=DEVICE)
        route, rows, _ = ops.route_permute(x, logits, 4, valid=valid)
        inside = torch.arange(tokens, device=DEVICE) < count
        assert torch.equal(route.ids, full.ids.masked_fill(~inside[:, None], -1))
        assert torch.equal(route.weights, full.weights.masked_fill(~inside[:, None], 0))
        check_index(route, 60)
        used = int(route.ends[-1])
        assert torch.equal(rows[:used], x[route.source[:used].long()])


def check_index(route: ops.Route, experts: int, bin_of: Tensor | None = None, bins: int | None = None) -> None:
    for got, want in zip(route[2:], reference.index(route.ids, experts, bin_of, bins), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("experts", EXPERTS)
def test_route(experts: int) -> None:
    ks = [k for k in KS if k <= experts]
    for number, tokens in enumerate([1, 2, 3, 31, 32, 33, 64, 127, 128, 129, 1000, 4096, 20000, 65536, *edges()]):
        k = ks[(number + experts) % len(ks)]
        logits = randn(tokens, experts, dtype=DTYPES[number % 3])
        options: dict[str, Any] = {"scoring": SCORINGS[number % 4], "renormalize": number % 2 == 0}
        if number % 3 == 1:
            bins = experts + 5 if experts < 1000 else 1024
            places = torch.randperm(bins, device=DEVICE)[:experts].int()
            places[torch.rand(experts, device=DEVICE) < 0.2] = -1
            options |= {"bin_of": places, "bins": bins}
        route = ops.route(logits, k, ids_dtype=torch.int64 if number % 4 == 3 else torch.int32, **options)
        check_index(route, experts, options.pop("bin_of", None), options.pop("bins", None))
        weights, ids = ops.gate(logits, k, ids_dtype=route.ids.dtype, **options)
        assert torch.equal(route.ids, ids)
        assert torch.equal(route.weights, weights)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_of_given_ids(dtype: torch.dtype) -> None:
    for tokens, experts, k in [(1, 8, 8), (3, 60, 4), (64, 256, 8), (257, 1024, 32), (1000, 7, 3), (40000, 128, 8)]:
        kinds = {
            "spread": torch.rand(tokens, experts, device=DEVICE).argsort(1)[:, :k],
            "all to the same": torch.arange(k, device=DEVICE).expand(tokens, k),
        }
        strangers = torch.tensor([-1, experts, -7, experts + 3, 2**31 - 1], device=DEVICE)
        kinds["strangers"] = torch.where(
            torch.rand(tokens, k, device=DEVICE) < 0.3,
            strangers[torch.randint(5, (tokens, k), device=DEVICE)],
            kinds["spread"],
        )
        kinds["nobody"] = torch.full((tokens, k), -1, device=DEVICE)
        places = torch.randperm(1024, device=DEVICE)[:experts].int()
        for kind, ids in kinds.items():
            ids = ids.to(dtype).contiguous()
            for bin_of, bins in ((None, None), (places, 1024), (places, 512)):  # with 512, half of them are nobody's
                got = ops.index(ids, experts, bin_of=bin_of, bins=bins)
                for one, want in zip(got, reference.index(ids, experts, bin_of, bins), strict=True):
                    assert torch.equal(one, want), (kind, tokens, bins)


def ordered(x: Tensor) -> Tensor:
    """Bits as integers in the order of the numbers, so that neighbours differ by 1."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).long()
    return torch.where(bits < 0, -(bits & (2**31 - 1 if x.dtype == torch.float32 else 2**15 - 1)), bits)


def scattered(tokens: int, k: int, spare: int) -> Tensor:
    """An inverse with strangers in it, over tokens * k + spare rows."""
    inverse = torch.randperm(tokens * k + spare, device=DEVICE)[: tokens * k].view(tokens, k).int()
    inverse[torch.rand(tokens, k, device=DEVICE) < 0.1] = -1
    inverse[torch.rand(tokens, k, device=DEVICE) < 0.05] = 2**31 - 1
    return inverse.contiguous()


WIDTHS = [8, 64, 72, 1000, 2048, 2880, 7168]
CELLS = [(1, 8), (3, 3), (64, 8), (65, 1), (1000, 6), (4096, 2), (513, 32)]


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 128, 8), (33, 60, 4), (300, 1024, 8), (9000, 8, 2)])
def test_align(tokens: int, experts: int, k: int, block: int) -> None:
    route = ops.route(randn(tokens, experts), k, valid=torch.tensor([tokens - tokens // 5], device=DEVICE).int())
    got = ops.align(route.ends, route.inverse, block)
    want = ops.align(route.ends.cpu(), route.inverse.cpu(), block)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_permute_and_combine(width: int, dtype: torch.dtype) -> None:
    for number, (tokens, k) in enumerate(CELLS):
        x, inverse = randn(tokens, width, dtype=dtype), scattered(tokens, k, 5)
        count = tokens * k + 5
        rows = ops.permute(x, inverse, count)
        named = (inverse >= 0) & (inverse < count)
        token = named.nonzero()[:, 0]
        at = inverse[named].long()
        assert torch.equal(rows[at], x[token])
        unnamed = torch.ones(count, dtype=torch.bool, device=DEVICE)
        unnamed[at] = False
        rows[at] = randn(at.numel(), width, dtype=dtype)
        rows[unnamed] = math.nan  # never read
        weights = (None, torch.rand(tokens, k, device=DEVICE), randn(tokens, k, dtype=dtype))[number % 3]
        shared = randn(tokens, width, dtype=dtype) if number % 2 else None
        residual = randn(tokens, width, dtype=dtype) if number % 4 < 2 else None
        scale = 2.5 if number % 3 == 1 else 1.0
        out = ops.combine(rows, inverse, weights, shared=shared, residual=residual, scale=scale)
        want = reference.combine(rows, inverse, weights, shared, residual, scale)
        assert not out.isnan().any()
        assert ((ordered(out) - ordered(want)).abs() <= 1).all()
        assert (out == want).double().mean() > 0.999


@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_fp8(dtype: torch.dtype) -> None:
    for tokens, k, width in [(1, 8, 7168), (3, 2, 128), (65, 3, 384), (1000, 8, 2048), (129, 32, 640)]:
        x, inverse = randn(tokens, width, dtype=dtype) * 3, scattered(tokens, k, 3)
        x[tokens // 2, :128] = 0
        x[tokens // 3, 64:200] *= 1e-3
        rows, scales = ops.permute_fp8(x, inverse, tokens * k + 3)
        want_rows, want_scales = reference.permute_fp8(x, inverse, tokens * k + 3)
        at = inverse[(inverse >= 0) & (inverse < tokens * k + 3)].long()
        assert torch.equal(scales[at], want_scales[at])
        assert torch.equal(rows.view(torch.uint8)[at], want_rows.view(torch.uint8)[at])


@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1, 128, 8), (64, 256, 8), (300, 60, 4), (4100, 256, 8), (9000, 8, 2)]
)
@pytest.mark.parametrize("fp8", [False, True])
def test_route_permute(tokens: int, experts: int, k: int, fp8: bool) -> None:
    x, logits = randn(tokens, 1024, dtype=torch.bfloat16), randn(tokens, experts, dtype=torch.bfloat16)
    route, rows, scales = ops.route_permute(x, logits, k, renormalize=True, fp8=fp8)
    for one, want in zip(route, ops.route(logits, k, renormalize=True), strict=True):
        assert torch.equal(one, want)
    if scales is None:
        assert torch.equal(rows, x[route.source.long()])
        return
    want_rows, want_scales = reference.permute_fp8(x, route.inverse, tokens * k)
    assert torch.equal(scales, want_scales)
    assert torch.equal(rows.view(torch.uint8), want_rows.view(torch.uint8))


def test_rows_past_four_gigabytes() -> None:
    tokens, width, k = 65536, 7168, 8
    x, logits = randn(tokens, width, dtype=torch.bfloat16), randn(tokens, 256)
    route, rows, _ = ops.route_permute(x, logits, k, renormalize=True)
    check_index(route, 256)
    again = ops.permute(x, route.inverse)
    out = ops.combine(rows, route.inverse, route.weights, residual=x)
    for begin in (0, 30000, tokens * k - 4096):
        part = slice(begin, begin + 4096)
        want = x[route.source[part].long()]
        assert torch.equal(rows[part], want)
        assert torch.equal(again[part], want)
    for begin in (0, 40000, tokens - 512):
        part = slice(begin, begin + 512)
        want = reference.combine(rows, route.inverse[part], route.weights[part], None, x[part])
        assert ((ordered(out[part]) - ordered(want)).abs() <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_matvec(dtype: torch.dtype) -> None:
    for tokens, k, width, half, act in [
        (1, 8, 256, 96, "silu"), (3, 2, 70, 33, "gelu"), (8, 4, 8, 8, "gelu_tanh"), (2, 10, 1032, 520, "relu"),
    ]:  # fmt: skip
        gate_up = randn(12, 2 * half, width, dtype=dtype) / width**0.5
        down = randn(12, width, half, dtype=dtype) / half**0.5
        x = randn(tokens, width, dtype=dtype)
        ids = torch.stack([torch.randperm(12, device=DEVICE)[:k] for _ in range(tokens)])
        ids[-1, -1] = -1
        weights = torch.rand(tokens, k, device=DEVICE).to(torch.float32 if k % 4 else dtype)
        out = ops.expert_matvec(x, ids, weights, gate_up, down, act=act)
        want = reference.expert_matvec(x, ids, weights, gate_up, down, act)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]
        torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
        assert torch.equal(ops.expert_matvec(x, ids.int(), weights, gate_up, down, act=act), out)


def test_no_tokens() -> None:
    logits, x, ids = randn(0, 60), randn(0, 128), torch.empty(0, 4, dtype=torch.int32, device=DEVICE)
    assert [tuple(one.shape) for one in ops.gate(logits, 4)] == [(0, 4), (0, 4)]
    for route in (
        ops.route(logits, 4),
        ops.route_permute(x, logits, 4)[0],
        ops.route_permute(x, logits, 4, fp8=True)[0],
    ):
        assert (route.ends.shape, int(route.ends.sum())) == ((60,), 0)
        assert (route.source.shape, route.inverse.shape) == ((0,), (0, 4))
    assert ops.index(ids, 60)[0].tolist() == [0] * 60
    assert ops.permute(x, ids, 7).shape == (7, 128)
    assert ops.permute_fp8(x, ids)[1].shape == (0, 1)
    assert ops.combine(randn(5, 128), ids).shape == (0, 128)
    matrices = randn(60, 4, 128), randn(60, 128, 2)
    assert ops.expert_matvec(x, ids, randn(0, 4), *matrices).shape == (0, 128)
    torch.cuda.synchronize()


class Poisoned:
    """torch, but memory is full of one byte and has a guarded band on either side."""

    BAND = 512

    def __init__(self, byte: int) -> None:
        self.byte, self.taken = byte, []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: Any, dtype: torch.dtype, device: Any) -> Tensor:
        shape = (size,) if isinstance(size, int) else size
        count = math.prod(shape) * dtype.itemsize
        whole = torch.full((count + 2 * self.BAND,), self.byte, dtype=torch.uint8, device=device)
        self.taken.append(whole)
        return whole[self.BAND : self.BAND + count].view(dtype).view(shape)

    def check(self) -> None:
        assert self.taken
        for whole in self.taken:
            assert (whole[: self.BAND] == self.byte).all()
            assert (whole[-self.BAND :] == self.byte).all()


def everything(tokens: int, experts: int, k: int, width: int) -> list[Tensor]:
    """All launches once; what they wrote as bytes."""
    torch.manual_seed(tokens)
    logits, x = randn(tokens, experts, dtype=torch.bfloat16), randn(tokens, width, dtype=torch.bfloat16)
    matrices = randn(experts, 6, width, dtype=torch.bfloat16), randn(experts, width, 3, dtype=torch.bfloat16)
    route, rows, _ = ops.route_permute(x, logits, k)
    fp8, rows8, scales = ops.route_permute(x, logits, k, scoring="sigmoid", fp8=True)
    assert scales is not None
    results = [
        *ops.gate(logits, k),
        *ops.route(logits, k),
        *ops.index(route.ids, experts),
        *route,
        rows,
        *fp8,
        rows8,
        scales,
    ]
    results += [ops.permute(x, route.inverse), *ops.permute_fp8(x, route.inverse)]
    results += [ops.combine(rows, route.inverse, route.weights, shared=x, residual=x)]
    few = min(tokens, 8)
    results += [ops.expert_matvec(x[:few], route.ids[:few], route.weights[:few], *matrices)]
    return [one.contiguous().view(torch.uint8) for one in results]


def test_all_of_every_result_is_written_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens, experts, k in [
        (1, 7, 3),
        (33, 60, 4),
        (64, 256, 8),
        (200, 385, 10),
        (1000, 160, 6),
        (9000, 128, 8),
        (40000, 72, 1),
    ]:
        runs = []
        for byte in (0xA5, 0x5A, 0xFF):
            poisoned = Poisoned(byte)
            with monkeypatch.context() as patch:
                patch.setattr(launch, "torch", poisoned)
                runs.append(everything(tokens, experts, k, 384))
            poisoned.check()
        for one, other, third in zip(*runs, strict=True):
            assert torch.equal(one, other)  # also: nothing depends on what a workspace held before
            assert torch.equal(one, third)


def test_rows_that_nobody_names_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = Poisoned(0xA5)
    monkeypatch.setattr(launch, "torch", poisoned)
    x, inverse = randn(50, 256), torch.full((50, 2), -1, dtype=torch.int32, device=DEVICE)
    inverse[7, 1], inverse[8, 0], inverse[9, 0] = 3, 120, -(2**31)
    for rows in (ops.permute(x, inverse, 120), *ops.permute_fp8(x, inverse, 120)):
        others = [row for row in range(120) if row != 3]
        assert (rows.view(torch.uint8)[others] == 0xA5).all()
        assert (rows.view(torch.uint8)[3] != 0xA5).any()
    poisoned.check()


@pytest.mark.parametrize("tokens", [1, 64, 200, 4096])
def test_a_hundred_runs_are_bitwise_equal(tokens: int) -> None:
    busy, other = torch.cuda.Stream(), randn(1024, 1024)
    logits, x = randn(tokens, 256), randn(tokens, 1024, dtype=torch.bfloat16)
    first: list[Tensor] = []
    for number in range(100):
        with torch.cuda.stream(busy):  # takes SMs away, more or less of them each time
            for _ in range(1 + number % 3):
                other.mm(other)
        route, rows, _ = ops.route_permute(x, logits, 8, scoring="sigmoid", renormalize=True)
        index = ops.index(route.ids, 256)
        out = ops.combine(rows, route.inverse, route.weights, residual=x)
        now = [*route, rows, *index, out]
        first = first or now
        assert all(torch.equal(one, want) for one, want in zip(now, first, strict=True)), number


def test_capture_and_replay_with_changing_inputs() -> None:
    for tokens, experts, k in [(1, 128, 8), (64, 256, 8), (300, 60, 4), (9000, 256, 8)]:
        logits, x = randn(tokens, experts), randn(tokens, 512, dtype=torch.bfloat16)
        valid = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
        matrices = randn(experts, 64, 512, dtype=torch.bfloat16), randn(experts, 512, 32, dtype=torch.bfloat16)

        def layer(
            logits: Tensor = logits, x: Tensor = x, valid: Tensor = valid, k: int = k, m: Any = matrices
        ) -> list[Tensor]:
            route, rows, _ = ops.route_permute(x, logits, k, renormalize=True, valid=valid)
            out = ops.combine(rows, route.inverse, route.weights, shared=x, residual=x)
            few = ops.expert_matvec(x[:8], route.ids[:8], route.weights[:8], *m)
            return [*route, out, few, *ops.gate(logits, k)]

        layer()  # what is loaded at the first use is loaded
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = layer()
        for number in range(5):
            logits.copy_(randn(*logits.shape))
            x.copy_(randn(*x.shape))
            valid.fill_(tokens if number % 2 else tokens // 2)
            graph.replay()
            got = [one.clone() for one in results]
            for one, want in zip(got, layer(), strict=True):
                assert torch.equal(one, want)


# Inductor itself uses what torch has deprecated, and begins with a graph of nothing.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("backend", ["aot_eager", "cudagraphs"])
def test_compiles_into_one_graph(backend: str) -> None:
    torch.compiler.reset()

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        route, rows, _ = ops.route_permute(x, logits, 4, renormalize=True)
        return ops.combine(rows, route.inverse, route.weights, residual=x) * 2

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            x, logits = randn(33, 128), randn(33, 60)
            torch.testing.assert_close(compiled(x, logits), layer(x, logits))


def test_the_dispatcher_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    direct = everything(33, 60, 4, 384)
    monkeypatch.setattr(ops, "_direct", lambda x: False)
    for one, want in zip(everything(33, 60, 4, 384), direct, strict=True):
        assert torch.equal(one, want)


def test_bad_arguments_and_gradients_are_refused() -> None:
    logits, x = randn(3, 8), randn(3, 64)
    with pytest.raises(ValueError, match="bias: on cpu, must be on cuda:0, as logits"):
        ops.gate(logits, 2, bias=torch.zeros(8))
    with pytest.raises(ValueError, match="inverse: on cpu, must be on cuda:0, as x"):
        ops.permute(x, torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="logits: dtype float64"):
        ops.gate(logits.double(), 2)
    with pytest.raises(ValueError, match="k: 9, must be from 1 to 8"):
        ops.route(logits, 9)
    with pytest.raises(ValueError, match=r"rows: memory at an address of .* modulo 16"):
        ops.combine(randn(200)[1:193].view(3, 64), torch.zeros(3, 2, dtype=torch.int32, device=DEVICE))
    with pytest.raises(RuntimeError, match="computes no gradients"):
        ops.gate(logits.requires_grad_(), 2)
    with torch.no_grad():
        ops.gate(logits, 2)


def test_work_goes_to_the_current_stream() -> None:
    logits = randn(64, 256)
    want = ops.route(logits, 8)
    torch.cuda.synchronize()
    side, late = torch.cuda.Stream(), torch.zeros_like(logits)
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(logits)  # only after the sleep is there anything to route
        got = ops.route(late, 8)
    side.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
