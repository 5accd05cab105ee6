"""Loading without experts: the ways in, the arguments, and what is left behind in transformers (nothing)."""

from __future__ import annotations

import json
import shutil
import threading
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
import transformers
from moecore.errors import ConfigError
from moecore.runtime import skeleton
from moecore.runtime.skeleton import load_skeleton
from safetensors.torch import load_file, save_file
from transformers.quantizers import auto

if TYPE_CHECKING:
    from pathlib import Path


def tables() -> tuple[dict[str, Any], dict[str, Any]]:
    return dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


@pytest.fixture
def folder(checkpoints: Path) -> Path:
    return tiny.checkpoint("olmoe", checkpoints)


def test_nothing_stays_in_transformers(folder: Path) -> None:
    before = tables()
    model, _ = load_skeleton(folder)
    assert tables() == before
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model._keys_to_ignore_on_load_unexpected == whole._keys_to_ignore_on_load_unexpected
    assert not [name for name in vars(model) if "moecore" in name]
    assert type(model) is transformers.OlmoeForCausalLM
    assert not model.training


def test_nothing_stays_after_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables()
    monkeypatch.setattr(skeleton, "ExpertIndex", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_skeleton(folder)
    assert tables() == before
    assert not skeleton.LOCK.locked()


def test_one_file(folder: Path, tmp_path: Path) -> None:
    whole: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        whole |= load_file(file)
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    _, one = load_skeleton(str(tmp_path))
    _, many = load_skeleton(folder)
    assert len(one.files) == 1 < len(many.files)
    assert one.expert_bytes == many.expert_bytes
    for name, tensor in tiny.rows(one, 2, 9).items():
        assert torch.equal(tensor, tiny.rows(many, 2, 9)[name])


def test_tied_weights(checkpoints: Path, tmp_path: Path) -> None:
    config = json.loads((tiny.checkpoint("olmoe", checkpoints) / "config.json").read_text())
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**config | {"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path)
    loaded, index = load_skeleton(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not index.ignored


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_dtype(dtype: Any, folder: Path) -> None:
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model, index = load_skeleton(folder, dtype=dtype)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    for name, tensor in tiny.rows(index, 0, 3).items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, getattr(whole.model.layers[0].mlp.experts, name)[3])


def test_arguments_reach_transformers(folder: Path) -> None:
    model, _ = load_skeleton(folder, attn_implementation="eager", num_experts_per_tok=3, local_files_only=True)
    assert model.config._attn_implementation == "eager"
    assert model.config.num_experts_per_tok == 3
    config = transformers.AutoConfig.from_pretrained(folder, num_experts_per_tok=1)
    model, _ = load_skeleton(folder, config=config)
    assert model.config.num_experts_per_tok == 1
    assert not hasattr(config, "quantization_config")


def test_device_map(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers takes a device_map with accelerate only")
    model, index = load_skeleton(folder, device_map="cpu")
    assert model.device == torch.device("cpu")
    assert index.layers


def test_no_report_of_the_missing_experts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        load_skeleton(folder)
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity_error()
    assert "experts" not in caplog.text


def test_a_bin_checkpoint(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no safetensors files"):
        load_skeleton(tmp_path)


def test_a_dense_model(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="found no experts in this llama model"):
        load_skeleton(tmp_path)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"gguf_file": "model.gguf"}, "GGUF packs"),
        ({"use_kernels": True}, "use_kernels"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantization_config"),
        ({"device_map": {"": "disk"}}, "'disk'"),
        ({"disable_mmap": True}, "disable_mmap"),
        ({"use_safetensors": False}, "safetensors files only"),
    ],
)
def test_refused_arguments(argument: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_skeleton(folder, **argument)


def test_refused_quantisation(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ConfigError, match="packed by gptq"):
        load_skeleton(tmp_path)


@pytest.mark.parametrize("kind", ["doge", "nllb-moe"])
def test_refused_type(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match=f"cannot load {kind} models"):
        load_skeleton(tmp_path)


def test_identity_experts_that_the_files_lack(checkpoints: Path, tmp_path: Path) -> None:
    """Released longcat checkpoints have no gates for identity experts; transformers saves random ones."""
    folder = tiny.checkpoint("longcat_flash", checkpoints)
    shutil.copy(folder / "config.json", tmp_path)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {
            name: tensor
            for name, tensor in load_file(file).items()
            if not any(f".experts.{expert}." in name for expert in range(tiny.EXPERTS, tiny.EXPERTS + 4))
        }
        save_file(tensors, tmp_path / file.name, metadata={"format": "pt"})
    places = {name: file.name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    _, index = load_skeleton(tmp_path)
    _, whole = load_skeleton(folder)
    for expert in range(tiny.EXPERTS):
        for name, tensor in tiny.rows(index, 1, expert).items():
            assert torch.equal(tensor, tiny.rows(whole, 1, expert)[name])


def test_threads(folder: Path) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(load_skeleton(folder)[1].layers))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [4, 4, 4]
