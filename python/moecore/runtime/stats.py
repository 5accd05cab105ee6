"""What a running model has done: counters of its experts, as numbers and for people."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np

from .budget import size


@dataclass(frozen=True)
class Counters:
    """Counters of one phase, of one layer or of all.

    Attributes:
        calls: calls of the layer.
        lookups: distinct experts over all calls; every one is a hit, late or a miss.
        hits: experts that were resident when they were needed.
        late: experts that were on their way when they were needed.
        misses: experts that had to be asked for when they were needed.
        evictions: experts that gave up their slot.
        demand_bytes: moved because a call needed them.
        prefetch_bytes: moved before a call needed them.
        wasted_bytes: prefetched, and evicted before any call needed them.
        stall_ns: nanoseconds for which calls waited for experts; on a GPU counted in decode only.
    """

    calls: int = 0
    lookups: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    evictions: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    wasted_bytes: int = 0
    stall_ns: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits over lookups; 0 before the first."""
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def bytes_moved(self) -> int:
        """Bytes moved for any cause."""
        return self.demand_bytes + self.prefetch_bytes

    def __add__(self, other: Counters) -> Counters:
        """The sum, counter by counter."""
        return Counters(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Counters)))


@dataclass(frozen=True)
class Stats:
    """Everything that a model's experts have done since the start or the last reset.

    Attributes:
        prefill, decode: sums over layers, by phase.
        layers: (prefill, decode) of each layer.
        utilisation: tokens routed to each expert, int64 [layers, experts]; layers with fewer experts end in zeros.
        slots: experts that fit the device's budget.
        resident: experts on the device now.
        experts: experts of the model.
        slot_bytes: bytes of one slot.
        path: how misses are served (see :meth:`moecore.runtime.Handle.report`).
    """

    prefill: Counters
    decode: Counters
    layers: list[tuple[Counters, Counters]] = field(repr=False)
    utilisation: np.ndarray = field(repr=False)
    slots: int
    resident: int
    experts: int
    slot_bytes: int
    path: str

    @property
    def total(self) -> Counters:
        """Both phases."""
        return self.prefill + self.decode


def collect(
    raw: tuple[list[tuple[dict[str, int], dict[str, int]]], list[int]],
    experts: list[int],
    *,
    slots: int,
    resident: int,
    slot_bytes: int,
    path: str,
) -> Stats:
    """Stats from the engine's counters; `experts` are the experts of each layer."""
    layers = [(Counters(**prefill), Counters(**decode)) for prefill, decode in raw[0]]
    utilisation = np.zeros((len(experts), max(experts)), dtype=np.int64)
    start = 0
    for row, count in enumerate(experts):
        utilisation[row, :count] = raw[1][start : start + count]
        start += count
    return Stats(
        prefill=sum((prefill for prefill, _ in layers), Counters()),
        decode=sum((decode for _, decode in layers), Counters()),
        layers=layers,
        utilisation=utilisation,
        slots=slots,
        resident=resident,
        experts=sum(experts),
        slot_bytes=slot_bytes,
        path=path,
    )


def table(stats: Stats, notes: list[str]) -> str:
    """A table for a terminal, with notes below."""
    rows: list[tuple[str, ...]] = [("", "prefill", "decode")]
    pairs = (stats.prefill, stats.decode)
    rows.append(("hit rate", *(f"{one.hit_rate:.1%}" if one.lookups else "-" for one in pairs)))
    for name in ("lookups", "hits", "late", "misses", "evictions"):
        rows.append((name, *(f"{getattr(one, name):,}" for one in pairs)))
    labels = {"demand_bytes": "moved on demand", "prefetch_bytes": "prefetched", "wasted_bytes": "of it wasted"}
    for name, label in labels.items():
        rows.append((label, *(size(getattr(one, name)) for one in pairs)))
    rows.append(("waited for experts", *(waited(one) for one in pairs)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    share = stats.slots / stats.experts
    lines.append(
        f"experts: {stats.resident:,} of {stats.experts:,} resident, {stats.slots:,} slots ({share:.1%}) of "
        f"{size(stats.slot_bytes)} = {size(stats.slots * stats.slot_bytes)}"
    )
    lines.append(f"path: {stats.path}")
    return "\n".join([*lines, *notes])


def waited(one: Counters) -> str:
    """Time for people; a prefill on a GPU waits inside the stream, where nobody counts it."""
    return "not counted" if one.misses and not one.stall_ns else f"{one.stall_ns / 1e6:.1f} ms"
