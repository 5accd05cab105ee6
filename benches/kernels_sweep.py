"""Other numbers for the routing kernels: every variant is checked, then all variants of a shape are timed in turns.

    python benches/kernels_sweep.py --cubins FOLDER --compile-only     # anywhere with nvcc: saves GPU time
    python benches/kernels_sweep.py --cubins FOLDER --output FILE.json # on a GPU
    python benches/kernels_sweep.py --dry-run                          # all of it on the emulator, tiny and untimed

One number at a time differs from cuda/tuning.cuh, then the winners together. `--variant combine:COMBINE_WARPS=8,...`
adds one. TILE (tokens of a tile) and EARLY (1: programmatic launch) shape launches alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import kernels_cases as cases
import torch
from kernels_clock import Clock, LostError, alive, said
from kernels_data import Shape
from kernels_launch import Cubins, Emulated, nvcc, tuned

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels_launch import Defines

BF16 = {"dtype": torch.bfloat16}


@dataclass(frozen=True)
class Family:
    """Kernels that are swept together: their files, shapes, how a case is made, and numbers with the values to try."""

    name: str
    sources: tuple[str, ...]
    make: Callable[[Shape, torch.device], cases.Case]
    shapes: tuple[Shape, ...]
    values: dict[str, tuple[int, ...]]
    together: tuple[Defines, ...] = ()


def families() -> list[Family]:
    """By importance."""
    gates = [Shape(1, 128, 8), Shape(64, 256, 8), Shape(4096, 128, 8), Shape(8192, 256, 8), Shape(8192, 60, 4)]
    gates += [Shape(8192, 64, 4), Shape(8192, 256, 8, groups=8), Shape(65536, 256, 8, **BF16), Shape(8192, 512, 10)]
    few = [
        Shape(t, e, 8)
        for t, e in ((1, 128), (1, 256), (4, 128), (16, 256), (32, 256), (64, 128), (64, 256), (128, 256), (256, 256))
    ]
    many = [Shape(t, 256, 8) for t in (64, 256, 512, 4096, 8192, 65536)]
    moved = [Shape(512, 256, 8, 7168), Shape(4096, 256, 8, 7168), Shape(4096, 128, 8, 2048), Shape(512, 128, 8, 2048)]
    wide = [replace(one, dtype=torch.bfloat16) for one in moved]
    wide += [Shape(64, 256, 8, 7168, **BF16), Shape(4096, 64, 2, 4096, **BF16)]
    experts = [Shape(t, 128, 8, 2048, 768, **BF16) for t in (1, 2, 8)]
    return [
        Family("gate", ("gate.cu",), cases.Gate, tuple(gates), {
             "GATE_BLOCKS": (2, 3, 4, 6, 8, 16, 64), "GATE_SMALL_TOKENS": (0, 256, 1024), "EARLY": (0,),
             "GATE_RESIDENT": (3, 4, 6), "GATE_LOGITS_RESIDENT": (3, 4, 5, 8), "GATE_WIDE_RESIDENT": (2, 4),
        }, tuple(
            {"GATE_WARPS": 8, "GATE_BLOCKS": blocks, "GATE_RESIDENT": blocks, "GATE_LOGITS_RESIDENT": blocks}
            for blocks in (3, 4, 5, 6)
        ) + tuple(
            {"GATE_WARPS": 4, "GATE_BLOCKS": 64, "GATE_RESIDENT": blocks, "GATE_LOGITS_RESIDENT": blocks + 2,
             "GATE_WIDE_RESIDENT": blocks - 3} for blocks in (8, 10)
        )),
        Family("route_small", ("route_small.cu",), partial(cases.Route, one=True), tuple(few), {
            "ROUTE_SMALL_WARPS": (8, 32), "ROUTE_CLUSTER_FROM": (8, 16, 32, 64, 128, 100000),
            "ROUTE_CLUSTER_WARPS": (4, 8, 16), "ROUTE_CLUSTER": (2, 4, 8),
        }, ({"ROUTE_CLUSTER_FROM": 16, "ROUTE_CLUSTER": 4, "ROUTE_CLUSTER_WARPS": 16},
            {"ROUTE_CLUSTER_FROM": 16, "ROUTE_CLUSTER": 8, "ROUTE_CLUSTER_WARPS": 4},
            {"ROUTE_CLUSTER_FROM": 16, "ROUTE_CLUSTER": 8, "ROUTE_CLUSTER_WARPS": 8})),
        Family("route_tiles", ("route_tiles.cu",), partial(cases.Route, one=False), tuple(many), {
            "ROUTE_COUNT_WARPS": (4, 8, 16), "ROUTE_PLACE_THREADS": (128, 256, 512), "TILE": (32, 64, 128),
            "EARLY": (0,), "ROUTE_SCAN_TILES": (2, 16, 32, 64, 128, 256, 511),
        }),
        Family("route_permute", ("route_tiles.cu",), partial(cases.Route, one=False), tuple(moved), {
            "ROUTE_PLACE_THREADS": (128, 256, 512, 1024), "ROUTE_PLACE_SPLIT": (1, 2, 4, 8, 16), "TILE": (32, 64, 128),
            "EARLY": (0,), "ROUTE_STORE_HINT": (0, 1, 2, 3), "ROUTE_PLACE_DEPTH": (1, 2, 8),
            "ROUTE_PLACE_LONG_SPLIT": (4, 8, 32),
        }, ({"TILE": 32, "ROUTE_PLACE_SPLIT": 8}, {"TILE": 64, "ROUTE_PLACE_SPLIT": 8},
            {"TILE": 128, "ROUTE_PLACE_SPLIT": 16}, {"TILE": 32, "ROUTE_PLACE_SPLIT": 4})),
        Family("permute", ("permute.cu",), cases.Permute, tuple(wide), {
            "PERMUTE_WARPS": (1, 2, 4, 8), "PERMUTE_DEPTH": (1, 2, 4, 8), "PERMUTE_STORE_HINT": (0, 1, 2, 3),
            "PERMUTE_BLOCKS": (4, 8, 16, 1024), "PERMUTE_SMALL_TOKENS": (0, 64, 512),
        }, ({"PERMUTE_DEPTH": 2, "PERMUTE_STORE_HINT": 1}, {"PERMUTE_DEPTH": 1, "PERMUTE_STORE_HINT": 3})),
        Family("combine", ("combine.cu",), partial(cases.Combine, more=True), tuple(wide), {
            "COMBINE_WARPS": (1, 2, 4, 8), "COMBINE_IN_FLIGHT": (4, 8, 16, 20), "COMBINE_BLOCKS": (4, 8, 16, 1024),
            "COMBINE_STORE_HINT": (0, 1, 2, 3),
        }),
        Family("fp8 permute", ("permute.cu",), partial(cases.Permute, fp8=True), tuple(wide[:3]), {
            "PERMUTE_WARPS": (2, 4, 8), "PERMUTE_FP8_DEPTH": (1, 2, 4), "PERMUTE_STORE_HINT": (0, 1, 2, 3),
            "PERMUTE_BLOCKS": (8, 16, 1024),
        }),
        Family("expert_up", ("experts.cu",), partial(cases.Experts, down=False), tuple(experts), {
            "EXPERT_WARPS": (2, 4, 8), "UP_DEPTH": (2, 4, 8),
        }),
        Family("expert_down", ("experts.cu",), partial(cases.Experts, down=True), tuple(experts), {
            "DOWN_OUTPUTS": (1, 2, 4), "DOWN_DEPTH": (2, 3, 4), "DOWN_SHARES": (4, 8), "DOWN_WARPS": (8, 16),
            "DOWN_ROWS": (1, 2),
        }),
    ]  # fmt: skip


#: What the launches know and the code does not, with what they stand at by themselves: TILE 0 is the kernel's own rule.
LAUNCH_ONLY = {"EARLY": 1, "TILE": 0}


def variants(family: Family, defaults: Defines, more: list[Defines]) -> dict[str, Defines]:
    """The defaults, one number changed at a time, and what goes together. Numbers that no longer exist are left out.

    Numbers of the family that are not listed (new ones) are halved, doubled or switched.
    """
    found: dict[str, Defines] = {"(defaults)": {}}
    known = defaults | LAUNCH_ONLY
    text = "".join(path.read_text() for source in family.sources for path in cases_closure(source))
    values = dict(family.values)
    prefixes = {name.split("_")[0] for name in family.values} - {"TILE", "EARLY"}
    listed = {name for one in families() for name in one.values}
    for name, value in defaults.items():
        if name.split("_")[0] in prefixes and name not in listed and name in text:
            values[name] = (1 - value,) if value in (0, 1) else (value // 2, 2 * value)
    for name, tried in values.items():
        for value in tried:
            if name in known and value != known[name]:
                found[name_of({name: value})] = {name: value}
    for one in [*family.together, *more]:
        if set(one) <= set(known):
            found[name_of(one)] = one
    return found


def cases_closure(source: str) -> list[Path]:
    from kernels_launch import closure

    return [path for path in closure(source) if path.name != "tuning.cuh"]


def name_of(numbers: Defines) -> str:
    return " ".join(f"{name}={value}" for name, value in numbers.items()) or "(defaults)"


class Sweep:
    """All families on one machine."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.time()
        self.device = torch.device("cuda" if torch.cuda.is_available() and not args.dry_run else "cpu")
        self.clock = Clock(quick=True)
        self.cubins = Cubins(args.cubins)
        self.defaults = tuned()
        self.loaded: dict[tuple[str, tuple[tuple[str, int], ...]], Any] = {}
        self.results: list[dict[str, Any]] = []
        self.more: dict[str, list[Defines]] = {}
        for one in args.variant:
            family, _, text = one.partition(":")
            numbers = {name: int(value) for name, value in (part.split("=") for part in text.split(","))}
            self.more.setdefault(family, []).append(numbers)
        chosen = set(args.only.split(",")) if args.only else None
        self.families = [one for one in families() if chosen is None or one.name in chosen]
        self.at = ""
        if args.resume and args.output and args.output.exists():
            self.results = json.loads(args.output.read_text())

    def save(self) -> None:
        if self.args.output:
            self.args.output.parent.mkdir(parents=True, exist_ok=True)
            self.args.output.write_text(json.dumps(self.results, indent=1) + "\n")

    def late(self) -> bool:
        return time.time() - self.began > 60 * self.args.minutes and not self.args.dry_run

    def compile(self, jobs: list[tuple[str, Defines]]) -> None:
        began = time.time()
        self.cubins.compile(jobs)
        print(f"compiled in {time.time() - began:.0f} s, {len(self.cubins.failed)} failed", flush=True)
        for name, error in self.cubins.failed.items():
            print(f"  {name}: {error}", flush=True)

    def jobs(self, family: Family, numbers: dict[str, Defines]) -> list[tuple[str, Defines]]:
        return [(source, self.defaults | one) for one in numbers.values() for source in family.sources]

    def module(self, source: str, numbers: Defines) -> Any:
        """A loaded cubin, or the emulated library."""
        if self.device.type == "cpu":
            from kernels_launch import relevant

            return Emulated(source, relevant(source, numbers))
        known = (source, tuple(sorted(numbers.items())))
        if known not in self.loaded:
            self.loaded[known] = self.cubins.load(source, numbers)
        return self.loaded[known]

    def call(self, case: cases.Case, numbers: Defines, i: int) -> None:
        """One call on the current stream."""
        whole = self.defaults | LAUNCH_ONLY | numbers
        stream = 0 if self.device.type == "cpu" else torch.cuda.current_stream().cuda_stream
        for source, launch, args in case.steps(whole, i):
            self.module(source, self.defaults | numbers).start(launch, args, stream)

    def shape(self, family: Family, shape: Shape, tried: dict[str, Defines]) -> dict[str, Any]:
        """Every variant on one shape."""
        if self.device.type == "cpu":
            shape = replace(
                shape, tokens=min(shape.tokens, 70), hidden=min(shape.hidden, 512), inner=min(shape.inner, 64)
            )
        case = family.make(shape, self.device)
        found: dict[str, Any] = {"family": family.name, "shape": str(shape), "bytes": case.bytes, "variants": {}}
        sides = {}
        for name, numbers in tried.items():
            try:
                case.poison()
                self.call(case, numbers, 0)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if not case.right():
                    found["variants"][name] = "wrong result"
                    continue
                sides[name] = partial(self.call, case, numbers)
                found["variants"][name] = "right"
            except Exception as error:
                found["variants"][name] = said(error)
                alive()
        for name, figures in self.clock.row(sides, case.sets, eager=False).items():
            if figures.graph or figures.error:
                found["variants"][name] = figures.graph or figures.error
        return found

    def again(self, error: LostError) -> NoReturn:
        """The GPU's context is lost: the families behind this one go on in a new process."""
        print(f"{self.at}: the GPU's context is lost: {error}", flush=True)
        names = [one.name for one in self.families]
        rest = names[names.index(self.at) + 1 :]
        left = self.args.minutes - (time.time() - self.began) / 60
        if not rest or left <= 0:
            sys.exit(75)
        kept = [f"--cubins={self.cubins.folder}", f"--minutes={left}", f"--only={','.join(rest)}", "--resume"]
        kept += [f"--output={self.args.output}"] if self.args.output else []
        kept += [f"--variant={one}" for one in self.args.variant]
        os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *kept])

    def family(self, family: Family) -> None:
        tried = variants(family, self.defaults, self.more.get(family.name, []))
        rows = []
        for shape in family.shapes:
            if self.late():
                break
            rows.append(self.one(family, shape, tried))
        best = winners(rows, tried)
        print(self.table(family, rows), flush=True)
        if len(best) > 1 and not self.late() and name_of(best) not in tried:
            print(f"together: {name_of(best)}", flush=True)
            both = {"(defaults)": {}, name_of(best): best}
            if self.device.type == "cuda":
                self.compile(self.jobs(family, both))
            again = [self.one(family, shape, both) for shape in family.shapes if not self.late()]
            print(self.table(family, again), flush=True)

    def one(self, family: Family, shape: Shape, tried: dict[str, Defines]) -> dict[str, Any]:
        try:
            found = self.shape(family, shape, tried)
        except LostError:
            raise
        except Exception as error:
            found = {"family": family.name, "shape": str(shape), "bytes": 0, "variants": {}, "error": said(error)}
            print(f"{family.name}, {shape}: {found['error']}", flush=True)
        self.results.append(found)
        self.save()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def table(self, family: Family, rows: list[dict[str, Any]]) -> str:
        """Variants by their mean ratio to the defaults; microseconds of each shape."""
        names = list(dict.fromkeys(name for row in rows for name in row["variants"]))
        head = [f"{family.name}: us in a graph", *(f"  {i + 1}: {row['shape']}" for i, row in enumerate(rows))]
        lines = []
        for name in names:
            ratio = mean_ratio(rows, name)
            cells = []
            for row in rows:
                value = row["variants"].get(name, "")
                cells.append(f"{value:9.2f}" if isinstance(value, float) else f"{str(value)[:9]:>9}")
            lines.append((ratio, f"{name:72} {ratio:6.3f}" + "".join(cells)))
        lines.sort(key=lambda one: one[0])
        said_once = {value for row in rows for value in row["variants"].values() if isinstance(value, str)}
        told = [f"  {value}" for value in sorted(said_once - {"right"})]
        return "\n".join([*head, *(text for _, text in lines), *told])

    def run(self) -> None:
        if self.device.type == "cuda" or self.args.compile_only:
            print(f"compiler: {nvcc() or 'NVRTC'}", flush=True)
            jobs = [
                job
                for family in self.families
                for job in self.jobs(family, variants(family, self.defaults, self.more.get(family.name, [])))
            ]
            self.compile(jobs)
        if self.args.compile_only:
            return
        for family in self.families:
            if self.late():
                print(f"left out for want of time: {family.name}", flush=True)
                continue
            self.at = family.name
            self.family(family)


