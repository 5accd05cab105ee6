// What a CUDA compiler knows by itself, for g++: the words of the language, the built-in variables, the intrinsics that
// the kernels may use. It comes before the text of the kernels and includes nothing, so that no name of a C++ header
// meets a name of theirs. The threads behind it are in emulate.cpp.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, on one thread of the machine: its shared memory is static memory. emulated.py rewrites the
// two forms that this cannot express.
#define __shared__ static

struct emulated_dim3 {
    unsigned x, y, z;
};

extern "C" {
extern emulated_dim3 threadIdx, blockIdx, blockDim, gridDim;
extern unsigned char emulated_dynamic_shared[];

float expf(float) noexcept;
float exp2f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float log1pf(float) noexcept;
float expm1f(float) noexcept;
float sqrtf(float) noexcept;
float tanhf(float) noexcept;
float erff(float) noexcept;
float fabsf(float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fmaf(float, float, float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
float copysignf(float, float) noexcept;
}

// --- Where threads wait for each other.

enum emulated_kind {
    EMULATED_SYNCTHREADS,
    EMULATED_SYNCTHREADS_OR,
    EMULATED_SYNCTHREADS_AND,
    EMULATED_SYNCTHREADS_COUNT,
    EMULATED_SYNCWARP,
    EMULATED_SHFL,
    EMULATED_SHFL_UP,
    EMULATED_SHFL_DOWN,
    EMULATED_SHFL_XOR,
    EMULATED_BALLOT,
    EMULATED_ANY,
    EMULATED_ALL,
    EMULATED_ADD,
    EMULATED_MIN,
    EMULATED_MAX,
    EMULATED_MIN_SIGNED,
    EMULATED_MAX_SIGNED,
    EMULATED_AND,
    EMULATED_OR,
    EMULATED_XOR,
    EMULATED_MATCH_ANY,
    EMULATED_MATCH_ALL,
    EMULATED_CLUSTER_WAIT,
};

extern "C" {
// Waits until all lanes of `mask` that are left are in the same place of the source; what the intrinsic gives.
unsigned long long emulated_meet(int kind, unsigned mask, unsigned long long value, unsigned lane, unsigned width,
                                 const char *file, int line);
// Another thread may run.
void emulated_pause(int certain);
// The checks of an atomic access (checks.cpp).
void emulated_atomic(const void *at, unsigned bytes, const void *pc);
// The end of the launch, with a message.
void emulated_fail(const char *message, const char *file, int line);
}

// The source line of the caller is part of every meeting: threads that wait in different places do not meet.
#define EMULATED_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(EMULATED_HERE) { emulated_meet(EMULATED_SYNCTHREADS, ~0u, 0, 0, 0, file, line); }
static inline int __syncthreads_or(int p, EMULATED_HERE) {
    return (int)emulated_meet(EMULATED_SYNCTHREADS_OR, ~0u, p != 0, 0, 0, file, line);
}
static inline int __syncthreads_and(int p, EMULATED_HERE) {
    return (int)emulated_meet(EMULATED_SYNCTHREADS_AND, ~0u, p != 0, 0, 0, file, line);
}
static inline int __syncthreads_count(int p, EMULATED_HERE) {
    return (int)emulated_meet(EMULATED_SYNCTHREADS_COUNT, ~0u, p != 0, 0, 0, file, line);
}
static inline void __syncwarp(unsigned mask = ~0u, EMULATED_HERE) {
    emulated_meet(EMULATED_SYNCWARP, mask, 0, 0, 0, file, line);
}

template <class T> static inline unsigned long long emulated_bits(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes pass between lanes");
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T> static inline T emulated_value(unsigned long long bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}

#define EMULATED_SHUFFLE(name, kind)                                                                                   \
    template <class T>                                                                                                 \
    static inline T name(unsigned mask, T value, unsigned lane, unsigned width = 32, EMULATED_HERE) {                  \
        return emulated_value<T>(emulated_meet(kind, mask, emulated_bits(value), lane, width, file, line));            \
    }
EMULATED_SHUFFLE(__shfl_sync, EMULATED_SHFL)
EMULATED_SHUFFLE(__shfl_up_sync, EMULATED_SHFL_UP)
EMULATED_SHUFFLE(__shfl_down_sync, EMULATED_SHFL_DOWN)
EMULATED_SHUFFLE(__shfl_xor_sync, EMULATED_SHFL_XOR)

static inline unsigned __ballot_sync(unsigned mask, int p, EMULATED_HERE) {
    return (unsigned)emulated_meet(EMULATED_BALLOT, mask, p != 0, 0, 0, file, line);
}
static inline int __any_sync(unsigned mask, int p, EMULATED_HERE) {
    return (int)emulated_meet(EMULATED_ANY, mask, p != 0, 0, 0, file, line);
}
static inline int __all_sync(unsigned mask, int p, EMULATED_HERE) {
    return (int)emulated_meet(EMULATED_ALL, mask, p != 0, 0, 0, file, line);
}

#define EMULATED_REDUCE(name, type, kind)                                                                              \
    static inline type name(unsigned mask, type value, EMULATED_HERE) {                                                \
        return (type)emulated_meet(kind, mask, (unsigned)value, 0, 0, file, line);                                     \
    }
EMULATED_REDUCE(__reduce_add_sync, unsigned, EMULATED_ADD)
EMULATED_REDUCE(__reduce_min_sync, unsigned, EMULATED_MIN)
EMULATED_REDUCE(__reduce_max_sync, unsigned, EMULATED_MAX)
EMULATED_REDUCE(__reduce_and_sync, unsigned, EMULATED_AND)
EMULATED_REDUCE(__reduce_or_sync, unsigned, EMULATED_OR)
EMULATED_REDUCE(__reduce_xor_sync, unsigned, EMULATED_XOR)
EMULATED_REDUCE(__reduce_add_sync, int, EMULATED_ADD)
EMULATED_REDUCE(__reduce_min_sync, int, EMULATED_MIN_SIGNED)
EMULATED_REDUCE(__reduce_max_sync, int, EMULATED_MAX_SIGNED)

template <class T> static inline unsigned __match_any_sync(unsigned mask, T value, EMULATED_HERE) {
    return (unsigned)emulated_meet(EMULATED_MATCH_ANY, mask, emulated_bits(value), 0, 0, file, line);
}
template <class T> static inline unsigned __match_all_sync(unsigned mask, T value, int *all, EMULATED_HERE) {
    const unsigned same = (unsigned)emulated_meet(EMULATED_MATCH_ALL, mask, emulated_bits(value), 0, 0, file, line);
    *all = same != 0;
    return same;
}

// Clusters have no words in CUDA C++: these are for the second bodies of what is PTX. What `map` gives is good until the
// thread waits for the next time.
extern "C" {
unsigned emulated_cluster_rank();
unsigned emulated_cluster_size();
void *emulated_cluster_map(const void *mine, unsigned rank, EMULATED_HERE);
void emulated_cluster_arrive(EMULATED_HERE);
void emulated_cluster_wait(EMULATED_HERE);
}

static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
static inline void __nanosleep(unsigned) { emulated_pause(1); }
static inline void __trap(EMULATED_HERE) { emulated_fail("__trap()", file, line); }

// --- Memory. Threads change places only where they wait, so a plain access is atomic; before it another may run.

#define EMULATED_ATOMIC(name, change)                                                                                  \
    template <class T, class V> static inline T name(T *at, V given) {                                                 \
        emulated_pause(0);                                                                                             \
        const T value = (T)given;                                                                                      \
        const T old = emulated_swap(at, [=](T old) -> T { return change; });                                           \
        return old;                                                                                                    \
    }
// Its own function, without checks of its accesses: atomic ones are no race with each other.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) static T emulated_swap(T *at, F change) {
#ifdef MOECORE_EMULATED_CHECKED
    emulated_atomic(at, sizeof(T), __builtin_return_address(0));
#endif
    const T old = *at;
    *at = change(old);
    return old;
}
EMULATED_ATOMIC(atomicAdd, (T)(old + value))
EMULATED_ATOMIC(atomicSub, (T)(old - value))
EMULATED_ATOMIC(atomicOr, (T)(old | value))
EMULATED_ATOMIC(atomicAnd, (T)(old &value))
EMULATED_ATOMIC(atomicXor, (T)(old ^ value))
EMULATED_ATOMIC(atomicMax, old > value ? old : value)
EMULATED_ATOMIC(atomicMin, old < value ? old : value)
EMULATED_ATOMIC(atomicExch, value)
EMULATED_ATOMIC(atomicAdd_block, (T)(old + value))
EMULATED_ATOMIC(atomicOr_block, (T)(old | value))
template <class T> static inline T atomicCAS(T *at, T compare, T value) {
    emulated_pause(0);
    return emulated_swap(at, [=](T old) -> T { return old == compare ? value : old; });
}

// Accesses of many bytes at once, which a GPU refuses at other addresses.
template <class T> static inline T emulated_load(const void *at, EMULATED_HERE) {
    if ((unsigned long long)at % alignof(T) != 0)
        emulated_fail("a load from an address that is not aligned", file, line);
    return *(const T *)at;
}
template <class T> static inline void emulated_store(void *at, const T &value, EMULATED_HERE) {
    if ((unsigned long long)at % alignof(T) != 0)
        emulated_fail("a store to an address that is not aligned", file, line);
    *(T *)at = value;
}

template <class T> static inline T __ldg(const T *at) { return *at; }
template <class T> static inline T __ldca(const T *at) { return *at; }
template <class T> static inline T __ldcg(const T *at) { return *at; }
template <class T> static inline T __ldcs(const T *at) { return *at; }
template <class T> static inline T __ldcv(const T *at) { return *at; }
template <class T, class V> static inline void __stcg(T *at, V value) { *at = (T)value; }
template <class T, class V> static inline void __stcs(T *at, V value) { *at = (T)value; }
template <class T, class V> static inline void __stwt(T *at, V value) { *at = (T)value; }

// --- Numbers.

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; ++i)
        y |= (x >> i & 1u) << (31 - i);
    return y;
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned selector = s >> (4 * i);
        unsigned byte = (unsigned)(bytes >> (selector & 7u) * 8) & 0xffu;
        if (selector & 8u)
            byte = byte & 0x80u ? 0xffu : 0u;
        out |= byte << (8 * i);
    }
    return out;
}
static inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((unsigned long long)x * y >> 32); }
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return (unsigned)((((unsigned long long)high << 32 | low) << (by & 31u)) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (by & 31u));
}

