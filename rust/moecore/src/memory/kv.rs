//! What the past takes: KV cache and recurrent states for a batch of sequences.
//!
//! Per layer and sequence, `T` tokens, `b` bytes an element:
//!
//! | mechanism | bytes |
//! |---|---|
//! | attention | `T * kv_heads * (key_dim + value_dim) * b` |
//! | sliding window `W`, chunk `W` | the same with `min(T, W)` |
//! | MLA | `T * (kv_lora_rank + qk_rope_head_dim) * b`; `fp8_ds_mla`: 1 byte an element, a 4-byte scale for 128, rope in 16 bit |
//! | sparse-attention indexer on top | `T * (dim + 4 * dim / 128)`: fp8 keys with fp32 scales |
//! | recurrent states | see `model::attention`, constant in `T` |
//!
//! Engines reserve a little more for windows, since a step's new tokens come in before old ones leave:
//! `(ceil(min(W - 1 + C, T) / block) + 1) * block` tokens, C tokens a step (vLLM's page arithmetic).

use serde::Serialize;

use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::model::attention::{CachePlan, LayerCache, Limit, StateDtype, TokenCache};
use crate::model::config::Config;

/// Tokens an engine takes in one prefill step, and tokens in one of its cache blocks: vLLM's defaults.
const STEP_TOKENS: u64 = 8192;
const BLOCK_TOKENS: u64 = 16;

/// Names that `kv_cache_dtype` accepts.
pub const KV_DTYPES: &[&str] =
    &["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla"];

/// What to size the cache for.
#[derive(Debug, Clone)]
pub struct KvOptions {
    /// Tokens a sequence; the config's longest context when absent.
    pub max_model_len: Option<u64>,
    /// Sequences.
    pub batch_size: u64,
    /// One of [`KV_DTYPES`].
    pub dtype: String,
}

impl Default for KvOptions {
    fn default() -> Self {
        Self { max_model_len: None, batch_size: 1, dtype: "auto".to_owned() }
    }
}

/// How sure the figures are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KvStatus {
    /// The formula and all its inputs are known.
    Exact,
    /// The truth lies between `bytes` and `bytes_upper`.
    Bounded,
    /// No figure; `reason` says why.
    Unknown,
}

/// Layers with the same cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerGroup {
    /// The mechanism.
    pub kind: &'static str,
    /// Numbers of the caches, counted from 0 through the model.
    pub layers: Vec<usize>,
    /// Growth per token, while it grows.
    pub bytes_per_token: u64,
    /// Most tokens that one layer keeps; absent when it keeps all.
    pub window: Option<u64>,
    /// Recurrent and convolution state of one layer for the batch.
    pub state_bytes: u64,
    /// All of one layer's cache for the batch.
    pub bytes: u64,
}

/// KV cache and states of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KvReport {
    /// How sure the figures are.
    pub status: KvStatus,
    /// Bytes for the batch at full length, states included; the lower bound when `bounded`, 0 when `unknown`.
    pub bytes: u64,
    /// The upper bound; equals `bytes` when `exact`.
    pub bytes_upper: u64,
    /// Bytes that vLLM's block arithmetic reserves for the same, windows with their steps included.
    pub bytes_reserved: u64,
    /// Growth per token and sequence, layers with a window left out.
    pub bytes_per_token: u64,
    /// The part of `bytes` that does not grow: recurrent and convolution states.
    pub state_bytes: u64,
    /// Tokens a sequence.
    pub max_model_len: u64,
    /// Sequences.
    pub batch_size: u64,
    /// Number format of keys and values.
    pub dtype: String,
    /// Why the figures are not exact.
    pub reason: Option<String>,
    /// Layers with the same cache.
    pub per_layer: Vec<LayerGroup>,
}

/// Number format of the cache: bytes an element, and what latents (MLA) use.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CacheDtype {
    name: String,
    bytes: u64,
    packed_latent: bool,
}

