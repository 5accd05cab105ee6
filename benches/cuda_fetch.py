"""The CUDA kernels alone, at the shape of Qwen3-30B-A3B: fetches beside the copy engine, products beside memory.

Needs a GPU. `python benches/cuda_fetch.py [--sweep] [--output FILE.json]`
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "cuda"), str(HERE.parent / "tests" / "gpu")]

HIDDEN, BETWEEN, EXPERTS, TOP_K = 2048, 768, 128, 8
ROW = 3 * HIDDEN * BETWEEN * 2
TOKENS = (1, 2, 4, 8, 16)
#: Launches of one replay; their experts differ, so that L2 does not serve them.
ROTATION = 16


class Layer:
    """One layer, all of it resident."""

    def __init__(self) -> None:
        import torch
        from engine_rig import Rig

        self.rig = Rig(layers=1, experts=EXPERTS, row_bytes=ROW, slots=EXPERTS, fill=False)
        generator = torch.Generator(device="cuda").manual_seed(0)
        for expert in range(EXPERTS):
            row = torch.randn(ROW // 2, device="cuda", generator=generator).mul_(0.02).to(torch.bfloat16)
            self.rig.row(expert)[:ROW] = row.view(torch.uint8).cpu().numpy()
        for at in range(0, EXPERTS, 8):
            self.rig.acquire(0, torch.arange(at, at + 8, device="cuda"))
        torch.cuda.synchronize()
        assert self.rig.engine.error() is None

    def calls(self, tokens: int) -> list[dict[str, Any]]:
        """Tensors of calls whose experts rotate."""
        import torch

        calls = []
        for turn in range(ROTATION):
            first = [(turn * tokens + token) * TOP_K for token in range(tokens)]
            ids = (torch.tensor(first).reshape(-1, 1) + torch.arange(TOP_K)).remainder(EXPERTS).cuda()
            call = {
                "ids": ids,
                "slots": self.rig.acquire(0, ids),
                "x": torch.randn(tokens, HIDDEN, device="cuda").to(torch.bfloat16),
                "h": torch.randn(tokens * TOP_K, BETWEEN, device="cuda").to(torch.bfloat16),
                "out": torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda"),
                "weights": torch.rand(tokens, TOP_K, device="cuda"),
                "tokens": tokens,
            }
            calls.append(call)
        return calls

    def args(self, call: dict[str, Any], kind: str) -> Any:
        """Arguments of a product for a launch of the bench's own."""
        from launch import ExpertArgs

        up = kind == "up"
        return ExpertArgs(
            arena=self.rig.arena.data_ptr(), slot_bytes=self.rig.slot_bytes, offset=0 if up else 4 * HIDDEN * BETWEEN,
            bias_offset=2**64 - 1, x=call["x" if up else "h"].data_ptr(), slots=call["slots"].data_ptr(),
            weights=call["weights"].data_ptr(), out=call["h" if up else "out"].data_ptr(), tokens=call["tokens"],
            k=TOP_K, inputs=HIDDEN if up else BETWEEN, outputs=BETWEEN if up else HIDDEN, act=0, flags=1,
            slot_count=self.rig.arena.shape[0],
        )  # fmt: skip

    def run(self, call: dict[str, Any], which: str, stream: int) -> None:
        """The shipped kernels: a, u and d for acquire, up and down."""
        engine, tokens = self.rig.engine, call["tokens"]
        x, h, slots, out = (call[name].data_ptr() for name in ("x", "h", "slots", "out"))
        if "a" in which:
            engine.acquire(0, call["ids"].data_ptr(), tokens * TOP_K, slots, 0, stream)
        if "u" in which:
            engine.expert_up("bfloat16", 0, x, slots, h, tokens, TOP_K, HIDDEN, BETWEEN, 0, stream)
        if "d" in which:
            weights, offset = call["weights"].data_ptr(), 4 * HIDDEN * BETWEEN
            engine.expert_down("bfloat16", offset, h, slots, weights, True, out, tokens, TOP_K, BETWEEN, HIDDEN, stream)

    def expect(self, calls: list[dict[str, Any]], kind: str, run: Any) -> None:
        """That a variant writes what the shipped kernel writes, bit for bit."""
        import torch
        from timing import raw_stream

        name = "h" if kind == "up" else "out"
        for call in calls:
            self.run(call, kind[0], raw_stream())
        want = [call[name].clone() for call in calls]
        for call in calls:
            call[name].fill_(float("nan"))
        run()
        for call, expected in zip(calls, want, strict=True):
            assert torch.equal(call[name], expected), kind

    @staticmethod
    def bytes(tokens: int, kind: str) -> int:
        """Bytes of weights that a call reads."""
        matrices = {"up": 2, "down": 1}[kind]
        return min(tokens * TOP_K, EXPERTS) * matrices * HIDDEN * BETWEEN * 2


