"""Routers: for every family whether moecore's gate stands in for it, that it routes alike, and what is left alone."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from moecore.runtime import families, fingerprint, router_forms, routers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.olmoe import modeling_olmoe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

#: Routers that run by the gate, of those that the tiny model of each family has. None may be lost in silence.
REPLACED = {
    **dict.fromkeys(("afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_ocr2", "deepseek_ocr2_text"), 3),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "dots3_note_text"), 3),
    **dict.fromkeys(("ernie4_5_moe", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe"), 3),
    **dict.fromkeys(("glm4v_moe_text", "glm5_next", "glm5_next_text", "glm_moe_dsa", "hy_v3", "hy_v4"), 3),
    **dict.fromkeys(("kimi_linear", "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax_m3_vl"), 3),
    **dict.fromkeys(("minimax_m3_vl_text", "mistral4", "mistral_large4", "mistral_large4_text", "muse_spark"), 3),
    **dict.fromkeys(("muse_spark_text", "qwen3_moe", "qwen3_next", "step3p5", "step3p7", "unlimited_ocr"), 3),
    **dict.fromkeys(("aria", "aria_text", "cohere2_moe", "diffusion_gemma_text", "dots3_note", "flex_olmo"), 4),
    **dict.fromkeys(("gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"), 4),
    **dict.fromkeys(("hunyuan_v1_moe", "inkling2", "inkling2_text", "longcat_flash", "minimax", "minimax_m2"), 4),
    **dict.fromkeys(("mixtral", "olmoe", "openai_privacy_filter", "qwen3_5_moe", "qwen3_5_moe_text"), 4),
    **dict.fromkeys(("qwen3_omni_moe_talker_text", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker"), 4),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text", "qwen4_exp_text", "solar_open"), 4),
    **dict.fromkeys(("ernie4_5_vl_moe", "gemma4", "gemma4_text"), 6),
    **dict.fromkeys(("jamba", "nemotron_h", "qwen2_moe"), 2),
    "unlimited_ocr_text": 3,
}
#: Families of which some or all routers stay, how many, and why.
LEFT = {
    "dbrx": 4,  # chooses in the block, in the dtype of the model
    "deepseek_v4": 1,  # the hashed layer's comes from a table
    "inkling_mm_model": 3,  # softmax together with the shared experts
    "inkling_text": 3,
    "jetmoe": 4,  # sorts as well
    "kolibri1": 4,  # ranks logits plus bias, and scores by sigmoid
    "llama4": 2,  # gives a row with all experts
    "llama4_text": 2,
    "phimoe": 4,  # sparse mixer
    "zaya": 4,  # a network of its own, with an expert to skip
}
#: Before transformers 5.23 these chose in the block: how many are left alone. aria's had no experts to find either.
OLDER = {"aria_text": 0, "jamba": 2}

#: Routers that round their scores to bfloat16 before they choose.
ROUNDS = {"deepseek_v4", "lfm2_moe", "mistral4"}


@pytest.fixture(autouse=True)
def _gate_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU calls stay with the model's own routers; here the gate's specification answers them."""
    monkeypatch.setattr(routers, "DEVICES", {"cpu"})


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose routers have biases, and groups where they know groups."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {tiny.transformers.__version__} has no {name}")
    if tiny.VERSION < (5, 23) and name in ("aria", "minimax_m3_vl"):
        pytest.skip(f"transformers {tiny.transformers.__version__} has another {name}")
    with tiny.quiet():
        model = tiny.build(name, dtype)
    for path, tensor in (*model.named_buffers(), *model.named_parameters()):
        if path.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.data.uniform_(0, 0.3)
    for module in model.modules():
        if hasattr(module, "num_group") and hasattr(module, "topk_group") and name != "axk2":
            module.num_group, module.topk_group = 4, 2
            if hasattr(module, "topk_method"):
                module.topk_method = "group_limited_greedy"
    return model


