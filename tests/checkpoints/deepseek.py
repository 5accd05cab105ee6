"""DeepSeek and those built on it: latent attention, shared and routed experts, layers of multi-token prediction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .collect import Collector, gqa
from .quantised import Fp8Blocks, Nvfp4
from .stored import folder_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .tensors import Json, Tensor


def mla(c: Collector, prefix: str, cfg: Mapping[str, Any]) -> None:
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


def deepseek_moe(c: Collector, prefix: str, cfg: Mapping[str, Any]) -> None:
    hidden, inner = cfg["hidden_size"], cfg["moe_intermediate_size"]
    for expert in range(cfg["n_routed_experts"]):
        c.glu(f"{prefix}.experts.{expert}", hidden, inner)
    c.plain(f"{prefix}.gate", cfg["n_routed_experts"], hidden)
    if cfg.get("topk_method") == "noaux_tc":
        c.add(f"{prefix}.gate.e_score_correction_bias", cfg["n_routed_experts"], dtype="F32")
    if cfg.get("n_shared_experts"):
        c.glu(f"{prefix}.shared_experts", hidden, inner * cfg["n_shared_experts"])


_FULL_MTP = ("embed_tokens", "head")
_SMALL_MTP = ("norm",)


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
            mla(c, f"{prefix}.self_attn", cfg)
        else:
            gqa(c, f"{prefix}.self_attn", cfg)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if layer < cfg["first_k_dense_replace"]:
            c.glu(f"{prefix}.mlp", hidden, cfg["intermediate_size"])
        else:
            deepseek_moe(c, f"{prefix}.mlp", cfg)
        if layer >= layers:
            c.norm(f"{prefix}.shared_head.norm", hidden)
            if "head" in mtp:
                c.add(f"{prefix}.shared_head.head.weight", cfg["vocab_size"], hidden)
    c.norm("model.norm", hidden)
    c.add("lm_head.weight", cfg["vocab_size"], hidden)


def deepseek_fp8(cfg: Json) -> list[Tensor]:
    c = Fp8Blocks()
    _deepseek(c, cfg, mtp=_FULL_MTP)
    return c.tensors


def deepseek_bf16(cfg: Json) -> list[Tensor]:
    c = Collector()
    _deepseek(c, cfg)
    return c.tensors


def glm5(cfg: Json) -> list[Tensor]:
    c = Collector()
    _deepseek(c, cfg, mtp=_SMALL_MTP)
    return c.tensors


def deepseek_nvfp4(cfg: Json) -> list[Tensor]:
    quant = json.loads((folder_of("nvidia/DeepSeek-V3.1-NVFP4") / "hf_quant_config.json").read_bytes())
    listed = set(quant["quantization"]["exclude_modules"])
    stars = tuple(module[:-1] for module in listed if module.endswith("*"))

    def excluded(module: str) -> bool:
        return module in listed or module.startswith(stars)

    c = Nvfp4(excluded)
    _deepseek(c, cfg, mtp=_FULL_MTP)
    return c.tensors
