"""align on the CPU: the kernel against the specification, bit for bit."""

from __future__ import annotations

import guarded
import pytest
import torch
from emulated import AlignArgs, library
from guarded import Launch, Memory
from moecore.ops import reference
from moecore.ops.check import capacity

#: Bins, tokens, choices.
SHAPES = [(1, 1, 1), (3, 5, 2), (60, 33, 4), (256, 7, 8), (385, 129, 3), (1024, 40, 8), (8, 300, 2)]


@pytest.mark.parametrize("block", [1, 16, 48, 64, 1024])
@pytest.mark.parametrize(("bins", "tokens", "k"), SHAPES)
def test_align(bins: int, tokens: int, k: int, block: int) -> None:
    torch.manual_seed(bins + tokens)
    lib, pairs = library("align.cu"), tokens * k
    room = capacity(pairs, bins, block)
    for nobody in (0.0, 0.3, 1.0):
        ids = torch.stack([torch.randperm(bins)[:k] for _ in range(tokens)]).int()
        ids[torch.rand(tokens, k) < nobody] = -1
        ends, _, inverse = reference.index(ids, bins)
        memory = Memory()
        order = memory.output((room,), torch.int32)
        owner = memory.output((room // block,), torch.int32)
        places = memory.output((1,), torch.int32)
        args = AlignArgs(
            ends=memory.input(ends), inverse=memory.input(inverse), order=order, owner=owner, places=places,
            pairs=pairs, bins=bins, block=block, capacity=room,
        )  # fmt: skip
        expected = reference.align(ends, inverse, block)
        for grid in (1, 3):
            guarded.run(memory, [Launch(lib, "moecore_align", grid, (args,), shared=4 * (bins + 32))])
            assert all(torch.equal(a, b) for a, b in zip((order, owner, places), expected, strict=True))


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
    inverse = memory.input(torch.tensor([0, 41, 39, 7, 1000, 40], dtype=torch.int32))
    order, owner = memory.output((16,), torch.int32), memory.output((2,), torch.int32)
    args = AlignArgs(
        ends=ends, inverse=inverse, order=order, owner=owner, places=memory.output((1,), torch.int32), pairs=6, bins=2,
        block=8, capacity=16,
    )  # fmt: skip
    guarded.run(memory, [Launch(library("align.cu"), "moecore_align", 1, (args,), shared=4 * 34)], (0,))
    assert order[0] == 0
    assert order[7] == 3
    assert owner.tolist() == [0, 0]
