// One row of logits to its k best experts and their weights, by one warp. Each lane owns N neighbouring experts (of
// each CHUNK), sorts their words, and the warp takes the best of all lanes' first words k times: one reduction a
// choice, no ballot, and only the winner's list moves up.
//
// Words give up the lowest bits of what is ranked. Where those count (float32 logits, scores), the choice is verified:
// neighbouring choices against their exact values, the last one against the first that was left out. Rows that fail, a
// few in a thousand, are chosen again by comparing all values.
#pragma once
#include "scores.cuh"

// --- Groups.

// The two largest of two pairs, the larger first.
static __device__ __forceinline__ void join_pairs(u32 &first, u32 &second, u32 other_first, u32 other_second) {
    second = max(min(first, other_first), max(second, other_second));
    first = max(first, other_first);
}

// Lane `lane` has the score of its group, which all lanes with (lane / unit) have: whether it is one of the best.
static __device__ __forceinline__ bool group_stays(const GateArgs &a, u32 score, u32 group, u32 unit) {
    u32 better = 0;
#pragma unroll 1
    for (u32 g = 0; g < a.groups; ++g) {
        const u32 other = __shfl_sync(FULL_WARP, score, g * unit);
        better += other > score || (other == score && g < group);
    }
    return group < a.groups && better < a.top_groups;
}

// A group's score from the keys of its two best.
static __device__ __forceinline__ u32 group_score(const GateArgs &a, u32 first, u32 second) {
    if (!(a.flags & GATE_GROUP_TOP2) || a.experts == a.groups)
        return first;
    return order_key(__fadd_rn(key_value(first), key_value(second)));
}

// Groups of whole lanes, a power of two of them: `x` is what this lane's experts rank by.
template <u32 N> static __device__ __forceinline__ void choose_lanes(const GateArgs &a, Row &row, const float (&x)[N]) {
    const u32 lane = threadIdx.x % LANES;
    const u32 unit = row.group / N;
    u32 first = order_key(x[0]);
    u32 second = 0;
#pragma unroll
    for (u32 i = 1; i < N; ++i)
        join_pairs(first, second, order_key(x[i]), 0);
#pragma unroll 1
    for (u32 distance = 1; distance < unit; distance *= 2) {
        const u32 other = __shfl_xor_sync(FULL_WARP, first, distance);
        join_pairs(first, second, other, __shfl_xor_sync(FULL_WARP, second, distance));
    }
    row.kept = __ballot_sync(FULL_WARP, group_stays(a, group_score(a, first, second), lane / unit, unit));
    row.group = N;
}

// Any groups, at most 32.
template <class T> static __device__ __forceinline__ void choose_groups(const GateArgs &a, Row &row) {
    const u32 lane = threadIdx.x % LANES;
    u32 mine = 0;
#pragma unroll 1
    for (u32 g = 0; g < a.groups; ++g) {
        u32 first = 0;
        u32 second = 0;
#pragma unroll 1
        for (u32 i = lane; i < row.group; i += LANES) {
            const u32 expert = g * row.group + i;
            join_pairs(first, second, key_of<T>(a, row, expert), 0);
        }
        const u32 best = __reduce_max_sync(FULL_WARP, first);
        const u32 with_best = __ballot_sync(FULL_WARP, first == best);
        const u32 next = __reduce_max_sync(FULL_WARP, first == best ? second : first);
        const u32 score = group_score(a, best, with_best & (with_best - 1) ? best : next);
        if (lane == g)
            mine = score;
    }
    row.kept = __ballot_sync(FULL_WARP, group_stays(a, mine, lane, 1));
}

// --- Choices.

// The keys of a lane's experts of a chunk, from memory; 0 for what may not be chosen.
template <class T, u32 N>
static __device__ __forceinline__ void keys_again(const GateArgs &a, const Row &row, bool wide, u32 chunk,
                                                  u32 (&keys)[N]) {
    const u32 first = chunk * CHUNK + threadIdx.x % LANES * N;
    float x[N];
    load_logits<T, N>(a, row, first, wide, x);
    rank_values(a, row, first, x);
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        const u32 group = row.group == N ? first / N : row.group ? (first + i) / row.group : 0;
        const bool stays = !row.group || (group < LANES && row.kept >> group & 1);
        keys[i] = first + i < a.experts && stays ? order_key(x[i]) : 0;
    }
}

