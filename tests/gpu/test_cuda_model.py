"""Whole models on a GPU: the same tokens at every budget, memory inside it, captured steps, rows from disk."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import moecore  # noqa: E402
from moecore import _core  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = Path(__file__).parents[1] / "data/tiny-moe"

reason = _core.cuda_available()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no GPU: {reason}")

#: Rows and lengths of prompts.
PROMPTS = [(batch, tokens) for tokens in (1, 37, 700) for batch in (1, 4)]


def prompts() -> list[Any]:
    """The same random tokens for everybody."""
    torch.manual_seed(0)
    return [torch.randint(5, 1000, shape, device="cuda") for shape in PROMPTS]


def generate(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    """Greedy ids."""
    mask = torch.ones_like(inputs)
    return model.generate(
        inputs, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False, **options
    ).tolist()


@pytest.fixture(scope="module")
def resident() -> list[list[list[int]]]:
    """What transformers' own grouped products generate, everything resident."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).cuda()
    return [generate(model, one) for one in prompts()]


@pytest.fixture
def load() -> Iterator[Any]:
    """Loads the tiny model; closes it at the end."""
    models = []

    def load(budget: Any, **options: Any) -> Any:
        models.append(moecore.load(TINY, expert_memory=budget, device="cuda", dtype=torch.bfloat16, **options))
        return models[-1]

    yield load
    for model in models:
        model.moecore.close()


@pytest.mark.parametrize("budget", ["6%", "12%", "25%", "50%", "100%"])
def test_the_same_tokens_at_every_budget(budget: str, load: Any, resident: list[list[list[int]]]) -> None:
    model = load(budget)
    assert [generate(model, one) for one in prompts()] == resident
    stats = model.moecore.stats()
    assert stats.decode.lookups
    assert bool(stats.decode.misses) == bool(stats.decode.stall_ns)
    assert stats.resident <= stats.slots


def test_rows_below_may_be_fewer_than_experts(load: Any, resident: list[list[list[int]]]) -> None:
    model = load("25%", host_memory="30%")
    assert "are on disk" in model.moecore.report()
    assert [generate(model, one) for one in prompts()[:4]] == resident[:4]


def test_wrap_and_unwrap(resident: list[list[list[int]]]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).cuda()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generate(model, prompts()[0])  # the workspace of torch's products stays
    held = torch.cuda.memory_allocated()
    moecore.wrap(model, expert_memory="25%")
    gc.collect()
    assert torch.cuda.memory_allocated() < held
    assert [generate(model, one) for one in prompts()] == resident
    moecore.unwrap(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_routers_choice_and_its_fetch_are_one_launch(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the experts in a decode step finds the slots that its router's launch has found."""
    model = load("50%")
    backend, found = model.moecore.backend, []
    real = backend._routed_slots

    def routed_slots(*args: Any) -> Any:
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(backend, "_routed_slots", routed_slots)
    generate(model, prompts()[0])
    assert len(found) == 16 * len(model.moecore.taken)
    assert all(slots is not None for slots in found)


def test_slots_stay_inside_the_budget(load: Any) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load(2**20)
    base = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    assert torch.cuda.memory_allocated() - before <= 1.05 * (base + 2**20) + 2**16
    assert model.moecore.stats().slots == 2**20 // model.moecore.stats().slot_bytes


@pytest.mark.parametrize("budget", ["12%", "50%", "100%"])
def test_a_prefill_before_anything_else_fills_the_cache_with_the_right_bytes(
    budget: str, load: Any, resident: list[list[list[int]]]
) -> None:
    model = load(budget)
    assert generate(model, prompts()[4]) == resident[4]
    assert generate(model, prompts()[2]) == resident[2]


# Inductor itself uses what torch has deprecated, has advice about TF32, and begins with a graph of nothing.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32", "ignore:The CUDA Graph is empty")
def test_a_compiled_step_gives_the_same_tokens(load: Any, resident: list[list[list[int]]]) -> None:
    model = load("50%")
    assert generate(model, prompts()[2], cache_implementation="static") == resident[2]


def test_one_layer_in_a_graph_with_changing_hits_and_misses(load: Any) -> None:
    model = load("12%")
    block = model.model.layers[2].mlp
    torch.manual_seed(1)
    inputs = [torch.randn(1, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(40)]
    with torch.no_grad():
        want = [block(one).clone() for one in inputs]
        place = torch.zeros_like(inputs[0])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            block(place)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(place)
        model.moecore.reset_stats()
        for one, expected in zip(inputs, want, strict=True):
            place.copy_(one)
            graph.replay()
            assert torch.equal(out, expected)
        # Another layer's experts push this one's out between two replays.
        for layer in model.model.layers:
            layer.mlp(inputs[0])
        place.copy_(inputs[5])
        graph.replay()
        assert torch.equal(out, want[5])
    stats = model.moecore.stats().decode
    assert stats.hits
    assert stats.misses


def test_a_long_call_cannot_be_captured_and_says_so(load: Any) -> None:
    model = load("25%")
    block = model.model.layers[0].mlp
    place = torch.zeros(1, 64, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        block(place)
        torch.cuda.synchronize()
        with pytest.raises(moecore.DeviceError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            block(place)


def test_two_models_and_two_streams(load: Any, resident: list[list[list[int]]]) -> None:
    first, second = load("25%"), load("12%")
    side = torch.cuda.Stream()
    for _ in range(3):
        assert generate(first, prompts()[2]) == resident[2]
        with torch.cuda.stream(side):
            assert generate(second, prompts()[3]) == resident[3]
            assert generate(first, prompts()[3]) == resident[3]


def test_loading_and_closing_again_and_again_keeps_nothing(load: Any) -> None:
    for _ in range(20):
        moecore.load(TINY, expert_memory="25%", device="cuda").moecore.close()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(20):
        moecore.load(TINY, expert_memory="25%", device="cuda").moecore.close()
    gc.collect()
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 2**23


def test_after_close_a_call_is_an_error(load: Any) -> None:
    model = load("25%")
    model.moecore.close()
    with pytest.raises(moecore.MoecoreError, match="closed"):
        generate(model, prompts()[0])
