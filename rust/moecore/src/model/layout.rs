//! An [`Inventory`] and a [`Config`] to groups of like tensors and blocks of experts.

use hashbrown::{HashMap, HashSet};

use crate::dtype::Dtype;
use crate::header::inventory::Inventory;
use crate::header::names::{Indices, expand};
use crate::model::blocks::{BlockCount, ExpertBlock, ExpertSize};
use crate::model::config::Config;
use crate::model::packing::{self, Counter};
use crate::model::roles::{self, Role, Tag};

/// Unrecognised names listed in a report; the rest is counted.
const UNRECOGNISED_SHOWN: usize = 50;

/// Tensors that share role, name pattern and dtype.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorGroup {
    /// What they are for.
    pub role: Role,
    /// What they are for inside an MTP module or a tower.
    pub nested: Role,
    /// Their names, numbers replaced by `{}`.
    pub pattern: String,
    /// Element type.
    pub dtype: Dtype,
    /// How many they are.
    pub tensors: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Their stored elements.
    pub stored: u64,
    /// Their logical parameters: packed values unpacked, scales and buffers not counted.
    pub parameters: u64,
}

/// Which tensor of a checkpoint is what.
#[derive(Debug, Default)]
pub struct ModelLayout {
    /// All tensors, grouped.
    pub groups: Vec<TensorGroup>,
    /// Blocks of routed experts, in layer order.
    pub expert_blocks: Vec<ExpertBlock>,
    /// Layers that the tensor names show, MTP and towers left out.
    pub layers: u64,
    /// Names that no rule knows.
    pub unrecognised: Vec<String>,
    /// What does not fit together.
    pub warnings: Vec<String>,
}

/// What is found out once for all tensors of a pattern and rank, so that a tensor costs no look at its name.
struct Kind {
    rank: usize,
    tag: Tag,
    /// Number of what stands before the first number of the name.
    prefix: usize,
    /// Number of the expert block's pattern, and how many numbers the block's name has.
    block: Option<(usize, usize)>,
    /// Groups of these tensors so far.
    groups: Vec<usize>,
}

/// Numbers for strings.
#[derive(Default)]
struct Numbers {
    texts: Vec<String>,
    numbers: HashMap<String, usize>,
}

impl Numbers {
    fn of(&mut self, text: &str) -> usize {
        *self.numbers.entry_ref(text).or_insert_with(|| {
            self.texts.push(text.to_owned());
            self.texts.len() - 1
        })
    }
}

/// Number of a block's pattern, the numbers in its name, and its role: a hostile name may mix roles in one block.
type BlockKey = (usize, Indices, Role);

impl ModelLayout {
    /// Finds the role of every tensor.
    #[must_use]
    pub fn new(inventory: &Inventory, config: &Config) -> Self {
        let packings = packing::patterns(inventory);
        let mut counter = Counter::new(inventory, &packings, config);
        let mtp_from = mtp_layers_from(config);
        let mut kinds: Vec<Vec<Kind>> = inventory.patterns().iter().map(|_| Vec::new()).collect();
        let (mut prefixes, mut block_names) = (Numbers::default(), Numbers::default());
        let mut blocks: HashMap<BlockKey, BlockCount> = HashMap::new();
        let mut layers: HashSet<(usize, u16)> = HashSet::new();
        let mut layout = Self::default();
        let mut unknown = 0;

        for row in inventory.rows() {
            let pattern = row.pattern as usize;
            let rank = inventory.shape(row).len();
            let at = kinds[pattern].iter().position(|kind| kind.rank == rank).unwrap_or_else(|| {
                kinds[pattern].push(Kind::new(&packings[pattern].stem, rank, &mut prefixes, &mut block_names));
                kinds[pattern].len() - 1
            });
            let kind = &mut kinds[pattern][at];
            let layer = kind.tag.layer.map(|slot| row.indices[slot]);
            let past_end =
                kind.tag.role != Role::Vision && layer.zip(mtp_from).is_some_and(|(at, end)| u64::from(at) >= end);
            let role = if past_end { Role::Mtp } else { kind.tag.role };
            let size = ExpertSize {
                bytes: inventory.bytes(row),
                parameters: if kind.tag.buffer { 0 } else { counter.logical(row) },
            };

            let group = layout.group(kind, role, row.dtype, &inventory.patterns()[pattern]);
            group.tensors += 1;
            group.bytes = group.bytes.saturating_add(size.bytes);
            group.stored = group.stored.saturating_add(inventory.elements(row));
            group.parameters = group.parameters.saturating_add(size.parameters);

            if !kind.tag.recognised {
                unknown += 1;
                if layout.unrecognised.len() < UNRECOGNISED_SHOWN {
                    layout.unrecognised.push(inventory.name(row));
                }
            }
            if let Some(layer) = layer.filter(|_| !matches!(role, Role::Mtp | Role::Vision)) {
                layers.insert((kind.prefix, layer));
            }
            if let Some((block, depth)) = kind.block.filter(|_| role != Role::Vision) {
                let mut indices = row.indices;
                indices.iter_mut().skip(depth).for_each(|index| *index = 0);
                let block = blocks.entry((block, indices, role)).or_insert_with(|| BlockCount::new(layer.unwrap_or(0)));
                let slot = kind.tag.experts.as_ref().and_then(|experts| experts.index);
                block.add(slot.map(|slot| row.indices[slot]), size, inventory.shape(row), config);
            }
        }

        if unknown > layout.unrecognised.len() {
            let message = format!("{unknown} tensor names are unrecognised; the first {UNRECOGNISED_SHOWN} are listed");
            layout.warnings.push(message);
        }
        layout.layers = layers.len() as u64;
        layout
            .groups
            .sort_by(|a, b| (a.role, a.nested, &a.pattern, a.dtype).cmp(&(b.role, b.nested, &b.pattern, b.dtype)));
        layout.finish_blocks(blocks, &block_names);
        layout.finish_warnings(inventory, config, counter.guessed());
        layout
    }

