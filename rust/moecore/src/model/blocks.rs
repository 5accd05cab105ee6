//! Blocks of experts: how many a layer has, and how large each is.
//!
//! Experts are kept as runs of equal size. A name or a shape may claim any number of experts, and none of them costs
//! memory that the file did not.

use std::collections::BTreeMap;

use crate::model::config::Config;
use crate::model::roles::Role;

/// Size of one expert.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertSize {
    /// Bytes, scales and biases included.
    pub bytes: u64,
    /// Logical parameters.
    pub parameters: u64,
}

/// The routed experts of one layer (or of one block, where a layer has several).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertBlock {
    /// Name of the block, such as `model.layers.3.mlp`.
    pub name: String,
    /// The layer's number.
    pub layer: u16,
    /// What the experts are: routed experts, experts of an MTP module, or attention heads that are routed (JetMoE).
    pub role: Role,
    /// Runs of experts of equal size, by their numbers: how many, and how large each is. A hole has size 0.
    pub runs: Vec<(u64, ExpertSize)>,
}

impl ExpertBlock {
    /// How many experts there are, holes counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.runs.iter().map(|(count, _)| *count).sum()
    }

    /// How many experts the first `limit` are, and what they take together.
    #[must_use]
    pub fn first(&self, limit: u64) -> (u64, u128, u128) {
        let (mut left, mut bytes, mut parameters) = (limit, 0, 0);
        for &(count, size) in &self.runs {
            let taken = count.min(left);
            bytes += u128::from(taken) * u128::from(size.bytes);
            parameters += u128::from(taken) * u128::from(size.parameters);
            left -= taken;
        }
        (limit - left, bytes, parameters)
    }
}

/// An expert block while it is counted.
pub(super) struct BlockCount {
    layer: u16,
    numbered: BTreeMap<u16, ExpertSize>,
    fused: ExpertSize,
    fused_experts: u64,
}

impl BlockCount {
    pub(super) fn new(layer: u16) -> Self {
        Self { layer, numbered: BTreeMap::new(), fused: ExpertSize::default(), fused_experts: 0 }
    }

    /// Adds a tensor: to the expert `number`, or to all. A vector that is not one value for each expert belongs to no
    /// expert alone and is left out (JetMoE's output bias).
    pub(super) fn add(&mut self, number: Option<u16>, size: ExpertSize, shape: &[u64], config: &Config) {
        let sum = if let Some(number) = number {
            self.numbered.entry(number).or_default()
        } else {
            match fused_experts(shape, config) {
                Some(experts) => self.fused_experts = self.fused_experts.max(experts),
                None if shape.len() < 2 => return,
                None => {}
            }
            &mut self.fused
        };
        sum.bytes = sum.bytes.saturating_add(size.bytes);
        sum.parameters = sum.parameters.saturating_add(size.parameters);
    }

    /// The block, and what does not fit together in it.
    pub(super) fn finish(self, name: String, role: Role) -> (ExpertBlock, Option<String>) {
        let mut runs: Vec<(u64, ExpertSize)> = Vec::new();
        let mut next = 0;
        for (number, size) in self.numbered {
            let number = u64::from(number);
            push(&mut runs, number - next, ExpertSize::default());
            push(&mut runs, 1, size);
            next = number + 1;
        }
        let mut warning = None;
        let count = self.fused_experts;
        if count > 0 {
            if !self.fused.bytes.is_multiple_of(count) {
                warning = Some(format!("{name}: fused expert tensors do not divide by {count} experts"));
            }
            let share = ExpertSize { bytes: self.fused.bytes / count, parameters: self.fused.parameters / count };
            push(&mut runs, count.saturating_sub(next), ExpertSize::default());
            for (_, size) in &mut runs {
                size.bytes = size.bytes.saturating_add(share.bytes);
                size.parameters = size.parameters.saturating_add(share.parameters);
            }
        } else if self.fused.bytes > 0 {
            warning = Some(format!("{name}: nothing states how many experts its tensors hold"));
        }
        (ExpertBlock { name, layer: self.layer, role, runs }, warning)
    }
}

fn push(runs: &mut Vec<(u64, ExpertSize)>, count: u64, size: ExpertSize) {
    match runs.last_mut() {
        Some((before, last)) if *last == size => *before += count,
        _ if count > 0 => runs.push((count, size)),
        _ => {}
    }
}

/// Experts in a fused tensor: its first dimension, unless the config's count says that rows of all experts are
/// stacked there (DBRX: `[experts * intermediate, hidden]`). A matrix without a config's word tells nothing.
fn fused_experts(shape: &[u64], config: &Config) -> Option<u64> {
    let first = shape.first().copied().filter(|_| !shape.contains(&0))?;
    match config.num_experts().filter(|&stated| stated > 0) {
        Some(stated) if first == stated => Some(stated),
        Some(stated) if shape.len() == 2 && first.is_multiple_of(stated) => Some(stated),
        _ => Some(first).filter(|_| shape.len() > 2),
    }
}
