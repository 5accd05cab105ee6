// Runs a grid on one thread of the CPU: clusters one after another (mostly of one block), their threads as fibers that
// change places where they wait for each other. What runs first is a choice of the caller, so that a result that hangs
// on the order can be found out.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "emulate.hpp"
#include "fibers.hpp"
#include "meeting.hpp"
#if defined(MOECORE_EMULATED_CHECKED)
#include "checks.hpp"
#define CHECKED(call) checks::call
#else
#define CHECKED(call)
#endif

emulated_dim3 threadIdx, blockIdx, blockDim, gridDim;
alignas(128) unsigned char emulated_dynamic_shared[256 * 1024 + 4096];

// Static shared memory is all that the kernels' own object keeps in .bss; these are the ends of it (see emulated.py).
extern "C" char emulated_shared_begin[], emulated_shared_end[];

namespace {

constexpr unsigned MAX_THREADS = 1024;  // of a block
constexpr unsigned MAX_CLUSTER = 8;     // blocks of a cluster
constexpr unsigned MAX_FIBERS = MAX_CLUSTER * MAX_THREADS;
constexpr size_t BAND = 4096;  // behind dynamic shared memory, and nobody's

enum State { READY, WAITS, DONE };

// A thread, and the meeting it waits in.
struct Fiber : Meeting {
    Context context;
    State state;
    emulated_dim3 index;
    unsigned block;  // of the cluster
    unsigned phase;  // of the cluster's barrier, when it arrived there
    char *stack;
    unsigned long long result;  // of its last meeting
};

// A block of the cluster that runs. All blocks have their shared memory in the same place: whose it is now runs, the
// others' is kept aside.
struct Block {
    emulated_dim3 index;
    unsigned alive;       // threads that have not returned
    unsigned at_barrier;  // that wait in a barrier of the block
    char *aside;
};

Fiber fibers[MAX_FIBERS];
Block blocks[MAX_CLUSTER];
Context scheduler;
unsigned threads;     // of a block
unsigned cluster;     // blocks of a cluster
unsigned all;         // threads of a cluster
unsigned current;     // the block whose shared memory is in place
unsigned arrived;     // threads at the cluster's barrier
unsigned phase;       // how often they all were there
unsigned alive;       // threads of the cluster
unsigned running;     // the fiber that runs
size_t dynamic;       // bytes of dynamic shared memory
unsigned ready[MAX_FIBERS];
unsigned ready_first, ready_count;
uint64_t order_seed;
uint64_t random_state;
void (*entry)(const void *const *);
const void *const *arguments;
char failure[4096];
bool failed;

uint32_t chance() {  // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(random_state * 0x2545f4914f6cdd1dull >> 32);
}

// Orders. 0: the lowest thread first, each warp as far as it comes. 1: the highest first. 2: all by turns, so that
// every thread has come as far as the others. From 3 on: by chance.
void make_ready(unsigned fiber) {
    fibers[fiber].state = READY;
    ready[(ready_first + ready_count++) % MAX_FIBERS] = fiber;
}

// The fibers begin..end (of those that `which` holds) become ready, so that the order takes them in its own way.
template <class F> void make_all_ready(unsigned begin, unsigned end, F which) {
    for (unsigned i = begin; i < end; ++i) {
        const unsigned fiber = order_seed == 0 ? begin + end - 1 - i : i;
        if (which(fiber))
            make_ready(fiber);
    }
}

unsigned take_ready() {
    unsigned at = ready_count - 1;
    if (order_seed == 2)
        at = 0;
    else if (order_seed > 2)
        at = chance() % ready_count;
    const unsigned place = (ready_first + at) % MAX_FIBERS;
    const unsigned fiber = ready[place];
    if (at == 0) {
        ready_first = (ready_first + 1) % MAX_FIBERS;
    } else {
        ready[place] = ready[(ready_first + ready_count - 1) % MAX_FIBERS];
    }
    --ready_count;
    return fiber;
}

void fail(const char *format, ...) {
    if (failed)
        return;
    failed = true;
    va_list list;
    va_start(list, format);
    vsnprintf(failure, sizeof failure, format, list);
    va_end(list);
}

void leave() { emulated_switch(&fibers[running].context, &scheduler); }

// Nobody comes back after a failure.
void give_up() {
    for (;;)
        leave();
}

// --- Meetings.

// Of the warp that begins with this fiber.
unsigned lanes(unsigned first) {
    const unsigned left = threads - first % threads;
    return left < 32 ? left : 32;
}

unsigned warp_of(unsigned fiber) { return fiber - fiber % threads % 32; }

// If all lanes that the lane names, as far as they are left, wait in the same place, they go on.
void settle_warp(unsigned first, unsigned lane) {
    Fiber *warp = fibers + first;
    const Fiber &mine = warp[lane];
    unsigned present = 0;
    for (unsigned i = 0; i < lanes(first); ++i) {
        if (!(mine.mask >> i & 1u) || warp[i].state == DONE)
            continue;
        // A barrier of a warp is the same wherever it stands; the others must be one instruction.
        if (warp[i].state != WAITS || warp[i].kind != mine.kind || warp[i].mask != mine.mask ||
            (mine.kind != EMULATED_SYNCWARP && (warp[i].line != mine.line || strcmp(warp[i].file, mine.file) != 0)))
            return;
        present |= 1u << i;
    }
    for (unsigned i = 0; i < 32; ++i)
        if (present >> i & 1u)
            warp[i].result = among(warp, present, warp[i], i);
    if (mine.kind == EMULATED_SYNCWARP) {
        CHECKED(warp_met(first, present));
    }
    make_all_ready(first, first + lanes(first), [=](unsigned fiber) { return (present >> (fiber - first) & 1u) != 0; });
}

void settle_block(unsigned which) {
    Block &block = blocks[which];
    const unsigned first = which * threads, end = first + threads;
    if (block.alive == 0 || block.at_barrier != block.alive)
        return;
    const Fiber *one = nullptr;
    unsigned count = 0;
    for (unsigned i = first; i < end; ++i) {
        if (fibers[i].state == DONE)
            continue;
        if (one && (fibers[i].kind != one->kind || fibers[i].line != one->line || strcmp(fibers[i].file, one->file)))
            return;
        one = &fibers[i];
        count += fibers[i].value != 0;
    }
    const unsigned result = one->kind == EMULATED_SYNCTHREADS_OR    ? count != 0
                            : one->kind == EMULATED_SYNCTHREADS_AND ? count == block.alive
                                                                    : count;
    for (unsigned i = first; i < end; ++i)
        fibers[i].result = result;
    block.at_barrier = 0;
    CHECKED(block_met(which));
    make_all_ready(first, end, [](unsigned fiber) { return fibers[fiber].state == WAITS; });
}

void settle_cluster() {
    if (alive == 0 || arrived != alive)
        return;
    arrived = 0;
    ++phase;
    make_all_ready(0, all, [](unsigned fiber) {
        return fibers[fiber].state == WAITS && fibers[fiber].kind == EMULATED_CLUSTER_WAIT;
    });
}

void run_thread() {
    entry(arguments);
    Fiber &mine = fibers[running];
    mine.state = DONE;
    --blocks[mine.block].alive;
    --alive;
    // Whoever waited for this thread alone goes on without it.
    const unsigned first = warp_of(running);
    for (unsigned i = 0; i < lanes(first); ++i)
        if (fibers[first + i].state == WAITS && fibers[first + i].kind >= EMULATED_SYNCWARP &&
            fibers[first + i].kind != EMULATED_CLUSTER_WAIT)
            settle_warp(first, i);
    settle_block(mine.block);
    settle_cluster();
    leave();
}

void report_deadlock() {
    int n = snprintf(failure, sizeof failure, "deadlock: nobody can go on");
    failed = true;
    for (unsigned i = 0; i < all && n < (int)sizeof failure - 300;) {
        const Fiber &f = fibers[i];
        unsigned end = i + 1;
        while (end < all && fibers[end].block == f.block && fibers[end].state == f.state &&
               (f.state == DONE || (fibers[end].kind == f.kind && fibers[end].line == f.line &&
                                    fibers[end].mask == f.mask && fibers[end].file == f.file)))
            ++end;
        const emulated_dim3 &at = blocks[f.block].index;
        n += snprintf(failure + n, sizeof failure - n, "\n  block (%u, %u, %u), threads %u..%u: ", at.x, at.y, at.z,
                      i % threads, (end - 1) % threads);
        if (f.state == DONE)
            n += snprintf(failure + n, sizeof failure - n, "returned");
        else
            n += snprintf(failure + n, sizeof failure - n, "in %s at %s:%d, mask %08x", NAMES[f.kind], f.file, f.line,
                          f.mask);
        i = end;
    }
}

// --- Shared memory. Not memset and memcpy: between the arrays lie the sanitizer's own bytes.

__attribute__((no_sanitize("address"))) void poison(char *begin, char *end) {
    for (volatile char *at = begin; at < end; ++at)
        *at = (char)POISON;
}

__attribute__((no_sanitize("address"))) void copy(char *to, const char *from, size_t bytes) {
    volatile char *into = to;
    for (size_t i = 0; i < bytes; ++i)
        into[i] = from[i];
}

char *dynamic_begin() { return (char *)emulated_dynamic_shared; }
size_t static_bytes() { return (size_t)(emulated_shared_end - emulated_shared_begin); }

// The shared memory of this block comes into its place.
void bring(unsigned block) {
    if (block == current)
        return;
    copy(blocks[current].aside, emulated_shared_begin, static_bytes());
    copy(blocks[current].aside + static_bytes(), dynamic_begin(), dynamic);
    copy(emulated_shared_begin, blocks[block].aside, static_bytes());
    copy(dynamic_begin(), blocks[block].aside + static_bytes(), dynamic);
    current = block;
}

void run_cluster() {
    poison(emulated_shared_begin, emulated_shared_end);
    poison(dynamic_begin(), dynamic_begin() + dynamic + BAND);
    all = alive = threads * cluster;
    current = arrived = phase = ready_first = ready_count = 0;
    for (unsigned b = 0; b < cluster; ++b) {
        blocks[b].alive = threads;
        blocks[b].at_barrier = 0;
        if (cluster > 1) {
            blocks[b].aside = (char *)realloc(blocks[b].aside, static_bytes() + dynamic);
            memset(blocks[b].aside, POISON, static_bytes() + dynamic);
        }
    }
    for (unsigned i = 0; i < all; ++i) {
        Fiber &f = fibers[i];
        const unsigned in_block = i % threads;
        f.block = i / threads;
        f.index = {in_block % blockDim.x, in_block / blockDim.x % blockDim.y, in_block / blockDim.x / blockDim.y};
        f.file = "";
        f.line = 0;
        f.phase = ~0u;
        if (!f.stack)
            f.stack = new_stack();
        prepare(f.context, f.stack, run_thread);
    }
    CHECKED(begin_cluster());
    make_all_ready(0, all, [](unsigned) { return true; });
    while (alive && !failed) {
        if (ready_count == 0) {
            report_deadlock();
            break;
        }
        running = take_ready();
        bring(fibers[running].block);
        blockIdx = blocks[current].index;
        threadIdx = fibers[running].index;
        emulated_switch(&scheduler, &fibers[running].context);
    }
    for (size_t i = 0; i < BAND; ++i)
        if (emulated_dynamic_shared[dynamic + i] != POISON) {
            const emulated_dim3 &at = blocks[0].index;
            fail("block (%u, %u, %u) writes %zu bytes past its dynamic shared memory", at.x, at.y, at.z, i + 1);
            break;
        }
#if defined(__SANITIZE_ADDRESS__)
    if (failed)  // frames that will never be left
        for (unsigned i = 0; i < all; ++i)
            __asan_unpoison_memory_region(fibers[i].stack, STACK);
#endif
}

}  // namespace

