"""Small made-up repositories, and how the tests of the hub call the command line."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fakehub import Content

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}

Tensor = tuple[str, str, list[int]]


def header(tensors: Iterable[Tensor], *, metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """The first bytes of a safetensors file with these tensors, and the length of the whole file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, dtype, shape in tensors:
        size = prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + offset


def claim(size: int, length: int) -> Content:
    """A file of `length` bytes whose header claims to be `size` bytes long."""
    return struct.pack("<Q", size) + b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}', length


@dataclass(frozen=True)
class Made:
    """A made-up repository and the figures that follow from its shapes."""

    files: dict[str, Content]
    config: dict[str, Any]
    total: int
    routed: int
    headers: int
    shards: list[str] = field(default_factory=list)

    def without(self, *names: str) -> dict[str, Content]:
        """Its files but for these."""
        return {name: content for name, content in self.files.items() if name not in names}


def shard_name(number: int, count: int) -> str:
    """As transformers names shards, from 1 on."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def qwen3_moe(
    *, layers: int = 2, experts: int = 8, hidden: int = 64, inner: int = 32, vocab: int = 256, shards: int = 3
) -> Made:
    """A repository like Qwen3-MoE: GQA with head norms, every layer sparse, one tensor per expert and projection.

    Total and routed bytes are worked out here from the shapes: routed = layers * experts * 3 * hidden * inner * 2.
    """
    heads, kv_heads, head = 4, 2, 16
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
        "decoder_sparse_step": 1, "head_dim": head, "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": 4 * hidden, "max_position_embeddings": 1024, "max_window_layers": layers,
        "mlp_only_layers": [], "moe_intermediate_size": inner, "norm_topk_prob": True, "num_attention_heads": heads,
        "num_experts": experts, "num_experts_per_tok": 2, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": vocab,
    }  # fmt: skip
    tensors: list[Tensor] = [("model.embed_tokens.weight", "BF16", [vocab, hidden])]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors += [
            (at + "input_layernorm.weight", "BF16", [hidden]),
            (at + "post_attention_layernorm.weight", "BF16", [hidden]),
            (at + "self_attn.q_proj.weight", "BF16", [heads * head, hidden]),
            (at + "self_attn.k_proj.weight", "BF16", [kv_heads * head, hidden]),
            (at + "self_attn.v_proj.weight", "BF16", [kv_heads * head, hidden]),
            (at + "self_attn.o_proj.weight", "BF16", [hidden, heads * head]),
            (at + "self_attn.q_norm.weight", "BF16", [head]),
            (at + "self_attn.k_norm.weight", "BF16", [head]),
            (at + "mlp.gate.weight", "BF16", [experts, hidden]),
        ]
        for expert in range(experts):
            tensors += [
                (at + f"mlp.experts.{expert}.gate_proj.weight", "BF16", [inner, hidden]),
                (at + f"mlp.experts.{expert}.up_proj.weight", "BF16", [inner, hidden]),
                (at + f"mlp.experts.{expert}.down_proj.weight", "BF16", [hidden, inner]),
            ]
    tensors += [("model.norm.weight", "BF16", [hidden]), ("lm_head.weight", "BF16", [vocab, hidden])]
    total = sum(prod(shape) * 2 for _, _, shape in tensors)
    count = len(tensors)
    names = [shard_name(i + 1, shards) for i in range(shards)] if shards > 1 else ["model.safetensors"]
    files: dict[str, Content] = {"config.json": json.dumps(config).encode(), "README.md": b"# made up\n"}
    weight_map: dict[str, str] = {}
    for i, name in enumerate(names):
        part = tensors[i * count // shards : (i + 1) * count // shards]
        files[name] = header(part)
        weight_map.update((tensor, name) for tensor, _, _ in part)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    claims = sum(len(content[0]) for content in files.values() if isinstance(content, tuple))
    return Made(files, config, total, layers * experts * 3 * hidden * inner * 2, claims, names)


def write_folder(folder: Path, files: Mapping[str, Content]) -> Path:
    """The files on disk, safetensors tails sparse."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data, length = (content, len(content)) if isinstance(content, bytes) else content
        path.write_bytes(data)
        os.truncate(path, length)
    return folder


def write_hub_cache(home: Path, repo: str, sha: str, files: Mapping[str, Content]) -> Path:
    """The files as huggingface_hub keeps them: blobs, and snapshots that link to them. Gives the snapshot's folder."""
    root = home / "hub" / ("models--" + repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(sha)
    blobs = {f"{i:064x}": content for i, content in enumerate(files.values())}
    write_folder(root / "blobs", blobs)
    snapshot = root / "snapshots" / sha
    snapshot.mkdir(parents=True)
    for name, blob in zip(files, blobs, strict=True):
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob))
    return snapshot


def command(*args: str) -> list[str]:
    """The command line as a module, so that it needs no script folder on the path."""
    return [sys.executable, "-m", "moecore", *args]


def run_cli(
    args: Sequence[str], env: Mapping[str, str], *, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """One run of the command line with its output piped."""
    return subprocess.run(command(*args), env=dict(env), cwd=cwd, capture_output=True, text=True, timeout=60)


def json_lines(text: str) -> list[dict[str, Any]]:
    """Each line as an object; anything that is not JSON fails the test."""
    return [json.loads(line) for line in text.splitlines()]
