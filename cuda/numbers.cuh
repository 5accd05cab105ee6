// The three number formats of weights and activations: 16 bytes to floats and one float back.
// Sums are made in float32; results are rounded to nearest even, as torch does.
#pragma once
#include "common.cuh"

struct F32 {
    static const u32 bytes = 4;
    static const u32 lanes = 4;  // numbers in 16 bytes
    static __device__ __forceinline__ void unpack(const Vec16 &v, float *into) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            into[i] = __uint_as_float(v.word[i]);
    }
    static __device__ __forceinline__ float get(const void *at, u64 i) { return ((const float *)at)[i]; }
    static __device__ __forceinline__ void put(void *at, u64 i, float x) { ((float *)at)[i] = x; }
    static __device__ __forceinline__ float round(float x) { return x; }
};

struct Bf16 {
    static const u32 bytes = 2;
    static const u32 lanes = 8;
    static __device__ __forceinline__ void unpack(const Vec16 &v, float *into) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            into[2 * i] = __uint_as_float(v.word[i] << 16);
            into[2 * i + 1] = __uint_as_float(v.word[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ u16 bits(float x) {
#ifdef MOECORE_EMULATED
        return emulated_bf16(x);
#else
        u16 b;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(x));
        return b;
#endif
    }
    static __device__ __forceinline__ float value(u16 b) { return __uint_as_float((u32)b << 16); }
    static __device__ __forceinline__ float get(const void *at, u64 i) { return value(((const u16 *)at)[i]); }
    static __device__ __forceinline__ void put(void *at, u64 i, float x) { ((u16 *)at)[i] = bits(x); }
    static __device__ __forceinline__ float round(float x) { return value(bits(x)); }
};

struct F16 {
    static const u32 bytes = 2;
    static const u32 lanes = 8;
    static __device__ __forceinline__ void unpack(const Vec16 &v, float *into) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            into[2 * i] = value((u16)v.word[i]);
            into[2 * i + 1] = value((u16)(v.word[i] >> 16));
        }
    }
    static __device__ __forceinline__ u16 bits(float x) {
#ifdef MOECORE_EMULATED
        return emulated_f16(x);
#else
        u16 b;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(x));
        return b;
#endif
    }
    static __device__ __forceinline__ float value(u16 b) {
#ifdef MOECORE_EMULATED
        return emulated_f16_value(b);
#else
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(b));
        return x;
#endif
    }
    static __device__ __forceinline__ float get(const void *at, u64 i) { return value(((const u16 *)at)[i]); }
    static __device__ __forceinline__ void put(void *at, u64 i, float x) { ((u16 *)at)[i] = bits(x); }
    static __device__ __forceinline__ float round(float x) { return value(bits(x)); }
};
