"""Budgets: what people write, and how ``"auto"`` is worked out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moecore.errors import BudgetError

UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip

#: Share of the free memory that ``"auto"`` leaves alone: allocators round up, and other programs breathe.
RESERVE = 0.1

#: What nobody has; a larger number would not fit a float.
LARGEST = 2**62

Budget = int | str


def parse(value: Budget, whole: int, name: str) -> int:
    """Bytes of a budget: a number of bytes, ``"12GiB"``, ``"800 MB"``, or a share of `whole` as in ``"25%"``.

    Raises:
        BudgetError: it is none of these, or not positive.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise BudgetError(f"{name} must be a number of bytes or a text like '12GiB' or '25%', not {value!r}")
    if isinstance(value, int):
        amount = float(min(value, LARGEST))
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]*)\s*", value)
        unit = match[2].lower() if match else None
        if match is None or not (unit == "%" or unit in UNITS):
            raise BudgetError(f"{name}={value!r} is not understood: write bytes, '12GiB', '800MB' or '25%'")
        amount = float(match[1]) * (whole / 100 if unit == "%" else UNITS[unit or ""])
    if amount < 1:
        raise BudgetError(f"{name}={value!r} is no memory at all: give at least one expert's bytes")
    return int(min(amount, LARGEST))


@dataclass(frozen=True)
class Auto:
    """How a budget of ``"auto"`` came about. All in bytes.

    Attributes:
        free: what the device had free.
        kv_cache: set aside for the KV cache of `max_model_len` tokens.
        activations: set aside for one forward pass.
        reserve: left alone.
        budget: what is left for experts.
    """

    free: int
    kv_cache: int
    activations: int
    reserve: int
    budget: int

    def __str__(self) -> str:
        """The sum, for people."""
        return (
            f"{size(self.free)} free - {size(self.kv_cache)} KV cache - {size(self.activations)} activations"
            f" - {size(self.reserve)} reserve = {size(self.budget)} for experts"
        )


def auto(free: int, kv_cache: int, activations: int, whole: int) -> Auto:
    """What experts may take of `free` bytes; never more than `whole`, which is all of them."""
    reserve = int(free * RESERVE)
    left = free - kv_cache - activations - reserve
    return Auto(free, kv_cache, activations, reserve, max(0, min(left, whole)))


def free_host_memory() -> int:
    """Bytes that this process may still use: what the machine has, or what its control group leaves."""
    text = Path("/proc/meminfo").read_text("utf-8") if Path("/proc/meminfo").exists() else ""
    match = re.search(r"MemAvailable:\s*(\d+) kB", text)
    free = int(match[1]) * 1024 if match else 0
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text("utf-8"))
    except (OSError, ValueError):  # no such control, or "max"
        return None


def size(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
