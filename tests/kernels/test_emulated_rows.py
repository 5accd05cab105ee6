"""permute and combine against their specification, bit for bit."""

from __future__ import annotations

import guarded
import pytest
import torch
from emulated import CombineArgs, PermuteArgs, library
from guarded import DTYPES, FORMATS, POISONS, Launch, Memory, bits
from moecore.ops import reference

#: Any grid will do: few blocks with many pieces each, more blocks than there are pieces.
GRIDS = (1, 3, 200)
POISON = POISONS[0]


def places(tokens: int, k: int, rows: int, seed: int, missing: float = 0.2) -> torch.Tensor:
    """An inverse that names distinct rows, with pairs of nobody and rows that do not exist."""
    generator = torch.Generator().manual_seed(seed)
    inverse = torch.randperm(max(rows, tokens * k), generator=generator)[: tokens * k].view(tokens, k)
    nobody = torch.rand(tokens, k, generator=generator) < missing
    inverse = inverse.masked_fill(nobody, -1)
    if tokens * k > 3:
        inverse.view(-1)[1] = rows  # the first that does not exist
        inverse.view(-1)[2] = 2**31 - 1
        inverse.view(-1)[3] = -(2**31)
    return inverse.int()


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((count,), POISON, dtype=torch.uint8).view(dtype).view(shape)


#: Tokens, choices, bytes of a row: one unit, less than a warp's, more than one round; k beyond a warp's lanes.
PLAIN = [
    (1, 1, 16), (3, 8, 528), (33, 2, 2048), (7, 10, 4112), (5, 32, 496), (130, 3, 112), (2, 40, 1040), (64, 1, 512),
    (300, 6, 32),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "k", "row_bytes"), PLAIN)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tuning", [(), ("PERMUTE_STORE_HINT=3", "PERMUTE_DEPTH=2")], ids=str)
def test_permute(tokens: int, k: int, row_bytes: int, grid: int, tuning: tuple[str, ...]) -> None:
    rows = tokens * k + 5
    memory = Memory()
    x = memory.input(torch.randint(0, 256, (tokens, row_bytes), dtype=torch.uint8))
    inverse = memory.input(places(tokens, k, rows, 1))
    out = memory.output((rows, row_bytes), torch.uint8, whole=False)
    args = PermuteArgs(x=x, inverse=inverse, out=out, tokens=tokens, k=k, rows=rows, row_bytes=row_bytes)
    schedules = guarded.SCHEDULES if grid == 3 else (grid % 2,)
    guarded.run(memory, [Launch(library("permute.cu", *tuning), "moecore_permute", grid, (args,))], schedules)
    expected = torch.full((rows, row_bytes), POISON, dtype=torch.uint8)
    for t in range(tokens):
        for row in inverse[t].tolist():
            if 0 <= row < rows:
                expected[row] = x[t]
    assert torch.equal(out, expected)


