//! `config.json` to what each layer keeps of the past: keys and values, latents, recurrent states.
//!
//! Only evidence counts. A layer whose cache no rule knows is [`LayerCache::unknown`], and the report says so.

use crate::model::config::Config;
use crate::model::families::{self, Family, Sliding};

/// How many tokens of the past a layer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// All of them.
    Full,
    /// The last `n`.
    Window(u64),
    /// Those of the current chunk of `n`.
    Chunk(u64),
    /// The config has a window of `n`, but nothing says whether this layer uses it.
    WindowOrFull(u64),
    /// The encoder's tokens, as many as there are (cross-attention).
    Encoder,
}

/// What grows with the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCache {
    /// Elements a token: `kv_heads * (key_dim + value_dim)`, or the latent's width.
    pub elements: u64,
    /// For a latent (MLA): the rotary part of `elements`, which fp8 formats keep in 16 bits.
    pub latent_rope: Option<u64>,
    /// Width of the sparse-attention indexer's key; 0 without one.
    pub indexer: u64,
    /// How many tokens are kept.
    pub limit: Limit,
}

/// Number format of a recurrent state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDtype {
    /// 32-bit floats.
    F32,
    /// The model's dtype.
    Model,
}

/// What does not grow with the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Elements of the recurrent state.
    pub recurrent: u64,
    /// Its number format.
    pub dtype: StateDtype,
    /// Elements of the convolution state, kept in the model's dtype.
    pub conv: u64,
}

/// What one layer keeps for one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerCache {
    /// Name of the mechanism, for reports.
    pub kind: &'static str,
    /// The growing part.
    pub tokens: Option<TokenCache>,
    /// The fixed part.
    pub state: Option<State>,
    /// Why the layer's cache is not known.
    pub unknown: Option<String>,
}

impl LayerCache {
    fn none(kind: &'static str) -> Self {
        Self { kind, tokens: None, state: None, unknown: None }
    }

    fn unknown(reason: impl Into<String>) -> Self {
        Self { unknown: Some(reason.into()), ..Self::none("unknown") }
    }
}

/// What all layers keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachePlan {
    /// One entry a cache, in layer order.
    pub layers: Vec<LayerCache>,
    /// Why nothing at all is known.
    pub unknown: Option<String>,
}

impl CachePlan {
    fn unknown(reason: impl Into<String>) -> Self {
        Self { layers: Vec::new(), unknown: Some(reason.into()) }
    }

    /// Reads the plan from a config.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let Some(model_type) = config.text_model_type().or_else(|| config.model_type()) else {
            return Self::unknown("config.json has no model_type");
        };
        let Some(family) = families::find(config) else {
            return Self::unknown(format!(
                "no cache rule for model_type `{model_type}`; weights are exact all the same"
            ));
        };
        match family.no_formula {
            Some(reason) => Self::unknown(format!("{model_type}: {reason}")),
            None => Self::of_family(config, family),
        }
    }

    /// Reads the plan by a family's rules.
    pub(super) fn of_family(config: &Config, family: &Family) -> Self {
        if let Some(key) = family.requires.iter().find(|key| config.get(key).is_none()) {
            return Self::unknown(format!("config.json has no {key}"));
        }
        if family.encoder_decoder {
            return encoder_decoder(config);
        }
        let Some(layers) = config.layers().and_then(|layers| usize::try_from(layers).ok()).filter(|&n| n <= 4096)
        else {
            return Self::unknown("config.json has no usable num_hidden_layers");
        };
        let kinds = match kinds(config, family, layers) {
            Ok(kinds) => kinds,
            Err(reason) => return Self::unknown(reason),
        };
        let mut plan: Vec<LayerCache> = kinds
            .iter()
            .enumerate()
            .flat_map(|(at, kind)| vec![layer(config, kind, at); family.caches_per_layer])
            .collect();
        share(config, &kinds, &mut plan);
        Self { layers: plan, unknown: None }
    }
}

