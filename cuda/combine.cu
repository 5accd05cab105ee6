// combine: a token's k rows, weighted and summed, beside what else is added to the token. Sums are float32 and always
// in the order of the choices, so a result depends on its token alone. Rows that nobody has written are never read:
// they may hold NaN, and 0 * NaN is not 0.
#include "numbers.cuh"
#include "ptx.cuh"
#include "routing.cuh"

// A choice of a token: its row, or a number below 0, and its weight.
struct Choice {
    i32 row;
    float weight;
};

static __device__ __forceinline__ Choice choice_of(const CombineArgs &a, u32 token, u32 j) {
    Choice choice = {-1, 0.0f};
    if (j >= a.k)
        return choice;
    const u64 pair = (u64)token * a.k + j;
    const i32 row = a.inverse ? a.inverse[pair] : (i32)pair;
    choice.row = (u32)row < a.row_count ? row : -1;
    if (!a.weights)
        choice.weight = 1.0f;
    else if (a.weights_format == FORMAT_F32)
        choice.weight = F32::get(a.weights, pair);
    else if (a.weights_format == FORMAT_BF16)
        choice.weight = Bf16::get(a.weights, pair);
    else
        choice.weight = F16::get(a.weights, pair);
    return choice;
}

// Floats to 16 bytes of a format.
template <class T> struct Packed {
    static __device__ __forceinline__ Vec16 of(const float *x) {
        Vec16 v;
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            v.word[i] = (u32)T::bits(x[2 * i]) | (u32)T::bits(x[2 * i + 1]) << 16;
        return v;
    }
};
template <> struct Packed<F32> {
    static __device__ __forceinline__ Vec16 of(const float *x) {
        Vec16 v;
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            v.word[i] = __float_as_uint(x[i]);
        return v;
    }
};

// What is added to a sum, where the tokens have it.
template <class T> static __device__ __forceinline__ void add(float *sum, const Vec16 &v) {
    float x[T::lanes];
    T::unpack(v, x);
#pragma unroll
    for (u32 e = 0; e < T::lanes; ++e)
        sum[e] = __fadd_rn(sum[e], x[e]);
}

// A warp makes UNITS * 512 bytes of a token at a time, and reads the rows of K choices side by side. WHOLE: k is K.
template <class T, u32 K, u32 UNITS, bool WHOLE>
static __device__ __forceinline__ void combine(const CombineArgs &a) {
    constexpr u32 STEP = LANES * 16;  // bytes between the units of a lane
    const u32 lane = threadIdx.x % LANES;
    const u32 stride = gridDim.x * COMBINE_WARPS;
    const u32 width = (a.row_bytes + UNITS * STEP - 1) / (UNITS * STEP);
    const u32 items = a.tokens * width;
    u32 item = blockIdx.x * COMBINE_WARPS + threadIdx.x / LANES;
    if (item >= items)
        return;
    // Choices are read one turn ahead: the rows cannot be asked for without them.
    Choice ahead = choice_of(a, item / width, lane);
    for (; item < items; item += stride) {
        const u32 token = item / width;
        const u32 at = (item % width * UNITS * LANES + lane) * 16;
        const u64 place = (u64)token * a.row_bytes + at;
        Vec16 shared[UNITS], residual[UNITS];
#pragma unroll
        for (u32 u = 0; u < UNITS; ++u) {
            const bool inside = at + u * STEP < a.row_bytes;
            shared[u] = load_once_if<true>(a.shared && inside, (const u8 *)a.shared + place + u * STEP);
            residual[u] = load_once_if<true>(a.residual && inside, (const u8 *)a.residual + place + u * STEP);
        }
        Choice next = ahead;
        if (item + stride < items)
            ahead = choice_of(a, (item + stride) / width, lane);
        float sum[UNITS][T::lanes];
#pragma unroll
        for (u32 u = 0; u < UNITS; ++u)
#pragma unroll
            for (u32 e = 0; e < T::lanes; ++e)
                sum[u][e] = 0.0f;
#pragma unroll 1
        for (u32 first = 0; first < (WHOLE ? 1 : a.k); first += K) {
            const Choice mine = next;
            if (!WHOLE && first + K < a.k)
                next = choice_of(a, token, first + K + lane);
            Vec16 held[K][UNITS];
            const u32 named = __ballot_sync(FULL_WARP, mine.row >= 0);
#pragma unroll
            for (u32 j = 0; j < K; ++j) {
                const u32 row = (u32)__shfl_sync(FULL_WARP, mine.row, j);
                const u8 *from = (const u8 *)a.rows + (u64)row * a.row_bytes + at;
#pragma unroll
                for (u32 u = 0; u < UNITS; ++u)
                    held[j][u] = load_once_if<true>((named >> j & 1u) && at + u * STEP < a.row_bytes, from + u * STEP);
            }
#pragma unroll
            for (u32 j = 0; j < K; ++j) {
                const float weight = __shfl_sync(FULL_WARP, mine.weight, j);
                if (!(named >> j & 1u))
                    continue;
#pragma unroll
                for (u32 u = 0; u < UNITS; ++u) {
                    float x[T::lanes];
                    T::unpack(held[j][u], x);
#pragma unroll
                    for (u32 e = 0; e < T::lanes; ++e)
                        sum[u][e] = __fmaf_rn(weight, x[e], sum[u][e]);
                }
            }
        }
#pragma unroll
        for (u32 u = 0; u < UNITS; ++u) {
            if (at + u * STEP >= a.row_bytes)
                break;
#pragma unroll
            for (u32 e = 0; e < T::lanes; ++e)
                sum[u][e] = __fmul_rn(sum[u][e], a.scale);
            if (a.shared)
                add<T>(sum[u], shared[u]);
            if (a.residual)
                add<T>(sum[u], residual[u]);
            store16_as<COMBINE_STORE_HINT>((u8 *)a.out + place + u * STEP, Packed<T>::of(sum[u]));
        }
    }
}

// Units of a warp: with what is added, each lane has some COMBINE_IN_FLIGHT loads under way.
#define COMBINE_UNITS(K) (COMBINE_IN_FLIGHT > (K) + 2 ? COMBINE_IN_FLIGHT / ((K) + 2) : 1)

// Any grid will do. Best is a warp for each UNITS * 512 bytes, at most COMBINE_BLOCKS blocks for each multiprocessor.
// Grid: tokens * pieces of a row / COMBINE_WARPS, block: COMBINE_WARPS * 32.
template <class T> static __device__ __forceinline__ void combine_any(const CombineArgs &a) {
    let_next_begin();
    await_last();
#define CASE(K)                                                                                                        \
    case K:                                                                                                            \
        combine<T, K, COMBINE_UNITS(K), true>(a);                                                                      \
        break
    switch (a.k) {
        CASE(1);
        CASE(2);
        CASE(4);
        CASE(6);
        CASE(8);
        CASE(10);
        CASE(16);
    default:
        combine<T, 8, 1, false>(a);
    }
#undef CASE
}

#define COMBINE_KERNEL(suffix, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(COMBINE_WARPS *LANES, (COMBINE_RESIDENT - 1) / COMBINE_WARPS + 1)     \
        moecore_combine_##suffix(const CombineArgs a) {                                                                \
        combine_any<T>(a);                                                                                             \
    }

COMBINE_KERNEL(f32, F32)
COMBINE_KERNEL(bf16, Bf16)
COMBINE_KERNEL(f16, F16)
