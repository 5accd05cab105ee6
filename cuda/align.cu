// align: a sorted order cut into blocks of one bin each, as fused expert products take it. A bin's pairs fill whole
// blocks; what is left over of its last one holds the number of all pairs, which is nobody's.
#include "index.cuh"

// The first of `count` ascending numbers that is above x, by its place. The last one must be, and is never read. Every
// x takes as many steps, and none of them is a branch.
template <class Number>
static __device__ __forceinline__ u32 first_above(u32 count, const Number &number, u32 x) {
    u32 low = 0;
#pragma unroll 1
    for (u32 left = count; left > 1; left -= left / 2)
        low += number(low + left / 2 - 1) <= x ? left / 2 : 0;
    return low;
}

// Where number i of a table lies that lanes search for different x: words that are a power of two apart would share a
// bank.
static __device__ __forceinline__ u32 spread(u32 i) { return i + i / LANES; }

// A warp takes 32 pairs at a time, and after all pairs some blocks of places, so that with enough warps each has either
// one or the other. Blocks of threads add up all bins for themselves: none waits for another. For few pairs the time is
// that of one chain: the ends are read, added up, searched; what can be known before they are there comes before, and
// loops are not unrolled, as most of them turn once or twice.
// Grid: best a warp for each 32 pairs and one for each block of places; any will do. Block: ALIGN_THREADS. Dynamic
// shared memory, words of 4 bytes: first rows [bins + bins / LANES + 1], starts [bins], partial [LANES].
extern "C" __global__ void __launch_bounds__(ALIGN_THREADS) moecore_align(const AlignArgs a) {
    extern __shared__ u32 shared[];
    if (a.block == 0)  // the launch that only loads the kernel
        return;
    let_next_begin();
    const u32 lane = threadIdx.x % LANES;
    const u32 warps = gridDim.x * (ALIGN_THREADS / LANES);
    u32 item = (blockIdx.x * ALIGN_THREADS + threadIdx.x) / LANES;
    const u32 chunks = (a.pairs + LANES - 1) / LANES;
    const u32 blocks = a.capacity / a.block;
    const u32 each = min(max((blocks + warps - 1) / warps, 1u), (u32)LANES);  // blocks of a warp at a time
    const u32 bins_of_one = (a.bins + ALIGN_THREADS - 1) / ALIGN_THREADS;
    const u32 first_bin = min(threadIdx.x * bins_of_one, a.bins);
    const u32 end_bin = min(first_bin + bins_of_one, a.bins);
    u32 *rows = shared;
    u32 *starts = rows + spread(a.bins) + 1;
    u32 *partial = starts + a.bins;
    if (threadIdx.x == 0)
        rows[0] = 0;
    await_last();

    const auto row_of = [&](u32 item) {
        const u32 pair = item * LANES + lane;
        return pair < a.pairs ? a.inverse[pair] : -1;
    };
    i32 row = row_of(item);
    u32 end = first_bin ? (u32)a.ends[first_bin - 1] : 0;
    u32 places = 0;
#pragma unroll 1
    for (u32 bin = first_bin; bin < end_bin; ++bin) {
        const u32 first = end;
        end = (u32)a.ends[bin];
        rows[spread(bin + 1)] = end;
        starts[bin] = places;  // among this thread's
        places += (end - first + a.block - 1) / a.block * a.block;
    }
    u32 total;
    const u32 before = before_in_block(places, partial, ALIGN_THREADS / LANES, total);
#pragma unroll 1
    for (u32 bin = first_bin; bin < end_bin; ++bin)
        starts[bin] += before;
    __syncthreads();
    if (item == 0 && lane == 0)
        *a.places = (i32)total;

    const u32 known = rows[spread(a.bins)];  // rows from here on are those of another order
    const auto end_of_rows = [&](u32 bin) { return rows[spread(bin + 1)]; };
#pragma unroll 1
    for (; item < chunks; item += warps) {
        const i32 next = row_of(item + warps);
        if ((u32)row < known) {
            const u32 bin = first_above(a.bins, end_of_rows, (u32)row);
            const u32 place = starts[bin] + (u32)row - rows[spread(bin)];
            if (place < a.capacity)
                a.order[place] = (i32)(item * LANES + lane);
        }
        row = next;
    }

    // A lane finds the owner of one block; then all lanes fill up one such block after the other.
    const auto end_of_places = [&](u32 bin) { return starts[bin + 1]; };
#pragma unroll 1
    for (u32 block = (item - chunks) * each; block < blocks; block += warps * each) {
        const bool mine = lane < each && block + lane < blocks;
        const u32 first = (block + lane) * a.block;
        u32 filled = 0;
        if (mine) {
            i32 owner = -1;
            if (first < total) {
                const u32 bin = first_above(a.bins, end_of_places, first);
                owner = (i32)bin;
                filled = min(starts[bin] + rows[spread(bin + 1)] - rows[spread(bin)] - first, a.block);
            }
            a.owner[block + lane] = owner;
        }
#pragma unroll 1
        for (u32 open = __ballot_sync(FULL_WARP, mine && filled < a.block); open; open &= open - 1) {
            const u32 from = __ffs((i32)open) - 1;
            i32 *order = a.order + (u64)(block + from) * a.block;
#pragma unroll 1
            for (u32 place = __shfl_sync(FULL_WARP, filled, from) + lane; place < a.block; place += LANES)
                order[place] = (i32)a.pairs;
        }
    }
}
