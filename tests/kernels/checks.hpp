// What emulate.cpp tells checks.cpp, and the other way round. Only in a build with checks.
#pragma once
#include <cstddef>

namespace checks {

// Memory that a launch may touch.
struct Range {
    const char *begin;
    size_t bytes;
};

// Where the running thread is, and what it may touch besides.
struct Now {
    unsigned fiber;
    unsigned block;    // of the cluster
    unsigned threads;  // of a block
    const char *stack;
    size_t stack_bytes;
    const char *dynamic;
    size_t dynamic_bytes;
    size_t dynamic_room;  // that no launch may have more of
    char *const *aside;  // of each block of the cluster, or null
    unsigned cluster;
    unsigned current;
};
Now now();

void begin_launch(const Range *ranges, size_t count, bool all_known);
void begin_cluster();
void block_met(unsigned block);
void warp_met(unsigned first, unsigned present);
void cluster_arrived(unsigned fiber);
void cluster_waited(unsigned fiber);
void stop(const char *why);  // the running thread does not come back

}  // namespace checks
