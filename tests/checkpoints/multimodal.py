"""Models that see: a text part and a vision tower, or experts for vision tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .collect import Collector, ends, gqa

if TYPE_CHECKING:
    from .tensors import Json, Tensor


def gemma4(cfg: Json) -> list[Tensor]:
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
    ends(c, text, "model.language_model.")
    return c.tensors


def gemma3(cfg: Json) -> list[Tensor]:
    """Text part and SigLIP tower of Gemma 3; class defaults stand in for what the config leaves out."""
    c, vision = Collector(), cfg["vision_config"]
    defaults = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
    text = {**defaults, **cfg["text_config"]}
    hidden = text["hidden_size"]
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            c.norm(f"{prefix}.{norm}_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", text)
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


def llama4(cfg: Json) -> list[Tensor]:
    """Experts fused and transposed; the tower's sizes are the published ones (the stored config leaves it out)."""
    c, text = Collector(), cfg.get("text_config", cfg)
    hidden, inner, experts = text["hidden_size"], text["intermediate_size"], text["num_local_experts"]
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        c.norm(f"{prefix}.post_attention_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", text)
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


def step3p7(cfg: Json) -> list[Tensor]:
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
    ends(c, cfg)
    return c.tensors


def ernie_vl(cfg: Json) -> list[Tensor]:
    """The text part: experts 0-63 for text, 64-127 (narrower) for vision tokens, two routers in one layer."""
    c = Collector()
    hidden = cfg["hidden_size"]
    groups, widths = cfg["moe_num_experts"], cfg["moe_intermediate_size"]
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        c.norm(f"{prefix}.input_layernorm", hidden)
        gqa(c, f"{prefix}.self_attn", cfg)
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
    ends(c, cfg)
    return c.tensors
