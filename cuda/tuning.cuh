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
// 1: from sm_90 on rows pass through shared memory by bulk copies, in stages of so many bytes.
#ifndef FETCH_BULK
#define FETCH_BULK 0
#endif
#ifndef BULK_STAGES
#define BULK_STAGES 4
#endif
#ifndef BULK_BYTES
#define BULK_BYTES 8192
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
// expert_down: warps of a block, warps of them that share the experts of an output, outputs of a warp, experts that it
// reads side by side, and 16-byte loads in flight of each.
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
