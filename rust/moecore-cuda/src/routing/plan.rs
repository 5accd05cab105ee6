//! Which kernels a call launches, and with how many blocks: functions of shapes alone, so that each threshold is tested
//! on both sides. Every grid gives the same result; these are the fast ones, as `cuda/*.cu` say above each kernel.

use crate::kernels::{Gpu, Shape};
use crate::tuning::{
    ALIGN_BLOCKS, ALIGN_THREADS, COMBINE_BLOCKS, COMBINE_IN_FLIGHT, COMBINE_WARPS, GATE_BLOCKS, GATE_SMALL_TOKENS,
    GATE_WARPS, PERMUTE_BLOCKS, PERMUTE_DEPTH, PERMUTE_FP8_DEPTH, PERMUTE_SMALL_TOKENS, PERMUTE_WARPS,
    ROUTE_ALONE_TOKENS, ROUTE_CLUSTER, ROUTE_CLUSTER_FEW, ROUTE_CLUSTER_FROM, ROUTE_CLUSTER_WARPS, ROUTE_COUNT_WARPS,
    ROUTE_PLACE_BYTES, ROUTE_PLACE_LONG_SPLIT, ROUTE_PLACE_SPLIT, ROUTE_PLACE_THREADS, ROUTE_SCAN_TILES,
    ROUTE_SMALL_TOKENS, ROUTE_SMALL_WARPS, ROUTE_TILE32_TOKENS,
};

/// Shared memory of a block that needs no leave of the driver.
const SHARED: u32 = 48 << 10;
/// Bytes that a warp moves at once.
const STEP: u32 = 32 * 16;
/// Numbers of choices that `cuda/combine.cu` has code of their own for.
pub(super) const UNROLLED: [u32; 7] = [1, 2, 4, 6, 8, 10, 16];

/// How rows are sorted. Without tokens, too: somebody has to write the ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// In one launch of one block or cluster, without the rows themselves.
    Small(Shape),
    /// Tile by tile.
    Tiles(Tiles),
}

/// Tokens in tiles: counted, perhaps summed up, placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiles {
    /// Tokens of one.
    pub(super) tile: u32,
    /// How many there are.
    pub(super) tiles: u32,
}

/// Neighbouring experts of a lane in the kernels of each [width](crate::kernels), which serve 32 times as many.
const WIDTHS: [u32; 4] = [2, 4, 8, 16];

fn narrowest(experts: u32) -> Option<usize> {
    WIDTHS.iter().position(|each| experts <= 32 * each)
}

/// The number of a kernel's width, by the experts of a row: at most 512.
pub(super) fn width(experts: u32) -> usize {
    narrowest(experts).unwrap_or(WIDTHS.len() - 1)
}

/// How many experts of a row each lane owns, where all of them are owned at once.
pub(super) fn experts_of_a_lane(experts: u32) -> Option<u32> {
    narrowest(experts).map(|width| WIDTHS[width])
}

/// A gate's launch.
pub(super) fn gate(tokens: u32, gpu: Gpu) -> Shape {
    if tokens <= GATE_SMALL_TOKENS {
        return early((tokens, 1), 32);
    }
    early((tokens.div_ceil(GATE_WARPS).min(gpu.processors * GATE_BLOCKS), 1), 32 * GATE_WARPS)
}

/// A launch that hides its beginning behind the kernel before it.
fn early(grid: (u32, u32), threads: u32) -> Shape {
    Shape { early: true, ..Shape::new(grid, threads) }
}

/// How so many tokens with `k` experts each are sorted into bins.
pub(super) fn route(tokens: u32, k: u32, bins: u32, gpu: Gpu) -> Route {
    small(tokens, k, bins, gpu).map_or_else(|| Route::Tiles(Tiles::of(tokens)), Route::Small)
}

fn small(tokens: u32, k: u32, bins: u32, gpu: Gpu) -> Option<Shape> {
    if tokens == 1 {
        return Some(early((1, 1), 32));
    }
    if tokens > if gpu.linked { ROUTE_SMALL_TOKENS } else { ROUTE_ALONE_TOKENS } {
        return None;
    }
    let shared = (4 * (bins * tokens.div_ceil(32) + bins + 32) + 2 * tokens * k).next_multiple_of(16);
    if shared > SHARED {
        return None;
    }
    if gpu.linked && tokens >= ROUTE_CLUSTER_FROM {
        let warps = if tokens > ROUTE_CLUSTER_FEW { ROUTE_SMALL_WARPS } else { ROUTE_CLUSTER_WARPS };
        let shape = early((ROUTE_CLUSTER, 1), 32 * warps);
        return Some(Shape { shared, cluster: ROUTE_CLUSTER, ..shape });
    }
    Some(Shape { shared, ..early((1, 1), 32 * tokens.clamp(1, ROUTE_SMALL_WARPS)) })
}

