// The gate for the rows of most models: up to 512 experts, aligned, no more than 31 choices, and either ranked by
// their logits or by sigmoid or sqrt-softplus scores with a bias, groups, or both. What the host knows is not asked again:
// it says which way (`rule` in rust/moecore-cuda/src/routing/rule.rs).
//
// Instructions on 32-bit integers are what a full GPU runs out of first, at half the rate of float32 ones. So words are
// signed, which takes two instructions rather than four, an expert's number comes into its word by one byte permute, and
// 16-bit logits stay in pairs until then. A NaN is larger than all other words, and sends its row to the exact choice.
#pragma once
#include "exact.cuh"
#include "weights.cuh"

// The smallest word of a NaN; nothing else is as large.
#define NAN_WORD 0x7fff0000
#define NO_WORD ((i32)0x80000000)

// How a warp owns a row: vectors of AT_ONCE numbers. Ranked by scores a lane's are neighbours, so that groups are whole
// lanes; else, and above 256 experts, 32 lanes' are.
template <class T, u32 N, bool SCORES> struct Owned {
    static const u32 at_once = N * T::bytes < 16 ? N : 16 / T::bytes;
    static const u32 vectors = N / at_once;
    static const u32 low_bits = N > 8 ? 511 : 255;  // of a word: the expert, from behind
    static const u32 kept = N < 8 ? N : 8;          // words of a lane that can be reached
    static const bool exact = T::bytes == 2 && !SCORES;  // words give up nothing
    static __device__ __forceinline__ u32 first(u32 vector) {
        const u32 lane = threadIdx.x % LANES;
        return SCORES && N <= 8 ? lane * N + vector * at_once : (vector * LANES + lane) * at_once;
    }
};

// Bits of a float as a signed number of the same order, and back.
static __device__ __forceinline__ u32 signed_order(u32 bits) { return bits ^ ((u32)((i32)bits >> 31) & 0x7fffffffu); }

// Words of neighbouring numbers from expert `first` on.
template <u32 LOW, u32 N>
static __device__ __forceinline__ void float_words(const float *x, u32 first, i32 *words) {
    const u32 codes = (LOW - first) * 0x01010101u - 0x03020100u;  // LOW of 255: the bytes of four experts
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        const u32 bits = signed_order(plain_bits(x[i]));
        if (LOW == 255)
            words[i] = (i32)__byte_perm(bits, i < 4 ? codes : codes - 0x04040404u, 0x3214 + i % 4);
        else
            words[i] = (i32)(((bits & ~LOW) | (LOW - first)) - i);
    }
}

// The same of pairs of 16-bit numbers, which are a word's upper half whole.
template <class T, u32 LOW, u32 PAIRS>
static __device__ __forceinline__ void pair_words(const u32 (&pairs)[PAIRS], u32 first, i32 *words) {
    const u32 codes = (LOW - first) * 0x00010001u - 0x00010000u;
#pragma unroll
    for (u32 i = 0; i < PAIRS; ++i) {
        const u32 plain = Logits<T>::plain(pairs[i]);
        const u32 bits = plain ^ (signs_of_pair(plain) & 0x7fff7fffu);
        words[2 * i] = (i32)__byte_perm(bits, codes - i * 0x00020002u, 0x1054);
        words[2 * i + 1] = (i32)__byte_perm(bits, codes - i * 0x00020002u, 0x3276);
    }
}

// What a lane's numbers rank by, from logits: scores and bias. Past the last expert a bias of -inf says so.
template <u32 N> static __device__ __forceinline__ void score_values(const GateArgs &a, u32 first, float *x) {
    constexpr u32 AT_ONCE = N < 4 ? N : 4;
    u32 bias[N / AT_ONCE][AT_ONCE];
#pragma unroll
    for (u32 v = 0; v < N / AT_ONCE; ++v) {
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i)
            bias[v][i] = first < a.experts ? 0 : 0xff800000u;
        if (first < a.experts && a.bias)
            load_words(a.bias + first + v * AT_ONCE, bias[v]);
    }
    if (a.scoring == SCORE_SIGMOID)
#pragma unroll
        for (u32 i = 0; i < N; ++i)
            x[i] = sigmoid(x[i]);
    else
#pragma unroll
        for (u32 i = 0; i < N; ++i)
            x[i] = sqrt_softplus(x[i]);
#pragma unroll
    for (u32 i = 0; i < N; ++i)
        x[i] = __fadd_rn(x[i], __uint_as_float(bias[i / AT_ONCE][i % AT_ONCE]));
}

