//! Plans on both sides of each threshold, and arguments that are turned down.

use moecore::Result;

use super::*;
use crate::kernels::Gpu;
use crate::tuning::{
    ALIGN_BLOCKS, ALIGN_THREADS, GATE_SMALL_TOKENS, GATE_WARPS, PERMUTE_SMALL_TOKENS, ROUTE_ALONE_TOKENS,
    ROUTE_CLUSTER, ROUTE_CLUSTER_FROM, ROUTE_SCAN_TILES, ROUTE_SMALL_TOKENS, ROUTE_SMALL_WARPS, ROUTE_TILE32_TOKENS,
};

const H100: Gpu = Gpu { processors: 132, linked: true };
const A100: Gpu = Gpu { processors: 108, linked: false };

fn small(tokens: u32, k: u32, bins: u32, gpu: Gpu) -> Option<Shape> {
    match plan::route(tokens, k, bins, gpu) {
        Route::Small(shape) => Some(shape),
        Route::Tiles(_) => None,
    }
}

fn tiles(tokens: u32) -> Tiles {
    match plan::route(tokens, 8, 256, H100) {
        Route::Small(shape) => panic!("{tokens} tokens: {shape:?}"),
        Route::Tiles(tiles) => tiles,
    }
}

fn early(grid: (u32, u32), threads: u32) -> Shape {
    Shape { early: true, ..Shape::new(grid, threads) }
}

#[test]
fn a_few_tokens_have_a_warp_each() {
    assert_eq!(plan::gate(1, H100), early((1, 1), 32));
    assert_eq!(plan::gate(GATE_SMALL_TOKENS, H100), early((GATE_SMALL_TOKENS, 1), 32));
    let more = plan::gate(GATE_SMALL_TOKENS + 1, H100);
    assert_eq!(more, early(((GATE_SMALL_TOKENS + 1).div_ceil(GATE_WARPS), 1), 32 * GATE_WARPS));
    assert!(plan::gate(i32::MAX.unsigned_abs(), H100).grid.0 < 1 << 20);
}

#[test]
fn kernels_are_those_that_the_arguments_name() {
    for (families, [any, logits, scores]) in [
        (GATE, [Family::Gate, Family::GateLogits, Family::GateScores]),
        (SMALL, [Family::RouteSmall, Family::RouteSmallLogits, Family::RouteSmallScores]),
        (COUNT, [Family::RouteCount, Family::RouteCountLogits, Family::RouteCountScores]),
    ] {
        for (flags, family, width) in [(0, any, 0), (BY_LOGITS, logits, 2), (BY_SCORES, scores, 2)] {
            let args = GateArgs { flags: flags | RENORMALIZE | IDS_I64, experts: 200, ..gate_args() };
            let want = Kernel { width, ..Kernel::with(family, Format::Bf16) };
            assert_eq!(by_rule(families, Format::Bf16, &args), want);
        }
    }
}

#[test]
fn widths_hold_the_experts() {
    let widths = [1, 64, 65, 128, 129, 256, 257, 512].map(plan::width);
    assert_eq!(widths, [0, 0, 1, 1, 2, 2, 3, 3]);
    let owned = [64, 65, 256, 512, 513, 1024].map(plan::experts_of_a_lane);
    assert_eq!(owned, [Some(2), Some(4), Some(8), Some(16), None, None]);
}

#[test]
fn few_tokens_are_sorted_in_one_launch() {
    let alone = |tokens| small(tokens, 8, 256, A100);
    // Somebody has to write the ends, also where there are no tokens.
    assert_eq!(alone(0), Some(Shape { shared: 4 * (256 + 32), ..early((1, 1), 32) }));
    assert_eq!(alone(1), Some(early((1, 1), 32)));
    assert_eq!(alone(2), Some(Shape { shared: 4 * (2 * 256 + 32) + 2 * 16, ..early((1, 1), 64) }));
    assert_eq!(alone(ROUTE_ALONE_TOKENS).unwrap().threads, 32 * ROUTE_SMALL_WARPS);
    assert_eq!(alone(ROUTE_ALONE_TOKENS + 1), None);
    let linked = |tokens| small(tokens, 8, 256, H100).map(|shape| shape.cluster);
    assert_eq!(linked(ROUTE_CLUSTER_FROM - 1), Some(1));
    assert_eq!(linked(ROUTE_CLUSTER_FROM), Some(ROUTE_CLUSTER));
    assert_eq!(linked(ROUTE_SMALL_TOKENS), Some(ROUTE_CLUSTER));
    assert_eq!(linked(ROUTE_SMALL_TOKENS + 1), None);
    // More bins than there can be do not fit one block's shared memory.
    assert_eq!(small(64, MAX_K, MAX_EXPERTS, H100).map(|shape| shape.cluster), Some(ROUTE_CLUSTER));
    assert_eq!(small(64, MAX_K, MAX_EXPERTS * 4, H100), None);
}

