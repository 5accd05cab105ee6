"""A tiny configuration for every model family that transformers knows: sizes, layer patterns, and the class to build.

Shared by the tool that writes the fixtures of `data/families` and by the tests of the runtime. Needs transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Sizes that differ from each other, so that a formula that takes the wrong one is seen. A key is used where the
# configuration class has such a field.
TEXT: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "swa_num_attention_heads"), 4),
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 4,
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels"), 24),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 96),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp"), 88),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 40),
    **dict.fromkeys(
        (
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "shared_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "share_expert_dim",
        ),
        56,
    ),
    "moe_hidden_size": 48,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 112),
    "unpadded_vocab_size": 110,
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), 16),
    "max_position_embeddings": 256,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_head_dim": 128,
    "index_n_heads": 2,
    "index_topk": 8,
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 6),
    "mamba_dt_rank": 5,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads"), 2),
    "head_dim": 16,
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_dim"), 64),
    "image_size": 28,
    "patch_size": 14,
    **dict.fromkeys(("projection_intermediate_size", "projection_hidden_dim", "downsample_hidden_size"), 24),
    "posemb_grid_size": 4,
    "position_embedding_size": 12,
    "num_position_embeddings": 16,
    "vocab_size": 32,
}

MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
SPARSE = ["dense", "sparse", "sparse", "sparse"]
GEMMA4: dict[str, Any] = {
    "global_head_dim": 40,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "num_hidden_layers": 6,
    "enable_moe_block": True,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"],
}
DOTS3 = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 14,
    "swa_kv_lora_rank": 18,
    "swa_head_dim": 26,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 12,
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention", "sliding_attention"],
}
ERNIE_VL = {
    "moe_intermediate_size": [40, 24],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]},
    "mlp_layer_types": SPARSE,
}
GLM5 = {"index_kpool": 4, "index_topk": 8, "qk_rope_head_dim": 0}
GLMV: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
    "d_rel": 6,
    "rel_extent": 32,
}
INKLING2 = {**INKLING, "n_layers_per_attn_res_block": 2}
LARGE4: dict[str, Any] = {
    "num_key_value_heads": 4,
    "indexer_types": ["full", "shared", "full", "shared"],
    "kv_source_layers": [0, 1, 1, 3],
}
LLAMA4 = {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2}
M3 = {
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "full_attention"],
    "mlp_layer_types": SPARSE,
    "rotary_dim": 8,
    "index_block_size": 8,
    "index_topk_blocks": 2,
}
MUSE = {"layer_types": MIXED, "mlp_layer_types": SPARSE}
OMNI_TEXT: dict[str, Any] = {
    "sliding_window": None,
    "rope_parameters": {**GLMV["rope_parameters"], "mrope_section": [4, 2, 2]},
}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 24,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 64,
    "heads_per_ngram": 2,
    "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 8,
}
STEP3 = {"layer_types": MIXED, "mlp_layer_types": SPARSE}

# What a family needs beyond the common sizes: patterns with every kind of layer, and values its class insists on.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"global_attn_every_n_layers": 2},
    "aria": {"vision_config": {"model_type": "idefics3_vision", "image_size": 28, "patch_size": 14, "hidden_size": 32,
             "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
             "projector_patch_to_query_dict": {4: 4}},
    "aria_text": {},
    "axk1": {},
    "axk2": {"gated_norm_rank": 6},
    "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"layer_types": MIXED, "mlp_layer_types": SPARSE},
    "cohere2_moe": {"sliding_window_pattern": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 40, "moe_num_experts": 8, "moe_top_k": 2}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": SPARSE}},
    "deepseek_ocr2_text": {"mlp_layer_types": SPARSE},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {"mlp_layer_types": SPARSE},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 10, "num_hash_layers": 1,
                    "partial_rotary_factor": 8 / 24,
                    "layer_types": ["sliding_attention", "heavily_compressed_attention",
                                    "compressed_sparse_attention", "heavily_compressed_attention"],
                    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}},
    "diffusion_gemma_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 40,
                             "num_global_key_value_heads": 1},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1, "sliding_window": 16, "max_window_layers": 2, "layer_types": MIXED},
    "dots3_note": {"text_config": DOTS3, "vision_config": {"mlp_layer_types": ["dense", "sparse"],
                   "adapter_in_dim": 32, "adapter_out_dim": 64, "moe_intermediate_size": 20,
                   "pyramid_num_routed": [-1, 4]},
                   "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64, "feature_size": 16}},
    "dots3_note_text": DOTS3,
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
    "ernie4_5_vl_moe": {"text_config": ERNIE_VL},
    "exaone_moe": {"sliding_window_pattern": 2},
    "flex_olmo": {},
    "flint": {"layer_types": MIXED, "mlp_only_layers": [0]},
    "gemma4": {"text_config": {**GEMMA4, "num_kv_shared_layers": 2}},
    "gemma4_text": GEMMA4,
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm4v_moe": {"text_config": GLMV},
    "glm4v_moe_text": GLMV,
    "glm5_next": {"text_config": {**GLM5, "mlp_layer_types": SPARSE}},
    "glm5_next_text": {**GLM5, "mlp_layer_types": SPARSE},
    "glm_moe_dsa": {"mlp_layer_types": SPARSE, "indexer_types": ["full", "full", "shared", "full"]},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2": {"text_config": INKLING2},
    "inkling2_text": INKLING2,
    "inkling_mm_model": {"text_config": {**INKLING, "mlp_layer_types": SPARSE}, "audio_config": {"n_mel_bins": 4}},
    "inkling_text": {**INKLING, "mlp_layer_types": SPARSE},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 1},
    "jetmoe": {},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kolibri1": {"layer_types": MIXED},
    "laguna": {"layer_types": MIXED, "num_attention_heads_per_layer": [4, 2, 4, 2]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "llama4": {"text_config": LLAMA4, "vision_config": {"vision_output_dim": 40, "projector_input_dim": 40,
               "projector_output_dim": 40}},
    "llama4_text": LLAMA4,
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 4},
    "mellum": {"layer_types": MIXED, "mlp_layer_types": SPARSE},
    "mimo_v2_flash": {},
    "minimax": {"block_size": 8},
    "minimax_m2": {},
    "minimax_m3_vl": {"text_config": M3, "projector_hidden_size": 40, "merged_hidden_size": 256},
    "minimax_m3_vl_text": M3,
    "mistral4": {},
    "mistral_large4": {"text_config": LARGE4, "vision_config": {"model_type": "pixtral", "image_size": 28,
                       "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "intermediate_size": 48}},
    "mistral_large4_text": LARGE4,
    "mixtral": {},
    "muse_spark": {"text_config": MUSE, "out_hidden_size": 48, "projector_hidden_size": 40,
                   "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4},
                   "audio_config": {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1),
                                    "out_hidden_size": 64}},
    "muse_spark_text": MUSE,
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp", "moe"]},
    "nllb-moe": {**dict.fromkeys(("encoder_layers", "decoder_layers"), 4),
                 **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
                 **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
                 **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 2), "num_experts": 4},
    "olmoe": {},
    "openai_privacy_filter": {},
    "phimoe": {},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3_5_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen3_next": {"mlp_only_layers": [1]},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 56, "sliding_window": None},
    "qwen3_omni_moe_text": OMNI_TEXT,
    "qwen3_omni_moe_thinker": {"text_config": OMNI_TEXT},
    "qwen3_vl_moe": {},
    "qwen3_vl_moe_text": {},
    "qwen4_exp_text": QWEN4,
    "solar_open": {},
    "step3p5": STEP3,
    "step3p7": {"text_config": STEP3},
    "switch_transformers": {"d_kv": 12, "d_ff": 96, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2,
                            "num_sparse_decoder_layers": 2, "num_experts": 4},
    "unlimited_ocr": {},
    "unlimited_ocr_text": {"mlp_layer_types": SPARSE},
    "vitpose_backbone": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_experts": 2,
                         "part_features": 8, "image_size": (32, 32), "patch_size": (16, 16)},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 12, "head_dim": 16,
             "layer_types": ["hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding"]},
    # dense and hybrid ones
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3": {"text_config": {"layer_types": MIXED}, "mm_tokens_per_image": 4,
               "vision_config": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14,
                                 "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                                 "intermediate_size": 48}},
    "gemma3_text": {"layer_types": MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "llama": {},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mistral": {},
    "phi3": {},
    "qwen3": {},
    "zamba2": {"num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "adapter_rank": 4},
}  # fmt: skip

# For types that no auto class builds.
CLASSES = {
    "deepseek_ocr2_text": "DeepseekOcr2TextModel",
    "diffusion_gemma_text": "DiffusionGemmaEncoderTextModel",
    "glm4v_moe_text": "Glm4vMoeTextModel",
    "glm5_next_text": "Glm5NextTextModel",
    "mistral_large4_text": "MistralLarge4TextModel",
    "muse_spark_text": "MuseSparkTextModel",
    "openai_privacy_filter": "OpenAIPrivacyFilterModel",
    "qwen3_omni_moe_talker_text": "Qwen3OmniMoeTalkerModel",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "qwen3_vl_moe_text": "Qwen3VLMoeTextModel",
    "step3p5": "Step3p7TextModel",
    "unlimited_ocr_text": "UnlimitedOcrTextModel",
    "vitpose_backbone": "VitPoseBackbone",
}


def fields(cls: type) -> set[str]:
    return {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}


def small(cls: Any, over: dict[str, Any] | None = None, tower: bool = False) -> dict[str, Any]:
    """Arguments for `cls` with the common sizes, then what the family asks for; sub-configurations alike."""
    known = fields(cls)
    sizes = {name: value for name, value in (TOWER if tower else TEXT).items() if name in known}
    over = dict(over or {})
    for name, sub in (cls.sub_configs or {}).items():
        wanted = over.pop(name, {})
        if isinstance(sub, type) and hasattr(sub, "sub_configs") and not sub.__name__.startswith("Auto"):
            part = any(word in name for word in ("vision", "audio", "code2wav"))
            sizes[name] = small(sub, wanted, tower or part)
        elif wanted:
            sizes[name] = wanted
    if "kv_lora_rank" in sizes:  # MLA: as many key heads as query heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return {**sizes, **over}


def model_class(model_type: str) -> Any:
    for kind in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        names = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {})
        if model_type in names:
            return getattr(transformers, names[model_type])
    module = CONFIG_MAPPING[model_type].__module__.replace("configuration_", "modeling_")
    return getattr(importlib.import_module(module), CLASSES[model_type])