impl KvOptions {
    /// Checks the options before any work.
    pub fn check(&self) -> Result<()> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidTarget, message));
        if !KV_DTYPES.contains(&self.dtype.as_str()) {
            return bad(format!("kv cache dtype `{}` is not one of {}", self.dtype, KV_DTYPES.join(", ")));
        }
        // 2^40 tokens or sequences keep every product below 2^128 and every answer meaningful.
        let limit = 1 << 40;
        if self.batch_size == 0 || self.batch_size > limit || self.max_model_len.is_some_and(|n| n == 0 || n > limit) {
            return bad("max_model_len and batch_size must be between 1 and 2^40".to_owned());
        }
        Ok(())
    }
}

/// Sizes the caches of a plan.
///
/// `weights` is the dtype of the unquantised weights, `quant_config` the checkpoint's `hf_quant_config.json`.
#[must_use]
pub fn size(
    plan: &CachePlan,
    config: &Config,
    weights: Option<Dtype>,
    quant_config: Option<&serde_json::Value>,
    options: &KvOptions,
) -> KvReport {
    let model_bytes = model_bytes(config, weights);
    let dtype = cache_dtype(options, config, weights, quant_config, model_bytes);
    let length = options.max_model_len.or_else(|| config.max_model_len());
    let mut report = KvReport {
        status: KvStatus::Exact,
        bytes: 0,
        bytes_upper: 0,
        bytes_reserved: 0,
        bytes_per_token: 0,
        state_bytes: 0,
        max_model_len: length.unwrap_or(0),
        batch_size: options.batch_size,
        dtype: dtype.name.clone(),
        reason: None,
        per_layer: Vec::new(),
    };
    let mut reasons: Vec<String> = plan.unknown.iter().cloned().collect();
    reasons.extend(plan.layers.iter().filter_map(|layer| layer.unknown.clone()));
    if length.is_none() {
        reasons.push("config.json states no context length; pass max_model_len".to_owned());
    }
    if let Some(model) = model_bytes {
        let mut sums = Sums::default();
        for (at, layer) in plan.layers.iter().enumerate() {
            let size = layer_size(layer, length.unwrap_or(0), &dtype, model);
            sums.add(&size);
            push_group(&mut report.per_layer, at, layer.kind, &size, options.batch_size);
        }
        sums.fill(&mut report);
    } else {
        reasons.push("neither config.json nor the weights tell the model's dtype".to_owned());
    }
    let mut told = std::collections::HashSet::new();
    reasons.retain(|reason| told.insert(reason.clone()));
    if !reasons.is_empty() {
        let per_token = report.bytes_per_token;
        report = KvReport { bytes: 0, bytes_upper: 0, bytes_reserved: 0, state_bytes: 0, ..report };
        // Growth per token holds without a length, but not when a layer is unknown.
        let whole = plan.unknown.is_none() && plan.layers.iter().all(|layer| layer.unknown.is_none());
        report.bytes_per_token = if whole { per_token } else { 0 };
        report.per_layer.clear();
        report.status = KvStatus::Unknown;
        report.reason = Some(reasons.join("; "));
    } else if report.bytes != report.bytes_upper {
        report.status = KvStatus::Bounded;
        report.reason = Some(bounded_reason(plan));
    }
    report
}

fn bounded_reason(plan: &CachePlan) -> String {
    let encoder = plan.layers.iter().any(|layer| layer.tokens.is_some_and(|tokens| tokens.limit == Limit::Encoder));
    if encoder {
        "cross-attention keeps one entry for each encoder token: none to max_model_len".to_owned()
    } else {
        "the config has a sliding window and does not say which layers use it".to_owned()
    }
}

/// One layer, one sequence.
struct LayerSize {
    lower: u128,
    upper: u128,
    reserved: u128,
    state: u128,
    per_token: u64,
    unlimited: bool,
    window: Option<u64>,
}

