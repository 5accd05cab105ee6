// Numbers in the order in which the gate ranks them, as words that integer instructions compare and sort.
//
// A key is the float's bits in the order of its value: NaN first, then -inf; -0.0 and +0.0 are one. It is never 0.
// A word is a key whose lowest bits were given up for the expert, the lowest expert highest: words of one row are all
// different, so that minima and maxima alone sort them, and the best word of a warp says who has it. The bits given up
// are zero in every number that came from 16 bits; of others they are compared afterwards (gate_any.cuh, gate_fast.cuh).
#pragma once
#include "ptx.cuh"

// Key of +0.0 less its sign bit: NaN, which comes as 0x7fffffff, wraps around to just below this.
#define KEY_BASE 0x401u

static __device__ __forceinline__ u32 order_key(float x) {
    const u32 bits = plain_bits(x);
    return (bits ^ ((u32)((i32)bits >> 31) | 0x80000000u)) + KEY_BASE;
}

// The number of a key.
static __device__ __forceinline__ float key_value(u32 key) {
    const u32 ordered = key - KEY_BASE;
    return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

template <class W> static __device__ __forceinline__ void larger_first(W &a, W &b) {
    const W low = min(a, b);
    a = max(a, b);
    b = low;
}

// Sorting networks, largest first: 1, 5 and 19 comparisons.
template <class W> static __device__ __forceinline__ void sort_words(W (&w)[2]) { larger_first(w[0], w[1]); }

template <class W> static __device__ __forceinline__ void sort_words(W (&w)[4]) {
    larger_first(w[0], w[1]);
    larger_first(w[2], w[3]);
    larger_first(w[0], w[2]);
    larger_first(w[1], w[3]);
    larger_first(w[1], w[2]);
}

template <class W> static __device__ __forceinline__ void sort_words(W (&w)[8]) {
    larger_first(w[0], w[2]);
    larger_first(w[1], w[3]);
    larger_first(w[4], w[6]);
    larger_first(w[5], w[7]);
    larger_first(w[0], w[4]);
    larger_first(w[1], w[5]);
    larger_first(w[2], w[6]);
    larger_first(w[3], w[7]);
    larger_first(w[0], w[1]);
    larger_first(w[2], w[3]);
    larger_first(w[4], w[5]);
    larger_first(w[6], w[7]);
    larger_first(w[2], w[4]);
    larger_first(w[3], w[5]);
    larger_first(w[1], w[4]);
    larger_first(w[3], w[6]);
    larger_first(w[1], w[2]);
    larger_first(w[3], w[4]);
    larger_first(w[5], w[6]);
}

// The largest N of two sorted lists, sorted: what is larger of each pair of opposite places is bitonic.
template <class W, u32 N> static __device__ __forceinline__ void merge_words(W (&list)[N], const W (&other)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; ++i)
        list[i] = max(list[i], other[N - 1 - i]);
#pragma unroll
    for (u32 half = N / 2; half > 0; half /= 2)
#pragma unroll
        for (u32 i = 0; i < N; ++i)
            if (!(i & half))
                larger_first(list[i], list[i + half]);
}
