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

/// Tokens up to which a gate's blocks have one warp.
pub const GATE_SMALL_TOKENS: u32 = 1024;
/// Warps of its blocks otherwise.
pub const GATE_WARPS: u32 = 8;
/// Blocks of it for each multiprocessor.
pub const GATE_BLOCKS: u32 = 8;
/// Tokens up to which rows are sorted in one launch, by a cluster.
pub const ROUTE_SMALL_TOKENS: u32 = 128;
/// The same, by one block.
pub const ROUTE_ALONE_TOKENS: u32 = 64;
/// Tokens from which a cluster does it.
pub const ROUTE_CLUSTER_FROM: u32 = 17;
/// Blocks of the cluster.
pub const ROUTE_CLUSTER: u32 = 8;
/// Warps of each.
pub const ROUTE_CLUSTER_WARPS: u32 = 8;
/// Tokens above which they have as many warps as a block that is alone.
pub const ROUTE_CLUSTER_FEW: u32 = 64;
/// Warps of the block that does it alone.
pub const ROUTE_SMALL_WARPS: u32 = 16;
/// Threads of a block of `align`.
pub const ALIGN_THREADS: u32 = 256;
/// Blocks of it for each multiprocessor.
pub const ALIGN_BLOCKS: u32 = 4;
/// Tokens up to which a tile has 32.
pub const ROUTE_TILE32_TOKENS: u32 = 4096;
/// Tiles above which a kernel of its own adds up their counts.
pub const ROUTE_SCAN_TILES: u32 = 256;
/// Warps of a block that counts a tile.
pub const ROUTE_COUNT_WARPS: u32 = 16;
/// Threads of a block that places a tile's rows.
pub const ROUTE_PLACE_THREADS: u32 = 512;
/// Blocks that share the copy of a tile's rows.
pub const ROUTE_PLACE_SPLIT: u32 = 4;
/// For rows of up to so many bytes;
pub const ROUTE_PLACE_BYTES: u32 = 8192;
/// for longer ones.
pub const ROUTE_PLACE_LONG_SPLIT: u32 = 16;
/// Warps of a block that copies rows.
pub const PERMUTE_WARPS: u32 = 4;
/// Steps of a warp's piece of a row.
pub const PERMUTE_DEPTH: u32 = 8;
/// The same where rows become e4m3.
pub const PERMUTE_FP8_DEPTH: u32 = 2;
/// Tokens up to which a piece is one step.
pub const PERMUTE_SMALL_TOKENS: u32 = 64;
/// Blocks that copy rows, for each multiprocessor.
pub const PERMUTE_BLOCKS: u32 = 1024;
/// Warps of a block that adds up rows.
pub const COMBINE_WARPS: u32 = 4;
/// Loads of a lane in flight.
pub const COMBINE_IN_FLIGHT: u32 = 8;
/// Blocks that add up rows, for each multiprocessor.
pub const COMBINE_BLOCKS: u32 = 1024;

// The counts of that many tiles of 128 tokens fit 16 bits.
const _: () = assert!(ROUTE_SCAN_TILES <= 511);

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
            ("GATE_SMALL_TOKENS", super::GATE_SMALL_TOKENS),
            ("GATE_WARPS", super::GATE_WARPS),
            ("GATE_BLOCKS", super::GATE_BLOCKS),
            ("ROUTE_SMALL_TOKENS", super::ROUTE_SMALL_TOKENS),
            ("ROUTE_ALONE_TOKENS", super::ROUTE_ALONE_TOKENS),
            ("ROUTE_CLUSTER_FROM", super::ROUTE_CLUSTER_FROM),
            ("ROUTE_CLUSTER", super::ROUTE_CLUSTER),
            ("ROUTE_CLUSTER_WARPS", super::ROUTE_CLUSTER_WARPS),
            ("ROUTE_SMALL_WARPS", super::ROUTE_SMALL_WARPS),
            ("ALIGN_THREADS", super::ALIGN_THREADS),
            ("ALIGN_BLOCKS", super::ALIGN_BLOCKS),
            ("ROUTE_TILE32_TOKENS", super::ROUTE_TILE32_TOKENS),
            ("ROUTE_SCAN_TILES", super::ROUTE_SCAN_TILES),
            ("ROUTE_COUNT_WARPS", super::ROUTE_COUNT_WARPS),
            ("ROUTE_PLACE_THREADS", super::ROUTE_PLACE_THREADS),
            ("ROUTE_PLACE_SPLIT", super::ROUTE_PLACE_SPLIT),
            ("ROUTE_PLACE_BYTES", super::ROUTE_PLACE_BYTES),
            ("ROUTE_PLACE_LONG_SPLIT", super::ROUTE_PLACE_LONG_SPLIT),
            ("ROUTE_CLUSTER_FEW", super::ROUTE_CLUSTER_FEW),
            ("PERMUTE_WARPS", super::PERMUTE_WARPS),
            ("PERMUTE_DEPTH", super::PERMUTE_DEPTH),
            ("PERMUTE_FP8_DEPTH", super::PERMUTE_FP8_DEPTH),
            ("PERMUTE_SMALL_TOKENS", super::PERMUTE_SMALL_TOKENS),
            ("PERMUTE_BLOCKS", super::PERMUTE_BLOCKS),
            ("COMBINE_WARPS", super::COMBINE_WARPS),
            ("COMBINE_IN_FLIGHT", super::COMBINE_IN_FLIGHT),
            ("COMBINE_BLOCKS", super::COMBINE_BLOCKS),
        ] {
            let there = text.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
            assert_eq!(there.and_then(|number| number.trim().parse().ok()), Some(here), "{name}");
        }
    }
}