/// How a layer mixes tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Full,
    /// Sparse attention: reads a part of the past but keeps all of it, beside an indexer's keys.
    Indexed,
    Sliding,
    /// Sliding or full: the config has a window and nothing says where.
    SlidingOrFull,
    Chunked,
    Linear,
    Mamba,
    Conv,
    /// Attention and a state-space mixer side by side.
    Hybrid,
    None,
    Unknown(String),
}

impl Kind {
    fn parse(name: &str) -> Self {
        match name {
            "full_attention" | "attention" | "global_attention" | "global" | "full" => Self::Full,
            "indexed_attention" | "deepseek_sparse_attention" | "minimax_m3_sparse" => Self::Indexed,
            "sliding_attention" | "local_attention" | "sliding" | "local" => Self::Sliding,
            "chunked_attention" => Self::Chunked,
            "linear_attention" => Self::Linear,
            "mamba" | "mamba2" | "m" => Self::Mamba,
            "conv" => Self::Conv,
            "hybrid" => Self::Hybrid,
            "moe" | "mlp" => Self::None,
            other => Self::Unknown(format!("no cache rule for layer type `{other}`")),
        }
    }
}

/// Keys of the n in "each n-th layer is full".
const PERIODS: &[&str] = &["sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers"];

/// What each layer is, by the strongest evidence the config holds.
fn kinds(config: &Config, family: &Family, layers: usize) -> Result<Vec<Kind>, String> {
    let sliding = family.sliding;
    let from_list = |key: &str, parse: &dyn Fn(&serde_json::Value) -> Kind| -> Option<Result<Vec<Kind>, String>> {
        let list = config.list(key).filter(|list| !list.is_empty())?;
        if list.len() < layers {
            return Some(Err(format!("config.json lists {} {key} for {layers} layers", list.len())));
        }
        Some(Ok(list[..layers].iter().map(parse).collect()))
    };
    let by_name = |value: &serde_json::Value| value.as_str().map_or(Kind::Unknown("not a name".into()), Kind::parse);
    let one_or = |one: Kind, other: Kind| {
        move |value: &serde_json::Value| match value.as_u64() {
            Some(1) => one.clone(),
            _ => other.clone(),
        }
    };

    for key in ["layer_types", "layers_block_type", "block_types"] {
        if let Some(kinds) = from_list(key, &by_name) {
            return kinds;
        }
    }
    if let Some(name) = family.all_layers {
        return Ok(vec![Kind::parse(name); layers]);
    }
    if let Some(pattern) = config.text_value("hybrid_override_pattern") {
        return pattern_letters(pattern, layers);
    }
    if let Some(kinds) = from_list("attn_type_list", &one_or(Kind::Full, Kind::Linear)) {
        return kinds;
    }
    if let Some(kinds) = from_list("hybrid_layer_pattern", &one_or(Kind::Sliding, Kind::Full)) {
        return kinds;
    }
    if config.get("linear_attn_config.full_attn_layers").is_some() {
        return Ok(one_based(config, "linear_attn_config.full_attn_layers", layers, &Kind::Full, &Kind::Linear));
    }
    let every = |period: u64, offset: u64, hit: &Kind, miss: &Kind| {
        let kind = |at: usize| if at as u64 % period == offset { hit.clone() } else { miss.clone() };
        Ok((0..layers).map(kind).collect())
    };
    if let Some(period) = config.int(&["attn_layer_period"]).filter(|&n| n > 0) {
        return every(period, config.int(&["attn_layer_offset"]).unwrap_or(0), &Kind::Full, &Kind::Mamba);
    }
    if let Some(period) = config.int(&["full_attention_interval"]).filter(|&n| n > 0) {
        return every(period, period - 1, &Kind::Full, &Kind::Linear);
    }
    if config.int(&["attention_chunk_size"]).is_some() && sliding == Sliding::Chunked {
        if let Some(kinds) = from_list("no_rope_layers", &one_or(Kind::Chunked, Kind::Full)) {
            return kinds;
        }
        let period = config.int(&["no_rope_layer_interval"]).filter(|&n| n > 0).unwrap_or(4);
        return every(period, period - 1, &Kind::Full, &Kind::Chunked);
    }
    let Some(_) = config.int(&["sliding_window"]).filter(|&window| window > 0) else {
        return Ok(vec![Kind::Full; layers]);
    };
    match sliding {
        Sliding::Chunked => Ok(vec![Kind::Full; layers]),
        Sliding::Always => Ok(vec![Kind::Sliding; layers]),
        Sliding::Unstated => Ok(vec![Kind::SlidingOrFull; layers]),
        Sliding::IfUsed if config.flag("use_sliding_window") == Some(true) => {
            let from = config.int(&["max_window_layers"]).unwrap_or(0);
            Ok((0..layers).map(|at| if at as u64 >= from { Kind::Sliding } else { Kind::Full }).collect())
        }
        Sliding::IfUsed => Ok(vec![Kind::Full; layers]),
        Sliding::AllBut(default) => {
            let period = config.int(PERIODS).unwrap_or(default).max(1);
            every(period, period - 1, &Kind::Full, &Kind::Sliding)
        }
    }
}

