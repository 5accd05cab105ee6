"""Routers that fetch what they choose. A CPU has nothing to fetch ahead: the choice and its way are tested."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import torch
from moecore.runtime import ahead, routers

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = Path(__file__).parents[1] / "data/tiny-moe"
PROMPT = torch.arange(5, 25)[None]


@pytest.fixture(autouse=True)
def _gate_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU calls stay with the model's own routers; here the gate's specification answers them."""
    monkeypatch.setattr(routers, "DEVICES", {"cpu"})


@pytest.fixture
def model() -> Iterator[Any]:
    loaded = moecore.load(TINY, expert_memory="25%", device="cpu")
    handle = loaded.moecore
    yield loaded
    handle.close()


def generate(model: Any, **options: Any) -> list[list[int]]:
    ids: list[list[int]] = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=6, do_sample=False, **options
    ).tolist()
    return ids


@pytest.fixture
def asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Layer and tokens of every question to the backend."""
    calls: list[tuple[int, int]] = []

    def route(layer: int, taken: Any, logits: torch.Tensor, gating: Any) -> None:
        assert taken is model.moecore.taken[layer]
        calls.append((layer, logits.shape[0]))

    monkeypatch.setattr(model.moecore.backend, "route", route)
    return calls


def test_every_router_asks_for_its_own_layer(model: Any, asked: list[tuple[int, int]]) -> None:
    before = generate(model)
    assert not asked
    done = ahead.lead(model, model.moecore.taken)
    layers = len(model.moecore.taken)
    assert len(done) == layers
    assert generate(model) == before
    assert asked[:layers] == [(layer, PROMPT.shape[1]) for layer in range(layers)]
    assert asked[layers : 2 * layers] == [(layer, 1) for layer in range(layers)]
    routers.restore(model, done)
    asked.clear()
    assert generate(model) == before
    assert not asked


@torch.no_grad()
def test_a_compiled_step_has_no_break(model: Any, asked: list[tuple[int, int]]) -> None:
    ahead.lead(model, model.moecore.taken)
    before = model(PROMPT, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    asked.clear()
    torch.testing.assert_close(compiled(PROMPT, use_cache=False).logits, before)
    assert [layer for layer, _ in asked] == list(range(len(model.moecore.taken)))


def test_a_chooser_outlives_its_model(model: Any) -> None:
    ahead.lead(model, model.moecore.taken)
    chooser = vars(model.get_submodule(routers.replaced(model)[0]))["_moecore_chooser"]
    arguments = {"k": 2, "bias": None, "weights_dtype": torch.float32, "ids_dtype": torch.int64, "scoring": "softmax"}
    logits = torch.randn(3, model.config.num_experts)
    for _ in range(2):
        weights, ids = chooser(logits, arguments)
        assert torch.equal(ids, logits.topk(2).indices)
        assert weights.shape == (3, 2)
        if hasattr(model, "moecore"):
            moecore.unwrap(model)


def test_a_hooked_router_and_other_devices_ask_nobody(
    model: Any, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook may change the ids after the fetch has begun."""
    done = ahead.lead(model, model.moecore.taken)
    hook = model.get_submodule(done[0]).register_forward_hook(lambda module, args, output: None)
    generate(model)
    assert {layer for layer, _ in asked} == set(range(1, len(done)))
    hook.remove()
    asked.clear()
    monkeypatch.setattr(routers, "DEVICES", {"cuda"})
    generate(model)
    assert not asked


def test_a_hooked_experts_module_forgets(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead.lead(model, model.moecore.taken)
    forgotten: list[bool] = []
    monkeypatch.setattr(model.moecore.backend, "forget", lambda: forgotten.append(True))
    with torch.no_grad():
        model(PROMPT)
        assert not forgotten
        model.moecore.taken[1].module.register_forward_pre_hook(lambda module, args: None)
        model(PROMPT)
    assert forgotten == [True]
