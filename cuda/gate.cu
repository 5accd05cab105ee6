// gate: logits to the k best experts of each token and their weights. A kernel for each format and for each width: N
// experts a lane, w2 up to 64 experts, w4 up to 128, w8 for all others.
#include "gate.cuh"

// Any grid will do. Best for few tokens is a block of one warp for each; for many, blocks of GATE_WARPS warps, at most
// GATE_BLOCKS for each multiprocessor.
// Grid: tokens / warps of a block; block: 32 or GATE_WARPS * 32.
template <class T, u32 N> static __device__ __forceinline__ void gate(const GateArgs &a) {
    const u32 warps = blockDim.x / LANES;
    const u32 valid = valid_tokens(a);
    const bool plain = gates_plainly<T, N>(a);
    for (u64 token = (u64)blockIdx.x * warps + warp_number(); token < a.tokens; token += (u64)gridDim.x * warps)
        gate_token<T, N>(a, (u32)token, valid, plain);
}

#define GATE_KERNEL(suffix, T, N)                                                                                      \
    extern "C" __global__ void __launch_bounds__(GATE_WARPS *LANES, GATE_RESIDENT)                                     \
        moecore_gate_##suffix##_w##N(const GateArgs a) {                                                               \
        gate<T, N>(a);                                                                                                 \
    }

#define GATE_KERNELS(N)                                                                                                \
    GATE_KERNEL(f32, F32, N)                                                                                           \
    GATE_KERNEL(bf16, Bf16, N)                                                                                         \
    GATE_KERNEL(f16, F16, N)

GATE_KERNELS(2)
GATE_KERNELS(4)
GATE_KERNELS(8)