/// Nemotron-H: `M` Mamba-2, `*` attention, `E` experts, `-` MLP.
fn pattern_letters(pattern: &str, layers: usize) -> Result<Vec<Kind>, String> {
    let kinds: Vec<Kind> = pattern
        .chars()
        .map(|letter| match letter {
            'M' => Kind::Mamba,
            '*' => Kind::Full,
            'E' | '-' => Kind::None,
            other => Kind::Unknown(format!("no cache rule for `{other}` in hybrid_override_pattern")),
        })
        .collect();
    if kinds.len() == layers {
        Ok(kinds)
    } else {
        Err(format!("hybrid_override_pattern has {} letters for {layers} layers", kinds.len()))
    }
}

/// Kimi Linear counts its layers from 1.
fn one_based(config: &Config, key: &str, layers: usize, hit: &Kind, miss: &Kind) -> Vec<Kind> {
    let listed: Vec<u64> = config.list(key).unwrap_or_default().iter().filter_map(serde_json::Value::as_u64).collect();
    (1..=layers as u64).map(|at| if listed.contains(&at) { hit.clone() } else { miss.clone() }).collect()
}

fn layer(config: &Config, kind: &Kind, at: usize) -> LayerCache {
    let window = config.int(&["sliding_window", "sliding_window_size"]).unwrap_or(0);
    let result = match kind {
        Kind::Full => attention(config, at, Limit::Full),
        Kind::Indexed => indexed(config, at),
        Kind::Sliding => kept(window, "sliding_window").and_then(|window| attention(config, at, Limit::Window(window))),
        Kind::SlidingOrFull => attention(config, at, Limit::WindowOrFull(window)),
        Kind::Chunked => kept(config.int(&["attention_chunk_size"]).unwrap_or(0), "attention_chunk_size")
            .and_then(|chunk| attention(config, at, Limit::Chunk(chunk))),
        Kind::Linear => linear(config),
        Kind::Mamba => mamba(config),
        Kind::Conv => conv(config),
        Kind::Hybrid => hybrid(config, at),
        Kind::None => Ok(LayerCache::none("none")),
        Kind::Unknown(reason) => Err(reason.clone()),
    };
    result.unwrap_or_else(LayerCache::unknown)
}

type Known = Result<LayerCache, String>;

/// A window or chunk that keeps anything at all.
fn kept(tokens: u64, key: &str) -> Result<u64, String> {
    if tokens > 0 { Ok(tokens) } else { Err(format!("layers have a window and config.json has no {key}")) }
}

