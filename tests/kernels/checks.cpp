// Every access of the kernels, checked: g++ calls the functions below before each of them, as it does for its thread
// sanitizer. Whether it is inside of a buffer; whether shared memory was written before it is read; and whether two
// threads touch the same bytes, one of them writing, with nothing between them that orders it: a barrier of the block, of
// the cluster, or __syncwarp. Shuffles and votes order nothing. So a barrier that is missing is found in any schedule.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "checks.hpp"

extern "C" char emulated_shared_begin[], emulated_shared_end[];
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];

namespace checks {
namespace {

constexpr unsigned MAX_FIBERS = 8 * 1024;
constexpr unsigned MAX_RANGES = 64;
// Bytes with one record: no kernel lets two threads write bytes side by side.
constexpr size_t GRAIN = 2;
constexpr size_t PAGE = 4096;

struct Access {
    uint32_t run;  // the cluster; 0: none
    uint32_t where;
    uint32_t clock;
    uint16_t fiber;
    uint16_t barriers;
    uint16_t cluster_arrivals;
    bool atomic;
};
struct Cell {
    Access write;
    Access reads[4];
};
struct Page {
    Cell cells[PAGE / GRAIN];
};

std::unordered_map<uint64_t, Page *> pages;
uint64_t last_key = ~0ull;
Page *last_page;
Range ranges[MAX_RANGES];
size_t range_count;
bool all_ranges_known;
uint32_t run;        // counts clusters, over all launches
uint32_t first_run;  // of this launch
uint16_t barriers[8];
uint16_t arrivals[MAX_FIBERS], waits[MAX_FIBERS];
uint32_t clocks[MAX_FIBERS];
uint32_t known[MAX_FIBERS][32];  // the clocks of the warp's lanes, as far as __syncwarp has told

Cell &cell(uint64_t at) {
    const uint64_t key = at / PAGE;
    if (key != last_key) {
        Page *&page = pages[key];
        if (!page)
            page = (Page *)calloc(1, sizeof(Page));
        last_key = key;
        last_page = page;
    }
    return last_page->cells[at % PAGE / GRAIN];
}

bool ordered(const Access &before, const Now &t) {
    if (before.run != run)
        return false;
    if (before.fiber == t.fiber)
        return true;
    if (before.cluster_arrivals < waits[t.fiber])
        return true;
    const unsigned its_block = before.fiber / t.threads;
    if (its_block != t.block)
        return false;
    if (before.barriers < barriers[t.block])
        return true;
    const unsigned in_block = before.fiber % t.threads;
    return in_block / 32 == t.fiber % t.threads / 32 && known[t.fiber][in_block % 32] >= before.clock;
}

uint32_t here;  // the access that is being checked, in bytes from the start of the library

void fail(const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    const int n = vsnprintf(text, sizeof text - 32, format, list);
    va_end(list);
    snprintf(text + n, 32, " at [+0x%x]", here);
    stop(text);
}

enum Kind { READ, WRITE, ATOMIC };

[[gnu::noinline]] void race(const Access &other, bool other_writes, const Now &t, Kind kind, const char *what) {
    char whose[64] = "of another block";
    if (other.run == run)
        snprintf(whose, sizeof whose, "%u of block %u of the cluster", other.fiber % t.threads, other.fiber / t.threads);
    fail("a race in %s: it %s what thread %s %s at [+0x%x], and nothing orders the two;", what,
         kind == READ ? "reads" : "writes", whose, other_writes ? "writes" : "reads", other.where);
}

void touch(const void *address, size_t bytes, Kind kind, const void *pc) {
    const Now t = now();
    const char *at = (const char *)address;
    here = (uint32_t)((const char *)pc - __ehdr_start);
    if (at >= t.stack && at < t.stack + t.stack_bytes)
        return;
    uint64_t place = (uint64_t)at;
    bool shared = false;
    const char *what = "global memory";
    if (at >= emulated_shared_begin && at + bytes <= emulated_shared_end) {
        place = 1ull << 60 | (uint64_t)t.current << 40 | (uint64_t)(at - emulated_shared_begin);
        shared = true;
    } else if (at >= t.dynamic && at + bytes <= t.dynamic + t.dynamic_bytes) {
        place = 2ull << 60 | (uint64_t)t.current << 40 | (uint64_t)(at - t.dynamic);
        shared = true;
    } else if (at >= __ehdr_start && at < _end) {
        if (at >= t.dynamic && at < t.dynamic + t.dynamic_room)
            fail("%zu bytes from byte %td on of %zu bytes of dynamic shared memory", bytes, at - t.dynamic, t.dynamic_bytes);
        return;  // tables of constants
    } else {
        const size_t static_bytes = (size_t)(emulated_shared_end - emulated_shared_begin);
        for (unsigned b = 0; b < t.cluster && !shared; ++b)
            if (t.aside[b] && at >= t.aside[b] && at < t.aside[b] + static_bytes + t.dynamic_bytes) {
                const size_t off = (size_t)(at - t.aside[b]);
                place = (off < static_bytes ? 1ull << 60 | off : 2ull << 60 | (off - static_bytes)) | (uint64_t)b << 40;
                shared = true;
            }
        bool inside = shared;
        const Range *nearest = nullptr;
        for (size_t i = 0; i < range_count && !inside; ++i) {
            inside = at >= ranges[i].begin && at + bytes <= ranges[i].begin + ranges[i].bytes;
            if (at + 4096 >= ranges[i].begin && at < ranges[i].begin + ranges[i].bytes + 4096)
                nearest = ranges + i;
        }
        if (!inside && all_ranges_known) {
            if (nearest)
                fail("%s %zu bytes from byte %td on of a buffer of %zu bytes", kind == READ ? "reads" : "writes", bytes,
                     at - nearest->begin, nearest->bytes);
            else
                fail("%s memory that is no buffer's", kind == READ ? "reads" : "writes");
        }
    }
    if (shared)
        what = "shared memory";
    Access mine = {};
    mine.run = run;
    mine.where = here;
    mine.clock = clocks[t.fiber];
    mine.fiber = (uint16_t)t.fiber;
    mine.barriers = barriers[t.block];
    mine.cluster_arrivals = arrivals[t.fiber];
    mine.atomic = kind == ATOMIC;
    // Another block's shared memory was another memory.
    const uint32_t since = shared ? run : first_run;
    for (uint64_t grain = place / GRAIN; grain <= (place + bytes - 1) / GRAIN; ++grain) {
        Cell &c = cell(grain * GRAIN);
        const bool written = c.write.run >= since && c.write.run != 0;
        if (shared && !written && kind != WRITE)
            fail("reads shared memory that nobody has written");
        if (written && !ordered(c.write, t) && !(c.write.atomic && kind == ATOMIC))
            race(c.write, true, t, kind, what);
        if (kind == READ) {
            unsigned into = (unsigned)(t.fiber % 4);
            for (unsigned i = 0; i < 4; ++i)
                if (c.reads[i].run < since || ordered(c.reads[i], t)) {
                    into = i;
                    break;
                }
            c.reads[into] = mine;
            continue;
        }
        for (Access &read : c.reads) {
            if (read.run >= since && read.run != 0 && !ordered(read, t))
                race(read, false, t, kind, what);
            read.run = 0;
        }
        c.write = mine;
    }
}

}  // namespace

void begin_launch(const Range *given, size_t count, bool all_known) {
    all_ranges_known = all_known && count <= MAX_RANGES;
    range_count = count < MAX_RANGES ? count : MAX_RANGES;
    memcpy(ranges, given, range_count * sizeof(Range));
    first_run = run + 1;
    if (pages.size() > 4096) {
        for (auto &page : pages)
            free(page.second);
        pages.clear();
        last_key = ~0ull;
    }
}

void begin_cluster() {
    ++run;
    memset(barriers, 0, sizeof barriers);
    memset(arrivals, 0, sizeof arrivals);
    memset(waits, 0, sizeof waits);
    memset(known, 0, sizeof known);
    for (uint32_t &clock : clocks)
        clock = 1;
}

void block_met(unsigned block) { ++barriers[block]; }

void warp_met(unsigned first, unsigned present) {
    uint32_t all[32] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(present >> lane & 1u))
            continue;
        known[first + lane][lane] = clocks[first + lane]++;
        for (unsigned i = 0; i < 32; ++i)
            all[i] = all[i] > known[first + lane][i] ? all[i] : known[first + lane][i];
    }
    for (unsigned lane = 0; lane < 32; ++lane)
        if (present >> lane & 1u)
            memcpy(known[first + lane], all, sizeof all);
}

