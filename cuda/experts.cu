// Expert products of a decode step, straight over the slots. For few rows the weights are all that moves, so warps make
// single output elements and read each weight row once, 16 bytes a lane, many loads in flight.
//
// The order of every sum depends on the matrix' shape and alignment alone: not on which slot an expert lies in, not on how many
// tokens there are. Blocks of different rows but the same part of the matrices run side by side, so that tokens with
// the same expert find its weights in L2.
//
// Roundings are those of transformers' `grouped_mm_experts_forward`: products to the model's type, the activation to
// the model's type, its product with `up` to the model's type, weighted rows in the type of the routing weights.
#include "numbers.cuh"
#include "tuning.cuh"

struct ExpertArgs {
    const u8 *arena;      // slot 0
    u64 slot_bytes;
    u64 offset;           // of the matrix inside a slot
    u64 bias_offset;      // of the bias inside a slot, or ~0
    const void *x;        // activations
    const void *slots;    // [pairs] int32, or int64 by flag; outside of 0..slot_count: nobody, the row is zero
    const void *weights;  // routing weights [pairs]
    void *out;
    u32 tokens;
    u32 k;                // experts of a token
    u32 inputs;           // length of a sum
    u32 outputs;          // elements of a result row
    u32 act;
    u32 flags;
    u32 slot_count;
    u32 reserved;
};
static_assert(sizeof(ExpertArgs) == 96, "ExpertArgs");

#define ACT_SILU 0u
#define ACT_GELU 1u
#define ACT_GELU_TANH 2u
#define ACT_RELU 3u

#define FLAG_WEIGHTS_F32 1u    // routing weights are float32, else of the model's type
#define FLAG_ROW_PER_PAIR 2u   // slot_linear: activations have a row for each pair, else for each token
#define FLAG_SLOTS_I64 4u

// The slot of a pair, or -1.
static __device__ __forceinline__ i32 slot_of_pair(const ExpertArgs &a, u32 pair) {
    const i64 slot = a.flags & FLAG_SLOTS_I64 ? ((const i64 *)a.slots)[pair] : (i64)((const i32 *)a.slots)[pair];
    return (u64)slot < a.slot_count ? (i32)slot : -1;
}

static __device__ __forceinline__ float activate(float x, u32 act) {
    switch (act) {
    case ACT_SILU:
        return x / (1.0f + expf(-x));
    case ACT_GELU:
        return x * 0.5f * (1.0f + erff(x * 0.70710678118654752440f));
    case ACT_GELU_TANH: {
        const float inner = 0.79788456080286535588f * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1.0f + tanhf(inner));
    }
    default:
        return x != x ? x : fmaxf(x, 0.0f);
    }
}

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (u32 distance = LANES / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(FULL_WARP, x, distance);
    return x;
}

// ROWS x OUTPUTS dot products by one warp: sums[i][j] = w[i][j] . x[i]. What is null is left out (zero).
template <class T, u32 ROWS, u32 OUTPUTS, u32 DEPTH>
static __device__ __forceinline__ void dots(const u8 *const (&w)[ROWS][OUTPUTS], const u8 *const (&x)[ROWS], u32 n,
                                            bool aligned, float (&sums)[ROWS][OUTPUTS]) {
    const u32 lane = threadIdx.x % LANES;
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i)
#pragma unroll
        for (u32 j = 0; j < OUTPUTS; ++j)
            sums[i][j] = 0.0f;
    if (aligned) {
        const u32 units = n / T::lanes;
        for (u32 base = lane; base < units; base += LANES * DEPTH) {
            Vec16 wide[DEPTH][ROWS][OUTPUTS];
            Vec16 row[DEPTH][ROWS];
#pragma unroll
            for (u32 d = 0; d < DEPTH; ++d)
#pragma unroll
                for (u32 i = 0; i < ROWS; ++i)
#pragma unroll
                    for (u32 j = 0; j < OUTPUTS; ++j)
                        wide[d][i][j] = base + d * LANES < units && w[i][j]
                                            ? load_once(w[i][j] + (u64)(base + d * LANES) * 16)
                                            : zero16();
#pragma unroll
            for (u32 d = 0; d < DEPTH; ++d)
#pragma unroll
                for (u32 i = 0; i < ROWS; ++i)
                    row[d][i] = base + d * LANES < units && w[i][0]
                                    ? load_shared(x[i] + (u64)(base + d * LANES) * 16)
                                    : zero16();
#pragma unroll
            for (u32 d = 0; d < DEPTH; ++d) {
                if (base + d * LANES >= units)
                    break;
#pragma unroll
                for (u32 i = 0; i < ROWS; ++i) {
                    float b[T::lanes];
                    T::unpack(row[d][i], b);
#pragma unroll
                    for (u32 j = 0; j < OUTPUTS; ++j) {
                        float a[T::lanes];
                        T::unpack(wide[d][i][j], a);
#pragma unroll
                        for (u32 e = 0; e < T::lanes; ++e)
                            sums[i][j] = __fmaf_rn(a[e], b[e], sums[i][j]);
                    }
                }
            }
        }
    } else {
        for (u32 at = lane; at < n; at += LANES)
#pragma unroll
            for (u32 i = 0; i < ROWS; ++i)
#pragma unroll
                for (u32 j = 0; j < OUTPUTS; ++j)
                    if (w[i][j])
                        sums[i][j] = __fmaf_rn(T::get(w[i][j], at), T::get(x[i], at), sums[i][j]);
    }
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i)
#pragma unroll
        for (u32 j = 0; j < OUTPUTS; ++j)
            sums[i][j] = warp_sum(sums[i][j]);
}

