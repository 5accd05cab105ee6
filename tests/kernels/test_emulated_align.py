"""align on the CPU: the kernel against the specification, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import guarded
import pytest
import torch
from emulated import AlignArgs, library
from guarded import Launch, Memory
from moecore.ops import reference
from moecore.ops.check import capacity

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Bins, tokens, choices: with fewer pairs than bins and with more, up to as many bins as threads and beyond.
SHAPES = [
    (1, 1, 1), (1, 100, 1), (3, 5, 2), (31, 1, 8), (60, 33, 4), (255, 2, 8), (256, 7, 8), (257, 30, 8), (385, 129, 3),
    (1024, 40, 8), (1024, 1, 1), (8, 300, 2),
]  # fmt: skip


def cut(ends: torch.Tensor, inverse: torch.Tensor, block: int, room: int, grids: Sequence[int]) -> list[torch.Tensor]:
    """order, owner and places by the kernel: the same for each grid, under each schedule."""
    bins, memory = len(ends), Memory()
    out = [memory.output((size,), torch.int32) for size in (room, room // block, 1)]
    args = AlignArgs(
        ends=memory.input(ends), inverse=memory.input(inverse), order=out[0], owner=out[1], places=out[2],
        pairs=inverse.numel(), bins=bins, block=block, capacity=room,
    )  # fmt: skip
    first: list[torch.Tensor] = []
    for grid in grids:
        launch = Launch(library("align.cu"), "moecore_align", grid, (args,), shared=4 * (2 * bins + bins // 32 + 33))
        guarded.run(memory, [launch])
        first = first or [one.clone() for one in out]
        assert all(torch.equal(a, b) for a, b in zip(out, first, strict=True))
    return first


def some_ids(bins: int, tokens: int, k: int, nobody: float) -> torch.Tensor:
    ids = torch.stack([torch.randperm(bins)[:k] for _ in range(tokens)]).int()
    ids[torch.rand(tokens, k) < nobody] = -1
    return ids


@pytest.mark.parametrize("block", [1, 16, 48, 64, 1024])
@pytest.mark.parametrize(("bins", "tokens", "k"), SHAPES)
def test_align(bins: int, tokens: int, k: int, block: int) -> None:
    """A grid of one block, whose warps take many blocks of places at once, and the one that a GPU is given."""
    torch.manual_seed(bins + tokens)
    room = capacity(tokens * k, bins, block)
    warps = -(-tokens * k // 32) + room // block
    for nobody in (0.0, 0.3, 1.0):
        ends, _, inverse = reference.index(some_ids(bins, tokens, k, nobody), bins)
        got = cut(ends, inverse, block, room, (1, 3, -(-warps // 8)) if room < 20000 else (1, 2))
        assert all(torch.equal(a, b) for a, b in zip(got, reference.align(ends, inverse, block), strict=True))


@pytest.mark.parametrize("ends", [[0, 0, 70], [70, 70, 70], [0, 64, 64], [16, 16, 17, 17, 65]])
def test_bins_without_rows(ends: list[int]) -> None:
    """In front, in the middle and at the end, beside bins that fill their blocks exactly."""
    bounds, inverse = torch.tensor(ends, dtype=torch.int32), torch.randperm(ends[-1]).int().view(-1, 1)
    for block in (1, 16, 64):
        want = reference.align(bounds, inverse, block)
        got = cut(bounds, inverse, block, len(want[0]), (1, 4))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("block", [1, 16, 300])
def test_more_room_than_any_order_needs(block: int) -> None:
    """All blocks behind the last are nobody's, and filled up like the others."""
    ends, _, inverse = reference.index(some_ids(20, 6, 2, 0.2), 20)
    order, owner, places = reference.align(ends, inverse, block)
    room = len(order) + 41 * block
    got = cut(ends, inverse, block, room, (1, 2, 9))
    assert torch.equal(got[0], torch.cat([order, torch.full((41 * block,), 12, dtype=torch.int32)]))
    assert torch.equal(got[1], torch.cat([owner, torch.full((41,), -1, dtype=torch.int32)]))
    assert torch.equal(got[2], places)


def test_all_pairs_in_one_bin() -> None:
    ends, inverse = torch.tensor([0, 70, 70], dtype=torch.int32), torch.randperm(70).int().view(35, 2)
    order, owner, places = reference.align(ends, inverse, 16)
    assert places.tolist() == [80]
    assert owner.tolist() == [1] * 5 + [-1] * (len(owner) - 5)
    assert order[:70].tolist() == inverse.flatten().argsort().tolist()
    assert (order[70:] == 70).all()


def test_the_launch_that_loads_the_kernel() -> None:
    library("align.cu").launch("moecore_align", 1, 32, 128, AlignArgs())


def test_rows_of_another_order_are_left_out() -> None:
    """Rows behind the last bin, and more rows than places: nothing is written outside."""
    memory = Memory()
    ends = memory.input(torch.tensor([40, 41], dtype=torch.int32))
    inverse = memory.input(torch.tensor([0, 41, 39, 7, 1000, 40, -1, -(2**31)], dtype=torch.int32))
    order, owner = memory.output((16,), torch.int32), memory.output((2,), torch.int32)
    args = AlignArgs(
        ends=ends, inverse=inverse, order=order, owner=owner, places=memory.output((1,), torch.int32), pairs=8, bins=2,
        block=8, capacity=16,
    )  # fmt: skip
    guarded.run(memory, [Launch(library("align.cu"), "moecore_align", 1, (args,), shared=4 * 37)], (0,))
    assert order[0] == 0
    assert order[7] == 3
    assert owner.tolist() == [0, 0]


def test_rows_behind_the_last_bin_leave_its_padding_alone() -> None:
    ends, inverse = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([[2], [5], [0], [3], [1]], dtype=torch.int32)
    order, owner, places = cut(ends, inverse, 8, 32, (1, 2))
    assert order.tolist() == [2, 4] + [5] * 6 + [0] + [5] * 23
    assert owner.tolist() == [0, 1, -1, -1]
    assert places.tolist() == [16]
