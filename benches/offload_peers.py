"""What `offload.py` compares with: experts that are all resident, accelerate's offload, streaming of whole layers.

None of them runs the whole model here, for want of room or time: each runs some layers, and the rest is scaled.
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

import torch
from offload_model import Replay, Shape, Subject, build
from offload_run import COMPILE, COMPILE_GRAPH, EAGER, Decode, Lane, Timeline, synchronize, warm
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from torch import Tensor

Record = dict[str, Any]


def release(device: torch.device) -> None:
    """Gives back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failed(error: Exception) -> str:
    """An error as a row says it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def resident(shape: Shape, layers: int, device: torch.device, trace: np.ndarray, prompt: int, tokens: int) -> Iterator:
    """All experts on the device, as transformers runs them: grouped products in prefill, batched ones in decode."""
    scale = shape.layers / layers
    model, _ = build(shape, layers, device, experts=True)
    lane = Lane(model, Replay(model, trace[:, :layers], shape, prompt, device), 1, prompt, prompt + tokens + 16,
                ("grouped_mm", "batched_mm"))  # fmt: skip
    for mode in (EAGER, COMPILE, COMPILE_GRAPH):
        record: Record = {"peer": "resident", "mode": mode.name, "layers": layers, "scale": scale}
        try:
            record["compile_s"] = warm(lane, mode)
            decode = Decode(lane, mode)
            record["ttft"] = decode.first_token
            record["tpot"] = decode.run(tokens).summary()
            del decode
        except Exception as error:
            record["error"] = failed(error)
        yield record


def accelerate(shape: Shape, layers: int, device: torch.device, trace: np.ndarray, prompt: int, tokens: int) -> Record:
    """accelerate's hooks on the experts alone, all else resident: the best that it can do, as it moves modules."""
    record: Record = {"peer": "accelerate", "mode": "eager", "layers": layers, "scale": shape.layers / layers}
    try:
        from accelerate import cpu_offload

        model, found = build(shape, layers, device, experts=True)
        replay = Replay(model, trace[:, :layers], shape, prompt, device)
        for one in found:
            cpu_offload(one.module.to("cpu"), execution_device=device)
        release(device)
        lane = Lane(model, replay, 1, prompt, prompt + tokens + 16, ("grouped_mm", "batched_mm"))
        warm(lane, EAGER, tokens=1)
        decode = Decode(lane, EAGER)
        record["ttft"] = decode.first_token
        record["tpot"] = decode.run(tokens).summary()
    except Exception as error:
        record["error"] = failed(error)
    return record


def streaming(shape: Shape, device: torch.device, layers: int = 8) -> Record:
    """Whole layers of experts through two buffers, copies beside the products of the layer before."""
    record: Record = {"peer": "layer streaming", "mode": "two buffers", "layers": layers,
                      "scale": shape.layers / layers}  # fmt: skip
    try:
        width = 3 * shape.hidden * shape.inner
        on_gpu = device.type == "cuda"
        # Every layer is read from the same pinned memory.
        source = torch.full((shape.experts, width), 0.01, dtype=torch.bfloat16, pin_memory=on_gpu)
        buffers = [torch.empty_like(source, device=device) for _ in range(2)]
        x = torch.randn(1, shape.hidden, dtype=torch.bfloat16, device=device)
        ids = torch.arange(shape.top_k, device=device)
        copies = torch.cuda.Stream(device) if on_gpu else None
        for _ in range(2):  # the first loads the kernels
            line = Timeline(device)
            line.mark()
            stream_layers(source, buffers, x, ids, shape, layers, copies)
            line.mark()
            took = line.gaps()[0]
        record["tpot"] = {"mean": took, "p50": took, "p95": took, "tokens": 1}
        record["gb_s"] = layers * source.numel() * 2 / took / 1e6
    except Exception as error:
        record["error"] = failed(error)
    return record


def stream_layers(
    source: Tensor, buffers: list[Tensor], x: Tensor, ids: Tensor, shape: Shape, layers: int, copies: Any
) -> Tensor:
    """The loop: a layer's copy begins when its buffer has been used, its products when the copy is over."""
    split = 2 * shape.hidden * shape.inner

    def layer(weights: Tensor, x: Tensor) -> Tensor:
        chosen = weights[ids]
        up = chosen[:, :split].view(-1, 2 * shape.inner, shape.hidden) @ x.view(1, -1, 1)
        gate, linear = up.chunk(2, dim=1)
        down = chosen[:, split:].view(-1, shape.hidden, shape.inner) @ (functional.silu(gate) * linear)
        return down.sum(0).view(1, -1)

    if copies is None:
        for number in range(layers):
            x = layer(buffers[number % 2].copy_(source), x)
        return x
    stream = torch.cuda.current_stream()
    copies.wait_stream(stream)
    free: list[Any] = [None, None]
    for number in range(layers):
        buffer, event = buffers[number % 2], torch.cuda.Event()
        with torch.cuda.stream(copies):
            if free[number % 2] is not None:
                copies.wait_event(free[number % 2])
            buffer.copy_(source, non_blocking=True)
            event.record()
        stream.wait_event(event)
        x = layer(buffer, x)
        free[number % 2] = torch.cuda.Event()
        free[number % 2].record()
    return x


class Advance(LogitsProcessor):
    """Moves the trace on by a token, and notes when."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.moments: list[float] = []
        replay.counter.zero_()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The first call is the prompt's: the trace's token 0 comes after it.
        if self.moments:
            self.replay.counter.add_(1).remainder_(self.replay.tokens)
        self.moments.append(time.perf_counter())
        return scores


def generate(subject: Subject, prompt: Tensor, share: float, layers: int, tokens: int) -> Record:
    """transformers' own `generate` with a static cache: on a GPU it compiles with `reduce-overhead`, one CUDA graph
    for the whole step. On the first layers of the model under moecore."""
    model: Any = subject.model
    record: Record = {"what": "generate(), static cache", "layers": layers, "share": share}
    before = model.config.num_hidden_layers
    try:
        subject.replay.use(1)
        model.config.num_hidden_layers = layers
        model.config._experts_implementation_internal = "moecore"
        # One arena for both: the graphs of the first attempt hold its address.
        subject.open_backend(share)
        for attempt in ("first", "again"):
            before_it = {name: dict(counters[name]) for name in ("stats", "graph_break", "inductor")}
            advance = Advance(subject.replay)
            start = time.perf_counter()
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, cache_implementation="static", pad_token_id=0,
                logits_processor=LogitsProcessorList([advance]),
            )  # fmt: skip
            synchronize(subject.device)
            record[attempt] = {
                "seconds": time.perf_counter() - start,
                "tokens": out.shape[1] - prompt.shape[1],
                "graphs": counters["stats"]["unique_graphs"] - before_it["stats"].get("unique_graphs", 0),
                "graph_breaks": sum(counters["graph_break"].values()) - sum(before_it["graph_break"].values()),
                "skipped": counters["inductor"]["cudagraph_skips"] - before_it["inductor"].get("cudagraph_skips", 0),
            }
            gaps = [(b - a) * 1e3 for a, b in zip(advance.moments, advance.moments[1:], strict=False)]
            record["tpot"] = sorted(gaps[len(gaps) // 2 :])[len(gaps) // 4]
    except Exception as error:
        record["error"] = failed(error)
    finally:
        model.config.num_hidden_layers = before
        subject.close_backend()
    return record
