//! The report: what a checkpoint takes, in the shape of its JSON.
//!
//! Conventions. `parameters.total` leaves multi-token-prediction modules out; `parameters.checkpoint` has them.
//! `active` is what one text token multiplies with: everything but routed experts, MTP and towers, plus top-k of E
//! routed experts in each MoE layer, embedding and head as whole matrices. `active_without_embeddings` leaves both
//! of those out. `bytes.base + bytes.routed_experts = bytes.total`, MTP being part of `base`.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::error::Error;
use crate::header::Inventory;
use crate::memory::kv::{self, KvOptions, KvReport};
use crate::model::attention::CachePlan;
use crate::model::blocks::{ExpertBlock, ExpertSize};
use crate::model::config::Config;
use crate::model::families;
use crate::model::layout::{ModelLayout, TensorGroup};
use crate::model::roles::Role;
use crate::model::unlisted;

/// What the model is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Architecture {
    /// `model_type` of the config.
    pub model_type: Option<String>,
    /// Layers.
    pub layers: u64,
    /// Layers with routed experts.
    pub moe_layers: u64,
    /// Routed experts in a layer; the most where layers differ.
    pub num_experts: u64,
    /// Routed experts a token uses in a layer.
    pub experts_per_token: u64,
    /// Shared experts in a layer.
    pub shared_experts: u64,
    /// Weight packing that the config names, such as `fp8`.
    pub quantization: Option<String>,
    /// No head of its own: the embedding is read as the head.
    pub tied_embeddings: bool,
}

/// Logical parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// All, MTP left out.
    pub total: u64,
    /// What one text token multiplies with.
    pub active: u64,
    /// The same without embedding and head.
    pub active_without_embeddings: u64,
    /// Routed experts.
    pub routed: u64,
    /// Shared experts.
    pub shared: u64,
    /// Multi-token-prediction modules.
    pub mtp: u64,
    /// Vision and audio towers.
    pub vision: u64,
    /// `total + mtp`.
    pub checkpoint: u64,
    /// Elements as stored, packed words and scales counted as they are.
    pub stored_elements: u64,
    /// By role.
    pub by_role: BTreeMap<&'static str, u64>,
}

/// Bytes of weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// All tensors.
    pub total: u64,
    /// All but routed experts.
    pub base: u64,
    /// Routed experts of the model, those of MTP modules left out.
    pub routed_experts: u64,
    /// One routed expert; the largest where they differ.
    pub per_expert: u64,
    /// Routed experts of the largest MoE layer.
    pub per_moe_layer: u64,
    /// Routed experts inside MTP modules (part of `base`).
    pub mtp_routed_experts: u64,
    /// Weights one token reads: the active parameters' bytes without the input embedding, of which one row is read.
    pub active: u64,
    /// By role.
    pub by_role: BTreeMap<&'static str, u64>,
    /// By dtype.
    pub by_dtype: BTreeMap<&'static str, u64>,
}

/// Layers and experts of equal size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExpertGroup {
    /// Layers that have such experts.
    pub layers: Vec<u16>,
    /// Experts of this size in each of them.
    pub experts: u64,
    /// Bytes of one.
    pub bytes: u64,
    /// Logical parameters of one.
    pub parameters: u64,
    /// Part of a multi-token-prediction module.
    pub mtp: bool,
}

/// Everything that headers and config tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryReport {
    /// What the model is.
    pub architecture: Architecture,
    /// Logical parameters.
    pub parameters: Parameters,
    /// Bytes of weights.
    pub bytes: Bytes,
    /// Sizes of experts.
    pub expert_groups: Vec<ExpertGroup>,
    /// KV cache and states.
    pub kv_cache: KvReport,
    /// Tensor names that no rule knows.
    pub unrecognised: Vec<String>,
    /// What does not fit together.
    pub warnings: Vec<String>,
}

impl MemoryReport {
    /// The report of what was read of a checkpoint: tensors, `config.json`, `hf_quant_config.json`.
    ///
    /// A file that cannot be parsed costs what it would have told, not the report; the errors say which.
    #[must_use]
    pub fn of(
        inventory: &Inventory,
        config: Option<&[u8]>,
        quant_config: Option<&[u8]>,
        options: &KvOptions,
    ) -> (Self, Vec<Error>) {
        let mut errors = Vec::new();
        let mut parse = |json: Option<&[u8]>, file: &str| {
            json.map(|json| Config::parse(json, file))
                .and_then(|result| result.map_err(|error| errors.push(error)).ok())
        };
        let parsed = parse(config, "config.json");
        let quant_config = parse(quant_config, "hf_quant_config.json");
        let known = families::with_defaults(parsed.unwrap_or_else(Config::empty));
        let layout = ModelLayout::new(inventory, &known);
        let mut report = Self::new(&layout, &known, quant_config.as_ref().map(Config::root), options);
        if config.is_none() {
            report.warnings.push(
                "no config.json: roles are read from names alone, active figures and KV cache are incomplete".into(),
            );
        }
        (report, errors)
    }