def quantized(x: torch.Tensor, inverse: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the specification says, with the poison where nobody writes."""
    q, scales = reference.quantize(x)
    out = poisoned((rows, x.shape[1]), torch.uint8)
    out_scales = poisoned((rows, x.shape[1] // 128), torch.float32)
    for t in range(x.shape[0]):
        for row in inverse[t].tolist():
            if 0 <= row < rows:
                out[row] = q[t].view(torch.uint8)
                out_scales[row] = scales[t]
    return out, out_scales


@pytest.mark.parametrize("format_", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "hidden"), [
    (1, 1, 128), (3, 8, 384), (33, 2, 512), (5, 10, 2176), (2, 40, 640), (130, 3, 256), (70, 1, 1152), (3, 32, 7168),
])  # fmt: skip
def test_permute_fp8(format_: str, tokens: int, k: int, hidden: int) -> None:
    rows = tokens * k + 5
    memory, name = Memory(), f"moecore_permute_fp8_{format_}"
    given = numbers((tokens, hidden), DTYPES[format_], 2)
    given[0, :128] = 0.0
    given[-1, -128:] *= 2.0**-20
    given[tokens // 2, 5] = -0.0
    if tokens > 2:  # so small that the scale has lost its digits, and the quotient is above 448
        given[1, :128] = (torch.arange(128.0) * 2.0**-144 / 2.0).to(given.dtype)
        given[1, 128:256] = (torch.arange(128.0) * 5.0 * 2.0**-149).to(given.dtype)
    x, inverse = memory.input(given), memory.input(places(tokens, k, rows, 3))
    out = memory.output((rows, hidden), torch.uint8, whole=False)
    scales = memory.output((rows, hidden // 128), torch.float32, whole=False)
    args = PermuteArgs(
        x=x, inverse=inverse, out=out, scales=scales, tokens=tokens, k=k, rows=rows,
        row_bytes=hidden * x.element_size(), x_format=FORMATS[x.dtype],
    )  # fmt: skip
    expected, expected_scales = quantized(x, inverse, rows)
    for grid, schedules in ((7, guarded.SCHEDULES), (1, (3,)), (60, (1,))):
        guarded.run(memory, [Launch(library("permute.cu"), name, grid, (args,))], schedules)
        assert torch.equal(bits(scales), bits(expected_scales))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("format_", DTYPES)
def test_permute_fp8_rounds_as_torch(format_: str) -> None:
    """Every number that e4m3 knows, those half way between two, and their neighbours, under a scale of 1 and others."""
    known = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    half = (known[1:] + known[:-1]) / 2
    near = torch.cat([known, half, torch.nextafter(half, half * 2), torch.nextafter(half, half / 2)])
    near = torch.cat([near, -near, torch.zeros(6)]).view(8, 127)
    blocks = torch.cat([torch.full((8, 1), 448.0), near], dim=1).flatten()
    exponents = torch.tensor([0.0, -3.0, 5.0])
    given = torch.stack([blocks * 2.0**e for e in exponents]).to(DTYPES[format_])
    memory, name = Memory(), f"moecore_permute_fp8_{format_}"
    x, inverse = memory.input(given), memory.input(torch.tensor([[2], [0], [1]], dtype=torch.int32))
    out, scales = memory.output((3, given.shape[1]), torch.uint8), memory.output((3, 8), torch.float32)
    args = PermuteArgs(
        x=x, inverse=inverse, out=out, scales=scales, tokens=3, k=1, rows=3,
        row_bytes=given.shape[1] * x.element_size(), x_format=FORMATS[x.dtype],
    )  # fmt: skip
    guarded.run(memory, [Launch(library("permute.cu"), name, 2, (args,))])
    expected, expected_scales = quantized(x, inverse, 3)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("format_", DTYPES)
def test_permute_fp8_of_a_nan(format_: str) -> None:
    """Its block's scale says so, in whichever lane it is; the other blocks are as without it."""
    given = numbers((4, 640), DTYPES[format_], 9)
    clean, clean_scales = reference.quantize(given)
    blocks = [(0, 0), (1, 2), (2, 4), (3, 1)]
    for (token, block), at in zip(blocks, (0, 77, 127, 33), strict=True):
        given[token, block * 128 + at] = torch.nan
    memory = Memory()
    x, inverse = memory.input(given), memory.input(torch.arange(4, dtype=torch.int32)[:, None])
    out, scales = memory.output((4, 640), torch.uint8), memory.output((4, 5), torch.float32)
    args = PermuteArgs(
        x=x, inverse=inverse, out=out, scales=scales, tokens=4, k=1, rows=4, row_bytes=640 * x.element_size(),
        x_format=FORMATS[x.dtype],
    )  # fmt: skip
    guarded.run(memory, [Launch(library("permute.cu"), f"moecore_permute_fp8_{format_}", 2, (args,))], (0, 3))
    hit = torch.zeros(4, 5, dtype=torch.bool)
    hit[tuple(torch.tensor(blocks).T)] = True
    assert torch.equal(scales.isnan(), hit)
    assert torch.equal(scales[~hit], clean_scales[~hit])
    assert torch.equal(out.view(4, 5, 128)[~hit], clean.view(torch.uint8).view(4, 5, 128)[~hit])


#: Every number of choices that has its own code, and those that share one.
@pytest.mark.parametrize("format_", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 24, 31, 32])
def test_combine(format_: str, k: int) -> None:
    dtype = DTYPES[format_]
    lib, name = library("combine.cu"), f"moecore_combine_{format_}"
    cases = [(1, 16), (5, 528), (9, 2064), (3, 7168)]
    for case, (tokens, row_bytes) in enumerate(cases):
        hidden, rows = row_bytes // dtype.itemsize, tokens * k + 3
        pick = case + k
        memory = Memory()
        given = numbers((rows, hidden), dtype, 4)
        named = places(tokens, k, rows, 5) if pick % 4 else None
        # Rows that nobody names hold what memory holds.
        unread = torch.ones(rows, dtype=torch.bool)
        unread[named[(named >= 0) & (named < rows)].long() if named is not None else slice(tokens * k)] = False
        given[unread] = torch.nan
        weight_type = (torch.float32, torch.bfloat16, torch.float16)[pick % 3]
        weights = memory.input(numbers((tokens, k), weight_type, 6)) if pick % 5 or named is None else None
        shared = memory.input(numbers((tokens, hidden), dtype, 7)) if pick % 2 else None
        residual = memory.input(numbers((tokens, hidden), dtype, 8)) if pick % 3 else None
        x, inverse, scale = memory.input(given), memory.input(named), (1.0, 2.5)[pick % 2]
        out = memory.output((tokens, hidden), dtype)
        args = CombineArgs(
            rows=x, inverse=inverse, weights=weights, shared=shared, residual=residual, out=out, tokens=tokens, k=k,
            row_count=rows, row_bytes=row_bytes, weights_format=FORMATS[weight_type], scale=scale,
        )  # fmt: skip
        expected = reference.combine(x, inverse, weights, shared, residual, scale)
        for grid in GRIDS:
            schedules = guarded.SCHEDULES if grid == 3 else (grid,)
            guarded.run(memory, [Launch(lib, name, grid, (args,))], schedules)
            assert torch.equal(bits(out), bits(expected)), f"{tokens} tokens, {row_bytes} bytes, grid {grid}"


