"""Routers that fetch what they choose. A CPU has nothing to fetch ahead: the choice and its way are tested."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import torch
from moecore.errors import ConfigError
from moecore.runtime import ahead, routers

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = Path(__file__).parents[1] / "data/tiny-moe"
PROMPT = torch.arange(5, 25)[None]


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


def test_a_graph_outlives_its_model(model: Any) -> None:
    ahead.lead(model, model.moecore.taken)
    chooser = vars(model.get_submodule(routers.replaced(model)[0]))["_moecore_chooser"]
    arguments = {"k": 2, "bias": None, "weights_dtype": torch.float32, "ids_dtype": torch.int64, "scoring": "softmax"}
    logits = torch.randn(3, model.config.num_experts)
    weights, ids = chooser(logits, arguments)
    assert torch.equal(ids, logits.topk(2).indices)
    assert weights.shape == (3, 2)
    moecore.unwrap(model)
    with pytest.raises(ConfigError, match="gone or unwrapped"):
        chooser(logits, arguments)
