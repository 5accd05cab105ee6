//! The numbers of `cuda/tuning.cuh` that a launch must know. A test compares them with that file.

/// Blocks of `acquire`.
pub const ACQUIRE_BLOCKS: u32 = 4;
/// Threads of each.
pub const ACQUIRE_THREADS: u32 = 512;
/// Warps of a block of the expert kernels.
pub const EXPERT_WARPS: u32 = 4;
/// Warps of a block of `expert_down`.
pub const DOWN_WARPS: u32 = 8;
/// Warps of them that share an output.
pub const DOWN_SHARES: u32 = 8;
/// Outputs that they make together.
pub const DOWN_OUTPUTS: u32 = 2;
/// Warps of a block of the transposed product.
pub const TRANSPOSED_WARPS: u32 = 8;

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernels_agree() {
        let text = include_str!("../../../cuda/tuning.cuh");
        for (name, here) in [
            ("ACQUIRE_BLOCKS", super::ACQUIRE_BLOCKS),
            ("ACQUIRE_THREADS", super::ACQUIRE_THREADS),
            ("EXPERT_WARPS", super::EXPERT_WARPS),
            ("DOWN_WARPS", super::DOWN_WARPS),
            ("DOWN_SHARES", super::DOWN_SHARES),
            ("DOWN_OUTPUTS", super::DOWN_OUTPUTS),
            ("TRANSPOSED_WARPS", super::TRANSPOSED_WARPS),
        ] {
            let there = text.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
            assert_eq!(there.and_then(|number| number.trim().parse().ok()), Some(here), "{name}");
        }
    }
}
