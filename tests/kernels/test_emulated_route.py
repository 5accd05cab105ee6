"""route by each of its ways (one block, a cluster of blocks, tiles, tiles with a scan), and index."""

from __future__ import annotations

from dataclasses import dataclass, replace

import guarded
import pytest
import torch
from emulated import SCHEDULES, GateArgs, RouteArgs, library
from gating import BY_LOGITS, BY_SCORES, IDS_I64, NAMES, Gate, check_ids, check_weights, hard_rows, kernel, rule
from guarded import DTYPES, FORMATS, POISONS, Launch, Memory, bits
from moecore.ops import reference

EXPERTS = (1, 2, 8, 16, 60, 64, 72, 96, 128, 160, 256, 384, 512, 896, 1024)


@dataclass(frozen=True)
class Way:
    """How a route is launched. `tile`: tokens of a tile, 0 for one launch. `parts`: blocks that share a tile's copy."""

    cluster: int = 1
    warps: int = 4
    tile: int = 0
    scan: bool = False
    parts: int = 1


ONE = (Way(warps=1), Way(warps=3), Way(warps=16))
CLUSTERS = (Way(cluster=8, warps=1), Way(cluster=8, warps=2), Way(cluster=2, warps=8))
TILES = (Way(tile=32), Way(tile=64, scan=True), Way(tile=128), Way(tile=32, scan=True))


@dataclass
class Routed:
    weights: torch.Tensor
    ids: torch.Tensor
    ends: torch.Tensor
    source: torch.Tensor
    inverse: torch.Tensor
    rows: torch.Tensor | None
    scales: torch.Tensor | None