/// A product of sizes. No layer of a real model keeps more than 2^48 elements a token or a state.
fn product(sizes: &[u64]) -> Result<u64, String> {
    let checked = sizes.iter().try_fold(1_u64, |product, &size| product.checked_mul(size));
    checked.filter(|&product| product <= 1 << 48).ok_or_else(|| "the sizes in config.json are absurd".to_owned())
}

fn need(config: &Config, keys: &[&str]) -> Result<u64, String> {
    config.int(keys).ok_or_else(|| format!("config.json has no {}", keys[0]))
}

fn hidden(config: &Config) -> Result<u64, String> {
    need(config, &["hidden_size", "d_model", "n_embd"])
}

fn heads(config: &Config) -> Result<u64, String> {
    need(config, &["num_attention_heads", "n_heads", "n_head", "num_heads"])
}

const HEAD_DIMS: &[&str] = &["head_dim", "attention_head_dim", "d_kv", "kv_channels"];
const KV_HEADS: &[&str] =
    &["num_key_value_heads", "attn_config.kv_n_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"];

fn attention(config: &Config, at: usize, limit: Limit) -> Known {
    if let Some(rank) = config.int(&["kv_lora_rank"]) {
        let rope = need(config, &["qk_rope_head_dim"])?;
        let indexer = indexer(config, at);
        let tokens = TokenCache { elements: rank + rope, latent_rope: Some(rope), indexer, limit };
        let kind = if indexer > 0 { "mla+indexer" } else { "mla" };
        return Ok(LayerCache { tokens: Some(tokens), ..LayerCache::none(kind) });
    }
    let windowed = matches!(limit, Limit::Window(_));
    if let Some(key) = config.not_a_number(HEAD_DIMS).or_else(|| config.not_a_number(KV_HEADS)) {
        return Err(format!("{key} in config.json is not a number"));
    }
    let head_dim = match config.int_of_layer(HEAD_DIMS, at) {
        Some(dim) => dim,
        None => hidden(config)? / heads(config)?.max(1),
    };
    let kv_heads = match config.int_of_layer(KV_HEADS, at) {
        Some(count) => count,
        None if config.flag("multi_query") == Some(true) => 1,
        None => heads(config)?,
    };
    // MiMo keeps other heads in its windowed layers, Gemma-4 in its global ones.
    let own = |keys: &[&str], general: u64| config.int(keys).unwrap_or(general);
    let (kv_heads, key_dim, value_dim) = if windowed {
        let key_dim = own(&["swa_head_dim"], head_dim);
        let value_dim = own(&["swa_v_head_dim"], own(&["v_head_dim"], key_dim));
        let factor = families::find(config).map_or(1, |family| family.window_kv_heads);
        (own(&["swa_num_key_value_heads"], product(&[kv_heads, factor])?), key_dim, value_dim)
    } else {
        let key_dim = own(&["global_head_dim"], head_dim);
        (own(&["num_global_key_value_heads"], kv_heads), key_dim, own(&["v_head_dim"], key_dim))
    };
    let kind = match limit {
        Limit::Window(_) => "sliding_attention",
        Limit::Chunk(_) => "chunked_attention",
        Limit::Encoder => "cross_attention",
        Limit::Full | Limit::WindowOrFull(_) => "full_attention",
    };
    let tokens =
        TokenCache { elements: product(&[kv_heads, key_dim + value_dim])?, latent_rope: None, indexer: 0, limit };
    Ok(LayerCache { tokens: Some(tokens), ..LayerCache::none(kind) })
}

/// Width of a layer's indexer keys. Layers whose type is "shared" read those of a layer before.
fn indexer(config: &Config, at: usize) -> u64 {
    let shared = config.list("indexer_types").and_then(|types| types.get(at)?.as_str()) == Some("shared");
    config.int(&["index_head_dim"]).filter(|_| !shared).unwrap_or(0)
}

fn indexed(config: &Config, at: usize) -> Known {
    let mut layer = attention(config, at, Limit::Full)?;
    if let Some(tokens) = &mut layer.tokens {
        tokens.indexer = indexer(config, at);
    }
    Ok(layer)
}

