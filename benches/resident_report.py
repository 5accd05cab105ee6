"""The page of `resident.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernels_report import at_commit, table
from offload_run import EAGER

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = "moecore"
STOCK = ("grouped_mm", "batched_mm")
NAMES = (OURS, *STOCK)
#: Tokens of the prompt of the prefill's rows.
LONG = 4096


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
        "step captured in one CUDA graph). Eager rows ran in turns of a few tokens. All are compiled alike: "
        "`torch.compile` of the model's call, in one piece where that holds. Milliseconds of a step on the device's "
        "clock, mean; prompts of 128 tokens.",
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
    if data["host"]:
        head = ("experts", "ms to issue a token", "launches a token", "waits a token")
        out += ["## The host's part, batch 1, eager", "", *table(head, host_rows(data["host"])), ""]
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


def host_rows(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Cells."""
    for row in rows:
        if "error" in row:
            yield (row["name"], row["error"], "", "")
            continue
        waits = "" if row["per_token"] is None else f"{row['per_token']:.1f}"
        yield (row["name"], f"{row['ms']:.1f}", f"{row['launches_per_token']:.0f}", waits)
