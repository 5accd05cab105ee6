// acquire: one launch finds the slots of a call's experts, tells the host which were asked for, and brings those that
// are missing. Everything a replayed graph needs anew lies in `State`, so all arguments stay the same.
//
// Why a slot may be overwritten: all calls of an engine run in stream order, and a victim is never an expert of the
// running call. So whatever used the victim's slot was launched before this kernel and is over.
//
// Every block works out the same bitmaps from the same ids and the same table. If nothing is missing, block 0 alone
// finishes the call and nobody touches what the other blocks read. If something is missing, the table and the
// sequence number change only after the last block has taken its ticket.
#include "mailbox.cuh"
#include "tuning.cuh"

static __device__ __forceinline__ u64 load_answer(const u64 *at) {
    u64 v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(at) : "memory");
    return v;
}

static __device__ __forceinline__ void store_host64(u64 *at, u64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(v) : "memory");
}

static __device__ __forceinline__ void store_host32(u32 *at, u32 v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

static __device__ __forceinline__ u64 nanoseconds() {
    u64 v;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v));
    return v;
}

static __device__ __forceinline__ u32 sequence_after(u32 seq) { return seq == 0xffffffffu ? 1u : seq + 1u; }

// Past L1: the last block must see what other blocks wrote.
static __device__ __forceinline__ i32 slot_of(const AcquireArgs &a, i64 id) {
    return id >= 0 && id < (i64)a.experts ? __ldcg(a.table + a.first + (u32)id) : -1;
}

// Called by all threads of block 0. Which experts were asked for, and which of them were not there.
static __device__ void publish(const AcquireArgs &a, u32 seq, const u32 *used, const u32 *missing) {
    const u32 words = (a.experts + 31) / 32;
    u64 *record = a.mailbox->ring[seq % RING_RECORDS];
    const u32 cell = threadIdx.x;
    u32 counts = 0;
    if (cell < LANES)  // one lane for each word: MAX_WORDS is LANES
        counts = __reduce_add_sync(FULL_WARP, __popc(used[cell]) | __popc(missing[cell]) << 16);
    if (cell < RECORD_HEADER + 2 * words) {
        u32 content = 0;
        if (cell >= RECORD_HEADER + words)
            content = missing[cell - RECORD_HEADER - words];
        else if (cell >= RECORD_HEADER)
            content = used[cell - RECORD_HEADER];
        else if (cell == CELL_LAYER)
            content = a.layer;
        else if (cell == CELL_PAIRS)
            content = a.pairs | a.phase << 16;
        else if (cell == CELL_COUNTS)
            content = counts;
        else if (cell == CELL_EXPERTS)
            content = a.experts;
        store_host64(record + cell, (u64)seq << 32 | content);
    }
}

// Called by one thread: the host's word for this call, or one that says that none came in time.
static __device__ u64 wait_for_answer(const Mailbox *mailbox, u32 seq) {
    const u64 begin = nanoseconds();
    for (u32 looks = 1;; ++looks) {
        const u64 word = load_answer(&mailbox->answer);
        if (ANSWER_SEQ(word) == seq || ANSWER_STATUS(word) == STATUS_CLOSED)
            return word;
        if (looks % POLLS_PER_CLOCK == 0 && nanoseconds() - begin > *(volatile const u64 *)&mailbox->timeout_ns)
            return (u64)seq << 32 | STATUS_TIMEOUT << 24;
        __nanosleep(POLL_PAUSE_NS);
    }
}

// Called by all threads of all blocks: the rows of `n` orders as one run of 16-byte units, a strip for each block.
static __device__ void copy_strip(const AcquireArgs &a, const Order *orders, u32 n) {
    const u32 units = (u32)(a.row_bytes / 16);
    const u32 total = n * units;
    const u32 strip = (total + gridDim.x - 1) / gridDim.x;
    const u32 end = min(strip * (blockIdx.x + 1), total);
    for (u32 at = strip * blockIdx.x + threadIdx.x; at < end; at += ACQUIRE_THREADS * FETCH_IN_FLIGHT) {
        Vec16 held[FETCH_IN_FLIGHT];
#pragma unroll
        for (u32 i = 0; i < FETCH_IN_FLIGHT; ++i) {
            const u32 unit = at + i * ACQUIRE_THREADS;
            if (unit < end)
                held[i] = load_host((const u8 *)orders[unit / units].source + (u64)(unit % units) * 16);
        }
#pragma unroll
        for (u32 i = 0; i < FETCH_IN_FLIGHT; ++i) {
            const u32 unit = at + i * ACQUIRE_THREADS;
            if (unit < end)
                store16(a.arena + orders[unit / units].slot * a.slot_bytes + (u64)(unit % units) * 16, held[i]);
        }
    }
}

// Called by all threads of a block: orders [begin, begin + n) into shared memory.
static __device__ void load_orders(const Mailbox *mailbox, u32 begin, u32 n, Order *into) {
    for (u32 i = threadIdx.x; i < 2 * n; i += ACQUIRE_THREADS)
        ((Vec16 *)into)[i] = load_host((const u8 *)&mailbox->orders[begin] + (u64)i * 16);
}

