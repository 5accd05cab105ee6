"""Times on the GPU's own clock, and the rig that all of them use."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

#: Cycles that the GPU is kept busy with while the host enqueues what is timed: about 150 us.
BUSY = 250_000


def gpu_us(run: Callable[[], Any], repeats: int = 20, warm_up: int = 3) -> float:
    """Median microseconds of what `run` enqueues, with the host out of the way."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def host_us(run: Callable[[], Any], calls: int = 200, repeats: int = 7) -> float:
    """Median microseconds of host time of one `run`, which only enqueues."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - begin) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def graph_us(run: Callable[[], Any], launches: int, repeats: int = 20) -> float:
    """Median microseconds of one of `launches` launches that `run` makes, replayed as a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return gpu_us(graph.replay, repeats) / launches


def raw_stream() -> int:
    """torch's current stream, by the cheapest way there is."""
    return int(torch._C._cuda_getCurrentRawStream(0))
