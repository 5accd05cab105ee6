"""Writes safetensors files that are sparse: true header bytes, and a hole for the data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .tensors import DTYPE_BITS, Tensor

_RANK = {name: rank for rank, name in enumerate(DTYPE_BITS)}


def header_bytes(
    tensors: Iterable[Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    align: bool = True,
    order: bool = True,
) -> tuple[bytes, int]:
    """The first ``8 + n`` bytes of a safetensors file and the file's whole length.

    With ``order`` tensors lie as the safetensors library writes them: by dtype, widest first, then by name; else
    as they come. With ``align`` the header is padded with spaces to a multiple of 8, as the library does.
    """
    rank = _RANK
    meta = json.dumps(dict(metadata if metadata is not None else {"format": "pt"}), separators=(",", ":"))
    parts = [f'"__metadata__":{meta}']
    offset = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-rank[t[1]], t[0])) if order else tensors:
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits % 8:
            raise ValueError(f"{name}: {shape} of {dtype} does not fill whole bytes")
        end = offset + bits // 8
        dims = ",".join(map(str, shape))
        parts.append(f'"{name}":{{"dtype":"{dtype}","shape":[{dims}],"data_offsets":[{offset},{end}]}}')
        offset = end
    body = ("{" + ",".join(parts) + "}").encode()
    if align:
        body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body, 8 + len(body) + offset


def write_safetensors(
    path: Path,
    tensors: Iterable[Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    align: bool = True,
    order: bool = True,
) -> int:
    """Writes a sparse safetensors file; returns its length. The options are those of ``header_bytes``."""
    head, length = header_bytes(tensors, metadata=metadata, align=align, order=order)
    write_sparse(path, head, length)
    return length


def write_sparse(path: Path, head: bytes, length: int) -> None:
    """Writes ``head`` and stretches the file to ``length`` without using disk for the rest."""
    with path.open("wb") as file:
        file.write(head)
        os.ftruncate(file.fileno(), length)


def write_repo(
    folder: str | Path,
    config: Mapping[str, Any] | None,
    tensors: Iterable[Tensor] | Mapping[str, Sequence[Tensor]],
    *,
    file_name: str = "model.safetensors",
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes a small hand-made repository: one file, or shards given by name (with an index then)."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if isinstance(tensors, Mapping):
        for shard, members in tensors.items():
            write_safetensors(root / shard, members)
        (root / "model.safetensors.index.json").write_bytes(index_bytes(tensors))
    else:
        write_safetensors(root / file_name, tensors)
    for name, data in (extra or {}).items():
        (root / name).write_bytes(data)
    return root


def index_bytes(shards: Mapping[str, Sequence[Tensor]]) -> bytes:
    """An index as transformers writes it."""
    total = sum(tensor.nbytes for members in shards.values() for tensor in members)
    weight_map = {tensor.name: shard for shard, members in shards.items() for tensor in members}
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
    ).encode()
