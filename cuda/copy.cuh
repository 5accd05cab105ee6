// The copy of the rows of an answer: pinned memory to slots, by all blocks of a launch. Rows are cut into tiles; whoever
// is done with one takes the next, so that nobody waits for the slowest.
#pragma once
#include "mailbox.cuh"
#include "ptx.cuh"

// The orders of an answer, as far as a block keeps them.
struct Orders {
    alignas(16) Order held[ORDER_BATCH];
    const Order *all;  // where the others are
    u32 count;
    u32 copies;
};

static __device__ __forceinline__ Order order_at(const Orders &orders, u32 i) {
    if (i < ORDER_BATCH)
        return orders.held[i];
    Order order;
    ((Vec16 *)&order)[0] = load_host((const u8 *)(orders.all + i));
    ((Vec16 *)&order)[1] = load_host((const u8 *)(orders.all + i) + 16);
    return order;
}

// Called by all threads of a block: the first orders of a long list.
static __device__ void hold_orders(Orders &orders, const Order *all) {
    if (threadIdx.x == 0)
        orders.all = all;
    const u32 n = min(orders.count, (u32)ORDER_BATCH);
    for (u32 i = threadIdx.x; i < 2 * n; i += blockDim.x)
        ((Vec16 *)orders.held)[i] = load_host((const u8 *)all + (u64)i * 16);
    __syncthreads();
}

// A tile: where it comes from, where it goes, its bytes.
struct Tile {
    const u8 *from;
    u8 *to;
    u32 bytes;
};

template <u32 BYTES>
static __device__ __forceinline__ Tile tile_at(const Orders &orders, u8 *arena, u64 slot_bytes, u64 row_bytes,
                                               u32 per_row, u32 tile) {
    const Order order = order_at(orders, tile / per_row);
    const u64 begin = (u64)(tile % per_row) * BYTES;
    Tile t;
    t.from = (const u8 *)order.source + begin;
    t.to = arena + order.slot * slot_bytes + begin;
    t.bytes = (u32)min(row_bytes - begin, (u64)BYTES);
    return t;
}

// One warp copies a tile at a time: so many 16-byte loads of each lane, then as many stores.
#define TILE_BYTES (FETCH_IN_FLIGHT * LANES * 16)

static __device__ void copy_rows(const Orders &orders, u8 *arena, u64 slot_bytes, u64 row_bytes, u32 *taken) {
    const u32 lane = threadIdx.x % LANES;
    const u32 warps = gridDim.x * (ACQUIRE_THREADS / LANES);
    const u32 per_row = (u32)((row_bytes + TILE_BYTES - 1) / TILE_BYTES);
    const u32 tiles = per_row * orders.copies;
    u32 index = threadIdx.x / LANES * gridDim.x + blockIdx.x;
    while (index < tiles) {
        u32 next = index + warps;
#if FETCH_DYNAMIC
        if (lane == 0)
            next = warps + atomicAdd(taken, 1u);
#endif
        const Tile tile = tile_at<TILE_BYTES>(orders, arena, slot_bytes, row_bytes, per_row, index);
        Vec16 held[FETCH_IN_FLIGHT];
#pragma unroll
        for (u32 i = 0; i < FETCH_IN_FLIGHT; ++i) {
            const u32 at = (i * LANES + lane) * 16;
            if (at < tile.bytes)
                held[i] = load_host(tile.from + at);
        }
#pragma unroll
        for (u32 i = 0; i < FETCH_IN_FLIGHT; ++i) {
            const u32 at = (i * LANES + lane) * 16;
            if (at < tile.bytes)
                store16(tile.to + at, held[i]);
        }
        index = __shfl_sync(FULL_WARP, next, 0);
    }
}
