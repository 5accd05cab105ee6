"""Quantised experts: rows keep the stored form, and are unpacked by transformers' own functions when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import packed
import pytest
import tiny
import torch
from moecore.runtime import families
from moecore.runtime.index import ExpertIndex
from moecore.runtime.skeleton import load_skeleton
from transformers import FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("accelerate", reason="transformers loads FP8 and MXFP4 checkpoints with accelerate only")


def checkpoint(name: str, folder: Path) -> Path:
    return packed.mxfp4(folder) if name == "gpt_oss" else packed.fp8(name, folder)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "mixtral", "qwen3_moe"])
def test_stored_rows_and_the_same_tokens(name: str, checkpoints: Path) -> None:
    folder = checkpoint(name, checkpoints)
    with tiny.quiet():
        model, index = load_skeleton(folder)
    whole = tiny.load_whole(name, folder)
    found = {taken.name: taken for taken in families.find(whole)}
    for at, layer in enumerate(index.layers):
        assert layer.ranges is not None
        assert layer.decode is not None
        assert sum(part.bytes for part in layer.parts) * layer.num_experts * len(index.layers) == index.expert_bytes
        for expert in range(layer.num_experts):
            row, truth = tiny.rows(index, at, expert), found[layer.name].resident(expert)
            for key, tensor in index.materialise(at, expert).items():
                assert torch.equal(tensor.view(torch.uint8), row[key].view(torch.uint8))
            decoded = layer.decode(row)
            assert decoded.keys() == truth.keys()
            assert all(decoded[key].dtype == truth[key].dtype for key in truth)
            assert all(torch.equal(decoded[key], truth[key]) for key in truth)
    tiny.Reference(tiny.aligned(model), index)
    with tiny.quiet():
        pairs = zip(tiny.trace(model, name), tiny.trace(whole, name), strict=True)
        assert all(torch.equal(ours, stock) for ours, stock in pairs)


def test_fp8_modules_have_plain_ranges(checkpoints: Path) -> None:
    """Where the FP8 kernels run, transformers keeps weights and scales as parameters: index such a model too."""
    folder = packed.fp8("deepseek_v3", checkpoints)
    model = fp8_model(folder)
    quantizer = FineGrainedFP8HfQuantizer(
        FineGrainedFP8Config(weight_block_size=packed.BLOCK, dequantize=False), pre_quantized=True
    )
    files = sorted(folder.glob("*.safetensors"))
    quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map=None, checkpoint_files=files)
    found = families.find(model)
    assert {type(taken.module).__name__ for taken in found} == {"FP8Experts"}
    assert {type(taken.adapter).__name__ for taken in found} == {"FP8"}
    index = ExpertIndex(files, model, found=found, hf_quantizer=quantizer)
    layer = index.layers[0]
    assert [part.name for part in layer.parts] == [
        *("gate_up_proj", "gate_up_proj_scale_inv"),
        *("down_proj", "down_proj_scale_inv"),
    ]
    assert layer.parts[0].dtype == torch.float8_e4m3fn
    assert layer.decode is None
    stored = tiny.headers(folder)
    prefix = layer.name + ".7."
    expected = b"".join(raw(stored[f"{prefix}{half}_proj.weight"]) for half in ("gate", "up"))
    row = tiny.rows(index, 0, 7)
    assert row["gate_up_proj"].view(torch.uint8).numpy().tobytes() == expected
    scale = raw(stored[f"{prefix}down_proj.weight_scale_inv"])
    assert row["down_proj_scale_inv"].numpy().tobytes() == scale


def fp8_model(folder: Path) -> Any:
    config = tiny.transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return tiny.transformers.DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16)


def raw(entry: tuple[Path, int, dict[str, Any]]) -> bytes:
    file, start, fields = entry
    begin, end = fields["data_offsets"]
    return file.read_bytes()[start + begin : start + end]