// Whether this lane's experts are of a group that may be chosen from. A group is a power of two of lanes. With a
// NaN the row is chosen again (`unsure`).
template <u32 N>
static __device__ __forceinline__ bool lane_stays(const GateArgs &a, const float (&x)[N], bool &unsure) {
    const u32 lane = threadIdx.x % LANES;
    const u32 unit = a.experts / a.groups / N;
    float first = x[0];
    float second = __uint_as_float(0xff800000u);
#pragma unroll
    for (u32 i = 1; i < N; ++i) {
        second = fmaxf(second, fminf(first, x[i]));
        first = fmaxf(first, x[i]);
    }
#pragma unroll 1
    for (u32 distance = 1; distance < unit; distance *= 2) {
        const float other = __shfl_xor_sync(FULL_WARP, first, distance);
        second = fmaxf(fminf(first, other), fmaxf(second, __shfl_xor_sync(FULL_WARP, second, distance)));
        first = fmaxf(first, other);
    }
    const float score = a.flags & GATE_GROUP_TOP2 ? __fadd_rn(first, second) : first;
    unsure |= score != score;
    // Each lane of a group compares it with some of the others.
    const u32 group = lane / unit;
    u32 better = 0;
#pragma unroll 1
    for (u32 base = 0; base < a.groups; base += unit) {
        const u32 g = base + lane % unit;
        const float other = __shfl_sync(FULL_WARP, score, g * unit);
        better += g < a.groups && (other > score || (other == score && g < group));
    }
#pragma unroll 1
    for (u32 distance = 1; distance < unit; distance *= 2)
        better += __shfl_xor_sync(FULL_WARP, better, distance);
    return group < a.groups && better < a.top_groups;
}

// Number `lane` of eight numbers that all lanes have.
static __device__ __forceinline__ i32 own_of(const i32 *all) {
    const u32 lane = threadIdx.x % LANES;
    const i32 a = lane & 1 ? all[1] : all[0];
    const i32 b = lane & 1 ? all[3] : all[2];
    const i32 c = lane & 1 ? all[5] : all[4];
    const i32 d = lane & 1 ? all[7] : all[6];
    const i32 ab = lane & 2 ? b : a;
    const i32 cd = lane & 2 ? d : c;
    return lane & 4 ? cd : ab;
}

// The best words of all lanes, number j to lane j; with NEXT also the best that is left out, to lane k. `list` is each
// lane's, sorted, its first word then the best that is left.
template <u32 N, bool NEXT> static __device__ __forceinline__ i32 take_words(u32 k, i32 (&list)[N]) {
    const u32 lane = threadIdx.x % LANES;
    if (k == 8) {
        constexpr u32 ROUNDS = NEXT ? 9 : 8;
        i32 best[ROUNDS];
#pragma unroll
        for (u32 round = 0; round < ROUNDS; ++round) {
            best[round] = __reduce_max_sync(FULL_WARP, list[0]);
            if (list[0] == best[round])  // words that can no longer be reached stay where they are
#pragma unroll
                for (u32 i = 0; i < N && i + 1 < ROUNDS - round; ++i)
                    list[i] = i + 1 < N ? list[i + 1] : NO_WORD;
        }
        const i32 mine = own_of(best);
        return NEXT && lane == 8 ? best[ROUNDS - 1] : mine;
    }
    i32 mine = 0;
#pragma unroll 1
    for (u32 round = 0; round < k + NEXT; ++round) {
        const i32 best = __reduce_max_sync(FULL_WARP, list[0]);
        if (lane == round)
            mine = best;
        if (list[0] == best)
#pragma unroll
            for (u32 i = 0; i < N; ++i)
                list[i] = i + 1 < N ? list[i + 1] : NO_WORD;
    }
    return mine;
}

// The key of what an expert ranks by, from memory.
template <class T, bool SCORES>
static __device__ __forceinline__ u32 ranked_key(const GateArgs &a, const Row &row, u32 expert) {
    float value = T::get(row.at, expert);
    if (SCORES) {
        value = a.scoring == SCORE_SIGMOID ? sigmoid(value) : sqrt_softplus(value);
        value = a.bias ? __fadd_rn(value, a.bias[expert]) : value;
    }
    return order_key(value);
}

// Choices are the right ones, but those whose words begin alike stand by expert: by value, now. Lane j < k has choice j.
static __device__ __forceinline__ u32 in_order(u32 k, u32 id, u32 key) {
    const u32 lane = threadIdx.x % LANES;
    bool moved = true;
    while (__any_sync(FULL_WARP, moved)) {
        moved = false;
#pragma unroll 1
        for (u32 odd = 0; odd < 2; ++odd) {
            const u32 partner = ((lane + odd) ^ 1) - odd;
            const u32 other = __shfl_sync(FULL_WARP, key, partner);
            const u32 other_id = __shfl_sync(FULL_WARP, id, partner);
            const bool better = other > key || (other == key && other_id < id);
            if (lane < k && partner < k && better == (lane < partner)) {
                moved = true;
                key = other;
                id = other_id;
            }
        }
    }
    return id;
}

