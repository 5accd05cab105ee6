"""The tables of `kernels.py`."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Found = dict[str, Any]
OURS = "moecore"
#: Sides that are ours, too, or less than a peer.
NO_PEER = {
    OURS, "moecore's align alone", "the product alone", "moecore index, permute, combine; grouped_mm",
    "grouped_mm and silu alone",
}  # fmt: skip


def meta() -> Found:
    """Machine and versions."""
    import torch

    found: Found = {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }  # fmt: skip
    for name in ("moecore", "transformers", "triton"):
        try:
            found[name] = getattr(__import__(name), "__version__", "?")
        except Exception as error:
            found[name] = f"absent ({type(error).__name__})"
    for name, command in {
        "gpu": "nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader",
        "commit": "git rev-parse --short HEAD",
    }.items():
        try:
            out = subprocess.run(command.split(), capture_output=True, text=True, timeout=20)
            found[name] = out.stdout.strip() or "?"
        except OSError:
            found[name] = "?"
    return found


def asked() -> str:
    """The options of this run, without where things lie."""
    words, found = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--peers", "--output"):
            next(words, None)
        if word != "--output":
            found.append("--peers FOLDER" if word == "--peers" else word)
    return " ".join(found)


def at_commit(told: Found) -> str:
    """Where that is known: a copy of the sources has no history."""
    return f" at {told['commit']}" if told.get("commit", "?") != "?" else ""


def graph(row: Found | None, side: str = OURS) -> float | None:
    """Microseconds of a side in a graph."""
    return None if row is None else row.get("sides", {}).get(side, {}).get("graph")


def best_peer(row: Found) -> tuple[str, float] | None:
    """The fastest of the others whose result is right."""
    times = {
        name: one["graph"]
        for name, one in row.get("sides", {}).items()
        if one["graph"] and name not in NO_PEER and one["agrees"] in (True, None)
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def rate(row: Found, side: str = OURS) -> float | None:
    """GB/s of the fewest bytes."""
    us = graph(row, side)
    return row["bytes"] / us / 1e3 if us else None


def line(row: Found) -> str:
    """One row while it runs."""
    if "error" in row:
        return f"{row['key']}: {row['error']}"
    parts = []
    for name, one in row["sides"].items():
        figure = f"{one['graph']:.2f}" if one["graph"] else (one["error"] or "not timed")
        eager = f" ({one['eager']:.0f} eager)" if one["eager"] else ""
        doubt = "" if one["agrees"] in (True, None) else f" DIFFERS {one['agrees']!s:.60}"
        parts.append(f"{name} {figure}{eager}{doubt}")
    return f"{row['key']}: " + "; ".join(parts)


# ------------------------------------------------------------------------------------------------------------- the aims


def aims(data: Found) -> Iterator[tuple[str, str, str, str]]:
    """What is aimed at, the aim, what was seen, and whether it is met."""
    rows = {row["key"]: row for row in data["rows"]}
    floors = data.get("floors", {})
    copy = floors.get("copy_gbs", 0.0)

    def verdict(value: float | None, limit: float, less: bool = True) -> str:
        if value is None:
            return "not measured"
        return "met" if (value <= limit if less else value >= limit) else f"**missed** ({value / limit:.2f} of the aim)"

    def us(what: str, key: str, limit: float) -> tuple[str, str, str, str]:
        seen = graph(rows.get(key))
        peer = best_peer(rows[key]) if key in rows else None
        beside = f"; best peer {peer[1]:.2f} ({peer[0]})" if peer else ""
        return what, f"<= {limit:g} us", f"{seen:.2f} us{beside}" if seen else "-", verdict(seen, limit)

    yield us("gate, T=1, E=128", "gate: T=1 E=128 k=8 fp32", 1.6)
    yield us("gate, T=8192, E=256, fp32", "gate: T=8192 E=256 k=8 fp32", 6.0)
    yield us("route, T=1, E=128", "route: T=1 E=128 k=8 fp32", 2.8)
    yield us("route, T=64, E=256", "route: T=64 E=256 k=8 fp32", 3.5)
    for tokens in (1, 4096):
        odd, even = (graph(rows.get(f"gate: T={tokens} E={experts} k=4 fp32")) for experts in (60, 64))
        seen = f"{odd:.2f} against {even:.2f} us" if odd and even else "-"
        ratio = odd / even if odd and even else None
        # Two runs of one kernel differ by a percent or two.
        yield f"gate, E=60 beside E=64, k=4, T={tokens}", "no slower (2 %)", seen, verdict(ratio, 1.02)
    yield us("gate, index, permute, T=4096, H=7168, E=256", "gate + index + permute: T=4096 E=256 k=8 H=7168 fp32", 200)
    for experts, hidden in ((256, 7168), (128, 2048)):
        row = rows.get(f"combine + shared + residual: T=4096 E={experts} k=8 H={hidden} bf16")
        share = (rate(row) or 0) / copy if row and copy and rate(row) else None
        seen = f"{share:.1%} ({graph(row):.1f} us)" if share else "-"
        yield f"combine + shared + residual, T=4096, H={hidden}", ">= 90 % of copy", seen, verdict(share, 0.9, False)
    row = rows.get("experts: T=1 E=128 k=8 H=2048 bf16")
    share = (rate(row) or 0) / copy if row and copy and rate(row) else None
    yield "expert_matvec, T=1", ">= 75 % of copy", f"{share:.1%}" if share else "-", verdict(share, 0.75, False)
    row = rows.get("glue: T=4096 E=128 k=8 H=2048 fp32")
    count = len((row.get("launches") or {}).get(OURS, [])) if row else 0
    yield "glue, T=4096, H=2048", "<= 3 launches", str(count or "-"), verdict(count or None, 3)
    seen_us, floor = graph(row), row["bytes"] / copy / 1e3 if row and copy and "bytes" in row else None
    ratio = seen_us / floor if seen_us and floor else None
    text = f"{ratio:.2f}x ({seen_us:.1f} us, floor {floor:.1f})" if ratio else "-"
    yield "glue, T=4096, H=2048", "<= 1.15x its bytes", text, verdict(ratio, 1.15)


# ------------------------------------------------------------------------------------------------------------ the text


def text(data: Found) -> str:
    """The whole page."""
    told = data.get("meta", {})
    floors = data.get("floors", {})
    commit = at_commit(told)
    out = [
        "# The routing kernels beside their peers", "",
        f"{told.get('date')}. {told.get('gpu')}; moecore {told.get('moecore')}{commit}, torch {told.get('torch')}, "
        f"CUDA {told.get('cuda')}, transformers {told.get('transformers')}, Triton {told.get('triton')}, "
        f"Python {told.get('python')}.  ",
        f"Command: `python benches/kernels.py {data.get('command', '')}`", "",
        "**Floors, same process.** " + "; ".join(f"{name} {value:.2f}" for name, value in floors.items())
        + ": the fastest of copies of 1 and 2 GiB, read and written; a one-element kernel, in a graph and eagerly.",
        "",
        "**Peers.** " + "; ".join(data.get("peers", []) + data.get("failed", [])) + ".", "",
        *HOW, "",
        "## Aims", "", *table(("what", "aim", "seen", ""), aims(data)),
    ]  # fmt: skip
    jobs: dict[str, list[Found]] = {}
    for row in data["rows"]:
        jobs.setdefault(row["job"], []).append(row)
    for job, rows in jobs.items():
        out += ["", f"## {job}", "", *job_table(rows, floors.get("copy_gbs"))]
        note = NOTES.get(job)
        out += ["", note] if note else []
    out += both(jobs)
    out += crossover(jobs.get("experts", []))
    out += counted(data["rows"])
    bad = [*problems(data)]
    out += ["", "## Not here, or not right", "", *bad] if bad else []
    return "\n".join(out) + "\n"


HOW = [
    "**How.** Microseconds of a call: a CUDA graph of 20 calls (more where the rotation has more sets) over 20, the",
    'median of 15 replays, all sides of a row in turns in one process. "Eager" is wall time of a call from Python,',
    "many in a row. Inputs of 4096 tokens and more rotate over at least 150 MB; smaller ones lie in L2, as they do",
    "behind a router's product. GB/s are the fewest bytes that the job can move over our time. Every side allocates",
    "its results, as its users do, and is checked once before it is timed (≠: its result is not the reference's; it is",
    "no best peer then). Routing is uniform.",
    "",
    "moecore's kernels but `permute` and the products begin early (programmatic dependent launch): in a row of the",
    "same calls, part of a launch hides behind the call before it, about 0.5 us. The peers are called as their",
    "packages have them. Behind a kernel without a launch trigger, as torch's are, less can hide: `router` has the",
    "gate behind its product.",
]

NOTES = {
    "router": "bf16 activations to logits (torch's product), then the gate.",
    "route": "The peers' outputs are less: block-aligned lists without the inverse (align), offsets and inverse "
    "without the tokens of the rows (scatter).",
    "index": "From finished ids. The peers' lists are block-aligned (64).",
    "align": "From finished ids to lists of whole blocks of 64; ours are `index` and `align`, which give the inverse, "
    "too. Alone: from a finished index.",
    "permute": '"sort too": vLLM\'s `moe_permute` cannot leave its sort out. TE: TransformerEngine, from a finished '
    "row map, and from the routing map [T, E]; its block size is chosen anew for each shape.",
    "combine": "TE: TransformerEngine, from a finished row map and weights [T, E].",
    "experts": "`expert_matvec` and transformers' functions go from ids and weights to the layer's output. GB/s: "
    "weights of the experts asked for.",
    "glue": "All but the products and the activation: router, index, permute; and the weighted sum over finished rows.",
}


def table(head: tuple[str, ...], rows: Any) -> list[str]:
    """Markdown."""
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return out + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def job_table(rows: list[Found], copy: float | None) -> list[str]:
    """Every side of a job; eager times behind the others."""
    names: list[str] = []
    for row in rows:
        names += [name for name in row["sides"] if name not in names]
    head = ("shape", *names, "to the best peer", "GB/s", "of copy", "eager: " + " / ".join(names))

    def cells(row: Found) -> tuple[str, ...]:
        sides = row["sides"]

        def one(name: str, key: str, form: Callable[[float], str]) -> str:
            side = sides.get(name)
            if not side:
                return ""
            if side["error"] and not side[key]:
                return "failed"
            mark = "" if side["agrees"] in (True, None) else " ≠"
            return form(side[key]) + mark if side[key] else "-"

        peer, mine, speed = best_peer(row), graph(row), rate(row) if "bytes" in row else None
        return (
            row["key"].partition(": ")[2],
            *(one(name, "graph", lambda us: f"{us:.2f}" if us < 100 else f"{us:.1f}") for name in names),
            f"{mine / peer[1]:.2f}x of {peer[0]}" if peer and mine else "",
            f"{speed:.0f}" if speed else "",
            f"{speed / copy:.0%}" if speed and copy else "",
            " / ".join(one(name, "eager", lambda us: f"{us:.0f}") or "-" for name in names),
        )

    return table(head, map(cells, rows))


def both(jobs: dict[str, list[Found]]) -> list[str]:
    """Gate and index in one against the best gate and the best index of anybody else, one behind the other."""
    gates = {row["key"].partition(": ")[2]: row for row in jobs.get("gate", [])}
    orders = {row["key"].partition(": ")[2]: row for row in jobs.get("index", [])}
    lines = []
    for row in jobs.get("route", []):
        name = row["key"].partition(": ")[2]
        if name in gates and name in orders and graph(row):
            a, b = best_peer(gates[name]), best_peer(orders[name])
            if a and b:
                whole = a[1] + b[1]
                mine = graph(row) or 0.0
                lines.append(
                    (name, f"{mine:.2f}", f"{a[1]:.2f} ({a[0]})", f"{b[1]:.2f} ({b[0]})", f"{mine / whole:.2f}x")
                )
    if not lines:
        return []
    head = ("shape", "route", "best other gate", "best other index", "route to their sum")
    return ["", "## Gate and index together against the best two of others", "", *table(head, lines)]


def crossover(rows: list[Found]) -> list[str]:
    """From how many tokens grouped_mm wins."""
    found = []
    for row in rows:
        mine, other = graph(row), graph(row, "moecore index, permute, combine; grouped_mm")
        if mine and other:
            found.append((row["shape"]["tokens"], mine / other))
    if not found:
        return []
    found.sort()
    lost = [tokens for tokens, ratio in found if ratio > 1]
    where = f"grouped_mm wins from T={lost[0]} on" if lost else f"expert_matvec wins up to T={found[-1][0]}"
    ratios = ", ".join(f"T={tokens}: {ratio:.2f}x" for tokens, ratio in found)
    return [
        "",
        f"**Crossover** (both with moecore's glue, in graphs): {where}. expert_matvec over grouped_mm: {ratios}.",
    ]


def counted(rows: list[Found]) -> list[str]:
    """Launches, as the profiler counted them."""
    out = []
    for row in rows:
        for side, names in (row.get("launches") or {}).items():
            if names:
                short = ", ".join(name.partition("(")[0][:48] for name in names) if side == OURS else ""
                out.append((row["key"], side, len(names), short))
    head = ("row", "side", "launches", "kernels")
    return ["", "## Launches of a call, counted by the profiler", "", *table(head, out)] if out else []


def problems(data: Found) -> Iterator[str]:
    """What failed, differed or did not fit."""
    for row in data["rows"]:
        for what in ("error", "lost"):
            if row.get(what):
                yield f"- {row['key']}: {row[what]}"
        for name, side in row["sides"].items():
            if side["error"]:
                yield f"- {row['key']}, {name}: {side['error']}"
            if side["agrees"] not in (True, None):
                yield f"- {row['key']}, {name}: result differs from the reference ({side['agrees']})"
    if data.get("left"):
        yield f"- left out for want of time: {'; '.join(data['left'])}"
