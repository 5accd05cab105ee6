// permute: rows of tokens to the places that `inverse` names, for callers that have the index already; route_place does
// the same as soon as it knows a tile's places. Rows that nobody names are not written.
#include "permute.cuh"
#include "routing.cuh"

// Any grid will do. Best is a warp for each piece, at most PERMUTE_BLOCKS blocks for each multiprocessor; a piece has
// 512 bytes (e4m3: columns), and DEPTH times as many above PERMUTE_SMALL_TOKENS tokens.
// Grid: pieces / PERMUTE_WARPS, block: PERMUTE_WARPS * 32.
template <class Quant> static __device__ __forceinline__ void permute(const PermuteArgs &a) {
    const Scatter s = {(const u8 *)a.x, a.inverse, (u8 *)a.out, a.scales, a.row_bytes, a.k, a.rows};
    if (a.tokens <= PERMUTE_SMALL_TOKENS)
        scatter<Quant, 1, false>(s, a.tokens, blockIdx.x, gridDim.x);
    else
        scatter<Quant, Quant::DEPTH, false>(s, a.tokens, blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(PERMUTE_WARPS *LANES) moecore_permute(const PermuteArgs a) {
    permute<PlainRows>(a);
}

#define FP8_KERNEL(suffix, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(PERMUTE_WARPS *LANES)                                                 \
        moecore_permute_fp8_##suffix(const PermuteArgs a) {                                                            \
        permute<Fp8Rows<T>>(a);                                                                                        \
    }

FP8_KERNEL(f32, F32)
FP8_KERNEL(bf16, Bf16)
FP8_KERNEL(f16, F16)
