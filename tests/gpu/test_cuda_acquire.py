"""acquire: whatever is resident, whoever leaves, whatever fails, a slot holds the bytes of its expert."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import need  # noqa: F401
import pytest
import torch
from engine_rig import Rig, stream
from moecore.errors import DeviceError

#: Cycles of about a millisecond, in which the host runs far ahead of the GPU.
LONG = 2_000_000
Rigs = Callable[..., Rig]


@pytest.fixture
def rigs() -> Iterator[Rigs]:
    """Makes rigs that are closed at the end."""
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(**options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def random_ids(generator: torch.Generator, experts: int, pairs: int) -> torch.Tensor:
    """Experts, duplicates, and numbers that are nobody's."""
    kind = int(torch.randint(3, (1,), generator=generator))
    if kind == 0:
        return torch.randint(-2, experts + 2, (pairs,), generator=generator)
    if kind == 1:
        return torch.randperm(experts, generator=generator)[:pairs]
    return torch.randint(experts, (1,), generator=generator).expand(pairs).clone()


def wrong(rig: Rig, truth: torch.Tensor, layer: int, ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """How many pairs are not served, on the GPU: nothing is waited for."""
    real = (ids >= 0) & (ids < rig.experts)
    held = rig.arena[slots.long().clamp(min=0), : rig.row_bytes]
    want = truth[layer * rig.experts + ids.clamp(0, rig.experts - 1)]
    good = torch.where(real, (slots >= 0) & (held == want).all(1), slots == -1)
    return (~good).sum()


def heard(rig: Rig, calls: int) -> dict[str, Any]:
    """Counters, once the answering thread has heard of so many calls."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stats: dict[str, Any] = rig.engine.stats()
        if stats["records"] + stats["dropped"] == calls:
            return stats
        time.sleep(0.001)
    raise AssertionError(f"{stats} after {calls} calls")


@pytest.mark.parametrize("row_bytes", [16, 4096, 48 * 1024 + 16])
@pytest.mark.parametrize("retires", [False, True])
def test_thousands_of_random_calls(rigs: Rigs, row_bytes: int, retires: bool) -> None:
    rig = rigs(layers=3, experts=16, row_bytes=row_bytes, slots=10, retires=retires)
    truth, generator = rig.truth(), torch.Generator().manual_seed(row_bytes)
    mistakes = torch.zeros((), dtype=torch.int64, device="cuda")
    for call in range(2000):
        ids = random_ids(generator, 16, 1 + call % 8).cuda()
        before = rig.counts.sum() if call % 7 == 0 else None
        mistakes += wrong(rig, truth, call % 3, ids, rig.acquire(call % 3, ids))
        if before is not None:
            assert int(rig.counts.sum() - before) == int(((ids >= 0) & (ids < 16)).sum())
        if call % 50 == 49:
            # Whoever is told to forget an expert finds its slot poisoned, and brings it anew.
            resident = torch.nonzero(rig.table >= 0).reshape(-1)
            rig.arena[rig.table[resident[0]].long()] = 0xEE
            rig.engine.update_table([(int(resident[0]), None)], stream())
    assert rig.engine.error() is None
    assert int(mistakes) == 0
    stats = heard(rig, 2000)
    assert 0 < stats["waits"] < 2000


def test_every_slot_is_named_once(rigs: Rigs) -> None:
    rig = rigs(layers=2, experts=32, row_bytes=1024, slots=12)
    generator = torch.Generator().manual_seed(3)
    for call in range(500):
        rig.acquire(call % 2, random_ids(generator, 32, 8).cuda())
        named = rig.table[rig.table >= 0]
        assert named.unique().numel() == named.numel() <= 12


def test_a_slot_is_not_overwritten_under_a_reader(rigs: Rigs) -> None:
    rig = rigs(layers=1, experts=64, row_bytes=256 * 1024, slots=8)
    truth = rig.truth()
    mistakes = torch.zeros((), dtype=torch.int64, device="cuda")
    for call in range(40):
        ids = torch.arange(call * 8, call * 8 + 8, device="cuda") % 64
        slots = rig.acquire(0, ids)
        torch.cuda._sleep(LONG // 4)
        mistakes += wrong(rig, truth, 0, ids, slots)
    assert int(mistakes) == 0


def test_streams_take_turns(rigs: Rigs) -> None:
    rig = rigs(layers=1, experts=64, row_bytes=256 * 1024, slots=8)
    truth, streams = rig.truth(), [torch.cuda.Stream() for _ in range(3)]
    ids = [torch.arange(call * 8, call * 8 + 8, device="cuda") % 64 for call in range(30)]
    torch.cuda.synchronize()
    mistakes = []
    for call in range(30):
        with torch.cuda.stream(streams[call % 3]):
            slots = rig.acquire(0, ids[call])
            torch.cuda._sleep(LONG // 4)
            mistakes.append(wrong(rig, truth, 0, ids[call], slots))
    torch.cuda.synchronize()
    assert sum(map(int, mistakes)) == 0


def test_without_order_readers_would_see_other_rows(rigs: Rigs) -> None:
    """That the two tests above can fail: the same, but the table is changed behind the readers' backs."""
    rig = rigs(layers=1, experts=64, row_bytes=256 * 1024, slots=8)
    truth, aside = rig.truth(), torch.cuda.Stream()
    ids = torch.arange(8, device="cuda")
    slots = rig.acquire(0, ids)
    torch.cuda.synchronize()
    late = torch.cuda.Event()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(50 * LONG)  # a slow host is not done before with all that follows
        mistakes = wrong(rig, truth, 0, ids, slots)
        late.record()
    rig.acquire(0, ids + 8)  # the engine knows of no reader in `aside`
    late.synchronize()
    assert int(mistakes) == 8


def test_as_many_pairs_as_there_may_be(rigs: Rigs) -> None:
    rig = rigs(layers=1, experts=1024, row_bytes=512, slots=1024)
    truth = rig.truth()
    ids = torch.randperm(1024).cuda()
    for part in (ids[:13], ids[:200], ids):  # an answer that holds its orders, one with a list, one with a long list
        assert int(wrong(rig, truth, 0, part, rig.acquire(0, part))) == 0
    assert rig.engine.stats()["fetched"] == 1024
    with pytest.raises(DeviceError, match="too many"):
        rig.acquire(0, torch.zeros(1025, dtype=torch.int64, device="cuda"))


def test_more_experts_than_slots_is_an_error(rigs: Rigs) -> None:
    rig = rigs(layers=1, experts=16, row_bytes=4096, slots=4)
    slots = rig.acquire(0, torch.arange(5, device="cuda"))
    assert slots.tolist() == [0] * 5  # defined memory
    with pytest.raises(DeviceError, match="fewer slots than one call needs"):
        rig.acquire(0, torch.arange(3, device="cuda"))
    rig.engine.clear_error()
    ids = torch.arange(3, device="cuda")
    assert int(wrong(rig, rig.truth(), 0, ids, rig.acquire(0, ids))) == 0


def test_experts_that_are_there_already_are_not_copied(rigs: Rigs) -> None:
    rig = rigs(layers=1, experts=16, row_bytes=4096, slots=8, prefetched=[(3, 5), (4, 0)])
    ids = torch.tensor([3, 9, 4], device="cuda")
    slots = rig.acquire(0, ids)
    assert int(wrong(rig, rig.truth(), 0, ids, slots)) == 0
    assert slots.tolist()[::2] == [5, 0]
    stats = rig.engine.stats()
    assert (stats["fetched"], stats["installed"]) == (1, 2)


def calls_go_well(rig: Rig, calls: int = 100) -> None:
    truth, generator = rig.truth(), torch.Generator().manual_seed(7)
    for call in range(calls):
        ids = random_ids(generator, rig.experts, 6).cuda()
        layer = call % rig.layers
        assert int(wrong(rig, truth, layer, ids, rig.acquire(layer, ids))) == 0
    rig.engine.check()


@pytest.mark.parametrize(("kind", "message"), [("error", "the shard is gone"), ("forget", "without a slot")])
def test_after_an_error_the_engine_can_go_on(rigs: Rigs, kind: str, message: str) -> None:
    rig = rigs(layers=2, experts=16, row_bytes=8192, slots=8, fault=(6, kind))
    for call in range(5):
        rig.acquire(0, torch.arange(call, call + 4, device="cuda"))
    torch.cuda.synchronize()
    rig.engine.check()
    slots = rig.acquire(1, torch.arange(6, device="cuda"))
    after = []
    for _ in range(3):  # enqueued before anybody knows
        try:
            after.append(rig.acquire(0, torch.arange(8, 14, device="cuda")))
        except DeviceError:
            break
    torch.cuda.synchronize()
    assert slots.tolist() == [0] * 6
    assert all(later.tolist() == [0] * 6 for later in after)
    for _ in range(2):
        with pytest.raises(DeviceError, match=message):
            rig.acquire(0, torch.arange(4, device="cuda"))
    rig.engine.clear_error()
    rig.engine.check()
    assert int((rig.table >= 0).sum()) == 0
    calls_go_well(rig)


def test_an_answer_that_does_not_come(rigs: Rigs) -> None:
    rig = rigs(layers=1, experts=16, row_bytes=8192, slots=8, delay=0.5)
    rig.engine.set_patience(0.05)
    slots = rig.acquire(0, torch.arange(4, device="cuda"))
    torch.cuda.synchronize()
    assert slots.tolist() == [0] * 4
    with pytest.raises(DeviceError, match="waited too long"):
        rig.acquire(0, torch.arange(4, device="cuda"))
    rig.engine.set_patience(30.0)
    rig.engine.clear_error()
    # The answer to the call that was given up is still to come; it must not be taken for this one's.
    ids = torch.arange(8, 12, device="cuda")
    assert int(wrong(rig, rig.truth(), 0, ids, rig.acquire(0, ids))) == 0
    calls_go_well(rig, 5)


def test_a_scheduler_that_panics_ends_the_engine(rigs: Rigs, capfd: pytest.CaptureFixture[str]) -> None:
    rig = rigs(layers=1, experts=16, row_bytes=4096, slots=8, fault=(2, "panic"))
    rig.acquire(0, torch.arange(4, device="cuda"))
    assert rig.acquire(0, torch.arange(4, 8, device="cuda")).tolist() == [0] * 4
    with pytest.raises(DeviceError, match="broke down: asked to"):
        rig.acquire(0, torch.arange(4, device="cuda"))
    with pytest.raises(DeviceError, match="broke down"):
        rig.engine.clear_error()
    assert "asked to" in capfd.readouterr().err


def test_close_while_a_call_waits(rigs: Rigs) -> None:
    rig = rigs(layers=1, experts=16, row_bytes=4096, slots=8, delay=0.3)
    rig.acquire(0, torch.arange(4, device="cuda"))
    rig.close()
    torch.cuda.synchronize()
    with pytest.raises(DeviceError, match="closed"):
        rig.acquire(0, torch.arange(4, device="cuda"))
    with pytest.raises(DeviceError, match="closed"):
        rig.engine.clear_error()
    rig.close()


def test_two_engines_at_once(rigs: Rigs) -> None:
    pair = [rigs(layers=1, experts=32, row_bytes=64 * 1024, slots=8, seed=seed) for seed in (1, 2)]
    truths, streams = [rig.truth() for rig in pair], [torch.cuda.Stream() for _ in pair]
    ids = [torch.randint(32, (6,)).cuda() for _ in range(200)]
    torch.cuda.synchronize()
    mistakes = []
    for call in range(200):
        for rig, truth, aside in zip(pair, truths, streams, strict=True):
            with torch.cuda.stream(aside):
                mistakes.append(wrong(rig, truth, 0, ids[call], rig.acquire(0, ids[call])))
    torch.cuda.synchronize()
    assert sum(map(int, mistakes)) == 0
    assert [rig.engine.error() for rig in pair] == [None, None]


def test_many_engines_come_and_go() -> None:
    ids = torch.arange(4, device="cuda")
    for _ in range(30):
        rig = Rig(layers=1, experts=8, row_bytes=4096, slots=4)
        rig.acquire(0, ids)
        rig.close()


def test_a_forked_child_is_told(rigs: Rigs) -> None:
    rig = rigs(layers=1, experts=8, row_bytes=4096, slots=8)
    address = torch.arange(4, device="cuda").data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the point of the test
        child = os.fork()
    if child == 0:
        try:
            rig.engine.acquire(0, address, 4, address, 0, 0)
        except DeviceError as error:
            os._exit(0 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    calls_go_well(rig, 5)


def test_launches_are_checked(rigs: Rigs) -> None:
    rig = rigs(layers=1, experts=8, row_bytes=4096, slots=8)
    with pytest.raises(DeviceError, match="no layer 1"):
        rig.acquire(1, torch.arange(4, device="cuda"))
    for expert, slot in ((8, 0), (0, 8)):
        with pytest.raises(DeviceError, match="no place in the table"):
            rig.engine.update_table([(expert, slot)], stream())
    rig.acquire(0, torch.zeros(0, dtype=torch.int64, device="cuda"))
    rig.engine.check()
