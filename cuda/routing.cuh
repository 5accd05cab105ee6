// Arguments of the routing kernels, as rust/moecore-cuda/src/routing/layout.rs has them; both sides assert their sizes.
// What each field means in numbers is written down as plain torch in python/moecore/ops/reference.py.
#pragma once
#include "numbers.cuh"

// What is ranked and weighed.
#define SCORE_SOFTMAX 0u        // softmax over all experts
#define SCORE_SIGMOID 1u
#define SCORE_SQRT_SOFTPLUS 2u  // sqrt(log(1 + e^x))
#define SCORE_SOFTMAX_TOPK 3u   // ranked by the logits, softmax over the chosen ones

#define GATE_RENORMALIZE 1u  // weights are divided by their sum + eps
#define GATE_GROUP_TOP2 2u   // a group's score is the sum of its two best, else its best
#define GATE_IDS_I64 4u      // ids are int64, else int32
#define GATE_BY_LOGITS 8u    // one of the two ways of gate_fast.cuh will do; only then is it said
#define GATE_BY_SCORES 16u

// Number formats by number, as `Format` in rust/moecore-cuda/src/kernels.rs.
#define FORMAT_F32 0u
#define FORMAT_BF16 1u
#define FORMAT_F16 2u

#define GATE_MAX_EXPERTS 1024
#define GATE_MAX_K 32

struct GateArgs {
    const void *logits;  // [tokens, experts], rows `stride` numbers apart; null: `ids` are given (route only)
    const float *bias;   // [experts], added to the scores for the choice, or null
    void *weights;       // out [tokens, k], of format `weights_format`; null: nobody wants them
    void *ids;           // out [tokens, k]; null: nobody wants them
    const i32 *valid;    // tokens that count, or null: all. The others get id -1 and weight 0
    u64 stride;
    u32 tokens;
    u32 experts;
    u32 k;
    u32 groups;          // 1: no groups. Divides experts
    u32 top_groups;      // groups that may be chosen from
    u32 scoring;
    u32 flags;
    u32 weights_format;
    float scale;         // of the weights, at the end
    float eps;
};
static_assert(sizeof(GateArgs) == 88, "GateArgs");

// A bin is what rows are sorted by: an expert, or what `bin_of` says of it.
struct RouteArgs {
    GateArgs gate;
    const i32 *bin_of;  // [experts], distinct; below 0: nobody. Null: bin = expert
    i32 *ends;          // out [bins]: rows of bins 0..=b
    i32 *source;        // out [tokens * k]: token of each row; -1 from ends[bins - 1] on
    i32 *inverse;       // out [tokens, k]: row of each pair, or -1
    u16 *counts;        // workspace [tiles, bins]; only where there is more than one tile
    i32 *starts;        // workspace [tiles, bins], where a scan of its own is worth it, else null
    const void *x;      // [tokens, hidden], or null: nothing is permuted
    void *rows;         // out [tokens * k, hidden]: what x[source] holds
    float *scales;      // out [tokens * k, hidden / 128]: rows are e4m3 = x / scale; or null: rows are x
    u32 bins;
    u32 row_bytes;      // of x; a multiple of 16
    u32 x_format;
    u32 tile;           // tokens of a tile: 32, 64 or 128
};
static_assert(sizeof(RouteArgs) == 176, "RouteArgs");

struct PermuteArgs {
    const void *x;       // [tokens, hidden]
    const i32 *inverse;  // [tokens, k]: row of each pair; below 0 or from `rows` on: nobody
    void *out;           // [rows, hidden]
    float *scales;       // [rows, hidden / 128] or null, as above
    u32 tokens;
    u32 k;
    u32 rows;
    u32 row_bytes;       // of x; a multiple of 16
    u32 x_format;
    u32 reserved;
};
static_assert(sizeof(PermuteArgs) == 56, "PermuteArgs");

struct CombineArgs {
    const void *rows;      // [row_count, hidden]; only rows that `inverse` names are read
    const i32 *inverse;    // [tokens, k], or null: pair (t, j) is row t * k + j
    const void *weights;   // [tokens, k] of format `weights_format`, or null: 1
    const void *shared;    // [tokens, hidden] or null
    const void *residual;  // [tokens, hidden] or null
    void *out;             // [tokens, hidden] = residual + shared + scale * sum over j of weights[t, j] * row(t, j)
    u32 tokens;
    u32 k;
    u32 row_count;
    u32 row_bytes;         // a multiple of 16
    u32 weights_format;
    float scale;
};
static_assert(sizeof(CombineArgs) == 72, "CombineArgs");

struct AlignArgs {
    const i32 *ends;     // [bins], as RouteArgs has them
    const i32 *inverse;  // [pairs]: row of each pair, or -1
    i32 *order;          // out [capacity]: the pair of each place, or `pairs`
    i32 *owner;          // out [capacity / block]: the bin of each block; -1 behind the last
    i32 *places;         // out [1]: places of all blocks that have a bin
    u32 pairs;
    u32 bins;
    u32 block;           // places
    u32 capacity;        // places, whole blocks, enough for any `ends`
};
static_assert(sizeof(AlignArgs) == 56, "AlignArgs");
