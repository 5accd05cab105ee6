// route in one launch, for few tokens: gate and index by one block, or by one cluster of blocks, of which the first
// makes the index from what all of them put into its shared memory. Kernels as in gate.cu.
#include "index.cuh"

// The index of one token, whose choices are in the first k lanes of a warp: they sort themselves, 32 bins at a time.
static __device__ __forceinline__ void index_one(const RouteArgs &a, u32 bin) {
    const u32 lane = threadIdx.x % LANES;
    const u32 bit = bin == NO_BIN ? 0 : 1u << bin % 32;
    u32 base = 0;
    i32 row = -1;
#pragma unroll 1
    for (u32 word = 0; word * 32 < a.bins; ++word) {
        const bool here = bin / 32 == word;
        const u32 taken = __reduce_or_sync(FULL_WARP, here ? bit : 0);
        const u32 through = taken & ((2u << lane) - 1);
        if (word * 32 + lane < a.bins)
            a.ends[word * 32 + lane] = (i32)(base + __popc(through));
        if (here)
            row = (i32)(base + __popc(taken & (bit - 1)));
        base += __popc(taken);
    }
    if (lane < a.gate.k) {
        a.inverse[lane] = row;
        if (lane >= base)
            a.source[lane] = -1;
    }
    if (row >= 0)
        a.source[row] = 0;
}

// Grid: 1, or one cluster of ROUTE_CLUSTER blocks. Block: 32 for one token, else whole warps, best one for each token
// of the block; 512 at most. Dynamic shared memory, none for one token: masks [words][bins], starts [bins], partial
// [LANES], bins of all pairs [tokens][k] (u16).
template <class T, u32 N, u32 RULE> static __device__ __forceinline__ void route_small(const RouteArgs &a) {
    extern __shared__ u32 shared[];
    let_next_begin();
    await_last();
    const u32 lane = threadIdx.x % LANES;
    const u32 k = a.gate.k;
    const u32 tokens = a.gate.tokens;
    const u32 words = (tokens + 31) / 32;
    u32 *masks = shared;
    u32 *starts = masks + words * a.bins;
    u32 *partial = starts + a.bins;
    u16 *chosen = (u16 *)(partial + LANES);
    if (tokens != 1 && cluster_rank() == 0)
        for (u32 i = threadIdx.x; i < words * a.bins; i += blockDim.x)
            masks[i] = 0;
    if (tokens != 1)
        cluster_arrive();

    const u32 warps = blockDim.x / LANES;
    const u32 valid = valid_tokens(a.gate);
    bool cleared = false;  // the masks, as this warp knows
    for (u32 token = cluster_rank() * warps + warp_number(); token < tokens; token += cluster_size() * warps) {
        const u32 bin = bins_of_token<T, N, RULE>(a, token, valid);
        if (tokens == 1) {
            index_one(a, bin);
            return;
        }
        if (!cleared)
            cluster_wait();
        cleared = true;
        if (lane < k)
            put_in_first_block(chosen + token * k + lane, (u16)bin);
        if (bin != NO_BIN)
            or_in_first_block(masks + token / 32 * a.bins + bin, 1u << token % 32);
    }
    if (!cleared)
        cluster_wait();
    cluster_arrive();
    cluster_wait();
    if (cluster_rank() != 0)
        return;

    const auto count = [&](u32 bin) {
        u32 rows = 0;
        for (u32 word = 0; word < words; ++word)
            rows += __popc(masks[word * a.bins + bin]);
        return rows;
    };
    const u32 rows = start_bins(a.bins, count, starts, a.ends, partial);
    __syncthreads();
    for (u32 pair = threadIdx.x; pair < tokens * k; pair += blockDim.x) {
        const u32 bin = chosen[pair];
        i32 row = -1;
        if (bin != NO_BIN) {
            row = (i32)(starts[bin] + rank_in_bin(masks, a.bins, bin, pair / k));
            a.source[row] = (i32)(pair / k);
        }
        a.inverse[pair] = row;
        if (pair >= rows)
            a.source[pair] = -1;
    }
}

#define SMALL_KERNEL(name, T, N, RULE)                                                                                 \
    extern "C" __global__ void __launch_bounds__(ROUTE_SMALL_WARPS *LANES, 1)                                          \
        moecore_route_small_##name(const RouteArgs a) {                                                                \
        route_small<T, N, RULE>(a);                                                                                    \
    }

GATE_WAYS(SMALL_KERNEL, f32, F32)
GATE_WAYS(SMALL_KERNEL, bf16, Bf16)
GATE_WAYS(SMALL_KERNEL, f16, F16)
