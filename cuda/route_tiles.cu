// route by tiles of tokens, for many: one kernel gates and counts, one places a tile's pairs and copies its rows. Where
// there are very many tiles a third between them adds up the counts.
#include "index.cuh"
#include "permute.cuh"

// Tokens, tile and bins are all 0 in the launch that only loads a kernel.
static __device__ __forceinline__ u32 tiles_of(const RouteArgs &a) {
    return (a.gate.tokens + a.tile - 1) / max(a.tile, 1u);
}

// Gates the tokens of tile blockIdx.x and counts them by bin.
// Grid: tiles, block: ROUTE_COUNT_WARPS * 32. Dynamic shared memory: counts [bins] of 4 bytes.
template <class T, u32 N, u32 RULE> static __device__ __forceinline__ void route_count(const RouteArgs &a) {
    extern __shared__ u32 shared[];
    let_next_begin();
    u32 *counts = shared;
    for (u32 bin = threadIdx.x; bin < a.bins; bin += blockDim.x)
        counts[bin] = 0;
    __syncthreads();
    await_last();
    const u32 valid = valid_tokens(a.gate);
    const u32 first = blockIdx.x * a.tile;
    const u32 end = min(first + a.tile, a.gate.tokens);
    for (u32 token = first + warp_number(); token < end; token += blockDim.x / LANES) {
        const u32 bin = bins_of_token<T, N, RULE>(a, token, valid);
        if (bin != NO_BIN)
            atomicAdd(counts + bin, 1u);
    }
    __syncthreads();
    for (u32 bin = threadIdx.x; bin < a.bins; bin += blockDim.x)
        a.counts[(u64)blockIdx.x * a.bins + bin] = (u16)counts[bin];
}

// starts[tile][bin]: rows of the bin in the tiles before. A warp takes a share of the tiles, a lane a bin.
// Grid: bins / 32, block: 1024.
static __device__ __forceinline__ void route_scan(const RouteArgs &a) {
    __shared__ u32 sums[LANES][LANES];
    let_next_begin();
    await_last();
    const u32 share = threadIdx.x / LANES;
    const u32 lane = threadIdx.x % LANES;
    const u32 bin = blockIdx.x * LANES + lane;
    const u32 tiles = tiles_of(a);
    const u32 each = (tiles + LANES - 1) / LANES;
    const u32 first = min(share * each, tiles);
    const u32 end = bin < a.bins ? min(first + each, tiles) : first;
    u32 sum = 0;
#pragma unroll 8
    for (u32 tile = first; tile < end; ++tile)
        sum += __ldcg(a.counts + (u64)tile * a.bins + bin);
    sums[share][lane] = sum;
    __syncthreads();
    u32 row = 0;
    for (u32 other = 0; other < share; ++other)
        row += sums[other][lane];
#pragma unroll 8
    for (u32 tile = first; tile < end; ++tile) {
        const u64 at = (u64)tile * a.bins + bin;
        a.starts[at] = (i32)row;
        row += __ldcg(a.counts + at);
    }
}

// Counts of all tiles and of those before `tile`, each bin 16 bits, added to `all` and `before`: no more than 511
// tiles of 128 tokens. UNIT neighbouring bins are one load.
template <u32 UNIT>
static __device__ __forceinline__ void add_counts(const RouteArgs &a, u32 tile, u32 *all, u32 *before) {
    const u32 tiles = tiles_of(a);
    const u32 columns = a.bins / UNIT;
    const u32 shares = max(blockDim.x / max(columns, 1u), 1u);
    for (u32 item = threadIdx.x; item < columns * shares; item += blockDim.x) {
        const u32 column = item % columns;
        constexpr u32 WORDS = UNIT == 1 ? 1 : UNIT / 2;
        u32 sum[WORDS] = {};
        u32 mine[WORDS] = {};
#pragma unroll 4
        for (u32 other = item / columns; other < tiles; other += shares) {
            const u16 *from = a.counts + (u64)other * a.bins + column * UNIT;
            u32 words[WORDS];
            if (UNIT == 1) {
                words[0] = (u32)__ldcg(from) << column % 2 * 16;
            } else {
                const Vec16 wide = load_written(from);
#pragma unroll
                for (u32 i = 0; i < WORDS; ++i)
                    words[i] = wide.word[i];
            }
#pragma unroll
            for (u32 i = 0; i < WORDS; ++i) {
                sum[i] += words[i];
                mine[i] += other < tile ? words[i] : 0;
            }
        }
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i) {
            atomicAdd(all + column * UNIT / 2 + i, sum[i]);
            atomicAdd(before + column * UNIT / 2 + i, mine[i]);
        }
    }
}

static __device__ __forceinline__ u32 half_word(const u32 *words, u32 i) {
    return words[i / 2] >> i % 2 * 16 & 0xffffu;
}

