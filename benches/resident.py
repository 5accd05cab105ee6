"""A Qwen3-30B-A3B shape resident on the GPU: moecore's kernels beside transformers' grouped_mm and batched_mm.

    python benches/resident.py --output benches/results/resident.md    # about 6 minutes on a GPU of 80 GB
    python benches/resident.py --quick                                 # batch 1 and the prefill, nothing compiled
    python benches/resident.py --only compiled --compile-layers 8      # compiled rows on a model of 8 layers
    python benches/resident.py --tiny                                  # the whole script on a CPU

The same model runs as transformers has it and after `moecore.fuse`: experts and routers. Weights are random (57 GiB,
made on the device), so the routers choose nearly uniformly; how many experts a step asks for is counted and written
down. Results are written after each row.
"""

from __future__ import annotations

import argparse
import contextlib
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
from kernels_report import asked, at_commit, meta, table
from offload_model import REAL, TINY, build, use_experts
from offload_run import COMPILE_GRAPH, EAGER, GRAPH, Decode, Lane, Mode, Timeline, synchronize, warm
from transformers import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OURS = "moecore"
STOCK = ("grouped_mm", "batched_mm")
#: Groups of rows that `--only` names, by importance, and those of `--quick`. "whole": compiled with all layers.
PARTS = ("decode", "prefill", "compiled", "batches", "whole")
QUICK = {"decode", "prefill"}
PROMPT, LONG = 128, 4096
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
            "of": self.shape.layers, "decode": [], "prefill": [], "asked": {}, "skipped": [],
        }  # fmt: skip
        self.model, _ = build(self.shape, self.layers, self.device, experts=True)
        self.replay: Any = NoReplay(self.device)
        self.fused = False
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

    def become(self, name: str) -> None:
        """Has the model run by `name`."""
        if (name == OURS) != self.fused:
            if self.fused:
                moecore.unfuse(self.model)
            else:
                moecore.fuse(self.model)
                self.data["fused"] = str(self.model.moecore_fused)
            self.fused = not self.fused
        use_experts(self.model, name)

    def lane(self, name: str, batch: int, prompt: int, tokens: int) -> Lane:
        self.become(name)
        # transformers' batched_mm copies every pair's weights, so a prompt is grouped_mm's there.
        before = "grouped_mm" if name == "batched_mm" else name
        return Lane(self.model, self.replay, batch, prompt, prompt + tokens + 8, (before, name))

    @contextlib.contextmanager
    def shortened(self, layers: int) -> Iterator[None]:
        """The model with its first layers alone."""
        before = self.model.config.num_hidden_layers
        self.model.config.num_hidden_layers = layers
        try:
            yield
        finally:
            self.model.config.num_hidden_layers = before

    def expected(self, layers: int) -> float:
        """Seconds that compiling takes, as far as one knows by now."""
        return (15 + 2.5 * layers) * self.compiling

    def compile(self, lane: Lane, record: dict[str, Any], layers: int, first: Callable[[], Any]) -> None:
        """Compiles as transformers' users do (static cache, no dynamic shapes), in one piece where that holds. `first`
        makes the first call."""
        start, known = time.perf_counter(), self.expected(layers) / self.compiling
        for whole in (True, False):
            torch._dynamo.reset()
            lane.compiled = torch.compile(self.model.__call__, dynamic=False, fullgraph=whole)
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
        """Tokens after a prompt, one row."""
        layers = layers or self.layers
        label = f"decode, batch {batch}, {mode.name}, {name}, {layers} layers"
        cost = (self.expected(layers) if mode.compiled else 0) + 4
        if not self.room(label, cost + (0.0015 if mode.captured else 0.006) * layers * self.tokens):
            return
        record: dict[str, Any] = {"batch": batch, "mode": mode.name, "name": name, "layers": layers}
        with self.measured("decode", label, record), self.shortened(layers):
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
        """A prompt of 4096 tokens: milliseconds until the first token is known; in a graph, of the GPU alone."""
        layers = layers or self.layers
        label = f"prefill, {mode.name}, {name}, {layers} layers"
        if not self.room(label, 6 + (self.expected(layers) if mode.compiled else 0)):
            return
        record: dict[str, Any] = {"name": name, "mode": mode.name, "tokens": self.long, "layers": layers}
        with self.measured("prefill", label, record), self.shortened(layers):
            lane = self.lane(name, 1, self.long, 1)
            if mode.captured:
                times = self.graphed(lane, mode, record, layers)
            else:
                times = [lane.prefill(mode)[1] for _ in range(5)][1:]
            record["ms"] = statistics.median(times)
            record["tokens_per_s"] = self.long * 1e3 / record["ms"]
            del lane

    @contextlib.contextmanager
    def measured(self, table: str, label: str, record: dict[str, Any]) -> Iterator[None]:
        """Puts a row's figures or its error into a table, and cleans up behind it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        finally:
            self.free()
        self.data[table].append(record)
        self.say(f"{label}: {record.get('mean') or record.get('ms') or record.get('error')!s:.80}")
        self.save()

    def graphed(self, lane: Lane, mode: Mode, record: dict[str, Any], layers: int) -> list[float]:
        """The prompt as one CUDA graph: what the GPU takes, with the host out of the way."""
        positions = torch.arange(self.long, device=self.device).unsqueeze(0)

        def run() -> None:
            lane._forward(lane.compiled if mode.compiled else self.model, lane.prompt, positions, lane.static)

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

        def run() -> None:
            self.model.lm_head(self.model.model.norm(hidden)).argmax(-1)

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
        hooks = [layer.mlp.gate.register_forward_hook(count) for layer in self.model.model.layers]
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
            self.become(name)
            ids = torch.arange(2, 2 + self.prompt, device=self.device).unsqueeze(0)
            found[name] = self.model(input_ids=ids, past_key_values=DynamicCache(config=self.model.config)).logits[0]
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
            "whole": self.whole,
        }  # fmt: skip
        for name in PARTS:
            if name in self.wanted:
                parts[name]()

    def one(self) -> None:
        """Batch 1, nothing compiled."""
        names = (OURS, *STOCK)
        for name in names:
            self.decode(name, 1, GRAPH)
        for name in (*names, *names):  # twice in turns: the host is the limit, and noisy
            self.decode(name, 1, EAGER)

    def prompts(self) -> None:
        for mode in (EAGER, GRAPH):
            for name in (OURS, STOCK[0]):
                self.prefill(name, mode)

    def compiled(self) -> None:
        """Few layers, as compiling takes seconds for each: decode and prefill, and the same layers not compiled."""
        few = min(self.args.compile_layers, self.layers)
        if few < self.layers or "decode" not in self.wanted:
            for name in (OURS, *STOCK):
                self.decode(name, 1, GRAPH, few)
        for name in (OURS, *STOCK):
            self.decode(name, 1, COMPILE_GRAPH, few)
        for name in (OURS, STOCK[0]):
            if few < self.layers or "prefill" not in self.wanted:
                self.prefill(name, GRAPH, few)
            self.prefill(name, COMPILE_GRAPH, few)

    def batches(self) -> None:
        for batch in (4, 16):
            self.stage("asked", self.asked, batch)
            for mode in (GRAPH, EAGER):
                for name in (OURS, *STOCK):
                    self.decode(name, batch, mode)

    def whole(self) -> None:
        """Compiled with all layers."""
        if "compiled" not in self.wanted or self.args.compile_layers < self.layers:
            for name in (OURS, *STOCK):
                self.decode(name, 1, COMPILE_GRAPH)


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


# -------------------------------------------------------------------------------------------------------------- report


def gains(rows: list[dict[str, Any]], row: dict[str, Any], keys: tuple[str, ...], value: str) -> Iterator[str]:
    """Each stock function's time over ours, under the same conditions; empty where a row is not ours."""
    for name in STOCK:
        others = (one for one in rows if one["name"] == name and value in one)
        same = [one[value] for one in others if all(one[key] == row[key] for key in keys)]
        yield f"{min(same) / row[value]:.2f}x" if same and row["name"] == OURS else ""


