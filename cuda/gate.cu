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

#define GATE_BLOCKS_OF(N, RULE)                                                                                        \
    ((N) > 8 ? GATE_WIDE_RESIDENT : (RULE) == GATE_BY_LOGITS ? GATE_LOGITS_RESIDENT : GATE_RESIDENT)

#define GATE_KERNEL(name, T, N, RULE)                                                                                  \
    extern "C" __global__ void __launch_bounds__(GATE_WARPS *LANES, GATE_BLOCKS_OF(N, RULE))                           \
        moecore_gate_##name(const GateArgs a) {                                                                        \
        gate<T, N, RULE>(a);                                                                                           \
    }

GATE_WAYS(GATE_KERNEL, f32, F32)
GATE_WAYS(GATE_KERNEL, bf16, Bf16)
GATE_WAYS(GATE_KERNEL, f16, F16)