#[test]
fn tiles_grow_with_the_tokens() {
    assert_eq!(tiles(ROUTE_TILE32_TOKENS), Tiles { tile: 32, tiles: ROUTE_TILE32_TOKENS / 32 });
    assert_eq!(tiles(ROUTE_TILE32_TOKENS + 1), Tiles { tile: 64, tiles: ROUTE_TILE32_TOKENS / 64 + 1 });
    assert_eq!(tiles(2 * ROUTE_TILE32_TOKENS).tile, 64);
    assert_eq!(tiles(2 * ROUTE_TILE32_TOKENS + 1).tile, 128);
    assert!(!tiles(ROUTE_SCAN_TILES * 128).scanned());
    assert!(tiles(ROUTE_SCAN_TILES * 128 + 1).scanned());
}

#[test]
fn every_launch_fits_a_block() {
    for tokens in (0..600).chain([4096, 4097, 8193, 65536, 1 << 26]) {
        for (k, bins) in [(1, 1), (8, 60), (8, 256), (32, 33), (32, 1023), (32, 1024)] {
            for gpu in [H100, A100] {
                let shapes = match plan::route(tokens, k, bins, gpu) {
                    Route::Small(shape) => {
                        assert!(shape.threads <= 32 * ROUTE_SMALL_WARPS, "its kernels' bounds: {shape:?}");
                        [shape; 3]
                    }
                    Route::Tiles(tiles) => [tiles.count(bins), Tiles::scan(bins), tiles.place(k, bins, 4096)],
                };
                for shape in shapes {
                    let said = format!("{tokens} tokens, {k} of {bins}: {shape:?}");
                    assert!(shape.shared <= 48 << 10 && shape.shared.is_multiple_of(4), "{said}");
                    assert!((32..=1024).contains(&shape.threads) && shape.threads.is_multiple_of(32), "{said}");
                    assert!((1..1 << 31).contains(&shape.grid.0) && (1..65536).contains(&shape.grid.1), "{said}");
                }
            }
        }
    }
}

/// The words that `cuda/route_tiles.cu` says above its kernels, and a lane for each bin of the scan.
#[test]
fn tiles_have_the_memory_that_their_kernels_divide() {
    for (k, bins) in [(1, 1), (2, 33), (8, 63), (8, 256), (32, 1023)] {
        for tile in [32, 64, 128] {
            let tiles = Tiles { tile, tiles: 5 };
            let words = tile / 32 * bins + 2 * bins.div_ceil(2) + bins + 32 + tile * k;
            let place = tiles.place(k, bins, 0);
            assert!((4 * words..4 * words + 16).contains(&place.shared), "{k} of {bins}, {tile}: {place:?}");
            assert_eq!((place.grid, tiles.count(bins).grid), ((5, 1), (5, 1)));
            assert_eq!(tiles.count(bins).shared, 4 * bins);
            let lanes = 32 * Tiles::scan(bins).grid.0;
            assert!((bins..bins + 32).contains(&lanes), "{bins}: {lanes}");
        }
    }
}