extern "C" __global__ void __launch_bounds__(ACQUIRE_THREADS) moecore_acquire(const AcquireArgs a) {
    __shared__ u32 used[MAX_WORDS];
    __shared__ u32 missing[MAX_WORDS];
    __shared__ alignas(16) Order orders[ORDER_BATCH];
    __shared__ u64 word;
    __shared__ u32 is_last;

    if (a.pairs == 0)  // the launch that only loads the kernel
        return;
    const u32 tid = threadIdx.x;
    const u32 seq = __ldcg(&a.state->seq);
    const u32 broken = __ldcg(&a.state->error);
    if (tid < MAX_WORDS)
        used[tid] = missing[tid] = 0;
    __syncthreads();

    int lacks = 0;
    for (u32 i = tid; i < a.pairs; i += ACQUIRE_THREADS) {
        const i64 id = a.ids[i];
        const i32 slot = slot_of(a, id);
        if (id >= 0 && id < (i64)a.experts) {
            atomicOr(&used[(u32)id / 32], 1u << ((u32)id % 32));
            if (slot < 0) {
                atomicOr(&missing[(u32)id / 32], 1u << ((u32)id % 32));
                lacks = 1;
            }
            if (blockIdx.x == 0)
                atomicAdd(a.counts + a.first + (u32)id, 1u);
        }
        if (blockIdx.x == 0)
            a.slots[i] = broken ? 0 : slot;
    }
    lacks = __syncthreads_or(lacks);

    if (!lacks) {  // the other blocks read nothing that block 0 writes here
        if (blockIdx.x == 0 && !broken) {
            publish(a, seq, used, missing);
            if (tid == 0)
                a.state->seq = sequence_after(seq);
        }
        return;
    }

    // A block may find a failure that another block of this very launch has met: then the call is as good as failed,
    // but its record must be there and its ticket taken.
    const u32 mark = seq << 8;
    const bool stale = broken != 0 && (broken & ~0xffu) != mark;
    u32 status = broken & 0xffu;
    u32 count = 0;
    if (blockIdx.x == 0 && !stale)
        publish(a, seq, used, missing);
    if (!broken) {
        if (tid == 0)
            word = wait_for_answer(a.mailbox, seq);
        __syncthreads();
        status = ANSWER_STATUS(word);
        count = ANSWER_ORDERS(word);
        const u32 copies = ANSWER_COPIES(word);
        for (u32 begin = 0; status == STATUS_OK && begin < count; begin += ORDER_BATCH) {
            load_orders(a.mailbox, begin, min(count - begin, (u32)ORDER_BATCH), orders);
            __syncthreads();
            if (begin < copies)
                copy_strip(a, orders, min(copies - begin, (u32)ORDER_BATCH));
            __syncthreads();
        }
    }

    if (tid == 0) {
        if (status != STATUS_OK)
            atomicCAS(&a.state->error, 0u, mark | status);
        __threadfence();
        is_last = atomicAdd(&a.state->ticket, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last)
        return;

    // Alone now: every block has read the table and the sequence number, and every copy is done.
    u32 failure = __ldcg(&a.state->error);
    if (failure == 0) {
        for (u32 begin = 0; begin < count; begin += ORDER_BATCH) {
            const u32 n = min(count - begin, (u32)ORDER_BATCH);
            if (count > ORDER_BATCH) {  // else they are still here
                load_orders(a.mailbox, begin, n, orders);
                __syncthreads();
            }
            if (tid < n) {  // the host has seen to it that nobody leaves and comes in one call
                const Order order = orders[tid];
                if (order.evicted != NOTHING)
                    __stcg(a.table + order.evicted, -1);
                if (order.expert != NOTHING && order.slot != NOTHING)
                    __stcg(a.table + order.expert, (i32)order.slot);
            }
            __syncthreads();
        }
        int unserved = 0;
        for (u32 i = tid; i < a.pairs; i += ACQUIRE_THREADS) {
            const i64 id = a.ids[i];
            const i32 slot = slot_of(a, id);
            unserved |= slot < 0 && id >= 0 && id < (i64)a.experts;
            a.slots[i] = slot;
        }
        if (__syncthreads_or(unserved))
            failure = mark | STATUS_MISSING;
    }
    if (failure != 0)  // defined memory for whatever reads the slots
        for (u32 i = tid; i < a.pairs; i += ACQUIRE_THREADS)
            a.slots[i] = 0;
    if (tid == 0) {
        a.state->ticket = 0;
        if (failure != 0 && (failure & ~0xffu) == mark) {
            a.state->error = failure;
            store_host32(&a.mailbox->error_seq, seq);
            __threadfence_system();
            store_host32(&a.mailbox->error, failure & 0xffu);
        }
        if (!stale) {
            a.state->seq = sequence_after(seq);
            store_host64(&a.mailbox->applied, seq);
        }
    }
}

// Changes of the table that no call asked for: admissions of a prefill, evictions of the stream ring. The entries are
// part of the launch, so nothing has to outlive it.
extern "C" __global__ void moecore_update_table(const TableArgs a) {
    for (u32 i = threadIdx.x; i < a.count; i += blockDim.x)
        a.table[a.entry[i][0]] = (i32)a.entry[i][1];
}
