"""Reports for people: one model as a page, many as a table."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moecore.report import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from moecore.report import Architecture, KvCache, ScanReport

_BAR = 30
_BLOCKS = " ▏▎▍▌▋▊▉"

#: Roles in the order of the page, with their label and colour.
_ROLES = [
    ("attention", "attention", "cyan"),
    ("dense_mlp", "dense MLP", "cyan"),
    ("shared_expert", "shared experts", "green"),
    ("router", "router", "cyan"),
    ("norm", "norms", "cyan"),
    ("embedding", "embedding", "blue"),
    ("lm_head", "LM head", "blue"),
    ("vision", "vision and audio", "magenta"),
    ("mtp", "multi-token prediction", "magenta"),
    ("other", "other", "yellow"),
]


def size(count: int, digits: int = 2) -> str:
    """Bytes in the largest binary unit that keeps the number above one: ``57.00 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.{digits}f} {unit}"


def number(count: int) -> str:
    """A count in thousands, millions, billions: ``30.53B``."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return str(count)


def bar(share: float, width: int = _BAR) -> str:
    """A bar of ``width`` cells, to an eighth of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BLOCKS[rest] if rest else "")).ljust(width)


def page(report: ScanReport) -> RenderableType:
    """One report as a panel."""
    if report.architecture is None or report.parameters is None or report.bytes is None or report.kv_cache is None:
        failure = Text(printable(report.error or "no report"), style="red")
        return Panel(failure, title=escape(printable(report.target)), border_style="red")
    arch, params, weights, kv = report.architecture, report.parameters, report.bytes, report.kv_cache
    parts: list[RenderableType] = [_summary(report), Text()]

    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim", padding=(0, 2, 0, 0))
    for title, justify in (("", "left"), ("bytes", "right"), ("share", "right"), ("", "left"), ("parameters", "right")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]

    def row(label: str, count: int, parameters: str, style: str, *, head: bool = False) -> None:
        share = count / weights.total if weights.total else 0.0
        name = Text(label if head else f"  {label}", style=f"bold {style}" if head else "")
        table.add_row(name, size(count), f"{share:6.1%}", Text(bar(share), style=style), parameters)

    base_parameters = params.checkpoint - params.routed
    row("base weights", weights.base, number(base_parameters), "cyan", head=True)
    for role, label, colour in _ROLES:
        if weights.by_role[role]:
            row(label, weights.by_role[role], number(params.by_role[role]), colour)
    if arch.num_experts:
        row("routed experts", weights.routed_experts, number(params.routed), "red", head=True)
        # Where layers differ in their experts there is no such product.
        if arch.moe_layers * arch.num_experts * weights.per_expert == weights.routed_experts:
            note = f"  {arch.moe_layers} × {arch.num_experts} × {size(weights.per_expert)}"
            table.add_row(Text(note, style="dim"))
    table.add_row(Text("total weights", style="bold"), size(weights.total), "", "", number(params.checkpoint))
    parts += [table, Text(), _cache(kv)]
    if report.error:
        parts.append(Text(f"\n✗ {printable(report.error)}", style="red"))
    parts += [Text(f"! {printable(warning)}", style="yellow") for warning in report.warnings]
    if report.unrecognised:
        names = printable(", ".join(report.unrecognised[:4]))
        parts.append(Text(f"! unrecognised tensors, counted as other: {names} …", style="yellow"))
    revision = f" @ {report.revision[:12]}" if report.revision else ""
    title = f"[bold]{escape(printable(report.target))}[/]{escape(printable(revision))}"
    colour = "yellow" if report.status == "partial" else "green"
    return Panel(Group(*parts), title=title, border_style=colour, subtitle=_cost(report), expand=False, padding=(1, 2))


