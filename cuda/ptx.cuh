// Instructions that CUDA C++ has no words for. Each has a second body in plain C++, by which the kernels run on a CPU
// (MOECORE_EMULATED).
#pragma once
#include "common.cuh"

// 16 bytes that are used once, past L1, or zeros where nothing is wanted. A branch around the load would do, too, but the
// compiler then puts all such loads into the same registers, and each waits for the one before. FRESH: it stays behind
// await_last() and sees what an earlier kernel wrote; else the memory is read-only as long as the kernel runs.
template <bool FRESH> static __device__ __forceinline__ Vec16 load_once_if(bool wanted, const void *at) {
#ifdef MOECORE_EMULATED
    return wanted ? emulated_load<Vec16>(at) : zero16();
#else
#define LOAD_IF(load)                                                                                                  \
    "{\n .reg .pred p;\n setp.ne.u32 p, %5, 0;\n"                                                                     \
    " mov.u32 %0, 0;\n mov.u32 %1, 0;\n mov.u32 %2, 0;\n mov.u32 %3, 0;\n"                                             \
    " @p " load " {%0,%1,%2,%3}, [%4];\n}"                                                                             \
        : "=&r"(v.word[0]), "=&r"(v.word[1]), "=&r"(v.word[2]), "=&r"(v.word[3])                                       \
        : "l"(at), "r"((u32)wanted)
    Vec16 v;
    if (FRESH)
        asm volatile(LOAD_IF("ld.global.L1::no_allocate.v4.u32"));
    else
        asm(LOAD_IF(LOAD_ONCE));
    return v;
#endif
}

// A store of 16 bytes that need not stay near. HINT: see PERMUTE_STORE_HINT.
template <u32 HINT> static __device__ __forceinline__ void store16_as(void *at, const Vec16 &v) {
#ifndef MOECORE_EMULATED
    if (HINT == 1) {
        asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.word[0]), "r"(v.word[1]),
                     "r"(v.word[2]), "r"(v.word[3])
                     : "memory");
        return;
    }
    if (HINT == 2) {
        asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.word[0]),
                     "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                     : "memory");
        return;
    }
    if (HINT == 3) {
        u64 policy;
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1,%2,%3,%4}, %5;" ::"l"(at), "r"(v.word[0]),
                     "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "l"(policy)
                     : "memory");
        return;
    }
#endif
    store16(at, v);
}

// Two numbers as e4m3, the second one in the upper byte: to nearest even, beyond the range to +-448, NaN to NaN.
#if __CUDA_ARCH__ >= 890
static __device__ __forceinline__ u32 e4m3_pair(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
static __device__ __forceinline__ u32 e4m3(float x) {
    const u32 bits = __float_as_uint(x);
    const u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return 0x7fu;
    u32 q;
    if (magnitude >= 0x43e00000u)  // 448, the largest
        q = 0x7eu;
    else if (magnitude < 0x3c800000u)  // below 2^-6 in steps of 2^-9: that is what 2^14 rounds to
        q = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) & 0xffu;
    else  // three bits of the mantissa stay; exponents count from -7 rather than -127
        q = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    return bits >> 24 & 0x80u | q;
}

static __device__ __forceinline__ u32 e4m3_pair(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
#endif

// The bits of x + 0: -0.0 becomes +0.0, and every NaN 0x7fffffff.
static __device__ __forceinline__ u32 plain_bits(float x) {
#ifdef MOECORE_EMULATED
    return x != x ? 0x7fffffffu : __float_as_uint(x + 0.0f);
#else
    return __float_as_uint(__fadd_rn(x, 0.0f));
#endif
}

// The same of two 16-bit numbers at once: every NaN is 0x7fff.
#ifdef MOECORE_EMULATED
static inline u32 plain_half(u32 half, u32 infinity) {
    return (half & 0x7fffu) > infinity ? 0x7fffu : half == 0x8000u ? 0 : half;
}
static inline u32 plain_bf16_pair(u32 pair) { return plain_half(pair & 0xffffu, 0x7f80u) | plain_half(pair >> 16, 0x7f80u) << 16; }
static inline u32 plain_f16_pair(u32 pair) { return plain_half(pair & 0xffffu, 0x7c00u) | plain_half(pair >> 16, 0x7c00u) << 16; }
#else
static __device__ __forceinline__ u32 plain_bf16_pair(u32 pair) {
    u32 plain;  // x * 1 + 0
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(plain) : "r"(pair), "r"(0x3f803f80u), "r"(0u));
    return plain;
}
static __device__ __forceinline__ u32 plain_f16_pair(u32 pair) {
    u32 plain;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(plain) : "r"(pair), "r"(0x3c003c00u), "r"(0u));
    return plain;
}
#endif