// The exact choice of a row, for few rows: each round looks at all keys. Those of a single chunk stay in registers.
template <class T, u32 N>
static __device__ __forceinline__ void choose_again(const GateArgs &a, const Row &row, bool wide, u32 &id) {
    const u32 lane = threadIdx.x % LANES;
    const u32 chunks = chunks_of<N>(a);
    u32 keys[N];
    keys_again<T, N>(a, row, wide, 0, keys);
    u32 taken = 0;  // a bit for each of this lane's experts, N of each chunk
#pragma unroll 1
    for (u32 round = 0; round < a.k; ++round) {
        u32 best = 0;
        u32 where = 0;
#pragma unroll 1
        for (u32 chunk = 0; chunk < chunks; ++chunk) {
            if (chunks > 1)
                keys_again<T, N>(a, row, wide, chunk, keys);
#pragma unroll
            for (u32 i = 0; i < N; ++i) {
                const u32 key = taken >> (chunk * N + i) & 1 ? 0 : keys[i];
                if (key > best) {
                    best = key;
                    where = chunk * CHUNK + lane * N + i;
                }
            }
        }
        const u32 top = __reduce_max_sync(FULL_WARP, best);
        const u32 winner = __reduce_min_sync(FULL_WARP, best == top ? where : ~0u);
        if (best == top && winner == where)
            taken |= 1u << (winner / CHUNK * N + winner % N);
        if (lane == round)
            id = winner;
    }
}

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

// --- Weights.

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

// --- The row.

// The factor keeps sums of finite numbers finite, so that only a NaN, or infinities of both signs, give a NaN.
template <u32 N> static __device__ __forceinline__ float trace_of(float trace, const float (&x)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; ++i)
        trace = __fmaf_rn(x[i], 0x1p-20f, trace);
    return trace;
}

// Lane j < k gets choice j of `token` and its weight. Called by a whole warp; N as gate.cu says for a.experts.
template <class T, u32 N>
static __device__ __forceinline__ void gate_row(const GateArgs &a, u32 token, u32 &id, float &weight) {
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

    // What lies past the last expert is chosen after -inf, but before NaN; a list that has run out may hide a choice.
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

// Whether rows are what most models have: a softmax of which only the choices count, no bias, no groups, no odd
// address.
template <class T, u32 N> static __device__ __forceinline__ bool gates_plainly(const GateArgs &a) {
    const bool renormalized = a.flags & GATE_RENORMALIZE;
    return (a.scoring == SCORE_SOFTMAX ? renormalized : a.scoring == SCORE_SOFTMAX_TOPK) &&
           (!renormalized || a.eps == 0.0f) && !a.bias && a.groups <= 1 && chunks_of<N>(a) == 1 && loads_wide<T, N>(a);
}

// The weight of a choice with this logit, where the softmax is over the choices alone.
static __device__ __forceinline__ float plain_weight(const GateArgs &a, float logit, bool chooses) {
    const float power = expf(__fadd_rn(logit, -__shfl_sync(FULL_WARP, logit, 0)));
    return __fmul_rn(__fdividef(power, sum_of_choices(chooses ? power : 0.0f, a.k)), a.scale);
}

// The same for such a row, without a question that has been answered.
template <class T, u32 N>
static __device__ __forceinline__ void gate_plain_row(const GateArgs &a, u32 token, u32 &id, float &weight) {
    constexpr u32 LOW_BITS = CHUNK - 1;
    const u32 lane = threadIdx.x % LANES;
    Row row;
    row.at = (const u8 *)a.logits + token * a.stride * T::bytes;
    row.low_bits = LOW_BITS;
    row.by_score = false;
    row.group = 0;
    float x[N];
    load_logits<T, N>(a, row, lane * N, true, x);
    const float trace = trace_of(0.0f, x);
    u32 list[N];
    words_of<N>(row, lane * N, x, list);
    const u32 mine = take_best<N>(a.k, list);
    id = LOW_BITS - (mine & LOW_BITS);
    const bool chooses = lane < a.k;
    const bool found = chooses && id < a.experts;
    const float logit = found ? T::get(row.at, id) : __uint_as_float(0xff800000u);
    weight = plain_weight(a, logit, chooses);
    bool wrong = chooses != found;
    if (T::bytes != 2) {
        // Choices must be in order, and the last one above what was left out by more than the bits given up.
        const float after = __shfl_down_sync(FULL_WARP, logit, 1);
        wrong |= logit < after && lane + 1 < a.k;
        const u32 next = __reduce_max_sync(FULL_WARP, list[0]);
        wrong |= lane == a.k - 1 && (mine ^ next) <= LOW_BITS;
    }
    if (__any_sync(FULL_WARP, wrong)) {
        choose_again<T, N>(a, row, true, id);
        weight = plain_weight(a, chooses ? T::get(row.at, id) : 0.0f, chooses);
    }
    if (a.scoring == SCORE_SOFTMAX && __any_sync(FULL_WARP, trace != trace))
        weight = __uint_as_float(0x7fffffffu);
}

// --- Results.

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

// A token's choices, written and given to lanes j < k. Called by a whole warp. `plain`: what gates_plainly says.
template <class T, u32 N>
static __device__ __forceinline__ i32 gate_token(const GateArgs &a, u32 token, u32 valid, bool plain = false) {
    const u32 lane = threadIdx.x % LANES;
    u32 id = ~0u;
    float weight = 0.0f;
    if (token < valid) {
        if (plain)
            gate_plain_row<T, N>(a, token, id, weight);
        else
            gate_row<T, N>(a, token, id, weight);
    }
    if (lane < a.k)
        put_choice(a, token, lane, (i32)id, weight);
    return (i32)id;
}