def count_gates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the gate, with its number of tokens."""
    calls: list[int] = []
    real = routers.ops.gate

    def gate(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(logits.shape[0])
        return real(logits, *args, **kwargs)

    monkeypatch.setattr(routers.ops, "gate", gate)
    return calls


def router_of(model: Any) -> Any:
    return model.get_submodule(routers.replaced(model)[0])


def call_of(router: Any, tokens: int = 29) -> tuple[torch.Tensor, ...]:
    """Random arguments of a router's forward."""
    spec = router._moecore_router
    hidden = torch.randn(tokens, spec.width, dtype=next(router.parameters()).dtype)
    hidden = hidden.unsqueeze(0) if spec.form.dims == 3 else hidden
    return (hidden,) if spec.form.takes is None else (hidden, torch.rand(spec.experts) / 4)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_family_routes_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    with tiny.quiet():
        before = tiny.trace(model, name)
        done, left = routers.replace(model)
        older = tiny.VERSION < (5, 23) and name in OLDER
        assert len(done) == (0 if older else REPLACED.get(name, 0)), left
        assert len(left) == (OLDER if older else LEFT).get(name, 0), left
        calls = count_gates(monkeypatch)
        after = tiny.trace(model, name)
    vision = sum("vision" in path for path in done)
    assert len(calls) == (len(done) - vision) * len(after)
    for mine, stock in zip(after, before, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-5)
        assert torch.equal(mine.argmax(-1), stock.argmax(-1))
    routers.restore(model)
    assert not any(key == "forward" or "_moecore" in key for module in model.modules() for key in vars(module))
    with tiny.quiet():
        assert all(torch.equal(a, b) for a, b in zip(tiny.trace(model, name), before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(set(REPLACED)))
def test_a_router_gives_the_same_experts_and_weights(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    if name.startswith("inkling2"):  # wants float32, as the loader keeps it
        for module in model.modules():
            if type(module).__name__ == "Inkling2TopKRouter":
                module.float()
    done, left = routers.replace(model)
    if dtype == torch.bfloat16 and name in ROUNDS:
        assert not done
        assert "it rounds its scores to bfloat16 before it chooses" in left.values()
        return
    if not done:
        assert name in OLDER
        return
    torch.manual_seed(3)
    router = router_of(model)
    args = call_of(router, 200)
    ours, stock = router(*args), type(router).forward(router, *args)
    assert [(one.dtype, one.shape) for one in ours] == [(one.dtype, one.shape) for one in stock]
    order = router._moecore_router.form.returns
    if 0 in order:
        assert torch.equal(ours[order.index(0)], stock[order.index(0)])
    weights, ids = order.index(1), order.index(2)
    tables = []
    for result in (ours, stock):
        table = torch.zeros(200, router._moecore_router.experts)
        tables.append(table.scatter_(1, result[ids], result[weights].float()))
    alike = ((tables[0] > 0) == (tables[1] > 0)).all(1)
    # In float32 no two scores are equal; in bfloat16 some are, and torch leaves open which of those it takes.
    assert alike.all() if dtype == torch.float32 else alike.sum() > 150
    tight = dtype == torch.float32 or stock[weights].dtype == torch.float32
    torch.testing.assert_close(
        tables[0][alike], tables[1][alike], rtol=1e-5 if tight else 0.02, atol=1e-7 if tight else 1e-3
    )


def test_every_form_is_some_familys() -> None:
    seen = set()
    for name in tiny.NAMES:
        if name in CONFIG_MAPPING and name not in ("aria", "minimax_m3_vl"):
            with tiny.quiet(), torch.device("meta"):
                model = tiny.build(name)
            seen |= {routers.fingerprint_of(module) for module in model.modules()}
    missing = set(router_forms.FORMS) - seen
    other_scores = {"012ea5b4b52b99d5", "950b99c9b14adf6e"}
    older = {"8c7908f314612df2", "0a99dab311aa8ffd", "d4abf4169caabf0e"}
    if tiny.VERSION == (5, 23):
        assert missing == other_scores | older
    else:
        assert not missing & older


@pytest.mark.parametrize("name", ["deepseek_v4", "inkling2_text"])
def test_another_score_by_configuration(name: str) -> None:
    model = build(name)
    for module in model.modules():
        if hasattr(module, "score_fn"):
            other = "sigmoid" if name == "deepseek_v4" else "sqrtsoftplus"
            module.score_fn = tiny.transformers.activations.ACT2FN[other]
    routers.replace(model)
    spec = router_of(model)._moecore_router
    assert spec.settings.scoring == other
    assert spec.code in {"012ea5b4b52b99d5", "950b99c9b14adf6e"}


def test_settings_that_the_gate_has_no_words_for() -> None:
    model = build("axk2")
    for module in model.modules():
        if hasattr(module, "num_group"):
            module.num_group, module.topk_group = 4, 2
    done, left = routers.replace(model)
    assert not done
    assert all("its settings are none that the gate knows" in reason for reason in left.values())
    assert len(left) == 3


@pytest.mark.parametrize(
    ("settings", "experts", "fits"),
    [
        (router_forms.Settings(8, "softmax"), 128, True),
        (router_forms.Settings(32, "softmax"), 1024, True),
        (router_forms.Settings(33, "softmax"), 1024, False),
        (router_forms.Settings(8, "softmax"), 1025, False),
        (router_forms.Settings(8, "softmax"), 7, False),
        (router_forms.Settings(8, "sigmoid", groups=32, top_groups=4), 64, True),
        (router_forms.Settings(8, "sigmoid", groups=8, top_groups=4), 250, False),
        (router_forms.Settings(8, "sigmoid", groups=64, top_groups=4), 256, False),
        (router_forms.Settings(8, "sigmoid", groups=8, top_groups=1), 32, False),
        (router_forms.Settings(2, "sigmoid", groups=8, top_groups=2), 8, False),
        (router_forms.Settings(8, "softmax", None), 128, False),  # type: ignore[arg-type]
    ],
)
def test_the_range_of_the_gate(settings: router_forms.Settings, experts: int, fits: bool) -> None:
    assert routers.in_range(settings, experts) is fits


def test_a_subclass_with_another_forward_is_left_alone() -> None:
    class Other(modeling_olmoe.OlmoeTopKRouter):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> Any:
            logits, weights, ids = super().forward(hidden_states)
            return logits, weights.flip(-1), ids

    model = build("olmoe")
    router = model.get_submodule("model.layers.1.mlp.gate")
    router.__class__ = Other
    assert routers.examine(router)[0] is None
    done, left = routers.replace(model)
    assert len(done) == 3
    assert left == {"model.layers.1.mlp.gate": "its code is none that moecore knows"}


def test_a_forward_that_somebody_has_replaced_is_left_alone() -> None:
    model = build("olmoe")
    router = model.get_submodule("model.layers.0.mlp.gate")
    router.forward = lambda hidden: None
    done, left = routers.replace(model)
    assert len(done) == 3
    assert left == {"model.layers.0.mlp.gate": "its forward was replaced by somebody else"}
    routers.restore(model)
    assert "forward" in vars(router)


def test_a_class_whose_forward_was_wrapped_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    import functools

    cls = modeling_olmoe.OlmoeTopKRouter
    real = cls.forward

    @functools.wraps(real)
    def forward(self: Any, *args: Any) -> Any:
        return real(self, *args)

    monkeypatch.setattr(cls, "forward", forward)
    assert routers.replace(build("olmoe"))[0] == []


def module_from(tmp_path: Path, name: str, source: str) -> ModuleType:
    """A module from source, in a file, so that its code can be read."""
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"


def own_router(tmp_path: Path, name: str, change: Callable[[str], str]) -> Any:
    """A router like olmoe's, from source that `change` has changed."""
    source = inspect.getsource(modeling_olmoe.OlmoeTopKRouter)
    cls = module_from(tmp_path, name, HEAD + change(source)).OlmoeTopKRouter
    router = cls(build("olmoe").config).eval()
    torch.nn.init.normal_(router.weight)
    return router


def test_the_same_code_with_other_names_behind_it_fails_the_trial(tmp_path: Path) -> None:
    router = own_router(tmp_path, "same", lambda source: source)
    spec = routers.examine(router)[0]
    assert spec is not None
    assert routers.differs(router, spec) == ""

    class Worst:
        nn, float = torch.nn, torch.float

        @staticmethod
        def topk(x: torch.Tensor, k: int, dim: int) -> Any:
            return torch.topk(x, k, dim=dim, largest=False)

    type(router).forward.__globals__["torch"] = Worst
    assert routers.examine(router)[0] == spec
    assert routers.replace(torch.nn.ModuleDict({"gate": router})) == ([], {"gate": "in a trial it chose other experts"})

    class Doubled(Worst):
        @staticmethod
        def topk(x: torch.Tensor, k: int, dim: int) -> Any:
            values, ids = torch.topk(x, k, dim=dim)
            return values * 2, ids

    type(router).forward.__globals__["torch"] = Doubled
    assert routers.differs(router, spec) == "in a trial it gave other weights"


@pytest.mark.parametrize(
    ("change", "known"),
    [
        (lambda source: source, True),
        (lambda source: source.replace("self, hidden_states)", "self, hidden_states: torch.Tensor) -> tuple"), True),
        (lambda source: source.replace("dim=-1)", "dim=-1)  # the last"), True),
        (lambda source: source.replace("keepdim=True", "keepdim=True\n            "), True),
        (lambda source: source.replace("torch.topk(", "torch.sort("), False),
        (lambda source: source.replace("dtype=torch.float,", "dtype=torch.half,"), False),
        (lambda source: source.replace("if self.norm_topk_prob", "if not self.norm_topk_prob"), False),
    ],
)
def test_what_a_fingerprint_sees(change: Callable[[str], str], known: bool, tmp_path: Path) -> None:
    router = own_router(tmp_path, "changed", change)
    assert (fingerprint.fingerprint(router) in router_forms.FORMS) is known


def test_a_fingerprint_sees_what_the_forward_calls(tmp_path: Path) -> None:
    source = (
        "class Router(nn.Module):\n    def forward(self, x):\n        return self.inner(x)\n    def inner(self, x):\n"
    )
    one, same, other = (
        module_from(tmp_path, name, f"{HEAD}{source}        return {body}\n").Router()
        for name, body in (("one", "x + 1"), ("same", "(x + 1)"), ("other", "x + 2"))
    )
    assert fingerprint.fingerprint(one) == fingerprint.fingerprint(same) != fingerprint.fingerprint(other)
    exec("class Unwritten(torch.nn.Module):\n    def forward(self, x): return x", names := {"torch": torch})
    assert fingerprint.fingerprint(names["Unwritten"]()) is None  # type: ignore[operator]


def test_equal_weights_cannot_be_tried() -> None:
    model = build("olmoe")
    router = model.get_submodule("model.layers.0.mlp.gate")
    router.weight.data.zero_()
    _, left = routers.replace(model)
    assert left == {"model.layers.0.mlp.gate": "in a trial too many experts had equal scores"}


def test_a_trial_that_fails_is_a_reason() -> None:
    model = build("olmoe")
    model.get_submodule("model.layers.0.mlp.gate").hidden_dim = 63
    _, left = routers.replace(model)
    assert left["model.layers.0.mlp.gate"].startswith("a trial failed: shape")


def test_weights_that_are_not_there() -> None:
    model = build("olmoe").to("meta")
    _, left = routers.replace(model)
    assert set(left.values()) == {"its weights are not in memory"}


def test_twice() -> None:
    model = build("olmoe")
    assert len(routers.replace(model)[0]) == 4
    assert routers.replace(model) == ([], {})
    routers.restore(model)
    routers.restore(model)
    assert routers.replaced(model) == []


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "minimax_m2"])
def test_training_runs_the_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    routers.replace(model)
    calls = count_gates(monkeypatch)
    router = router_of(model)
    args = call_of(router)
    weights = router(*args)[1]
    assert not calls, "weights that want gradients get them"
    weights.sum().backward()
    assert router.weight.grad is not None
    with torch.no_grad():
        router.train()(*args)
        assert not calls, "a forward that is repeated for its gradients has to choose as that one"
        router.eval()(*args)
        assert len(calls) == 1
        with torch.autocast("cpu", torch.bfloat16):
            router(*args)
        assert len(calls) == 1