def memory_rate() -> float:
    """GB/s of a copy on the device, reads and writes."""
    import torch
    from timing import gpu_us

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / gpu_us(lambda: target.copy_(source), 10) / 1e3


def link(found: dict[str, Any]) -> None:
    """The copy engine: rows and 256 MiB."""
    import torch
    from timing import gpu_us

    pinned = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    target = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    copies = {}
    for rows in range(1, 9):
        copies[rows] = gpu_us(lambda rows=rows: target[: rows * ROW].copy_(pinned[: rows * ROW], non_blocking=True))
    whole = gpu_us(lambda: target.copy_(pinned, non_blocking=True), 5)
    found["copy_engine_us"] = copies
    found["copy_engine_256mib_gbs"] = target.numel() / whole / 1e3
    print(f"copy engine: 256 MiB at {target.numel() / whole / 1e3:.1f} GB/s")


def misses(found: dict[str, Any], arch: str) -> Any:
    """Calls with misses: one launch, and three."""
    import sweep
    import torch
    from engine_rig import Rig
    from launch import Module, compile_all
    from timing import gpu_us, raw_stream

    rig = Rig(layers=1, experts=256, row_bytes=ROW, slots=64, fill=True)
    calls = sweep.Fetches(rig)
    blocks, threads = sweep.tuned("ACQUIRE_BLOCKS"), sweep.tuned("ACQUIRE_THREADS")
    three = Module(compile_all([(str(HERE / "cuda" / "three_launch.cu"), (), arch)])[0])
    table, seq = [], 0
    for count in range(9):

        def fresh(count: int = count) -> Any:
            batches = calls.batches(max(count, 1), 23 if count else 1)
            if count == 0:
                rig.acquire(0, next(batches)[0])
            torch.cuda.synchronize()
            return batches

        def one(batches: Any) -> None:
            _, args = next(batches)
            rig.engine.acquire(0, args.ids, args.pairs, args.slots, 0, raw_stream())

        def several(batches: Any) -> None:
            nonlocal seq
            _, args = next(batches)
            three.launch("three_publish", (1, 1), threads, args, raw_stream())
            three.wait_for_word(raw_stream(), calls.mailbox + 4, seq)
            three.launch("three_fetch", (blocks, 1), threads, args, raw_stream())
            seq += 1

        row: dict[str, Any] = {"misses": count, "one_launch_us": gpu_us(partial(one, fresh()))}
        batches = fresh()
        seq = int(rig.state.view(torch.int32)[0])
        row["three_launches_us"] = gpu_us(partial(several, batches))
        if count:
            row["gbs"] = count * ROW / row["one_launch_us"] / 1e3
            row["of_copy_engine"] = found["copy_engine_us"][count] / row["one_launch_us"]
        assert rig.engine.error() is None, rig.engine.error()
        table.append(row)
    found["misses"] = table
    print("misses  acquire us   GB/s  of copy engine   three launches us")
    for row in table:
        rate = f"{row['gbs']:6.1f} {row['of_copy_engine']:15.0%}" if row["misses"] else " " * 22
        print(f"{row['misses']:6} {row['one_launch_us']:11.1f} {rate} {row['three_launches_us']:19.1f}")
    return rig


