"""Tiny random checkpoints of every MoE family, in the layout that `save_pretrained` writes, and a reference runtime.

The configurations are those of the fixtures (`tests/tools/tiny_configs.py`), with 16 experts. Weights are large enough
that a wrong expert shows in the logits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiny_configs
import torch
import transformers
from moecore.runtime import compute, families
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moecore.runtime.index import ExpertIndex

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
EXPERTS = 16
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size")
PROMPT = 37
STEPS = 4

DENSE = {"falcon_h1", "gemma3", "gemma3_text", "lfm2", "llama", "mamba2", "mistral", "phi3", "qwen3", "zamba2"}
NAMES = [name for name in tiny_configs.FAMILIES if name not in DENSE and name not in families.REFUSED]


def enlarge(sizes: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with 16 experts."""
    for key, value in sizes.items():
        if isinstance(value, dict):
            enlarge(value)
        elif key in COUNTS:
            sizes[key] = EXPERTS
        elif value == 40 and key in WIDTHS:
            sizes[key] = 128  # whole unrolled vectors: so an activation rounds alike wherever a row lies
    return sizes


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights of the size that keeps activations near one."""
    cls = CONFIG_MAPPING[name]
    config = cls(**enlarge(tiny_configs.small(cls, json.loads(json.dumps(tiny_configs.FAMILIES[name])))))
    torch.manual_seed(0)
    model = tiny_configs.model_class(name)._from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            parameter.data.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
    return model


def checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a saved checkpoint, in several shards; written once for all workers."""
    final = folder / f"{name}-{str(dtype).removeprefix('torch.')}"
    if not final.exists():
        partial = Path(tempfile.mkdtemp(dir=folder))
        with quiet():
            model = build(name, dtype)
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            model.save_pretrained(partial, max_shard_size=f"{size // 3000}KB")
        try:
            partial.rename(final)
        except OSError:  # another worker was first
            shutil.rmtree(partial)
    return final


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings are errors in this project; these are transformers' own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_whole(name: str, folder: Path, implementation: str = "grouped_mm") -> Any:
    """The resident model."""
    with quiet():
        model = tiny_configs.model_class(name).from_pretrained(folder).eval()
        if any(taken.adapter.served_by_interface for taken in families.find(model)):
            model.set_experts_implementation(implementation)
    return aligned(model)


def aligned(model: Any) -> Any:
    """Copies every tensor: the loader leaves some where they lie in the file, and products may round by alignment."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def headers(folder: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """Every tensor of a checkpoint: its file, where the file's data begins, and its header entry."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            for key, entry in json.loads(opened.read(length)).items():
                if key != "__metadata__":
                    found[key] = (file, 8 + length, entry)
    return found


def rows(index: ExpertIndex, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """An expert's parts, from its byte ranges or else materialised."""
    entry = index.layers[layer]
    data = torch.zeros(entry.row_bytes, dtype=torch.uint8)  # aligned as a slot is: products may round by alignment
    found = {
        part.name: data[part.offset : part.offset + part.bytes].view(part.dtype).view(part.shape)
        for part in entry.parts
    }
    if entry.ranges is None:
        for name, tensor in index.materialise(layer, expert).items():
            found[name].copy_(tensor)
        return found
    for piece in entry.ranges[expert]:
        with index.files[piece.file].open("rb") as opened:
            opened.seek(piece.offset)
            read = opened.read(piece.bytes)
        data[piece.at : piece.at + piece.bytes] = torch.frombuffer(bytearray(read), dtype=torch.uint8)
    return found


class Reference:
    """The smallest runtime: rows in a dictionary, waves of three experts in an order of its own."""

    def __init__(self, model: Any, index: ExpertIndex) -> None:
        self.rows = {
            (at, expert): rows(index, at, expert)
            for at, layer in enumerate(index.layers)
            for expert in range(layer.num_experts)
        }
        self.by_module = {id(layer.module): at for at, layer in enumerate(index.layers)}
        self.calls = [0] * len(index.layers)
        self.taken = families.take_over(model, self.run, [layer.taken for layer in index.layers])

    def run(
        self, module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        at = self.by_module[id(module)]
        self.calls[at] += 1
        taken = self.taken[at]
        routing = compute.Routing.of(taken, index)
        out = compute.begin(taken, hidden, index)
        asked = routing.asked()[::-1]
        for start in range(0, len(asked), 3):
            wave = asked[start : start + 3]
            compute.accumulate(taken, hidden, routing, wave, lambda expert: self.rows[at, expert], out)
        return compute.combine(taken, out, weights, hidden.shape[0], hidden.dtype, index)


@torch.no_grad()
def trace(model: Any, name: str) -> list[torch.Tensor]:
    """Outputs of a prefill and of some decode steps; greedy where the model has a head."""
    torch.manual_seed(1)
    ids = torch.randint(3, 100, (2, PROMPT))
    found, cache = [], None
    for _ in range(STEPS + 1):
        inputs: dict[str, Any] = {"input_ids": ids}
        if name == "qwen3_omni_moe_talker_text":
            inputs = {"inputs_embeds": model.codec_embedding(ids)}
        if takes_cache(model):
            inputs |= {"past_key_values": cache, "use_cache": True}
        out = model(**inputs)
        result = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
        found.append(result)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            break
        ids = result[:, -1:].argmax(-1) % 100
    return found


def takes_cache(model: Any) -> bool:
    return type(model).__name__ not in ("OpenAIPrivacyFilterModel",)
