// Every number that was chosen by measurement, in one place; a sweep sets others with -D. The host side knows those that
// shape a launch (rust/moecore-cuda/src/tuning.rs), and a test compares them.
#pragma once

// acquire: blocks that share one copy, and threads of each.
#ifndef ACQUIRE_BLOCKS
#define ACQUIRE_BLOCKS 4
#endif
#ifndef ACQUIRE_THREADS
#define ACQUIRE_THREADS 512
#endif
// 16-byte loads from pinned memory that one thread has in flight.
#ifndef FETCH_IN_FLIGHT
#define FETCH_IN_FLIGHT 8
#endif
// 1: loads ask L2 for 256 bytes.
#ifndef FETCH_WIDE
#define FETCH_WIDE 0
#endif
// 1: warps take tiles from a counter; 0: by turns.
#ifndef FETCH_DYNAMIC
#define FETCH_DYNAMIC 1
#endif
// Orders that are held in shared memory.
#ifndef ORDER_BATCH
#define ORDER_BATCH 128
#endif
// Pause between two looks at the host's answer, and looks between two looks at the clock.
#ifndef POLL_PAUSE_NS
#define POLL_PAUSE_NS 32
#endif
#ifndef POLLS_PER_CLOCK
#define POLLS_PER_CLOCK 64
#endif

// Expert kernels but expert_down: warps of a block.
#ifndef EXPERT_WARPS
#define EXPERT_WARPS 4
#endif
// 1: loads of weights ask L2 for 256 bytes.
#ifndef WEIGHTS_WIDE
#define WEIGHTS_WIDE 0
#endif
// expert_up: 16-byte loads in flight of each of a warp's two rows.
#ifndef UP_DEPTH
#define UP_DEPTH 4
#endif
// expert_up: blocks of a multiprocessor that registers are shared out for. More registers let more loads be in flight.
#ifndef UP_BLOCKS
#define UP_BLOCKS 4
#endif
// expert_down: the same; warps of a block, warps of them that share the experts of an output, outputs of a warp,
// experts that it reads side by side, and 16-byte loads in flight of each.
#ifndef DOWN_BLOCKS
#define DOWN_BLOCKS 3
#endif
#ifndef DOWN_WARPS
#define DOWN_WARPS 8
#endif
#ifndef DOWN_SHARES
#define DOWN_SHARES 8
#endif
#ifndef DOWN_OUTPUTS
#define DOWN_OUTPUTS 2
#endif
#ifndef DOWN_ROWS
#define DOWN_ROWS 1
#endif
#ifndef DOWN_DEPTH
#define DOWN_DEPTH 3
#endif
// slot_linear: 16-byte loads in flight.
#ifndef LINEAR_DEPTH
#define LINEAR_DEPTH 4
#endif
// slot_linear over transposed weights: warps that share the sum of one output.
#ifndef TRANSPOSED_WARPS
#define TRANSPOSED_WARPS 8
#endif

// permute: warps of a block; 16-byte loads of one lane before its k stores of each (plain rows); 512-column pieces of a
// row that a warp turns into e4m3 side by side.
#ifndef PERMUTE_WARPS
#define PERMUTE_WARPS 4
#endif
#ifndef PERMUTE_DEPTH
#define PERMUTE_DEPTH 8
#endif
#ifndef PERMUTE_FP8_DEPTH
#define PERMUTE_FP8_DEPTH 2
#endif
// Up to so many tokens a warp takes 512 bytes (or columns) at a time, so that a few rows occupy the whole GPU.
#ifndef PERMUTE_SMALL_TOKENS
#define PERMUTE_SMALL_TOKENS 64
#endif
// Blocks for each multiprocessor at most; whoever is done takes the next piece by turns.
#ifndef PERMUTE_BLOCKS
#define PERMUTE_BLOCKS 1024
#endif
// How rows are stored. 0: plainly; 1: as a stream (st.cs); 2: past L1; 3: first to leave L2.
#ifndef PERMUTE_STORE_HINT
#define PERMUTE_STORE_HINT 0
#endif

