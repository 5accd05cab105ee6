"""Qwen3 and what followed: dense, MoE, with a vision tower, and hybrids of gated delta and attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .collect import Collector, ends, gqa, head_dim
from .quantised import Fp8Blocks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .tensors import Json, Tensor


def qwen3(cfg: Json, c: Collector | None = None) -> list[Tensor]:
    """Qwen3 dense and MoE, and OLMoE (whose q and k norms span all heads)."""
    c = c or Collector()
    hidden, head = cfg["hidden_size"], head_dim(cfg)
    wide = cfg["model_type"] == "olmoe"
    experts = cfg.get("num_experts", 0)
    inner: int = cfg.get("moe_intermediate_size") or cfg["intermediate_size"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", cfg)
        c.norm(f"{prefix}.self_attn.q_norm", head * (cfg["num_attention_heads"] if wide else 1))
        c.norm(f"{prefix}.self_attn.k_norm", head * (cfg["num_key_value_heads"] if wide else 1))
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if not experts:
            c.glu(f"{prefix}.mlp", hidden, inner)
            continue
        c.plain(f"{prefix}.mlp.gate", experts, hidden)
        for expert in range(experts):
            c.glu(f"{prefix}.mlp.experts.{expert}", hidden, inner)
    ends(c, cfg)
    return c.tensors


def qwen3_fp8(cfg: Json) -> list[Tensor]:
    return qwen3(cfg, Fp8Blocks())


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


def qwen3_vl(cfg: Json) -> list[Tensor]:
    """Experts fused and transposed: ``[E, H, 2I]`` and ``[E, I, H]``."""
    c, text = Collector(), cfg["text_config"]
    hidden, inner, experts = text["hidden_size"], text["moe_intermediate_size"], text["num_experts"]
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.language_model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", text)
        c.norm(f"{prefix}.self_attn.q_norm", text["head_dim"])
        c.norm(f"{prefix}.self_attn.k_norm", text["head_dim"])
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        c.plain(f"{prefix}.mlp.gate", experts, hidden)
        c.add(f"{prefix}.mlp.experts.gate_up_proj", experts, hidden, 2 * inner)
        c.add(f"{prefix}.mlp.experts.down_proj", experts, inner, hidden)
    _qwen_vision(c, "model.visual", cfg["vision_config"])
    ends(c, text, "model.language_model.")
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


def qwen3_5(cfg: Json) -> list[Tensor]:
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
    ends(c, text, "model.language_model.")
    return c.tensors


def qwen3_next(cfg: Json) -> list[Tensor]:
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
    ends(c, cfg)
    return c.tensors
