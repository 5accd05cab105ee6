"""Decoders with grouped-query attention in every layer, and what sets each one's experts apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .collect import W123, Collector, ends, gqa, head_dim
from .quantised import Fp8Blocks, Gptq

if TYPE_CHECKING:
    from .tensors import Json, Tensor


def mixtral(cfg: Json, c: Collector | None = None) -> list[Tensor]:
    c = c or Collector()
    hidden, inner = cfg["hidden_size"], cfg["intermediate_size"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", cfg)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        if experts := cfg.get("num_local_experts", 0):
            c.plain(f"{prefix}.block_sparse_moe.gate", experts, hidden)
            for expert in range(experts):
                c.glu(f"{prefix}.block_sparse_moe.experts.{expert}", hidden, inner, W123)
        else:
            c.glu(f"{prefix}.mlp", hidden, inner)
    ends(c, cfg)
    return c.tensors


def mixtral_gptq(cfg: Json) -> list[Tensor]:
    return mixtral(cfg, Gptq("F16"))


def phimoe(cfg: Json) -> list[Tensor]:
    """Mixtral's shape with biases on attention, norms and LM head."""
    c = Collector()
    hidden = cfg["hidden_size"]
    c.add("model.embed_tokens.weight", cfg["vocab_size"], hidden)
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden, bias=True)
        gqa(c, f"{prefix}.self_attn", cfg, bias=True, o_bias=True)
        c.norm(f"{prefix}.post_attention_layernorm", hidden, bias=True)
        c.plain(f"{prefix}.block_sparse_moe.gate", cfg["num_local_experts"], hidden)
        for expert in range(cfg["num_local_experts"]):
            c.glu(f"{prefix}.block_sparse_moe.experts.{expert}", hidden, cfg["intermediate_size"], W123)
    c.norm("model.norm", hidden, bias=True)
    c.plain("lm_head", cfg["vocab_size"], hidden, bias=True)
    return c.tensors


def phi3(cfg: Json) -> list[Tensor]:
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
    ends(c, cfg)
    return c.tensors


def gpt_oss(cfg: Json) -> list[Tensor]:
    """MXFP4 experts: blocks of 32 values in 16 bytes, one scale byte for each block."""
    c = Collector()
    hidden, inner, experts = cfg["hidden_size"], cfg["intermediate_size"], cfg["num_local_experts"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", cfg, bias=True, o_bias=True)
        c.add(f"{prefix}.self_attn.sinks", cfg["num_attention_heads"])
        c.plain(f"{prefix}.mlp.router", experts, hidden, bias=True)
        for proj, out, width in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            c.add(f"{prefix}.mlp.experts.{proj}_bias", experts, out)
            c.add(f"{prefix}.mlp.experts.{proj}_blocks", experts, out, width // 32, 16, dtype="U8")
            c.add(f"{prefix}.mlp.experts.{proj}_scales", experts, out, width // 32, dtype="U8")
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
    ends(c, cfg)
    return c.tensors


def minimax_m2(cfg: Json) -> list[Tensor]:
    c = Fp8Blocks()
    hidden, inner, head = cfg["hidden_size"], cfg["intermediate_size"], cfg["head_dim"]
    experts = cfg["num_local_experts"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        moe = f"{prefix}.block_sparse_moe"
        c.norm(f"{prefix}.input_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", cfg)
        c.norm(f"{prefix}.self_attn.q_norm", cfg["num_attention_heads"] * head)
        c.norm(f"{prefix}.self_attn.k_norm", cfg["num_key_value_heads"] * head)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        c.add(f"{moe}.e_score_correction_bias", experts, dtype="F32")
        c.add(f"{moe}.gate.weight", experts, hidden, dtype="F32")
        for expert in range(experts):
            c.glu(f"{moe}.experts.{expert}", hidden, inner, W123)
    ends(c, cfg)
    return c.tensors


def dbrx(cfg: Json) -> list[Tensor]:
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


def granitemoe(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, inner, experts = cfg["hidden_size"], cfg["intermediate_size"], cfg["num_local_experts"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.add(f"{prefix}.block_sparse_moe.input_linear.weight", experts, 2 * inner, hidden)
        c.add(f"{prefix}.block_sparse_moe.output_linear.weight", experts, hidden, inner)
        c.plain(f"{prefix}.block_sparse_moe.router.layer", experts, hidden)
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", cfg)
    ends(c, cfg)
    return c.tensors


def bailing(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, head = cfg["hidden_size"], head_dim(cfg)
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


def hunyuan(cfg: Json) -> list[Tensor]:
    c = Collector()
    hidden, head = cfg["hidden_size"], cfg["attention_head_dim"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        inner = cfg["moe_intermediate_size"][layer]
        c.norm(f"{prefix}.input_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", {**cfg, "head_dim": head})
        c.norm(f"{prefix}.self_attn.query_layernorm", head)
        c.norm(f"{prefix}.self_attn.key_layernorm", head)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        c.plain(f"{prefix}.mlp.gate.wg", cfg["num_experts"], hidden)
        for expert in range(cfg["num_experts"]):
            c.glu(f"{prefix}.mlp.experts.{expert}", hidden, inner)
        c.glu(f"{prefix}.mlp.shared_mlp", hidden, inner * cfg["num_shared_expert"][layer])
    ends(c, cfg)
    return c.tensors