    /// The group of tensors of a kind with this role and dtype.
    fn group(&mut self, kind: &mut Kind, role: Role, dtype: Dtype, pattern: &str) -> &mut TensorGroup {
        let known =
            kind.groups.iter().copied().find(|&at| (self.groups[at].role, self.groups[at].dtype) == (role, dtype));
        let at = known.unwrap_or_else(|| {
            let nested = kind.tag.nested;
            let pattern = pattern.to_owned();
            self.groups.push(TensorGroup {
                role,
                nested,
                pattern,
                dtype,
                tensors: 0,
                bytes: 0,
                stored: 0,
                parameters: 0,
            });
            kind.groups.push(self.groups.len() - 1);
            self.groups.len() - 1
        });
        &mut self.groups[at]
    }

    fn finish_blocks(&mut self, blocks: HashMap<BlockKey, BlockCount>, names: &Numbers) {
        for ((number, indices, role), block) in blocks {
            let name = expand(&names.texts[number], indices);
            let (block, warning) = block.finish(name, role);
            self.warnings.extend(warning);
            self.expert_blocks.push(block);
        }
        self.expert_blocks.sort_by(|a, b| (a.role, a.layer, &a.name).cmp(&(b.role, b.layer, &b.name)));
    }

    fn finish_warnings(&mut self, inventory: &Inventory, config: &Config, guessed: Vec<String>) {
        let (shown, count) = inventory.duplicates(3);
        if count > 0 {
            let names = shown.join(", ");
            self.warnings
                .push(format!("{count} tensor names are in more than one file ({names}); bytes count every copy"));
        }
        if let Some(stated) = config.num_experts() {
            let found = self.main_blocks().map(ExpertBlock::count).max();
            if let Some(found) = found.filter(|&found| found != stated && config.text_experts().is_none()) {
                self.warnings.push(format!("config.json states {stated} experts, the headers hold {found}"));
            }
            let holed = self.main_blocks().filter(|block| block.runs.iter().any(|(_, size)| size.bytes == 0)).count();
            if holed > 0 {
                self.warnings.push(format!("{holed} expert blocks miss experts; the checkpoint is incomplete"));
            }
        }
        for stem in guessed.into_iter().take(3) {
            self.warnings.push(format!("{stem}: bits per parameter are stated nowhere; 4 assumed"));
        }
    }

    /// Blocks of routed experts of the model itself: no MTP modules, no routed attention.
    pub fn main_blocks(&self) -> impl Iterator<Item = &ExpertBlock> {
        self.expert_blocks.iter().filter(|block| block.role == Role::RoutedExpert)
    }

    /// Sums a figure over the groups that `keep` accepts.
    pub fn sum(&self, keep: impl Fn(&TensorGroup) -> bool, figure: impl Fn(&TensorGroup) -> u64) -> u64 {
        // Files of one repo may lie about sizes that no disk holds.
        self.groups.iter().filter(|group| keep(group)).map(figure).fold(0, u64::saturating_add)
    }

    /// The dtype that the model computes in, as its unquantised weights show it: embeddings first, else norms.
    #[must_use]
    pub fn unquantised_dtype(&self) -> Option<Dtype> {
        let largest = |role: Role| {
            self.groups
                .iter()
                .filter(|group| group.role == role && group.dtype.is_float() && group.dtype.bits() >= 16)
                .max_by_key(|group| group.bytes)
                .map(|group| group.dtype)
        };
        largest(Role::Embedding).or_else(|| largest(Role::Norm)).or_else(|| largest(Role::Attention))
    }
}

