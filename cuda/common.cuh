// Words shared by all kernels. No header is included, so that the same text compiles under nvcc and under NVRTC. Under
// g++ (MOECORE_EMULATED, tests/kernels) what is PTX has a second body.
#pragma once
#include "tuning.cuh"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define LANES 32
#define FULL_WARP 0xffffffffu

// 16 bytes: the widest load of one thread.
struct alignas(16) Vec16 {
    u32 word[4];
};

static __device__ __forceinline__ Vec16 zero16() {
    Vec16 v;
    v.word[0] = v.word[1] = v.word[2] = v.word[3] = 0;
    return v;
}

// Read-only memory that is used once (weights): past L1, so that the activations stay there.
static __device__ __forceinline__ Vec16 load_once(const void *at) {
#ifdef MOECORE_EMULATED
    return emulated_load<Vec16>(at);
#else
    Vec16 v;
#if WEIGHTS_WIDE
#define LOAD_ONCE "ld.global.nc.L1::no_allocate.L2::256B.v4.u32"
#else
#define LOAD_ONCE "ld.global.nc.L1::no_allocate.v4.u32"
#endif
    asm(LOAD_ONCE " {%0,%1,%2,%3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(at));
    return v;
#endif
}

// Read-only memory that many warps use (activations).
static __device__ __forceinline__ Vec16 load_shared(const void *at) {
#ifdef MOECORE_EMULATED
    return emulated_load<Vec16>(at);
#else
    Vec16 v;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(at));
    return v;
#endif
}

// Pinned host memory, read once. The asm is volatile: it must stay behind the barrier that follows the host's answer.
static __device__ __forceinline__ Vec16 load_host(const void *at) {
#ifdef MOECORE_EMULATED
    return emulated_load<Vec16>(at);
#else
    Vec16 v;
#if FETCH_WIDE
#define LOAD_HOST "ld.global.L1::no_allocate.L2::256B.v4.u32"
#else
#define LOAD_HOST "ld.global.L1::no_allocate.v4.u32"
#endif
    asm volatile(LOAD_HOST " {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(at)
                 : "memory");
    return v;
#endif
}

static __device__ __forceinline__ void store16(void *at, const Vec16 &v) {
#ifdef MOECORE_EMULATED
    emulated_store(at, v);
#else
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
                 "r"(v.word[3])
                 : "memory");
#endif
}
