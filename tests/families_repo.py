"""Reads a family's fixture and writes its repository: config.json and a safetensors file that is header and hole."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent / "data" / "families"
WIDTH = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "BOOL": 1}


class Tensor(NamedTuple):
    name: str
    dtype: str
    shape: list[int]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * WIDTH[self.dtype]


def names() -> list[str]:
    """Model types that have a fixture."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(model_type: str) -> dict[str, Any]:
    """The fixture of a model type."""
    data: dict[str, Any] = json.loads((FOLDER / f"{model_type}.json").read_text())
    return data


def unfold(fixture: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors, runs such as `layers.{0..3}.experts.{0,2}` written out."""
    for entry in fixture["tensors"]:
        pieces = re.split(r"\{([^}]*)\}", entry["name"])
        for numbers in itertools.product(*map(_numbers, pieces[1::2])):
            filled = itertools.chain.from_iterable(itertools.zip_longest(pieces[::2], numbers, fillvalue=""))
            yield Tensor("".join(map(str, filled)), entry["dtype"], entry["shape"])


def _numbers(run: str) -> list[int]:
    if ".." in run:
        first, last = run.split("..")
        return list(range(int(first), int(last) + 1))
    return [int(number) for number in run.split(",")]


def write(fixture: dict[str, Any], folder: Path, *, config: dict[str, Any] | None = None) -> Path:
    """Writes the repository; the data section of the safetensors file is sparse."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or fixture["config"]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in unfold(fixture):
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)
    return folder
