"""Reads a family's fixture and writes its repository: config.json and a safetensors file that is header and hole."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.tensors import Tensor
from checkpoints.writer import write_repo

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent / "data" / "families"


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
            yield Tensor("".join(map(str, filled)), entry["dtype"], tuple(entry["shape"]))


def _numbers(run: str) -> list[int]:
    if ".." in run:
        first, last = run.split("..")
        return list(range(int(first), int(last) + 1))
    return [int(number) for number in run.split(",")]


def write(fixture: dict[str, Any], folder: Path, *, config: dict[str, Any] | None = None) -> Path:
    """Writes the repository; the data section of the safetensors file is sparse."""
    return write_repo(folder, config or fixture["config"], unfold(fixture))
