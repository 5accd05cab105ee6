// align: a sorted order cut into blocks of one bin each, as fused expert products take it. A bin's pairs fill whole
// blocks; what is left over of its last one holds the number of all pairs, which is nobody's.
#include "index.cuh"

// The first of `count` ascending numbers that is above x, by its place.
static __device__ __forceinline__ u32 first_above(const u32 *numbers, u32 count, u32 x) {
    u32 low = 0;
    for (u32 high = count; low < high;) {
        const u32 middle = (low + high) / 2;
        if (numbers[middle] > x)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// Any grid will do: each block adds up all bins for itself, and takes its share of the places.
// Dynamic shared memory: starts [bins], partial [LANES].
extern "C" __global__ void __launch_bounds__(ALIGN_THREADS) moecore_align(const AlignArgs a) {
    extern __shared__ u32 shared[];
    if (a.block == 0)  // the launch that only loads the kernel
        return;
    u32 *starts = shared;
    const auto rows = [&](u32 bin) { return (u32)(a.ends[bin] - (bin ? a.ends[bin - 1] : 0)); };
    const auto places = [&](u32 bin) { return (rows(bin) + a.block - 1) / a.block * a.block; };
    const u32 total = start_bins(a.bins, places, starts, nullptr, starts + a.bins);
    __syncthreads();
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 threads = gridDim.x * blockDim.x;
    for (u32 pair = thread; pair < a.pairs; pair += threads) {
        const i32 row = a.inverse[pair];
        if (row < 0)
            continue;
        const u32 bin = first_above((const u32 *)a.ends, a.bins, (u32)row);
        if (bin == a.bins)  // a row of another order
            continue;
        const u32 place = starts[bin] + (u32)row - (bin ? (u32)a.ends[bin - 1] : 0);
        if (place < a.capacity)
            a.order[place] = (i32)pair;
    }
    for (u32 block = thread; block < a.capacity / a.block; block += threads) {
        const u32 first = block * a.block;
        u32 filled = 0;
        i32 owner = -1;
        if (first < total) {
            const u32 bin = first_above(starts, a.bins, first) - 1;
            owner = (i32)bin;
            filled = min(rows(bin) - (first - starts[bin]), a.block);
        }
        a.owner[block] = owner;
        for (u32 place = filled; place < a.block; ++place)
            a.order[first + place] = (i32)a.pairs;
    }
    if (thread == 0)
        *a.places = (i32)total;
}