// combine: warps of a block; warps of a multiprocessor that registers must suffice for; 16-byte loads of one lane in
// flight; blocks for each multiprocessor at most; how results are stored (numbers as above).
#ifndef COMBINE_WARPS
#define COMBINE_WARPS 4
#endif
#ifndef COMBINE_RESIDENT
#define COMBINE_RESIDENT 16
#endif
#ifndef COMBINE_IN_FLIGHT
#define COMBINE_IN_FLIGHT 8
#endif
#ifndef COMBINE_BLOCKS
#define COMBINE_BLOCKS 1024
#endif
#ifndef COMBINE_STORE_HINT
#define COMBINE_STORE_HINT 0
#endif

// gate: tokens up to which a block has one warp; warps of a block otherwise, blocks for each multiprocessor at most, and
// blocks whose registers must fit into one at a time: in general, by logits of at most 256 experts, and of more than 256.
#ifndef GATE_SMALL_TOKENS
#define GATE_SMALL_TOKENS 1024
#endif
#ifndef GATE_WARPS
#define GATE_WARPS 8
#endif
#ifndef GATE_BLOCKS
#define GATE_BLOCKS 8
#endif
#ifndef GATE_RESIDENT
#define GATE_RESIDENT 5
#endif
#ifndef GATE_LOGITS_RESIDENT
#define GATE_LOGITS_RESIDENT 6
#endif
#ifndef GATE_WIDE_RESIDENT
#define GATE_WIDE_RESIDENT 3
#endif
// route in one launch: tokens up to which it is worth it, with and without a cluster of blocks; tokens from which there
// is a cluster, its blocks and their warps; tokens above which these have as many warps as a block that is alone.
#ifndef ROUTE_SMALL_TOKENS
#define ROUTE_SMALL_TOKENS 128
#endif
#ifndef ROUTE_ALONE_TOKENS
#define ROUTE_ALONE_TOKENS 64
#endif
#ifndef ROUTE_CLUSTER_FROM
#define ROUTE_CLUSTER_FROM 17
#endif
#ifndef ROUTE_CLUSTER
#define ROUTE_CLUSTER 8
#endif
#ifndef ROUTE_CLUSTER_WARPS
#define ROUTE_CLUSTER_WARPS 8
#endif
#ifndef ROUTE_CLUSTER_FEW
#define ROUTE_CLUSTER_FEW 64
#endif
#ifndef ROUTE_SMALL_WARPS
#define ROUTE_SMALL_WARPS 16
#endif
// align: threads of a block, blocks for each multiprocessor at most.
#ifndef ALIGN_THREADS
#define ALIGN_THREADS 256
#endif
#ifndef ALIGN_BLOCKS
#define ALIGN_BLOCKS 4
#endif
// route by tiles: tokens up to which a tile has 32 (64 up to twice as many, then 128); tiles above which a kernel of its
// own adds up the counts (at most 511); warps of a block that counts; threads of a block that places rows, and blocks
// that share the copy of a tile; 16-byte loads of a lane at a time; bytes of a row above which more blocks share a tile,
// and how many then.
#ifndef ROUTE_TILE32_TOKENS
#define ROUTE_TILE32_TOKENS 4096
#endif
#ifndef ROUTE_SCAN_TILES
#define ROUTE_SCAN_TILES 256
#endif
#ifndef ROUTE_COUNT_WARPS
#define ROUTE_COUNT_WARPS 16
#endif
#ifndef ROUTE_PLACE_THREADS
#define ROUTE_PLACE_THREADS 512
#endif
#ifndef ROUTE_PLACE_SPLIT
#define ROUTE_PLACE_SPLIT 4
#endif
#ifndef ROUTE_PLACE_DEPTH
#define ROUTE_PLACE_DEPTH 4
#endif
#ifndef ROUTE_PLACE_BYTES
#define ROUTE_PLACE_BYTES 8192
#endif
#ifndef ROUTE_PLACE_LONG_SPLIT
#define ROUTE_PLACE_LONG_SPLIT 16
#endif
// How the placed rows are stored (numbers as for permute).
#ifndef ROUTE_STORE_HINT
#define ROUTE_STORE_HINT 2
#endif