// 1 / the sum of e^(logit - top) of a row.
template <class T, u32 N>
static __device__ __forceinline__ float inverse_of_powers(const GateArgs &a, const Row &row, float top) {
    float x[N];
    load_logits<T, N>(a, row, threadIdx.x % LANES * N, true, x);
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < N; ++i)
        sum = __fadd_rn(sum, expf(__fadd_rn(x[i], -top)));
    return __fdiv_rn(1.0f, sum_of_lanes<LANES>(sum));
}

// What a softmax over a row makes of its weights: NaN if there is one, else 1.
template <class T, u32 N> static __device__ __forceinline__ float all_numbers(const GateArgs &a, const Row &row) {
    float x[N];
    load_logits<T, N>(a, row, threadIdx.x % LANES * N, true, x);
    bool missing = false;
#pragma unroll
    for (u32 i = 0; i < N; ++i)
        missing |= x[i] != x[i];
    return __any_sync(FULL_WARP, missing) ? __uint_as_float(0x7fffffffu) : 1.0f;
}

// A lane's logits of a row as they lie in memory.
template <class T, u32 N, bool SCORES> struct RawRow {
    u32 words[Owned<T, N, SCORES>::vectors][Owned<T, N, SCORES>::at_once * T::bytes / 4];
};

static __device__ __forceinline__ const void *row_at(const GateArgs &a, u32 token, u32 bytes) {
    return (const u8 *)a.logits + token * a.stride * bytes;
}

// `there`: false if there is no such row; then this is one of -inf.
template <class T, u32 N, bool SCORES>
static __device__ __forceinline__ RawRow<T, N, SCORES> load_row(const GateArgs &a, u32 token, bool there) {
    typedef Owned<T, N, SCORES> Mine;
    RawRow<T, N, SCORES> raw;
    const u8 *at = (const u8 *)row_at(a, token, T::bytes);
#pragma unroll
    for (u32 v = 0; v < Mine::vectors; ++v) {
#pragma unroll
        for (u32 i = 0; i < Mine::at_once * T::bytes / 4; ++i)
            raw.words[v][i] = Logits<T>::minus_infinity;
        if (there && Mine::first(v) < a.experts)
            load_words(at + Mine::first(v) * T::bytes, raw.words[v]);
    }
    return raw;
}

// The same as words of their order; and whether they may be chosen, by their group.
template <class T, u32 N, bool SCORES>
static __device__ __forceinline__ void owned_words(const GateArgs &a, const RawRow<T, N, SCORES> &raw, i32 (&words)[N],
                                                   bool &stays, bool &unsure) {
    typedef Owned<T, N, SCORES> Mine;
    if constexpr (Mine::exact) {
#pragma unroll
        for (u32 v = 0; v < Mine::vectors; ++v)
            pair_words<T, Mine::low_bits>(raw.words[v], Mine::first(v), words + v * Mine::at_once);
    } else {
        float x[N];
#pragma unroll
        for (u32 v = 0; v < Mine::vectors; ++v) {
            float *some = x + v * Mine::at_once;
#pragma unroll
            for (u32 i = 0; i < Mine::at_once; ++i)
                some[i] = Logits<T>::get(raw.words[v], i);
            if (SCORES)
                score_values<Mine::at_once>(a, Mine::first(v), some);
            float_words<Mine::low_bits, Mine::at_once>(some, Mine::first(v), words + v * Mine::at_once);
        }
        if constexpr (SCORES && N <= 8)
            if (a.groups > 1)
                stays = lane_stays<N>(a, x, unsure);
    }
}

// The choices of a row whose last word begins as the first that is left out does: what begins so is found again, follows
// the choices that are above it, and all of them stand by value. False: there are more than a warp has lanes.
template <class T, u32 N, bool SCORES>
static __device__ __forceinline__ bool choose_among_alike(const GateArgs &a, const Row &row, u32 token, i32 mine,
                                                          u32 &id) {
    typedef Owned<T, N, SCORES> Mine;
    const u32 lane = threadIdx.x % LANES;
    const i32 alike = __shfl_sync(FULL_WARP, mine, a.k - 1) | (i32)Mine::low_bits;
    u32 count = __popc(__ballot_sync(FULL_WARP, lane < a.k && mine > alike));
    i32 words[N];
    bool stays = true;
    bool unsure = false;
    owned_words<T, N, SCORES>(a, load_row<T, N, SCORES>(a, token, true), words, stays, unsure);
    i32 best = NO_WORD;
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        words[i] = stays && (words[i] | (i32)Mine::low_bits) == alike ? words[i] : NO_WORD;
        best = max(best, words[i]);
    }
