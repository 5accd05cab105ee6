"""The tables of `offload.py`, from what it has written so far."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Data = dict[str, Any]

#: FreeToken 0.1.2 on the same kind of GPU, shape and imposed routing, CUDA graphs: quoted, not measured here.
#: Share -> hit %, misses a token, TPOT p50, p95.
FREETOKEN = {
    12.5: ("69.7", "116", "26.7 - 26.8", "41 - 45"),
    25.0: ("87.3", "48.8", "12.7 - 12.9", "29"),
    50.0: ("97.5", "9.6", "6.1 - 6.3", "10.5"),
    100.0: ("100", "0", "4.8 - 4.9", "5.3 - 6.6"),
}
FREETOKEN_PREFILL = "1,090 - 1,180"

#: A token may take this often the link's time for its misses, beside the model's own time.
AIM = 1.2

NOTES = """\
**What is imposed.** Weights are random; expert rows are {pool} random rows that come again in rotated form. The ids
of the experts are the trace's: the {traced} that it has for a token, and the layer's most popular others up to
top-{top_k}; decode step s uses the trace's decode token s, batch row b begins at b/B of the trace. The router does all
its work, and weights are its own. The trace has one prompt token only, so the prompt's routing is uniform: every
expert is asked for, and what a prefill leaves in the slots knows nothing of the tokens to come. "First" is the first
pass over the {tokens} tokens after that prompt, cold misses counted; "second" the same tokens again.

**How it is timed.** Milliseconds. TTFT: prompt of {prompt} tokens, to the first token on the host, into empty slots.
TPOT: from one step's end to the next on the device's clock; the host never looks. Modes: *eager* (dynamic cache);
*compile* (static cache, `torch.compile` of the model's call); *one graph* (the step captured in one CUDA graph, of
compiled or of eager kernels; its token 0 runs without). `generate()` compiles with `reduce-overhead`: last table.

**Floors.** X: bytes of the misses over the measured pinned rate for rows. C: bytes of weights (beside the experts, and
the experts asked for) and of keys and values over the measured rate of a device copy. "Own" is the model's time in the
same mode with the experts left out (their call returns its input), the median of {own} tokens. Aim: TPOT mean <=
own + {aim} X. C's part for experts is in neither term, so with few misses the aim asks for more than any memory gives;
the last column has it in. "Over own" is the TPOT mean less "own".
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*text, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


# ---------------------------------------------------------------------- the machine