def up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def route(
    way: Way,
    gate: Gate,
    logits: torch.Tensor | None,
    *,
    experts: int,
    bias: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
    bin_of: torch.Tensor | None = None,
    bins: int = 0,
    valid: int | None = None,
    i64: bool = False,
    x: torch.Tensor | None = None,
    fp8: bool = False,
    schedules: tuple[int, ...] = SCHEDULES,
) -> Routed:
    """The launches of one route, with results poisoned. `given`: ids instead of logits."""
    some = given if logits is None else logits
    tokens, k, bins, memory = some.shape[0], gate.k, bins or experts, Memory()
    weights = memory.output((tokens, k), torch.float32) if given is None else torch.empty(0)
    ids = memory.input(given)
    if ids is None:
        ids = memory.output((tokens, k), torch.int64 if i64 else torch.int32)
    ends, source = memory.output((bins,), torch.int32), memory.output((tokens * k,), torch.int32)
    inverse = memory.output((tokens, k), torch.int32)
    rows = scales = None
    if x is not None:
        hidden = x.shape[1]
        rows = memory.output((tokens * k, hidden), torch.uint8 if fp8 else x.dtype, whole=False)
        scales = memory.output((tokens * k, hidden // 128), torch.float32, whole=False) if fp8 else None
    fields = gate.fields()
    fields["flags"] = gate.flags | (IDS_I64 if ids.dtype == torch.int64 else 0)
    if logits is not None:
        fields["flags"] |= rule(gate, logits, experts, bias is not None)
    tiles = -(-tokens // way.tile) if way.tile else 0
    args = RouteArgs(
        gate=GateArgs(
            logits=memory.input(logits), bias=memory.input(bias), ids=ids, stride=experts, tokens=tokens,
            experts=experts,
            valid=memory.input(None if valid is None else torch.tensor([valid], dtype=torch.int32)),
            weights=weights if given is None else None, **fields,
        ),
        bin_of=memory.input(bin_of), bins=bins, ends=ends, source=source, inverse=inverse, tile=way.tile,
        counts=memory.output((tiles, bins), torch.int16) if tiles else None,
        starts=memory.output((tiles, bins), torch.int32) if way.scan else None,
        x=memory.input(x), rows=rows, scales=scales, row_bytes=0 if x is None else x.stride(0) * x.element_size(),
        x_format=0 if x is None else FORMATS[x.dtype],
    )  # fmt: skip
    rows_by = (torch.float32 if logits is None else logits.dtype, experts, fields["flags"] & (BY_LOGITS | BY_SCORES))
    launches = []
    if way.tile:
        lib = library("route_tiles.cu")
        launches.append(Launch(lib, kernel("route_count", *rows_by), tiles, (args,), 0, 4 * bins))
        if way.scan:
            launches.append(Launch(lib, "moecore_route_scan", -(-bins // 32), (args,)))
        place = "plain" if not fp8 else f"fp8_{NAMES[x.dtype]}"
        shared = up(4 * (bins * way.tile // 32 + 3 * bins + 32 + way.tile * k), 16)
        launches.append(Launch(lib, f"moecore_route_place_{place}", (tiles, way.parts), (args,), 0, shared))
    else:
        shared = up(4 * (bins * -(-tokens // 32) + bins + 32) + 2 * tokens * k, 16) if tokens > 1 else 0
        threads = 32 * way.warps if tokens > 1 else 32
        lib, name = library("route_small.cu"), kernel("route_small", *rows_by)
        cluster = way.cluster if tokens > 1 else 1
        launches.append(Launch(lib, name, cluster, (args,), threads, shared, cluster))
    guarded.run(memory, launches, schedules)
    return Routed(weights, ids, ends, source, inverse, rows, scales)


def check_index(
    routed: Routed, experts: int, bin_of: torch.Tensor | None = None, bins: int = 0, valid: int | None = None
) -> None:
    """The index of the ids that are there."""
    ids = routed.ids if valid is None else routed.ids.clone()
    if valid is not None:
        ids[max(valid, 0) :] = -1
    ends, source, inverse = reference.index(ids, experts, bin_of, bins or None)
    assert torch.equal(routed.ends, ends)
    assert torch.equal(routed.inverse, inverse)
    assert torch.equal(routed.source, source)


def check_rows(routed: Routed, x: torch.Tensor) -> None:
    """The copies of x: rows of somebody, and no other."""
    expected = torch.full_like(bits(routed.rows), POISONS[0]).view(routed.rows.shape[0], -1)
    if routed.scales is not None:
        q, scales = reference.quantize(x)
        expected_scales = torch.full_like(bits(routed.scales), POISONS[0]).view(torch.float32).view(routed.scales.shape)
    for row, token in enumerate(routed.source.tolist()):
        if token >= 0:
            expected[row] = bits(x[token] if routed.scales is None else q[token])
            if routed.scales is not None:
                expected_scales[row] = scales[token]
    assert torch.equal(bits(routed.rows), expected.flatten())
    if routed.scales is not None:
        assert torch.equal(bits(routed.scales), bits(expected_scales))


def some_ids(tokens: int, k: int, experts: int, seed: int, missing: float = 0.2) -> torch.Tensor:
    """Distinct ids of each token, with all kinds of nobody between them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :k].long()
    nobody = torch.tensor([-1, experts, 2**31 - 1, -(2**31)])[torch.randint(4, (tokens, k), generator=generator)]
    return torch.where(torch.rand(tokens, k, generator=generator) < missing, nobody, ids)


def some_bins(experts: int, bins: int, seed: int) -> torch.Tensor:
    """Distinct bins of experts, in no order, and a number that is no bin for those that have none."""
    generator = torch.Generator().manual_seed(seed)
    taken = torch.randperm(max(bins, experts), generator=generator)[:experts]
    nobody = torch.tensor([-1, bins, 2**31 - 1, -(2**31)])[torch.arange(experts) % 4]
    return torch.where((taken < bins) & (torch.rand(experts, generator=generator) < 0.8), taken, nobody).int()


def pick_k(experts: int, pick: int) -> int:
    known = sorted({k for k in (1, 3, 8, 10, 32, experts) if k <= min(experts, 32)})
    return known[pick % len(known)]


def ways(tokens: int) -> tuple[Way, ...]:
    return (ONE + CLUSTERS if tokens <= 256 else ()) + TILES


@pytest.mark.parametrize("format_", DTYPES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_hard_rows(experts: int, format_: str) -> None:
    """Each way with another k and scoring: ids as gate makes them, weights too."""
    logits = hard_rows(experts, DTYPES[format_], experts + 7)
    for turn, way in enumerate((ONE[1], CLUSTERS[1], TILES[0])):
        pick = turn + experts
        gate = Gate(
            pick_k(experts, pick), ("softmax", "sigmoid", "sqrtsoftplus", "softmax_topk")[(pick + turn) % 4],
            renormalize=True, scale=2.5,
        )  # fmt: skip
        routed = route(way, gate, logits, experts=experts, schedules=(turn, 3), i64=turn == 1)
        check_ids(gate, logits, None, routed.ids)
        check_weights(gate, logits, routed.ids, routed.weights)
        check_index(routed, experts)


@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 32, 33, 64, 129, 255])
@pytest.mark.parametrize("experts", [1, 8, 60, 96, 129, 256, 1024])
def test_given_ids(tokens: int, experts: int) -> None:
    """Ids of the caller, with nobodies, by every way and as both types of integers."""
    if experts * tokens > 2**15 and tokens not in (33, 129):
        pytest.skip("shared memory of a GPU would not hold the masks, or another case does the same")
    for turn, way in enumerate(ways(tokens)):
        k = pick_k(experts, turn + tokens)
        ids = some_ids(tokens, k, experts, turn + tokens)
        if (turn + experts) % 2:
            ids[ids == 2**31 - 1] = 2**32 + 1  # an expert, for who forgets the upper half
        else:
            ids = ids.int()
        routed = route(way, Gate(k), None, experts=experts, given=ids, schedules=(turn % 3, 3 + turn))
        check_index(routed, experts)


@pytest.mark.parametrize("way", [*ONE, *CLUSTERS, *TILES], ids=str)
def test_bins(way: Way) -> None:
    """An indirection to slots: more or fewer bins than experts, experts without one, valid tokens only."""
    for tokens, experts, bins, valid in [
        (1, 60, 7, None), (33, 60, 100, None), (20, 128, 31, 13), (64, 16, 1024, 64), (70, 256, 33, 0), (65, 8, 1, 64),
        (1, 8, 40, 0), (129, 72, 65, 1000), (5, 64, 8, -3),
    ]:  # fmt: skip
        gate = Gate(min(experts, 6), "sigmoid", renormalize=True)
        logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
        bin_of = some_bins(experts, bins, tokens)
        routed = route(
            way, gate, logits, experts=experts, bin_of=bin_of, bins=bins, valid=valid, schedules=(0, 1, 2)
        )  # fmt: skip
        some = tokens if valid is None else min(max(valid, 0), tokens)
        check_ids(gate, logits[:some], None, routed.ids[:some])
        check_weights(gate, logits[:some], routed.ids[:some], routed.weights[:some])
        assert (routed.ids[some:] == -1).all()
        assert (routed.weights[some:] == 0).all()
        check_index(routed, experts, bin_of, bins)
        # The same tokens by their ids: `valid` counts there, too.
        again = route(
            way, gate, None, experts=experts, given=some_ids(tokens, gate.k, experts, 3).int(), bin_of=bin_of,
            bins=bins, valid=valid, schedules=(3,),
        )  # fmt: skip
        check_index(again, experts, bin_of, bins, valid)


@pytest.mark.parametrize("way", TILES, ids=str)
def test_many_tiles(way: Way) -> None:
    """Counts of many tiles add up; one bin with nearly all rows, and bins with none."""
    for tokens, experts, k in [(1100, 12, 3), (700, 264, 8), (515, 33, 2)]:
        generator = torch.Generator().manual_seed(tokens)
        skewed = torch.rand(tokens, experts, generator=generator) + 5.0 * (torch.arange(experts) == experts - 2)
        ids = skewed.argsort(-1, descending=True)[:, :k].int()
        routed = route(way, Gate(k), None, experts=experts, given=ids, schedules=(1, 2))
        check_index(routed, experts)


@pytest.mark.parametrize("way", [TILES[0], TILES[1], replace(TILES[2], parts=2), replace(TILES[0], parts=4)], ids=str)
@pytest.mark.parametrize("format_", [*DTYPES, "bytes"])
def test_copies(way: Way, format_: str) -> None:
    """The rows that place copies, as they are and as e4m3."""
    for tokens, hidden, k in [(3, 128, 2), (70, 640, 8), (129, 256, 1), (33, 1408, 10)]:
        gate, experts = Gate(k, renormalize=True), 60
        generator = torch.Generator().manual_seed(tokens)
        logits = torch.randn(tokens, experts, generator=generator)
        x = torch.randn(tokens, hidden, generator=generator).to(DTYPES.get(format_, torch.bfloat16))
        bin_of = some_bins(experts, 64, tokens)
        routed = route(
            way, gate, logits, experts=experts, bin_of=bin_of, bins=64, valid=tokens - 1, x=x, fp8=format_ != "bytes",
            schedules=(0, 3),
        )  # fmt: skip
        check_index(routed, experts, bin_of, 64)
        check_rows(routed, x)


def test_every_way_gives_the_same() -> None:
    logits = hard_rows(96, torch.float32, 11, more=40)
    bias = torch.randint(-3, 4, (96,), generator=torch.Generator().manual_seed(1)) * 0.25
    gate = Gate(8, "sigmoid", 8, 4, "top2", renormalize=True, scale=2.5, eps=1e-20)
    first = None
    for way in ways(len(logits)):
        routed = route(way, gate, logits, experts=96, bias=bias, schedules=(2,))
        results = [bits(tensor) for tensor in (routed.weights, routed.ids, routed.ends, routed.source, routed.inverse)]
        first = first or results
        for one, other in zip(first, results, strict=True):
            assert torch.equal(one, other), way
