// One row of logits to its k best experts and their weights, by one warp, whatever is asked for. Rows of most models
// take the shorter way of gate_fast.cuh.
//
// Each lane owns 8 neighbouring experts of each 256, sorts their words, and the warp takes the best of all lanes' first
// words k times: one reduction a choice, no ballot, and only the winner's list moves up.
//
// Words give up the lowest bits of what is ranked. Where those count (float32 logits, scores), the choice is verified:
// neighbouring choices against their exact values, the last one against the first that was left out. Rows that fail, a
// few in a thousand, are chosen again by comparing all values.
#pragma once
#include "exact.cuh"
#include "weights.cuh"

// Words of the experts from `first` on, sorted.
template <u32 N>
static __device__ __forceinline__ void words_of(const Row &row, u32 first, const float (&x)[N], u32 (&words)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; ++i)
        words[i] = (order_key(x[i]) & ~row.low_bits) | (row.low_bits - first - i);
    if (row.group == N) {  // as choose_lanes made it: a bit for each lane
        if (!(row.kept >> threadIdx.x % LANES & 1))
#pragma unroll
            for (u32 i = 0; i < N; ++i)
                words[i] = 0;
    } else if (row.group) {
        u32 group = first / row.group;
        u32 left = (group + 1) * row.group - first;  // experts of the group, from here on
#pragma unroll
        for (u32 i = 0; i < N; ++i) {
            if (group >= LANES || !(row.kept >> group & 1))
                words[i] = 0;
            if (--left == 0) {
                left = row.group;
                ++group;
            }
        }
    }
    sort_words(words);
}

// The best k words of all lanes, number j to lane j. `list` is each lane's, sorted; its first word is then the best
// that is left.
template <u32 N> static __device__ __forceinline__ u32 take_best(u32 k, u32 (&list)[N]) {
    const u32 lane = threadIdx.x % LANES;
    u32 mine = 0;
    if (k <= 8) {
#pragma unroll
        for (u32 round = 0; round < 8; ++round) {
            if (round >= k)
                break;
            const u32 best = __reduce_max_sync(FULL_WARP, list[0]);
            if (list[0] == best)  // words that can no longer be reached stay where they are
#pragma unroll
                for (u32 i = 0; i < N && i < 8 - round; ++i)
                    list[i] = i + 1 < N ? list[i + 1] : 0;
            if (lane == round)
                mine = best;
        }
    } else {
#pragma unroll 1
        for (u32 round = 0; round < k; ++round) {
            const u32 best = __reduce_max_sync(FULL_WARP, list[0]);
            if (list[0] == best)
#pragma unroll
                for (u32 i = 0; i < N; ++i)
                    list[i] = i + 1 < N ? list[i + 1] : 0;
            if (lane == round)
                mine = best;
        }
    }
    return mine;
}

// --- The row.

// The factor keeps sums of finite numbers finite, so that only a NaN, or infinities of both signs, give a NaN.
template <u32 N> static __device__ __forceinline__ float trace_of(float trace, const float (&x)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; ++i)
        trace = __fmaf_rn(x[i], 0x1p-20f, trace);
    return trace;
}

// Lane j < k gets choice j of `token` and its weight. Called by a whole warp.
template <class T>
static __device__ __forceinline__ void gate_any_row(const GateArgs &a, u32 token, u32 &id, float &weight) {
    constexpr u32 N = 8;
    const u32 lane = threadIdx.x % LANES;
    const u32 chunks = chunks_of<N>(a);
    const bool wide = loads_wide<T, N>(a);
    const bool softmax = a.scoring == SCORE_SOFTMAX;
    Row row;
    row.at = (const u8 *)a.logits + token * a.stride * T::bytes;
    row.low_bits = chunks == 1 ? CHUNK - 1 : GATE_MAX_EXPERTS - 1;
    row.by_score = a.scoring != SCORE_SOFTMAX_TOPK && (a.bias || (a.groups > 1 && a.flags & GATE_GROUP_TOP2));
    row.group = 0;
    row.kept = 0;
    row.top = 0.0f;
    row.inverse = 1.0f;
    // With renormalisation only the choices' exponentials are needed.
    const bool whole = softmax && (row.by_score || !(a.flags & GATE_RENORMALIZE) || a.eps != 0.0f);
    if (whole)
        prepare_softmax<T, N>(a, row, wide);

    u32 list[N];
    bool more = false;  // this lane has more words than its list
    float trace = 0.0f;
#pragma unroll 1
    for (u32 chunk = 0; chunk < chunks; ++chunk) {
        const u32 first = chunk * CHUNK + lane * N;
        float x[N];
        load_logits<T, N>(a, row, first, wide, x);
        trace = trace_of(trace, x);
        rank_values(a, row, first, x);
        if (a.groups > 1 && chunk == 0) {
            row.group = a.experts / a.groups;
            const u32 unit = row.group / N;
            if (chunks == 1 && row.group % N == 0 && (unit & (unit - 1)) == 0)
                choose_lanes<N>(a, row, x);
            else
                choose_groups<T>(a, row);
        }
        u32 words[N];
        words_of<N>(row, first, x, words);
        if (chunk > 0) {
            merge_words(list, words);
            more = list[N - 1] != 0;
        } else {
#pragma unroll
            for (u32 i = 0; i < N; ++i)
                list[i] = words[i];
        }
    }
    const u32 mine = take_best<N>(a.k, list);
    id = row.low_bits - (mine & row.low_bits);

    // Padding ranks between -inf and NaN, so it may be chosen; an empty list may hide a choice.
    const bool chooses = lane < a.k;
    const bool found = chooses && id < a.experts;
    bool wrong = chooses != found || (more && list[0] == 0);
    float logit = found ? T::get(row.at, id) : 0.0f;
    // Numbers of 16 bits that are ranked as they are have exact words.
    if (T::bytes != 2 || row.by_score || a.bias) {
        const u32 key = found ? key_of<T>(a, row, id) : 0;
        wrong |= key < __shfl_down_sync(FULL_WARP, key, 1) && lane + 1 < a.k;
        const u32 next = __reduce_max_sync(FULL_WARP, list[0]);
        wrong |= lane == a.k - 1 && (mine & ~row.low_bits) == (next & ~row.low_bits);
    }
    if (__any_sync(FULL_WARP, wrong)) {
        choose_again<T, N>(a, row, wide, id);
        logit = chooses ? T::get(row.at, id) : 0.0f;
    }
    if (softmax && !whole) {
        row.top = __shfl_sync(FULL_WARP, logit, 0);
        if (__any_sync(FULL_WARP, trace != trace))
            row.inverse = __uint_as_float(0x7fffffffu);
    }
    weight = weigh(a, logit, score_of(a.scoring, row.top, row.inverse, logit));
}