/// Bytes of workspace that sorting so many tokens may need, whatever the GPU is.
#[must_use]
pub fn workspace(tokens: u32, bins: u32) -> u64 {
    if tokens <= ROUTE_ALONE_TOKENS { 0 } else { Tiles::of(tokens).bytes(bins) }
}

impl Tiles {
    fn of(tokens: u32) -> Self {
        let tile = match tokens {
            0..=ROUTE_TILE32_TOKENS => 32,
            _ if tokens <= 2 * ROUTE_TILE32_TOKENS => 64,
            _ => 128,
        };
        Self { tile, tiles: tokens.div_ceil(tile) }
    }

    /// Whether a kernel of its own adds up the counts.
    pub(super) fn scanned(self) -> bool {
        self.tiles > ROUTE_SCAN_TILES
    }

    /// Where the starts of the tiles lie in the workspace, behind their counts.
    pub(super) fn starts(self, bins: u32) -> u64 {
        (u64::from(self.tiles) * u64::from(bins) * 2).next_multiple_of(16)
    }

    fn bytes(self, bins: u32) -> u64 {
        let starts = if self.scanned() { u64::from(self.tiles) * u64::from(bins) * 4 } else { 0 };
        self.starts(bins) + starts
    }

    /// The launch that chooses, and counts each tile.
    pub(super) fn count(self, bins: u32) -> Shape {
        Shape { shared: 4 * bins, ..early((self.tiles, 1), 32 * ROUTE_COUNT_WARPS) }
    }

    /// The launch that adds up the counts.
    pub(super) fn scan(bins: u32) -> Shape {
        Shape { early: true, ..Shape::new((bins.div_ceil(32), 1), 1024) }
    }

    /// The launch that gives each pair its row, and copies rows where they are wanted.
    ///
    /// `row_bytes` is 0 where they are not.
    pub(super) fn place(self, k: u32, bins: u32, row_bytes: u32) -> Shape {
        let splits = match row_bytes {
            0 => 1,
            1..=ROUTE_PLACE_BYTES => ROUTE_PLACE_SPLIT,
            _ => ROUTE_PLACE_LONG_SPLIT,
        };
        let shared = 4 * (bins * (self.tile / 32) + bins.next_multiple_of(2) + bins + 32 + self.tile * k);
        let shape = Shape::new((self.tiles, splits), ROUTE_PLACE_THREADS);
        Shape { shared: shared.next_multiple_of(16), early: true, ..shape }
    }
}

/// The copy of rows of `row_bytes`; with the bytes of a number where they become e4m3.
pub(super) fn permute(tokens: u32, row_bytes: u32, becomes_fp8: Option<u32>, gpu: Gpu) -> Shape {
    let (width, depth) = match becomes_fp8 {
        Some(number) => (row_bytes / number, PERMUTE_FP8_DEPTH),
        None => (row_bytes, PERMUTE_DEPTH),
    };
    let depth = if tokens <= PERMUTE_SMALL_TOKENS { 1 } else { depth };
    pieces(tokens, width.div_ceil(STEP * depth), PERMUTE_WARPS, gpu.processors * PERMUTE_BLOCKS)
}

/// The weighted sum of `k` rows of `row_bytes` for each token.
pub(super) fn combine(tokens: u32, k: u32, row_bytes: u32, gpu: Gpu) -> Shape {
    let units = if UNROLLED.contains(&k) { (COMBINE_IN_FLIGHT / (k + 2)).max(1) } else { 1 };
    let shape = pieces(tokens, row_bytes.div_ceil(STEP * units), COMBINE_WARPS, gpu.processors * COMBINE_BLOCKS);
    Shape { early: true, ..shape }
}

/// The cut of so many pairs into blocks of places: a warp for each 32 of those and for each of these.
pub(super) fn align(pairs: u32, bins: u32, blocks: u32, gpu: Gpu) -> Shape {
    let warps = pairs.div_ceil(32) + blocks;
    let grid = warps.div_ceil(ALIGN_THREADS / 32).clamp(1, gpu.processors * ALIGN_BLOCKS);
    Shape { shared: 4 * (2 * bins + bins / 32 + 1 + 32), ..early((grid, 1), ALIGN_THREADS) }
}

/// A warp for each of so many pieces of each token.
fn pieces(tokens: u32, of_token: u32, warps: u32, most_blocks: u32) -> Shape {
    let blocks = (u64::from(tokens) * u64::from(of_token)).div_ceil(u64::from(warps)).max(1);
    Shape::new((u32::try_from(blocks).unwrap_or(u32::MAX).min(most_blocks), 1), 32 * warps)
}

/// Whether the kernels can count the pieces of so many rows.
pub(super) fn countable(tokens: u32, row_bytes: u32) -> bool {
    u64::from(tokens) * u64::from(row_bytes.div_ceil(STEP)) < 1 << 31
}
