"""Routers that fetch what they choose. A CPU has nothing to fetch ahead: the choice and its way are tested."""

from __future__ import annotations

import threading
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import torch
from moecore.errors import MoecoreError
from moecore.runtime import ahead, cuda, routers

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


@torch.no_grad()
def test_a_router_whose_experts_are_closed_meanwhile(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread closes between the look at the handle and the launch; then nothing of the backend is there."""
    ahead.lead(model, model.moecore.taken)
    handle = model.moecore

    def route(*_: Any) -> None:
        handle.close()
        raise AttributeError("'HostBackend' object has no attribute 'engine'")

    monkeypatch.setattr(handle.backend, "route", route)
    with pytest.raises(MoecoreError, match="were closed; load or wrap the model again"):
        model(PROMPT)


@torch.no_grad()
def test_an_error_of_an_open_backend_stays_as_it_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead.lead(model, model.moecore.taken)

    def route(*_: Any) -> None:
        raise AttributeError("a defect")

    monkeypatch.setattr(model.moecore.backend, "route", route)
    with pytest.raises(AttributeError, match="a defect"):
        model(PROMPT)


def test_a_gpu_is_closed_between_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the middle of one, whose tensors would go under its launches. No GPU: the parts that wait are real."""
    backend = object.__new__(cuda.CudaBackend)
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: order.append("synchronized"))
    running, go_on = threading.Event(), threading.Event()

    def run(*_: Any) -> torch.Tensor:
        running.set()
        assert go_on.wait(10)
        order.append("launched")
        return PROMPT

    backend.device, backend._views, backend._lock = PROMPT.device, {}, threading.RLock()
    backend.core = types.SimpleNamespace(close=lambda: order.append("closed"))  # type: ignore[assignment]
    monkeypatch.setattr(backend, "_run", run)
    nothing: Any = None
    call = threading.Thread(target=backend.run, args=(0, nothing, PROMPT, nothing, nothing))
    close = threading.Thread(target=backend.close)
    call.start()
    assert running.wait(10)
    close.start()
    close.join(0.2)
    go_on.set()
    for thread in (call, close):
        thread.join(10)
    assert order == ["launched", "synchronized", "closed"]


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