#[test]
fn the_workspace_is_long_enough_on_every_gpu() {
    assert_eq!(workspace(0, 256), 0);
    assert_eq!(workspace(ROUTE_ALONE_TOKENS, MAX_EXPERTS), 0);
    assert_eq!(workspace(4096, 256), 128 * 256 * 2);
    for tokens in (0..600).chain([4097, 32768, 32769, 65536, 1 << 26]) {
        for (k, bins) in [(1, 1), (8, 7), (8, 256), (32, 1023), (32, 1024)] {
            for gpu in [H100, A100] {
                let Route::Tiles(tiles) = plan::route(tokens, k, bins, gpu) else { continue };
                assert!(tiles.tiles * tiles.tile >= tokens);
                let cells = u64::from(tiles.tiles) * u64::from(bins);
                let starts = tiles.starts(bins);
                assert!(starts >= cells * 2 && starts.is_multiple_of(16));
                let end = if tiles.scanned() { starts + cells * 4 } else { cells * 2 };
                assert!(workspace(tokens, bins) >= end, "{tokens} tokens, {k} of {bins}");
            }
        }
    }
}

#[test]
fn copies_of_few_rows_are_cut_finely() {
    let plain = |tokens| plan::permute(tokens, 14336, None, H100).grid.0;
    assert_eq!(plain(PERMUTE_SMALL_TOKENS), PERMUTE_SMALL_TOKENS * 28 / 4);
    assert_eq!(plain(4096), 4096 * 4 / 4);
    assert_eq!(plan::permute(4096, 14336, Some(2), H100).grid.0, 4096 * 7 / 4);
    assert_eq!(plan::permute(1, 16, None, H100), Shape::new((1, 1), 128));
    assert_eq!(plan::permute(1 << 24, 14336, None, H100).grid.0, 132 * 1024);
    assert!(plan::countable(65536, 28672) && !plan::countable(1 << 26, 1 << 14));
}

#[test]
fn sums_of_few_rows_take_several_steps() {
    let blocks = |k| plan::combine(4096, k, 14336, H100).grid.0;
    assert_eq!(blocks(2), 4096 * 14 / 4);
    assert_eq!(blocks(3), 4096 * 28 / 4);
    assert_eq!(blocks(8), 4096 * 28 / 4);
}

#[test]
fn a_cut_has_a_warp_for_each_block_of_places() {
    let blocks = |pairs, of_places| plan::align(pairs, 256, of_places, H100).grid.0;
    assert_eq!(
        plan::align(8, 256, 8, H100),
        Shape { shared: 4 * (256 + 8 + 1 + 256 + 32), ..early((2, 1), ALIGN_THREADS) }
    );
    assert_eq!(blocks(0, 0), 1);
    let warps = ALIGN_THREADS / 32;
    assert_eq!(blocks(32, warps - 1), 1);
    assert_eq!((blocks(33, warps - 1), blocks(32, warps)), (2, 2));
    assert_eq!(blocks(4096 * 8, 764), (1024 + 764_u32).div_ceil(warps));
    let most = 132 * ALIGN_BLOCKS;
    assert_eq!((blocks(0, most * warps), blocks(0, most * warps + 1)), (most, most));
    assert_eq!(blocks(i32::MAX.unsigned_abs(), i32::MAX.unsigned_abs()), most);
    assert!(plan::align(8, MAX_EXPERTS, 8, H100).shared <= 48 << 10);
}

/// The kernels have code of their own for the numbers of choices that the plan knows of.
#[test]
fn the_kernels_unroll_what_the_plan_says() {
    let text = include_str!("../../../../cuda/combine.cu");
    let cases = text.lines().filter_map(|line| line.trim().strip_prefix("CASE(")?.strip_suffix(");")?.parse().ok());
    assert_eq!(cases.collect::<Vec<u32>>(), plan::UNROLLED);
}

/// 16 tokens with 2 of 8 experts.
fn gate_args() -> GateArgs {
    GateArgs {
        logits: 0x1000,
        weights: 0x2000,
        ids: 0x3000,
        stride: 8,
        tokens: 16,
        experts: 8,
        k: 2,
        groups: 1,
        top_groups: 1,
        scale: 1.0,
        ..GateArgs::default()
    }
}

fn route_args() -> RouteArgs {
    RouteArgs {
        gate: gate_args(),
        ends: 0x4000,
        source: 0x5000,
        inverse: 0x6000,
        x: 0x7000,
        rows: 0x8000,
        bins: 8,
        row_bytes: 256,
        x_format: 1,
        ..RouteArgs::default()
    }
}