extern "C" unsigned long long emulated_meet(int kind, unsigned mask, unsigned long long value, unsigned lane,
                                            unsigned width, const char *file, int line) {
    Fiber &mine = fibers[running];
    mine.kind = kind;
    mine.mask = mask;
    mine.value = value;
    mine.lane = lane;
    mine.width = width;
    mine.file = file;
    mine.line = line;
    mine.state = WAITS;
    if (kind < EMULATED_SYNCWARP) {
        ++blocks[mine.block].at_barrier;
        settle_block(mine.block);
    } else {
        const unsigned first = warp_of(running);
        if (!(mask >> (running - first) & 1u)) {
            fail("%s at %s:%d: thread %u is not in its own mask %08x", NAMES[kind], file, line, running, mask);
            give_up();
        }
        if (width & (width - 1) || width > 32) {
            fail("%s at %s:%d: width %u", NAMES[kind], file, line, width);
            give_up();
        }
        settle_warp(first, running - first);
    }
    leave();
    return mine.result;
}

extern "C" void emulated_pause(int certain) {
    if (!certain && (order_seed < 3 || chance() % 4 != 0))
        return;
    // Behind all others, or a thread that waits by looking would never let them run.
    if (order_seed < 2) {  // the others are taken from the end
        fibers[running].state = READY;
        ready_first = (ready_first + MAX_FIBERS - 1) % MAX_FIBERS;
        ready[ready_first] = running;
        ++ready_count;
    } else {
        make_ready(running);
    }
    leave();
}

