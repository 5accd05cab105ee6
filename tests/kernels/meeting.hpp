// What the lanes of a warp get when they meet in an intrinsic.
#pragma once
#include <cstdint>
#include <cstring>

#include "emulate.hpp"

const char *const NAMES[] = {
    "__syncthreads",     "__syncthreads_or",  "__syncthreads_and", "__syncthreads_count", "__syncwarp",
    "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",     "__ballot_sync",
    "__any_sync",        "__all_sync",        "__reduce_add_sync", "__reduce_min_sync",   "__reduce_max_sync",
    "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",    "__reduce_xor_sync",
    "__match_any_sync",  "__match_all_sync",  "the barrier of the cluster",
};

constexpr unsigned char POISON = 0xa5;

// What a lane brings to a meeting.
struct Meeting {
    int kind;
    unsigned mask;
    unsigned lane;
    unsigned width;
    unsigned long long value;
    const char *file;
    int line;
};

// What lane `self` of `warp` gets; `present`: the lanes that are there.
template <class Lane>
static unsigned long long among(const Lane *warp, unsigned present, const Lane &mine, unsigned self) {
    unsigned long long out = mine.value;
    unsigned source = self;
    const unsigned width = mine.width;
    const unsigned low = width ? self & ~(width - 1) : 0, high = low + (width ? width - 1 : 0);
    switch (mine.kind) {
    case EMULATED_SHFL:
        source = low + (mine.lane & (width - 1));
        break;
    case EMULATED_SHFL_UP:
        source = self - low >= mine.lane ? self - mine.lane : self;
        break;
    case EMULATED_SHFL_DOWN:
        source = mine.lane <= high - self ? self + mine.lane : self;
        break;
    case EMULATED_SHFL_XOR:
        source = (self ^ mine.lane) <= high ? self ^ mine.lane : self;
        break;
    case EMULATED_SYNCWARP:
        return 0;
    default: {
        bool first = true;
        bool same = true;
        unsigned ballot = 0, match = 0;
        uint32_t sum = 0;
        for (unsigned i = 0; i < 32; ++i) {
            if (!(present >> i & 1u))
                continue;
            const uint32_t v = (uint32_t)warp[i].value;
            ballot |= (unsigned)(v != 0) << i;
            match |= (unsigned)(warp[i].value == mine.value) << i;
            same = same && warp[i].value == mine.value;
            if (first)
                sum = v;
            else if (mine.kind == EMULATED_ADD)
                sum += v;
            else if (mine.kind == EMULATED_MIN)
                sum = v < sum ? v : sum;
            else if (mine.kind == EMULATED_MAX)
                sum = v > sum ? v : sum;
            else if (mine.kind == EMULATED_MIN_SIGNED)
                sum = (int32_t)v < (int32_t)sum ? v : sum;
            else if (mine.kind == EMULATED_MAX_SIGNED)
                sum = (int32_t)v > (int32_t)sum ? v : sum;
            else if (mine.kind == EMULATED_AND)
                sum &= v;
            else if (mine.kind == EMULATED_OR)
                sum |= v;
            else if (mine.kind == EMULATED_XOR)
                sum ^= v;
            first = false;
        }
        switch (mine.kind) {
        case EMULATED_BALLOT:
            return ballot;
        case EMULATED_ANY:
            return ballot != 0;
        case EMULATED_ALL:
            return ballot == present;
        case EMULATED_MATCH_ANY:
            return match;
        case EMULATED_MATCH_ALL:
            return same ? present : 0;
        default:
            return sum;
        }
    }
    }
    if (present >> source & 1u)
        return warp[source].value;
    memset(&out, POISON, sizeof out);  // a lane that is not there: the value is undefined
    return out;
}
