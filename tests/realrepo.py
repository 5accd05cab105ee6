"""Rebuilds real checkpoints from their metadata: true names, dtypes and shapes, true header bytes, no data.

The files are sparse: the header of each ``*.safetensors`` file is written, the data section is a hole made by
``ftruncate``. A repository of 688 GB costs a few megabytes of disk, and a scanner cannot tell the difference.

Where ``data/models`` holds the real index, names and shards come from it, and every tensor's shape is checked
against the family's rules. Elsewhere the names come from the family's published checkpoint layout;
``RepoSpec.assumed`` says what was not seen in a real index.

    python tests/realrepo.py deepseek-ai/DeepSeek-V3 /tmp/v3     # write one
    python tests/realrepo.py --list                              # names, tensors, shards, bytes, what is assumed
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).resolve().parent / "data"
MODELS = DATA / "models"

Json = dict[str, Any]

# Bits per element, in the order in which the safetensors writer ranks dtypes (it writes the last one first).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_RANK = {name: rank for rank, name in enumerate(DTYPE_BITS)}


class Tensor(NamedTuple):
    """One entry of a safetensors header, without its place in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        bits = self.elements * DTYPE_BITS[self.dtype]
        if bits % 8:
            raise ValueError(f"{self.name}: {self.elements} elements of {self.dtype} do not fill whole bytes")
        return bits // 8


@dataclass(frozen=True)
class RepoSpec:
    """What a repository holds: its small files as bytes, its tensors by shard."""

    name: str
    config: Json
    shards: dict[str, list[Tensor]]
    small_files: dict[str, bytes] = field(repr=False)
    real_index: bool
    library_writer: bool
    """Whether the safetensors library wrote the files: ordered by dtype, headers padded. DeepSeek's writer does not."""
    assumed: str
    """What is not taken from a real index or a published listing; empty when nothing is."""

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for shard in self.shards.values() for tensor in shard]

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def by_name(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}


# --- safetensors files ------------------------------------------------------------------------------------------


def header_bytes(
    tensors: Iterable[Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    align: bool = True,
    order: bool = True,
) -> tuple[bytes, int]:
    """The first ``8 + n`` bytes of a safetensors file and the file's whole length.

    With ``order`` tensors lie as the safetensors library writes them: by dtype, widest first, then by name; else
    as they come. With ``align`` the header is padded with spaces to a multiple of 8, as the library does.
    """
    rank = _RANK
    meta = json.dumps(dict(metadata if metadata is not None else {"format": "pt"}), separators=(",", ":"))
    parts = [f'"__metadata__":{meta}']
    offset = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-rank[t[1]], t[0])) if order else tensors:
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits % 8:
            raise ValueError(f"{name}: {shape} of {dtype} does not fill whole bytes")
        end = offset + bits // 8
        dims = ",".join(map(str, shape))
        parts.append(f'"{name}":{{"dtype":"{dtype}","shape":[{dims}],"data_offsets":[{offset},{end}]}}')
        offset = end
    body = ("{" + ",".join(parts) + "}").encode()
    if align:
        body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body, 8 + len(body) + offset