def meta(arguments: Sequence[str], device: torch.device) -> Data:
    """Machine, versions, command."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB seen at the start, {platform.system()}"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        machine = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, driver {driver()}; {machine}"
    versions = {"moecore": f"{moecore.__version__}{commit()}", "torch": torch.__version__, "CUDA": torch.version.cuda,
                "transformers": transformers.__version__, "accelerate": version("accelerate"),
                "Python": platform.python_version()}  # fmt: skip
    # Without the folders of this machine.
    pairs = zip(arguments, ["", *arguments], strict=False)
    kept = [one for one, before in pairs if not any(flag in one + before for flag in ("--output", "--trace"))]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
        "command": shlex.join(["python", "benches/offload.py", *kept]),
    }


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def driver() -> str:
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def commit() -> str:
    found = output_of("git", "rev-parse", "--short", "HEAD")
    return f" at {found}" if found else ""


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---------------------------------------------------------------------- what follows


def link_rate(data: Data) -> float | None:
    """GB/s of pinned copies of rows, back to back."""
    rate: float | None = data.get("floors", {}).get("link, row, back to back")
    return rate


def floors(data: Data, row: Data, one: Data) -> Data:
    """What bounds a row's pass: X and C in ms, the model's own time, and how the TPOT stands to the aim."""
    shape, rates = data["shape"], data.get("floors", {})
    link, memory = link_rate(data), rates.get("memory, read and write")
    own = next(
        (o.get("p50") for o in data["own"] if (o["batch"], o["mode"]) == (row["batch"], row["mode"])),
        None,
    )
    if not link or not memory:
        return {"x": None, "c": None, "own": own, "ratio": None, "fair": None}
    tokens = data["prompt"] + data["tokens"] / 2
    kept = 4 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * tokens * row["batch"]
    x = one["bytes"] / link / 1e6
    experts = one["lookups"] * shape["expert_bytes"] / memory / 1e6
    c = (data["non_expert_bytes"] + kept) / memory / 1e6 + experts
    ratio = fair = None
    if own:
        ratio, fair = one["mean"] / (own + AIM * x), one["mean"] / (own + experts + AIM * x)
    return {"x": x, "c": c, "own": own, "ratio": ratio, "fair": fair}


def line(row: Data) -> str:
    """A row while the script runs."""
    name = f"{row['share']:g} %, batch {row['batch']}, {row['mode']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    if row["compiled_meanwhile"]:
        name += f" (NOT WARM: {row['compiled_meanwhile']} graphs compiled meanwhile)"
    one = row.get("second", row["first"])
    return (
        f"{name}: TTFT {row['ttft']:.0f}, TPOT p50 {row['first']['p50']:.2f} mean {row['first']['mean']:.2f}, hits "
        f"{100 * row['first']['hit_rate']:.1f} %, misses {row['first']['misses']:.1f}; last pass p50 {one['p50']:.2f}"
    )


# ---------------------------------------------------------------------- the tables


def passes(data: Data, which: str) -> list[list[str]]:
    rows = []
    ordered = sorted(data["rows"], key=lambda row: (row["batch"], row["share"], row["mode"]))
    for row in ordered:
        label = [f"{row['share']:g} %", str(row["batch"]), row["mode"]]
        if "error" in row and which == "first":
            rows.append([*label, row["error"]])
        if which not in row:
            continue
        one = row[which]
        found = floors(data, row, one)
        aim = "" if found["ratio"] is None else f"{'met' if found['ratio'] <= 1 else 'missed'}, {found['ratio']:.2f}"
        floor = None if found["x"] is None else max(found["x"], found["c"])
        exposed = None if found["own"] is None else one["mean"] - found["own"]
        rows.append([
            *label, number(row["ttft"], 0), number(one["p50"], 2), number(one["p95"], 2), number(one["mean"], 2),
            number(one["wall"], 2), number(100 * one["hit_rate"]), number(one["misses"]),
            number(one["bytes"] / 1e9, 3), number(one["link_gb_s"]), number(exposed, 2), number(found["x"], 2),
            number(found["c"], 2), number(floor, 2), number(found["own"], 2), aim, number(found["fair"], 2),
        ])  # fmt: skip
    return rows


HEAD = [
    "experts", "batch", "mode", "TTFT", "TPOT p50", "p95", "mean", "wall", "hit %", "misses/step", "GB/step",
    "link GB/s", "over own", "X", "C", "max(C, X)", "own", "aim", "with C's experts",
]  # fmt: skip


def memory_table(data: Data) -> str:
    rows = []
    for row in sorted(data["rows"], key=lambda row: (row["batch"], row["share"])):
        if row.get("peak_bytes"):
            rest = row["peak_bytes"] - row["budget_bytes"] - row["before_bytes"]
            rows.append([f"{row['share']:g} %", row["batch"], row["mode"], f"{row['slots']:,}",
                         *(number(one / 2**30, 2) for one in (row["budget_bytes"], row["peak_bytes"],
                                                              row["before_bytes"], rest))])  # fmt: skip
    head = ["experts", "batch", "mode", "slots", "budget GiB", "peak GiB", "of it before", "of it in passing"]
    return table(head, rows) if rows else ""


def answered(row: Data) -> str:
    """How long the answering thread takes for a record, from its counts by powers of two: median and p95."""
    counts = row.get("answers", {}).get("latency_ns_log2") or []
    limits = []
    for share in (0.5, 0.95):
        seen = 0
        for power, count in enumerate(counts):
            seen += count
            if count and seen >= share * sum(counts):
                limits.append(f"< {2 ** (power + 1) / 1e3:,.1f} us")
                break
    return ", ".join(limits)


def waits_table(data: Data) -> str:
    rows = []
    for row in data["rows"]:
        if "waits" in row:
            seen = row["waits"]
            per_token = seen.get("per_token")
            said = seen.get("error") or ("the profiler sees no call of the runtime" if per_token is None else "")
            rows.append([f"{row['share']:g} %", row["mode"], said or number(per_token, 2),
                         number(seen.get("launches_per_token")), number(row["issue_ms"], 2),
                         number(row.get("second", row["first"])["mean"], 2), answered(row)])  # fmt: skip
    head = ["experts", "mode", "waits of the host per token", "launches per token", "host issues a token in", "TPOT",
            "a record is answered in (p50, p95)"]  # fmt: skip
    return table(head, rows) if rows else ""


def peers_table(data: Data) -> str:
    layers = data["shape"]["layers"]
    best = {
        row["share"]: row for row in data["rows"] if row["batch"] == 1 and "first" in row and "graph" in row["mode"]
    }
    ours = best.get(25.0)
    memory = data.get("floors", {}).get("memory, read and write")
    # The head runs once, however many layers there are: what scaling adds of it is taken off again.
    head_ms = data["shape"]["vocabulary"] * data["shape"]["hidden"] * 2 / memory / 1e6 if memory else 0.0
    rows = []
    for peer in data["peers"]:
        label = [peer["peer"], peer["mode"], f"{peer['layers']} of {layers}"]
        if "tpot" not in peer:
            rows.append([*label, peer.get("error", "")])
            continue
        head_again = (peer["scale"] - 1) * head_ms if peer["peer"] != "layer streaming" else 0.0
        p50, mean = (peer["tpot"][name] * peer["scale"] - head_again for name in ("p50", "mean"))
        ratio = "" if ours is None else f"{mean / ours['first']['mean']:.1f}x"
        ttft = number(peer["ttft"] * peer["scale"], 0) if "ttft" in peer else ""
        rows.append([*label, ttft, number(p50, 2), number(mean, 2), ratio])
    head = ["peer", "mode", "layers run", "TTFT, scaled", "TPOT p50, scaled", "mean, scaled", "to moecore at 25 %"]
    return table(head, rows) if rows else ""


def freetoken_table(data: Data) -> str:
    rows = []
    for share, (hits, misses, p50, p95) in FREETOKEN.items():
        own = [
            r for r in data["rows"] if (r["share"], r["batch"]) == (share, 1) and "first" in r and "graph" in r["mode"]
        ]
        for row in own:
            one = row.get("second", row["first"]) if share == 100 else row["first"]
            rows.append([f"{share:g} %", hits, misses, p50, p95, row["mode"], number(100 * one["hit_rate"]),
                         number(one["misses"]), number(one["p50"], 2), number(one["p95"], 2)])  # fmt: skip
    head = ["experts", "hit %", "misses", "TPOT p50", "p95", "moecore", "hit %", "misses", "TPOT p50", "p95"]
    return table(head, rows) if rows else ""


def generate_line(data: Data) -> str:
    found = data.get("generate")
    if not found:
        return ""
    if "error" in found:
        said = found["error"]
    else:
        again = found["again"]
        first = found["first"]
        said = (
            f"{found['tpot']:.2f} ms a token; {first['graphs']} graphs compiled, {first['graph_breaks']} graph breaks, "
            f"{first['skipped']} refused as CUDA graphs; the first call took {first['seconds']:.1f} s, the next "
            f"{again['seconds']:.1f} s, in which {again['graphs']} were compiled"
        )
    return f"First {found['layers']} layers, {found['share']:g} %: {said}.\n"


def text(data: Data) -> str:
    """The whole file of results."""
    about, shape = data["meta"], data["shape"]
    trace_has = 6
    notes = NOTES.format(pool=64, traced=trace_has, top_k=shape["top_k"], tokens=data["tokens"],
                         prompt=data["prompt"], aim=AIM, own=data["own_tokens"])  # fmt: skip
    head = (
        f"# A {shape['name']} shape under moecore\n\n{about['date']}. {about['machine']}.  \n{about['versions']}.  \n"
        f"{shape['layers']} layers, {shape['experts']} experts of {shape['expert_bytes'] / 2**20:.3g} MiB, "
        f"top-{shape['top_k']}, bf16. {about.get('seconds', 0):.0f} s in all, "
        f"{data.get('start_s', 0):.0f} s for the model and its host rows.  \nCommand: `{about['command']}`\n\n{notes}"
    )
    parts = [head]
    for title, body in (
        ("First pass", table(HEAD, passes(data, "first"))),
        ("Second pass", table(HEAD, passes(data, "second"))),
        ("Beside FreeToken 0.1.2 (quoted: measured earlier on the same kind of GPU, shape and routing; prefill of 512 "
         f"tokens {FREETOKEN_PREFILL} ms; at 100 % our second pass)", freetoken_table(data)),
        ("Peers: means to moecore's graph at 25 %, first pass", peers_table(data)),
        ("Does the host wait? (steady decode)", waits_table(data)),
        ("Device memory", memory_table(data)),
        ("`generate()` with a static cache: `reduce-overhead`", generate_line(data)),
        ("Measured rates", table(["what", "GB/s"], [(k, number(v)) for k, v in data.get("floors", {}).items()])),
    ):  # fmt: skip
        if body:
            parts.append(f"## {title}\n\n{body}")
    left = [f"left out for want of time: {one}" for one in data["skipped"]]
    left += [f"failed: {name}: {error}" for name, error in data.get("failed", {}).items()]
    if left:
        parts.append("## Not here\n\n" + "".join(f"- {one}\n" for one in left))
    return "\n".join(parts)