// 0xffff for each half that is negative.
static __device__ __forceinline__ u32 signs_of_pair(u32 pair) {
#ifdef MOECORE_EMULATED
    return __byte_perm(pair, pair, 0xbb99u);
#else
    u32 signs;
    asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(signs) : "r"(pair));
    return signs;
#endif
}

// 1 / x for x >= 1, to the last bit or the one before it. Where that is below 2^-126 it is made of a smaller x: the
// approximation knows no smaller results.
static __device__ __forceinline__ float reciprocal(float x) {
#ifdef MOECORE_EMULATED
    return 1.0f / x;
#else
    const float unit = x > 0x1p126f ? 0x1p-32f : 1.0f;
    const float y = __fmul_rn(x, unit);
    float about;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(about) : "f"(y));
    const float better = __fmaf_rn(about, __fmaf_rn(-y, about, 1.0f), about);
    return x > 0x1.fffffep127f ? 0.0f : __fmul_rn(better, unit);
#endif
}

// Memory in loads of 4, 8 or 16 bytes. Plain ones: they stay behind await_last(), and see what came before it. Those of
// read-only memory (ld.global.nc) promise neither.
static __device__ __forceinline__ void load_words(const void *at, u32 (&into)[1]) { into[0] = *(const u32 *)at; }

static __device__ __forceinline__ void load_words(const void *at, u32 (&into)[2]) {
#ifdef MOECORE_EMULATED
    const u64 both = emulated_load<u64>(at);
    into[0] = (u32)both;
    into[1] = (u32)(both >> 32);
#else
    const uint2 v = *(const uint2 *)at;
    into[0] = v.x;
    into[1] = v.y;
#endif
}

static __device__ __forceinline__ void load_words(const void *at, u32 (&into)[4]) {
#ifdef MOECORE_EMULATED
    const Vec16 v = emulated_load<Vec16>(at);
    for (u32 i = 0; i < 4; ++i)
        into[i] = v.word[i];
#else
    const uint4 v = *(const uint4 *)at;
    into[0] = v.x;
    into[1] = v.y;
    into[2] = v.z;
    into[3] = v.w;
#endif
}

// Programmatic dependent launch: the next kernel of the stream may begin; wait for all that the last one wrote. Without
// the launch attribute both do nothing.
static __device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ __forceinline__ void await_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A cluster of blocks; a launch without one is a cluster of one block. Its first block's shared memory is the one that
// all of them change.
#if __CUDA_ARCH__ >= 900
static __device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

static __device__ __forceinline__ u32 cluster_size() {
    u32 size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

static __device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

static __device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where the first block has what lies at `mine` here.
static __device__ __forceinline__ u32 first_blocks(const void *mine) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"((u32)__cvta_generic_to_shared(mine)));
    return there;
}

static __device__ __forceinline__ void or_in_first_block(u32 *mine, u32 bits) {
    asm volatile("red.relaxed.cluster.shared::cluster.or.b32 [%0], %1;" ::"r"(first_blocks(mine)), "r"(bits)
                 : "memory");
}

static __device__ __forceinline__ void put_in_first_block(u16 *mine, u16 value) {
    asm volatile("st.relaxed.cluster.shared::cluster.u16 [%0], %1;" ::"r"(first_blocks(mine)), "h"(value)
                 : "memory");
}
#elif defined(MOECORE_EMULATED)
static inline u32 cluster_rank() { return emulated_cluster_rank(); }
static inline u32 cluster_size() { return emulated_cluster_size(); }
static inline void cluster_arrive() { emulated_cluster_arrive(); }
static inline void cluster_wait() { emulated_cluster_wait(); }
static inline void or_in_first_block(u32 *mine, u32 bits) {
    emulated_swap((u32 *)emulated_cluster_map(mine, 0), [=](u32 old) { return old | bits; });
}
static inline void put_in_first_block(u16 *mine, u16 value) { *(u16 *)emulated_cluster_map(mine, 0) = value; }
#else
static __device__ __forceinline__ u32 cluster_rank() { return 0; }
static __device__ __forceinline__ u32 cluster_size() { return 1; }
static __device__ __forceinline__ void cluster_arrive() {}
static __device__ __forceinline__ void cluster_wait() { __syncthreads(); }
static __device__ __forceinline__ void or_in_first_block(u32 *mine, u32 bits) { atomicOr(mine, bits); }
static __device__ __forceinline__ void put_in_first_block(u16 *mine, u16 value) { *mine = value; }
#endif

// What the kernel before this one wrote, 16 bytes, never before await_last().
static __device__ __forceinline__ Vec16 load_written(const void *at) {
#ifdef MOECORE_EMULATED
    return emulated_load<Vec16>(at);
#else
    Vec16 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(at)
                 : "memory");
    return v;
#endif
}
