// Every number that was chosen by measurement, in one place. The host side knows only the first group
// (rust/moecore-cuda/src/tuning.rs), and a test compares them.
#pragma once

// acquire: blocks that share one copy, and threads of each. Four blocks of 256 already fill a PCIe 5.0 x16 link.
#define ACQUIRE_BLOCKS 8
#define ACQUIRE_THREADS 512
// 16-byte loads from pinned memory that one thread has in flight.
#define FETCH_IN_FLIGHT 8
// Orders that are held in shared memory at a time.
#define ORDER_BATCH 128
// Pause between two looks at the host's answer, and looks between two looks at the clock.
#define POLL_PAUSE_NS 32
#define POLLS_PER_CLOCK 64

// Expert kernels: warps of a block. One warp makes one output element.
#define EXPERT_WARPS 4
// expert_up: 16-byte loads in flight of each of the two rows.
#define UP_DEPTH 4
// expert_down: experts read side by side, and 16-byte loads in flight of each.
#define DOWN_ROWS 4
#define DOWN_DEPTH 2
// slot_linear: 16-byte loads in flight.
#define LINEAR_DEPTH 4
// slot_linear over transposed weights: warps that share the sum of one output.
#define TRANSPOSED_WARPS 8
