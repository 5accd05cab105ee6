"""The routing kernels beside torch, transformers, vLLM, SGLang and TransformerEngine: one process, in turns.

    python benches/kernels.py --peers FOLDER --output benches/results/kernels.md    # on a GPU, about 6 minutes
    python benches/kernels.py --quick                                               # what an aim is set for
    python benches/kernels.py --dry-run                                             # every row on the CPU, untimed

Results are written after each row. A row that takes the GPU's context with it, or hangs, costs that row alone: the rows
run in a process of their own, which is started again behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: The child's exit status when the context is lost, and seconds after which a silent child is ended.
LOST, SILENT = 75, 100
#: Between a row and a side of it, in what is left out.
SIDE = " | "


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with the peers' compiled ops; see kernels_peers.py")
    parser.add_argument("--output", type=Path, help="Markdown file; the raw figures go beside it as .json")
    parser.add_argument("--minutes", type=float, default=6.0, help="what no longer fits into these is left out")
    parser.add_argument("--only", help="jobs, with commas: gate, route, index, align, permute, experts, glue, ...")
    parser.add_argument("--quick", action="store_true", help="only the rows that an aim is set for, few repeats")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU; checks results, times nothing")
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write(path: Path | None, text: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def supervise(args: argparse.Namespace) -> int:
    """Starts the rows' process, again and again until it says that it is through."""
    import tempfile

    import kernels_report

    state = Path(tempfile.mkdtemp()) / "state.json"
    deadline = time.time() + 60 * args.minutes
    first: dict[str, Any] = {"rows": [], "skip": [], "deadline": deadline, "command": kernels_report.asked()}
    state.write_text(json.dumps(first))
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--state", str(state)]
    for _ in range(20):
        child = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        why = wait(child, state)
        if child.returncode in (0, 1, 2) or time.time() > deadline:
            break
        found = json.loads(state.read_text())
        running = found.pop("running", None)
        print(f"the rows' process ended ({why}) in {running}: started again", file=sys.stderr, flush=True)
        if running is None:  # it would end there again
            break
        found["skip"].append(running)
        if SIDE in running:
            pass  # the row again, without that side
        elif ":" in running:
            found["rows"].append({"key": running, "job": running.split(":")[0], "lost": why, "sides": {}})
        else:
            found.setdefault("failed", []).append(f"{running}: {why} while it was loaded")
        state.write_text(json.dumps(found))
    found = json.loads(state.read_text())
    text = kernels_report.text(found)
    write(args.output, text)
    print(text)
    return int(child.returncode or 0)


def wait(child: subprocess.Popen[bytes], state: Path) -> str:
    """Waits for the process; ends it when it has written nothing for long."""
    while True:
        try:
            return f"exit status {child.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            if time.time() - state.stat().st_mtime > SILENT:
                child.kill()
                child.wait()
                return f"silent for {SILENT} s"