def compiling(row: dict[str, Any]) -> str:
    """How long it took, and whether it is one piece."""
    return f"{row['warm_s']:.0f} s, {'one piece' if row['whole'] else 'in pieces'}" if "whole" in row else ""


def text(data: dict[str, Any]) -> str:
    """The page."""
    told = data["meta"]
    out = [
        f"# {data['model']} resident on the GPU", "",
        f"{told.get('date')}. {told.get('gpu')}; moecore {told.get('moecore')}{at_commit(told)}, torch "
        f"{told.get('torch')}, CUDA {told.get('cuda')}, transformers {told.get('transformers')}, Python "
        f"{told.get('python')}.  ",
        f"Command: `python benches/resident.py {data['command']}`, {data.get('seconds', 0):.0f} s.", "",
        f"{data['layers']} of {data['of']} layers, {data.get('weights_gib', 0):.1f} GiB of bf16 weights, all on the "
        "device. Weights are random, so the routers choose nearly uniformly. Experts of a layer that a step asks for: "
        + ", ".join(f"{count:.1f} at batch {batch}" for batch, count in data["asked"].items()) + ".",
        "", "Modes: *eager* (dynamic cache); *eager kernels, one graph* and *compile, one graph* (static cache, the "
        "step captured in one CUDA graph). All are compiled alike: `torch.compile` of the model's call, in one piece "
        "where that holds. Milliseconds of a step on the device's clock, mean; prompts of 128 tokens.",
        "", f"Fused: {data.get('fused', 'nothing')!s}".replace("\n", "; "),
    ]  # fmt: skip
    if "distance" in data:
        out.append(
            f"Logits of a prompt, fused against `grouped_mm`: {data['distance']:.1e} apart by the norm; "
            f"{data['same_token']:.0%} of the best tokens are the same."
        )
    if "head_ms" in data:
        out.append(
            f"Norm, product with the vocabulary and best token are {data['head_ms']:.2f} ms of each step at batch 1: "
            "the time of a layer is without them, the other figures with them, so ratios over few layers are nearer 1."
        )
    over = tuple(f"over {name}" for name in STOCK)
    head = ("batch", "mode", "layers", "experts", "ms a step", "p95", "ms a layer", "tokens/s", *over, "compiling")
    out += ["", "## Decode", "", *table(head, decode_rows(data["decode"], data.get("head_ms")))]
    head = ("mode", "layers", "experts", "ms", "tokens/s", over[0], "compiling")
    out += ["", f"## Prefill of {LONG} tokens, batch 1", "", *table(head, prefill_rows(data["prefill"]))]
    out += ["", "`batched_mm` copies the weights of every pair: a prompt of 4096 tokens would need 290 GiB.", ""]
    left = [f"- failed: {name}: {why}" for name, why in data.get("failed", {}).items()]
    left += [f"- left out for want of time: {what}" for what in data["skipped"]]
    return "\n".join([*out, *(["## Not here", "", *left] if left else [])]) + "\n"


