"""Decoders whose layers are of several kinds: attention beside Mamba or linear attention, or with its own heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .collect import W123, Collector, ends, gqa
from .deepseek import deepseek_moe, mla
from .quantised import Fp8Blocks

if TYPE_CHECKING:
    from .tensors import Json, Tensor


def minimax_text_01(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, head, heads = cfg["hidden_size"], cfg["head_dim"], cfg["num_attention_heads"]
    for layer, softmax in enumerate(cfg["attn_type_list"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if softmax:
            gqa(c, f"{prefix}.self_attn", cfg)
        else:
            c.norm(f"{prefix}.self_attn.norm", heads * head)
            c.plain(f"{prefix}.self_attn.qkv_proj", 3 * heads * head, hidden)
            c.plain(f"{prefix}.self_attn.output_gate", heads * head, hidden)
            c.plain(f"{prefix}.self_attn.out_proj", hidden, heads * head)
        c.plain(f"{prefix}.block_sparse_moe.gate", cfg["num_local_experts"], hidden)
        for expert in range(cfg["num_local_experts"]):
            c.glu(f"{prefix}.block_sparse_moe.experts.{expert}", hidden, cfg["intermediate_size"], W123)
    ends(c, cfg)
    return c.tensors


def mimo(cfg: Json) -> list[Tensor]:
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
            deepseek_moe(c, f"{prefix}.mlp", cfg)
        else:
            c.glu(f"{prefix}.mlp", hidden, cfg["intermediate_size"])
    for layer in range(3):
        prefix = f"model.mtp.layers.{layer}"
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            c.norm(f"{prefix}.{norm}", hidden)
        c.plain(f"{prefix}.eh_proj", hidden, 2 * hidden)
        attention(f"{prefix}.self_attn", True)
        c.glu(f"{prefix}.mlp", hidden, cfg["intermediate_size"])
    ends(c, cfg)
    return c.tensors


def jamba(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, rank, state = cfg["hidden_size"], cfg["mamba_dt_rank"], cfg["mamba_d_state"]
    inner = cfg["mamba_expand"] * hidden
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        if layer % cfg["attn_layer_period"] == cfg["attn_layer_offset"]:
            gqa(c, f"{prefix}.self_attn", cfg)
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


def nemotron_h(cfg: Json) -> list[Tensor]:
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


def kimi_linear(cfg: Json) -> list[Tensor]:
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
            mla(c, attn, cfg)
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
            c.glu(f"{moe}.experts.{expert}", hidden, cfg["moe_intermediate_size"], W123)
        c.glu(f"{moe}.shared_experts", hidden, cfg["moe_intermediate_size"] * cfg["num_shared_experts"])
    ends(c, cfg)
    return c.tensors
