"""align: its specification against another way to say it, its checks, its fake form, its launch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecore import ops
from moecore.ops import launch


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 20), st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**31))
def test_blocks_have_one_bin_and_every_pair_once(experts: int, tokens: int, k: int, block: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = min(k, experts)
    ids = torch.rand(tokens, experts).argsort(1)[:, :k].int().contiguous()
    ids[torch.rand(tokens, k) < 0.2] = experts  # transformers' nobody
    ends, _, inverse = ops.index(ids, experts)
    order, owner, places = ops.align(ends, inverse, block)
    pairs = tokens * k
    real = order[order < pairs].long()
    assert sorted(real.tolist()) == (ids.flatten() < experts).nonzero().flatten().tolist()
    assert (order <= pairs).all()
    assert order.numel() == owner.numel() * block
    counts = ids.flatten()[real].long().bincount(minlength=experts)[:experts]
    assert int(places) == int(((counts + block - 1) // block).sum()) * block
    for number, bin_ in enumerate(owner.tolist()):
        inside = order[number * block : (number + 1) * block]
        members = inside[inside < pairs].long()
        assert (ids.flatten()[members] == bin_).all()
        assert (bin_ < 0) == (number * block >= int(places))
        assert bin_ < 0 or members.numel() > 0
    # Inside a bin the pairs keep the order of their rows.
    assert inverse.flatten()[real].tolist() == sorted(inverse.flatten()[real].tolist())


def test_bad_arguments() -> None:
    ends, inverse = torch.zeros(4, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="block: 0, must be from 1 to 1024"):
        ops.align(ends, inverse, 0)
    with pytest.raises(TypeError, match="ends: dtype int64"):
        ops.align(ends.long(), inverse, 16)
    with pytest.raises(ValueError, match=r"inverse: .*\[T, k\]"):
        ops.align(ends, inverse.flatten(), 16)
    with pytest.raises(ValueError, match="ends: 0 bins"):
        ops.align(ends[:0], inverse, 16)


def test_compiles_and_has_a_fake_form() -> None:
    ends, _, inverse = ops.index(torch.tensor([[1, 0], [2, 1]], dtype=torch.int32), 4)
    torch.library.opcheck(torch.ops.moecore.align.default, (ends, inverse, 16))
    compiled = torch.compile(lambda a, b: ops.align(a, b, 16), backend="aot_eager", fullgraph=True)
    for one, want in zip(compiled(ends, inverse), ops.align(ends, inverse, 16), strict=True):
        assert torch.equal(one, want)


def test_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(launch._core, "routing_align", lambda *args: calls.append(args), raising=False)
    monkeypatch.setattr(launch, "_stream", lambda device: 77)
    ends, inverse = torch.zeros(4, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    order, owner, places = launch.align(ends, inverse, 16)
    assert calls == [
        (
            -1,
            ends.data_ptr(),
            inverse.data_ptr(),
            order.data_ptr(),
            owner.data_ptr(),
            places.data_ptr(),
            6,
            4,
            16,
            64,
            77,
        )
    ]
    assert (order.shape, owner.shape, places.shape) == ((64,), (4,), (1,))
    assert launch.align(ends, inverse[:0], 16)[2].tolist() == [0]
    assert len(calls) == 1