extern "C" unsigned emulated_cluster_rank() { return fibers[running].block; }
extern "C" unsigned emulated_cluster_size() { return cluster; }

extern "C" void *emulated_cluster_map(const void *mine, unsigned rank, const char *file, int line) {
    char *at = (char *)mine;
    const bool is_static = at >= emulated_shared_begin && at < emulated_shared_end;
    if (!is_static && (at < dynamic_begin() || at >= dynamic_begin() + dynamic))
        emulated_fail("the address is not in shared memory", file, line);
    if (rank >= cluster)
        emulated_fail("no such block in the cluster", file, line);
    if (rank == current)
        return at;
    if (blocks[rank].alive == 0)
        emulated_fail("that block has returned, and its shared memory is gone", file, line);
    return blocks[rank].aside +
           (is_static ? at - emulated_shared_begin : at - dynamic_begin() + (long)static_bytes());
}

extern "C" void emulated_cluster_arrive(const char *file, int line) {
    if (fibers[running].phase == phase)
        emulated_fail("the thread has arrived before, and has not waited", file, line);
    fibers[running].phase = phase;
    CHECKED(cluster_arrived(running));
    ++arrived;
    settle_cluster();
}

extern "C" void emulated_cluster_wait(const char *file, int line) {
    Fiber &mine = fibers[running];
    if (mine.phase == ~0u)
        emulated_fail("the thread waits, and has not arrived", file, line);
    if (mine.phase == phase) {
        mine.kind = EMULATED_CLUSTER_WAIT;
        mine.mask = ~0u;
        mine.file = file;
        mine.line = line;
        mine.state = WAITS;
        leave();
    }
    mine.phase = ~0u;
    CHECKED(cluster_waited(running));
}

