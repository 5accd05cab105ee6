"""A Qwen3-30B-A3B shape resident on the GPU: moecore's kernels beside transformers' grouped_mm and batched_mm.

    python benches/resident.py --output benches/results/resident.md    # about 6 minutes on a GPU of 80 GB
    python benches/resident.py --quick                                 # batch 1 and the prefill, nothing compiled
    python benches/resident.py --only compiled --compile-layers 8      # compiled rows on a model of 8 layers
    python benches/resident.py --tiny                                  # the whole script on a CPU

The same model runs as transformers has it and after `moecore.fuse`: experts and routers. Weights are random (57 GiB,
made on the device), so the routers choose nearly uniformly; how many experts a step asks for is counted and written
down. Eagerly the host is the limit, whose speed changes from second to second: there all sides run in turns, a few
tokens each. Results are written after each row.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import torch
from kernels_report import asked, meta
from offload_model import REAL, TINY, build, use_experts
from offload_run import COMPILE_GRAPH, EAGER, GRAPH, Decode, Lane, Mode, Timeline, Timing, synchronize, warm
from resident_report import LONG, NAMES, OURS, STOCK, text
from transformers import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: Groups of rows that `--only` names, by importance, and those of `--quick`. "whole": compiled with all layers; "host":
#: what the host does for a token.
PARTS = ("decode", "prefill", "compiled", "batches", "whole", "host")
QUICK = {"decode", "prefill"}
PROMPT = 128
#: Tokens of a turn where all sides run in turns.
TURN = 4
SPARE = 12 << 30


class NoReplay:
    """In place of a trace: the model's own routers choose. A counter that `Lane` moves is all there is of it."""

    tokens = 1

    def __init__(self, device: torch.device) -> None:
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)

    def use(self, batch: int) -> None:
        pass


