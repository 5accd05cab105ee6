// acquire: one launch finds the slots of a call's experts, tells the host which were asked for, and brings those that
// are missing. Everything a replayed graph needs anew lies in `State`, so all arguments stay the same.
//
// Why a slot may be overwritten: all calls of an engine run in stream order, and a victim is never an expert of the
// running call. So whatever used the victim's slot was launched before this kernel and is over.
//
// Every block works out the same bitmaps from the same ids and the same table. If nothing is missing, block 0 alone
// finishes the call and nobody touches what the other blocks read. If something is missing, block 0 changes the table
// and the state, but only after every block has said that it has read them; meanwhile the others copy.
#include "copy.cuh"
#include "gate.cuh"
#include "mailbox.cuh"

struct GateAcquireArgs {
    AcquireArgs acquire;  // its ids are those that the gate writes
    GateArgs gate;        // ids are int64; all tokens are valid
};
static_assert(sizeof(GateAcquireArgs) == 184, "GateAcquireArgs");

static __device__ __forceinline__ u64 load_cell(const u64 *at) {
    u64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(at) : "memory");
    return v;
}

static __device__ __forceinline__ void store_cell(u64 *at, u32 seq, u32 content) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"((u64)seq << 32 | content) : "memory");
}

static __device__ __forceinline__ u64 nanoseconds() {
    u64 v;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v));
    return v;
}

static __device__ __forceinline__ u32 sequence_after(u32 seq) { return seq == 0xffffffffu ? 1u : seq + 1u; }

static __device__ __forceinline__ bool is_expert(const AcquireArgs &a, i64 id) { return id >= 0 && id < (i64)a.experts; }

// Past L1: the table changes while the kernel runs.
static __device__ __forceinline__ i32 slot_of(const AcquireArgs &a, i64 id) {
    return is_expert(a, id) ? __ldcg(a.table + a.first + (u32)id) : -1;
}

// What a block knows of its call.
struct Call {
    u32 used[MAX_WORDS];
    u32 missing[MAX_WORDS];
    Orders orders;
    u32 status;
};

// Called by all threads of a block: the bitmaps of the call. Block 0 counts, and writes the slots as they are now.
// Whether an expert is missing.
static __device__ bool look_up(const AcquireArgs &a, Call &call, bool broken) {
    const u32 tid = threadIdx.x;
    if (tid < MAX_WORDS)
        call.used[tid] = call.missing[tid] = 0;
    __syncthreads();
    int lacks = 0;
    for (u32 i = tid; i < a.pairs; i += blockDim.x) {
        const i64 id = a.ids[i];
        const i32 slot = slot_of(a, id);
        if (is_expert(a, id)) {
            atomicOr(&call.used[(u32)id / 32], 1u << ((u32)id % 32));
            if (slot < 0) {
                atomicOr(&call.missing[(u32)id / 32], 1u << ((u32)id % 32));
                lacks = 1;
            }
            if (blockIdx.x == 0)
                atomicAdd(a.counts + a.first + (u32)id, 1u);
        }
        if (blockIdx.x == 0)
            a.slots[i] = broken ? 0 : slot;
    }
    return __syncthreads_or(lacks);
}

// Called by all threads of block 0. Which experts were asked for, and which of them were not there.
static __device__ void publish(const AcquireArgs &a, u32 seq, const Call &call) {
    const u32 words = (a.experts + 31) / 32;
    u64 *record = a.mailbox->ring[seq % RING_RECORDS];
    const u32 cell = threadIdx.x;
    u32 counts = 0;
    if (cell < LANES)  // one lane for each word: MAX_WORDS is LANES
        counts = __reduce_add_sync(FULL_WARP, __popc(call.used[cell]) | __popc(call.missing[cell]) << 16);
    if (cell < RECORD_HEADER + 2 * words) {
        u32 content = 0;
        if (cell >= RECORD_HEADER + words)
            content = call.missing[cell - RECORD_HEADER - words];
        else if (cell >= RECORD_HEADER)
            content = call.used[cell - RECORD_HEADER];
        else if (cell == CELL_LAYER)
            content = a.layer;
        else if (cell == CELL_PAIRS)
            content = a.pairs | a.phase << 16;
        else if (cell == CELL_COUNTS)
            content = counts;
        else if (cell == CELL_EXPERTS)
            content = a.experts;
        store_cell(record + cell, seq, content);
    }
}