#if defined(MOECORE_EMULATED_CHECKED)
checks::Now checks::now() {
    static char *aside[MAX_CLUSTER];
    for (unsigned b = 0; b < cluster; ++b)
        aside[b] = b == current ? nullptr : blocks[b].aside;
    const Fiber &f = fibers[running];
    return {running, f.block, threads, f.stack, STACK, dynamic_begin(), dynamic, sizeof emulated_dynamic_shared, aside,
            cluster, current};
}

void checks::stop(const char *why) {
    fail("block (%u, %u, %u), thread %u: %s", blockIdx.x, blockIdx.y, blockIdx.z, running % threads, why);
    give_up();
}

extern "C" __attribute__((visibility("default"))) void emulated_ranges(const checks::Range *ranges, size_t count,
                                                                      int all_known) {
    checks::begin_launch(ranges, count, all_known != 0);
}
#endif

extern "C" void emulated_fail(const char *message, const char *file, int line) {
    fail("%s at %s:%d, block (%u, %u, %u), thread %u", message, file, line, blockIdx.x, blockIdx.y, blockIdx.z,
         running % threads);
    give_up();
}

// One launch. Null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char *
emulated_launch(void (*kernel)(const void *const *), const unsigned *grid, const unsigned *block, unsigned blocks_of_cluster,
                size_t dynamic_bytes, const void *const *args, uint64_t seed) {
    failed = false;
    failure[0] = 0;
    threads = block[0] * block[1] * block[2];
    cluster = blocks_of_cluster;
    dynamic = dynamic_bytes;
    if (threads == 0 || threads > MAX_THREADS)
        return "a block has 1 to 1024 threads";
    if (cluster == 0 || cluster > MAX_CLUSTER || grid[0] % cluster != 0)
        return "a cluster has 1 to 8 blocks, side by side in x, and the grid is made of whole clusters";
    if (dynamic > sizeof emulated_dynamic_shared - BAND)
        return "dynamic shared memory: more than 256 KiB";
    entry = kernel;
    arguments = args;
    order_seed = seed;
    random_state = (seed + 1) * 0x9e3779b97f4a7c15ull;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const uint64_t count = (uint64_t)grid[0] * grid[1] * grid[2] / cluster;
    // They may run in any order, too: from the last, or from somewhere in the middle on.
    const uint64_t begin = seed < 3 || count == 0 ? 0 : chance() % count;
    for (uint64_t i = 0; i < count && !failed; ++i) {
        const uint64_t turned = (begin + i) % count;
        const uint64_t first = (seed % 2 ? count - 1 - turned : turned) * cluster;
        for (unsigned b = 0; b < cluster; ++b) {
            const uint64_t at = first + b;
            blocks[b].index = {(unsigned)(at % grid[0]), (unsigned)(at / grid[0] % grid[1]),
                               (unsigned)(at / grid[0] / grid[1])};
        }
        run_cluster();
    }
    return failed ? failure : nullptr;
}