// Whether every row of the matrix and of the activations begins on 16 bytes.
template <class T> static __device__ __forceinline__ bool rows_aligned(const ExpertArgs &a) {
    return ((u64)a.arena + a.offset) % 16 == 0 && a.slot_bytes % 16 == 0 && (u64)a.x % 16 == 0 &&
           (u64)a.inputs * T::bytes % 16 == 0;
}

// out[p, j] = act(gate) * up, gate = row j and up = row outputs + j of the slot's [2 * outputs, inputs] matrix.
// Grid: (pairs, outputs / EXPERT_WARPS).
template <class T> static __device__ __forceinline__ void expert_up(const ExpertArgs &a) {
    const u32 pair = blockIdx.x;
    const u32 j = blockIdx.y * EXPERT_WARPS + threadIdx.x / LANES;
    if (j >= a.outputs)
        return;
    const i32 slot = slot_of_pair(a, pair);
    float result = 0.0f;
    if (slot >= 0) {
        const u64 row_bytes = (u64)a.inputs * T::bytes;
        const u8 *matrix = a.arena + (u64)slot * a.slot_bytes + a.offset;
        const u8 *const w[1][2] = {{matrix + j * row_bytes, matrix + ((u64)a.outputs + j) * row_bytes}};
        const u8 *const x[1] = {(const u8 *)a.x + (u64)(pair / a.k) * row_bytes};
        float sums[1][2];
        dots<T, 1, 2, UP_DEPTH>(w, x, a.inputs, rows_aligned<T>(a), sums);
        const float gate = T::round(activate(T::round(sums[0][0]), a.act));
        result = __fmul_rn(gate, T::round(sums[0][1]));
    }
    if (threadIdx.x % LANES == 0)
        T::put(a.out, (u64)pair * a.outputs + j, result);
}

// The product of one pair, rounded, times its routing weight.
template <class T> static __device__ __forceinline__ float weighted(const ExpertArgs &a, u32 pair, float sum) {
    if (a.flags & FLAG_WEIGHTS_F32)
        return __fmul_rn(T::round(sum), ((const float *)a.weights)[pair]);
    return T::round(__fmul_rn(T::round(sum), T::get(a.weights, pair)));
}

