// What the gate reads and what it ranks: logits to numbers, scores and keys, a row by a warp. Each lane owns N
// neighbouring experts of each CHUNK.
#pragma once
#include "order.cuh"
#include "routing.cuh"

// Experts of a row that a warp ranks with lists of N words in each lane.
#define CHUNK (N * LANES)

// Words of memory to logits: -inf in all of a word, number i of some words; of 16-bit ones a pair without -0.0 and with
// one NaN, and the number that a word's upper half is.
template <class T> struct Logits;
template <> struct Logits<F32> {
    static const u32 minus_infinity = 0xff800000u;
    static __device__ __forceinline__ float get(const u32 *words, u32 i) { return __uint_as_float(words[i]); }
};
template <> struct Logits<Bf16> {
    static const u32 minus_infinity = 0xff80ff80u;
    static __device__ __forceinline__ u32 plain(u32 pair) { return plain_bf16_pair(pair); }
    static __device__ __forceinline__ float upper(u32 word) { return __uint_as_float(word & 0xffff0000u); }
    static __device__ __forceinline__ float get(const u32 *words, u32 i) {
        return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    }
};
template <> struct Logits<F16> {
    static const u32 minus_infinity = 0xfc00fc00u;
    static __device__ __forceinline__ u32 plain(u32 pair) { return plain_f16_pair(pair); }
    static __device__ __forceinline__ float upper(u32 word) { return F16::value((u16)(word >> 16)); }
    static __device__ __forceinline__ float get(const u32 *words, u32 i) {
        return F16::value((u16)(words[i / 2] >> i % 2 * 16));
    }
};

// What does not change from expert to expert of a row.
struct Row {
    const void *at;
    u32 low_bits;    // of a word: position from behind
    bool by_score;   // what is ranked is the score (+ bias), not the logit
    float top;       // softmax by score: the largest logit,
    float inverse;   // and 1 / sum of e^(logit - top)
    u32 kept;        // groups that may be chosen from, one bit for each `group` experts
    u32 group;       // 0: no groups
};

// This warp's number in its block, so that the compiler sees that all lanes have the same: what depends on it then
// needs no code for warps that are apart.
static __device__ __forceinline__ u32 warp_number() {
    return blockDim.x == LANES ? 0 : __shfl_sync(FULL_WARP, threadIdx.x / LANES, 0);
}

template <u32 COUNT> static __device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (u32 distance = COUNT / 2; distance > 0; distance /= 2)
        x = __fadd_rn(x, __shfl_xor_sync(FULL_WARP, x, distance));
    return x;
}

// Sum over the first k lanes; the others have 0.
static __device__ __forceinline__ float sum_of_choices(float x, u32 k) {
    return k <= 8 ? sum_of_lanes<8>(x) : sum_of_lanes<LANES>(x);
}

// The same steps wherever a score is made, with no step left to be fused: its bits are compared.
static __device__ __forceinline__ float sigmoid(float x) { return reciprocal(__fadd_rn(1.0f, expf(-x))); }

static __device__ __forceinline__ float sqrt_softplus(float x) { return sqrtf(x > 20.0f ? x : log1pf(expf(x))); }

static __device__ __forceinline__ float score_of(u32 scoring, float top, float inverse, float x) {
    switch (scoring) {
    case SCORE_SOFTMAX:
        return __fmul_rn(expf(__fadd_rn(x, -top)), inverse);
    case SCORE_SIGMOID:
        return sigmoid(x);
    case SCORE_SQRT_SOFTPLUS:
        return sqrt_softplus(x);
    default:
        return x;
    }
}

// Out of line where it would be there many times.
static __device__ __noinline__ float score_apart(u32 scoring, float top, float inverse, float x) {
    return score_of(scoring, top, inverse, x);
}

// Key of what is ranked of one expert, from memory.
template <class T> static __device__ __forceinline__ u32 key_of(const GateArgs &a, const Row &row, u32 expert) {
    float x = T::get(row.at, expert);
    if (row.by_score)
        x = score_apart(a.scoring, row.top, row.inverse, x);
    return order_key(a.bias ? __fadd_rn(x, a.bias[expert]) : x);
}

