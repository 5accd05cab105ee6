//! Name patterns to roles: ordered rules over the dotted parts of a name, first match wins.
//!
//! The order is the point. `shared_experts.down_proj` holds the word `experts`, `gate_proj` the word `gate`, and a
//! vision tower has attention of its own: each trap is settled by what is asked first.

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token and position embeddings.
    Embedding,
    /// Token mixers: attention, linear attention, state-space and convolution layers.
    Attention,
    /// Feed-forward blocks that every token passes.
    DenseMlp,
    /// Norm weights, those inside attention included.
    Norm,
    /// Router weights and their selection biases.
    Router,
    /// Experts that every token passes, and their gates.
    SharedExpert,
    /// Experts that the router chooses among.
    RoutedExpert,
    /// Multi-token-prediction modules, whatever they hold.
    Mtp,
    /// Vision and audio towers and their projectors.
    Vision,
    /// The output head.
    LmHead,
    /// Anything else.
    Other,
}

impl Role {
    /// Every role, in the order of the report.
    pub const ALL: [Role; 11] = [
        Role::Embedding,
        Role::Attention,
        Role::DenseMlp,
        Role::Norm,
        Role::Router,
        Role::SharedExpert,
        Role::RoutedExpert,
        Role::Mtp,
        Role::Vision,
        Role::LmHead,
        Role::Other,
    ];

    /// Name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Role::Embedding => "embedding",
            Role::Attention => "attention",
            Role::DenseMlp => "dense_mlp",
            Role::Norm => "norm",
            Role::Router => "router",
            Role::SharedExpert => "shared_expert",
            Role::RoutedExpert => "routed_expert",
            Role::Mtp => "mtp",
            Role::Vision => "vision",
            Role::LmHead => "lm_head",
            Role::Other => "other",
        }
    }
}

/// What a pattern says about its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    /// The role.
    pub role: Role,
    /// The role inside an MTP module or a tower; equals `role` elsewhere.
    pub nested: Role,
    /// Not a parameter: causal masks, rotary frequencies.
    pub buffer: bool,
    /// Whether a rule knew the name.
    pub recognised: bool,
    /// Which number of the name is the layer.
    pub layer: Option<usize>,
    /// How the routed experts lie in it: of tensors whose nested role is [`Role::RoutedExpert`], and of attention that
    /// is routed by heads.
    pub experts: Option<Experts>,
}

/// How routed experts lie in tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Experts {
    /// The pattern up to the expert, the same for all tensors of one expert block.
    pub block: String,
    /// Which number of the name is the expert; `None` when one tensor holds all of them.
    pub index: Option<usize>,
}

/// A name pattern cut into the pieces that rules look at.
struct Name<'a> {
    parts: Vec<&'a str>,
    /// The last part that is not a plain leaf (`weight`, `bias`).
    module: &'a str,
    leaf: &'a str,
    rank: usize,
}

impl<'a> Name<'a> {
    fn new(pattern: &'a str, rank: usize) -> Self {
        let parts: Vec<&str> = pattern.split('.').collect();
        let leaf = parts.last().copied().unwrap_or_default();
        let is_leaf = matches!(leaf, "weight" | "bias" | "weight_1" | "qweight" | "weight_packed");
        let module = if is_leaf && parts.len() > 1 { parts[parts.len() - 2] } else { leaf };
        Self { parts, module, leaf, rank }
    }

    fn has(&self, words: &[&str]) -> bool {
        self.parts.iter().any(|part| words.contains(part))
    }

    fn leading(&self) -> &[&'a str] {
        &self.parts[..self.parts.len().min(3)]
    }

    /// Norms have it in the name, whatever holds them; DBRX's `norm_attn_norm` holds attention.
    fn is_norm(&self) -> bool {
        let module = self.module.to_ascii_lowercase();
        self.parts.iter().any(|part| *part != "norm_attn_norm" && part.to_ascii_lowercase().contains("norm"))
            || module.starts_with("ln_")
            || matches!(module.as_str(), "ln" | "ln1" | "ln2")
    }