// out[t, o] = sum over k of weights[t, k] * (row o of the slot's [outputs, inputs] matrix . x[t, k]).
// DOWN_SHARES warps share the experts of an output; one thread then adds their products, k in order.
// Grid: (tokens, outputs / DOWN_COLUMNS).
#define DOWN_COLUMNS (DOWN_WARPS / DOWN_SHARES * DOWN_OUTPUTS)
template <class T> static __device__ __forceinline__ void expert_down(const ExpertArgs &a) {
    constexpr u32 AT_ONCE = DOWN_SHARES * DOWN_ROWS;
    __shared__ float part[DOWN_COLUMNS][AT_ONCE];
    const u32 token = blockIdx.x;
    const u32 lane = threadIdx.x % LANES;
    const u32 share = threadIdx.x / LANES % DOWN_SHARES;
    const u32 column = threadIdx.x / LANES / DOWN_SHARES * DOWN_OUTPUTS;
    const u32 o = blockIdx.y * DOWN_COLUMNS + column;
    const u64 row_bytes = (u64)a.inputs * T::bytes;
    const bool aligned = rows_aligned<T>(a);
    float total = 0.0f;
    for (u32 first = 0; first < a.k; first += AT_ONCE) {
        const u8 *w[DOWN_ROWS][DOWN_OUTPUTS];
        const u8 *x[DOWN_ROWS];
#pragma unroll
        for (u32 i = 0; i < DOWN_ROWS; ++i) {
            const u32 at = first + share * DOWN_ROWS + i;
            const u32 pair = token * a.k + at;
            const i32 slot = at < a.k ? slot_of_pair(a, pair) : -1;
            x[i] = (const u8 *)a.x + pair * row_bytes;
#pragma unroll
            for (u32 j = 0; j < DOWN_OUTPUTS; ++j)
                w[i][j] = slot < 0 || o + j >= a.outputs
                              ? nullptr
                              : a.arena + (u64)slot * a.slot_bytes + a.offset + (o + j) * row_bytes;
        }
        float sums[DOWN_ROWS][DOWN_OUTPUTS];
        dots<T, DOWN_ROWS, DOWN_OUTPUTS, DOWN_DEPTH>(w, x, a.inputs, aligned, sums);
        if (lane == 0)
#pragma unroll
            for (u32 i = 0; i < DOWN_ROWS; ++i)
#pragma unroll
                for (u32 j = 0; j < DOWN_OUTPUTS; ++j) {
                    const u32 at = share * DOWN_ROWS + i;
                    part[column + j][at] = w[i][j] ? weighted<T>(a, token * a.k + first + at, sums[i][j]) : 0.0f;
                }
        __syncthreads();
        if (threadIdx.x < DOWN_COLUMNS)
            for (u32 i = 0; i < AT_ONCE; ++i)
                total = __fadd_rn(total, part[threadIdx.x][i]);
        __syncthreads();
    }
    const u32 mine = blockIdx.y * DOWN_COLUMNS + threadIdx.x;
    if (threadIdx.x < DOWN_COLUMNS && mine < a.outputs)
        T::put(a.out, (u64)token * a.outputs + mine, total);
}

// The product of one pair, rounded, and its bias, rounded again.
template <class T>
static __device__ __forceinline__ float with_bias(const ExpertArgs &a, i32 slot, u32 o, float sum) {
    const float y = T::round(sum);
    if (a.bias_offset == ~0ull)
        return y;
    return __fadd_rn(y, T::get(a.arena + (u64)slot * a.slot_bytes + a.bias_offset, o));
}

static __device__ __forceinline__ u64 input_row(const ExpertArgs &a, u32 pair) {
    return a.flags & FLAG_ROW_PER_PAIR ? pair : pair / a.k;
}

// out[p, o] = row o of the slot's [outputs, inputs] matrix . x[row(p)] (+ bias[o]).
// Grid: (pairs, outputs / EXPERT_WARPS).
template <class T> static __device__ __forceinline__ void slot_linear(const ExpertArgs &a) {
    const u32 pair = blockIdx.x;
    const u32 o = blockIdx.y * EXPERT_WARPS + threadIdx.x / LANES;
    if (o >= a.outputs)
        return;
    const i32 slot = slot_of_pair(a, pair);
    float result = 0.0f;
    if (slot >= 0) {
        const u64 row_bytes = (u64)a.inputs * T::bytes;
        const u8 *const w[1][1] = {{a.arena + (u64)slot * a.slot_bytes + a.offset + o * row_bytes}};
        const u8 *const x[1] = {(const u8 *)a.x + input_row(a, pair) * row_bytes};
        float sums[1][1];
        dots<T, 1, 1, LINEAR_DEPTH>(w, x, a.inputs, rows_aligned<T>(a), sums);
        result = with_bias<T>(a, slot, o, sums[0][0]);
    }
    if (threadIdx.x % LANES == 0)
        T::put(a.out, (u64)pair * a.outputs + o, result);
}