def decode_rows(rows: list[dict[str, Any]], head: float | None) -> Iterator[tuple[str, ...]]:
    """Cells."""
    for row in rows:
        start = (str(row["batch"]), row["mode"], str(row["layers"]), row["name"])
        if "error" in row:
            yield (*start, row["error"], *[""] * 6)
            continue
        # Eagerly the host is the limit, and not what lies outside the layers.
        alone = head if head and row["batch"] == 1 and row["mode"] != EAGER.name else None
        layer = f"{(row['mean'] - alone) / row['layers']:.3f}" if alone else ""
        step = (f"{row['mean']:.2f}", f"{row['p95']:.2f}", layer, f"{row['tokens_per_s']:.1f}")
        yield (*start, *step, *gains(rows, row, ("batch", "mode", "layers"), "mean"), compiling(row))


def prefill_rows(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Cells."""
    for row in rows:
        start = row["mode"], str(row["layers"]), row["name"]
        if "error" in row:
            yield (*start, row["error"], "", "", "")
            continue
        gain = next(gains(rows, row, ("mode", "layers"), "ms"))
        yield (*start, f"{row['ms']:.1f}", f"{row['tokens_per_s']:.0f}", gain, compiling(row))


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
    rows = bench.data["decode"] + bench.data["prefill"]
    return 1 if bench.data.get("failed") or any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