fn state(kind: &'static str, recurrent: u64, dtype: StateDtype, conv: u64) -> LayerCache {
    LayerCache { state: Some(State { recurrent, dtype, conv }), ..LayerCache::none(kind) }
}

/// The format the config states for recurrent states, else the mechanism's own.
fn state_dtype(config: &Config, own: StateDtype) -> StateDtype {
    match config.text_value("mamba_ssm_cache_dtype").or_else(|| config.text_value("mamba_ssm_dtype")) {
        Some("float32" | "float") => StateDtype::F32,
        Some("bfloat16" | "float16") => StateDtype::Model,
        _ => own,
    }
}

fn linear(config: &Config) -> Known {
    if let Some(value_heads) = config.int(&["linear_num_value_heads"]) {
        // Gated delta rule (Qwen3-Next): state [value_heads, key_dim, value_dim]; the convolution runs over q, k and v.
        let key_heads = need(config, &["linear_num_key_heads"])?;
        let (key_dim, value_dim) = (need(config, &["linear_key_head_dim"])?, need(config, &["linear_value_head_dim"])?);
        let kernel = need(config, &["linear_conv_kernel_dim"])?;
        let channels = product(&[2, key_heads, key_dim])? + product(&[value_heads, value_dim])?;
        let recurrent = product(&[value_heads, key_dim, value_dim])?;
        let conv = product(&[channels, kernel.max(1) - 1])?;
        return Ok(state("gated_delta", recurrent, state_dtype(config, StateDtype::F32), conv));
    }
    if let Some(heads) = config.int(&["linear_attn_config.num_heads", "linear_num_heads"]) {
        // Kimi delta attention: one square state a head, three convolutions.
        let dim = need(config, &["linear_attn_config.head_dim", "linear_head_dim"])?;
        let kernel = need(config, &["linear_attn_config.short_conv_kernel_size", "linear_conv_kernel_dim"])?;
        let conv = product(&[3, heads, dim, kernel.max(1) - 1])?;
        return Ok(state("kda", product(&[heads, dim, dim])?, state_dtype(config, StateDtype::F32), conv));
    }
    if config.text_model_type().is_some_and(|name| name.starts_with("minimax")) {
        // Lightning attention: one square state a head.
        let heads = heads(config)?;
        let dim = config.int(&["head_dim"]).map_or_else(|| Ok(hidden(config)? / heads.max(1)), Ok::<u64, String>)?;
        return Ok(state("lightning", product(&[heads, dim, dim])?, state_dtype(config, StateDtype::Model), 0));
    }
    mamba(config).map_err(|_| "no formula for this model's linear attention".to_owned())
}

fn mamba(config: &Config) -> Known {
    let kernel = need(config, &["mamba_d_conv", "conv_kernel", "d_conv"])?.max(1);
    let state_size = need(config, &["ssm_state_size", "mamba_d_state", "state_size"])?;
    let expand = || config.int(&["mamba_expand", "expand"]).unwrap_or(2);
    let dtype = state_dtype(config, StateDtype::Model);
    let inner = config.int(&["mamba_d_ssm", "mamba_intermediate_size"]);
    let inner = inner.map_or_else(|| hidden(config).and_then(|hidden| product(&[expand(), hidden])), Ok)?;
    let own = &["mamba_num_heads", "mamba_n_heads", "n_mamba_heads"];
    let Some(heads) = config.int(own).or_else(|| config.int(&["num_heads"])) else {
        return Ok(state("mamba", product(&[inner, state_size])?, dtype, product(&[inner, kernel - 1])?));
    };
    // In a model of mixers alone, `head_dim` is the mixer's.
    let alone = if config.int(own).is_none() { config.int(&["head_dim"]) } else { None };
    let head_dim = config.int(&["mamba_head_dim", "mamba_d_head", "mamba_headdim"]).or(alone);
    let head_dim = head_dim.unwrap_or_else(|| inner / heads.max(1));
    let groups = config.int(&["n_groups", "mamba_n_groups", "mamba_ngroups"]).unwrap_or(1);
    let inner = product(&[heads, head_dim])?;
    let channels = inner + product(&[2, groups, state_size])?;
    Ok(state("mamba2", product(&[inner, state_size])?, dtype, product(&[channels, kernel - 1])?))
}

