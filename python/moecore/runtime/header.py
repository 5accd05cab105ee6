"""The header of a safetensors file: where each tensor lies."""

from __future__ import annotations

import json
import math
import operator
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moecore.errors import FileError, HeaderError, MoecoreError

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_HEADER = 100_000_000
"""The format's own limit."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: where it begins, and what it is."""

    file: int
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


def header(path: Path, file: int) -> dict[str, Stored]:
    """The tensors of a safetensors file. Only the header is read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            head = opened.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > min(LONGEST_HEADER, size - 8):
                raise blame(HeaderError, f"{path}: its header is longer than the file or the format allow", path)
            entries = json.loads(opened.read(length))
    except OSError as error:
        raise blame(FileError, f"{path}: {error.strerror or error}", path) from error
    except ValueError as error:
        if isinstance(error, MoecoreError):
            raise
        raise blame(HeaderError, f"{path}: its header is not JSON: {error}", path) from error
    start, found = 8 + length, {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = (operator.index(place) for place in entry["data_offsets"])
            shape = tuple(operator.index(length) for length in entry["shape"])
            found[name] = Stored(file, start + begin, end - begin, str(entry["dtype"]), shape)
        except (KeyError, TypeError, ValueError) as error:
            raise blame(HeaderError, f"{path}: {name} has a broken header entry", path, name) from error
        dtype = DTYPES.get(found[name].dtype)
        if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
            raise blame(HeaderError, f"{path}: {name} has not the bytes of its shape; fetch the file again", path, name)
        if not 0 <= begin <= end or start + end > size or any(length < 0 for length in shape):
            raise blame(HeaderError, f"{path}: {name} lies outside of the file; fetch the file again", path, name)
    return found


def blame(kind: type[MoecoreError], message: str, file: Path | str | None = None, tensor: str | None = None) -> Any:
    """An error of `kind` that names the file and the tensor."""
    error = kind(message)
    error.file = None if file is None else str(file)
    error.tensor = tensor
    return error