def mean_ratio(rows: list[dict[str, Any]], name: str) -> float:
    """Geometric, over the shapes that both have; 9 where there are none or a result is wrong."""
    ratios = []
    for row in rows:
        base, value = row["variants"].get("(defaults)"), row["variants"].get(name)
        if isinstance(value, str) and value != "right":
            return 9.0
        if isinstance(base, float) and isinstance(value, float):
            ratios.append(value / base)
    return statistics.geometric_mean(ratios) if ratios else 9.0


def winners(rows: list[dict[str, Any]], tried: dict[str, Defines]) -> Defines:
    """Of each number the value that gains most, where it gains more than 1 %."""
    best: dict[str, tuple[float, int]] = {}
    for name, numbers in tried.items():
        if len(numbers) == 1:
            ((number, value),) = numbers.items()
            ratio = mean_ratio(rows, name)
            if ratio < 0.99 and ratio < best.get(number, (1.0, 0))[0]:
                best[number] = ratio, value
    return {number: value for number, (_, value) in best.items()}


def main() -> int:
    """Sweeps what `--only` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cubins", type=Path, help="folder that keeps machine code between calls")
    parser.add_argument("--compile-only", action="store_true", help="fills that folder; needs no GPU")
    parser.add_argument("--only", help="families, with commas")
    parser.add_argument("--variant", action="append", default=[], help="one more: family:NAME=value,NAME=value")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    parser.add_argument("--dry-run", action="store_true", help="on the emulator")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    sweep = Sweep(args)
    try:
        sweep.run()
    except LostError as error:
        sweep.again(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
