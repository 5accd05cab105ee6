"""Other numbers for the kernels: every variant is checked for its results, then timed."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from launch import KERNELS, AcquireArgs, ExpertArgs, Module, acquire_args, compile_all
from moecore import _core
from timing import gpu_us, graph_us, raw_stream

Defines = tuple[tuple[str, int], ...]


def defines(**numbers: int) -> Defines:
    """As compiled."""
    return tuple(sorted(numbers.items()))


#: Compile-time numbers of acquire, and the blocks that each is launched with.
ACQUIRES: list[Defines] = [
    defines(),
    defines(FETCH_DYNAMIC=0),
    defines(FETCH_IN_FLIGHT=4),
    defines(FETCH_IN_FLIGHT=16),
    defines(ACQUIRE_THREADS=256),
    defines(ACQUIRE_THREADS=256, FETCH_IN_FLIGHT=16),
    defines(ACQUIRE_THREADS=1024),
    defines(ACQUIRE_THREADS=1024, FETCH_IN_FLIGHT=4),
    defines(FETCH_WIDE=1),
]
BLOCKS = (2, 3, 4, 6, 8, 16)
PAUSES = (0, 100, 400)

UPS: list[Defines] = [
    defines(UP_DEPTH=depth, EXPERT_WARPS=warps) for depth, warps in ((2, 4), (4, 4), (8, 4), (4, 2), (4, 8))
]
DOWNS: list[Defines] = [
    defines(DOWN_SHARES=shares, DOWN_OUTPUTS=outputs, DOWN_ROWS=rows, DOWN_DEPTH=depth, DOWN_WARPS=warps)
    for shares, outputs, rows, depth, warps in (
        (1, 1, 4, 2, 4), (4, 1, 2, 3, 4), (4, 2, 2, 3, 4), (4, 2, 2, 3, 8), (8, 1, 1, 3, 8), (8, 2, 1, 3, 8),
        (8, 4, 1, 3, 8), (8, 3, 1, 3, 8), (8, 2, 1, 3, 16), (8, 2, 1, 4, 8), (4, 4, 2, 3, 4), (8, 6, 1, 3, 8),
    )
]  # fmt: skip


def name_of(variant: Defines) -> str:
    """For a table."""
    return " ".join(f"{name.lower()}={value}" for name, value in variant) or "(defaults)"


def tuned(name: str) -> int:
    """A default of cuda/tuning.cuh."""
    lines = (KERNELS / "tuning.cuh").read_text().splitlines()
    return next(int(line.split()[2]) for line in lines if line.startswith(f"#define {name} "))


class Fetches:
    """Calls of one rig with acquire kernels of all kinds."""

    def __init__(self, rig: Any) -> None:
        self.rig = rig
        self.mailbox = _core._testing.mailbox(rig.engine)
        self.at = 0

    def batch(self, misses: int) -> torch.Tensor:
        """Experts that are not resident, as every call moves on."""
        ids = [(self.at + i) % self.rig.experts for i in range(misses)]
        self.at += misses
        return torch.tensor(ids, device="cuda")

    def batches(self, misses: int, count: int) -> Any:
        """Arguments of `count` calls, again and again."""
        out = torch.empty(misses, dtype=torch.int32, device="cuda")
        tensors = [self.batch(misses) for _ in range(count)]
        self.keep = tensors, out
        return cycle([(ids, acquire_args(self.rig, self.mailbox, ids, out)) for ids in tensors])

    def time(self, module: Module, blocks: int, threads: int, misses: int, repeats: int) -> float:
        """Microseconds of a call with so many misses."""
        calls = self.batches(misses, repeats + 3)

        def run() -> None:
            args: AcquireArgs = next(calls)[1]
            module.launch("moecore_acquire", (blocks, 1), threads, args, raw_stream())

        return gpu_us(run, repeats)

    def time_hits(self, module: Module, blocks: int, threads: int) -> float:
        """Microseconds of a call without a miss, in a graph."""
        ids, args = next(self.batches(8, 1))
        module.launch("moecore_acquire", (blocks, 1), threads, args, raw_stream())
        torch.cuda.synchronize()
        assert ids is not None

        def run() -> None:
            for _ in range(50):
                module.launch("moecore_acquire", (blocks, 1), threads, args, raw_stream())

        return graph_us(run, 50)

    def check(self, module: Module, blocks: int, threads: int) -> None:
        """Every byte of a call's rows."""
        ids = self.batch(16)
        slots = torch.full((16,), -7, dtype=torch.int32, device="cuda")
        args = acquire_args(self.rig, self.mailbox, ids, slots)
        module.launch("moecore_acquire", (blocks, 1), threads, args, raw_stream())
        for expert, slot in zip(ids.tolist(), slots.tolist(), strict=True):
            want = torch.from_numpy(self.rig.row(expert)[: self.rig.row_bytes])
            assert torch.equal(self.rig.arena[slot, : self.rig.row_bytes].cpu(), want), (expert, slot)
        assert self.rig.engine.error() is None, self.rig.engine.error()