def write_safetensors(
    path: Path,
    tensors: Iterable[Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    align: bool = True,
    order: bool = True,
) -> int:
    """Writes a sparse safetensors file; returns its length. The options are those of ``header_bytes``."""
    head, length = header_bytes(tensors, metadata=metadata, align=align, order=order)
    write_sparse(path, head, length)
    return length


def write_sparse(path: Path, head: bytes, length: int) -> None:
    """Writes ``head`` and stretches the file to ``length`` without using disk for the rest."""
    with path.open("wb") as file:
        file.write(head)
        os.ftruncate(file.fileno(), length)


def write_repo(
    folder: str | Path,
    config: Mapping[str, Any] | None,
    tensors: Iterable[Tensor] | Mapping[str, Sequence[Tensor]],
    *,
    file_name: str = "model.safetensors",
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes a small hand-made repository: one file, or shards given by name (with an index then)."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if isinstance(tensors, Mapping):
        for shard, members in tensors.items():
            write_safetensors(root / shard, members)
        (root / "model.safetensors.index.json").write_bytes(_index_bytes(tensors))
    else:
        write_safetensors(root / file_name, tensors)
    for name, data in (extra or {}).items():
        (root / name).write_bytes(data)
    return root


def _index_bytes(shards: Mapping[str, Sequence[Tensor]]) -> bytes:
    total = sum(tensor.nbytes for members in shards.values() for tensor in members)
    weight_map = {tensor.name: shard for shard, members in shards.items() for tensor in members}
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
    ).encode()


# --- how tensors are collected ----------------------------------------------------------------------------------


class Collector:
    """Gathers tensors in checkpoint order. ``linear`` packs a weight as the checkpoint's quantisation does."""

    def __init__(self, dtype: str = "BF16") -> None:
        self.dtype = dtype
        self.tensors: list[Tensor] = []

    def add(self, name: str, *shape: int, dtype: str | None = None) -> None:
        self.tensors.append(Tensor(name, dtype or self.dtype, shape))

    def plain(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.tensors.append(Tensor(name + ".weight", self.dtype, (out, inner)))
        if bias:
            self.tensors.append(Tensor(name + ".bias", self.dtype, (out,)))

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.plain(name, out, inner, bias)

    def norm(self, name: str, width: int, bias: bool = False) -> None:
        self.tensors.append(Tensor(name + ".weight", self.dtype, (width,)))
        if bias:
            self.tensors.append(Tensor(name + ".bias", self.dtype, (width,)))

    def glu(self, prefix: str, hidden: int, inner: int, names: tuple[str, str, str] | None = None) -> None:
        gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
        self.linear(f"{prefix}.{gate}", inner, hidden)
        self.linear(f"{prefix}.{up}", inner, hidden)
        self.linear(f"{prefix}.{down}", hidden, inner)


class Fp8Blocks(Collector):
    """DeepSeek's FP8: ``weight`` F8_E4M3 and ``weight_scale_inv`` F32, one scale for each 128 x 128 block."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        blocks = (-(-out // 128), -(-inner // 128))
        self.tensors.append(Tensor(name + ".weight", "F8_E4M3", (out, inner)))
        self.tensors.append(Tensor(name + ".weight_scale_inv", "F32", blocks))
        if bias:
            self.tensors.append(Tensor(name + ".bias", self.dtype, (out,)))


class Nvfp4(Collector):
    """ModelOpt NVFP4: two values in a byte, one F8 scale for 16 values, two scalars for each matrix."""

    def __init__(self, excluded: Callable[[str], bool]) -> None:
        super().__init__("BF16")
        self.excluded = excluded

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        if self.excluded(name):
            self.plain(name, out, inner, bias)
            return
        self.tensors += (
            Tensor(name + ".weight", "U8", (out, inner // 2)),
            Tensor(name + ".weight_scale", "F8_E4M3", (out, inner // 16)),
            Tensor(name + ".weight_scale_2", "F32", ()),
            Tensor(name + ".input_scale", "F32", ()),
        )


class Gptq(Collector):
    """GPTQ at 4 bits, groups of 128, with ``g_idx``: each int32 holds eight values along the input."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        groups = inner // 128
        self.tensors += (
            Tensor(name + ".g_idx", "I32", (inner,)),
            Tensor(name + ".qweight", "I32", (inner // 8, out)),
            Tensor(name + ".qzeros", "I32", (groups, out // 8)),
            Tensor(name + ".scales", self.dtype, (groups, out)),
        )


def _head_dim(cfg: Mapping[str, Any]) -> int:
    return int(cfg.get("head_dim") or cfg["hidden_size"] // cfg["num_attention_heads"])


def _gqa(c: Collector, prefix: str, cfg: Mapping[str, Any], *, bias: bool = False, o_bias: bool = False) -> None:
    hidden, head = cfg["hidden_size"], _head_dim(cfg)
    heads, kv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    c.linear(f"{prefix}.q_proj", heads * head, hidden, bias)
    c.linear(f"{prefix}.k_proj", kv * head, hidden, bias)
    c.linear(f"{prefix}.v_proj", kv * head, hidden, bias)
    c.linear(f"{prefix}.o_proj", hidden, heads * head, o_bias)


def _ends(c: Collector, cfg: Mapping[str, Any], prefix: str = "model.", head: bool | None = None) -> None:
    """Embedding, final norm and (unless tied) LM head."""
    vocab, hidden = cfg["vocab_size"], cfg["hidden_size"]
    c.add(f"{prefix}embed_tokens.weight", vocab, hidden)
    c.norm(f"{prefix}norm", hidden)
    if not cfg.get("tie_word_embeddings") if head is None else head:
        c.add("lm_head.weight", vocab, hidden)


# --- families ---------------------------------------------------------------------------------------------------


def _mla(c: Collector, prefix: str, cfg: Mapping[str, Any]) -> None:
    hidden, heads = cfg["hidden_size"], cfg["num_attention_heads"]
    nope, rope, value = cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"], cfg["v_head_dim"]
    q_rank, kv_rank = cfg["q_lora_rank"], cfg["kv_lora_rank"]
    if q_rank:
        c.linear(f"{prefix}.q_a_proj", q_rank, hidden)
        c.norm(f"{prefix}.q_a_layernorm", q_rank)
        c.linear(f"{prefix}.q_b_proj", heads * (nope + rope), q_rank)
    else:
        c.linear(f"{prefix}.q_proj", heads * (nope + rope), hidden)
    c.linear(f"{prefix}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    c.norm(f"{prefix}.kv_a_layernorm", kv_rank)
    c.linear(f"{prefix}.kv_b_proj", heads * (nope + value), kv_rank)
    c.linear(f"{prefix}.o_proj", hidden, heads * value)
    if "index_n_heads" in cfg:
        index_heads, index_dim = cfg["index_n_heads"], cfg["index_head_dim"]
        wide = "F32" if isinstance(c, Fp8Blocks) else c.dtype
        c.linear(f"{prefix}.indexer.wq_b", index_heads * index_dim, q_rank)
        c.linear(f"{prefix}.indexer.wk", index_dim, hidden)
        c.add(f"{prefix}.indexer.k_norm.weight", index_dim, dtype=wide)
        c.add(f"{prefix}.indexer.k_norm.bias", index_dim, dtype=wide)
        c.plain(f"{prefix}.indexer.weights_proj", index_heads, hidden)


def _deepseek_moe(c: Collector, prefix: str, cfg: Mapping[str, Any]) -> None:
    hidden, inner = cfg["hidden_size"], cfg["moe_intermediate_size"]
    for expert in range(cfg["n_routed_experts"]):
        c.glu(f"{prefix}.experts.{expert}", hidden, inner)
    c.plain(f"{prefix}.gate", cfg["n_routed_experts"], hidden)
    if cfg.get("topk_method") == "noaux_tc":
        c.add(f"{prefix}.gate.e_score_correction_bias", cfg["n_routed_experts"], dtype="F32")
    if cfg.get("n_shared_experts"):
        c.glu(f"{prefix}.shared_experts", hidden, inner * cfg["n_shared_experts"])


def _deepseek(c: Collector, cfg: Mapping[str, Any], *, mtp: Sequence[str] = ()) -> None:
    """DeepSeek V1 to V3.2, Kimi-K2 and GLM-5. ``mtp`` names what an MTP layer has besides a decoder layer."""
    hidden, layers = cfg["hidden_size"], cfg["num_hidden_layers"]
    extra = cfg.get("num_nextn_predict_layers", 0) if mtp else 0
    c.add("model.embed_tokens.weight", cfg["vocab_size"], hidden)
    for layer in range(layers + extra):
        prefix = f"model.layers.{layer}"
        if layer >= layers:
            if "embed_tokens" in mtp:
                c.add(f"{prefix}.embed_tokens.weight", cfg["vocab_size"], hidden)
            c.norm(f"{prefix}.enorm", hidden)
            c.norm(f"{prefix}.hnorm", hidden)
            c.plain(f"{prefix}.eh_proj", hidden, 2 * hidden)
        c.norm(f"{prefix}.input_layernorm", hidden)
        if cfg.get("kv_lora_rank"):
            _mla(c, f"{prefix}.self_attn", cfg)
        else:
            _gqa(c, f"{prefix}.self_attn", cfg)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if layer < cfg["first_k_dense_replace"]:
            c.glu(f"{prefix}.mlp", hidden, cfg["intermediate_size"])
        else:
            _deepseek_moe(c, f"{prefix}.mlp", cfg)
        if layer >= layers:
            c.norm(f"{prefix}.shared_head.norm", hidden)
            if "head" in mtp:
                c.add(f"{prefix}.shared_head.head.weight", cfg["vocab_size"], hidden)
    c.norm("model.norm", hidden)
    c.add("lm_head.weight", cfg["vocab_size"], hidden)


_FULL_MTP = ("embed_tokens", "head")
_SMALL_MTP = ("norm",)


def _deepseek_fp8(cfg: Json) -> list[Tensor]:
    c = Fp8Blocks()
    _deepseek(c, cfg, mtp=_FULL_MTP)
    return c.tensors


def _deepseek_bf16(cfg: Json) -> list[Tensor]:
    c = Collector()
    _deepseek(c, cfg)
    return c.tensors


def _glm5(cfg: Json) -> list[Tensor]:
    c = Collector()
    _deepseek(c, cfg, mtp=_SMALL_MTP)
    return c.tensors


def _deepseek_nvfp4(cfg: Json) -> list[Tensor]:
    quant = json.loads((_folder("nvidia/DeepSeek-V3.1-NVFP4") / "hf_quant_config.json").read_bytes())
    listed = set(quant["quantization"]["exclude_modules"])
    stars = tuple(module[:-1] for module in listed if module.endswith("*"))

    def excluded(module: str) -> bool:
        return module in listed or module.startswith(stars)

    c = Nvfp4(excluded)
    _deepseek(c, cfg, mtp=_FULL_MTP)
    return c.tensors


def _qwen3(cfg: Json, c: Collector | None = None) -> list[Tensor]:
    """Qwen3 dense and MoE, and OLMoE (whose q and k norms span all heads)."""
    c = c or Collector()
    hidden, head = cfg["hidden_size"], _head_dim(cfg)
    wide = cfg["model_type"] == "olmoe"
    experts = cfg.get("num_experts", 0)
    inner: int = cfg.get("moe_intermediate_size") or cfg["intermediate_size"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", cfg)
        c.norm(f"{prefix}.self_attn.q_norm", head * (cfg["num_attention_heads"] if wide else 1))
        c.norm(f"{prefix}.self_attn.k_norm", head * (cfg["num_key_value_heads"] if wide else 1))
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if not experts:
            c.glu(f"{prefix}.mlp", hidden, inner)
            continue
        c.plain(f"{prefix}.mlp.gate", experts, hidden)
        for expert in range(experts):
            c.glu(f"{prefix}.mlp.experts.{expert}", hidden, inner)
    _ends(c, cfg)
    return c.tensors


def _qwen3_fp8(cfg: Json) -> list[Tensor]:
    return _qwen3(cfg, Fp8Blocks())


def _qwen_vision(c: Collector, prefix: str, cfg: Mapping[str, Any]) -> None:
    """The Qwen3-VL and Qwen3.5 tower."""
    hidden, inner, out = cfg["hidden_size"], cfg["intermediate_size"], cfg["out_hidden_size"]
    merged = hidden * cfg["spatial_merge_size"] ** 2
    patch = cfg["patch_size"]
    c.add(f"{prefix}.patch_embed.proj.weight", hidden, cfg["in_channels"], cfg["temporal_patch_size"], patch, patch)
    c.add(f"{prefix}.patch_embed.proj.bias", hidden)
    c.add(f"{prefix}.pos_embed.weight", cfg["num_position_embeddings"], hidden)
    for block in range(cfg["depth"]):
        p = f"{prefix}.blocks.{block}"
        c.norm(f"{p}.norm1", hidden, bias=True)
        c.norm(f"{p}.norm2", hidden, bias=True)
        c.plain(f"{p}.attn.qkv", 3 * hidden, hidden, bias=True)
        c.plain(f"{p}.attn.proj", hidden, hidden, bias=True)
        c.plain(f"{p}.mlp.linear_fc1", inner, hidden, bias=True)
        c.plain(f"{p}.mlp.linear_fc2", hidden, inner, bias=True)
    mergers = [("merger", hidden)]
    mergers += [(f"deepstack_merger_list.{i}", merged) for i in range(len(cfg["deepstack_visual_indexes"]))]
    for merger, width in mergers:
        c.norm(f"{prefix}.{merger}.norm", width, bias=True)
        c.plain(f"{prefix}.{merger}.linear_fc1", merged, merged, bias=True)
        c.plain(f"{prefix}.{merger}.linear_fc2", out, merged, bias=True)


def _qwen3_vl(cfg: Json) -> list[Tensor]:
    """Experts fused and transposed: ``[E, H, 2I]`` and ``[E, I, H]``."""
    c, text = Collector(), cfg["text_config"]
    hidden, inner, experts = text["hidden_size"], text["moe_intermediate_size"], text["num_experts"]
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.language_model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", text)
        c.norm(f"{prefix}.self_attn.q_norm", text["head_dim"])
        c.norm(f"{prefix}.self_attn.k_norm", text["head_dim"])
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        c.plain(f"{prefix}.mlp.gate", experts, hidden)
        c.add(f"{prefix}.mlp.experts.gate_up_proj", experts, hidden, 2 * inner)
        c.add(f"{prefix}.mlp.experts.down_proj", experts, inner, hidden)
    _qwen_vision(c, "model.visual", cfg["vision_config"])
    _ends(c, text, "model.language_model.")
    return c.tensors


def _gated_attention(c: Collector, prefix: str, cfg: Mapping[str, Any]) -> None:
    """Qwen3-Next attention: the query projection also makes the output gate."""
    hidden, head = cfg["hidden_size"], cfg["head_dim"]
    heads, kv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    c.linear(f"{prefix}.q_proj", 2 * heads * head, hidden)
    c.linear(f"{prefix}.k_proj", kv * head, hidden)
    c.linear(f"{prefix}.v_proj", kv * head, hidden)
    c.linear(f"{prefix}.o_proj", hidden, heads * head)
    c.norm(f"{prefix}.q_norm", head)
    c.norm(f"{prefix}.k_norm", head)


def _shared_expert(c: Collector, prefix: str, cfg: Mapping[str, Any]) -> None:
    c.glu(f"{prefix}.shared_expert", cfg["hidden_size"], cfg["shared_expert_intermediate_size"])
    c.plain(f"{prefix}.shared_expert_gate", 1, cfg["hidden_size"])


def _qwen_mtp(c: Collector, cfg: Mapping[str, Any]) -> None:
    """One MTP layer with attention, per-expert weights and a shared expert; embedding and head are the main ones."""
    hidden = cfg["hidden_size"]
    c.plain("mtp.fc", hidden, 2 * hidden)
    c.norm("mtp.pre_fc_norm_embedding", hidden)
    c.norm("mtp.pre_fc_norm_hidden", hidden)
    c.norm("mtp.norm", hidden)
    prefix = "mtp.layers.0"
    c.norm(f"{prefix}.input_layernorm", hidden)
    c.norm(f"{prefix}.post_attention_layernorm", hidden)
    _gated_attention(c, f"{prefix}.self_attn", cfg)
    c.plain(f"{prefix}.mlp.gate", cfg["num_experts"], hidden)
    for expert in range(cfg["num_experts"]):
        c.glu(f"{prefix}.mlp.experts.{expert}", hidden, cfg["moe_intermediate_size"])
    _shared_expert(c, f"{prefix}.mlp", cfg)


def _gated_delta(c: Collector, prefix: str, cfg: Mapping[str, Any], *, split: bool) -> None:
    hidden, kernel = cfg["hidden_size"], cfg["linear_conv_kernel_dim"]
    v_heads = cfg["linear_num_value_heads"]
    key = cfg["linear_num_key_heads"] * cfg["linear_key_head_dim"]
    value = v_heads * cfg["linear_value_head_dim"]
    wide = "F32" if split else c.dtype
    c.add(f"{prefix}.A_log", v_heads, dtype=wide)
    c.add(f"{prefix}.conv1d.weight", 2 * key + value, 1, kernel)
    c.add(f"{prefix}.dt_bias", v_heads)
    if split:
        c.plain(f"{prefix}.in_proj_a", v_heads, hidden)
        c.plain(f"{prefix}.in_proj_b", v_heads, hidden)
        c.plain(f"{prefix}.in_proj_qkv", 2 * key + value, hidden)
        c.plain(f"{prefix}.in_proj_z", value, hidden)
    else:
        c.plain(f"{prefix}.in_proj_ba", 2 * v_heads, hidden)
        c.plain(f"{prefix}.in_proj_qkvz", 2 * key + 2 * value, hidden)
    c.add(f"{prefix}.norm.weight", cfg["linear_value_head_dim"], dtype=wide)
    c.plain(f"{prefix}.out_proj", hidden, value)


def _qwen3_5(cfg: Json) -> list[Tensor]:
    """Hybrid of gated delta and attention; experts fused ``[E, 2I, H]`` in the body, single in the MTP layer."""
    c, text = Collector(), cfg["text_config"]
    hidden, inner, experts = text["hidden_size"], text["moe_intermediate_size"], text["num_experts"]
    for layer, kind in enumerate(text["layer_types"]):
        prefix = f"model.language_model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if kind == "linear_attention":
            _gated_delta(c, f"{prefix}.linear_attn", text, split=True)
        else:
            _gated_attention(c, f"{prefix}.self_attn", text)
        c.plain(f"{prefix}.mlp.gate", experts, hidden)
        c.add(f"{prefix}.mlp.experts.gate_up_proj", experts, 2 * inner, hidden)
        c.add(f"{prefix}.mlp.experts.down_proj", experts, hidden, inner)
        _shared_expert(c, f"{prefix}.mlp", text)
    _qwen_vision(c, "model.visual", cfg["vision_config"])
    _qwen_mtp(c, text)
    _ends(c, text, "model.language_model.")
    return c.tensors


def _qwen3_next(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, experts = cfg["hidden_size"], cfg["num_experts"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if (layer + 1) % cfg["full_attention_interval"]:
            _gated_delta(c, f"{prefix}.linear_attn", cfg, split=False)
        else:
            _gated_attention(c, f"{prefix}.self_attn", cfg)
        c.plain(f"{prefix}.mlp.gate", experts, hidden)
        for expert in range(experts):
            c.glu(f"{prefix}.mlp.experts.{expert}", hidden, cfg["moe_intermediate_size"])
        _shared_expert(c, f"{prefix}.mlp", cfg)
    _qwen_mtp(c, cfg)
    _ends(c, cfg)
    return c.tensors


_W123 = ("w1", "w3", "w2")


def _mixtral(cfg: Json, c: Collector | None = None) -> list[Tensor]:
    c = c or Collector()
    hidden, inner = cfg["hidden_size"], cfg["intermediate_size"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", cfg)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if experts := cfg.get("num_local_experts", 0):
            c.plain(f"{prefix}.block_sparse_moe.gate", experts, hidden)
            for expert in range(experts):
                c.glu(f"{prefix}.block_sparse_moe.experts.{expert}", hidden, inner, _W123)
        else:
            c.glu(f"{prefix}.mlp", hidden, inner)
    _ends(c, cfg)
    return c.tensors


def _mixtral_gptq(cfg: Json) -> list[Tensor]:
    return _mixtral(cfg, Gptq("F16"))


def _phimoe(cfg: Json) -> list[Tensor]:
    """Mixtral's shape with biases on attention, norms and LM head."""
    c = Collector()
    hidden = cfg["hidden_size"]
    c.add("model.embed_tokens.weight", cfg["vocab_size"], hidden)
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden, bias=True)
        _gqa(c, f"{prefix}.self_attn", cfg, bias=True, o_bias=True)
        c.norm(f"{prefix}.post_attention_layernorm", hidden, bias=True)
        c.plain(f"{prefix}.block_sparse_moe.gate", cfg["num_local_experts"], hidden)
        for expert in range(cfg["num_local_experts"]):
            c.glu(f"{prefix}.block_sparse_moe.experts.{expert}", hidden, cfg["intermediate_size"], _W123)
    c.norm("model.norm", hidden, bias=True)
    c.plain("lm_head", cfg["vocab_size"], hidden, bias=True)
    return c.tensors


def _phi3(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, inner = cfg["hidden_size"], cfg["intermediate_size"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.plain(f"{prefix}.self_attn.qkv_proj", 3 * hidden, hidden)
        c.plain(f"{prefix}.self_attn.o_proj", hidden, hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        c.plain(f"{prefix}.mlp.gate_up_proj", 2 * inner, hidden)
        c.plain(f"{prefix}.mlp.down_proj", hidden, inner)
    _ends(c, cfg)
    return c.tensors


def _gpt_oss(cfg: Json) -> list[Tensor]:
    """MXFP4 experts: blocks of 32 values in 16 bytes, one scale byte for each block."""
    c = Collector()
    hidden, inner, experts = cfg["hidden_size"], cfg["intermediate_size"], cfg["num_local_experts"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", cfg, bias=True, o_bias=True)
        c.add(f"{prefix}.self_attn.sinks", cfg["num_attention_heads"])
        c.plain(f"{prefix}.mlp.router", experts, hidden, bias=True)
        for proj, out, width in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            c.add(f"{prefix}.mlp.experts.{proj}_bias", experts, out)
            c.add(f"{prefix}.mlp.experts.{proj}_blocks", experts, out, width // 32, 16, dtype="U8")
            c.add(f"{prefix}.mlp.experts.{proj}_scales", experts, out, width // 32, dtype="U8")
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
    _ends(c, cfg)
    return c.tensors


def _minimax_m2(cfg: Json) -> list[Tensor]:
    c = Fp8Blocks()
    hidden, inner, head = cfg["hidden_size"], cfg["intermediate_size"], cfg["head_dim"]
    experts = cfg["num_local_experts"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        moe = f"{prefix}.block_sparse_moe"
        c.norm(f"{prefix}.input_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", cfg)
        c.norm(f"{prefix}.self_attn.q_norm", cfg["num_attention_heads"] * head)
        c.norm(f"{prefix}.self_attn.k_norm", cfg["num_key_value_heads"] * head)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        c.add(f"{moe}.e_score_correction_bias", experts, dtype="F32")
        c.add(f"{moe}.gate.weight", experts, hidden, dtype="F32")
        for expert in range(experts):
            c.glu(f"{moe}.experts.{expert}", hidden, inner, _W123)
    _ends(c, cfg)
    return c.tensors


def _minimax_text_01(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, head, heads = cfg["hidden_size"], cfg["head_dim"], cfg["num_attention_heads"]
    for layer, softmax in enumerate(cfg["attn_type_list"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if softmax:
            _gqa(c, f"{prefix}.self_attn", cfg)
        else:
            c.norm(f"{prefix}.self_attn.norm", heads * head)
            c.plain(f"{prefix}.self_attn.qkv_proj", 3 * heads * head, hidden)
            c.plain(f"{prefix}.self_attn.output_gate", heads * head, hidden)
            c.plain(f"{prefix}.self_attn.out_proj", hidden, heads * head)
        c.plain(f"{prefix}.block_sparse_moe.gate", cfg["num_local_experts"], hidden)
        for expert in range(cfg["num_local_experts"]):
            c.glu(f"{prefix}.block_sparse_moe.experts.{expert}", hidden, cfg["intermediate_size"], _W123)
    _ends(c, cfg)
    return c.tensors


def _mimo(cfg: Json) -> list[Tensor]:
    """Two kinds of attention with their own heads; q, k, v in FP8, o in BF16; three dense MTP layers."""
    c = Fp8Blocks()
    hidden = cfg["hidden_size"]

    def attention(prefix: str, sliding: bool) -> None:
        swa = "swa_" if sliding else ""
        heads = cfg[f"{swa}num_attention_heads"]
        kv, head = cfg[f"{swa}num_key_value_heads"], cfg[f"{swa}head_dim"]
        value = cfg[f"{swa}v_head_dim"]
        c.linear(f"{prefix}.q_proj", heads * head, hidden)
        c.linear(f"{prefix}.k_proj", kv * head, hidden)
        c.linear(f"{prefix}.v_proj", kv * value, hidden)
        c.plain(f"{prefix}.o_proj", hidden, heads * value)
        if sliding:
            c.add(f"{prefix}.attention_sink_bias", heads)

    for layer, (sliding, sparse) in enumerate(zip(cfg["hybrid_layer_pattern"], cfg["moe_layer_freq"], strict=True)):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        attention(f"{prefix}.self_attn", bool(sliding))
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if sparse:
            _deepseek_moe(c, f"{prefix}.mlp", cfg)
        else:
            c.glu(f"{prefix}.mlp", hidden, cfg["intermediate_size"])
    for layer in range(3):
        prefix = f"model.mtp.layers.{layer}"
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            c.norm(f"{prefix}.{norm}", hidden)
        c.plain(f"{prefix}.eh_proj", hidden, 2 * hidden)
        attention(f"{prefix}.self_attn", True)
        c.glu(f"{prefix}.mlp", hidden, cfg["intermediate_size"])
    _ends(c, cfg)
    return c.tensors


def _jamba(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, rank, state = cfg["hidden_size"], cfg["mamba_dt_rank"], cfg["mamba_d_state"]
    inner = cfg["mamba_expand"] * hidden
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        if layer % cfg["attn_layer_period"] == cfg["attn_layer_offset"]:
            _gqa(c, f"{prefix}.self_attn", cfg)
        else:
            mamba = f"{prefix}.mamba"
            c.add(f"{mamba}.A_log", inner, state)
            c.add(f"{mamba}.D", inner)
            c.add(f"{mamba}.conv1d.weight", inner, 1, cfg["mamba_d_conv"])
            c.add(f"{mamba}.conv1d.bias", inner)
            c.plain(f"{mamba}.in_proj", 2 * inner, hidden)
            c.plain(f"{mamba}.x_proj", rank + 2 * state, inner)
            c.plain(f"{mamba}.dt_proj", inner, rank, bias=True)
            c.plain(f"{mamba}.out_proj", hidden, inner)
            c.norm(f"{mamba}.dt_layernorm", rank)
            c.norm(f"{mamba}.b_layernorm", state)
            c.norm(f"{mamba}.c_layernorm", state)
        c.norm(f"{prefix}.pre_ff_layernorm", hidden)
        if layer % cfg["expert_layer_period"] == cfg["expert_layer_offset"]:
            c.plain(f"{prefix}.feed_forward.router", cfg["num_experts"], hidden)
            for expert in range(cfg["num_experts"]):
                c.glu(f"{prefix}.feed_forward.experts.{expert}", hidden, cfg["intermediate_size"])
        else:
            c.glu(f"{prefix}.feed_forward", hidden, cfg["intermediate_size"])
    c.add("model.embed_tokens.weight", cfg["vocab_size"], hidden)
    c.norm("model.final_layernorm", hidden)
    c.add("lm_head.weight", cfg["vocab_size"], hidden)
    return c.tensors


def _dbrx(cfg: Json) -> list[Tensor]:
    """Experts fused in two dimensions, ``[E*I, H]``."""
    c = Collector()
    hidden, attn, ffn = cfg["d_model"], cfg["attn_config"], cfg["ffn_config"]
    head = hidden // cfg["n_heads"]
    experts, inner = ffn["moe_num_experts"], ffn["ffn_hidden_size"]
    c.add("transformer.wte.weight", cfg["vocab_size"], hidden)
    for block in range(cfg["n_layers"]):
        prefix = f"transformer.blocks.{block}"
        for matrix in ("v1", "w1", "w2"):
            c.add(f"{prefix}.ffn.experts.mlp.{matrix}", experts * inner, hidden)
        c.plain(f"{prefix}.ffn.router.layer", experts, hidden)
        c.plain(f"{prefix}.norm_attn_norm.attn.Wqkv", hidden + 2 * attn["kv_n_heads"] * head, hidden)
        c.plain(f"{prefix}.norm_attn_norm.attn.out_proj", hidden, hidden)
        c.norm(f"{prefix}.norm_attn_norm.norm_1", hidden)
        c.norm(f"{prefix}.norm_attn_norm.norm_2", hidden)
    c.norm("transformer.norm_f", hidden)
    c.add("lm_head.weight", cfg["vocab_size"], hidden)
    return c.tensors


def _gemma4(cfg: Json) -> list[Tensor]:
    """A dense MLP beside fused experts in every layer; full-attention layers have no ``v_proj``."""
    c, text, vision = Collector(), cfg["text_config"], cfg["vision_config"]
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    experts, inner = text["num_experts"], text["moe_intermediate_size"]
    for layer, kind in enumerate(text["layer_types"]):
        prefix = f"model.language_model.layers.{layer}"
        full = kind == "full_attention"
        head = text["global_head_dim"] if full else text["head_dim"]
        kv = text["num_global_key_value_heads"] if full else text["num_key_value_heads"]
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            c.norm(f"{prefix}.{norm}_layernorm", hidden)
        for norm in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"):
            c.norm(f"{prefix}.{norm}", hidden)
        c.add(f"{prefix}.layer_scalar", 1)
        c.plain(f"{prefix}.self_attn.q_proj", heads * head, hidden)
        c.plain(f"{prefix}.self_attn.k_proj", kv * head, hidden)
        if not full:
            c.plain(f"{prefix}.self_attn.v_proj", kv * head, hidden)
        c.plain(f"{prefix}.self_attn.o_proj", hidden, heads * head)
        c.norm(f"{prefix}.self_attn.q_norm", head)
        c.norm(f"{prefix}.self_attn.k_norm", head)
        c.glu(f"{prefix}.mlp", hidden, text["intermediate_size"])
        c.plain(f"{prefix}.router.proj", experts, hidden)
        c.add(f"{prefix}.router.scale", hidden)
        c.add(f"{prefix}.router.per_expert_scale", experts)
        c.add(f"{prefix}.experts.gate_up_proj", experts, 2 * inner, hidden)
        c.add(f"{prefix}.experts.down_proj", experts, hidden, inner)
    tower, width = "model.vision_tower", vision["hidden_size"]
    c.plain(f"{tower}.patch_embedder.input_proj", width, 3 * vision["patch_size"] ** 2)
    c.add(f"{tower}.patch_embedder.position_embedding_table", 2, vision["position_embedding_size"], width)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            c.norm(f"{prefix}.{norm}_layernorm", width)
        for proj in ("q", "k", "v", "o"):
            c.plain(f"{prefix}.self_attn.{proj}_proj.linear", width, width)
        c.norm(f"{prefix}.self_attn.q_norm", vision["head_dim"])
        c.norm(f"{prefix}.self_attn.k_norm", vision["head_dim"])
        c.plain(f"{prefix}.mlp.gate_proj.linear", vision["intermediate_size"], width)
        c.plain(f"{prefix}.mlp.up_proj.linear", vision["intermediate_size"], width)
        c.plain(f"{prefix}.mlp.down_proj.linear", width, vision["intermediate_size"])
    c.add(f"{tower}.std_bias", width)
    c.add(f"{tower}.std_scale", width)
    c.plain("model.embed_vision.embedding_projection", hidden, width)
    _ends(c, text, "model.language_model.")
    return c.tensors


def _gemma3(cfg: Json) -> list[Tensor]:
    """Text part and SigLIP tower of Gemma 3; class defaults stand in for what the config leaves out."""
    c, vision = Collector(), cfg["vision_config"]
    defaults = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
    text = {**defaults, **cfg["text_config"]}
    hidden = text["hidden_size"]
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            c.norm(f"{prefix}.{norm}_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", text)
        c.norm(f"{prefix}.self_attn.q_norm", text["head_dim"])
        c.norm(f"{prefix}.self_attn.k_norm", text["head_dim"])
        c.glu(f"{prefix}.mlp", hidden, text["intermediate_size"])
    c.add("language_model.model.embed_tokens.weight", text["vocab_size"], hidden)
    c.norm("language_model.model.norm", hidden)
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    tower = "vision_tower.vision_model"
    patch = vision["patch_size"]
    c.add(f"{tower}.embeddings.patch_embedding.weight", width, 3, patch, patch)
    c.add(f"{tower}.embeddings.patch_embedding.bias", width)
    c.add(f"{tower}.embeddings.position_embedding.weight", (vision["image_size"] // patch) ** 2, width)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        c.norm(f"{prefix}.layer_norm1", width, bias=True)
        c.norm(f"{prefix}.layer_norm2", width, bias=True)
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            c.plain(f"{prefix}.self_attn.{proj}", width, width, bias=True)
        c.plain(f"{prefix}.mlp.fc1", inner, width, bias=True)
        c.plain(f"{prefix}.mlp.fc2", width, inner, bias=True)
    c.norm(f"{tower}.post_layernorm", width, bias=True)
    c.add("multi_modal_projector.mm_input_projection_weight", width, hidden)
    c.norm("multi_modal_projector.mm_soft_emb_norm", width)
    return c.tensors


def _switch(cfg: Json) -> list[Tensor]:
    """Encoder and decoder; every second layer is sparse; one table serves both embeddings and the head."""
    c = Collector("F32")
    hidden, inner, experts = cfg["d_model"], cfg["d_ff"], cfg["num_experts"]
    width = cfg["num_heads"] * cfg["d_kv"]

    def attention(prefix: str, biased: bool) -> None:
        for proj in ("q", "k", "v"):
            c.plain(f"{prefix}.{proj}", width, hidden)
        c.plain(f"{prefix}.o", hidden, width)
        if biased:
            c.add(f"{prefix}.relative_attention_bias.weight", cfg["relative_attention_num_buckets"], cfg["num_heads"])

    c.add("shared.weight", cfg["vocab_size"], hidden)
    for side, layers, step in (
        ("encoder", cfg["num_layers"], cfg["encoder_sparse_step"]),
        ("decoder", cfg["num_decoder_layers"], cfg["decoder_sparse_step"]),
    ):
        for layer in range(layers):
            prefix = f"{side}.block.{layer}.layer"
            attention(f"{prefix}.0.SelfAttention", layer == 0)
            c.norm(f"{prefix}.0.layer_norm", hidden)
            last = 1
            if side == "decoder":
                attention(f"{prefix}.1.EncDecAttention", False)
                c.norm(f"{prefix}.1.layer_norm", hidden)
                last = 2
            if layer % step == 1:
                for expert in range(experts):
                    c.plain(f"{prefix}.{last}.mlp.experts.expert_{expert}.wi", inner, hidden)
                    c.plain(f"{prefix}.{last}.mlp.experts.expert_{expert}.wo", hidden, inner)
                c.plain(f"{prefix}.{last}.mlp.router.classifier", experts, hidden)
            else:
                c.plain(f"{prefix}.{last}.mlp.wi", inner, hidden)
                c.plain(f"{prefix}.{last}.mlp.wo", hidden, inner)
            c.norm(f"{prefix}.{last}.layer_norm", hidden)
        c.norm(f"{side}.final_layer_norm", hidden)
    return c.tensors


def _granitemoe(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, inner, experts = cfg["hidden_size"], cfg["intermediate_size"], cfg["num_local_experts"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.add(f"{prefix}.block_sparse_moe.input_linear.weight", experts, 2 * inner, hidden)
        c.add(f"{prefix}.block_sparse_moe.output_linear.weight", experts, hidden, inner)
        c.plain(f"{prefix}.block_sparse_moe.router.layer", experts, hidden)
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", cfg)
    _ends(c, cfg)
    return c.tensors


def _bailing(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, head = cfg["hidden_size"], _head_dim(cfg)
    c.add("model.word_embeddings.weight", cfg["vocab_size"], hidden)
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        qkv = (cfg["num_attention_heads"] + 2 * cfg["num_key_value_heads"]) * head
        c.plain(f"{prefix}.attention.query_key_value", qkv, hidden)
        c.plain(f"{prefix}.attention.dense", hidden, cfg["num_attention_heads"] * head)
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        c.plain(f"{prefix}.mlp.gate", cfg["num_experts"], hidden)
        for expert in range(cfg["num_experts"]):
            c.glu(f"{prefix}.mlp.experts.{expert}", hidden, cfg["moe_intermediate_size"])
        c.glu(f"{prefix}.mlp.shared_experts", hidden, cfg["moe_intermediate_size"] * cfg["num_shared_experts"])
    c.norm("model.norm", hidden)
    c.add("lm_head.weight", cfg["vocab_size"], hidden)
    return c.tensors


def _llama4(cfg: Json) -> list[Tensor]:
    """Experts fused and transposed; the tower's sizes are the published ones (the stored config leaves it out)."""
    c, text = Collector(), cfg.get("text_config", cfg)
    hidden, inner, experts = text["hidden_size"], text["intermediate_size"], text["num_local_experts"]
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", text)
        c.add(f"{prefix}.feed_forward.experts.gate_up_proj", experts, hidden, 2 * inner)
        c.add(f"{prefix}.feed_forward.experts.down_proj", experts, inner, hidden)
        c.plain(f"{prefix}.feed_forward.router", experts, hidden)
        c.glu(f"{prefix}.feed_forward.shared_expert", hidden, inner)
    c.add("language_model.model.embed_tokens.weight", text["vocab_size"], hidden)
    c.norm("language_model.model.norm", hidden)
    c.add("language_model.lm_head.weight", text["vocab_size"], hidden)
    width, wide, project = 1408, 5632, 4096
    c.plain("multi_modal_projector.linear_1", hidden, project)
    c.add("vision_model.class_embedding", width)
    c.add("vision_model.positional_embedding_vlm", 24 * 24 + 1, width)
    c.plain("vision_model.patch_embedding.linear", width, 3 * 14 * 14)
    c.norm("vision_model.layernorm_pre", width, bias=True)
    c.norm("vision_model.layernorm_post", width, bias=True)
    for layer in range(34):
        prefix = f"vision_model.model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", width, bias=True)
        c.norm(f"{prefix}.post_attention_layernorm", width, bias=True)
        for proj in ("q", "k", "v", "o"):
            c.plain(f"{prefix}.self_attn.{proj}_proj", width, width, bias=True)
        c.plain(f"{prefix}.mlp.fc1", wide, width, bias=True)
        c.plain(f"{prefix}.mlp.fc2", width, wide, bias=True)
    c.plain("vision_model.vision_adapter.mlp.fc1", project, wide)
    c.plain("vision_model.vision_adapter.mlp.fc2", project, project)
    return c.tensors


def _nemotron_h(cfg: Json) -> list[Tensor]:
    """One mixer in a layer: Mamba-2, attention or experts without a gate projection."""
    c = Collector()
    hidden, head = cfg["hidden_size"], cfg["head_dim"]
    heads = cfg["mamba_num_heads"]
    inner = heads * cfg["mamba_head_dim"]
    conv = inner + 2 * cfg["n_groups"] * cfg["ssm_state_size"]
    experts = cfg["n_routed_experts"]
    c.add("backbone.embeddings.weight", cfg["vocab_size"], hidden)
    for layer, kind in enumerate(cfg["hybrid_override_pattern"]):
        prefix = f"backbone.layers.{layer}"
        mixer = f"{prefix}.mixer"
        c.norm(f"{prefix}.norm", hidden)
        if kind == "M":
            c.add(f"{mixer}.A_log", heads)
            c.add(f"{mixer}.D", heads)
            c.add(f"{mixer}.conv1d.weight", conv, 1, cfg["conv_kernel"])
            c.add(f"{mixer}.conv1d.bias", conv)
            c.add(f"{mixer}.dt_bias", heads)
            c.plain(f"{mixer}.in_proj", inner + conv + heads, hidden)
            c.norm(f"{mixer}.norm", inner)
            c.plain(f"{mixer}.out_proj", hidden, inner)
        elif kind == "*":
            c.plain(f"{mixer}.q_proj", cfg["num_attention_heads"] * head, hidden)
            c.plain(f"{mixer}.k_proj", cfg["num_key_value_heads"] * head, hidden)
            c.plain(f"{mixer}.v_proj", cfg["num_key_value_heads"] * head, hidden)
            c.plain(f"{mixer}.o_proj", hidden, cfg["num_attention_heads"] * head)
        else:
            c.add(f"{mixer}.gate.weight", experts, hidden, dtype="F32")
            c.add(f"{mixer}.gate.e_score_correction_bias", experts, dtype="F32")
            for expert in range(experts):
                c.plain(f"{mixer}.experts.{expert}.up_proj", cfg["moe_intermediate_size"], hidden)
                c.plain(f"{mixer}.experts.{expert}.down_proj", hidden, cfg["moe_intermediate_size"])
            shared = cfg["moe_shared_expert_intermediate_size"]
            c.plain(f"{mixer}.shared_experts.up_proj", shared, hidden)
            c.plain(f"{mixer}.shared_experts.down_proj", hidden, shared)
    c.norm("backbone.norm_f", hidden)
    c.add("lm_head.weight", cfg["vocab_size"], hidden)
    return c.tensors


def _step3p7(cfg: Json) -> list[Tensor]:
    """Fused ``moe.*_proj`` without the word experts, sliding layers with 96 query heads, 3 dense MTP layers, tower."""
    c = Collector()
    hidden, head, kv = cfg["hidden_size"], cfg["head_dim"], cfg["num_key_value_heads"]
    layers, experts, inner = cfg["num_hidden_layers"], cfg["num_experts"], cfg["moe_intermediate_size"]
    kinds = list(cfg["layer_types"]) + ["sliding_attention"] * cfg["num_nextn_predict_layers"]
    for layer, kind in enumerate(kinds):
        prefix = f"model.layers.{layer}"
        attn = f"{prefix}.self_attn"
        heads = cfg["num_attention_heads"] if kind == "full_attention" else 96
        if layer >= layers:
            c.norm(f"{prefix}.enorm", hidden)
            c.norm(f"{prefix}.hnorm", hidden)
            c.plain(f"{prefix}.eh_proj", hidden, 2 * hidden)
            c.norm(f"{prefix}.transformer.shared_head.norm", hidden)
            c.plain(f"{prefix}.transformer.shared_head.output", cfg["vocab_size"], hidden)
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.plain(f"{attn}.q_proj", heads * head, hidden)
        c.plain(f"{attn}.k_proj", kv * head, hidden)
        c.plain(f"{attn}.v_proj", kv * head, hidden)
        c.plain(f"{attn}.o_proj", hidden, heads * head)
        c.plain(f"{attn}.g_proj", heads, hidden)
        c.norm(f"{attn}.q_norm", head)
        c.norm(f"{attn}.k_norm", head)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if layer < cfg["first_k_dense_replace"] or layer >= layers:
            c.glu(f"{prefix}.mlp", hidden, cfg["intermediate_size"])
            continue
        c.plain(f"{prefix}.moe.gate", experts, hidden)
        c.add(f"{prefix}.moe.router_bias", experts, dtype="F32")
        c.add(f"{prefix}.moe.gate_proj.weight", experts, inner, hidden)
        c.add(f"{prefix}.moe.up_proj.weight", experts, inner, hidden)
        c.add(f"{prefix}.moe.down_proj.weight", experts, hidden, inner)
        c.glu(f"{prefix}.share_expert", hidden, cfg["share_expert_dim"])
    width, wide = 1536, 8960
    c.add("vision_model.conv1.weight", width, 3, 14, 14)
    c.add("vision_model.positional_embedding", 52 * 52, width)
    c.norm("vision_model.ln_pre", width, bias=True)
    for block in range(47):
        prefix = f"vision_model.transformer.resblocks.{block}"
        c.add(f"{prefix}.attn.in_proj_weight", 3 * width, width)
        c.add(f"{prefix}.attn.in_proj_bias", 3 * width)
        c.plain(f"{prefix}.attn.out_proj", width, width, bias=True)
        c.norm(f"{prefix}.ln_1", width, bias=True)
        c.norm(f"{prefix}.ln_2", width, bias=True)
        c.add(f"{prefix}.ls_1.gamma", width)
        c.add(f"{prefix}.ls_2.gamma", width)
        c.plain(f"{prefix}.mlp.c_fc", wide, width, bias=True)
        c.plain(f"{prefix}.mlp.c_proj", width, wide, bias=True)
    c.add("vision_model.vit_downsampler1.weight", 2 * width, width, 3, 3)
    c.add("vision_model.vit_downsampler1.bias", 2 * width)
    c.add("vision_model.vit_downsampler2.weight", 4 * width, 2 * width, 3, 3)
    c.add("vision_model.vit_downsampler2.bias", 4 * width)
    c.plain("vit_large_projector", hidden, 4 * width)
    _ends(c, cfg)
    return c.tensors


def _hunyuan(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, head = cfg["hidden_size"], cfg["attention_head_dim"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        inner = cfg["moe_intermediate_size"][layer]
        c.norm(f"{prefix}.input_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", {**cfg, "head_dim": head})
        c.norm(f"{prefix}.self_attn.query_layernorm", head)
        c.norm(f"{prefix}.self_attn.key_layernorm", head)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        c.plain(f"{prefix}.mlp.gate.wg", cfg["num_experts"], hidden)
        for expert in range(cfg["num_experts"]):
            c.glu(f"{prefix}.mlp.experts.{expert}", hidden, inner)
        c.glu(f"{prefix}.mlp.shared_mlp", hidden, inner * cfg["num_shared_expert"][layer])
    _ends(c, cfg)
    return c.tensors


def _kimi_linear(cfg: Json) -> list[Tensor]:
    """KDA layers and MLA layers (numbered from 1 in the config), Mixtral's expert names, DeepSeek's router."""
    c = Collector()
    hidden, linear = cfg["hidden_size"], cfg["linear_attn_config"]
    heads, head, kernel = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    width = heads * head
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attn = f"{prefix}.self_attn"
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if layer + 1 in linear["full_attn_layers"]:
            _mla(c, attn, cfg)
        else:
            c.add(f"{attn}.A_log", 1, 1, heads, 1, dtype="F32")
            c.add(f"{attn}.dt_bias", width, dtype="F32")
            for proj in ("q", "k", "v"):
                c.plain(f"{attn}.{proj}_proj", width, hidden)
                c.add(f"{attn}.{proj}_conv1d.weight", width, 1, kernel)
            for gate in ("f", "g"):
                c.plain(f"{attn}.{gate}_a_proj", head, hidden)
                c.plain(f"{attn}.{gate}_b_proj", width, head)
            c.plain(f"{attn}.b_proj", heads, hidden)
            c.norm(f"{attn}.o_norm", head)
            c.plain(f"{attn}.o_proj", hidden, width)
        if layer < cfg["first_k_dense_replace"]:
            c.glu(f"{prefix}.mlp", hidden, cfg["intermediate_size"])
            continue
        moe = f"{prefix}.block_sparse_moe"
        c.plain(f"{moe}.gate", cfg["num_experts"], hidden)
        c.add(f"{moe}.gate.e_score_correction_bias", cfg["num_experts"], dtype="F32")
        for expert in range(cfg["num_experts"]):
            c.glu(f"{moe}.experts.{expert}", hidden, cfg["moe_intermediate_size"], _W123)
        c.glu(f"{moe}.shared_experts", hidden, cfg["moe_intermediate_size"] * cfg["num_shared_experts"])
    _ends(c, cfg)
    return c.tensors


def _ernie_vl(cfg: Json) -> list[Tensor]:
    """The text part: experts 0-63 for text, 64-127 (narrower) for vision tokens, two routers in one layer."""
    c = Collector()
    hidden = cfg["hidden_size"]
    groups, widths = cfg["moe_num_experts"], cfg["moe_intermediate_size"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        _gqa(c, f"{prefix}.self_attn", cfg)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if not cfg["moe_layer_start_index"][0] <= layer <= cfg["moe_layer_end_index"][0]:
            c.glu(f"{prefix}.mlp", hidden, cfg["intermediate_size"])
            continue
        c.add(f"{prefix}.mlp.gate.weight", hidden, groups[0], dtype="F32")
        c.add(f"{prefix}.mlp.gate.weight_1", hidden, groups[1], dtype="F32")
        c.add(f"{prefix}.mlp.moe_statics.e_score_correction_bias", 2, groups[0], dtype="F32")
        for expert in range(groups[0] + groups[1]):
            c.glu(f"{prefix}.mlp.experts.{expert}", hidden, widths[expert >= groups[0]])
        c.glu(f"{prefix}.mlp.shared_experts", hidden, widths[0] * cfg["moe_num_shared_experts"])
    _ends(c, cfg)
    return c.tensors


# --- configs that are not in data/models: written out from the published architecture ----------------------------

_GPT_OSS_120B: Json = {"num_hidden_layers": 36, "num_local_experts": 128}  # on top of the 20b config

_QWEN3_NEXT: Json = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_KIMI_LINEAR: Json = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "dtype": "bfloat16",
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

_MINIMAX_TEXT_01: Json = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "model_type": "minimax_text_01",
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "head_dim": 128,
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "max_position_embeddings": 10240000,
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rotary_dim": 64,
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 200064,
}

_SIGLIP: Json = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}

_GEMMA3_27B: Json = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": _SIGLIP,
}

# What Gemma-3-4B leaves to the class defaults: heads 8, kv heads 4, head_dim 256, pattern 6, context 131072.
_GEMMA3_4B: Json = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": _SIGLIP,
}

_MISTRAL_7B: Json = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}

# On top of the Mixtral config.
_GPTQ: Json = {
    "quantization_config": {"bits": 4, "desc_act": True, "group_size": 128, "quant_method": "gptq", "sym": True},
    "torch_dtype": "bfloat16",
}

_ERNIE_VL: Json = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "model_type": "ernie4_5_moe_vl",
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "moe_layer_start_index": [1, 1],
    "moe_num_experts": [64, 64],
    "moe_num_shared_experts": 2,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "vocab_size": 103424,
}


# --- the catalogue ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    build: Callable[[Json], list[Tensor]]
    shards: int | None = None  # published count; None: cut at 5 GB
    pattern: str = "model-{:05d}-of-{:05d}.safetensors"
    first: int = 1  # number of the first shard
    assumed: str = ""
    config: Callable[[], Json] | None = None  # for configs written out above
    library_writer: bool = True
    by_layer: bool = False  # one file a layer, the ends in the first and the last
    index_of: str | None = None  # folder of the real index, when it is not the model's own


_DTYPES = "dtypes of router, norms and biases; shard borders"
_BORDERS = "shard borders"
_WRITTEN = "config written out from the published architecture; "

_CATALOGUE: dict[str, _Entry] = {
    "MiniMaxAI/MiniMax-M2.5": _Entry(
        _minimax_m2, assumed="MTP modules are not shipped; router weight in F32; shard count and borders"
    ),
    "Qwen/Qwen3-30B-A3B": _Entry(_qwen3),
    "Qwen/Qwen3-30B-A3B-FP8": _Entry(_qwen3_fp8, shards=7, assumed=_BORDERS),
    "Qwen/Qwen3-8B": _Entry(_qwen3, shards=5, assumed=_BORDERS),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": _Entry(_qwen3_vl, shards=13, assumed=_BORDERS),
    "Qwen/Qwen3.5-35B-A3B": _Entry(
        _qwen3_5,
        shards=14,
        pattern="model.safetensors-{:05d}-of-{:05d}.safetensors",
        assumed="linear_attn.A_log and linear_attn.norm in F32; shard borders",
    ),
    "XiaomiMiMo/MiMo-V2-Flash": _Entry(
        _mimo, assumed="o_proj in BF16; three MTP layers; dtypes of router and sinks; shard count and borders"
    ),
    "ai21labs/AI21-Jamba-Mini-1.6": _Entry(_jamba, shards=21, assumed=_DTYPES),
    "allenai/OLMoE-1B-7B-0924": _Entry(_qwen3),
    "databricks/dbrx-instruct": _Entry(_dbrx, shards=61, assumed=_BORDERS),
    "deepseek-ai/DeepSeek-V2-Lite": _Entry(
        _deepseek_bf16, shards=4, pattern="model-{:05d}-of-{:06d}.safetensors", assumed=_BORDERS
    ),
    "deepseek-ai/DeepSeek-V3": _Entry(
        _deepseek_fp8,
        shards=163,
        pattern="model-{:05d}-of-{:06d}.safetensors",
        library_writer=False,
        assumed=_BORDERS,
    ),
    "deepseek-ai/DeepSeek-V3.2": _Entry(
        _deepseek_fp8,
        shards=163,
        pattern="model-{:05d}-of-{:06d}.safetensors",
        library_writer=False,
        assumed="indexer: k_norm in F32, weights_proj in BF16, wq_b and wk in FP8; shard borders",
    ),
    "deepseek-ai/deepseek-moe-16b-base": _Entry(_deepseek_bf16, shards=7, assumed=_BORDERS),
    "google/gemma-4-26B-A4B": _Entry(_gemma4, shards=2, assumed=_DTYPES),
    "google/switch-base-128": _Entry(
        _switch, assumed="one shared table for both embeddings and the head; written by current transformers, at 5 GB"
    ),
    "ibm-granite/granite-3.1-1b-a400m-base": _Entry(_granitemoe, shards=1, assumed="BF16"),
    "inclusionAI/Ling-lite-base": _Entry(_bailing, shards=4, assumed=_BORDERS),
    "meta-llama/Llama-3.1-8B": _Entry(_mixtral, shards=4, assumed=_BORDERS),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": _Entry(
        _llama4, shards=50, assumed="sizes of the vision tower are the published ones, not in the config; shard borders"
    ),
    "microsoft/Phi-3.5-MoE-instruct": _Entry(_phimoe, shards=17, assumed=_BORDERS),
    "microsoft/phi-3-mini-4k-instruct": _Entry(_phi3),
    "mistralai/Mixtral-8x7B-v0.1": _Entry(_mixtral, index_of="mistralai__Mixtral-8x7B-v0.1--yangulei"),
    "moonshotai/Kimi-K2-Instruct": _Entry(
        _deepseek_fp8,
        pattern="model-{:d}-of-{:d}.safetensors",
        by_layer=True,
        assumed="names are DeepSeek-V3's; files of a public listing are 192 bytes longer (metadata, presumably)",
    ),
    "nvidia/DeepSeek-V3.1-NVFP4": _Entry(
        _deepseek_nvfp4,
        assumed="MTP layer kept whole in BF16; no k_scale and v_scale tensors; shard count and borders",
    ),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": _Entry(
        _nemotron_h, shards=13, assumed="A_log, D and dt_bias in BF16, router in F32; shard borders"
    ),
    "openai/gpt-oss-20b": _Entry(_gpt_oss),
    "stepfun-ai/Step-3.7-Flash": _Entry(
        _step3p7,
        assumed="96 query heads in sliding and MTP layers and the tower's sizes (published, not in the config); "
        "BF16 checkpoint with router_bias in F32; shard count and borders",
    ),
    "tencent/Hunyuan-A13B-Instruct": _Entry(_hunyuan, assumed="router in BF16; shard count and borders"),
    "zai-org/GLM-5": _Entry(
        _glm5, assumed="MTP layer without own embedding and head; dtypes of the indexer; shard count and borders"
    ),
    # Shapes of the error table that have no config in data/models.
    "Qwen/Qwen3-Next-80B-A3B-Instruct": _Entry(
        _qwen3_next, shards=41, config=lambda: _QWEN3_NEXT, assumed=_WRITTEN + _BORDERS
    ),
    "openai/gpt-oss-120b": _Entry(
        _gpt_oss,
        shards=15,
        pattern="model-{:05d}-of-{:05d}.safetensors",
        first=0,
        config=lambda: _deeper(_load_config("openai/gpt-oss-20b"), _GPT_OSS_120B),
        assumed=_WRITTEN + _BORDERS,
    ),
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": _Entry(
        _kimi_linear, shards=20, config=lambda: _KIMI_LINEAR, assumed=_WRITTEN + "A_log and dt_bias in F32; " + _BORDERS
    ),
    "MiniMaxAI/MiniMax-Text-01": _Entry(
        _minimax_text_01, config=lambda: _MINIMAX_TEXT_01, assumed=_WRITTEN + "BF16; shard count and borders"
    ),
    "google/gemma-3-27b-it": _Entry(_gemma3, shards=12, config=lambda: _GEMMA3_27B, assumed=_WRITTEN + _BORDERS),
    "google/gemma-3-4b-it": _Entry(_gemma3, shards=2, config=lambda: _GEMMA3_4B, assumed=_WRITTEN + _BORDERS),
    "mistralai/Mistral-7B-v0.1": _Entry(_mixtral, shards=2, config=lambda: _MISTRAL_7B, assumed=_WRITTEN + _BORDERS),
    "TheBloke/Mixtral-8x7B-v0.1-GPTQ": _Entry(
        _mixtral_gptq,
        shards=1,
        config=lambda: {**_load_config("mistralai/Mixtral-8x7B-v0.1"), **_GPTQ},
        assumed="4 bit, groups of 128 with g_idx; router, norms, embedding and head unpacked in F16",
    ),
    "baidu/ERNIE-4.5-VL-28B-A3B-PT": _Entry(
        _ernie_vl, config=lambda: _ERNIE_VL, assumed=_WRITTEN + "without vision tower and resampler; " + _BORDERS
    ),
}

NAMES: tuple[str, ...] = tuple(_CATALOGUE)
"""Every repository that can be rebuilt, as ``org/name``."""

STORED: tuple[str, ...] = tuple(name for name, entry in _CATALOGUE.items() if entry.config is None)
"""Those whose config.json is a real one, kept in ``data/models``."""


def _deeper(base: Json, over: Json) -> Json:
    """The 20b config with the sizes of its larger sibling; the layer list alternates the same way."""
    merged = {**base, **over}
    merged["layer_types"] = ["sliding_attention", "full_attention"] * (merged["num_hidden_layers"] // 2)
    return merged


def _folder(name: str) -> Path:
    return MODELS / name.replace("/", "__")


def _load_config(name: str, file: str = "config.json") -> Json:
    loaded: Json = json.loads((_folder(name) / file).read_bytes())
    return loaded


def config_variants(name: str) -> list[str]:
    """The stored config files of a repository: ``config.json`` first, then other copies of it."""
    return sorted((path.name for path in _folder(name).glob("config*.json")), key=lambda file: (len(file), file))


def stored_index(name: str) -> bytes | None:
    """The real ``model.safetensors.index.json``, if it is kept here."""
    entry = _CATALOGUE[name]
    path = (MODELS / entry.index_of if entry.index_of else _folder(name)) / "model.safetensors.index.json.gz"
    return gzip.decompress(path.read_bytes()) if path.exists() else None


def _cut(tensors: Sequence[Tensor], entry: _Entry) -> dict[str, list[Tensor]]:
    """Shards in checkpoint order: a layer each, the published number of about equal bytes, or files of up to 5 GB."""
    sizes = [tensor.nbytes for tensor in tensors]
    groups: list[list[Tensor]] = []
    if entry.by_layer:
        layer = 0
        for tensor in tensors:
            if found := re.match(r"model\.layers\.(\d+)\.", tensor.name):
                layer = int(found[1])
            groups += [[] for _ in range(layer + 1 - len(groups))]
            groups[layer].append(tensor)
    elif entry.shards is None:
        room = 0
        for tensor, size in zip(tensors, sizes, strict=True):
            if not groups or size > room:
                groups.append([])
                room = 5_000_000_000
            groups[-1].append(tensor)
            room -= size
    else:
        total, done = sum(sizes), 0
        groups = [[] for _ in range(entry.shards)]
        for tensor, size in zip(tensors, sizes, strict=True):
            groups[min((done + size // 2) * entry.shards // total, entry.shards - 1)].append(tensor)
            done += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    last = len(groups) - 1 + entry.first
    return {entry.pattern.format(i + entry.first, last): group for i, group in enumerate(groups)}


def _by_index(name: str, tensors: Sequence[Tensor], index: bytes) -> dict[str, list[Tensor]]:
    weight_map: dict[str, str] = json.loads(index)["weight_map"]
    known = {tensor.name: tensor for tensor in tensors}
    if known.keys() != weight_map.keys():
        missing, extra = weight_map.keys() - known.keys(), known.keys() - weight_map.keys()
        raise ValueError(f"{name}: index has {sorted(missing)[:3]} more, the rules have {sorted(extra)[:3]} more")
    shards: dict[str, list[Tensor]] = {shard: [] for shard in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        shards[shard].append(known[tensor])
    return shards


@lru_cache(maxsize=8)
def spec(name: str, config: str = "config.json") -> RepoSpec:
    """The repository's tensors, shards and small files; nothing is written. Kept for the last few calls."""
    entry = _CATALOGUE[name]
    cfg = entry.config() if entry.config else _load_config(name, config)
    tensors = entry.build(cfg if entry.config or config == "config.json" else _load_config(name))
    index = stored_index(name)
    shards = _by_index(name, tensors, index) if index else _cut(tensors, entry)
    small = {"config.json": json.dumps(cfg, indent=2).encode()}
    if entry.config is None:
        small["config.json"] = (_folder(name) / config).read_bytes()
    if (quant := _folder(name) / "hf_quant_config.json").exists():
        small["hf_quant_config.json"] = quant.read_bytes()
    if index or len(shards) > 1:
        small["model.safetensors.index.json"] = index or _index_bytes(shards)
    return RepoSpec(name, cfg, shards, small, index is not None, entry.library_writer, entry.assumed)


def headers(name: str) -> Iterator[tuple[str, bytes, int]]:
    """File name, first ``8 + n`` bytes and whole length of each safetensors file, for a server that makes up data."""
    repo = spec(name)
    for shard, tensors in repo.shards.items():
        head, length = header_bytes(tensors, align=repo.library_writer, order=repo.library_writer)
        yield shard, head, length


def build(name: str, folder: str | Path, *, config: str = "config.json", index: bool = True) -> RepoSpec:
    """Writes the repository into ``folder`` (made if missing): small files and sparse safetensors files.

    ``config`` picks another stored copy of the config; it is written as ``config.json``.
    """
    repo = spec(name, config)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for file, data in repo.small_files.items():
        if index or not file.endswith(".index.json"):
            (root / file).write_bytes(data)
    for shard, tensors in repo.shards.items():
        write_safetensors(root / shard, tensors, align=repo.library_writer, order=repo.library_writer)
    return repo


def patterns(name: str) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """Names with the numbers taken out: how many, dtype and shape of the first. For reading, not for tests."""
    found: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    for tensor in spec(name).tensors:
        key = re.sub(r"\d+", "N", tensor.name)
        count = found[key][0] if key in found else 0
        found[key] = (count + 1, tensor.dtype, tensor.shape)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rebuild a real repository from its metadata, data sparse.")
    parser.add_argument("name", nargs="?", help="org/name")
    parser.add_argument("folder", nargs="?", help="where to write; without it the names are printed")
    parser.add_argument("--list", action="store_true", help="what can be rebuilt")
    args = parser.parse_args(argv)
    if args.list:
        for name in NAMES:
            repo = spec(name)
            source = "real index" if repo.real_index else repo.assumed
            sizes = f"{len(repo.tensors):7} tensors {len(repo.shards):4} files {repo.total_bytes:16,} B"
            print(f"{name:45} {sizes}  {source}")
        return 0
    if args.name not in _CATALOGUE:
        parser.error("give a name that --list shows")
    if args.folder is None:
        for pattern, (count, dtype, shape) in patterns(args.name).items():
            print(f"{count:7} {dtype:8} {shape!s:24} {pattern}")
        return 0
    repo = build(args.name, args.folder)
    print(f"{len(repo.tensors)} tensors in {len(repo.shards)} files, {repo.total_bytes:,} B of tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