static inline unsigned __float_as_uint(float x) { return (unsigned)emulated_bits(x); }
static inline int __float_as_int(float x) { return (int)emulated_bits(x); }
static inline float __uint_as_float(unsigned x) { return emulated_value<float>(x); }
static inline float __int_as_float(int x) { return emulated_value<float>((unsigned)x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __expf(float x) { return expf(x); }
static inline float __logf(float x) { return logf(x); }
static inline float __log2f(float x) { return log2f(x); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline unsigned __float2uint_rn(float x) { return x > 0.0f ? (unsigned)rintf(x) : 0u; }
static inline bool isnan(float x) { return __builtin_isnan(x); }
static inline bool isinf(float x) { return __builtin_isinf(x); }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }

#define EMULATED_MIN_MAX(type, a, b)                                                                                   \
    static inline type min(a x, b y) { return (type)x < (type)y ? (type)x : (type)y; }                                 \
    static inline type max(a x, b y) { return (type)x > (type)y ? (type)x : (type)y; }
EMULATED_MIN_MAX(int, int, int)
EMULATED_MIN_MAX(unsigned, unsigned, unsigned)
EMULATED_MIN_MAX(unsigned, int, unsigned)
EMULATED_MIN_MAX(unsigned, unsigned, int)
EMULATED_MIN_MAX(long long, long long, long long)
EMULATED_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
EMULATED_MIN_MAX(unsigned long long, unsigned long long, unsigned)
EMULATED_MIN_MAX(unsigned long long, unsigned, unsigned long long)
static inline float min(float x, float y) { return fminf(x, y); }
static inline float max(float x, float y) { return fmaxf(x, y); }

#define EMULATED_VECTOR(type, of, align)                                                                               \
    struct alignas(2 * align) type##2 { of x, y; };                                                                    \
    struct alignas(4 * align) type##4 { of x, y, z, w; };                                                              \
    static inline type##2 make_##type##2(of x, of y) { return {x, y}; }                                                \
    static inline type##4 make_##type##4(of x, of y, of z, of w) { return {x, y, z, w}; }
EMULATED_VECTOR(int, int, 4)
EMULATED_VECTOR(uint, unsigned, 4)
EMULATED_VECTOR(float, float, 4)
EMULATED_VECTOR(ushort, unsigned short, 2)
EMULATED_VECTOR(uchar, unsigned char, 1)

// --- Conversions, as the PTX instructions make them: to nearest, ties to even. A NaN has one form.

// cvt.rn.bf16.f32
static inline unsigned short emulated_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x)
        return 0x7fffu;
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// A float with a short significand: `mantissa` bits, exponents from `lowest` (of normal numbers) up. The value as a
// count of its last places, so that counting on from the largest of one binade gives the first of the next.
static inline unsigned emulated_round(float x, int mantissa, int lowest) {
    const unsigned bits = __float_as_uint(x) & 0x7fffffffu;
    int exponent = (int)(bits >> 23) - 127;
    if (bits < 0x00800000u)
        return 0;  // a denormal float is far below half of the last place
    const unsigned long long significand = (bits & 0x7fffffu) | 0x800000u;
    const int below = exponent < lowest ? lowest - exponent : 0;
    const int shift = 23 - mantissa + below;
    if (shift > 25)
        return 0;
    const unsigned long long half = 1ull << (shift - 1);
    const unsigned long long kept = significand >> shift, rest = significand & ((1ull << shift) - 1);
    const unsigned long long rounded = kept + (rest > half || (rest == half && (kept & 1)));
    if (below)
        return (unsigned)rounded;
    return (unsigned)(rounded + ((unsigned long long)(exponent - lowest) << mantissa));
}

// cvt.rn.f16.f32
static inline unsigned short emulated_f16(float x) {
    const unsigned sign = __float_as_uint(x) >> 16 & 0x8000u;
    if (x != x)
        return 0x7fffu;
    const unsigned places = emulated_round(x, 10, -14);
    return (unsigned short)(sign | (__builtin_isinf(x) || places > 0x7c00u ? 0x7c00u : places));
}

// cvt.f32.f16
static inline float emulated_f16_value(unsigned short h) {
    const unsigned sign = (unsigned)(h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 0x3ffu;
    if (exponent == 31)
        return __uint_as_float(mantissa ? 0x7fffffffu : sign | 0x7f800000u);
    if (exponent == 0)
        return __uint_as_float(sign | __float_as_uint((float)mantissa * 0x1p-24f));
    return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13);
}

// cvt.rn.satfinite.e4m3x2.f32: one of the two.
static inline unsigned char emulated_e4m3(float x) {
    const unsigned sign = __float_as_uint(x) >> 24 & 0x80u;
    if (x != x)
        return 0x7fu;
    const unsigned places = emulated_round(x, 3, -6);
    return (unsigned char)(sign | (__builtin_isinf(x) || places > 0x7eu ? 0x7eu : places));
}
// The instruction's operands: the first becomes the upper byte.
static inline unsigned short emulated_e4m3x2(float upper, float lower) {
    return (unsigned short)(emulated_e4m3(upper) << 8 | emulated_e4m3(lower));
}
