// The token-major copy of rows: a token's row is read once and written to each of the k rows that `inverse` names.
// Plain rows are bytes; e4m3 rows have one scale for each 128 columns.
//
// The work is cut into pieces: a few columns of one token. A warp takes a piece at a time; warps that are neighbours
// take neighbouring pieces, so that whole rows are written at about the same time.
#pragma once
#include "numbers.cuh"
#include "ptx.cuh"

// Columns under one scale, and the largest e4m3 number.
#define SCALE_COLUMNS 128
#define E4M3_MAX 448.0f
// Columns that a warp packs into one store of 16 bytes a lane.
#define E4M3_PIECE (LANES * 16)

struct Scatter {
    const u8 *x;         // row of the first token
    const i32 *inverse;  // [tokens, k], from the first token on
    u8 *rows;
    float *scales;
    u32 row_bytes;  // of x
    u32 k;
    u32 row_limit;
};

// The row that a choice of a token names, or a number below 0.
static __device__ __forceinline__ i32 row_of(const Scatter &s, u32 token, u32 choice) {
    const i32 row = choice < s.k ? s.inverse[(u64)token * s.k + choice] : -1;
    return (u32)row < s.row_limit ? row : -1;
}

// Rows as they are.
struct PlainRows {
    static const u32 DEPTH = PERMUTE_DEPTH;
    static const u32 PLACED = ROUTE_PLACE_DEPTH;

    // Pieces of a row.
    static __device__ __forceinline__ u32 pieces(u32 row_bytes, u32 depth) {
        return (row_bytes + LANES * 16 * depth - 1) / (LANES * 16 * depth);
    }

    // Called by a warp: one piece of one token.
    template <u32 DEEP, bool FRESH>
    static __device__ __forceinline__ void copy(const Scatter &s, u32 token, u32 piece) {
        const u32 lane = threadIdx.x % LANES;
        const u32 at = (piece * DEEP * LANES + lane) * 16;
        const u8 *from = s.x + (u64)token * s.row_bytes + at;
        i32 mine = row_of(s, token, lane);
        Vec16 held[DEEP];
#pragma unroll
        for (u32 d = 0; d < DEEP; ++d)
            held[d] = load_once_if<FRESH>(at + d * LANES * 16 < s.row_bytes, from + d * LANES * 16);
        for (u32 first = 0;;) {
            for (u32 named = __ballot_sync(FULL_WARP, mine >= 0); named != 0; named &= named - 1) {
                u8 *to = s.rows + (u64)(u32)__shfl_sync(FULL_WARP, mine, __ffs((int)named) - 1) * s.row_bytes + at;
#pragma unroll
                for (u32 d = 0; d < DEEP; ++d)
                    if (at + d * LANES * 16 < s.row_bytes)
                        store16_as<FRESH ? ROUTE_STORE_HINT : PERMUTE_STORE_HINT>(to + d * LANES * 16, held[d]);
            }
            first += LANES;
            if (first >= s.k)
                break;
            mine = row_of(s, token, first + lane);
        }
    }
};

