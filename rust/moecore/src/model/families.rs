//! Families of models: where the config alone does not say how a layer's cache works.
//!
//! A row is data. `model_type`s that are not here get no KV figure: unknown is an answer, a guess is not.

use crate::model::config::Config;

/// What `sliding_window` in a config means for layers that `layer_types` does not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sliding {
    /// Every layer slides.
    Always,
    /// Layers from `max_window_layers` on slide, if `use_sliding_window` says so (Qwen).
    IfUsed,
    /// Every layer slides but each n-th; n is `sliding_window_pattern`, else this default (Gemma, Cohere).
    AllBut(u64),
    /// Layers are chunked but for each fourth (Llama-4).
    Chunked,
    /// The config says it layer by layer, or the answer is a range.
    Unstated,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// `model_type`s, of the file or of its language section.
    pub model_types: &'static [&'static str],
    /// Meaning of `sliding_window`.
    pub sliding: Sliding,
    /// Values of the config class that files leave out.
    pub defaults: &'static [(&'static str, u64)],
    /// Attention blocks, and so caches, in one layer.
    pub caches_per_layer: usize,
    /// What every layer is, by the names of `layer_types`, for families that have no list.
    pub all_layers: Option<&'static str>,
    /// KV heads of a windowed layer for each of a full one, where `swa_num_key_value_heads` is left out.
    pub window_kv_heads: u64,
    /// The decoder also keeps the encoder's keys and values.
    pub encoder_decoder: bool,
    /// Keys that the config class works out in ways not known here: without one of them there is no figure.
    pub requires: &'static [&'static str],
    /// Why there is no formula.
    pub no_formula: Option<&'static str>,
}

/// A model without a row: the config's own words and nothing else.
pub const UNLISTED: Family = BASE;

const BASE: Family = Family {
    model_types: &[],
    sliding: Sliding::Unstated,
    defaults: &[],
    caches_per_layer: 1,
    all_layers: None,
    window_kv_heads: 1,
    encoder_decoder: false,
    requires: &[],
    no_formula: None,
};

#[rustfmt::skip] // one name a line would hide the table
const FAMILIES: &[Family] = &[
    // Attention or MLA, with an indexer or without; layer kinds, if there are several, are in the config.
    Family {
        model_types: &[
            "apertus", "arcee", "aria", "aria_text", "axk1", "axk2", "bailing_moe", "bailing_moe_v2", "beam", "bitnet",
            "chatglm", "dbrx", "deepseek", "deepseek_ocr2", "deepseek_ocr2_text", "deepseek_v2", "deepseek_v3",
            "deepseek_v32", "diffusion_gemma_text", "dots1", "ernie4_5", "ernie4_5_moe", "ernie4_5_moe_vl",
            "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "falcon", "flex_olmo", "flint", "gemma", "glm", "glm4",
            "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neox",
            "gptj", "granite", "granitemoe", "granitemoe_swa", "granitemoeshared", "grok-1", "hunyuan",
            "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "internlm2", "internlm3", "jetmoe", "kimi_k2",
            "kolibri1", "laguna", "llama", "mellum", "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_text", "mistral4",
            "mpt", "muse_spark", "muse_spark_text", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon",
            "phi", "qwen3_omni_moe_talker_text", "seed_oss", "smollm3", "solar_open", "stablelm", "step3p5", "step3p7",
        ],
        ..BASE
    },
    Family { model_types: &["hy_v4"], requires: &["indexer_types"], ..BASE },
    Family { model_types: &["mimo_v2_flash"], window_kv_heads: 2, ..BASE },
    Family {
        model_types: &["gpt_oss"],
        sliding: Sliding::AllBut(2),
        defaults: &[("head_dim", 64), ("sliding_window", 128)],
        ..BASE
    },
    Family { model_types: &["afmoe", "exaone4", "exaone_moe"], sliding: Sliding::AllBut(4), ..BASE },
    Family {
        model_types: &["doge", "mistral", "mixtral", "phi3", "phimoe", "starcoder2", "ministral", "ministral3"],
        sliding: Sliding::Always,
        ..BASE
    },
    Family {
        model_types: &[
            "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text",
            "qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text",
        ],
        sliding: Sliding::IfUsed,
        ..BASE
    },
    Family { model_types: &["gemma2"], sliding: Sliding::AllBut(2), ..BASE },
    Family {
        model_types: &["gemma3", "gemma3_text"],
        sliding: Sliding::AllBut(6),
        // Gemma3TextConfig of transformers; published files leave most of these out.
        defaults: &[
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("head_dim", 256),
            ("sliding_window", 4096),
            ("max_position_embeddings", 131_072),
        ],
        ..BASE
    },
    Family { model_types: &["gemma3n_text", "gemma4", "gemma4_text"], sliding: Sliding::AllBut(6), ..BASE },
    Family { model_types: &["cohere2", "cohere2_moe"], sliding: Sliding::AllBut(4), ..BASE },
    Family {
        model_types: &["llama4", "llama4_text"],
        sliding: Sliding::Chunked,
        defaults: &[("attention_chunk_size", 8192)],
        ..BASE
    },
    // Linear attention, state-space and convolution layers beside attention.
    Family {
        model_types: &["qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"],
        defaults: &[
            ("full_attention_interval", 4),
            ("linear_conv_kernel_dim", 4),
            ("linear_key_head_dim", 128),
            ("linear_value_head_dim", 128),
            ("linear_num_key_heads", 16),
            ("linear_num_value_heads", 32),
        ],
        ..BASE
    },
    Family {
        model_types: &[
            "jamba",
            "kimi_linear",
            "minimax",
            "minimax_text_01",
            "minimax_01",
            "nemotron_h",
            "lfm2",
            "lfm2_moe",
            "bamba",
            "granitemoehybrid",
        ],
        ..BASE
    },
    Family { model_types: &["falcon_h1"], all_layers: Some("hybrid"), ..BASE },
    Family { model_types: &["mamba", "mamba2"], all_layers: Some("mamba"), ..BASE },
    // Two attention blocks in each layer.
    Family { model_types: &["longcat_flash"], caches_per_layer: 2, ..BASE },
    // The number of experts a token uses is fixed in the code of these two.
    Family {
        model_types: &["switch_transformers"],
        encoder_decoder: true,
        defaults: &[("num_experts_per_tok", 1)],
        ..BASE
    },
    Family { model_types: &["nllb-moe"], encoder_decoder: true, defaults: &[("num_experts_per_tok", 2)], ..BASE },
    Family { model_types: &["t5", "mt5", "umt5"], encoder_decoder: true, ..BASE },
    Family {
        model_types: &["deepseek_v4"],
        no_formula: Some("its compressed caches have no published size formula"),
        ..BASE
    },
];

/// The row of a config: by the language section's `model_type`, else by the file's.
#[must_use]
pub fn find(config: &Config) -> Option<&'static Family> {
    let by_name = |name: &str| FAMILIES.iter().find(|family| family.model_types.contains(&name));
    config.text_model_type().and_then(by_name).or_else(|| config.model_type().and_then(by_name))
}

/// The config with what its family's config class states and files leave out.
#[must_use]
pub fn with_defaults(config: Config) -> Config {
    match find(&config) {
        Some(family) => config.with_defaults(family.defaults),
        None => config,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_type_has_one_row() {
        let mut names: Vec<_> = FAMILIES.iter().flat_map(|family| family.model_types).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
