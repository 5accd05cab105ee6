"""How `kernels.py` times: all sides of a row in turns, as CUDA graphs and as eager calls."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda"))
from timing import BUSY  # the path comes first

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 20
REPLAYS = 15
#: Bytes that a row's inputs have together, so that the 50 MB of L2 hold none of them from one turn to the next.
ROTATED = 150_000_000
#: Below so many tokens everything lies in L2 anyway, and rotation is over a few sets only.
SMALL_TOKENS = 4096


class LostError(Exception):
    """The GPU's context is lost: nothing else can be measured in this process."""


@dataclass
class Figures:
    """Of one side of one row; microseconds. What was not measured is None."""

    graph: float | None = None
    spread: float | None = None
    eager: float | None = None
    agrees: bool | None = None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def sets_for(tokens: int, size: int) -> int:
    """How many sets of inputs of `size` bytes a row rotates over."""
    if tokens < SMALL_TOKENS:
        return 4
    return max(2, min(64, -(-ROTATED // max(size, 1))))


def alive() -> None:
    """Raises `LostError` if an earlier error has taken the context."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise LostError(str(error).splitlines()[0]) from error


class Clock:
    """Times the sides of a row. Without a GPU each side runs once, and nothing is timed."""

    def __init__(self, quick: bool) -> None:
        self.gpu = torch.cuda.is_available()
        self.replays = 7 if quick else REPLAYS
        self.eager_calls = 50 if quick else 100

    def captured(self, run: Callable[[int], Any], sets: int, calls: int) -> torch.cuda.CUDAGraph:
        """`calls` calls over all sets as one graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in range(calls):
                run(call % sets)
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def row(
        self,
        sides: dict[str, Callable[[int], Any]],
        sets: int,
        eager: bool = True,
        begin: Callable[[str], None] = lambda _: None,
    ) -> dict[str, Figures]:
        """All sides: `sides[name](i)` is one call on input set i. A side that fails has its error, others go on.

        `begin` is told which side runs next for the first time.
        """
        found = {name: Figures() for name in sides}
        if not self.gpu:
            return found
        calls = max(CALLS, sets)
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        times: dict[str, list[float]] = {}
        for name, run in sides.items():
            begin(name)
            try:
                for i in range(3):  # compiles, loads, fills caches
                    run(i % sets)
                torch.cuda.synchronize()
                if eager:
                    found[name].eager = self.eager(run, sets)
                graphs[name], times[name] = self.captured(run, sets, calls), []
            except Exception as error:
                found[name].error = said(error)
                alive()
        begin("replays")
        for _ in range(self.replays):
            for name, graph in graphs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(BUSY)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) * 1e3 / calls)
        for name, taken in times.items():
            found[name].graph = statistics.median(taken)
            found[name].spread = (max(taken) - min(taken)) / found[name].graph
        graphs.clear()
        return found

    def eager(self, run: Callable[[int], Any], sets: int) -> float:
        """Wall time of a call, many in a row and the GPU's end included. Few calls where one takes long."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(0)
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        calls = max(3, min(self.eager_calls, int(0.03 / once)))
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            for call in range(calls):
                run(call % sets)
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - start) / calls * 1e6)
        return statistics.median(taken)

    def copied(self) -> float:
        """GB/s, read and write, of the fastest of some copies of 2 GiB."""
        source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
        target, best = torch.empty_like(source), 0.0
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            best = max(best, 2 * source.numel() / begin.elapsed_time(end) / 1e6)
        return best

    def floors(self) -> dict[str, float]:
        """GB/s of a large copy on the device, read and write; and a kernel of one element in a graph like any row."""
        if not self.gpu:
            return {"copy_gbs": 3000.0, "empty_us": 1.3}
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        one = torch.zeros(1, device="cuda")
        found = self.row({"copy": lambda i: target.copy_(source), "empty": lambda i: one.add_(1)}, 1, eager=True)
        copy, empty = found["copy"], found["empty"]
        assert copy.graph, copy.error
        assert empty.graph, empty.error
        return {
            "copy_gbs": max(self.copied(), 2 * source.numel() / copy.graph / 1e3),
            "empty_us": empty.graph,
            "empty_eager_us": empty.eager or 0.0,
        }


def launches(run: Callable[[int], Any]) -> list[str]:
    """Names of the kernels, copies and fills of one call, as the profiler saw them."""
    if not torch.cuda.is_available():
        run(0)
        return []
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        run(0)
    torch.cuda.synchronize()
    for _ in range(2):  # the first profile of a process can miss events
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            run(0)
            torch.cuda.synchronize()
    return [event.name for event in profiled.events() if "CUDA" in str(event.device_type)]


def said(error: BaseException) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