// Rows of numbers of a format, turned into e4m3: scale = max |x| / 448 over 128 columns (1 where that is 0),
// number = x / scale. A NaN makes its scale NaN.
template <class Format> struct Fp8Rows {
    static const u32 DEPTH = PERMUTE_FP8_DEPTH;
    static const u32 PLACED = PERMUTE_FP8_DEPTH;
    static const u32 LOADS = 16 / Format::lanes;                // a lane's loads for one store
    static const u32 SHARERS = SCALE_COLUMNS / Format::lanes;   // lanes that load the columns of one scale
    static const u32 WORDS = Format::lanes / 4;                 // that a load becomes
    static const u32 SCALES = E4M3_PIECE / SCALE_COLUMNS;       // of a warp's store
    static const u32 LOAD_SCALES = SCALES / LOADS;              // of a warp's load

    static __device__ __forceinline__ u32 pieces(u32 row_bytes, u32 depth) {
        return (row_bytes / Format::bytes + E4M3_PIECE * depth - 1) / (E4M3_PIECE * depth);
    }

    // Called by a warp: E4M3_PIECE columns. Each lane gets 16 neighbouring columns, and the scale number lane % SCALES.
    static __device__ __forceinline__ void quantize(const Vec16 (&held)[LOADS], Vec16 &packed, float &scale) {
        const u32 lane = threadIdx.x % LANES;
        u32 words[LOADS][WORDS];
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) {
            float x[Format::lanes];
            Format::unpack(held[i], x);
            u32 top = 0;  // numbers without their sign are in the order of their bits, NaN at the end
#pragma unroll
            for (u32 e = 0; e < Format::lanes; ++e)
                top = max(top, __float_as_uint(x[e]) & 0x7fffffffu);
#pragma unroll
            for (u32 distance = SHARERS / 2; distance > 0; distance /= 2)
                top = max(top, __shfl_xor_sync(FULL_WARP, top, distance));
            const float unit = top == 0 ? 1.0f : __fdiv_rn(__uint_as_float(top), E4M3_MAX);
            const float other = __shfl_sync(FULL_WARP, unit, lane % LOAD_SCALES * SHARERS);
            if (lane % SCALES / LOAD_SCALES == i)
                scale = other;
#pragma unroll
            for (u32 w = 0; w < WORDS; ++w)
                words[i][w] = e4m3_pair(__fdiv_rn(x[4 * w], unit), __fdiv_rn(x[4 * w + 1], unit)) |
                              e4m3_pair(__fdiv_rn(x[4 * w + 2], unit), __fdiv_rn(x[4 * w + 3], unit)) << 16;
        }
        // LOADS neighbouring lanes swap, until each has what the neighbours got from one and the same load.
#pragma unroll
        for (u32 distance = 1; distance < LOADS; distance *= 2)
#pragma unroll
            for (u32 i = 0; i < LOADS; ++i) {
                if (i & distance)
                    continue;
                const bool upper = lane & distance;
#pragma unroll
                for (u32 w = 0; w < WORDS; ++w) {
                    const u32 given = upper ? words[i][w] : words[i | distance][w];
                    const u32 got = __shfl_xor_sync(FULL_WARP, given, distance);
                    words[i][w] = upper ? got : words[i][w];
                    words[i | distance][w] = upper ? words[i | distance][w] : got;
                }
            }
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i)
#pragma unroll
            for (u32 w = 0; w < WORDS; ++w)
                packed.word[i * WORDS + w] = words[i][w];
    }

    template <u32 DEEP, bool FRESH>
    static __device__ __forceinline__ void copy(const Scatter &s, u32 token, u32 piece) {
        const u32 lane = threadIdx.x % LANES;
        const u32 columns = s.row_bytes / Format::bytes;
        const u32 begin = piece * DEEP * E4M3_PIECE;
        const u8 *from = s.x + (u64)token * s.row_bytes;
        i32 mine = row_of(s, token, lane);
        Vec16 held[DEEP][LOADS];
#pragma unroll
        for (u32 d = 0; d < DEEP; ++d)
#pragma unroll
            for (u32 i = 0; i < LOADS; ++i) {
                const u32 column = begin + d * E4M3_PIECE + (i * LANES + lane) * Format::lanes;
                held[d][i] = load_once_if<FRESH>(column < columns, from + (u64)column * Format::bytes);
            }
        Vec16 packed[DEEP];
        float scale[DEEP];
#pragma unroll
        for (u32 d = 0; d < DEEP; ++d)
            quantize(held[d], packed[d], scale[d]);
        // After the swaps a lane's columns are those of its place among its neighbours.
        const u32 place = lane % LOADS;
        const u32 own = begin + (place * LANES + lane - place) * Format::lanes;
        for (u32 first = 0;;) {
            for (u32 named = __ballot_sync(FULL_WARP, mine >= 0); named != 0; named &= named - 1) {
                u8 *to = s.rows + (u64)(u32)__shfl_sync(FULL_WARP, mine, __ffs((int)named) - 1) * columns + own;
#pragma unroll
                for (u32 d = 0; d < DEEP; ++d)
                    if (own + d * E4M3_PIECE < columns)
                        store16_as<FRESH ? ROUTE_STORE_HINT : PERMUTE_STORE_HINT>(to + d * E4M3_PIECE, packed[d]);
            }
            put_scales<DEEP>(s, mine, min(s.k - first, (u32)LANES), columns, begin, scale);
            first += LANES;
            if (first >= s.k)
                break;
            mine = row_of(s, token, first + lane);
        }
    }

    // The scales of a piece, for the rows that the warp's first lanes name: LANES / SCALES rows with one store.
    template <u32 DEEP>
    static __device__ __forceinline__ void put_scales(const Scatter &s, i32 mine, u32 choices, u32 columns, u32 begin,
                                                      const float (&scale)[DEEP]) {
        const u32 lane = threadIdx.x % LANES;
        const u32 scales = columns / SCALE_COLUMNS;
        const u32 own = begin / SCALE_COLUMNS + lane % SCALES;
        for (u32 first = 0; first < choices; first += LANES / SCALES) {
            const i32 row = __shfl_sync(FULL_WARP, mine, first + lane / SCALES);
#pragma unroll
            for (u32 d = 0; d < DEEP; ++d)
                if (row >= 0 && own + d * SCALES < scales)
                    s.scales[(u64)row * scales + own + d * SCALES] = scale[d];
        }
    }
};

// The copy of the rows of all tokens by `blocks` blocks, of which this is number `block`. Called by all threads of it.
// FRESH: by a kernel that began early.
template <class Quant, u32 DEPTH, bool FRESH>
static __device__ __forceinline__ void scatter(const Scatter &s, u32 tokens, u32 block, u32 blocks) {
    const u32 warps = blockDim.x / LANES;
    const u32 width = Quant::pieces(s.row_bytes, DEPTH);
    const u32 items = tokens * width;
    for (u32 i = block * warps + threadIdx.x / LANES; i < items; i += blocks * warps)
        Quant::template copy<DEPTH, FRESH>(s, i / width, i % width);
}

// The rows of tokens first_token..first_token + count by one block. `inverse`, in shared or global memory, is
// [count, k]: it begins with the first of these tokens. Rows below 0 or from `row_limit` on are nobody's.
template <class Quant>
static __device__ void scatter_tokens(const void *x, u32 row_bytes, void *rows, float *scales, u32 first_token,
                                      u32 count, u32 k, const i32 *inverse, u32 row_limit) {
    const u8 *from = (const u8 *)x + (u64)first_token * row_bytes;
    const Scatter s = {from, inverse, (u8 *)rows, scales, row_bytes, k, row_limit};
    scatter<Quant, Quant::PLACED, true>(s, count, 0, 1);
}