// Places the pairs of tile blockIdx.x, and copies its rows together with the other blocks of its column: each takes
// some of the tokens.
// Grid: (tiles, blocks that share a tile's copy), block: ROUTE_PLACE_THREADS. Dynamic shared memory, words of 4 bytes:
// masks [tile / 32][bins], counts of all tiles and of those before [bins] in two halves, starts [bins], partial
// [LANES], rows [tile][k].
template <class Quant> static __device__ __forceinline__ void route_place(const RouteArgs &a) {
    extern __shared__ u32 shared[];
    const u32 k = a.gate.k;
    const u32 tile = blockIdx.x;
    const u32 halves = (a.bins + 1) / 2;
    u32 *masks = shared;
    u32 *all = masks + a.tile / 32 * a.bins;
    u32 *before = all + halves;
    u32 *starts = before + halves;
    u32 *partial = starts + a.bins;
    i32 *rows = (i32 *)(partial + LANES);
    for (u32 i = threadIdx.x; i < a.tile / 32 * a.bins + 2 * halves; i += blockDim.x)
        masks[i] = 0;
    __syncthreads();
    await_last();

    const u32 first = tile * a.tile;
    const u32 pairs = min(a.tile, a.gate.tokens - first) * k;
    const u32 valid = valid_tokens(a.gate);
    for (u32 pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        const u32 token = pair / k;
        const u32 bin = first + token < valid ? bin_of(a, given_id(a.gate, (u64)first * k + pair)) : NO_BIN;
        rows[pair] = (i32)bin;
        if (bin != NO_BIN)
            atomicOr(masks + token / 32 * a.bins + bin, 1u << token % 32);
    }
    const u64 last = (u64)(tiles_of(a) - 1) * a.bins;
    if (!a.starts) {
        if (a.bins % 8 == 0)
            add_counts<8>(a, tile, all, before);
        else
            add_counts<1>(a, tile, all, before);
    }
    __syncthreads();
    const bool writes = blockIdx.y == 0;
    const auto count = [&](u32 bin) {
        return a.starts ? (u32)__ldcg(a.starts + last + bin) + __ldcg(a.counts + last + bin) : half_word(all, bin);
    };
    const u32 total = start_bins(a.bins, count, starts, writes && tile == 0 ? a.ends : nullptr, partial);
    __syncthreads();
    for (u32 pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        const u32 token = pair / k;
        const u32 bin = (u32)rows[pair];
        i32 row = -1;
        if (bin != NO_BIN) {
            const u32 earlier = a.starts ? (u32)__ldcg(a.starts + (u64)tile * a.bins + bin) : half_word(before, bin);
            row = (i32)(starts[bin] + earlier + rank_in_bin(masks, a.bins, bin, token));
            if (writes)
                a.source[row] = (i32)(first + token);
        }
        rows[pair] = row;
        if (writes)
            a.inverse[(u64)first * k + pair] = row;
    }
    const u64 slots = (u64)a.gate.tokens * k;
    if (writes)
        for (u64 i = total + (u64)tile * blockDim.x + threadIdx.x; i < slots; i += (u64)gridDim.x * blockDim.x)
            a.source[i] = -1;
    if (!a.x)
        return;
    __syncthreads();
    const u32 tokens = pairs / k;
    const u32 from = tokens * blockIdx.y / gridDim.y;
    const u32 until = tokens * (blockIdx.y + 1) / gridDim.y;
    scatter_tokens<Quant>(a.x, a.row_bytes, a.rows, a.scales, first + from, until - from, k, rows + from * k,
                          (u32)slots);
}

#define COUNT_KERNEL(name, T, N, RULE)                                                                                 \
    extern "C" __global__ void __launch_bounds__(ROUTE_COUNT_WARPS *LANES, 2)                                          \
        moecore_route_count_##name(const RouteArgs a) {                                                                \
        route_count<T, N, RULE>(a);                                                                                    \
    }

GATE_WAYS(COUNT_KERNEL, f32, F32)
GATE_WAYS(COUNT_KERNEL, bf16, Bf16)
GATE_WAYS(COUNT_KERNEL, f16, F16)

extern "C" __global__ void __launch_bounds__(1024) moecore_route_scan(const RouteArgs a) { route_scan(a); }

#define PLACE_KERNEL(suffix, Quant)                                                                                    \
    extern "C" __global__ void __launch_bounds__(ROUTE_PLACE_THREADS, 2)                                               \
        moecore_route_place_##suffix(const RouteArgs a) {                                                              \
        route_place<Quant>(a);                                                                                         \
    }

PLACE_KERNEL(plain, PlainRows)
PLACE_KERNEL(fp8_f32, Fp8Rows<F32>)
PLACE_KERNEL(fp8_bf16, Fp8Rows<Bf16>)
PLACE_KERNEL(fp8_f16, Fp8Rows<F16>)
