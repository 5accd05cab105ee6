"""How `offload.py` runs and times a model: a prompt, then tokens one after another, in one of several modes."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from offload_model import use_experts
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_model import Replay

#: Calls of the runtime and of the driver after which the host has waited for the GPU.
WAITS = {
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemcpy2D",
    "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2",
}  # fmt: skip
STEP = "bench step"


@dataclass(frozen=True)
class Mode:
    """How a decode step runs."""

    name: str
    static: bool = False
    compiled: bool = False
    captured: bool = False


EAGER = Mode("eager")
COMPILE = Mode("compile", static=True, compiled=True)
COMPILE_GRAPH = Mode("compile, one graph", static=True, compiled=True, captured=True)
GRAPH = Mode("eager kernels, one graph", static=True, captured=True)


def synchronize(device: torch.device) -> None:
    """Waits for everything that runs on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timeline:
    """Moments on the device's clock; on a CPU its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Now: when the device has come here."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def gaps(self) -> list[float]:
        """Milliseconds from each mark to the next."""
        synchronize(self.device)
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


@dataclass
class Timing:
    """Tokens that ran one after another: milliseconds of each on the device's clock, and of all on the host's."""

    tokens: list[float] = field(default_factory=list)
    wall: float = 0.0

    def summary(self) -> dict[str, float]:
        """What the tables say."""
        return {
            "tokens": len(self.tokens),
            "p50": statistics.median(self.tokens),
            "p95": float(np.percentile(self.tokens, 95)),
            "mean": statistics.fmean(self.tokens),
            "wall": self.wall / len(self.tokens),
        }


class Lane:
    """A batch of sequences: its prompt, its next token, where that stands, and what holds keys and values.

    `experts` names the functions that run the experts in prefill and in decode. The static cache is made once, as
    compiled code is for the very tensors that it has seen.
    """

    def __init__(
        self, model: Any, replay: Replay, batch: int, prompt: int, room: int, experts: tuple[str, str]
    ) -> None:
        self.model, self.replay, self.batch, self.room, self.experts = model, replay, batch, room, experts
        self.device = replay.counter.device
        vocabulary = model.config.vocab_size
        chance = torch.Generator(device=self.device).manual_seed(2)
        self.prompt = torch.randint(vocabulary, (batch, prompt), generator=chance, device=self.device)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.static = StaticCache(config=model.config, max_cache_len=room)
        # As transformers' generate() compiles it, but for the mode: the graph is captured by `Decode`.
        self.compiled: Callable[..., Any] = torch.compile(model.__call__, dynamic=False)

    def prefill(self, mode: Mode) -> tuple[Any, float]:
        """The prompt: the cache, and milliseconds until the host has the first token."""
        self.replay.use(self.batch)
        self.replay.counter.zero_()
        use_experts(self.model, self.experts[0])
        if mode.static:
            self.static.reset()
        cache: Any = self.static if mode.static else DynamicCache(config=self.model.config)
        length = self.prompt.shape[1]
        positions = torch.arange(length, device=self.device).unsqueeze(0)
        synchronize(self.device)
        start = time.perf_counter()
        self._forward(self.model, self.prompt, positions, cache)
        self.ids[0].item()
        took = (time.perf_counter() - start) * 1e3
        self.position.fill_(length)
        use_experts(self.model, self.experts[1])
        return cache, took

    def step(self, mode: Mode, cache: Any) -> None:
        """One token of each sequence. The host learns nothing of it."""
        self._forward(self.compiled if mode.compiled else self.model, self.ids, self.position, cache)
        self.position.add_(1)
        self.replay.counter.add_(1).remainder_(self.replay.tokens)

    def _forward(self, call: Callable[..., Any], ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> None:
        out = call(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))


class NoGraph:
    """In place of a CUDA graph where there are none, so that a CPU can try the script."""

    def __init__(self, lane: Lane, mode: Mode, cache: Any) -> None:
        self.lane, self.mode, self.cache = lane, mode, cache

    def replay(self) -> None:
        self.lane.step(self.mode, self.cache)


class Decode:
    """Tokens after a prompt."""

    def __init__(self, lane: Lane, mode: Mode) -> None:
        self.lane, self.mode = lane, mode
        self.graph: Any = None
        self.cache, self.first_token = lane.prefill(mode)

    def run(self, tokens: int) -> Timing:
        """So many tokens. Where a graph is asked for, the first token runs without one: the graph is captured then."""
        timing = Timing()
        if self.mode.captured and self.graph is None:
            self._run(1, timing)
            self.capture()
            tokens -= 1
        self._run(tokens, timing)
        return timing

    def _run(self, tokens: int, timing: Timing) -> None:
        line = Timeline(self.lane.device)
        start = time.perf_counter()
        line.mark()
        for _ in range(tokens):
            self.advance()
            line.mark()
        timing.tokens += line.gaps()
        timing.wall += (time.perf_counter() - start) * 1e3

    def advance(self) -> None:
        """One token."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.lane.step(self.mode, self.cache)

    def capture(self) -> None:
        """Captures the step; nothing runs."""
        if self.lane.device.type != "cuda":
            self.graph = NoGraph(self.lane, self.mode, self.cache)
            return
        synchronize(self.lane.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the driver meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.lane.step(self.mode, self.cache)
        self.graph = graph

    def issue(self, tokens: int) -> float:
        """Milliseconds that the host takes to issue a token to an idle GPU: it waits for nothing if this is less than
        the token takes."""
        took = []
        for _ in range(tokens):
            synchronize(self.lane.device)
            start = time.perf_counter()
            self.advance()
            took.append((time.perf_counter() - start) * 1e3)
        synchronize(self.lane.device)
        return statistics.median(took)

    def waits(self, tokens: int) -> dict[str, Any]:
        """What the profiler saw the host call within steps; `per_token` is None where it saw no call at all."""
        synchronize(self.lane.device)
        activities = [ProfilerActivity.CPU]
        if self.lane.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiled:
            for _ in range(tokens):
                with record_function(STEP):
                    self.advance()
            synchronize(self.lane.device)
        host = [event for event in profiled.events() if "CPU" in str(event.device_type)]
        steps = [event.time_range for event in host if event.name == STEP]
        called = Counter(
            event.name
            for event in host
            if event.name.startswith("cu") and any(s.start <= event.time_range.start <= s.end for s in steps)
        )
        launches = sum(count for name, count in called.items() if "Launch" in name)
        return {
            "per_token": sum(called[name] for name in WAITS) / tokens if launches else None,
            "launches_per_token": launches / tokens,
            "calls": dict(called),
        }


def warm(lane: Lane, mode: Mode, tokens: int = 3) -> float:
    """Compiles and loads what a mode needs: seconds. Experts are not to be there yet: a kernel that is loaded while
    the stream waits for an expert holds that expert up."""
    start = time.perf_counter()
    cache, _ = lane.prefill(mode)
    for _ in range(tokens):
        lane.step(mode, cache)
    synchronize(lane.device)
    return time.perf_counter() - start