class Bench:
    """The model and what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.perf_counter()
        self.device = torch.device("cpu" if args.tiny or not torch.cuda.is_available() else "cuda")
        self.shape = TINY if args.tiny else REAL
        self.prompt, self.long = (8, 24) if args.tiny else (PROMPT, LONG)
        self.tokens = 4 if args.tiny else args.tokens
        self.wanted = set(args.only.split(",")) if args.only else QUICK if args.quick else set(PARTS)
        self.compiling = 1.0  # seconds that compiling took, over those expected
        self.layers = self.fitting()
        self.data: dict[str, Any] = {
            "meta": meta(), "command": asked(), "model": self.shape.name, "layers": self.layers,
            "of": self.shape.layers, "decode": [], "prefill": [], "host": [], "asked": {}, "skipped": [],
        }  # fmt: skip
        model, _ = build(self.shape, self.layers, self.device, experts=True)
        self.models = {name: twin(model) for name in NAMES}
        self.data["fused"] = str(moecore.fuse(self.models[OURS]).moecore_fused)
        for name, one in self.models.items():
            use_experts(one, name)
        self.replay: Any = NoReplay(self.device)
        if self.device.type == "cuda":
            self.data["weights_gib"] = torch.cuda.memory_allocated() / 2**30
        self.say(f"{self.layers} layers, {self.data.get('weights_gib', 0):.1f} GiB")

    def fitting(self) -> int:
        """Layers whose weights fit, with room for everything else; no more than will run."""
        few = self.args.compile_layers if self.wanted == {"compiled"} else self.shape.layers
        wanted = min(self.args.layers or few, self.shape.layers)
        if self.device.type != "cuda":
            return wanted
        s = self.shape
        attention = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads) * s.width
        layer = s.experts * s.expert_bytes + attention + s.experts * s.hidden * s.width
        free = torch.cuda.mem_get_info()[0] - SPARE - 2 * s.vocabulary * s.hidden * s.width
        return max(1, min(wanted, free // layer))

    # ------------------------------------------------------------------------------------------------------ the clock

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def room(self, what: str, seconds: float) -> bool:
        if self.args.tiny or self.elapsed() + seconds < 60 * self.args.minutes:
            return True
        self.data["skipped"].append(what)
        self.say(f"left out for want of time: {what}")
        return False

    def say(self, text: str) -> None:
        print(f"[{self.elapsed():6.1f} s] {text}", file=sys.stderr, flush=True)

    def save(self) -> None:
        self.data["seconds"] = self.elapsed()
        if self.args.output:
            self.args.output.parent.mkdir(parents=True, exist_ok=True)
            self.args.output.with_suffix(".json").write_text(json.dumps(self.data, indent=1, default=str) + "\n")
            self.args.output.write_text(text(self.data))

    # --------------------------------------------------------------------------------------------------- the subjects

    def lane(self, name: str, batch: int, prompt: int, tokens: int) -> Lane:
        # transformers' batched_mm copies every pair's weights, so a prompt is grouped_mm's there.
        before = "grouped_mm" if name == "batched_mm" else name
        return Lane(self.models[name], self.replay, batch, prompt, prompt + tokens + 8, (before, name))

    @contextlib.contextmanager
    def shortened(self, name: str, layers: int) -> Iterator[None]:
        """A model with its first layers alone."""
        config = self.models[name].config
        before, config.num_hidden_layers = config.num_hidden_layers, layers
        try:
            yield
        finally:
            config.num_hidden_layers = before

    def expected(self, layers: int) -> float:
        """Seconds that compiling takes, as far as one knows by now."""
        return (15 + 2.5 * layers) * self.compiling

    def compile(self, lane: Lane, record: dict[str, Any], layers: int, first: Callable[[], Any]) -> None:
        """Compiles as transformers' users do (static cache, no dynamic shapes), in one piece where that holds. `first`
        makes the first call."""
        start, known = time.perf_counter(), self.expected(layers) / self.compiling
        for whole in (True, False):
            torch._dynamo.reset()
            lane.compiled = torch.compile(lane.model.__call__, dynamic=False, fullgraph=whole)
            try:
                first()
            except torch._dynamo.exc.TorchDynamoException as error:
                if not whole:
                    raise
                record["broken_by"] = str(error).strip().splitlines()[0][:200]
                self.say(f"not in one piece: {record['broken_by']}")
                continue
            record["whole"] = whole
            break
        record["warm_s"] = time.perf_counter() - start
        self.compiling = max(0.3, 1.1 * record["warm_s"] / known)

    def free(self) -> None:
        synchronize(self.device)
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---------------------------------------------------------------------------------------------- what is measured

    def decode(self, name: str, batch: int, mode: Mode, layers: int | None = None) -> None:
        """Tokens after a prompt in one graph, one row."""
        layers = layers or self.layers
        label = f"decode, batch {batch}, {mode.name}, {name}, {layers} layers"
        cost = (self.expected(layers) if mode.compiled else 0) + 4
        if not self.room(label, cost + 0.0015 * layers * self.tokens):
            return
        record = self.row(name, mode, layers, batch=batch)
        with self.measured("decode", label, record), self.shortened(name, layers):
            lane = self.lane(name, batch, self.prompt, self.tokens)
            if mode.compiled:
                self.compile(lane, record, layers, partial(warm, lane, mode))
            else:
                record["warm_s"] = warm(lane, mode)
            decode = Decode(lane, mode)
            decode.run(3)
            record |= decode.run(self.tokens).summary()
            record["tokens_per_s"] = batch * 1e3 / record["mean"]
            del decode, lane

    def prefill(self, name: str, mode: Mode, layers: int | None = None) -> None:
        """A prompt of 4096 tokens in one graph: milliseconds of the GPU alone."""
        layers = layers or self.layers
        label = f"prefill, {mode.name}, {name}, {layers} layers"
        if not self.room(label, 6 + (self.expected(layers) if mode.compiled else 0)):
            return
        record = self.row(name, mode, layers, tokens=self.long)
        with self.measured("prefill", label, record), self.shortened(name, layers):
            lane = self.lane(name, 1, self.long, 1)
            record["ms"] = statistics.median(self.graphed(lane, mode, record, layers))
            record["tokens_per_s"] = self.long * 1e3 / record["ms"]
            del lane

    def decode_in_turns(self, batch: int) -> None:
        """Tokens after a prompt, neither compiled nor captured: a row for each side."""
        label = f"decode, batch {batch}, {EAGER.name}, in turns"
        if not self.room(label, len(NAMES) * (4 + 0.003 * self.layers * self.tokens)):
            return
        rows = {name: self.row(name, EAGER, batch=batch) for name in NAMES}
        with self.measured("decode", label, *rows.values()):
            lanes = {name: self.lane(name, batch, self.prompt, self.tokens + TURN) for name in NAMES}
            for name, lane in lanes.items():
                rows[name]["warm_s"] = warm(lane, EAGER)
            sides = [partial(Decode(lane, EAGER).run, TURN) for lane in lanes.values()]
            for row, timing in zip(rows.values(), in_turns(sides, self.tokens // TURN), strict=True):
                row |= timing.summary()
                row["tokens_per_s"] = batch * 1e3 / row["mean"]
            del lanes, sides

    def host(self) -> None:
        """What the host does for a token, nothing compiled nor captured. Last: what a profiler leaves behind costs."""
        label = "the host's part"
        if not self.room(label, 20):
            return
        rows = {name: self.row(name, EAGER) for name in NAMES}
        with self.measured("host", label, *rows.values()):
            decodes = {name: Decode(self.lane(name, 1, self.prompt, self.tokens), EAGER) for name in NAMES}
            sides = [partial(issued, decode) for decode in decodes.values()]
            for row, timing in zip(rows.values(), in_turns(sides, self.tokens // TURN), strict=True):
                row["ms"] = statistics.median(timing.tokens)
            for name, decode in decodes.items():
                rows[name] |= decode.waits(2)
            del decodes, sides

    def prefill_in_turns(self) -> None:
        """A prompt of 4096 tokens, neither compiled nor captured: milliseconds until the first token is known."""
        label, names = f"prefill, {EAGER.name}, in turns", (OURS, STOCK[0])
        if not self.room(label, 12):
            return
        rows = {name: self.row(name, EAGER, tokens=self.long) for name in names}
        with self.measured("prefill", label, *rows.values()):
            lanes = [self.lane(name, 1, self.long, 1) for name in names]
            sides = [partial(prompted, lane) for lane in lanes]
            for row, timing in zip(rows.values(), in_turns(sides, 5), strict=True):
                row["ms"] = statistics.median(timing.tokens)
                row["tokens_per_s"] = self.long * 1e3 / row["ms"]
            del lanes, sides

    def row(self, name: str, mode: Mode, layers: int | None = None, **more: Any) -> dict[str, Any]:
        """What a row says of itself."""
        return {"name": name, "mode": mode.name, "layers": layers or self.layers, **more}

    @contextlib.contextmanager
    def measured(self, table: str, label: str, *records: dict[str, Any]) -> Iterator[None]:
        """Puts rows' figures or their error into a table, and cleans up behind them."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            for record in records:
                record["error"] = told
        finally:
            self.free()
        self.data[table] += records
        self.say(f"{label}: " + ", ".join(f"{r.get('mean') or r.get('ms') or r.get('error')!s:.80}" for r in records))
        self.save()

    def graphed(self, lane: Lane, mode: Mode, record: dict[str, Any], layers: int) -> list[float]:
        """The prompt as one CUDA graph: what the GPU takes, with the host out of the way."""
        positions = torch.arange(self.long, device=self.device).unsqueeze(0)

        def run() -> None:
            lane._forward(lane.compiled if mode.compiled else lane.model, lane.prompt, positions, lane.static)

        def again() -> None:
            lane.static.reset()  # it counts its tokens on the device
            run()

        lane.prefill(GRAPH)  # makes the cache
        if mode.compiled:
            self.compile(lane, record, layers, again)
        again()
        lane.static.reset()
        graph = captured(run, self.device)
        times = []
        for _ in range(5):
            lane.static.reset()
            times.append(timed(graph, self.device))
        return times[1:]

    def head(self) -> None:
        """What a step of one sequence takes besides its layers: norm, product with the vocabulary, best token."""
        hidden = torch.randn(1, 1, self.shape.hidden, device=self.device, dtype=torch.bfloat16)
        model = self.models[STOCK[0]]

        def run() -> None:
            model.lm_head(model.model.norm(hidden)).argmax(-1)

        run()
        graph = captured(run, self.device)
        self.data["head_ms"] = statistics.median(timed(graph, self.device) for _ in range(7))

    def asked(self, batch: int) -> None:
        """How many experts of a layer a step asks for."""
        counts: list[int] = []

        def count(module: Any, inputs: Any, output: Any) -> None:
            counts.append(int(output[-1].unique().numel()))

        lane = self.lane("grouped_mm", batch, self.prompt, 4)
        cache, _ = lane.prefill(EAGER)
        hooks = [layer.mlp.gate.register_forward_hook(count) for layer in lane.model.model.layers]
        try:
            lane.step(EAGER, cache)
        finally:
            for hook in hooks:
                hook.remove()
        self.data["asked"][batch] = statistics.fmean(counts)

    def same(self) -> None:
        """Logits of a prompt, moecore's against grouped_mm's: how far apart, and how often the best token differs."""
        found = {}
        for name in ("grouped_mm", OURS):
            ids, model = torch.arange(2, 2 + self.prompt, device=self.device).unsqueeze(0), self.models[name]
            found[name] = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits[0]
        a, b = (found[name].double() for name in (OURS, "grouped_mm"))
        self.data["distance"] = ((a - b).norm() / b.norm()).item()
        self.data["same_token"] = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
        self.say(f"logits differ by {self.data['distance']:.2e}; {self.data['same_token']:.0%} of tokens the same")
        self.save()

    def stage(self, name: str, run: Any, *args: Any) -> None:
        try:
            run(*args)
        except Exception as error:
            traceback.print_exc()
            self.data.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:200]
        self.save()

    def run(self) -> None:
        """By importance."""
        self.stage("same", self.same)
        self.stage("asked", self.asked, 1)
        self.stage("head", self.head)
        parts: dict[str, Callable[[], None]] = {
            "decode": self.one, "prefill": self.prompts, "compiled": self.compiled, "batches": self.batches,
            "whole": self.whole, "host": self.host,
        }  # fmt: skip
        for name in PARTS:
            if name in self.wanted:
                parts[name]()

    def one(self) -> None:
        """Batch 1, nothing compiled."""
        for name in NAMES:
            self.decode(name, 1, GRAPH)
        self.decode_in_turns(1)

    def prompts(self) -> None:
        self.prefill_in_turns()
        for name in (OURS, STOCK[0]):
            self.prefill(name, GRAPH)

    def compiled(self) -> None:
        """Few layers, as compiling takes seconds for each: decode and prefill, and the same layers not compiled."""
        few = min(self.args.compile_layers, self.layers)
        if few < self.layers or "decode" not in self.wanted:
            for name in NAMES:
                self.decode(name, 1, GRAPH, few)
        for name in NAMES:
            self.decode(name, 1, COMPILE_GRAPH, few)
        for name in (OURS, STOCK[0]):
            if few < self.layers or "prefill" not in self.wanted:
                self.prefill(name, GRAPH, few)
            self.prefill(name, COMPILE_GRAPH, few)

    def batches(self) -> None:
        for batch in (4, 16):
            self.stage("asked", self.asked, batch)
            for name in NAMES:
                self.decode(name, batch, GRAPH)
            self.decode_in_turns(batch)

    def whole(self) -> None:
        """Compiled with all layers."""
        if "compiled" not in self.wanted or self.args.compile_layers < self.layers:
            for name in NAMES:
                self.decode(name, 1, COMPILE_GRAPH)


