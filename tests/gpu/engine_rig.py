"""A small engine over random experts, for the tests and benches of the CUDA kernels."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from moecore import _core


def stream() -> int:
    """The stream torch launches into."""
    return int(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()))


class Rig:
    """Experts in pinned rows, slots, table and state on the GPU, an LRU that answers."""

    def __init__(
        self,
        *,
        layers: int,
        experts: int,
        row_bytes: int,
        slots: int,
        fill: bool = True,
        delay: float = 0.0,
        fault: tuple[int, str] | None = None,
        prefetched: list[tuple[int, int]] | None = None,
        retires: bool = False,
        seed: int = 0,
    ) -> None:
        self.layers, self.experts, self.row_bytes = layers, experts, row_bytes
        self.slot_bytes = (row_bytes + 4095) // 4096 * 4096
        total = layers * experts
        self.rows = _core.PinnedArena(0, self.slot_bytes, total)
        assert self.rows.settle() == total
        if fill:
            rng = np.random.default_rng(seed)
            for expert in range(total):
                self.row(expert)[:] = rng.integers(0, 256, self.slot_bytes, dtype=np.uint8)
        self.arena = torch.full((slots, self.slot_bytes), 0xEE, dtype=torch.uint8, device="cuda")
        for expert, slot in prefetched or []:
            self.arena[slot].copy_(torch.from_numpy(self.row(expert)))
        self.table = torch.full((total,), -1, dtype=torch.int32, device="cuda")
        self.counts = torch.zeros(total, dtype=torch.int32, device="cuda")
        self.state = torch.zeros(64 + 8 * layers, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        options: dict[str, Any] = {
            "arena": self.arena.data_ptr(),
            "slot_bytes": self.slot_bytes,
            "slots": slots,
            "table": self.table.data_ptr(),
            "counts": self.counts.data_ptr(),
            "state": self.state.data_ptr(),
            "experts": [experts] * layers,
            "row_bytes": [row_bytes] * layers,
        }
        self.engine = _core._testing.lru_engine(0, options, self.rows, delay, fault, prefetched or [], retires)

    def row(self, expert: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The pinned row of a dense id, writable."""
        address = self.rows.address(expert)
        assert address is not None
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.slot_bytes).from_address(address))

    def truth(self) -> torch.Tensor:
        """Every row, on the GPU."""
        rows = [torch.from_numpy(self.row(expert)[: self.row_bytes]) for expert in range(self.layers * self.experts)]
        return torch.stack(rows).cuda()

    def acquire(self, layer: int, ids: torch.Tensor, slots: torch.Tensor | None = None) -> torch.Tensor:
        """One call; the slots of the ids."""
        if slots is None:
            slots = torch.full(ids.shape, -7, dtype=torch.int32, device="cuda")
        self.engine.acquire(layer, ids.data_ptr(), ids.numel(), slots.data_ptr(), 0, stream())
        return slots

    def held(self, slots: torch.Tensor) -> torch.Tensor:
        """The bytes in those slots."""
        return self.arena[slots.reshape(-1).long(), : self.row_bytes]

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()
