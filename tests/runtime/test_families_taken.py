"""Taking a model over and giving it back, and the models that are refused, each with its reason."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import tiny_configs
import torch
from moecore.errors import ConfigError
from moecore.runtime import families
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

if TYPE_CHECKING:
    from pathlib import Path

ADAPTED = ["dbrx", "jetmoe", "llama4_text", "longcat_flash", "step3p5"]


def zeros(module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(hidden)


@pytest.mark.parametrize("name", ["gemma4", "qwen3_omni_moe_thinker", "gpt_oss", *ADAPTED])
def test_restored_as_it_was(name: str, checkpoints: Path) -> None:
    model = tiny.load_whole(name, tiny.checkpoint(name, checkpoints))
    with tiny.quiet():
        before = tiny.trace(model, name)
        configs = [config._experts_implementation for config in families.configurations(model)]
        taken = families.take_over(model, zeros)
        assert not torch.equal(tiny.trace(model, name)[0], before[0])
        for one in taken + taken:  # twice is harmless
            one.restore()
        assert [config._experts_implementation for config in families.configurations(model)] == configs
        assert not any("forward" in vars(module) for module in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(tiny.trace(model, name), before, strict=True))


def test_every_configuration_is_switched() -> None:
    """generate() exchanges grouped_mm for batched_mm in all configurations, once it has found one that has it."""
    model = tiny.build("qwen3_omni_moe_thinker")
    taken = families.take_over(model, zeros)
    assert {config._experts_implementation for config in families.configurations(model)} == {families.NAME}
    assert families.NAME in model.get_experts_implementation().values()
    for one in taken:
        one.restore()


def test_a_failure_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("step3p5")
    last = families.find(model)[-1].module
    real = type(families.find(model)[0].adapter).install

    def install(self: Any, model: Any, taken: Any, run: Any) -> None:
        if taken.module is last:
            raise RuntimeError("half way")
        real(self, model, taken, run)

    monkeypatch.setattr(type(families.find(model)[0].adapter), "install", install)
    with pytest.raises(RuntimeError, match="half way"):
        families.take_over(model, zeros)
    assert not any("forward" in vars(module) for module in model.modules())


def test_twice() -> None:
    model = tiny.build("olmoe")
    families.take_over(model, zeros)
    with pytest.raises(ConfigError, match="already taken over"):
        families.take_over(model, zeros)


@pytest.mark.parametrize("name", sorted(families.REFUSED))
def test_refused_by_name(name: str) -> None:
    cls = CONFIG_MAPPING[name]
    config = cls(**tiny_configs.small(cls, dict(tiny_configs.FAMILIES[name])))
    with torch.device("meta"), tiny.quiet():
        model = tiny_configs.model_class(name)._from_config(config)
    with pytest.raises(ConfigError, match=f"cannot take over {name} models: .{{20}}"):
        families.take_over(model, zeros)


def test_a_dense_model() -> None:
    with pytest.raises(ConfigError, match=r"found no experts in this llama model \(LlamaForCausalLM\)"):
        families.take_over(tiny.build("llama"), zeros)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("_use_kernels", True, "use_kernels=False"),
        ("hf_device_map", {"model": "cpu", "lm_head": "disk"}, "without 'disk'"),
        (
            "hf_quantizer",
            types.SimpleNamespace(quantization_config=types.SimpleNamespace(quant_method="bitsandbytes")),
            "packed by bitsandbytes",
        ),
        (
            "hf_quantizer",
            types.SimpleNamespace(quantization_config=types.SimpleNamespace(quant_method="gguf")),
            "packed by gguf",
        ),
    ],
)
def test_refused_for_how_it_was_loaded(attribute: str, value: Any, message: str) -> None:
    model = tiny.build("olmoe")
    setattr(model, attribute, value)
    with pytest.raises(ConfigError, match=message):
        families.take_over(model, zeros)


def test_expert_parallelism_is_refused() -> None:
    model = tiny.build("olmoe")
    families.find(model)[1].module._is_expert_parallel = True  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts runs under expert parallelism"):
        families.take_over(model, zeros)


def test_identity_experts_are_not_counted() -> None:
    taken = families.find(tiny.build("longcat_flash"))[0]
    assert taken.num_experts == tiny.EXPERTS
    assert taken.module.gate_up_proj.shape[0] > tiny.EXPERTS
    assert taken.resident(3)["gate_up_proj"].shape == taken.params[0].shape
