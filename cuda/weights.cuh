// Weights of the choices that a warp's first k lanes have.
#pragma once
#include "scores.cuh"

// Lane j < k: the weight of choice j, from its logit x and its score; a softmax over the choices needs none.
static __device__ __forceinline__ float weigh(const GateArgs &a, float x, float score) {
    const bool mine = threadIdx.x % LANES < a.k;
    float weight = score;
    if (a.scoring == SCORE_SOFTMAX_TOPK) {
        const float top = key_value(__reduce_max_sync(FULL_WARP, mine ? order_key(x) : 0));
        weight = expf(__fadd_rn(x, -top));
        weight = __fdividef(weight, sum_of_choices(mine ? weight : 0.0f, a.k));
    }
    if (a.flags & GATE_RENORMALIZE)
        weight = __fdiv_rn(weight, __fadd_rn(sum_of_choices(mine ? weight : 0.0f, a.k), a.eps));
    return __fmul_rn(weight, a.scale);
}

// The weight of a choice with this logit, where the softmax is over the choices alone.
static __device__ __forceinline__ float weigh_choices(const GateArgs &a, float logit, bool chooses) {
    const float power = expf(__fadd_rn(logit, -__shfl_sync(FULL_WARP, logit, 0)));
    return __fmul_rn(__fdividef(power, sum_of_choices(chooses ? power : 0.0f, a.k)), a.scale);
}