fn layer_size(layer: &LayerCache, length: u64, dtype: &CacheDtype, model_bytes: u64) -> LayerSize {
    let state = layer.state.map_or(0, |state| {
        let recurrent_bytes = if state.dtype == StateDtype::F32 { 4 } else { model_bytes };
        u128::from(state.recurrent) * u128::from(recurrent_bytes) + u128::from(state.conv) * u128::from(model_bytes)
    });
    let mut size =
        LayerSize { lower: state, upper: state, reserved: state, state, per_token: 0, unlimited: false, window: None };
    let Some(tokens) = layer.tokens else { return size };
    let kept = |limit: u64| length.min(limit);
    let blocks = |tokens: u64| tokens.div_ceil(BLOCK_TOKENS) * BLOCK_TOKENS;
    let (lower, upper, reserved) = match tokens.limit {
        Limit::Full => (length, length, blocks(length)),
        Limit::Window(window) => {
            let held = length.min(window.saturating_sub(1) + STEP_TOKENS);
            (kept(window), kept(window), blocks(held) + BLOCK_TOKENS)
        }
        Limit::Chunk(chunk) => (kept(chunk), kept(chunk), blocks(length.min(chunk + STEP_TOKENS))),
        Limit::WindowOrFull(window) => (kept(window), length, blocks(length)),
        Limit::Encoder => (0, length, blocks(length)),
    };
    size.per_token = token_bytes(&tokens, dtype);
    let bytes = |count: u64| u128::from(count) * u128::from(size.per_token) + state;
    (size.lower, size.upper, size.reserved) = (bytes(lower), bytes(upper), bytes(reserved));
    size.unlimited = matches!(tokens.limit, Limit::Full | Limit::WindowOrFull(_));
    size.window = match tokens.limit {
        Limit::Window(window) | Limit::Chunk(window) => Some(window),
        _ => None,
    };
    size
}

fn token_bytes(tokens: &TokenCache, dtype: &CacheDtype) -> u64 {
    let kept = match tokens.latent_rope.filter(|_| dtype.packed_latent) {
        Some(rope) => {
            let latent = tokens.elements - rope;
            latent + latent.div_ceil(128) * 4 + rope * 2
        }
        None => tokens.elements * dtype.bytes,
    };
    kept + tokens.indexer + 4 * tokens.indexer.div_ceil(128)
}

#[derive(Default)]
struct Sums {
    lower: u128,
    upper: u128,
    reserved: u128,
    state: u128,
    per_token: u64,
}

impl Sums {
    fn add(&mut self, size: &LayerSize) {
        self.lower += size.lower;
        self.upper += size.upper;
        self.reserved += size.reserved;
        self.state += size.state;
        self.per_token += if size.unlimited { size.per_token } else { 0 };
    }

    fn fill(&self, report: &mut KvReport) {
        let batch = u128::from(report.batch_size);
        report.bytes = clamp(self.lower * batch);
        report.bytes_upper = clamp(self.upper * batch);
        report.bytes_reserved = clamp(self.reserved * batch);
        report.state_bytes = clamp(self.state * batch);
        report.bytes_per_token = self.per_token;
    }
}

fn clamp(bytes: u128) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

fn push_group(groups: &mut Vec<LayerGroup>, at: usize, kind: &'static str, size: &LayerSize, batch: u64) {
    let batch = u128::from(batch);
    let (bytes, state_bytes) = (clamp(size.lower * batch), clamp(size.state * batch));
    let known = groups.iter_mut().find(|group| {
        (group.kind, group.bytes, group.bytes_per_token, group.window) == (kind, bytes, size.per_token, size.window)
    });
    match known {
        Some(group) => group.layers.push(at),
        None => groups.push(LayerGroup {
            kind,
            layers: vec![at],
            bytes_per_token: size.per_token,
            window: size.window,
            state_bytes,
            bytes,
        }),
    }
}

fn model_bytes(config: &Config, weights: Option<Dtype>) -> Option<u64> {
    let stated = match config.model_dtype() {
        Some("float32" | "float") => Some(4),
        Some("bfloat16" | "float16" | "half") => Some(2),
        Some("float64" | "double") => Some(8),
        _ => None,
    };
    stated.or_else(|| weights.map(|dtype| dtype.bits() / 8))
}