def stock(layer: Layer, found: dict[str, Any]) -> dict[str, Any]:
    """Stock transformers over the same experts: one callable for each of its implementations."""
    import torch

    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        found["stock"] = f"left out: {error}"
        return {}
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=BETWEEN, num_experts=EXPERTS)
    with torch.device("cuda"):
        module = Qwen3MoeExperts(config).to(torch.bfloat16)
    rows = layer.rig.arena[:, :ROW].view(torch.bfloat16)
    slots = layer.rig.table.long()
    with torch.no_grad():
        module.gate_up_proj.copy_(rows[slots, : 2 * HIDDEN * BETWEEN].view(EXPERTS, 2 * BETWEEN, HIDDEN))
        module.down_proj.copy_(rows[slots, 2 * HIDDEN * BETWEEN :].view(EXPERTS, HIDDEN, BETWEEN))

    def using(name: str) -> Any:
        @torch.no_grad()
        def run(call: dict[str, Any]) -> torch.Tensor:
            config._experts_implementation = name
            out: torch.Tensor = module(call["x"], call["ids"], call["weights"])
            return out

        return run

    return {name: using(name) for name in ("batched_mm", "grouped_mm")}


def products(layer: Layer, found: dict[str, Any]) -> None:
    """Resident layers: each kernel, the three together, and stock transformers."""
    import torch
    from timing import graph_us, host_us, raw_stream

    floor = found["memory_gbs"]
    others = stock(layer, found)
    table = []
    for tokens in TOKENS:
        calls = layer.calls(tokens)
        row: dict[str, Any] = {"tokens": tokens}
        for which, name in (("a", "acquire"), ("u", "up"), ("d", "down"), ("aud", "all")):

            def run(calls: Any = calls, which: str = which) -> None:
                for call in calls:
                    layer.run(call, which, raw_stream())

            row[f"{name}_us"] = graph_us(run, len(calls))
        for name in ("up", "down"):
            row[f"{name}_share"] = layer.bytes(tokens, name) / row[f"{name}_us"] / 1e3 / floor
        row["all_host_us"] = host_us(lambda calls=calls: layer.run(calls[0], "aud", raw_stream()), 100)
        for name, implementation in others.items():

            def run_stock(calls: Any = calls, implementation: Any = implementation) -> None:
                for call in calls:
                    implementation(call)

            try:
                row[f"{name}_us"] = graph_us(run_stock, len(calls))
                ours = calls[0]["out"].double()
                theirs = implementation(calls[0]).double()
                row[f"{name}_distance"] = ((ours - theirs).norm() / theirs.norm()).item()
                row[f"{name}_host_us"] = host_us(lambda call=calls[0], run=implementation: run(call), 50)
            except Exception as error:  # a peer's failure is a line of the table
                row[f"{name}_us"] = None
                found[f"stock_{name}"] = str(error)
                torch.cuda.synchronize()
        table.append(row)
    found["products"] = table
    print(f"products, all resident, in a graph; floor: {floor:.0f} GB/s of a device copy")
    print(" T  acquire us    up us share  down us share  all us  host us | stock: batched_mm  grouped_mm us (host us)")
    for row in table:
        theirs = "  ".join(
            f"{row[f'{name}_us']:8.1f} ({row[f'{name}_host_us']:.0f})" for name in others if row.get(f"{name}_us")
        )
        print(
            f"{row['tokens']:2} {row['acquire_us']:11.2f} {row['up_us']:8.2f} {row['up_share']:5.0%}"
            f" {row['down_us']:8.2f} {row['down_share']:5.0%} {row['all_us']:7.2f} {row['all_host_us']:8.1f} | {theirs}"
        )


def again(run: Any) -> None:
    """Twenty times."""
    for _ in range(20):
        run()


