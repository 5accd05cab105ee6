// A token's choices, by whichever way serves it, and where they go.
#pragma once
#include "gate_any.cuh"
#include "gate_fast.cuh"

static __device__ __forceinline__ u32 valid_tokens(const GateArgs &a) {
    if (!a.valid)
        return a.tokens;
    const i32 valid = *a.valid;
    return valid < 0 ? 0 : min((u32)valid, a.tokens);
}

// Choice `choice` of a token, as the caller wants it. An id of -1 is nobody.
static __device__ __forceinline__ void put_choice(const GateArgs &a, u32 token, u32 choice, i32 id, float weight) {
    const u64 at = (u64)token * a.k + choice;
    if (a.ids) {
        if (a.flags & GATE_IDS_I64)
            ((i64 *)a.ids)[at] = id;
        else
            ((i32 *)a.ids)[at] = id;
    }
    if (!a.weights)
        return;
    if (a.weights_format == FORMAT_F32)
        F32::put(a.weights, at, weight);
    else if (a.weights_format == FORMAT_BF16)
        Bf16::put(a.weights, at, weight);
    else
        F16::put(a.weights, at, weight);
}

// A token's choices, written and given to lanes j < k. Called by a whole warp. RULE: GATE_BY_LOGITS, GATE_BY_SCORES, or 0
// for whatever is asked for.
template <class T, u32 N, u32 RULE>
static __device__ __forceinline__ i32 gate_token(const GateArgs &a, u32 token, u32 valid) {
    u32 id = ~0u;
    float weight = 0.0f;
    if (token < valid) {
        if constexpr (RULE == 0)
            gate_any_row<T>(a, token, id, weight);
        else
            gate_fast_row<T, N, RULE == GATE_BY_SCORES>(
                a, token, load_row<T, N, RULE == GATE_BY_SCORES>(a, token, true), id, weight);
    }
    const u32 lane = threadIdx.x % LANES;
    if (lane < a.k)
        put_choice(a, token, lane, (i32)id, weight);
    return (i32)id;
}

// All tokens of a grid's warps, which take turns; a row is on its way while the one before it is chosen from.
template <class T, u32 N, u32 RULE>
static __device__ __forceinline__ void gate_tokens(const GateArgs &a, u32 first, u32 stride) {
    const u32 valid = valid_tokens(a);
    if constexpr (RULE == 0) {
        for (u32 token = first; token < a.tokens; token += stride)
            gate_token<T, N, RULE>(a, token, valid);
    } else {
        constexpr bool SCORES = RULE == GATE_BY_SCORES;
        const u32 lane = threadIdx.x % LANES;
        RawRow<T, N, SCORES> raw = load_row<T, N, SCORES>(a, first, first < valid);
        for (u32 token = first; token < a.tokens; token += stride) {
            const RawRow<T, N, SCORES> next = load_row<T, N, SCORES>(a, token + stride, token + stride < valid);
            u32 id = ~0u;
            float weight = 0.0f;
            if (token < valid)
                gate_fast_row<T, N, SCORES>(a, token, raw, id, weight);
            if (lane < a.k)
                put_choice(a, token, lane, (i32)id, weight);
            raw = next;
        }
    }
}

// The kernels of one format: one for whatever is asked for, and one for each width of the short ways.
#define GATE_WAYS(KERNEL, suffix, T)                                                                                   \
    KERNEL(suffix, T, 8, 0)                                                                                            \
    KERNEL(logits_##suffix##_w2, T, 2, GATE_BY_LOGITS)                                                                 \
    KERNEL(logits_##suffix##_w4, T, 4, GATE_BY_LOGITS)                                                                 \
    KERNEL(logits_##suffix##_w8, T, 8, GATE_BY_LOGITS)                                                                 \
    KERNEL(logits_##suffix##_w16, T, 16, GATE_BY_LOGITS)                                                               \
    KERNEL(scores_##suffix##_w2, T, 2, GATE_BY_SCORES)                                                                 \
    KERNEL(scores_##suffix##_w4, T, 4, GATE_BY_SCORES)                                                                 \
    KERNEL(scores_##suffix##_w8, T, 8, GATE_BY_SCORES)                                                                 \
    KERNEL(scores_##suffix##_w16, T, 16, GATE_BY_SCORES)