@torch.no_grad()
def test_settings_that_change_later_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("olmoe")
    routers.replace(model)
    calls = count_gates(monkeypatch)
    router = router_of(model)
    router.top_k = 5
    assert router(*call_of(router))[2].shape == (29, 5)
    assert not calls


@torch.no_grad()
def test_a_model_that_becomes_bfloat16_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mistral4")
    routers.replace(model)
    router = router_of(model.to(torch.bfloat16))
    calls = count_gates(monkeypatch)
    args = call_of(router)
    assert torch.equal(router(*args)[2], type(router).forward(router, *args)[2])
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "deepseek_v3", "deepseek_v2", "mixtral", "gpt_oss", "ernie4_5_moe", "afmoe", "gemma4_text"],
)
def test_a_whole_graph(name: str) -> None:
    model = build(name)
    routers.replace(model)
    router = router_of(model)
    args = call_of(router)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with tiny.quiet():
        torch._dynamo.reset()
        compiled = torch.compile(router, fullgraph=True, backend=backend)(*args)
    assert all(torch.equal(mine, eager) for mine, eager in zip(compiled, router(*args), strict=True))
    assert sum("moecore.gate" in str(node.target) for graph in graphs for node in graph.graph.nodes) == 1


@torch.no_grad()
def test_copies_route_by_their_own_weights() -> None:
    model = build("olmoe")
    routers.replace(model)
    router = router_of(model)
    args = call_of(router)
    before = router(*args)
    copied = copy.deepcopy(router)
    copied.weight.data.neg_()
    assert routers.is_ours(copied)
    assert not torch.equal(copied(*args)[0], before[0])
    assert torch.equal(router(*args)[0], before[0])
    file = io.BytesIO()
    torch.save(router, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(loaded(*args), before, strict=True))
    assert routers.is_ours(loaded)
    loaded.weight.data.neg_()
    assert torch.equal(loaded(*args)[0], copied(*args)[0])
    routers.restore(loaded)
    assert not any(key == "forward" or "_moecore" in key for key in vars(loaded))


