// Comparisons by keys of all bits, which are looked at again in each round: groups (of every row of gate_any.cuh), and
// the choice of the few rows that words cannot decide.
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