impl Kind {
    fn new(stem: &str, rank: usize, prefixes: &mut Numbers, blocks: &mut Numbers) -> Self {
        let tag = roles::classify(stem, rank);
        let block =
            tag.experts.as_ref().map(|experts| (blocks.of(&experts.block), experts.block.matches("{}").count()));
        Self { rank, prefix: prefixes.of(prefix_of(stem)), block, tag, groups: Vec::new() }
    }
}

/// The first layer number that belongs to MTP: decoder layers past the last one are prediction modules.
fn mtp_layers_from(config: &Config) -> Option<u64> {
    if config.flag("is_encoder_decoder") == Some(true) {
        return None;
    }
    config.layers()
}

/// The part of a pattern before its first number: what tells an encoder's layers from a decoder's.
fn prefix_of(pattern: &str) -> &str {
    pattern.split_once("{}").map_or(pattern, |(prefix, _)| prefix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::names;

    fn layout(tensors: &[(&str, &[u64])], config: &str) -> ModelLayout {
        let mut inventory = Inventory::default();
        let mut pattern = String::new();
        for (name, shape) in tensors {
            let indices = names::collapse(name, &mut pattern);
            inventory.add(&pattern, shape, Dtype::BF16, indices);
        }
        ModelLayout::new(&inventory, &Config::parse(config.as_bytes(), "config.json").unwrap())
    }

    #[test]
    fn layers_past_the_last_are_mtp() {
        let layout = layout(
            &[("model.layers.0.mlp.experts.0.w1.weight", &[4]), ("model.layers.1.mlp.experts.0.w1.weight", &[4])],
            r#"{"num_hidden_layers":1,"num_experts":1}"#,
        );
        assert_eq!(layout.layers, 1);
        let roles: Vec<_> = layout.groups.iter().map(|group| (group.role, group.nested)).collect();
        assert_eq!(roles, [(Role::RoutedExpert, Role::RoutedExpert), (Role::Mtp, Role::RoutedExpert)]);
        assert_eq!(layout.main_blocks().count(), 1);
        assert!(layout.warnings.is_empty(), "{:?}", layout.warnings);
    }

    #[test]
    fn stacked_and_fused_experts_are_divided() {
        let stacked = layout(
            &[("transformer.blocks.0.ffn.experts.mlp.w1", &[64, 3])],
            r#"{"n_layers":1,"ffn_config":{"moe_num_experts":16}}"#,
        );
        assert_eq!(stacked.expert_blocks[0].runs, [(16, ExpertSize { bytes: 24, parameters: 12 })]);
        let fused =
            layout(&[("layers.0.experts.down_proj", &[4, 5, 3]), ("layers.0.experts.b_proj_bias", &[4, 2])], "{}");
        assert_eq!(fused.expert_blocks[0].runs, [(4, ExpertSize { bytes: 34, parameters: 17 })]);
    }

    #[test]
    fn groups_of_experts_and_holes_are_told() {
        let layout = layout(
            &[("l.0.experts.0.w", &[4]), ("l.0.experts.1.w", &[4]), ("l.0.experts.3.w", &[2])],
            r#"{"num_experts":4}"#,
        );
        assert_eq!(layout.expert_blocks[0].runs.len(), 3);
        assert_eq!(layout.expert_blocks[0].count(), 4);
        assert!(layout.warnings.iter().any(|warning| warning.contains("miss experts")), "{:?}", layout.warnings);
    }

    #[test]
    fn claims_of_endless_experts_cost_nothing() {
        let claims = layout(
            &[("l.0.experts.down_proj", &[1 << 50, 0]), ("l.1.experts.65535.w", &[1]), ("l.{}.experts.{}.w", &[2])],
            r#"{"num_experts":1125899906842624}"#,
        );
        let counts: Vec<u64> = claims.expert_blocks.iter().map(ExpertBlock::count).collect();
        assert!(counts.contains(&65_536) && counts.iter().all(|&count| count <= 65_536), "{counts:?}");
        assert!(claims.expert_blocks.iter().all(|block| block.runs.len() <= 2));
    }

    #[test]
    fn roles_in_one_block_stay_apart() {
        let mixed = layout(
            &[("l.0.self_attn.experts.0.w.weight", &[4, 4]), ("l.0.self_attn.experts.0.mtp.weight", &[64, 64])],
            r#"{"num_experts_per_tok":1,"num_experts":1}"#,
        );
        assert_eq!(mixed.expert_blocks.len(), 2);
    }
}
