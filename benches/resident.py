"""A Qwen3-30B-A3B shape resident on the GPU: moecore's kernels beside transformers' grouped_mm and batched_mm.

    python benches/resident.py --output benches/results/resident.md    # about 6 minutes on a GPU of 80 GB
    python benches/resident.py --quick                                 # batch 1 and the prefill, nothing compiled
    python benches/resident.py --tiny                                  # the whole script on a CPU

The same model runs as transformers has it and after `moecore.fuse`: experts and routers. Weights are random (57 GiB,
made on the device), so the routers choose nearly uniformly; how many experts a step asks for is counted and written
down. Results are written after each row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import torch
from kernels_report import asked, at_commit, meta, table
from offload_model import REAL, TINY, build, use_experts
from offload_run import COMPILE_GRAPH, EAGER, GRAPH, Decode, Lane, Mode, synchronize, warm
from transformers import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = "moecore"
STOCK = ("batched_mm", "grouped_mm")
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
        """Layers whose weights fit, with room for everything else."""
        wanted = min(self.args.layers or self.shape.layers, self.shape.layers)
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
        cost = (15 + 2.5 * layers if mode.compiled else 4) + (0.3 if mode.captured else 0.006 * layers) * self.tokens
        if not self.room(label, cost):
            return
        record: dict[str, Any] = {"batch": batch, "mode": mode.name, "name": name, "layers": layers}
        before = self.model.config.num_hidden_layers
        try:
            self.model.config.num_hidden_layers = layers
            lane = self.lane(name, batch, self.prompt, self.tokens)
            record["warm_s"] = warm(lane, mode)
            decode = Decode(lane, mode)
            decode.run(3)
            record |= decode.run(self.tokens).summary()
            record["tokens_per_s"] = batch * 1e3 / record["mean"]
            del decode, lane
        except Exception as error:
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        finally:
            self.model.config.num_hidden_layers = before
            self.free()
        self.data["decode"].append(record)
        self.say(f"{label}: {record.get('mean', record.get('error'))!s:.80}")
        self.save()

    def prefill(self, name: str, captured: bool) -> None:
        """A prompt of 4096 tokens: milliseconds until the first token is known."""
        mode = "one graph" if captured else "eager"
        if not self.room(f"prefill, {mode}, {name}", 6):
            return
        record: dict[str, Any] = {"name": name, "mode": mode, "tokens": self.long}
        try:
            lane = self.lane(name, 1, self.long, 1)
            times = self.graphed(lane) if captured else [lane.prefill(EAGER)[1] for _ in range(5)][1:]
            record["ms"] = statistics.median(times)
            record["tokens_per_s"] = self.long * 1e3 / record["ms"]
            del lane
        except Exception as error:
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        self.free()
        self.data["prefill"].append(record)
        self.say(f"prefill {name}, {mode}: {record.get('ms', record.get('error'))!s:.80}")
        self.save()

    def graphed(self, lane: Lane) -> list[float]:
        """The prompt as one CUDA graph: what the GPU takes, with the host out of the way."""
        positions = torch.arange(self.long, device=self.device).unsqueeze(0)
        lane.prefill(GRAPH)
        if self.device.type != "cuda":
            return [lane.prefill(GRAPH)[1]]
        lane.static.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            lane._forward(self.model, lane.prompt, positions, lane.static)
        times = []
        for _ in range(5):
            lane.static.reset()  # it counts its tokens on the device
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return times[1:]

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
        names = (OURS, *STOCK)
        self.stage("same", self.same)
        self.stage("asked", self.asked, 1)
        for name in names:
            self.decode(name, 1, GRAPH)
        for name in (*names, *names):  # twice in turns: the host is the limit, and noisy
            self.decode(name, 1, EAGER)
        for captured in (False, True):
            for name in (OURS, "grouped_mm"):
                self.prefill(name, captured)
        if self.args.quick:
            return
        few = min(self.args.compile_layers, self.layers)
        for name in names:
            self.decode(name, 1, COMPILE_GRAPH, few)
        for batch in (4, 16):
            self.stage("asked", self.asked, batch)
            for mode in (GRAPH, EAGER):
                for name in names:
                    self.decode(name, batch, mode)
        for name in (OURS, "batched_mm"):
            if few < self.layers:
                self.decode(name, 1, COMPILE_GRAPH)


# -------------------------------------------------------------------------------------------------------------- report


def best(rows: list[dict[str, Any]], row: dict[str, Any], keys: tuple[str, ...], value: str) -> float | None:
    """The best of transformers' own under the same conditions."""
    others = [
        one[value] for one in rows if one["name"] != OURS and value in one and all(one[k] == row[k] for k in keys)
    ]
    return min(others) if others else None


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
        "step captured in one CUDA graph). Milliseconds of a step on the device's clock, mean; prompts of 128 tokens.",
        "", f"Fused: {data.get('fused', 'nothing')!s}".replace("\n", "; "),
    ]  # fmt: skip
    if "distance" in data:
        out.append(
            f"Logits of a prompt, fused against `grouped_mm`: {data['distance']:.1e} apart by the norm; "
            f"{data['same_token']:.0%} of the best tokens are the same."
        )
    head = (
        "batch",
        "mode",
        "layers",
        "experts",
        "ms a step",
        "p95",
        "tokens/s",
        "moecore's speed-up over the best stock",
    )
    out += ["", "## Decode", "", *table(head, decode_rows(data["decode"]))]
    head = ("mode", "experts", "ms", "tokens/s", "speed-up")
    out += ["", f"## Prefill of {LONG} tokens, batch 1", "", *table(head, prefill_rows(data["prefill"]))]
    out += ["", "`batched_mm` copies the weights of every pair: a prompt of 4096 tokens would need 290 GiB.", ""]
    left = [f"- failed: {name}: {why}" for name, why in data.get("failed", {}).items()]
    left += [f"- left out for want of time: {what}" for what in data["skipped"]]
    return "\n".join([*out, *(["## Not here", "", *left] if left else [])]) + "\n"