def fetches(rig: Any, arch: str) -> list[dict[str, Any]]:
    """Every variant of acquire."""
    source = str(KERNELS / "fetch.cu")
    paused = [defines(POLL_PAUSE_NS=pause) for pause in PAUSES]
    variants = ACQUIRES + paused
    codes = compile_all([(source, variant, arch) for variant in variants])
    all_calls = Fetches(rig)
    rows = []
    for variant, code in zip(variants, codes, strict=True):
        module = Module(code)
        threads = dict(variant).get("ACQUIRE_THREADS", tuned("ACQUIRE_THREADS"))
        for blocks in BLOCKS if variant not in paused else (4,):
            all_calls.check(module, blocks, threads)
            row: dict[str, Any] = {"variant": name_of(variant), "blocks": blocks}
            row["hits_us"] = all_calls.time_hits(module, blocks, threads)
            row["1_us"] = all_calls.time(module, blocks, threads, 1, 15)
            row["8_us"] = all_calls.time(module, blocks, threads, 8, 5)
            rows.append(row)
    rows.sort(key=lambda row: row["1_us"])
    print(f"{'acquire variant':66} blocks  all hit  1 miss us GB/s   8 misses us GB/s")
    for row in rows:
        rates = [n * rig.row_bytes / row[f"{n}_us"] / 1e3 for n in (1, 8)]
        print(
            f"{row['variant']:66} {row['blocks']:6} {row['hits_us']:8.2f} {row['1_us']:8.1f} {rates[0]:6.1f}"
            f" {row['8_us']:10.1f} {rates[1]:6.1f}"
        )
    return rows


def experts(shape: Any, floor: float, arch: str) -> list[dict[str, Any]]:
    """Every variant of the two products; `shape` is a `Layer` of cuda_fetch."""
    source = str(KERNELS / "experts.cu")
    variants = [("up", variant) for variant in UPS] + [("down", variant) for variant in DOWNS]
    codes = compile_all([(source, variant, arch) for _, variant in variants])
    rows = []
    for (kind, variant), code in zip(variants, codes, strict=True):
        module, numbers = Module(code), dict(variant)
        warps = numbers["EXPERT_WARPS" if kind == "up" else "DOWN_WARPS"]
        row: dict[str, Any] = {"kernel": kind, "variant": name_of(variant)}
        for tokens in (1, 4, 16):
            calls = shape.calls(tokens)

            def run(
                calls: Any = calls, kind: str = kind, numbers: Any = numbers, warps: int = warps, module: Any = module
            ) -> None:
                for call in calls:
                    args: ExpertArgs = shape.args(call, kind)
                    columns = warps if kind == "up" else warps // numbers["DOWN_SHARES"] * numbers["DOWN_OUTPUTS"]
                    rows = args.tokens * args.k if kind == "up" else args.tokens
                    grid = (rows, -(-args.outputs // columns))
                    module.launch(f"moecore_expert_{kind}_bf16", grid, warps * 32, args, raw_stream())

            shape.expect(calls, kind, run)
            row[f"{tokens}_us"] = us = graph_us(run, len(calls), 10)
            row[f"{tokens}_share"] = shape.bytes(tokens, kind) / us / 1e3 / floor
        rows.append(row)
    rows.sort(key=lambda row: (row["kernel"], row["1_us"]))
    print(f"{'expert kernel':76}      T=1 us share      T=4 us share     T=16 us share")
    for row in rows:
        figures = "".join(f" {row[f'{t}_us']:11.2f} {row[f'{t}_share']:5.0%}" for t in (1, 4, 16))
        print(f"{row['kernel'] + ' ' + row['variant']:76}{figures}")
    return rows
