// The mailbox: what the GPU and the answering thread say to each other, in one block of pinned host memory.
// rust/moecore-cuda/src/layout.rs describes the same bytes; both sides assert the numbers below.
//
// Both ways go through 8-byte cells: a call's sequence number beside 4 bytes of content. So a reader sees for each cell
// by itself whether it is there, in whatever order they arrive. Sequence numbers count from 1 and skip 0.
#pragma once
#include "common.cuh"

#define RING_RECORDS 4096
#define RECORD_CELLS 80
#define RECORD_HEADER 4
#define MAX_PAIRS 1024
#define MAX_EXPERTS 1024
#define MAX_WORDS (MAX_EXPERTS / 32)
#define MAX_ORDERS 2048
#define ANSWER_CELLS 64
#define ORDER_CELLS 5
#define INLINE_ORDERS 12
#define TABLE_BATCH 384
#define NOTHING 0xffffffffu

#define CELL_SEQ(word)   ((u32)((word) >> 32))
#define ANSWER_STATUS(word) ((u32)(word) >> 24)
#define ANSWER_COPIES(word) (((u32)(word) >> 12) & 0xfffu)
#define ANSWER_ORDERS(word) ((u32)(word) & 0xfffu)

// Status of an answer, and the code of a failure.
#define STATUS_OK 0u
#define STATUS_ERROR 1u    // the host could not serve the call
#define STATUS_CLOSED 2u   // the engine is closed; holds for every call from now on
#define STATUS_TIMEOUT 3u  // the GPU waited longer than the watchdog allows
#define STATUS_MISSING 4u  // the host's orders left an expert without a slot

// One thing to do before the call goes on.
//   source != 0                 copy the row at `source` (pinned host memory) into `slot`, then `expert` is there
//   source == 0                 `expert` is already in `slot` (a prefetch brought it)
//   slot or expert == NOTHING   nothing becomes resident; only `evicted` leaves the table
struct Order {
    u64 source;
    u32 slot;
    u32 expert;   // dense id
    u32 evicted;  // dense id that leaves the table, or NOTHING
    u32 reserved[3];
};

struct Mailbox {
    // Host to GPU. The first cell: status << 24 | orders that copy << 12 | orders in all. If there are at most
    // INLINE_ORDERS, ORDER_CELLS for each: the first words of its `Order`. Orders that copy come first.
    u64 answer[ANSWER_CELLS];
    // Host to GPU: the watchdog's patience.
    u64 timeout_ns;
    u64 pad1[15];
    // GPU to host: status of the first failure, 0 if there was none, and the call it happened in.
    u32 error;
    u32 error_seq;
    u64 pad2[15];
    // Host to GPU: the orders of an answer that has more.
    Order orders[MAX_ORDERS];
    u64 ring[RING_RECORDS][RECORD_CELLS];
};

// Header cells of a record; then one cell for each 32 experts of the layer (used), then as many (missing).
#define CELL_LAYER 0    // layer
#define CELL_PAIRS 1    // pairs | phase << 16
#define CELL_COUNTS 2   // used experts | missing experts << 16
#define CELL_EXPERTS 3  // experts of the layer

// What outlives a launch, in device memory: zeroed by the host, then seq = 1.
struct State {
    u32 seq;         // of the next call
    u32 error;       // low 24 bits of the sequence number << 8 | status of the first failure; until the host clears it,
                     // calls do nothing
    u32 turn;        // which of the counters below the next call with a miss uses; the others are 0
    u32 reserved0;
    u32 arrived[2];  // blocks that have read all that the call changes
    u32 taken[2];    // tiles that were taken, not counting each warp's first
    u64 heard;       // by block 0: sequence number << 32 | status of the answer, for the other blocks
    u32 reserved[6];
};

// Behind the state: for each layer, the nanoseconds for which its calls with a miss waited and copied.
static __device__ __forceinline__ u64 *stalls(State *state) { return (u64 *)(state + 1); }

static_assert(sizeof(Order) == 32, "Order");
static_assert(sizeof(State) == 64, "State");
static_assert(sizeof(Mailbox) == 768 + MAX_ORDERS * 32 + RING_RECORDS * RECORD_CELLS * 8, "Mailbox");
static_assert(1 + INLINE_ORDERS * ORDER_CELLS <= ANSWER_CELLS && ANSWER_CELLS == 2 * LANES, "answer");
static_assert(RECORD_HEADER + 2 * MAX_WORDS <= RECORD_CELLS, "record");

struct AcquireArgs {
    const i64 *ids;   // [pairs], expert of the layer; anything outside 0..experts is nobody
    i32 *slots;       // [pairs], out
    i32 *table;       // [all experts], slot or -1
    u32 *counts;      // [all experts], how often each was asked for
    State *state;
    Mailbox *mailbox;
    u8 *arena;        // slot 0
    u64 slot_bytes;
    u64 row_bytes;    // of this layer; a multiple of 16
    u32 pairs;
    u32 layer;
    u32 first;        // dense id of the layer's expert 0
    u32 experts;      // of this layer
    u32 phase;
    u32 reserved;
};
static_assert(sizeof(AcquireArgs) == 96, "AcquireArgs");

struct TableArgs {
    i32 *table;
    u32 count;
    u32 reserved;
    u32 entry[TABLE_BATCH][2];  // dense id, slot (or NOTHING)
};
static_assert(sizeof(TableArgs) == 16 + TABLE_BATCH * 8, "TableArgs");