def decode_rows(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Cells."""
    for row in rows:
        start = (str(row["batch"]), row["mode"], str(row["layers"]), row["name"])
        if "error" in row:
            yield (*start, row["error"], "", "", "")
            continue
        other = best(rows, row, ("batch", "mode", "layers"), "mean")
        gain = f"{other / row['mean']:.2f}x" if other and row["name"] == OURS else ""
        yield (*start, f"{row['mean']:.2f}", f"{row['p95']:.2f}", f"{row['tokens_per_s']:.1f}", gain)


def prefill_rows(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Cells."""
    for row in rows:
        if "error" in row:
            yield row["mode"], row["name"], row["error"], "", ""
            continue
        other = best(rows, row, ("mode",), "ms")
        gain = f"{other / row['ms']:.2f}x" if other and row["name"] == OURS else ""
        yield row["mode"], row["name"], f"{row['ms']:.1f}", f"{row['tokens_per_s']:.0f}", gain


def main() -> int:
    """Measures by importance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 1 and the prefill, nothing compiled")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does the script run?")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--compile-layers", type=int, default=12, help="layers that the compiled rows run")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a decode row")
    parser.add_argument("--minutes", type=float, default=6.0, help="what no longer fits into these is left out")
    parser.add_argument("--output", type=Path, help="Markdown file; the raw figures go beside it as .json")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    bench = Bench(args)
    try:
        bench.run()
    except Exception as error:  # the GPU's context is lost: what there is, is written
        traceback.print_exc()
        bench.data.setdefault("failed", {})["run"] = f"{type(error).__name__}: {error}"[:200]
    bench.save()
    print(text(bench.data))
    return 1 if bench.data.get("failed") or any("error" in row for row in bench.data["decode"]) else 0


if __name__ == "__main__":
    sys.exit(main())