#pragma unroll 1
    for (;;) {
        const i32 next = __reduce_max_sync(FULL_WARP, best);
        if (next == NO_WORD)
            break;
        if (count == LANES)
            return false;
        if (lane == count)
            mine = next;
        ++count;
        best = NO_WORD;
#pragma unroll
        for (u32 i = 0; i < N; ++i) {
            words[i] = words[i] == next ? NO_WORD : words[i];
            best = max(best, words[i]);
        }
    }
    id = Mine::low_bits - ((u32)mine & Mine::low_bits);
    if (__any_sync(FULL_WARP, lane < count && id >= a.experts))  // as good as nothing: rows of -inf
        return false;
    id = in_order(count, id, ranked_key<T, SCORES>(a, row, min(id, a.experts - 1)));
    return true;
}

// Lane j < k gets choice j of `token`, whose logits are `raw`, and its weight. Called by a whole warp; a.experts are
// N * LANES at most.
template <class T, u32 N, bool SCORES>
static __device__ __forceinline__ void gate_fast_row(const GateArgs &a, u32 token, const RawRow<T, N, SCORES> &raw,
                                                     u32 &id, float &weight) {
    typedef Owned<T, N, SCORES> Mine;
    const u32 lane = threadIdx.x % LANES;
    Row row;
    row.at = row_at(a, token, T::bytes);
    row.by_score = SCORES;
    row.group = 0;
    bool stays = true;
    bool unsure = false;
    i32 list[Mine::kept];
    if constexpr (N <= 8) {
        owned_words<T, N, SCORES>(a, raw, list, stays, unsure);
        sort_words(list);
    } else {
        i32 words[N];
        i32 upper[8];
        owned_words<T, N, SCORES>(a, raw, words, stays, unsure);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            list[i] = words[i];
            upper[i] = words[8 + i];
        }
        sort_words(list);
        sort_words(upper);
        merge_words(list, upper);
    }
    unsure |= list[0] >= NAN_WORD;
    if (SCORES && !stays)
        list[0] = NO_WORD;
    const i32 mine = take_words<Mine::kept, !Mine::exact>(a.k, list);
    if (N > 8)
        unsure |= list[0] == NO_WORD;  // there may be more than it had room for
    const bool chooses = lane < a.k;
    id = Mine::low_bits - ((u32)mine & Mine::low_bits);
    float logit;
    bool tied = false;
    if constexpr (Mine::exact) {
        logit = Logits<T>::upper(signed_order((u32)mine));
    } else {
        logit = T::get(row.at, min(id, a.experts - 1));  // the row is there in any case
        const u32 alike = (u32)(mine ^ __shfl_down_sync(FULL_WARP, mine, 1));
        tied = chooses && alike <= Mine::low_bits;
    }
    const bool any_unsure = __any_sync(FULL_WARP, unsure);
    if (any_unsure || (!Mine::exact && __any_sync(FULL_WARP, tied))) {
        bool chosen = false;
        if constexpr (!Mine::exact) {
            if (!any_unsure && !__any_sync(FULL_WARP, tied && lane == a.k - 1)) {
                id = in_order(a.k, id, ranked_key<T, SCORES>(a, row, min(id, a.experts - 1)));
                chosen = true;
            } else if (!any_unsure) {
                chosen = choose_among_alike<T, N, SCORES>(a, row, token, mine, id);
            }
        }
        if (!chosen) {
            if (a.groups > 1) {
                row.group = a.experts / a.groups;
                choose_groups<T>(a, row);
            }
            choose_again<T, N>(a, row, true, id);
        }
        logit = T::get(row.at, min(id, a.experts - 1));
    }

    const bool softmax = !SCORES && a.scoring == SCORE_SOFTMAX;
    const bool renormalizes = a.flags & GATE_RENORMALIZE;
    const bool by_choices = softmax ? renormalizes : a.scoring == SCORE_SOFTMAX_TOPK;
    if (!SCORES && by_choices && (!renormalizes || a.eps == 0.0f)) {
        weight = weigh_choices(a, logit, chooses);
        if (softmax && any_unsure)  // the softmax over all experts is what it stands for
            weight = __fmul_rn(weight, all_numbers<T, N>(a, row));
        return;
    }
    row.top = 0.0f;
    row.inverse = 1.0f;
    if (softmax) {
        row.top = __shfl_sync(FULL_WARP, logit, 0);
        row.inverse = inverse_of_powers<T, N>(a, row, row.top);
    }
    weight = weigh(a, logit, score_of(a.scoring, row.top, row.inverse, logit));
}