    /// Works out the report. `quant_config` is `hf_quant_config.json`, where the repo has one.
    #[must_use]
    pub fn new(
        layout: &ModelLayout,
        config: &Config,
        quant_config: Option<&serde_json::Value>,
        options: &KvOptions,
    ) -> Self {
        let mut warnings = layout.warnings.clone();
        let active = Active::new(layout, config, &mut warnings);
        let plan = unlisted::plan(config, layout).inspect(|_| {
            let model_type = config.model_type().unwrap_or_default();
            warnings.push(format!(
                "model_type `{model_type}` has no row in the family table; its KV heads agree with k_proj and v_proj"
            ));
        });
        let plan = plan.unwrap_or_else(|| CachePlan::new(config));
        let kv_cache = kv::size(&plan, config, layout.unquantised_dtype(), quant_config, options);
        if let (Some(asked), Some(stated)) = (options.max_model_len, config.max_model_len())
            && asked > stated
        {
            warnings.push(format!("max_model_len {asked} is longer than the config's {stated}"));
        }
        Self {
            architecture: architecture(layout, config, quant_config),
            parameters: parameters(layout, &active),
            bytes: bytes(layout, &active),
            expert_groups: expert_groups(layout),
            kv_cache,
            unrecognised: layout.unrecognised.clone(),
            warnings,
        }
    }
}

fn architecture(layout: &ModelLayout, config: &Config, quant_config: Option<&serde_json::Value>) -> Architecture {
    let moe_layers: std::collections::BTreeSet<(&str, u16)> = layout
        .main_blocks()
        .map(|block| (block.name.split(|c: char| c.is_ascii_digit()).next().unwrap_or_default(), block.layer))
        .collect();
    let held = layout.main_blocks().map(ExpertBlock::count).max().unwrap_or(0);
    let is_moe = held > 0;
    let has_shared = layout.groups.iter().any(|group| group.role == Role::SharedExpert);
    let shared = if has_shared { config.shared_experts().unwrap_or(1).max(1) } else { 0 };
    let decoder = config.int(&["num_decoder_layers"]).filter(|_| config.flag("is_encoder_decoder") == Some(true));
    let stated = config.layers().map(|layers| layers + decoder.unwrap_or(0));
    let algorithm = quant_config.and_then(|file| file.get("quantization")?.get("quant_algo")?.as_str());
    let named = config.text_value("quantization_config.quant_method").or(algorithm);
    Architecture {
        model_type: config.model_type().map(str::to_owned),
        layers: stated.unwrap_or(layout.layers),
        moe_layers: moe_layers.len() as u64,
        num_experts: config.text_experts().unwrap_or(held),
        experts_per_token: if is_moe { config.experts_per_token(0).unwrap_or(0) } else { 0 },
        shared_experts: shared,
        quantization: named.map(str::to_ascii_lowercase),
        tied_embeddings: !layout.groups.iter().any(|group| group.role == Role::LmHead),
    }
}

/// Routed experts that one token uses.
struct Active {
    parameters: u64,
    bytes: u64,
    /// Routed parts that are among the roles every token passes.
    counted_whole: ExpertSize,
}

impl Active {
    fn new(layout: &ModelLayout, config: &Config, warnings: &mut Vec<String>) -> Self {
        let mut active = Self { parameters: 0, bytes: 0, counted_whole: ExpertSize::default() };
        let mut no_top_k = false;
        // Routed attention is counted whole among what every token passes; what a token does not use comes off.
        let routed =
            layout.expert_blocks.iter().filter(|block| matches!(block.role, Role::RoutedExpert | Role::Attention));
        for block in routed {
            let Some(top_k) =
                config.experts_per_token(usize::from(block.layer)).or_else(|| config.experts_per_token(0))
            else {
                no_top_k = true;
                continue;
            };
            let (count, bytes, parameters) = block.first(config.text_experts().unwrap_or(u64::MAX));
            let share = |sum: u128| clamp(sum * u128::from(top_k.min(count)) / u128::from(count.max(1)));
            active.parameters = active.parameters.saturating_add(share(parameters));
            active.bytes = active.bytes.saturating_add(share(bytes));
            if block.role == Role::Attention {
                active.counted_whole.parameters = active.counted_whole.parameters.saturating_add(clamp(parameters));
                active.counted_whole.bytes = active.counted_whole.bytes.saturating_add(clamp(bytes));
            }
        }
        if no_top_k {
            warnings.push(
                "config.json does not say how many experts a token uses; active figures leave routed experts out"
                    .into(),
            );
        }
        if config.int(&["zero_expert_num"]).is_some_and(|count| count > 0) {
            warnings.push("identity experts make top-k an upper bound: active figures are at most".into());
        }
        active
    }
}