    /// What mixes or scales residual streams, hyper-connections included.
    fn is_residual(&self) -> bool {
        self.parts.iter().any(|part| {
            part.starts_with("hc_")
                || part.contains("hyper_connection")
                || part.contains("hidden_states_")
                || (part.contains("residual") && !part.contains("mlp") && !part.contains("norm"))
        })
    }

    fn in_attention(&self) -> bool {
        self.parts.iter().any(|part| {
            let part = part.to_ascii_lowercase();
            part.contains("attn") && !part.contains("norm") || part.contains("attention") && !part.contains("norm")
        })
    }
}

/// Parts that hold routed experts.
const EXPERT_BLOCKS: &[&str] = &["experts", "local_experts", "routed_experts"];

const SHARED: &[&str] = &[
    "shared_expert",
    "shared_experts",
    "share_expert",
    "shared_mlp",
    "shared_expert_gate",
    "shared_experts_gate",
    "shared_mlp_gate",
];

const ROUTER_LEAVES: &[&str] = &["e_score_correction_bias", "expert_bias", "balancing_biases", "router_bias"];

const TOWERS: &[&str] = &["vision", "visual", "audio", "image", "multi_modal", "multimodal", "speech"];
const TOWER_PARTS: &[&str] = &[
    "connector",
    "aligner",
    "resampler_model",
    "vit",
    "talker",
    "token2wav",
    "code2wav",
    "sam_model",
    "qwen2_model",
    "view_seperator",
];

const HEADS: &[&str] = &["lm_head", "output_layer", "embed_out", "unembed"];
const TOP_HEADS: &[&str] = &["output", "head", "score", "classifier", "qa_outputs"];

const EMBEDDINGS: &[&str] = &[
    "embed",
    "embed_tokens",
    "embed_in",
    "embedding",
    "embeddings",
    "embed_positions",
    "position_embeddings",
    "embed_tokens_per_layer",
    "codec_embedding",
    "shared",
    "tok_embeddings",
    "word_embeddings",
    "wte",
    "wpe",
];

const MIXERS: &[&str] = &[
    "mamba",
    "mixer",
    "conv",
    "short_conv",
    "indexer",
    "ssm",
    "recurrent",
    "temporal_block",
    "kda",
    "compressor",
    "time_mix",
];

const DENSE: &[&str] = &[
    "mlp",
    "mlps",
    "feed_forward",
    "ffn",
    "ff",
    "DenseReluDense",
    "block_sparse_moe",
    "moe",
    "dense_mlp",
    "residual_mlp",
    "fc1",
    "fc2",
    "fc",
    "mlp1",
    "mlp2",
];

/// Learned odds and ends that are known and belong to no other role: scalars, residual gates, hyper-connections,
/// Gemma's per-layer inputs.
const ODDMENTS: &[&str] = &[
    "layer_scalar",
    "logit_scale",
    "altup",
    "laurel",
    "skip_scale",
    "per_layer_model_projection",
    "per_layer_input_gate",
    "per_layer_projection",
    "attn_res",
    "linear",
    "lerope",
    "rotary_emb",
];