fn conv(config: &Config) -> Known {
    let width = config.int(&["conv_dim"]).map_or_else(|| hidden(config), Ok)?;
    let kernel = need(config, &["conv_L_cache", "conv_kernel"])?.max(1);
    Ok(state("short_conv", 0, StateDtype::Model, product(&[width, kernel - 1])?))
}

fn hybrid(config: &Config, at: usize) -> Known {
    let attention = attention(config, at, Limit::Full)?;
    let mamba = mamba(config)?;
    Ok(LayerCache { kind: "attention+mamba", tokens: attention.tokens, ..mamba })
}

/// Layers that read another layer's keys and values keep none of their own.
fn share(config: &Config, kinds: &[Kind], plan: &mut [LayerCache]) {
    if let Some(shared) = config.int(&["num_kv_shared_layers"]).and_then(|n| usize::try_from(n).ok()) {
        let first = plan.len().saturating_sub(shared);
        plan[first..].fill(LayerCache::none("shared_kv"));
    }
    if config.flag("use_cla") == Some(true) {
        let factor = config.int(&["cla_share_factor"]).and_then(|n| usize::try_from(n).ok()).unwrap_or(1).max(1);
        for (at, layer) in plan.iter_mut().enumerate().filter(|(at, _)| kinds.get(*at) == Some(&Kind::Full)) {
            if at % factor != 0 {
                *layer = LayerCache::none("shared_kv");
            }
        }
    }
}

/// T5-like models: the decoder keeps its own keys and values and those of the encoder's tokens.
fn encoder_decoder(config: &Config) -> CachePlan {
    let Some(layers) = config.int(&["num_decoder_layers", "decoder_layers", "num_layers"]) else {
        return CachePlan::unknown("config.json has no num_decoder_layers");
    };
    let both = attention(config, 0, Limit::Full)
        .and_then(|own| Ok([own, attention(config, 0, Limit::Encoder)?]))
        .unwrap_or_else(|reason| [LayerCache::unknown(reason), LayerCache::none("none")]);
    CachePlan { layers: (0..layers.min(4096)).flat_map(|_| both.clone()).collect(), unknown: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(config: &str) -> Vec<LayerCache> {
        CachePlan::new(&Config::parse(config.as_bytes(), "config.json").unwrap()).layers
    }

    #[test]
    fn absurd_sizes_and_words_for_numbers_are_unknown() {
        let config = |extra: &str| {
            format!(r#"{{"model_type":"llama","num_hidden_layers":1,"hidden_size":64,"num_attention_heads":8{extra}}}"#)
        };
        assert_eq!(layers(&config(""))[0].unknown, None);
        for extra in [
            r#","head_dim":1099511627776,"num_key_value_heads":1099511627776"#,
            r#","num_key_value_heads":"8""#,
            r#","head_dim":4611686018427387904"#,
            r#","layer_types":["sliding_attention"]"#,
            r#","layer_types":["chunked_attention"]"#,
            r#","layer_types":["brand_new_attention"]"#,
        ] {
            assert!(layers(&config(extra))[0].unknown.is_some(), "{extra}");
        }
        let absurd = r#"{"model_type":"kimi_linear","num_hidden_layers":1,"layer_types":["linear_attention"],
            "linear_attn_config":{"num_heads":1000000000,"head_dim":1000000000,"short_conv_kernel_size":4}}"#;
        assert!(layers(absurd)[0].unknown.is_some());
    }
}