fn clamp(sum: u128) -> u64 {
    u64::try_from(sum).unwrap_or(u64::MAX)
}

fn by_role(layout: &ModelLayout, figure: impl Fn(&TensorGroup) -> u64) -> BTreeMap<&'static str, u64> {
    Role::ALL.iter().map(|&role| (role.name(), layout.sum(|group| group.role == role, &figure))).collect()
}

/// Groups every token passes through: no routed experts, no MTP, no towers.
fn always(group: &TensorGroup) -> bool {
    !matches!(group.role, Role::RoutedExpert | Role::Mtp | Role::Vision)
}

fn parameters(layout: &ModelLayout, active: &Active) -> Parameters {
    let of = |role: Role| layout.sum(|group| group.role == role, |group| group.parameters);
    let dense = layout.sum(always, |group| group.parameters);
    let dense = dense.saturating_sub(active.counted_whole.parameters);
    let checkpoint = layout.sum(|_| true, |group| group.parameters);
    let mtp = of(Role::Mtp);
    Parameters {
        total: checkpoint - mtp,
        active: dense.saturating_add(active.parameters),
        active_without_embeddings: dense
            .saturating_add(active.parameters)
            .saturating_sub(of(Role::Embedding))
            .saturating_sub(of(Role::LmHead)),
        routed: of(Role::RoutedExpert),
        shared: of(Role::SharedExpert),
        mtp,
        vision: of(Role::Vision),
        checkpoint,
        stored_elements: layout.sum(|_| true, |group| group.stored),
        by_role: by_role(layout, |group| group.parameters),
    }
}

fn bytes(layout: &ModelLayout, active: &Active) -> Bytes {
    let total = layout.sum(|_| true, |group| group.bytes);
    let routed_experts = layout.sum(|group| group.role == Role::RoutedExpert, |group| group.bytes);
    let mut by_dtype = BTreeMap::new();
    for group in &layout.groups {
        let bytes: &mut u64 = by_dtype.entry(group.dtype.name()).or_default();
        *bytes = bytes.saturating_add(group.bytes);
    }
    let tied = !layout.groups.iter().any(|group| group.role == Role::LmHead);
    // The input table is read by the row; a tied one is read whole, as the head.
    let read = layout.sum(|group| always(group) && (tied || group.role != Role::Embedding), |group| group.bytes);
    let layer_bytes = |block: &ExpertBlock| clamp(block.first(u64::MAX).1);
    Bytes {
        total,
        base: total - routed_experts,
        routed_experts,
        per_expert: layout.main_blocks().flat_map(|block| &block.runs).map(|(_, size)| size.bytes).max().unwrap_or(0),
        per_moe_layer: layout.main_blocks().map(layer_bytes).max().unwrap_or(0),
        mtp_routed_experts: layout
            .sum(|group| group.role == Role::Mtp && group.nested == Role::RoutedExpert, |group| group.bytes),
        active: read.saturating_add(active.bytes).saturating_sub(active.counted_whole.bytes),
        by_role: by_role(layout, |group| group.bytes),
        by_dtype,
    }
}

fn expert_groups(layout: &ModelLayout) -> Vec<ExpertGroup> {
    let mut groups: Vec<ExpertGroup> = Vec::new();
    let mut known: HashMap<(u64, ExpertSize, bool), usize> = HashMap::new();
    for block in layout.expert_blocks.iter().filter(|block| block.role != Role::Attention) {
        let mtp = block.role == Role::Mtp;
        for &(experts, size) in &block.runs {
            let at = *known.entry((experts, size, mtp)).or_insert_with(|| {
                let ExpertSize { bytes, parameters } = size;
                groups.push(ExpertGroup { layers: Vec::new(), experts, bytes, parameters, mtp });
                groups.len() - 1
            });
            groups[at].layers.push(block.layer);
        }
    }
    groups
}
