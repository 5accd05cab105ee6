"""What a checkpoint is made of: tensors with their dtypes and shapes, and a repository of them in shards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Json = dict[str, Any]

# Bits per element, in the order in which the safetensors writer ranks dtypes (it writes the last one first).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


class Tensor(NamedTuple):
    """One entry of a safetensors header, without its place in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        bits = self.elements * DTYPE_BITS[self.dtype]
        if bits % 8:
            raise ValueError(f"{self.name}: {self.elements} elements of {self.dtype} do not fill whole bytes")
        return bits // 8


@dataclass(frozen=True)
class RepoSpec:
    """What a repository holds: its small files as bytes, its tensors by shard."""

    name: str
    config: Json
    shards: dict[str, list[Tensor]]
    small_files: dict[str, bytes] = field(repr=False)
    real_index: bool
    library_writer: bool
    """Whether the safetensors library wrote the files: ordered by dtype, headers padded. DeepSeek's writer does not."""
    assumed: str
    """What is not taken from a real index or a published listing; empty when nothing is."""

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for shard in self.shards.values() for tensor in shard]

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def by_name(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}