// The same over a [inputs, outputs] matrix. A lane owns the T::lanes outputs of one 16-byte load; the warps of a
// block share the sum, and their parts are added in order. Grid: (pairs, outputs / (LANES * T::lanes)).
template <class T> static __device__ __forceinline__ void slot_linear_transposed(const ExpertArgs &a) {
    __shared__ float part[TRANSPOSED_WARPS][LANES * T::lanes];
    const u32 pair = blockIdx.x;
    const u32 lane = threadIdx.x % LANES;
    const u32 warp = threadIdx.x / LANES;
    const u32 begin = blockIdx.y * LANES * T::lanes;
    if (begin >= a.outputs)
        return;
    const u32 own = begin + lane * T::lanes;
    const i32 slot = slot_of_pair(a, pair);
    const u8 *matrix = a.arena + (u64)slot * a.slot_bytes + a.offset;
    const u8 *x = (const u8 *)a.x + input_row(a, pair) * a.inputs * T::bytes;
    const u64 row_bytes = (u64)a.outputs * T::bytes;
    const bool aligned = (u64)matrix % 16 == 0 && row_bytes % 16 == 0;
    float sums[T::lanes];
#pragma unroll
    for (u32 j = 0; j < T::lanes; ++j)
        sums[j] = 0.0f;
    if (slot >= 0 && own < a.outputs) {
        for (u32 i = warp; i < a.inputs; i += TRANSPOSED_WARPS * LINEAR_DEPTH) {
            float w[LINEAR_DEPTH][T::lanes];
#pragma unroll
            for (u32 d = 0; d < LINEAR_DEPTH; ++d) {
                const u32 row = i + d * TRANSPOSED_WARPS;
                if (row < a.inputs && aligned) {
                    T::unpack(load_once(matrix + row * row_bytes + (u64)own * T::bytes), w[d]);
                } else {
#pragma unroll
                    for (u32 j = 0; j < T::lanes; ++j)
                        w[d][j] = row < a.inputs && own + j < a.outputs ? T::get(matrix + row * row_bytes, own + j)
                                                                        : 0.0f;
                }
            }
#pragma unroll
            for (u32 d = 0; d < LINEAR_DEPTH; ++d) {
                const u32 row = i + d * TRANSPOSED_WARPS;
                if (row >= a.inputs)
                    break;
                const float scale = T::get(x, row);
#pragma unroll
                for (u32 j = 0; j < T::lanes; ++j)
                    sums[j] = __fmaf_rn(w[d][j], scale, sums[j]);
            }
        }
    }
#pragma unroll
    for (u32 j = 0; j < T::lanes; ++j)
        part[warp][lane * T::lanes + j] = sums[j];
    __syncthreads();
    for (u32 i = threadIdx.x; i < LANES * T::lanes && begin + i < a.outputs; i += TRANSPOSED_WARPS * LANES) {
        float sum = 0.0f;
#pragma unroll
        for (u32 other = 0; other < TRANSPOSED_WARPS; ++other)
            sum = __fadd_rn(sum, part[other][i]);
        T::put(a.out, (u64)pair * a.outputs + begin + i, slot < 0 ? 0.0f : with_bias<T>(a, slot, begin + i, sum));
    }
}

#define KERNELS(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(EXPERT_WARPS *LANES, UP_BLOCKS)                                       \
        moecore_expert_up_##suffix(const ExpertArgs a) {                                                               \
        expert_up<T>(a);                                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(DOWN_WARPS *LANES, DOWN_BLOCKS)                                       \
        moecore_expert_down_##suffix(const ExpertArgs a) {                                                             \
        expert_down<T>(a);                                                                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(EXPERT_WARPS *LANES)                                                  \
        moecore_slot_linear_##suffix(const ExpertArgs a) {                                                             \
        slot_linear<T>(a);                                                                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(TRANSPOSED_WARPS *LANES)                                              \
        moecore_slot_linear_t_##suffix(const ExpertArgs a) {                                                           \
        slot_linear_transposed<T>(a);                                                                                  \
    }

KERNELS(f32, F32)
KERNELS(bf16, Bf16)
KERNELS(f16, F16)
