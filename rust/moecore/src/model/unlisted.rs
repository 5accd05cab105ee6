//! Models that the family table does not have: a plan by the common rules, where the headers bear it out.
//!
//! The config's heads are believed only if every layer has a `k_proj` and a `v_proj` of just that size. What cannot be
//! checked so (latents, states, fused projections) stays unknown.

use crate::model::attention::CachePlan;
use crate::model::config::Config;
use crate::model::families;
use crate::model::layout::ModelLayout;
use crate::model::roles::Role;

/// The plan of a model that no family row names, or nothing.
#[must_use]
pub fn plan(config: &Config, layout: &ModelLayout) -> Option<CachePlan> {
    if families::find(config).is_some() || config.flag("is_encoder_decoder") == Some(true) || !generates(config) {
        return None;
    }
    let plan = CachePlan::of_family(config, &families::UNLISTED);
    let hidden = config.int(&["hidden_size", "d_model", "n_embd"])?;
    let rows = projection(layout, ".k_proj.weight", hidden, plan.layers.len())?
        + projection(layout, ".v_proj.weight", hidden, plan.layers.len())?;
    let borne_out = plan.layers.iter().all(|layer| {
        let attention_alone = layer.state.is_none() && layer.unknown.is_none();
        attention_alone && layer.tokens.is_some_and(|tokens| tokens.elements == rows && tokens.latent_rope.is_none())
    });
    Some(plan).filter(|_| borne_out)
}

/// Whether the model is one that writes text: encoders have heads too, and keep no cache.
fn generates(config: &Config) -> bool {
    let names = config.list("architectures").unwrap_or_default().iter().filter_map(serde_json::Value::as_str);
    names
        .into_iter()
        .any(|name| ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration"].iter().any(|end| name.ends_with(end)))
}

/// Rows of a projection that each of `layers` layers has once, all of one size.
fn projection(layout: &ModelLayout, ending: &str, hidden: u64, layers: usize) -> Option<u64> {
    let mut found =
        layout.groups.iter().filter(|group| group.role == Role::Attention && group.pattern.ends_with(ending));
    let group = found.next().filter(|group| found.next().is_none() && group.tensors == layers as u64)?;
    let size = (group.tensors * hidden).max(1);
    group.parameters.is_multiple_of(size).then(|| group.parameters / size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::header::{Inventory, names};

    fn plan_of(config: &str, key_rows: u64) -> Option<CachePlan> {
        let mut inventory = Inventory::default();
        let mut pattern = String::new();
        for layer in 0..2 {
            for (projection, rows) in [("k_proj", key_rows), ("v_proj", 16)] {
                let name = format!("model.layers.{layer}.self_attn.{projection}.weight");
                let indices = names::collapse(&name, &mut pattern);
                inventory.add(&pattern, &[rows, 64], Dtype::BF16, indices);
            }
        }
        let config = Config::parse(config.as_bytes(), "config.json").unwrap();
        let layout = ModelLayout::new(&inventory, &config);
        plan(&config, &layout)
    }

    #[test]
    fn heads_are_believed_when_the_shapes_agree() {
        let config = r#"{"model_type":"brand_new","num_hidden_layers":2,"hidden_size":64,"num_attention_heads":8,
            "num_key_value_heads":2,"architectures":["BrandNewForCausalLM"]}"#;
        assert_eq!(plan_of(config, 16).map(|plan| plan.layers.len()), Some(2));
        assert_eq!(plan_of(config, 32), None, "keys of another size");
        assert_eq!(plan_of(&config.replace(":2,\"hidden", ":3,\"hidden"), 16), None, "a layer without keys");
        assert_eq!(plan_of(&config.replace("ForCausalLM", "Encoder"), 16), None, "keeps no cache");
        assert_eq!(plan_of(&config.replace("brand_new", "llama"), 16), None, "has a row of its own");
    }
}
