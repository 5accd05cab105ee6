"""Fused models in the hands of others: adapters, wrappers, exports, hooks, pickles of parts."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import tiny
import torch
from fusing import build, experts_of
from moecore.runtime import families, resident, routers
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.arange(3, 43)[None]


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go where they go on a GPU."""
    monkeypatch.setattr(routers, "DEVICES", {"cpu"})
    monkeypatch.setattr(resident, "ready", lambda: True)
    real = resident.usable

    class There:
        is_cuda = True

        def __init__(self, hidden: torch.Tensor) -> None:
            self.requires_grad = hidden.requires_grad

    monkeypatch.setattr(resident, "usable", lambda module, hidden, weights: real(module, There(hidden), weights))


@torch.no_grad()
def test_a_subclass_may_repeat_experts_as_its_class_does() -> None:
    """`fully_shard`, and parametrisations, put a class of their own in a module's place."""
    model = build("deepseek_v4", torch.bfloat16)
    stock = model(IDS).logits
    moecore.fuse(model)
    for taken in families.find(model):
        cls = type(taken.module)
        taken.module.__class__ = type(f"FSDP{cls.__name__}", (cls,), {})
    assert torch.equal(model(IDS).logits, stock)


class Adapter(torch.nn.Module):
    """A sum of low rank, as adapters train it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(*weight.shape[:2], 2))
        self.b = torch.nn.Parameter(torch.zeros(weight.shape[0], 2, weight.shape[2]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.a @ self.b


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_experts_with_an_adapter_that_wants_gradients_run_as_before(name: str) -> None:
    model = moecore.fuse(build("olmoe").requires_grad_(False))
    module = experts_of(model)
    parametrize.register_parametrization(module, name, Adapter(getattr(module, name)))
    model(IDS[:, :7]).logits.sum().backward()
    assert module.parametrizations[name][0].a.grad is not None


def test_a_norm_behind_the_experts_that_wants_gradients_runs_as_before() -> None:
    model = moecore.fuse(build("muse_spark_text", torch.bfloat16).requires_grad_(False))
    norm = experts_of(model).post_expert_norm.requires_grad_(True)
    model(IDS)[0].sum().backward()
    assert norm.weight.grad is not None


@torch.no_grad()
def test_experts_are_called_by_keyword() -> None:
    module = experts_of(moecore.fuse(build("olmoe")))
    hidden, index, weights = torch.randn(4, module.gate_up_proj.shape[2]), torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
    out = module(hidden_states=hidden, top_k_index=index, top_k_weights=weights)
    assert torch.equal(out, module(hidden, index, weights))


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, use_cache=False).logits
        return logits


@torch.no_grad()
@pytest.mark.parametrize("strict", [True, False])
def test_a_fused_model_is_exported_for_any_number_of_tokens(strict: bool) -> None:
    if not strict and tiny.VERSION < (5, 23):
        pytest.skip(f"transformers {tiny.transformers.__version__} cannot export its own model so")
    model = Logits(moecore.fuse(build("olmoe", torch.bfloat16)))
    with tiny.quiet():
        program = torch.export.export(
            model, (IDS,), dynamic_shapes={"ids": {1: torch.export.Dim("tokens")}}, strict=strict
        )
        called = {str(node.target) for node in program.graph.nodes}
        assert {"moecore.gate.default", "moecore.index.default", "moecore.combine.default"} <= called
        short = program.module()(IDS[:, :7])
    assert short.shape[1] == 7


@torch.no_grad()
def test_what_wraps_a_fused_model_is_given_back() -> None:
    model = moecore.fuse(build("olmoe"))
    compiled = torch.compile(model, backend="eager")
    moecore.unfuse(compiled)
    assert routers.replaced(model) == []
    assert model.config._experts_implementation != families.NAME
    assert not hasattr(compiled, "moecore_fused")


class Wrapper(torch.nn.Module):
    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args: Any) -> Any:
        return self.base_layer(*args)


@torch.no_grad()
def test_routers_that_were_moved_in_the_model_are_given_back() -> None:
    model = build("olmoe")
    before = model(IDS).logits
    moecore.fuse(model)
    for layer in model.model.layers:
        layer.mlp.gate = Wrapper(layer.mlp.gate)
    moecore.unfuse(model)
    assert routers.replaced(model) == []
    assert not any("moecore" in key for module in model.modules() for key in vars(module))
    assert torch.equal(model(IDS).logits, before)


def test_the_whole_is_given_back_and_its_part_stays_fused() -> None:
    model = build("olmoe")
    model.set_experts_implementation("eager")
    moecore.fuse(model.model)
    before = resident.own(experts_of(model))
    moecore.unfuse(moecore.fuse(model))
    assert resident.own(experts_of(model)) is before, "what its part ran by"
    moecore.unfuse(model.model)
    assert routers.replaced(model) == []
    assert model.config._experts_implementation == "eager"


@torch.no_grad()
def test_hooks_of_accelerate_come_and_go() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="its hooks replace forwards")
    model = build("olmoe")
    before = model(IDS).logits
    moecore.fuse(model)
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.mlp.gate, hooks.ModelHook())
    assert len(moecore.fuse(model).moecore_fused.routers) == 4, "they run by the gate below the hooks"
    moecore.unfuse(model)
    assert torch.equal(model(IDS).logits, before)
    for layer in model.model.layers:
        hooks.remove_hook_from_module(layer.mlp.gate)
    assert routers.replaced(model) == []
    moecore.fuse(model)
    assert sum("_moecore_router" in vars(module) for module in model.modules()) == 4


@pytest.mark.parametrize("name", ["olmoe", "minimax_m2"])
def test_fusing_does_not_ask_for_the_default_device(name: str) -> None:
    model = build(name)
    with torch.device("meta"):
        moecore.fuse(model)
    assert len(model.moecore_fused.routers) == 4


@torch.no_grad()
def test_a_model_that_becomes_float64_later() -> None:
    model = build("granitemoe")
    model.set_experts_implementation("eager")
    moecore.fuse(model).double()
    ours = model(IDS).logits
    assert torch.equal(ours, moecore.unfuse(model)(IDS).logits)


@torch.no_grad()
def test_a_part_of_a_fused_model_is_pickled(tmp_path: Path) -> None:
    model = moecore.fuse(build("olmoe"))
    torch.save(model.model, tmp_path / "part.pt")
    program = "import sys, torch; print(torch.load(sys.argv[1], weights_only=False)(torch.ones(1, 3).long())[0].shape)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", program, str(tmp_path / "part.pt")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ran.stdout.startswith("torch.Size([1, 3,"), ran.stderr[-2000:]


@torch.no_grad()
def test_a_router_whose_weight_is_distributed_later_runs_the_original(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed.tensor", reason="wants torch.distributed")
    model = moecore.fuse(build("olmoe"))
    router = model.model.layers[0].mlp.gate
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        spread = [distributed.distribute_tensor(one, mesh) for one in (router.weight.data, torch.randn(5, 64))]
        router.weight = torch.nn.Parameter(spread[0], requires_grad=False)
        ids = router(spread[1])[2]
        assert isinstance(ids, distributed.DTensor)
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_a_router_that_keeps_the_dimensions_of_its_input(name: str) -> None:
    model = moecore.fuse(build(name))
    router = model.get_submodule(routers.replaced(model)[0])
    hidden = torch.randn(2, 5, router._moecore_router.width)
    ours, stock = router(hidden), type(router).forward(router, hidden)
    assert stock[1].dim() == 3
    assert all(torch.equal(one, other) for one, other in zip(ours, stock, strict=True))


@torch.no_grad()
def test_a_router_with_a_hook_is_not_asked_ahead() -> None:
    """The hook may change the ids."""
    model = moecore.fuse(build("olmoe"))
    router = model.get_submodule(routers.replaced(model)[0])
    hidden = torch.randn(5, router._moecore_router.width)
    stock = router(hidden)

    def ask(*_: Any) -> Any:
        raise RuntimeError("asked")

    routers.lead_to(router, ask)
    hook = router.register_forward_hook(lambda module, args, output: None)
    assert all(torch.equal(one, other) for one, other in zip(router(hidden), stock, strict=True))
    hook.remove()
    with pytest.raises(RuntimeError, match="asked"):
        router(hidden)


def test_who_interrupts_a_fusing_gets_all_routers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("olmoe")
    trials: list[Any] = []

    def differs(*args: Any) -> str:
        trials.append(args)
        if len(trials) == 3:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(routers, "differs", differs)
    with pytest.raises(KeyboardInterrupt):
        moecore.fuse(model)
    assert not any("forward" in vars(module) or "_moecore_router" in vars(module) for module in model.modules())