@torch.no_grad()
@pytest.mark.parametrize("way", ["itself", "copied", "pickled"])
def test_replicas_route_by_their_own_weights(way: str) -> None:
    """`torch.nn.DataParallel` copies what a module holds by reference, and puts the weights of another GPU in place."""
    model = build("olmoe")
    routers.replace(model)
    router = router_of(model)
    args = call_of(router)
    before = router(*args)
    if way == "copied":
        router = copy.deepcopy(router)
    elif way == "pickled":
        torch.save(router, file := io.BytesIO())
        file.seek(0)
        router = torch.load(file, weights_only=False)
    replica = router._replicate_for_data_parallel()
    assert replica._is_replica
    replica.weight = -router.weight
    assert torch.equal(replica(*args)[0], router.__class__.forward(replica, *args)[0])
    assert not torch.equal(replica(*args)[0], before[0])
    assert torch.equal(router(*args)[0], before[0])
    assert routers.is_ours(replica)
    routers.restore(router)
    assert not {"forward", "_replicate_for_data_parallel"} & set(vars(router))


@torch.no_grad()
def test_who_is_asked_before_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("ernie4_5_moe")
    routers.replace(model)
    router = router_of(model)
    args = call_of(router)
    stock = router(*args)
    calls = count_gates(monkeypatch)
    asked = []

    def chooser(logits: torch.Tensor, arguments: dict[str, Any]) -> Any:
        asked.append(arguments["k"])
        return routers.ops.gate(logits, **arguments)

    routers.lead_to(router, chooser)
    assert all(torch.equal(a, b) for a, b in zip(router(*args), stock, strict=True))
    assert asked == [router.top_k]
    assert len(calls) == 1
    routers.restore(model)
    assert not any("_moecore" in key for key in vars(router))


def test_a_router_and_its_experts_are_neighbours() -> None:
    """What is left alone is told by the block that has experts."""
    for name in ("olmoe", "gemma4_text"):
        model = build(name)
        blocks = {taken.name.rpartition(".")[0] for taken in families.find(model)}
        assert {path.rpartition(".")[0] for path in routers.replace(model)[0]} == blocks