// Called by one warp: waits until the answer's cells are there, and puts them into `orders`. The answer's status.
// Block 0 alone looks at the host's memory until then, and decides for all: were all blocks to, the host's own writes
// would take longer (measured: about 1 us for each block).
static __device__ u32 hear(State *state, const Mailbox *mailbox, u32 seq, Orders &orders) {
    const u32 lane = threadIdx.x % LANES;
    const u64 begin = nanoseconds();
    if (blockIdx.x != 0) {
        u64 heard;
        do
            heard = *(volatile u64 *)&state->heard;
        while (CELL_SEQ(heard) != seq);
        if ((u32)heard != STATUS_OK)
            return (u32)heard;
        __threadfence();
    }
    for (u32 looks = 1;; ++looks) {
        const u64 cell[2] = {load_cell(mailbox->answer + lane), load_cell(mailbox->answer + LANES + lane)};
        const u64 head = __shfl_sync(FULL_WARP, cell[0], 0);
        if (ANSWER_STATUS(head) == STATUS_CLOSED)
            return STATUS_CLOSED;
        if (CELL_SEQ(head) == seq) {
            const u32 count = ANSWER_ORDERS(head);
            const u32 cells = count <= INLINE_ORDERS ? 1 + count * ORDER_CELLS : 1;
            const bool there = (lane >= cells || CELL_SEQ(cell[0]) == seq) &&
                               (LANES + lane >= cells || CELL_SEQ(cell[1]) == seq);
            if (__all_sync(FULL_WARP, there)) {
                // What the host wrote before its answer is there for all that come after this.
                asm volatile("fence.acq_rel.sys;" ::: "memory");
                for (u32 half = 0; half < 2; ++half) {
                    const u32 at = half * LANES + lane - 1;
                    if (half * LANES + lane >= 1 && at + 1 < cells)
                        ((u32 *)&orders.held[at / ORDER_CELLS])[at % ORDER_CELLS] = (u32)cell[half];
                }
                if (lane == 0) {
                    orders.count = count;
                    orders.copies = ANSWER_COPIES(head);
                }
                return ANSWER_STATUS(head);
            }
        }
        u32 late = 0;
        if (looks % POLLS_PER_CLOCK == 0 && lane == 0)
            late = nanoseconds() - begin > load_cell(&mailbox->timeout_ns);
        if (__shfl_sync(FULL_WARP, late, 0))
            return STATUS_TIMEOUT;
        __nanosleep(POLL_PAUSE_NS);
    }
}

// Called by one thread: the first failure is kept and told.
static __device__ void fail(const AcquireArgs &a, u32 seq, u32 status) {
    if (atomicCAS(&a.state->error, 0u, seq << 8 | status) != 0)
        return;
    *(volatile u32 *)&a.mailbox->error_seq = seq;
    __threadfence_system();
    *(volatile u32 *)&a.mailbox->error = status;
}

// Called by all threads of a block: it has read the table and the state.
static __device__ void arrive(const AcquireArgs &a, u32 turn) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&a.state->arrived[turn], 1u);
    }
}

// Called by all threads of block 0: the table as the orders say, the slots of the call, the state for the next one.
static __device__ void settle(const AcquireArgs &a, u32 seq, u32 turn, const Call &call) {
    const u32 tid = threadIdx.x;
    if (tid == 0) {
        while (*(volatile u32 *)&a.state->arrived[turn] != gridDim.x)
            ;
        __threadfence();
    }
    __syncthreads();
    if (call.status == STATUS_OK)
        for (u32 i = tid; i < call.orders.count; i += blockDim.x) {  // nobody leaves and comes in one call
            const Order order = order_at(call.orders, i);
            if (order.evicted != NOTHING)
                __stcg(a.table + order.evicted, -1);
            if (order.expert != NOTHING && order.slot != NOTHING)
                __stcg(a.table + order.expert, (i32)order.slot);
        }
    __syncthreads();
    int unserved = 0;
    for (u32 i = tid; i < a.pairs; i += blockDim.x) {
        const i64 id = a.ids[i];
        const i32 slot = slot_of(a, id);
        unserved |= slot < 0 && is_expert(a, id);
        a.slots[i] = slot;
    }
    unserved = __syncthreads_or(unserved);
    if (unserved || call.status != STATUS_OK)  // defined memory for whatever reads the slots
        for (u32 i = tid; i < a.pairs; i += blockDim.x)
            a.slots[i] = 0;
    if (tid == 0) {
        if (unserved && call.status == STATUS_OK)
            fail(a, seq, STATUS_MISSING);
        a.state->arrived[turn ^ 1] = 0;
        a.state->taken[turn ^ 1] = 0;
        a.state->turn = turn ^ 1;
        a.state->seq = sequence_after(seq);
    }
}

