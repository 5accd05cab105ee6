"""Memory for launches: each buffer between two bands that nobody may touch, results poisoned, inputs compared.

Imported by every test of this folder; skips it where there is no C++ compiler."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("torch", reason="the kernels are compared with torch")
if sys.platform != "linux":
    pytest.skip("kernels are emulated on Linux only", allow_module_level=True)

import torch
from emulated import SCHEDULES, Library, compiler

if compiler() is None:
    pytest.skip("no C++ compiler (g++, or what CXX names) to run the kernels with", allow_module_level=True)

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Sequence

#: Bytes before and after each buffer.
BAND = 128
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
#: As FORMAT_* in cuda/routing.cuh.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Results are filled with another byte under each schedule: what nobody writes is not the same twice.
POISONS = (0xA5, 0x5A, 0x00, 0xFF)


@dataclass(frozen=True)
class Launch:
    """What a launch takes, but for the schedule. Without `threads`: the most threads that the kernel allows."""

    library: Library
    kernel: str
    grid: int | tuple[int, ...]
    args: tuple[ctypes.Structure, ...]
    threads: int = 0
    shared: int = 0
    cluster: int = 1

    @property
    def block(self) -> int:
        return self.threads or self.library.threads(self.kernel)


class Memory:
    """The buffers of a launch."""

    def __init__(self) -> None:
        self._inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._outputs: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    def _between_bands(self, shape: Sequence[int], dtype: torch.dtype, off: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = torch.empty((), dtype=dtype).element_size()
        count = 1
        for n in shape:
            count *= n
        # A band of its own allocation, so that the address sanitizer sees what lies behind it, too.
        whole = torch.full((BAND + off + count * size + (0 if sanitized() else BAND),), 0xC3, dtype=torch.uint8)
        middle = whole[BAND + off : BAND + off + count * size]
        tensor = middle.view(dtype).view(tuple(shape))
        return whole, tensor

    def input(self, given: torch.Tensor | None, off: int = 0) -> torch.Tensor | None:
        """A copy of `given`, `off` bytes behind a multiple of 64. What no kernel may change."""
        if given is None:
            return None
        if given.numel() == 0:
            return torch.empty(given.shape, dtype=given.dtype)
        whole, tensor = self._between_bands(given.shape, given.dtype, off)
        tensor.copy_(given)
        self._inputs.append((whole, whole.clone()))
        return tensor

    def output(self, shape: Sequence[int], dtype: torch.dtype, *, whole: bool = True) -> torch.Tensor:
        """What a kernel writes: all of it, or, if not `whole`, what is named elsewhere; the rest stays POISONS[0]."""
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=dtype)
        memory, tensor = self._between_bands(shape, dtype, 0)
        self._outputs.append((memory, tensor, whole))
        return tensor

    def poison(self, byte: int) -> None:
        for memory, tensor, whole in self._outputs:
            memory.fill_(0xC3)
            tensor.view(-1).view(torch.uint8).fill_(byte if whole else POISONS[0])

    def check(self) -> None:
        """Nothing was written but results."""
        for whole, before in self._inputs:
            assert torch.equal(whole, before), "an input was written"
        for memory, tensor, _ in self._outputs:
            bytes_ = tensor.numel() * tensor.element_size()
            assert (memory[:BAND] == 0xC3).all(), "bytes before a result were written"
            assert (memory[BAND + bytes_ :] == 0xC3).all(), "bytes after a result were written"

    def results(self) -> list[torch.Tensor]:
        return [tensor.view(-1).view(torch.uint8).clone() for _, tensor, _ in self._outputs]


def run(memory: Memory, launches: Sequence[Launch], schedules: Sequence[int] = SCHEDULES) -> None:
    """The launches in order, under each schedule: results must be the same bits, and only results written."""
    first: list[torch.Tensor] | None = None
    for turn, seed in enumerate(schedules):
        memory.poison(POISONS[turn % len(POISONS)])
        for one in launches:
            one.library.launch(one.kernel, one.grid, one.block, one.shared, *one.args, cluster=one.cluster, seed=seed)
        memory.check()
        results = memory.results()
        first = first or results
        for mine, other in zip(first, results, strict=True):
            assert torch.equal(mine, other), (
                f"{launches[-1].kernel}: other bits under schedule {seed} than {schedules[0]}, or some are not written"
            )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def sanitized() -> bool:
    """Whether the compiler's own checks are in the kernels."""
    return bool(os.environ.get("MOECORE_EMULATED_SANITIZE"))