/// The cache's number format: what is asked for, else what the checkpoint says of its cache, else the model's own.
/// Quantised weights alone say nothing about the cache.
fn cache_dtype(
    options: &KvOptions,
    config: &Config,
    weights: Option<Dtype>,
    quant_config: Option<&serde_json::Value>,
    model_bytes: Option<u64>,
) -> CacheDtype {
    let named = |name: &str| {
        let bytes = match name {
            "float32" => 4,
            "bfloat16" | "float16" => 2,
            _ => 1,
        };
        CacheDtype { name: name.to_owned(), bytes, packed_latent: name == "fp8_ds_mla" }
    };
    if options.dtype != "auto" {
        return named(&options.dtype);
    }
    let scheme = config.get("quantization_config.kv_cache_scheme");
    let scheme_is_fp8 = scheme.is_some_and(|scheme| {
        scheme.get("num_bits").and_then(serde_json::Value::as_u64) == Some(8)
            && scheme.get("type").and_then(serde_json::Value::as_str) != Some("int")
    });
    let algorithm = quant_config
        .and_then(|file| file.get("quantization")?.get("kv_cache_quant_algo")?.as_str())
        .or_else(|| config.text_value("quantization_config.kv_cache_quant_algo"));
    if scheme_is_fp8 || algorithm.is_some_and(|name| name.eq_ignore_ascii_case("fp8")) {
        return named("fp8");
    }
    let name = match (config.model_dtype(), weights) {
        (Some(name), _) => name.to_owned(),
        (None, Some(Dtype::F16)) => "float16".to_owned(),
        (None, Some(Dtype::F32)) => "float32".to_owned(),
        (None, Some(Dtype::F64)) => "float64".to_owned(),
        (None, _) => "bfloat16".to_owned(),
    };
    CacheDtype { name, bytes: model_bytes.unwrap_or(2), packed_latent: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv(config: &str, options: &KvOptions) -> KvReport {
        let config = Config::parse(config.as_bytes(), "config.json").unwrap();
        size(&CachePlan::new(&config), &config, Some(Dtype::BF16), None, options)
    }

    const DEEPSEEK: &str = r#"{"model_type":"deepseek_v3","num_hidden_layers":61,"hidden_size":7168,"torch_dtype":"bfloat16",
        "num_attention_heads":128,"kv_lora_rank":512,"qk_rope_head_dim":64,"max_position_embeddings":163840}"#;

    #[test]
    fn a_latent_has_no_factor_of_two() {
        let report = kv(DEEPSEEK, &KvOptions::default());
        assert_eq!((report.status, report.bytes_per_token), (KvStatus::Exact, 61 * 576 * 2));
        assert_eq!(report.bytes, 61 * 576 * 2 * 163_840);
        let packed = kv(DEEPSEEK, &KvOptions { dtype: "fp8_ds_mla".into(), ..KvOptions::default() });
        assert_eq!(packed.bytes_per_token, 61 * 656);
    }

    #[test]
    fn a_window_with_no_rule_is_bounded_by_both_readings() {
        let plan = CachePlan {
            layers: vec![LayerCache {
                kind: "full_attention",
                tokens: Some(TokenCache { elements: 8, latent_rope: None, indexer: 0, limit: Limit::WindowOrFull(10) }),
                state: None,
                unknown: None,
            }],
            unknown: None,
        };
        let options = KvOptions { max_model_len: Some(100), batch_size: 3, ..KvOptions::default() };
        let report = size(&plan, &Config::empty(), Some(Dtype::BF16), None, &options);
        assert_eq!((report.status, report.bytes, report.bytes_upper), (KvStatus::Bounded, 3 * 160, 3 * 1600));
        assert!(report.reason.is_some());
    }

    #[test]
    fn unknown_models_get_no_figure() {
        let report = kv(r#"{"model_type":"nobody_knows","num_hidden_layers":2}"#, &KvOptions::default());
        assert_eq!((report.status, report.bytes), (KvStatus::Unknown, 0));
        assert!(report.reason.unwrap().contains("nobody_knows"));
    }

    #[test]
    fn options_are_checked() {
        for options in [
            KvOptions { batch_size: 0, ..KvOptions::default() },
            KvOptions { max_model_len: Some(0), ..KvOptions::default() },
            KvOptions { dtype: "fp7".into(), ..KvOptions::default() },
        ] {
            assert!(options.check().is_err(), "{options:?}");
        }
    }

    #[test]
    fn huge_requests_saturate() {
        let options = KvOptions { max_model_len: Some(1 << 40), batch_size: 1 << 40, ..KvOptions::default() };
        assert_eq!(kv(DEEPSEEK, &options).bytes, u64::MAX);
    }
}