def choosing(layer: Layer, found: dict[str, Any]) -> None:
    """The router's choice and the look-up of its experts, all resident: one launch, two, and torch's own choice."""
    import torch
    from moecore import ops
    from timing import graph_us, raw_stream

    table = []
    for tokens in (1, 4, 16):
        call = layer.calls(tokens)[0]
        logits = torch.randn(tokens, EXPERTS, dtype=torch.bfloat16, device="cuda")
        weights = torch.empty(tokens, TOP_K, dtype=torch.bfloat16, device="cuda")
        pairs, slots, ids = tokens * TOP_K, call["slots"].data_ptr(), call["ids"]

        def torch_gate(logits: Any = logits) -> Any:
            values, chosen = torch.topk(torch.softmax(logits, -1, dtype=torch.float), TOP_K)
            return (values / values.sum(-1, keepdim=True)).to(logits.dtype), chosen

        def gate(logits: Any = logits) -> Any:
            return ops.gate(logits, TOP_K, renormalize=True, weights_dtype=torch.bfloat16, ids_dtype=torch.int64)

        def acquire(ids: Any = ids, pairs: int = pairs, slots: int = slots) -> None:
            layer.rig.engine.acquire(0, ids.data_ptr(), pairs, slots, 0, raw_stream())

        def both(
            logits: Any = logits, weights: Any = weights, ids: Any = ids, slots: int = slots, tokens: int = tokens
        ) -> None:
            layer.rig.engine.gate_acquire(
                0, 1, logits.data_ptr(), EXPERTS, tokens, EXPERTS, TOP_K, 1, 1, 0, 1, 0, weights.data_ptr(), 1,
                ids.data_ptr(), 1.0, 0.0, slots, 0, raw_stream(),
            )  # fmt: skip

        both()
        torch.cuda.synchronize()
        expected = gate()
        assert torch.equal(ids.view(tokens, TOP_K), expected[1]), "ids"
        assert torch.equal(weights, expected[0]), "weights"
        sides = {
            "torch's choice": torch_gate, "gate": gate, "acquire": acquire,
            "torch, then acquire": lambda run=torch_gate, then=acquire: (run(), then()),
            "gate, then acquire": lambda run=gate, then=acquire: (run(), then()), "gate_acquire": both,
        }  # fmt: skip
        table.append({"tokens": tokens} | {name: graph_us(partial(again, run), 20) for name, run in sides.items()})
    found["choosing_us"] = table
    for row in table:
        print("  ".join(f"{name}: {us:.2f}" if name != "tokens" else f"T={us}" for name, us in row.items()))


def hits(layer: Layer, found: dict[str, Any]) -> None:
    """Where the host time of an eager call goes."""
    import torch
    from timing import host_us, raw_stream

    call = layer.calls(1)[0]
    engine, ids, slots = layer.rig.engine, call["ids"].data_ptr(), call["slots"].data_ptr()
    stream, small = raw_stream(), torch.zeros(8, device="cuda")
    parts = {
        "engine.acquire": lambda: engine.acquire(0, ids, TOP_K, slots, 0, stream),
        "engine.expert_up": lambda: layer.run(call, "u", stream),
        "engine.check (a binding without a launch)": engine.check,
        "raw current stream": raw_stream,
        "torch.cuda.current_stream().cuda_stream": lambda: torch.cuda.current_stream().cuda_stream,
        "torch: x.add_(1)": lambda: small.add_(1),
        "torch.empty(1, 8, int32)": lambda: torch.empty(1, 8, dtype=torch.int32, device="cuda"),
        "data_ptr": call["ids"].data_ptr,
    }
    found["host_us"] = {name: host_us(run) for name, run in parts.items()}
    for name, us in found["host_us"].items():
        print(f"host time {name:44} {us:6.2f} us")


def main() -> None:
    """Prints tables, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="times every variant of the kernels, too")
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    options = parser.parse_args()
    import sweep
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}"
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "row_bytes": ROW}

    def save() -> None:
        if options.output is not None:
            options.output.write_text(json.dumps(found, indent=1))

    link(found)
    rig = misses(found, arch)
    save()
    if options.sweep:
        found["sweep_fetch"] = sweep.fetches(rig, arch)
        save()
    rig.close()
    found["memory_gbs"] = memory_rate()
    layer = Layer()
    hits(layer, found)
    choosing(layer, found)
    products(layer, found)
    save()
    if options.sweep:
        found["sweep_experts"] = sweep.experts(layer, found["memory_gbs"], arch)
    layer.rig.close()
    save()


if __name__ == "__main__":
    main()