void cluster_arrived(unsigned fiber) { ++arrivals[fiber]; }
void cluster_waited(unsigned fiber) { ++waits[fiber]; }

}  // namespace checks

#define EMULATED_PC __builtin_return_address(0)
#define EMULATED_ACCESS(bytes)                                                                                         \
    void __tsan_read##bytes(void *at) { checks::touch(at, bytes, checks::READ, EMULATED_PC); }                        \
    void __tsan_write##bytes(void *at) { checks::touch(at, bytes, checks::WRITE, EMULATED_PC); }                       \
    void __tsan_unaligned_read##bytes(void *at) { checks::touch(at, bytes, checks::READ, EMULATED_PC); }               \
    void __tsan_unaligned_write##bytes(void *at) { checks::touch(at, bytes, checks::WRITE, EMULATED_PC); }
extern "C" {
void __tsan_init() {}
EMULATED_ACCESS(1)
EMULATED_ACCESS(2)
EMULATED_ACCESS(4)
EMULATED_ACCESS(8)
EMULATED_ACCESS(16)
void __tsan_read_range(void *at, unsigned long bytes) { checks::touch(at, bytes, checks::READ, EMULATED_PC); }
void __tsan_write_range(void *at, unsigned long bytes) { checks::touch(at, bytes, checks::WRITE, EMULATED_PC); }
void emulated_atomic(const void *at, unsigned bytes, const void *pc) { checks::touch(at, bytes, checks::ATOMIC, pc); }
}