type Rule = (Role, fn(&Name<'_>) -> bool);

/// The rules, in order. MTP by layer number is settled per tensor, since a pattern does not hold it.
const RULES: &[Rule] = &[
    (Role::Norm, |n| n.is_norm()),
    (Role::Other, |n| n.has(ODDMENTS) || n.is_residual() || (n.has(&["ple"]) && !n.has(&["ple_embedding"]))),
    // JetMoE's mixture of attention heads is routed as well, and is attention all the same.
    (Role::Attention, |n| n.has(EXPERT_BLOCKS) && n.has(&["self_attention", "self_attn"])),
    (Role::SharedExpert, |n| n.has(SHARED)),
    (Role::Router, |n| {
        n.has(&["router", "moe_statics"])
            || n.has(ROUTER_LEAVES)
            || (n.has(&["gate"]) && !n.in_attention())
            || matches!(n.module, "router_gate" | "moe_gate")
    }),
    (Role::RoutedExpert, |n| n.has(EXPERT_BLOCKS)),
    // Fused blocks without the word: Granite and JetMoE, Step, consolidated Mixtral, Doge's embedded experts.
    (Role::RoutedExpert, |n| {
        (n.rank == 3 && (n.has(&["moe"]) || matches!(n.module, "input_linear" | "output_linear")))
            || (n.has(&["block_sparse_moe"]) && matches!(n.module, "w1" | "w2" | "w3"))
            || matches!(n.module, "down_embed" | "up_embed")
    }),
    (Role::LmHead, |n| n.has(HEADS) || TOP_HEADS.contains(&n.parts[0])),
    (Role::Embedding, |n| EMBEDDINGS.contains(&n.module) || n.has(&["ngram_embeddings", "ple_embedding"])),
    // Nemotron-H calls every block a mixer; those with MLP projections are MLPs.
    (Role::DenseMlp, |n| n.has(&["mixer"]) && matches!(n.module, "up_proj" | "down_proj" | "gate_proj")),
    (Role::Attention, |n| n.in_attention() || n.has(MIXERS) || n.parts.iter().any(|part| part.ends_with("sconv"))),
    (Role::DenseMlp, |n| n.has(DENSE)),
];

/// Reads a pattern. `rank` is the number of dimensions of its tensors.
///
/// The pattern must be free of quantisation suffixes, see [`super::packing`].
#[must_use]
pub fn classify(pattern: &str, rank: usize) -> Tag {
    let name = Name::new(pattern, rank);
    let buffer = name.module == "inv_freq"
        || name.leaf == "masked_bias"
        || (name.leaf == "bias" && name.module == "attn" && rank == 4);
    let found = RULES.iter().find(|(_, matches)| matches(&name));
    let nested = found.map_or(Role::Other, |(role, _)| *role);
    let role = if is_mtp(&name) {
        Role::Mtp
    } else if is_tower(&name) {
        Role::Vision
    } else {
        nested
    };
    let routed = nested == Role::RoutedExpert
        || (nested == Role::Attention && name.has(EXPERT_BLOCKS) && !name.has(&["router"]));
    let experts = routed.then(|| experts(&name));
    let first_is_expert = experts.as_ref().is_some_and(|experts| experts.index == Some(0));
    let layer = (pattern.contains("{}") && !first_is_expert).then_some(0);
    Tag { role, nested, buffer, recognised: buffer || found.is_some() || role != nested, layer, experts }
}

fn is_mtp(name: &Name<'_>) -> bool {
    name.parts.iter().any(|part| part.starts_with("mtp")) || name.has(&["nextn", "eh_proj", "shared_head"])
}

fn is_tower(name: &Name<'_>) -> bool {
    name.leading().iter().any(|part| {
        TOWER_PARTS.contains(part)
            || part.contains("projector")
            || part.starts_with("patch_mer")
            || TOWERS.iter().any(|word| part.contains(word))
    })
}

fn experts(name: &Name<'_>) -> Experts {
    let at = name.parts.iter().position(|part| EXPERT_BLOCKS.contains(part));
    // Without such a part, the block is what holds the module.
    let module = name.parts.iter().rposition(|part| *part == name.module);
    let block_end = at.or(module).unwrap_or(0);
    let block = name.parts[..block_end].join(".");
    let numbered = at.and_then(|at| name.parts.get(at + 1)).is_some_and(|part| part.ends_with("{}"));
    let index = numbered.then(|| block.matches("{}").count());
    Experts { block, index }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(pattern: &str, rank: usize) -> Role {
        classify(pattern, rank).role
    }

    #[test]
    fn traps_are_settled_by_order() {
        for (pattern, rank, expected) in [
            ("model.layers.{}.mlp.shared_experts.down_proj.weight", 2, Role::SharedExpert),
            ("model.layers.{}.mlp.shared_expert_gate.weight", 2, Role::SharedExpert),
            ("model.layers.{}.mlp.gate_proj.weight", 2, Role::DenseMlp),
            ("model.layers.{}.mlp.gate.weight", 2, Role::Router),
            ("model.layers.{}.mlp.gate.wg.weight", 2, Role::Router),
            ("model.layers.{}.mlp.gate.e_score_correction_bias", 1, Role::Router),
            ("model.layers.{}.mlp.gate.weight_1", 2, Role::Router),
            ("model.layers.{}.mlp.router.classifier.weight", 2, Role::Router),
            ("transformer.blocks.{}.ffn.router.layer.weight", 2, Role::Router),
            ("transformer.blocks.{}.norm_attn_norm.attn.Wqkv.weight", 2, Role::Attention),
            ("transformer.blocks.{}.norm_attn_norm.norm_1.weight", 1, Role::Norm),
            ("backbone.layers.{}.mixer.experts.{}.up_proj.weight", 2, Role::RoutedExpert),
            ("backbone.layers.{}.mixer.up_proj.weight", 2, Role::DenseMlp),
            ("backbone.layers.{}.mixer.in_proj.weight", 2, Role::Attention),
            ("backbone.layers.{}.mixer.norm.weight", 1, Role::Norm),
            ("model.layers.{}.block_sparse_moe.input_linear.weight", 3, Role::RoutedExpert),
            ("model.layers.{}.moe.gate_proj.weight", 3, Role::RoutedExpert),
            ("model.layers.{}.self_attn.q_norm.weight", 1, Role::Norm),
            ("model.layers.{}.self_attn.gate.weight", 2, Role::Attention),
            ("model.layers.{}.self_attn.sinks", 1, Role::Attention),
            ("model.visual.blocks.{}.attn.qkv.weight", 2, Role::Vision),
            ("mtp.layers.{}.mlp.experts.gate_up_proj", 3, Role::Mtp),
            ("shared.weight", 2, Role::Embedding),
            ("lm_head.weight", 2, Role::LmHead),
            ("output.weight", 2, Role::LmHead),
            ("model.layers.{}.layer_scalar", 1, Role::Other),
        ] {
            assert_eq!(role(pattern, rank), expected, "{pattern}");
            assert!(classify(pattern, rank).recognised, "{pattern}");
        }
    }

    #[test]
    fn unknown_names_say_so() {
        let tag = classify("model.layers.{}.flux_capacitor.weight", 2);
        assert_eq!((tag.role, tag.recognised), (Role::Other, false));
    }

    #[test]
    fn masks_and_frequencies_are_no_parameters() {
        assert!(classify("h.{}.attn.bias", 4).buffer);
        assert!(classify("model.layers.{}.self_attn.rotary_emb.inv_freq", 1).buffer);
        assert!(!classify("h.{}.attn.c_attn.bias", 1).buffer);
        assert!(!classify("blocks.{}.attn.bias", 1).buffer);
    }

    #[test]
    fn expert_numbers_are_found() {
        let tag = classify("encoder.block.{}.layer.{}.mlp.experts.expert_{}.wi.weight", 2);
        let experts = tag.experts.unwrap();
        assert_eq!((experts.block.as_str(), experts.index), ("encoder.block.{}.layer.{}.mlp", Some(2)));
        assert_eq!(tag.layer, Some(0));
        let fused = classify("model.layers.{}.mlp.experts.down_proj", 3).experts.unwrap();
        assert_eq!((fused.block.as_str(), fused.index), ("model.layers.{}.mlp", None));
        let wordless = classify("model.layers.{}.block_sparse_moe.input_linear.weight", 3).experts.unwrap();
        assert_eq!((wordless.block.as_str(), wordless.index), ("model.layers.{}.block_sparse_moe", None));
        let nested = classify("mtp.layers.{}.mlp.experts.{}.w1.weight", 2);
        assert_eq!((nested.role, nested.nested), (Role::Mtp, Role::RoutedExpert));
    }
}
