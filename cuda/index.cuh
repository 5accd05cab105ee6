// Parts of the index that the kernels of one block and those of many tiles share. Pairs (token, choice) are sorted by
// bin without sorting: a token is a bit of its bin's masks, so that a bin's rows are its bits, and a pair's place
// among them is the number of bits below its own. Bits are set in any order and nothing depends on which.
#pragma once
#include "gate.cuh"

#define NO_BIN 0xffffu

// The bin of an expert, or NO_BIN.
static __device__ __forceinline__ u32 bin_of(const RouteArgs &a, i64 id) {
    if (id < 0 || id >= a.gate.experts)
        return NO_BIN;
    const u32 bin = a.bin_of ? (u32)a.bin_of[id] : (u32)id;
    return bin < a.bins ? bin : NO_BIN;
}

// The expert of a pair, as it stands in memory.
static __device__ __forceinline__ i64 given_id(const GateArgs &a, u64 pair) {
    return a.flags & GATE_IDS_I64 ? ((const i64 *)a.ids)[pair] : (i64)((const i32 *)a.ids)[pair];
}

// A token's bins, to lanes j < k of a warp: gated, or of given ids.
template <class T, u32 N, u32 RULE>
static __device__ __forceinline__ u32 bins_of_token(const RouteArgs &a, u32 token, u32 valid) {
    const u32 lane = threadIdx.x % LANES;
    i64 id = -1;
    if (a.gate.logits)
        id = gate_token<T, N, RULE>(a.gate, token, valid);
    else if (token < valid && lane < a.gate.k)
        id = given_id(a.gate, (u64)token * a.gate.k + lane);
    return lane < a.gate.k ? bin_of(a, id) : NO_BIN;
}

// Bits below bit `bit`.
static __device__ __forceinline__ u32 below(u32 bits, u32 bit) { return bits & ((1u << bit) - 1); }

// Place of token number `token` of its tile among those of its bin. masks: [words][bins].
static __device__ __forceinline__ u32 rank_in_bin(const u32 *masks, u32 bins, u32 bin, u32 token) {
    u32 rank = __popc(below(masks[token / 32 * bins + bin], token % 32));
    for (u32 word = 0; word < token / 32; ++word)
        rank += __popc(masks[word * bins + bin]);
    return rank;
}

// What the threads of a block before this one have together, and what all have. `partial` holds LANES numbers; there is
// a barrier in it. Called by a whole block of so many warps.
static __device__ __forceinline__ u32 before_in_block(u32 mine, u32 *partial, u32 warps, u32 &all) {
    const u32 lane = threadIdx.x % LANES;
    const u32 warp = threadIdx.x / LANES;
    u32 through = mine;  // and with those of the lanes before it
#pragma unroll
    for (u32 distance = 1; distance < LANES; distance *= 2) {
        const u32 other = __shfl_up_sync(FULL_WARP, through, distance);
        through += lane >= distance ? other : 0;
    }
    if (lane == LANES - 1)
        partial[warp] = through;
    __syncthreads();
    const u32 theirs = lane < warps ? partial[lane] : 0;
    all = __reduce_add_sync(FULL_WARP, theirs);
    return __reduce_add_sync(FULL_WARP, lane < warp ? theirs : 0) + through - mine;
}

// First rows of all bins, into `starts`, from their counts; the end of each into `ends` unless that is null. The rows
// of all bins together are given back. Called by a whole block; `partial` holds LANES numbers. Counts must have been
// written before a barrier, and starts may be read after one.
template <class Count>
static __device__ __forceinline__ u32 start_bins(u32 bins, const Count &count, u32 *starts, i32 *ends, u32 *partial) {
    const u32 each = (bins + blockDim.x - 1) / blockDim.x;
    const u32 first = threadIdx.x * each;
    const u32 end = min(first + each, bins);
    u32 sum = 0;
    for (u32 bin = first; bin < end; ++bin)
        sum += count(bin);
    u32 all;
    u32 row = before_in_block(sum, partial, blockDim.x / LANES, all);
    for (u32 bin = first; bin < end; ++bin) {
        starts[bin] = row;
        row += count(bin);
        if (ends)
            ends[bin] = (i32)row;
    }
    return all;
}
