// gate: logits to the k best experts of each token and their weights. A kernel for each format and rule; of the fast
// rules one for each width: N experts a lane, w2 up to 64 experts, w4 up to 128, w8 up to 256, w16 up to 512.
#include "gate.cuh"

// Any grid will do. Best for few tokens is a block of one warp for each; for many, blocks of GATE_WARPS warps, at most
// GATE_BLOCKS for each multiprocessor.
// Grid: tokens / warps of a block; block: 32 or GATE_WARPS * 32.
template <class T, u32 N, u32 RULE> static __device__ __forceinline__ void gate(const GateArgs &a) {
    let_next_begin();
    await_last();
    const u32 warps = blockDim.x / LANES;
    gate_tokens<T, N, RULE>(a, blockIdx.x * warps + warp_number(), gridDim.x * warps);
}

#define GATE_KERNEL(name, T, N, RULE, RESIDENT)                                                                        \
    extern "C" __global__ void __launch_bounds__(GATE_WARPS *LANES, RESIDENT) moecore_gate_##name(const GateArgs a) {  \
        gate<T, N, RULE>(a);                                                                                           \
    }

#define GATE_KERNELS(suffix, T)                                                                                        \
    GATE_KERNEL(suffix, T, 8, 0, GATE_RESIDENT)                                                                        \
    GATE_KERNEL(logits_##suffix##_w2, T, 2, GATE_BY_LOGITS, GATE_LOGITS_RESIDENT)                                      \
    GATE_KERNEL(logits_##suffix##_w4, T, 4, GATE_BY_LOGITS, GATE_LOGITS_RESIDENT)                                      \
    GATE_KERNEL(logits_##suffix##_w8, T, 8, GATE_BY_LOGITS, GATE_LOGITS_RESIDENT)                                      \
    GATE_KERNEL(logits_##suffix##_w16, T, 16, GATE_BY_LOGITS, GATE_WIDE_RESIDENT)                                      \
    GATE_KERNEL(scores_##suffix##_w2, T, 2, GATE_BY_SCORES, GATE_RESIDENT)                                             \
    GATE_KERNEL(scores_##suffix##_w4, T, 4, GATE_BY_SCORES, GATE_RESIDENT)                                             \
    GATE_KERNEL(scores_##suffix##_w8, T, 8, GATE_BY_SCORES, GATE_RESIDENT)                                             \
    GATE_KERNEL(scores_##suffix##_w16, T, 16, GATE_BY_SCORES, GATE_WIDE_RESIDENT)

GATE_KERNELS(f32, F32)
GATE_KERNELS(bf16, Bf16)
GATE_KERNELS(f16, F16)
