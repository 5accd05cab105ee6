"""A Qwen3-30B-A3B shape under moecore at several budgets, beside its peers and beside what the hardware allows.

    python benches/offload.py --output benches/results/offload.md     # about 8 minutes on a GPU
    python benches/offload.py --quick                                 # 25 %, batch 1
    python benches/offload.py --tiny                                  # the whole script on a CPU, in a minute

Weights are random, so the model's own routing would mean nothing: the ids of a real trace take its place, in device
memory, at the router's full cost. What is imposed is said in the table. Results are written after each row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import offload_peers as peers
import offload_report
import torch
from offload_model import IDENTITY, REAL, TINY, Subject, traced
from offload_run import COMPILE, COMPILE_GRAPH, EAGER, GRAPH, Decode, Lane, Mode, Timeline, synchronize, warm
from torch._dynamo.utils import counters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[1]
TRACE = ROOT.parent / "shared/data/traces/qwen3-30b-a3b/one_prompt.npz"
PROMPT = 512
#: Tokens over which the model's own time is taken, without experts.
OWN_TOKENS = 32
PROFILED = 8
#: The row that everything is shown for, and the others by importance.
MAIN = 25.0
OTHERS = (12.5, 50.0, 6.25, 100.0)
BATCHES = (2, 4, 8)


def compilations() -> int:
    """Graphs that torch.compile has made so far: a row in which it makes one was not warm."""
    return int(counters["stats"]["unique_graphs"])


class Bench:
    """The model, its lanes and what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.perf_counter()
        self.device = torch.device("cpu" if args.tiny or not torch.cuda.is_available() else "cuda")
        self.shape = TINY if args.tiny else REAL
        self.layers = min(args.layers or self.shape.layers, self.shape.layers)
        self.prompt = 64 if args.tiny else PROMPT
        self.trace = traced(args.trace, self.shape, self.layers)[: 16 if args.tiny else None]
        self.tokens = self.trace.shape[0]
        self.lanes: dict[tuple[int, bool], Lane] = {}
        self.warmed: dict[tuple[int, bool, str], float | Exception] = {}
        self.data: dict[str, Any] = {
            "meta": offload_report.meta(sys.argv[1:], self.device),
            "shape": asdict(self.shape) | {"layers": self.layers, "expert_bytes": self.shape.expert_bytes},
            "prompt": self.prompt, "tokens": self.tokens, "own_tokens": min(OWN_TOKENS, self.tokens),
            "rows": [], "own": [], "peers": [], "skipped": [],
        }  # fmt: skip
        self.subject: Subject = None  # type: ignore[assignment]  # floors and peers come before it

    # ---------------------------------------------------------------------- the clock

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def room(self, what: str, seconds: float) -> bool:
        """Whether something that takes so long still fits; says so if not."""
        if self.args.tiny or self.elapsed() + seconds < 60 * self.args.minutes:
            return True
        self.data["skipped"].append(what)
        self.say(f"skipped for want of time: {what}")
        return False

    def say(self, text: str) -> None:
        print(f"[{self.elapsed():6.1f} s] {text}", file=sys.stderr, flush=True)

    def save(self) -> None:
        """Everything so far."""
        self.data["meta"]["seconds"] = self.elapsed()
        if self.args.output:
            self.args.output.parent.mkdir(parents=True, exist_ok=True)
            self.args.output.with_suffix(".json").write_text(json.dumps(self.data, indent=1, default=str) + "\n")
            self.args.output.write_text(offload_report.text(self.data))

    def stage(self, name: str, run: Callable[[], None]) -> None:
        """One part; what goes wrong in it stays in it."""
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            self.data.setdefault("failed", {})[name] = peers.failed(error)
        peers.release(self.device)
        self.save()

    # ---------------------------------------------------------------------- what is measured

    def start(self) -> None:
        """The model, its host rows, and every kernel once."""
        began = self.elapsed()
        self.subject = Subject(self.shape, self.layers, self.device, self.trace, self.prompt * max(BATCHES))
        self.data["non_expert_bytes"] = self.active_bytes()
        self.data["slot_bytes"] = self.subject.store.slot_bytes
        self.data["start_s"] = self.elapsed() - began
        self.say(f"model and host rows after {self.data['start_s']:.0f} s; {self.subject.notes}")
        self.warm(self.lane(1), EAGER)
        self.subject.open_backend(MAIN)
        warm(self.lane(1), EAGER)
        self.subject.close_backend()

    def active_bytes(self) -> int:
        """Bytes of weights beside the experts that a token reads: of the embedding it reads a row."""
        model = self.subject.model
        whole = sum(param.numel() * param.element_size() for param in model.parameters())
        embedding = model.get_input_embeddings().weight
        return whole - embedding.numel() * embedding.element_size()

    def lane(self, batch: int, own: bool = False) -> Lane:
        key = (batch, own)
        if key not in self.lanes:
            experts = (IDENTITY, IDENTITY) if own else ("moecore", "moecore")
            room = self.prompt + 2 * self.tokens + 4 * PROFILED + 16
            self.lanes[key] = Lane(self.subject.model, self.subject.replay, batch, self.prompt, room, experts)
        return self.lanes[key]

    def warm(self, lane: Lane, mode: Mode) -> float:
        """Compiles a mode once, while no experts are there to wait for."""
        key = (lane.batch, lane.experts[0] == IDENTITY, "compile" if mode.compiled else str(mode.static))
        if key not in self.warmed:
            self.subject.close_backend()
            try:
                self.warmed[key] = warm(lane, mode)
            except Exception as error:  # it would fail again, and take as long
                self.warmed[key] = error
            self.say(f"warm: batch {lane.batch}, {mode.name}, {lane.experts[0]}: {self.warmed[key]!s:.6}")
        took = self.warmed[key]
        if isinstance(took, Exception):
            raise took
        return took

    def row(self, share: float, batch: int, mode: Mode, *, second: bool = True, profiled: bool = False) -> None:
        """One budget, batch and mode: the prompt, the trace's tokens from there, and the same again."""
        cost = 4 + batch + (130 if mode.compiled and (batch, False, "compile") not in self.warmed else 0)
        cost += 0.1 * self.tokens * (1 + second) if mode in (EAGER, COMPILE) else 8
        if not self.room(f"{share:g} %, batch {batch}, {mode.name}", cost):
            return
        record: dict[str, Any] = {"share": share, "batch": batch, "mode": mode.name}
        try:
            self.measure(record, share, batch, mode, second=second, profiled=profiled)
        except Exception as error:
            traceback.print_exc()
            record["error"] = peers.failed(error)
        finally:
            self.end_row()
        self.data["rows"].append(record)
        self.say(offload_report.line(record))
        self.save()

    def end_row(self) -> None:
        try:
            self.subject.close_backend()
        except Exception:
            traceback.print_exc()
        peers.release(self.device)

    def measure(
        self, record: dict[str, Any], share: float, batch: int, mode: Mode, *, second: bool, profiled: bool
    ) -> None:
        lane = self.lane(batch)
        record["warm_s"] = self.warm(lane, mode)
        handle = self.subject.handle
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            record["before_bytes"] = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.subject.open_backend(share)
        record["slots"] = self.subject.slots(share)
        record["budget_bytes"] = record["slots"] * self.subject.store.slot_bytes
        compiled = compilations()
        decode = Decode(lane, mode)
        record["ttft"] = decode.first_token
        for name in ("first", "second") if second else ("first",):
            self.subject.replay.counter.zero_()
            handle.reset_stats()
            summary = decode.run(self.tokens).summary()
            counted = handle.stats().decode
            record[name] = summary | {
                "hit_rate": counted.hit_rate,
                "lookups": counted.lookups / self.tokens,
                "misses": (counted.misses + counted.late) / self.tokens,
                "late": counted.late / self.tokens,
                "bytes": counted.bytes_moved / self.tokens,
                "prefetched": counted.prefetch_bytes / self.tokens,
                "wasted": counted.wasted_bytes / self.tokens,
                "stall_ms": counted.stall_ns / 1e6 / self.tokens,
                "link_gb_s": counted.bytes_moved / self.tokens / summary["mean"] / 1e6,
            }
        record["compiled_meanwhile"] = compilations() - compiled
        if on_gpu:
            record["peak_bytes"] = torch.cuda.max_memory_allocated()
            record["answers"] = handle.backend.engine.stats()  # type: ignore[attr-defined]  # a GPU's backend has it
        if profiled:
            record["issue_ms"] = decode.issue(PROFILED)
            try:
                record["waits"] = decode.waits(PROFILED)
            except Exception as error:  # a profiler that does not work is no reason to lose the row
                record["waits"] = {"error": peers.failed(error)}

    def own(self, batch: int, mode: Mode) -> None:
        """The model's time without its experts, in the same mode."""
        cost = 130 if mode.compiled and (batch, True, "compile") not in self.warmed else 6
        if not self.room(f"non-expert time, batch {batch}, {mode.name}", cost):
            return
        record: dict[str, Any] = {"batch": batch, "mode": mode.name}
        try:
            lane = self.lane(batch, own=True)
            record["warm_s"] = self.warm(lane, mode)
            decode = Decode(lane, mode)
            decode.run(4)
            record |= decode.run(self.data["own_tokens"]).summary()
        except Exception as error:
            traceback.print_exc()
            record["error"] = peers.failed(error)
        peers.release(self.device)
        self.data["own"].append(record)
        self.say(f"non-expert time: {record}")
        self.save()

    def floors(self) -> None:
        """What link and memory of the device give."""
        row = self.shape.expert_bytes
        sizes = {"row": row, "256 MiB": 2**18 if self.args.tiny else 2**28}
        found = {}
        for name, size in sizes.items():
            count = max(4, min(64, 2**30 // size)) if not self.args.tiny else 4
            host = torch.ones(count, size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            there = torch.empty_like(host, device=self.device)
            found[f"link, {name}, one at a time"] = self.rate(host, there, size, between=True)
            found[f"link, {name}, back to back"] = self.rate(host, there, size, between=False)
        a = torch.ones(2**22 if self.args.tiny else 2**31, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        found["memory, read and write"] = 2 * self.rate(a.view(1, -1), b.view(1, -1), a.numel(), between=False)
        self.data["floors"] = found
        self.say(f"GB/s: { {name: round(rate, 1) for name, rate in found.items()} }")

    def rate(self, host: torch.Tensor, there: torch.Tensor, size: int, *, between: bool) -> float:
        """GB/s of copies of rows: with a mark between any two, or between rounds alone. The median."""
        gaps: list[float] = []
        for _ in range(4):
            line = Timeline(self.device)
            line.mark()
            for a, b in zip(host, there, strict=True):
                b.copy_(a, non_blocking=True)
                if between:
                    synchronize(self.device)
                    line.mark()
            line.mark()
            gaps += line.gaps()[: len(host) if between else 1]
        middle = sorted(gaps[len(gaps) // 4 :])[len(gaps) * 3 // 8]
        return size * (1 if between else len(host)) / middle / 1e6

    # ---------------------------------------------------------------------- the parts

    def small_peers(self) -> None:
        """Before the model takes the host's memory."""
        layers = min(4, self.layers)
        if self.room("layer streaming", 10):
            self.data["peers"].append(peers.streaming(self.shape, self.device))
            self.say(str(self.data["peers"][-1]))
            peers.release(self.device)
        if self.room("accelerate", 40):
            record = peers.accelerate(self.shape, layers, self.device, self.trace, self.prompt, 4)
            self.data["peers"].append(record)
            self.say(str(record))

    def resident(self) -> None:
        layers = min(12, self.layers)
        if self.room("resident", 70):
            tokens = min(64, self.tokens)
            for record in peers.resident(self.shape, layers, self.device, self.trace, self.prompt, tokens):
                self.data["peers"].append(record)
                self.say(str(record))
                self.save()

    def generate(self) -> None:
        layers = min(self.args.generate_layers, self.layers)
        if self.room("generate()", 20 + 3 * layers):
            tokens = 12 if self.args.tiny else 64
            prompt = self.lane(1).prompt
            self.data["generate"] = peers.generate(self.subject, prompt, MAIN, layers, tokens)
            self.say(str(self.data["generate"]))

    def main_row(self) -> None:
        """25 %, batch 1, in every mode; what needs no compiler first."""
        for mode in (GRAPH,) if self.args.graphs_only else (GRAPH, EAGER, COMPILE, COMPILE_GRAPH):
            self.row(MAIN, 1, mode, second=not self.args.quick, profiled=True)
            if not mode.compiled:
                self.own(1, mode)
        for mode in () if self.args.quick or self.args.graphs_only else (COMPILE, COMPILE_GRAPH):
            self.own(1, mode)

    def budgets(self, shares: Sequence[float]) -> None:
        for share in shares:
            self.row(share, 1, COMPILE_GRAPH)
            self.row(share, 1, COMPILE, second=False)
            self.row(share, 1, EAGER, second=False)

    def batches(self) -> None:
        modes = (GRAPH,) if self.args.graphs_only else (GRAPH, EAGER)
        for batch, mode in itertools.product(BATCHES, modes):
            self.row(MAIN, batch, mode, second=mode == GRAPH)
            self.own(batch, mode)
            if mode == modes[-1]:
                for own in (False, True):  # their static caches
                    self.lanes.pop((batch, own), None)


def main() -> int:
    """Measures what `--only` names, or all of it by importance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="floors and 25 %%, batch 1, one pass; no peers")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does the script run?")
    parser.add_argument("--graphs-only", action="store_true", help="main and batches: eager kernels in one graph alone")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--generate-layers", type=int, default=4, help="layers for generate() with reduce-overhead")
    parser.add_argument("--minutes", type=float, default=8.5, help="what no longer fits into these is left out")
    parser.add_argument("--only", help="parts, with commas: peers, main, budgets, resident, generate, batches")
    parser.add_argument("--trace", type=Path, default=TRACE, help="npz file of the routing")
    parser.add_argument("--output", type=Path, help="Markdown file; the raw figures go beside it as .json")
    args = parser.parse_args()
    if not args.trace.exists():
        print(f"{args.trace}: no such trace; name it with --trace", file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    bench = Bench(args)
    # By importance, and the arena of 100 % before the peer that takes much of the device's memory.
    parts: dict[str, Callable[[], None]] = {
        "peers": bench.small_peers,
        "main": bench.main_row,
        "budgets": lambda: bench.budgets(OTHERS[:2]),
        "more budgets": lambda: bench.budgets(OTHERS[2:]),
        "resident": bench.resident,
        "generate": bench.generate,
        "batches": bench.batches,
    }
    wanted = set(args.only.split(",")) if args.only else {"main"} if args.quick else set(parts)
    wanted |= {"more budgets"} & {f"more {one}" for one in wanted}
    bench.stage("floors", bench.floors)
    for name, run in parts.items():
        if name in wanted:
            if bench.subject is None and name not in ("peers", "resident"):
                bench.stage("start", bench.start)
                if bench.subject is None or bench.data.get("failed", {}).get("start"):
                    break
            bench.stage(name, run)
    print(offload_report.text(bench.data))
    return 1 if bench.data.get("failed") or any("error" in row for row in bench.data["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