class Bench:
    """The rows' process."""

    def __init__(self, args: argparse.Namespace) -> None:
        import kernels_report
        import torch
        from kernels_clock import Clock
        from kernels_peers import Peers

        self.args, self.report = args, kernels_report
        self.data: dict[str, Any] = json.loads(args.state.read_text())
        self.device = torch.device("cuda" if torch.cuda.is_available() and not args.dry_run else "cpu")
        self.clock = Clock(args.quick)
        self.peers = Peers(args.peers, self.data["skip"], self.begin)
        self.data.pop("running", None)
        self.data["peers"] = self.peers.notes
        if "meta" not in self.data:
            self.data["meta"] = kernels_report.meta()
            self.save()
            self.data["floors"] = self.clock.floors()
            print(self.data["floors"], flush=True)
        self.save()

    def begin(self, what: str) -> None:
        """What is to blame if the process ends now."""
        self.data["running"] = what
        self.args.state.write_text(json.dumps(self.data, default=str))

    def save(self) -> None:
        self.args.state.write_text(json.dumps(self.data, default=str))
        if self.args.output:
            write(self.args.output.with_suffix(".json"), json.dumps(self.data, indent=1, default=str) + "\n")
            write(self.args.output, self.report.text(self.data))

    def probe(self) -> None:
        """A compiled peer that loads and does not run is not used: the next run takes the next older one."""
        import torch

        for name, one in (("vllm_moe", self.peers.vllm), ("sglang_kernel", self.peers.sglang)):
            if one is None or self.device.type != "cuda":
                continue
            try:
                one.softmax(torch.randn(4, 128, device="cuda"), 8)
                torch.cuda.synchronize()
            except Exception as error:
                loaded = self.peers.loaded[name]
                self.data["skip"].append(loaded)
                self.data.setdefault("failed", []).append(f"{loaded} does not run: {str(error).splitlines()[0][:200]}")
                self.save()
                sys.exit(LOST)

    def run(self) -> int:
        import kernels_jobs
        import kernels_whole

        early = {row.key: row for row in [*list(kernels_jobs.rows())[: kernels_jobs.AIMED], *kernels_whole.first()]}
        late = {row.key: row for row in [*kernels_jobs.rows(), *kernels_whole.rest()]}
        rows = early if self.args.quick else early | first_experts(late)
        wanted = set(self.args.only.split(",")) if self.args.only else None
        seen = {row["key"] for row in self.data["rows"]} | set(self.data["skip"])
        for key, row in rows.items():
            if key in seen or (wanted and row.job not in wanted):
                continue
            if time.time() > self.data["deadline"] and not self.args.dry_run:
                self.data.setdefault("left", []).append(key)
                continue
            self.row(row)
        self.data.pop("running", None)
        self.save()
        return 0

    def row(self, row: Any) -> None:
        import torch
        from kernels_clock import Figures, LostError, said

        self.begin(row.key)
        began = time.perf_counter()
        found: dict[str, Any] = {"key": row.key, "job": row.job, "shape": asdict(row.shape), "sides": {}}
        found["shape"]["dtype"] = str(row.shape.dtype)
        try:
            shape = small(row.shape) if self.device.type == "cpu" else row.shape
            made = row.make(shape, self.peers, self.device)
            found |= {"bytes": made.bytes, "sets": made.sets, "launches": getattr(row.make, "launches", None)}
            agrees: dict[str, bool | str] = {}
            lost = [name for name in made.sides if row.key + SIDE + name in self.data["skip"]]
            for name, right in made.right.items():
                if name in lost:
                    continue
                self.begin(row.key + SIDE + name)
                try:
                    agrees[name] = right()
                except Exception as error:
                    agrees[name] = said(error)
                    self.alive()
            sides = {name: run for name, run in made.sides.items() if name not in lost}
            figures = self.clock.row(sides, made.sets, row.eager, lambda name: self.begin(row.key + SIDE + name))
            figures |= {name: Figures(error="ended the process") for name in lost}
            found["sides"] = {name: asdict(one) | {"agrees": agrees.get(name)} for name, one in figures.items()}
            del made
        except LostError:
            sys.exit(LOST)
        except Exception as error:
            found["error"] = said(error)
            try:
                self.alive()
            except LostError:
                sys.exit(LOST)
        self.data["rows"].append(found)
        self.data.pop("running", None)
        self.save()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"[{time.perf_counter() - began:5.1f} s] {self.report.line(found)}", flush=True)

    @staticmethod
    def alive() -> None:
        from kernels_clock import alive

        alive()


def first_experts(rows: dict[str, Any]) -> dict[str, Any]:
    """The products' crossover before the long tail of gates."""
    jobs = {"experts": 0, "route": 0, "gate + index + permute": 0, "combine + shared + residual": 0, "glue": 0}
    return dict(sorted(rows.items(), key=lambda item: jobs.get(item[1].job, 1)))


def small(shape: Any) -> Any:
    """Of a row, what a CPU can run in no time."""
    return replace(
        shape, tokens=min(shape.tokens, 9), hidden=min(shape.hidden, 256), inner=min(shape.inner, 64),
    )  # fmt: skip


def main() -> int:
    """Supervisor, or rows."""
    args = parse()
    sys.path.insert(0, str(HERE))
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.state is None:
        return supervise(args)
    import torch

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bench = Bench(args)
    bench.probe()
    return bench.run()


if __name__ == "__main__":
    sys.exit(main())