// Called by all threads of all blocks of a call with a miss, after its record: waits, copies, settles.
static __device__ void serve(const AcquireArgs &a, u32 seq, u32 turn, u32 broken, Call &call) {
    const u64 begin = nanoseconds();
    if (threadIdx.x < LANES) {
        const u32 status = broken ? broken & 0xffu : hear(a.state, a.mailbox, seq, call.orders);
        if (threadIdx.x == 0) {
            if (blockIdx.x == 0) {
                __threadfence();
                *(volatile u64 *)&a.state->heard = (u64)seq << 32 | status;
            }
            call.status = status;
            if (status != STATUS_OK)
                fail(a, seq, status);
        }
    }
    __syncthreads();
    if (call.status == STATUS_OK && call.orders.count > INLINE_ORDERS)
        hold_orders(call.orders, a.mailbox->orders);
    if (blockIdx.x == 0)
        settle(a, seq, turn, call);
    if (call.status == STATUS_OK)
        copy_rows(call.orders, a.arena, a.slot_bytes, a.row_bytes, &a.state->taken[turn]);
    // Blocks take tiles until there are none, so they end together: block 0's time is the call's.
    if (blockIdx.x == 0 && threadIdx.x == 0)
        stalls(a.state)[a.layer] += nanoseconds() - begin;
}

// The whole of a call, by all threads of all blocks.
static __device__ __forceinline__ void acquire(const AcquireArgs &a, Call &call) {
    const u32 seq = __ldcg(&a.state->seq);
    const u32 turn = __ldcg(&a.state->turn);
    const u32 broken = __ldcg(&a.state->error);
    const bool lacks = look_up(a, call, broken != 0);
    if (!lacks) {
        if (blockIdx.x == 0 && !broken) {
            publish(a, seq, call);
            if (threadIdx.x == 0)
                a.state->seq = sequence_after(seq);
        }
        return;
    }
    // A failure of an earlier call is the end of this one. But a block may find one that another block of this very
    // launch has met: then the record must be there all the same, and every block's arrival.
    if (broken != 0 && broken >> 8 != (seq & 0xffffffu))
        return;
    if (blockIdx.x == 0)
        publish(a, seq, call);
    arrive(a, turn);
    serve(a, seq, turn, broken, call);
}

// Without pairs: the launch that only loads the kernel.
extern "C" __global__ void __launch_bounds__(ACQUIRE_THREADS) moecore_acquire(const AcquireArgs a) {
    __shared__ Call call;
    if (a.pairs != 0)
        acquire(a, call);
}

// The tokens of a block's warps.
template <class T, u32 N, u32 RULE> static __device__ __forceinline__ void gate_block(const GateArgs &a) {
    for (u32 token = warp_number(); token < a.tokens; token += ACQUIRE_THREADS / LANES)
        gate_token<T, N, RULE>(a, token, a.tokens);
}

// The same by the rule that the arguments name.
template <class T, u32 N> static __device__ __forceinline__ void gate_block(const GateArgs &a) {
    if (a.flags & GATE_BY_LOGITS)
        gate_block<T, N, GATE_BY_LOGITS>(a);
    else
        gate_block<T, N, GATE_BY_SCORES>(a);
}

// The same, with the ids from the router's logits. Every block chooses for itself: a warp takes a token in less time
// than another launch, or a word from another block, would take. All write the same ids and weights.
template <class T> static __device__ __forceinline__ void gate_acquire(const GateAcquireArgs &a) {
    __shared__ Call call;
    await_last();
    if (a.acquire.pairs == 0)
        return;
    if (!(a.gate.flags & (GATE_BY_LOGITS | GATE_BY_SCORES)))
        gate_block<T, 8, 0>(a.gate);
    else if (a.gate.experts <= 2 * LANES)
        gate_block<T, 2>(a.gate);
    else if (a.gate.experts <= 4 * LANES)
        gate_block<T, 4>(a.gate);
    else if (a.gate.experts <= 8 * LANES)
        gate_block<T, 8>(a.gate);
    else
        gate_block<T, 16>(a.gate);
    __syncthreads();
    acquire(a.acquire, call);
}

#define GATE_ACQUIRE(suffix, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(ACQUIRE_THREADS, 1)                                                   \
        moecore_gate_acquire_##suffix(const GateAcquireArgs a) {                                                       \
        gate_acquire<T>(a);                                                                                            \
    }

GATE_ACQUIRE(f32, F32)
GATE_ACQUIRE(bf16, Bf16)
GATE_ACQUIRE(f16, F16)

// Changes of the table that no call asked for: admissions of a prefill, evictions of the stream ring. The entries are
// part of the launch, so nothing has to outlive it.
extern "C" __global__ void moecore_update_table(const TableArgs a) {
    for (u32 i = threadIdx.x; i < a.count; i += blockDim.x)
        a.table[a.entry[i][0]] = (i32)a.entry[i][1];
}