def twin(model: Any) -> Any:
    """The same model once more, over the same weights."""
    return copy.deepcopy(model, {id(one): one for one in itertools.chain(model.parameters(), model.buffers())})


def in_turns(sides: Sequence[Callable[[], Timing]], turns: int) -> list[Timing]:
    """Runs all sides so many times, each time beginning with another, and once more before, which does not count."""
    timings = [Timing() for _ in sides]
    for turn in range(-1, turns):
        for place in range(len(sides)):
            side = (turn + place) % len(sides)
            timing = sides[side]()
            if turn >= 0:
                timings[side].tokens += timing.tokens
                timings[side].wall += timing.wall
    return timings


def issued(decode: Decode) -> Timing:
    """Milliseconds that the host takes to issue a token to an idle GPU."""
    took = decode.issue(TURN)
    return Timing([took], took)


def prompted(lane: Lane) -> Timing:
    """A lane's prompt."""
    took = lane.prefill(EAGER)[1]
    return Timing([took], took)


def captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """As one CUDA graph; as it is where there are none."""
    if device.type != "cuda":
        return run
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Milliseconds on the device's clock."""
    line = Timeline(device)
    line.mark()
    run()
    line.mark()
    return line.gaps()[0]


def main() -> int:
    """Measures by importance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 1 and the prefill, nothing compiled")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does the script run?")
    parser.add_argument("--only", help=f"groups of rows, with commas: {', '.join(PARTS)}")
    parser.add_argument("--layers", type=int, help="fewer than the model has: only these are made")
    parser.add_argument("--compile-layers", type=int, default=8, help="layers that the compiled rows run")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a decode row")
    parser.add_argument("--minutes", type=float, default=6.0, help="what no longer fits into these is left out")
    parser.add_argument("--output", type=Path, help="Markdown file; the raw figures go beside it as .json")
    args = parser.parse_args()
    if unknown := set(args.only.split(",") if args.only else ()) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: none of {', '.join(PARTS)}")
    torch.set_grad_enabled(False)
    bench = Bench(args)
    try:
        bench.run()
    except Exception as error:  # the GPU's context is lost: what there is, is written
        traceback.print_exc()
        bench.data.setdefault("failed", {})["run"] = f"{type(error).__name__}: {error}"[:200]
    bench.save()
    print(text(bench.data))
    rows = bench.data["decode"] + bench.data["prefill"] + bench.data["host"]
    return 1 if bench.data.get("failed") or any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
