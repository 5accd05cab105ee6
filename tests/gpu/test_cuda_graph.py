"""A layer captured in a CUDA graph: replays with other experts, of which some, all or none are resident."""

from __future__ import annotations

from typing import TYPE_CHECKING

import need  # noqa: F401
import pytest
import torch
from engine_rig import Rig, stream
from moecore.errors import DeviceError
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

HIDDEN, BETWEEN, EXPERTS, TOP_K = 256, 128, 32, 4
ROW = 3 * HIDDEN * BETWEEN * 2


class Layer:
    """Static tensors of a call, and its launches."""

    def __init__(self, rig: Rig, tokens: int) -> None:
        self.rig, self.tokens = rig, tokens
        self.ids = torch.zeros(tokens, TOP_K, dtype=torch.int64, device="cuda")
        self.slots = torch.zeros(tokens, TOP_K, dtype=torch.int32, device="cuda")
        self.x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.weights = torch.zeros(tokens, TOP_K, device="cuda")
        self.h = torch.zeros(tokens * TOP_K, BETWEEN, dtype=torch.bfloat16, device="cuda")
        self.out = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")

    def launch(self, layer: int = 0) -> None:
        """acquire, up, down."""
        engine, slots = self.rig.engine, self.slots.data_ptr()
        engine.acquire(layer, self.ids.data_ptr(), self.ids.numel(), slots, 0, stream())
        engine.expert_up(
            "bfloat16", 0, self.x.data_ptr(), slots, self.h.data_ptr(), self.tokens, TOP_K, HIDDEN, BETWEEN, 0, stream()
        )
        engine.expert_down(
            "bfloat16", 4 * HIDDEN * BETWEEN, self.h.data_ptr(), slots, self.weights.data_ptr(), True,
            self.out.data_ptr(), self.tokens, TOP_K, BETWEEN, HIDDEN, stream(),
        )  # fmt: skip

    def set(self, ids: Tensor, x: Tensor, weights: Tensor) -> None:
        """Inputs of the next call."""
        self.ids.copy_(ids)
        self.x.copy_(x)
        self.weights.copy_(weights)

    def captured(self) -> torch.cuda.CUDAGraph:
        """The launches as a graph."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.launch()
        return graph


def random_call(tokens: int, spread: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids out of `spread` neighbours, activations and weights."""
    begin = int(torch.randint(EXPERTS, (1,)))
    rows = [torch.randperm(spread)[:TOP_K] for _ in range(tokens)]
    ids = ((torch.stack(rows) + begin) % EXPERTS).cuda()
    return ids, torch.randn(tokens, HIDDEN, device="cuda").to(torch.bfloat16), torch.rand(tokens, TOP_K, device="cuda")


def small_weights(rig: Rig, seed: int) -> None:
    """Numbers instead of random bytes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for expert in range(EXPERTS):
        weights = torch.randn(ROW // 2, generator=generator).mul_(0.05).to(torch.bfloat16)
        rig.row(expert)[:ROW] = weights.view(torch.uint8).numpy()


@pytest.fixture
def few() -> Iterator[Rig]:
    """A quarter of the experts fit."""
    rig = Rig(layers=1, experts=EXPERTS, row_bytes=ROW, slots=EXPERTS // 4, fill=False)
    small_weights(rig, 5)
    yield rig
    rig.close()


@pytest.fixture
def resident() -> Iterator[Rig]:
    """All fit."""
    rig = Rig(layers=1, experts=EXPERTS, row_bytes=ROW, slots=EXPERTS, fill=False)
    small_weights(rig, 5)
    yield rig
    rig.close()


@pytest.mark.parametrize("tokens", [1, 2])
def test_replays_are_those_of_a_resident_layer(few: Rig, resident: Rig, tokens: int) -> None:
    layer, reference = Layer(few, tokens), Layer(resident, tokens)
    graph = layer.captured()
    assert few.engine.stats()["records"] == 0  # a capture runs nothing
    kinds = set()
    for number in range(300):
        # One token's experts may come from a few neighbours, so that some calls miss nothing and some everything.
        call = random_call(tokens, 4 if tokens == 2 or number % 3 else 12)
        if number % 4 == 1:
            call = (layer.ids.clone(), call[1], call[2])
        resident_now = few.table[call[0].reshape(-1)] >= 0
        kinds.add("all" if resident_now.all() else "some" if resident_now.any() else "none")
        layer.set(*call)
        reference.set(*call)
        graph.replay()
        reference.launch()
        assert torch.equal(layer.out, reference.out), (number, few.engine.error())
    assert kinds == {"all", "some", "none"}
    few.engine.check()


def test_replays_far_ahead_of_the_gpu(few: Rig, resident: Rig) -> None:
    layer, reference = Layer(few, 1), Layer(resident, 1)
    graph = layer.captured()
    outs, wants = [], []
    calls = [random_call(1, 8) for _ in range(400)]
    for call in calls:  # no look at a result in between
        layer.set(*call)
        graph.replay()
        outs.append(layer.out.clone())
    for call in calls:
        reference.set(*call)
        reference.launch()
        wants.append(reference.out.clone())
    assert torch.equal(torch.stack(outs), torch.stack(wants))
    few.engine.check()


def test_many_layers_in_one_graph() -> None:
    rig = Rig(layers=4, experts=16, row_bytes=4096, slots=20)
    truth = rig.truth()
    ids = [torch.zeros(6, dtype=torch.int64, device="cuda") for _ in range(4)]
    slots = [torch.zeros(6, dtype=torch.int32, device="cuda") for _ in range(4)]
    copies = [torch.zeros(6, 4096, dtype=torch.uint8, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(4):
            rig.acquire(number, ids[number], slots[number])
            copies[number].copy_(rig.held(slots[number]))
    for _ in range(200):
        for one in ids:
            one.copy_(torch.randperm(16)[:6])
        graph.replay()
        for number in range(4):
            assert torch.equal(copies[number], truth[number * 16 + ids[number]])
    rig.engine.check()
    rig.close()


def test_a_replay_after_an_error_does_nothing_until_it_is_cleared() -> None:
    rig = Rig(layers=1, experts=EXPERTS, row_bytes=ROW, slots=8, fill=False, fault=(3, "error"))
    small_weights(rig, 5)
    layer = Layer(rig, 1)
    graph = layer.captured()
    for number in range(6):
        layer.set(*random_call(1, 4))
        layer.ids.copy_(torch.arange(4) + number * 4)
        graph.replay()
    torch.cuda.synchronize()
    with pytest.raises(DeviceError, match="the shard is gone"):
        rig.engine.check()
    assert rig.engine.stats()["records"] == 3
    rig.engine.clear_error()
    truth = rig.truth()
    for number in range(6):
        layer.ids.copy_(torch.arange(4) + number * 4)
        graph.replay()
        assert torch.equal(rig.held(layer.slots), truth[layer.ids.reshape(-1)])
    rig.engine.check()
    rig.close()