def _summary(report: ScanReport) -> Text:
    arch, params, weights = report.architecture, report.parameters, report.bytes
    if arch is None or params is None or weights is None:
        raise ValueError("a failed report has no summary")
    text = Text()
    text.append(printable(arch.model_type or "unknown model type"), style="bold")
    text.append(f" · {arch.layers} layers")
    if arch.num_experts:
        shared = f" + {arch.shared_experts} shared" if arch.shared_experts else ""
        text.append(f" · top-{_top_k(arch)} of {arch.num_experts} experts{shared} in {arch.moe_layers} layers")
    dtypes = sorted(weights.by_dtype, key=lambda name: -weights.by_dtype[name])
    text.append(f" · {printable(', '.join(dtypes[:3]))}")
    if arch.quantization:
        text.append(f" ({printable(arch.quantization)})")
    text.append("\n")
    text.append(number(params.total), style="bold")
    text.append(" parameters")
    if arch.num_experts:
        text.append(", ")
        text.append(number(params.active), style="bold")
        text.append(f" active a token ({number(params.active_without_embeddings)} without embeddings): ")
        text.append(f"all {size(weights.total)} must be resident, a token reads {size(weights.active)}")
    return text


def _cache(kv: KvCache) -> Text:
    text = Text()
    text.append("KV cache", style="bold magenta")
    length = f"{kv.max_model_len:,} tokens × {kv.batch_size}" if kv.max_model_len else "no context length"
    text.append(f"  {length}, {printable(kv.dtype)}: ")
    if kv.status == "unknown":
        text.append("unknown", style="bold yellow")
        text.append(f" ({printable(kv.reason or 'no reason given')})")
        return text
    bounds = f"{size(kv.bytes)} to {size(kv.bytes_upper)}" if kv.status == "bounded" else size(kv.bytes)
    text.append(bounds, style="bold")
    text.append(f" · {size(kv.bytes_per_token)} a token")
    if kv.state_bytes:
        text.append(f" · {size(kv.state_bytes)} recurrent state")
    kinds = ", ".join(f"{sum(len(g.layers) for g in kv.per_layer if g.kind == kind)} {kind}" for kind in _kinds(kv))
    text.append(f"\n  {kinds}", style="dim")
    if kv.reason:
        text.append(f"\n  {printable(kv.reason)}", style="yellow")
    return text


def _top_k(arch: Architecture) -> str:
    # 0 is what a config without the key gives.
    return str(arch.experts_per_token or "?")


def _kinds(kv: KvCache) -> list[str]:
    return list(dict.fromkeys(group.kind for group in kv.per_layer))


def _cost(report: ScanReport) -> str:
    cost = report.cost
    network = f", {cost.requests} requests, {size(cost.bytes_fetched)} fetched" if report.source == "hub" else ""
    return f"[dim]{report.files} files, {report.tensors:,} tensors{network}, {cost.seconds:.2f} s[/]"


def overview(reports: Iterable[ScanReport]) -> Table:
    """Many reports as a table, one line each."""
    # The model's column takes what the figures leave, so that a narrow terminal cuts names and never figures.
    table = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD, expand=True)
    table.add_column("model", no_wrap=True, ratio=1)
    for title in ("params", "active", "top-k/E", "base", "routed", "an expert", "KV cache"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("routed share", min_width=12, no_wrap=True)
    for report in reports:
        arch, params, weights, kv = report.architecture, report.parameters, report.bytes, report.kv_cache
        if arch is None or params is None or weights is None or kv is None:
            kind = Text(printable(report.error_type or "error"), style="red")
            table.add_row(Text(printable(report.target), style="red"), *[""] * 7, kind)
            continue
        share = weights.routed_experts / weights.total if weights.total else 0.0
        table.add_row(
            Text(printable(report.target), style="yellow" if report.status == "partial" else ""),
            number(params.total),
            number(params.active),
            f"{_top_k(arch)}/{arch.num_experts}" if arch.num_experts else "dense",
            size(weights.base, 1),
            size(weights.routed_experts, 1),
            size(weights.per_expert, 1) if arch.num_experts else "",
            "?" if kv.status == "unknown" else ("≥ " if kv.status == "bounded" else "") + size(kv.bytes, 1),
            Text(bar(share, 12), style="red") if arch.num_experts else "",
        )
    return table


def to_text(report: ScanReport, width: int = 110) -> str:
    """One report as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(page(report))
    return buffer.getvalue().rstrip("\n")