@pytest.mark.parametrize("format_", DTYPES)
def test_combine_of_nobody(format_: str) -> None:
    """A token whose pairs all belong to nobody: what is added to it, and no row is read, though all are NaN."""
    dtype, memory = DTYPES[format_], Memory()
    rows, inverse = torch.full((6, 64), torch.nan).to(dtype), torch.full((3, 2), -1, dtype=torch.int32)
    weights, residual = torch.full((3, 2), torch.nan), numbers((3, 64), dtype, 9)
    x, named, w, r = (memory.input(given) for given in (rows, inverse, weights, residual))
    out = memory.output((3, 64), dtype)
    args = CombineArgs(
        rows=x, inverse=named, weights=w, residual=r, out=out, tokens=3, k=2, row_count=6,
        row_bytes=64 * dtype.itemsize, scale=1.0,
    )  # fmt: skip
    lib, name = library("combine.cu"), f"moecore_combine_{format_}"
    guarded.run(memory, [Launch(lib, name, 1, (args,))])
    assert torch.equal(out, residual)


@pytest.mark.parametrize("k", [3, 8])
def test_combine_of_rows_that_are_not_there(k: int) -> None:
    """Without an inverse, and with fewer rows than pairs: the last pairs are left out, as by an inverse."""
    dtype, memory, count = torch.bfloat16, Memory(), 4 * k - 2
    x, weights = memory.input(numbers((count, 64), dtype, 1)), memory.input(numbers((4, k), torch.float32, 2))
    out = memory.output((4, 64), dtype)
    args = CombineArgs(
        rows=x, weights=weights, out=out, tokens=4, k=k, row_count=count, row_bytes=64 * dtype.itemsize, scale=1.0
    )
    guarded.run(memory, [Launch(library("combine.cu"), "moecore_combine_bf16", 2, (args,))], (0, 3))
    assert torch.equal(bits(out), bits(reference.combine(x, None, weights)))


def test_nothing_to_do() -> None:
    """No tokens: nothing is read, through null pointers either."""
    for source, make in (("permute.cu", PermuteArgs), ("combine.cu", CombineArgs)):
        lib = library(source)
        for name in lib.kernels:
            lib.launch(name, 2, lib.threads(name), 0, make(k=2, row_bytes=4096))