fn permute_args() -> PermuteArgs {
    PermuteArgs { x_format: 1, ..check::rows_of(&route_args()) }
}

fn combine_args() -> CombineArgs {
    CombineArgs {
        rows: 0x1000,
        inverse: 0x2000,
        out: 0x3000,
        tokens: 16,
        k: 2,
        row_count: 32,
        row_bytes: 256,
        ..CombineArgs::default()
    }
}

/// 20 pairs in 4 bins, which blocks of 8 places hold however they are spread.
fn align_args() -> AlignArgs {
    AlignArgs {
        ends: 0x1000,
        inverse: 0x2000,
        order: 0x3000,
        owner: 0x4000,
        places: 0x5000,
        pairs: 20,
        bins: 4,
        block: 8,
        capacity: 48,
    }
}

/// The error says all of these words.
#[track_caller]
fn fails(result: Result<()>, words: &[&str]) {
    let message = result.unwrap_err().to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

#[test]
fn gates_that_no_kernel_can_serve() {
    let with = |change: fn(&mut GateArgs)| {
        let mut args = gate_args();
        change(&mut args);
        check::gate(Format::F32, &args)
    };
    with(|_| ()).unwrap();
    with(|args| (args.tokens, args.logits, args.ids) = (0, 0, 0)).unwrap();
    with(|args| (args.groups, args.top_groups) = (4, 1)).unwrap();
    fails(with(|args| args.logits = 0), &["gate:", "logits is null"]);
    fails(with(|args| args.logits += 2), &["logits", "4 bytes"]);
    fails(with(|args| args.experts = 1025), &["experts is 1025"]);
    fails(with(|args| args.experts = 0), &["experts is 0"]);
    fails(with(|args| args.k = 0), &["k is 0"]);
    fails(with(|args| args.k = 9), &["k is 9", "1..=8"]);
    fails(with(|args| (args.experts, args.k) = (64, 33)), &["k is 33", "1..=32"]);
    fails(with(|args| args.tokens = 1 << 30), &["too many"]);
    fails(with(|args| args.groups = 3), &["8 experts are not 3 equal groups"]);
    fails(with(|args| args.groups = 0), &["groups is 0"]);
    fails(with(|args| args.top_groups = 2), &["top_groups is 2"]);
    fails(with(|args| args.groups = 8), &["k is 2", "1 groups leave 1"]);
    fails(with(|args| args.scoring = 4), &["scoring is 4"]);
    fails(with(|args| args.flags = 8), &["flags are 0x8"]);
    fails(with(|args| args.weights_format = 3), &["weights_format is 3"]);
    fails(with(|args| (args.flags, args.ids) = (IDS_I64, 0x3004)), &["ids", "8 bytes"]);
    fails(with(|args| args.bias = 0x4002), &["bias", "4 bytes"]);
    fails(with(|args| args.valid = 0x4002), &["valid", "4 bytes"]);
}

#[test]
fn routes_that_no_kernel_can_serve() {
    let with = |change: fn(&mut RouteArgs)| {
        let mut args = route_args();
        change(&mut args);
        check::route(Format::Bf16, &args)
    };
    with(|_| ()).unwrap();
    // Ids that are given may name nobody, so there may be more of them than experts.
    with(|args| (args.gate.logits, args.gate.groups, args.gate.k) = (0, 0, 9)).unwrap();
    with(|args| (args.bin_of, args.bins) = (0x9000, 5)).unwrap();
    with(|args| (args.x, args.row_bytes) = (0, 0)).unwrap();
    with(|args| (args.gate.tokens, args.source, args.inverse, args.gate.ids) = (0, 0, 0, 0)).unwrap();
    with(|args| args.scales = 0x9000).unwrap();
    fails(with(|args| args.gate.ids = 0), &["route:", "ids is null"]);
    fails(with(|args| args.ends = 0), &["ends is null"]);
    fails(with(|args| (args.gate.tokens, args.ends) = (0, 0)), &["ends is null"]);
    fails(with(|args| args.source = 0), &["source is null"]);
    fails(with(|args| args.inverse = 0), &["inverse is null"]);
    fails(with(|args| args.inverse = 0x6002), &["inverse", "4 bytes"]);
    let given = |args: &mut RouteArgs| (args.gate.logits, args.gate.experts, args.bin_of) = (0, 1025, 0x9000);
    fails(with(given), &["experts is 1025"]);
    fails(with(|args| args.scales = 0x9002), &["scales", "4 bytes"]);
    fails(with(|args| args.bins = 5), &["5 bins for 8 experts"]);
    fails(with(|args| (args.bin_of, args.bins) = (0x9000, 1025)), &["bins is 1025"]);
    fails(with(|args| args.row_bytes = 24), &["rows of 24 bytes"]);
    fails(with(|args| args.x = 0x7008), &["x does not begin on 16"]);
    fails(with(|args| args.rows = 0), &["null"]);
    fails(with(|args| (args.scales, args.row_bytes) = (0x9000, 272)), &["136 numbers", "128"]);
    fails(with(|args| (args.scales, args.x_format) = (0x9000, 3)), &["x_format is 3"]);
    fails(check::workspace(0), &["workspace is null"]);
    fails(check::workspace(8), &["workspace", "16 bytes"]);
}

#[test]
fn rows_that_no_kernel_can_move() {
    let permute = |change: fn(&mut PermuteArgs)| {
        let mut args = permute_args();
        change(&mut args);
        check::permute(&args)
    };
    permute(|_| ()).unwrap();
    permute(|args| (args.rows, args.out) = (0, 0)).unwrap();
    fails(permute(|args| args.inverse = 0), &["permute:", "inverse is null"]);
    fails(permute(|args| args.rows = 1 << 31), &["rows is 2147483648"]);
    fails(permute(|args| args.out = 0x8004), &["16 bytes"]);
    fails(permute(|args| (args.tokens, args.row_bytes) = (1 << 26, 1 << 14)), &["too many"]);
    let combine = |change: fn(&mut CombineArgs)| {
        let mut args = combine_args();
        change(&mut args);
        check::combine(&args)
    };
    combine(|_| ()).unwrap();
    // Rows that are not there are left out.
    combine(|args| (args.inverse, args.rows, args.row_count) = (0, 0, 0)).unwrap();
    fails(combine(|args| args.k = 33), &["combine:", "k is 33"]);
    fails(combine(|args| args.rows = 0), &["rows is null"]);
    fails(combine(|args| args.out = 0), &["out is null"]);
    fails(combine(|args| args.residual = 0x9004), &["residual", "16 bytes"]);
    fails(combine(|args| (args.weights, args.weights_format) = (0x9002, 0)), &["weights", "4 bytes"]);
    fails(combine(|args| args.row_bytes = 0), &["rows of 0 bytes"]);
}

#[test]
fn cuts_that_no_kernel_can_make() {
    let with = |change: fn(&mut AlignArgs)| {
        let mut args = align_args();
        change(&mut args);
        check::align(&args)
    };
    with(|_| ()).unwrap();
    with(|args| args.capacity = 480).unwrap();
    with(|args| (args.block, args.capacity) = (1, 20)).unwrap();
    with(|args| (args.bins, args.block, args.capacity) = (1024, 1024, 20 * 1024)).unwrap();
    with(|args| (args.pairs, args.capacity, args.inverse) = (0, 0, 0)).unwrap();
    fails(with(|args| args.capacity = 40), &["align:", "capacity is 40", "too little"]);
    fails(with(|args| args.capacity = 52), &["capacity is 52", "blocks of 8"]);
    fails(with(|args| args.capacity = 1 << 31), &["capacity is 2147483648"]);
    fails(with(|args| args.pairs = 1 << 31), &["pairs is 2147483648"]);
    fails(with(|args| args.bins = 0), &["bins is 0"]);
    fails(with(|args| args.bins = 1025), &["bins is 1025"]);
    fails(with(|args| args.block = 0), &["block is 0"]);
    fails(with(|args| args.block = 1025), &["block is 1025"]);
    fails(with(|args| args.ends = 0), &["ends is null"]);
    fails(with(|args| args.owner = 0), &["owner is null"]);
    fails(with(|args| args.places += 2), &["places", "4 bytes"]);
    fails(with(|args| args.inverse += 2), &["inverse", "4 bytes"]);
}
