"""Models that fit their device: fusing and its way back, the kernels' path through the experts, and who falls back."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import tiny
import torch
from fusing import build, experts_of
from moecore.errors import ConfigError
from moecore.runtime import Fused, families, ops, resident, routers

if TYPE_CHECKING:
    from pathlib import Path

#: Layouts: plain, biased and transposed with a gate of its own, without a gate, with a norm behind.
LAYOUTS = ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "muse_spark_text", "aria_text", "openai_privacy_filter"]
#: Whose few tokens go straight through the matrices.
PLAIN = {"qwen3_moe": "silu", "mixtral": "silu", "gemma4_text": "gelu_tanh", "deepseek_v3": "silu"}


@pytest.fixture(autouse=True)
def _gate_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU calls stay with the model's own routers; here the gate's specification answers them."""
    monkeypatch.setattr(routers, "DEVICES", {"cpu"})


def call_of(module: Any, tokens: int, weights: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Random hidden states, ids and weights."""
    torch.manual_seed(tokens)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    hidden = torch.randn(tokens, up.shape[1 if module.is_transposed else 2], dtype=up.dtype)
    index = torch.stack([torch.randperm(module.num_experts)[:3] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, 3).to(weights)


def names_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ops are called, in order."""
    called: list[str] = []
    for name in ("expert_matvec", "index", "permute", "combine"):
        real = getattr(resident.ops, name)

        def op(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            called.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(resident.ops, name, op)
    return called


@torch.no_grad()
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, resident.MATVEC_TOKENS, resident.MATVEC_TOKENS + 1])
@pytest.mark.parametrize("name", [*LAYOUTS, "gemma4_text", "deepseek_v3"])
def test_the_kernels_path_is_grouped_mm(
    name: str, tokens: int, weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = experts_of(build(name, torch.bfloat16))
    call = call_of(module, tokens, weights)
    called = names_of(monkeypatch)
    out = resident.kernels(module, *call)
    stock = resident.own(module)(module, *call)
    assert out is not None
    assert out.dtype == stock.dtype
    few = name in PLAIN and tokens <= resident.MATVEC_TOKENS
    assert called == (["expert_matvec"] if few else ["index", "permute", "combine"])
    act = resident.activation(module)
    assert (None if act is None else resident.ACTIVATION_NAMES[act]) == PLAIN.get(name)
    if weights == torch.float32 and name != "gemma4_text":
        assert torch.equal(out, stock)
    else:  # their weighted rows are rounded to bfloat16 each, ours once
        torch.testing.assert_close(out, stock, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_ids_of_nobody_are_left_out() -> None:
    """Rows behind the last expert's hold anything: NaN here."""
    for name in ("qwen3_moe", "gpt_oss"):
        module = experts_of(build(name, torch.bfloat16))
        hidden, index, weights = call_of(module, 40)
        some = index.clone()
        some[::3, 1] = module.num_experts
        some[7] = -1
        without = weights.masked_fill(some != index, 0)
        out = resident.kernels(module, hidden, some, weights)
        assert out is not None
        assert torch.equal(out, resident.own(module)(module, hidden, index, without))
        assert not out[7].any()


@torch.no_grad()
def test_what_the_kernels_do_not_serve() -> None:
    whole = experts_of(build("qwen3_moe"))
    assert resident.kernels(whole, *call_of(whole, 40)) is None, "grouped products in float32"
    assert resident.kernels(whole, *call_of(whole, 4)) is not None, "few tokens in float32"
    half = experts_of(build("qwen3_moe", torch.bfloat16))
    hidden, index, weights = call_of(half, 4)
    assert resident.kernels(half, hidden.float(), index, weights) is None, "another dtype"
    wide = torch.arange(33).expand(40, 33)
    assert resident.kernels(half, call_of(half, 40)[0], wide, torch.rand(40, 33)) is None, "too many experts of a token"
    hashed = experts_of(build("deepseek_v4", torch.bfloat16))
    assert resident.kernels(hashed, *call_of(hashed, 40)) is None, "a router that may name an expert twice"
    for tokens in (4, 40):
        x, ids, scores = call_of(half, tokens)
        assert resident.kernels(half, x, ids, scores.double()) is None, "weights of a dtype that no op takes"
        assert resident.kernels(half, x, ids.short(), scores) is None, "ids of a dtype that no op takes"
    half.num_experts += 1
    assert resident.kernels(half, hidden, index, weights) is None, "experts that are not in the matrices"
    half.num_experts -= 1
    half.down_proj.data = half.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert resident.kernels(half, hidden, index, weights) is None, "parameters that are not dense"
    half.down_proj = None
    with pytest.raises(ConfigError, match="not in memory"):
        resident.kernels(half, hidden, index, weights)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [3, 40])
def test_calls_with_gaps(tokens: int) -> None:
    """Hidden states, ids and weights that are parts of larger tensors; and weights that only some of the ops take."""
    module = experts_of(build("qwen3_moe", torch.bfloat16))
    hidden, index, weights = call_of(module, tokens)
    dense = resident.kernels(module, hidden, index, weights)
    gaps = [torch.stack([one, one], dim=-1)[..., 0] for one in (hidden, index, weights)]
    assert not any(one.is_contiguous() for one in gaps)
    assert torch.equal(resident.kernels(module, *gaps), dense)
    torch.testing.assert_close(resident.kernels(module, hidden, index, weights.half()), dense, rtol=0.02, atol=0.02)


def test_widths_of_grouped_products() -> None:
    """Each on its own: where matrices are transposed, half of `up`'s width is a width of `down`'s."""
    for odd in (None, 0, 1, 2, 3):
        a, b, c, d = (24 if place != odd else 12 for place in range(4))
        up, down = torch.empty(4, a, b, dtype=torch.bfloat16), torch.empty(4, c, d, dtype=torch.bfloat16)
        assert resident.can_group(torch.nn.Module(), up, down) is (odd is None)


class OnCuda:
    """Says of itself that it is on a GPU."""

    is_cuda = True

    def __init__(self, requires_grad: bool = False) -> None:
        self.requires_grad = requires_grad


def test_which_calls_go_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts_of(build("qwen3_moe", torch.bfloat16))
    here, weights = torch.zeros(1), torch.zeros(1)
    there: Any = OnCuda()
    monkeypatch.setattr(resident, "ready", lambda: True)
    with torch.no_grad():
        assert resident.usable(module, there, weights)
        assert not resident.usable(module, here, weights)
        assert not resident.usable(module.train(), there, weights)
        module.eval()._is_expert_parallel = True
        assert not resident.usable(module, there, weights)
        module._is_expert_parallel = False
        monkeypatch.setattr(resident, "ready", lambda: False)
        assert not resident.usable(module, there, weights)
        monkeypatch.setattr(resident, "ready", lambda: True)
    assert not resident.usable(module, there, weights), "parameters want gradients"
    module.requires_grad_(False)
    assert resident.usable(module, there, weights)
    wanted: Any = OnCuda(requires_grad=True)
    assert not resident.usable(module, wanted, weights)
    assert not resident.usable(module, there, weights.requires_grad_())


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4", "qwen3_omni_moe_thinker", "step3p5"])
def test_fused_and_back(name: str) -> None:
    model = build(name)
    with tiny.quiet():
        before = tiny.trace(model, name)
    selected = [config._experts_implementation for config in families.configurations(model)]
    assert moecore.fuse(model) is model
    report = model.moecore_fused
    assert isinstance(report, Fused)
    found = families.find(model)
    assert list(report.experts) == [one.name for one in found if one.adapter.served_by_interface]
    assert len(report.routers) == len(found)
    assert str(report).startswith(f"{len(report.experts)} experts modules and {len(found)} routers run by moecore")
    if report.experts:
        assert {config._experts_implementation for config in families.configurations(model)} == {families.NAME}
    else:
        assert set(report.left.values()) == {"transformers does not let others run its experts"}
        assert "left alone: layers.1.mlp.experts and 2 more: transformers does not" in str(report)
    with tiny.quiet():
        after = tiny.trace(model, name)
    for mine, stock in zip(after, before, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-5)
        assert torch.equal(mine.argmax(-1), stock.argmax(-1))
    assert moecore.fuse(model).moecore_fused == report, "a second time is harmless"
    assert moecore.unfuse(model) is model
    moecore.unfuse(model)
    assert [config._experts_implementation for config in families.configurations(model)] == selected
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any("moecore" in key for module in model.modules() for key in vars(module))
    with tiny.quiet():
        assert all(torch.equal(a, b) for a, b in zip(tiny.trace(model, name), before, strict=True))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_the_same_tokens_are_generated(name: str) -> None:
    model = build(name)
    ids = torch.randint(3, 100, (2, 11))
    with tiny.quiet():
        stock = model.generate(ids, max_new_tokens=9, do_sample=False)
        ours = moecore.fuse(model).generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(ours, stock)


@torch.no_grad()
def test_a_fused_model_is_one_graph() -> None:
    model = moecore.fuse(build("qwen3_moe"))
    ids = torch.randint(3, 100, (2, 20))
    with tiny.quiet():
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
    torch.testing.assert_close(compiled, model(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [3, 40])
def test_the_kernels_path_is_one_graph(tokens: int) -> None:
    module = experts_of(build("qwen3_moe", torch.bfloat16))
    call = call_of(module, tokens)
    with tiny.quiet():
        torch._dynamo.reset()
        compiled = torch.compile(lambda *call: resident.kernels(module, *call), fullgraph=True, backend="aot_eager")(
            *call
        )
    assert torch.equal(compiled, resident.kernels(module, *call))


def test_what_is_asked_of_the_machine_is_no_part_of_a_graph() -> None:
    module = torch.nn.Linear(2, 2).eval()

    def ask(x: torch.Tensor) -> torch.Tensor:
        usable = resident.ready() or resident.spread(module) or (torch.is_grad_enabled() and resident.trains(module))
        return x + usable

    torch._dynamo.reset()
    assert torch.equal(torch.compile(ask, fullgraph=True, backend="aot_eager")(torch.zeros(2)), ask(torch.zeros(2)))


def test_training_a_fused_model() -> None:
    model, plain = moecore.fuse(build("qwen3_moe")), build("qwen3_moe")
    ids = torch.randint(3, 100, (2, 20))
    for one in (model, plain):
        one.train()(ids, labels=ids).loss.backward()
    for (name, mine), (_, stock) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert stock.grad is not None, name
        assert torch.equal(mine.grad, stock.grad), name


@torch.no_grad()
def test_copies_and_checkpoints_of_a_fused_model(tmp_path: Path) -> None:
    model = moecore.fuse(build("olmoe"))
    ids = torch.randint(3, 100, (2, 20))
    before = model(ids).logits
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.zero_()
    assert torch.equal(model(ids).logits, before)
    moecore.unfuse(copied)
    assert copied.config._experts_implementation != families.NAME
    assert model.config._experts_implementation == families.NAME
    with tiny.quiet():
        model.save_pretrained(tmp_path)
    assert "moecore" not in (tmp_path / "config.json").read_text()
    with tiny.quiet():
        loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, before, rtol=1e-5, atol=1e-5)


PICKLED = """
import sys, torch
model, ids, before = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(ids).logits, before)
import moecore
from moecore.runtime import routers
assert len(routers.replaced(model)) == 4
moecore.unfuse(model)
assert model.config._experts_implementation == "grouped_mm"
assert not any("forward" in vars(module) for module in model.modules())
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
print("well")
"""


@torch.no_grad()
def test_a_fused_model_is_pickled(tmp_path: Path) -> None:
    """And runs in a process that has not imported moecore before, by the same kernels."""
    model = moecore.fuse(build("olmoe"))
    ids = torch.randint(3, 100, (2, 20))
    before = model(ids).logits
    torch.save((model, ids, before), tmp_path / "model.pt")
    loaded, _, _ = torch.load(tmp_path / "model.pt", weights_only=False)
    assert routers.replaced(loaded) == routers.replaced(model)
    for parameter in loaded.parameters():
        parameter.zero_()
    assert torch.equal(model(ids).logits, before), "what was loaded has weights of its own"
    moecore.unfuse(loaded)
    assert model.config._experts_implementation == families.NAME
    program = PICKLED.replace("import sys, torch\n", "import sys, torch\ntorch.set_num_threads(1)\n")
    # There calls of routers on the CPU run their own code.
    monkey = "import moecore.runtime.routers as routers\nrouters.DEVICES = {'cpu'}\n"
    program = program.replace("with torch.no_grad():\n", f"{monkey}with torch.no_grad():\n", 1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ran.stdout.strip() == "well", ran.stderr[-3000:]


@torch.no_grad()
@pytest.mark.parametrize("before", ["eager", "batched_mm", "grouped_mm"])
def test_what_the_kernels_do_not_serve_runs_as_before(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_moe")
    model.set_experts_implementation(before)
    ids = torch.randint(3, 100, (2, 20))
    stock = model(ids).logits
    module = experts_of(moecore.fuse(model))
    called = []
    for name in ("grouped_mm", "batched_mm"):
        real = resident.ALL_EXPERTS_FUNCTIONS[name]

        def run(*args: Any, name: str = name, real: Any = real) -> Any:
            called.append(name)
            return real(*args)

        monkeypatch.setitem(resident.ALL_EXPERTS_FUNCTIONS, name, run)
    monkeypatch.setattr(routers, "DEVICES", {"cuda"})
    assert torch.equal(model(ids).logits, stock)
    assert set(called) == {before} - {"eager"}
    if before == "eager":
        assert resident.own(module) is type(module).forward.__wrapped__
    copied = copy.deepcopy(model)
    called.clear()
    assert torch.equal(copied(ids).logits, stock)
    assert set(called) == {before} - {"eager"}
    model.set_experts_implementation("grouped_mm")  # somebody chooses anew, and fuses again
    called.clear()
    moecore.fuse(model)(ids)
    assert set(called) == {"grouped_mm"}
    moecore.unfuse(model)
    assert model.config._experts_implementation == before, "the first to be exchanged"
    assert not any("moecore" in key for module in model.modules() for key in vars(module))


@torch.no_grad()
def test_experts_that_are_left_alone_run_as_before_too() -> None:
    """They share a configuration with the others."""
    model = build("qwen3_moe")
    model.set_experts_implementation("eager")
    module = families.find(model)[1].module
    module.down_proj.data = module.down_proj.data.double()
    moecore.fuse(model)
    assert len(model.moecore_fused.experts) == 2
    assert resident.own(module) is type(module).forward.__wrapped__


def test_of_a_model_that_was_loaded_with_it_nobody_knows_what_ran_before() -> None:
    model = build("qwen3_moe")
    moecore.register()
    model.set_experts_implementation("moecore")
    assert resident.own(experts_of(moecore.fuse(model))) is resident.ALL_EXPERTS_FUNCTIONS["grouped_mm"]


def test_kernels_are_loaded_before_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevices(torch.nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            places = ("cuda:1", "cpu", "cuda:0", "cuda:1")
            return (types.SimpleNamespace(device=torch.device(place)) for place in places)

    loaded: list[int] = []
    monkeypatch.setattr(resident.launch, "load", loaded.append)
    monkeypatch.setattr(resident, "ready", lambda: False)
    with pytest.raises(ConfigError, match="nothing to fuse"):
        moecore.fuse(OnDevices())
    assert loaded == []
    monkeypatch.setattr(resident, "ready", lambda: True)
    with pytest.raises(ConfigError, match="nothing to fuse"):
        moecore.fuse(OnDevices())
    assert loaded == [0, 1]


@torch.no_grad()
def test_router_logits_are_recorded() -> None:
    model = build("olmoe")
    ids = torch.randint(3, 100, (2, 20))
    before = model(ids, output_router_logits=True).router_logits
    after = moecore.fuse(model)(ids, output_router_logits=True).router_logits
    assert len(before) == len(after) == 4
    assert all(torch.equal(mine, stock) for mine, stock in zip(after, before, strict=True))


@torch.no_grad()
def test_selected_while_it_loads(checkpoints: Path) -> None:
    moecore.register()
    folder = tiny.checkpoint("olmoe", checkpoints)
    with tiny.quiet():
        model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moecore").eval()
    ids = torch.randint(3, 100, (2, 20))
    stock = tiny.load_whole("olmoe", folder)(ids).logits
    torch.testing.assert_close(model(ids).logits, stock, rtol=1e-5, atol=1e-5)
    assert len(moecore.fuse(model).moecore_fused.routers) == 4
    moecore.unfuse(model)
    assert model.config._experts_implementation == families.NAME, "as it was"


@torch.no_grad()
def test_an_offloaded_model_gets_routers(checkpoints: Path) -> None:
    ids = torch.randint(3, 100, (2, 20))
    model = moecore.wrap(tiny.load_whole("olmoe", tiny.checkpoint("olmoe", checkpoints)), expert_memory="25%")
    already = routers.replaced(model)
    before = model(ids).logits
    moecore.fuse(model)
    assert model.moecore_fused.experts == ()
    assert len(model.moecore_fused.routers) == 4
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    moecore.unfuse(model)
    assert routers.replaced(model) == already
    moecore.unwrap(model)


def test_a_fused_model_is_not_wrapped() -> None:
    model = moecore.fuse(build("olmoe"))
    with pytest.raises(ConfigError, match=r"call moecore.unfuse\(model\) before moecore.wrap"):
        moecore.wrap(model, expert_memory="25%")
    moecore.wrap(moecore.unfuse(model), expert_memory="25%")
    moecore.unwrap(model)


def test_nothing_to_fuse() -> None:
    with pytest.raises(ConfigError, match=r"in this llama model \(LlamaForCausalLM\): it has no experts that moecore"):
        moecore.fuse(build("llama"))
    model = build("jetmoe")
    with pytest.raises(ConfigError, match=r"jetmoe model .*: model.layers.0: its code is none that moecore knows"):
        moecore.fuse(model)
    with pytest.raises(ConfigError, match="not str"):
        moecore.fuse("olmoe")  # type: ignore[arg-type]
    assert not any("moecore" in key for key in vars(model))


def test_experts_in_eight_bits_keep_their_implementation() -> None:
    model = build("qwen3_moe")
    for one in families.find(model):
        one.module.down_proj.requires_grad_(False).data = one.module.down_proj.data.to(torch.float8_e4m3fn)
    moecore.fuse(model)
    assert set(model.moecore_fused.left.values()) == {"its weights are float8_e4m3fn"}
    assert model.config._experts_implementation != families.NAME
    assert len(model.moecore_fused.routers) == 3


def test_ops_of_an_offloaded_module_do_not_come_here(monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts_of(build("qwen3_moe"))
    hidden, index, weights = call_of(module, 4)
    monkeypatch.setattr(resident, "run", lambda *_: "resident")
    assert ops.run(module, hidden, index, weights) == "resident"
    vars(module)["_moecore"] = type("Handle", (), {"run": staticmethod(lambda *_: "offloaded")})()
    assert ops.run(module, hidden, index, weights) == "offloaded"


def test_moecore_alone_imports_no_torch() -> None:
    code = "import moecore, sys; print({'torch', 'transformers'} & set(sys.modules), 'fuse' in moecore.__all__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set() True\n"


@torch.no_grad()
def test_wrapped_fused_and_unwrapped() -> None:
    """The report goes with the experts, so that the model can be wrapped again."""
    model, ids = build("qwen3_moe"), torch.arange(5, 25)[None]
    before = model(ids).logits
    for _ in range(2):
        moecore.wrap(model, expert_memory="25%")
        moecore.fuse(model)
        assert len(model.moecore_fused.routers) == len(model.moecore.taken)
        assert model.moecore_fused.experts == ()
        torch.testing.assert_close(model(ids).logits, before)
        moecore.unwrap(model)
        assert not hasattr(model, "moecore_fused")
        assert routers.replaced(model) == []
        torch.testing.assert_close(model(ids).logits, before)
