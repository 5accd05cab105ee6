"""Checkpoints whose experts are packed: gpt_oss in MXFP4, and families with experts in block-wise FP8."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING

import tiny
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = (16, 32)


def mxfp4(folder: Path) -> Path:
    """gpt_oss as it is released: 3-D blocks of nibbles and scales, biases in bfloat16."""

    def pack(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            return {name: tensor}
        experts, inside, outside = tensor.shape
        shape = (experts, outside, inside // 32)
        return {
            f"{name}_blocks": torch.randint(0, 256, (*shape, 16), dtype=torch.uint8),
            f"{name}_scales": torch.randint(123, 126, shape, dtype=torch.uint8),
        }

    return rewrite("gpt_oss", folder, "mxfp4", pack, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def fp8(name: str, folder: Path) -> Path:
    """A family with experts in FP8 and a scale for each block; everything else in bfloat16."""

    def pack(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not re.search(r"experts\.\d+\.\w+\.weight$", key):
            return {key: tensor}
        rows, columns = tensor.shape[0] // BLOCK[0], tensor.shape[1] // BLOCK[1]
        blocks = tensor.float().reshape(rows, BLOCK[0], columns, BLOCK[1])
        scale = blocks.abs().amax((1, 3)) / 448
        stored = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        return {key: stored, f"{key}_scale_inv": scale}

    quantisation = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    return rewrite(name, folder, "fp8", pack, quantisation)


def rewrite(name: str, folder: Path, kind: str, pack: object, quantisation: dict[str, object]) -> Path:
    """A copy of a bfloat16 checkpoint with `pack` applied to every tensor."""
    plain = tiny.checkpoint(name, folder, torch.bfloat16)
    final = folder / f"{name}-{kind}"
    if final.exists():
        return final
    partial = folder / f"{name}-{kind}-{torch.initial_seed()}-{id(plain)}"
    partial.mkdir()
    torch.manual_seed(0)
    places = {}
    for file in sorted(plain.glob("*.safetensors")):
        tensors = {key: value for old, tensor in load_file(file).items() for key, value in pack(old, tensor).items()}  # type: ignore[operator]
        save_file(tensors, partial / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((plain / "config.json").read_text())
    (partial / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    try:
        partial.rename(final)
    except OSError:  # another worker was first
        shutil.rmtree(partial)
    return final