// A lane's N logits from expert `first` on; those past the last expert are -inf. `wide`: by vector loads.
template <class T, u32 N>
static __device__ __forceinline__ void load_logits(const GateArgs &a, const Row &row, u32 first, bool wide,
                                                   float (&x)[N]) {
    constexpr u32 AT_ONCE = N * T::bytes < 16 ? N : 16 / T::bytes;
    if (wide) {
        u32 words[N / AT_ONCE][AT_ONCE * T::bytes / 4];
#pragma unroll
        for (u32 v = 0; v < N / AT_ONCE; ++v) {
#pragma unroll
            for (u32 i = 0; i < AT_ONCE * T::bytes / 4; ++i)
                words[v][i] = Logits<T>::minus_infinity;
            if (first + v * AT_ONCE < a.experts)
                load_words((const u8 *)row.at + (u64)(first + v * AT_ONCE) * T::bytes, words[v]);
        }
#pragma unroll
        for (u32 i = 0; i < N; ++i)
            x[i] = Logits<T>::get(words[i / AT_ONCE], i % AT_ONCE);
    } else {
#pragma unroll
        for (u32 i = 0; i < N; ++i)
            x[i] = first + i < a.experts ? T::get(row.at, first + i) : __uint_as_float(0xff800000u);
    }
}

// Whether all lanes' loads begin where loads of their width may.
template <class T, u32 N> static __device__ __forceinline__ bool loads_wide(const GateArgs &a) {
    constexpr u32 AT_ONCE = N * T::bytes < 16 ? N : 16 / T::bytes;
    return ((u32)(u64)a.logits | (u32)a.stride * T::bytes) % (AT_ONCE * T::bytes) == 0 && a.experts % AT_ONCE == 0;
}

// Logits to what is ranked: the logits or the scores, plus the bias.
template <u32 N>
static __device__ __forceinline__ void rank_values(const GateArgs &a, const Row &row, u32 first, float (&x)[N]) {
    if (row.by_score && a.scoring == SCORE_SIGMOID)
#pragma unroll
        for (u32 i = 0; i < N; ++i)
            x[i] = sigmoid(x[i]);
    else if (row.by_score)
#pragma unroll
        for (u32 i = 0; i < N; ++i)
            x[i] = score_apart(a.scoring, row.top, row.inverse, x[i]);
    if (a.bias)
#pragma unroll
        for (u32 i = 0; i < N; ++i)
            x[i] = __fadd_rn(x[i], first + i < a.experts ? a.bias[first + i] : 0.0f);
    if (row.by_score || a.bias)
#pragma unroll
        for (u32 i = 0; i < N; ++i)
            if (first + i >= a.experts)
                x[i] = __uint_as_float(0xff800000u);
}

// Parts of a row that a warp ranks at a time.
template <u32 N> static __device__ __forceinline__ u32 chunks_of(const GateArgs &a) {
    return N < 8 ? 1 : (a.experts + CHUNK - 1) / CHUNK;
}

// The softmax over the whole row, where one is needed.
template <class T, u32 N>
static __device__ __forceinline__ void prepare_softmax(const GateArgs &a, Row &row, bool wide) {
    const u32 lane = threadIdx.x % LANES;
    float top = __uint_as_float(0xff800000u);
    float sum = 0.0f;
#pragma unroll 1
    for (u32 pass = 0; pass < 2; ++pass) {
#pragma unroll 1
        for (u32 chunk = 0; chunk < chunks_of<N>(a); ++chunk) {
            float x[N];
            load_logits<T, N>(a, row, chunk * CHUNK + lane * N, wide, x);
            if (pass == 0)
#pragma unroll
                for (u32 i = 0; i < N; ++i)
                    top = fmaxf(top, x[i]);
            else
#pragma unroll
                for (u32 i = 0; i < N; ++i)
                    sum = __fadd_rn(sum, expf(__fadd_rn(x[i], -top)));
        }
        if (pass == 0)
            top = key_value(__reduce_max_sync(FULL_WARP, order_key(top)));
    }
    row.top = top;
    row.inverse = __fdiv_rn(1.0f, sum_of_lanes<LANES>(sum));
}
