"""Rows of experts: how they are laid out, and the file that keeps those which no checkpoint has in final form."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moecore._core import ExpertStore
from moecore.errors import FileError

from .budget import size
from .index import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from .families import Taken
    from .index import ExpertIndex

#: Parts of a row begin at multiples of this: vector loads of every width are aligned.
PART_ALIGNMENT = 256

#: Rows in the spill file begin at multiples of this, so that direct reads go straight into slots.
PAGE = 4096


@dataclass(frozen=True)
class Layout:
    """The rows of one layer.

    Attributes:
        number: position of the layer among those with experts.
        name: path of the experts module.
        experts: how many.
        top_k: experts for each token.
        row_bytes: length of a row.
        parts: in row order.
    """

    number: int
    name: str
    experts: int
    top_k: int
    row_bytes: int
    parts: Sequence[Part]

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """Tensors of the parts over a row: uint8 [>= row_bytes] -> part name -> [*shape]."""
        return {
            part.name: row[part.offset : part.offset + part.bytes].view(part.dtype).view(part.shape)
            for part in self.parts
        }


#: File, offset, bytes, place in the row.
Range = tuple[int, int, int, int]


@dataclass(frozen=True)
class Store:
    """Where every expert's bytes lie, for the engine and for people.

    Attributes:
        core: the store of the Rust core.
        layouts: of each layer with experts.
        spill: the file of rows that moecore wrote itself, or None.
    """

    core: ExpertStore
    layouts: list[Layout]
    spill: Spill | None

    @property
    def slot_bytes(self) -> int:
        """Bytes from one slot to the next."""
        return int(self.core.slot_bytes)

    @property
    def bytes(self) -> int:
        """Bytes of all slots that the whole model would need."""
        return int(self.core.experts * self.core.slot_bytes)

    @property
    def min_slots(self) -> int:
        """Experts of one token: the least with which a decode step runs in one go."""
        return max(min(layout.top_k, layout.experts) for layout in self.layouts)


def build(
    files: Sequence[Path | str], layouts: list[Layout], ranges: list[list[list[Range]]], spill: Spill | None
) -> Store:
    """The store of rows that lie in `files`, and in the spill file where one is given (as the last file)."""
    paths = [str(file) for file in files]
    if spill is not None:
        spill.finish()
        paths.append(str(spill.path))
    layers = [
        (layout.name, layout.row_bytes, layout.top_k, experts) for layout, experts in zip(layouts, ranges, strict=True)
    ]
    return Store(ExpertStore(paths, layers), layouts, spill)


def layouts_of(index: ExpertIndex) -> list[Layout]:
    """The rows of each layer of a checkpoint."""
    return [
        Layout(number, layer.name, layer.num_experts, layer.top_k or 1, layer.row_bytes, layer.parts)
        for number, layer in enumerate(index.layers)
    ]


def without_files(layouts: list[Layout]) -> Store:
    """A store of rows that lie in no file: sizes and numbers are all that it knows."""
    return build([], layouts, [[[] for _ in range(layout.experts)] for layout in layouts], None)


def from_index(index: ExpertIndex, folder: Path | None) -> Store:
    """The store of a checkpoint: byte ranges of its files where these are the final bytes, else a spill file."""
    layouts = layouts_of(index)
    made = [number for number, layer in enumerate(index.layers) if layer.ranges is None]
    spill = Spill(folder, sum(layouts[number].row_bytes * layouts[number].experts for number in made)) if made else None
    try:
        ranges: list[list[list[Range]]] = []
        for number, layer in enumerate(index.layers):
            if layer.ranges is not None:
                ranges.append(
                    [[(one.file, one.offset, one.bytes, one.at) for one in expert] for expert in layer.ranges]
                )
            elif spill is not None:
                rows = (index.materialise(number, expert) for expert in range(layer.num_experts))
                ranges.append([[(len(index.files), *where)] for where in spill.write(layouts[number], rows)])
        return build(index.files, layouts, ranges, spill)
    except BaseException:
        if spill is not None:
            spill.close()
        raise


def held(taken: list[Taken]) -> Store:
    """The store of a loaded model whose experts go to host rows, with no file behind them."""
    layouts: list[Layout] = []
    for number, one in enumerate(taken):
        pieces, row_bytes = _row_bytes(one)
        layouts.append(Layout(number, one.name, one.num_experts, one.top_k or 1, row_bytes, pieces))
    return without_files(layouts)


def from_modules(taken: list[Taken], free: Callable[[Taken], None], folder: Path | None) -> Store:
    """Writes the experts of a loaded model to a spill file, then has each module freed.

    Nothing is freed before everything is written: where the disk is full the model stays as it was.
    """
    spill = Spill(folder, sum(_row_bytes(one)[1] * one.num_experts for one in taken))
    try:
        layouts: list[Layout] = []
        ranges: list[list[list[Range]]] = []
        for number, one in enumerate(taken):
            pieces, row_bytes = _row_bytes(one)
            layout = Layout(number, one.name, one.num_experts, one.top_k or 1, row_bytes, pieces)
            layouts.append(layout)
            rows = (one.resident(expert) for expert in range(one.num_experts))
            ranges.append([[(0, *where)] for where in spill.write(layout, rows)])
        store = build([], layouts, ranges, spill)
    except BaseException:
        spill.close()
        raise
    for one in taken:
        free(one)
    return store


def _row_bytes(taken: Taken) -> tuple[list[Part], int]:
    """Parts of a loaded module's rows, laid end to end, and the length of a row."""
    pieces, end = [], 0
    for param in taken.params:
        start = -(-end // PART_ALIGNMENT) * PART_ALIGNMENT
        length = torch.Size(param.shape).numel() * param.dtype.itemsize
        pieces.append(Part(param.name, param.shape, param.dtype, start, length))
        end = start + length
    return pieces, end


class Spill:
    """A file of rows without a name: it goes when the process does, however that ends."""

    def __init__(self, folder: Path | None, expected: int) -> None:
        folder = Path(folder or tempfile.gettempdir())
        try:
            usage = os.statvfs(folder)
            room = usage.f_bavail * usage.f_frsize
            if room < expected:
                raise FileError(
                    f"{folder}: {size(expected)} are needed to keep experts on disk and {size(room)} are free; "
                    "name another folder with spill_dir="
                )
            handle, name = tempfile.mkstemp(prefix="moecore-experts-", suffix=".rows", dir=folder)
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{folder}: cannot write experts there: {error}; name a folder with spill_dir=") from error
        self.path: Path | str = Path(name)
        self._file = os.fdopen(handle, "r+b", buffering=0)
        self._end = 0

    def write(self, layout: Layout, rows: Iterable[dict[str, Tensor]]) -> list[tuple[int, int, int]]:
        """Appends rows; gives (offset, bytes, place in the row) of each."""
        places = []
        try:
            for parts in rows:
                row = torch.zeros(-(-layout.row_bytes // PAGE) * PAGE, dtype=torch.uint8)
                for name, view in layout.views(row).items():
                    view.copy_(parts[name])
                left = memoryview(row.numpy())
                while left:  # a full disk takes a part first and says so the next time
                    left = left[self._file.write(left) :]
                places.append((self._end, layout.row_bytes, 0))
                self._end += row.numel()
        except OSError as error:
            raise FileError(
                f"{self.path}: cannot write experts there: {error}; name a folder with spill_dir="
            ) from error
        return places

    def finish(self) -> None:
        """Everything is written; the engine opens the file by its descriptor, for its name is gone."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise FileError(
                f"{self.path}: cannot write experts there: {error}; name a folder with spill_dir="
            ) from error
        named = Path(self.path)
        self.path = f"/proc/self/fd/{self._file.fileno()}"
        if Path(self.path).exists():
            named.unlink()
        else:  # no /proc: the name has to stay
            self.path = named

    def close(self) -> None:
        """Lets the file go."""
        if isinstance(self.path, Path):
            self.path.unlink(missing_ok=True)
        self._file.close()
