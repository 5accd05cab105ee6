"""Where the bytes of every expert lie in a checkpoint's files, and what a row of them holds.

Built from the headers of the files and transformers' conversion mapping of the model, not from names. Where the bytes
in the files are not the final ones (a transpose, interleaved halves, another dtype), an expert has no ranges, and
`ExpertIndex.materialise` makes its parts with transformers' own operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.core_model_loading import dot_natural_key

from moecore.errors import ConfigError, FileError, HeaderError, MoecoreError

from .conversion import Column, Mapping, Recipe, Route, numbers_of, shares, siblings
from .families import Param, Taken, find
from .header import DTYPES, Stored, blame, header

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

ALIGN = 256
"""Every part of a row begins at a multiple of this."""


class Range(NamedTuple):
    """Bytes of a file that go to `at` in an expert's row."""

    file: int
    offset: int
    bytes: int
    at: int


@dataclass(frozen=True)
class Part:
    """A piece of a row: one parameter of one expert, or one stored tensor of it.

    Attributes:
        name: the parameter's name in its module, or the stored tensor's.
        shape: of one expert.
        offset: where it begins in the row; a multiple of 256.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    bytes: int


@dataclass(eq=False)
class LayerIndex:
    """The experts of one module.

    Attributes:
        name: path of the experts module.
        layer: number of the decoder layer, for people.
        parts: what a row holds, in row order.
        row_bytes: length of a row; the parts' padding is between them only.
        ranges: for each expert its byte ranges, or None when the files do not hold the final bytes.
        decode: turns stored parts (FP8 or MXFP4 with scales) into parameters; None when the parts are the parameters.
    """

    name: str
    module: nn.Module
    layer: int
    num_experts: int
    parts: list[Part]
    top_k: int | None
    row_bytes: int
    ranges: list[list[Range]] | None
    decode: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None
    taken: Taken = field(repr=False)
    recipes: list[tuple[Param, Recipe, Plan]] = field(repr=False, default_factory=list)


@dataclass
class Plan:
    """How one parameter reaches the row: its parts, and for each of them the columns that lie end to end in it."""

    parts: list[tuple[str, tuple[int, ...], torch.dtype]]
    columns: list[list[Column]] | None
    cast: torch.dtype | None


class ExpertIndex:
    """Every expert of a checkpoint.

    Attributes:
        files: the checkpoint's files; ranges name them by position.
        layers: one entry for each experts module, in the model's order.
        targets: full names of the parameters that the index stands for.
        expert_bytes: bytes of the files that belong to experts.
        other: tensors of the files that the model loads itself, name -> target.
        ignored: tensors of the files that the model has no place for.
        bytes: all tensor bytes of the files.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        model: nn.Module,
        *,
        found: list[Taken] | None = None,
        hf_quantizer: Any = None,
        key_mapping: dict[str, str] | None = None,
    ) -> None:
        self.files = [Path(file) for file in files]
        self.config = model.config
        self.stored = self._headers()
        self.bytes = sum(stored.bytes for stored in self.stored.values())
        self.taken = find(model) if found is None else found
        mapping = Mapping(model, hf_quantizer, key_mapping)
        self.targets = {f"{one.name}.{param.name}" for one in self.taken for param in one.params}
        recipes = self._collect(mapping)
        self.layers = [self._layer(one, recipes, mapping) for one in self.taken]

    def _headers(self) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        for number, path in enumerate(self.files):
            for name, stored in header(path, number).items():
                if name in found:
                    other = self.files[found[name].file]
                    raise blame(ConfigError, f"{path}: {name} is in {other} too; remove one of the files", path, name)
                found[name] = stored
        return found

    def _collect(self, mapping: Mapping) -> dict[str, Recipe]:
        """Sorts the files' tensors into recipes, one for each parameter of an experts module."""
        routes = mapping.routes(self.stored)
        lists: dict[str, dict[str, list[str]]] = {}
        entries: dict[str, tuple[Any, int]] = {}
        self.other: dict[str, str] = {}
        self.ignored: list[str] = []
        self.expert_keys: set[str] = set()
        for key, route in routes.items():
            entry = mapping.by_pattern.get(route.pattern) if route.pattern is not None else None
            mine = self._mine(route, entry)
            for at, target in mine:
                lists.setdefault(target, {}).setdefault(route.pattern or key, []).append(key)
                entries[target] = (entry, at)
            if mine:
                self.expert_keys.add(key)
            elif route.target in mapping.state:
                self.other[key] = route.target
            else:
                self.ignored.append(key)
        self.expert_bytes = sum(self.stored[key].bytes for key in self.expert_keys)
        recipes = {}
        for target, sources in lists.items():
            entry, at = entries[target]
            columns = {}
            for pattern, keys in sources.items():
                chosen = shares(entry, sorted(keys, key=dot_natural_key), at)
                columns[pattern] = Column(chosen)
            recipes[target] = Recipe(target, entry, at, columns)
        return recipes

    def _mine(self, route: Route, entry: Any) -> list[tuple[int, str]]:
        names = [route.target] if entry is None else siblings(route, entry)
        return [(at, name) for at, name in enumerate(names) if name in self.targets]

    def _layer(self, taken: Taken, recipes: dict[str, Recipe], mapping: Mapping) -> LayerIndex:
        plans: list[tuple[Param, Recipe, Plan]] = []
        for param in taken.params:
            target = f"{taken.name}.{param.name}"
            recipe = recipes.get(target)
            if recipe is None:
                raise blame(
                    ConfigError, f"no file has a tensor for {target}: the checkpoint is incomplete", None, target
                )
            plans.append((param, recipe, self._plan(taken, param, recipe, mapping)))
        parts: list[Part] = []
        end = 0
        for _, _, plan in plans:
            for name, shape, dtype in plan.parts:
                offset = -(-end // ALIGN) * ALIGN
                size = math.prod(shape) * dtype.itemsize
                parts.append(Part(name, shape, dtype, offset, size))
                end = offset + size
        plain = all(plan.columns is not None for _, _, plan in plans)
        decode = None
        if any(recipe.quantised for _, recipe, _ in plans):
            decode = Decoder(self.config, [(param, recipe, plan) for param, recipe, plan in plans])
        taken.decode = decode
        return LayerIndex(
            taken.name,
            taken.module,
            taken.layer,
            taken.num_experts,
            parts,
            taken.top_k,
            end,
            self._ranges(taken, plans, parts) if plain else None,
            decode,
            taken,
            plans,
        )

    def _plan(self, taken: Taken, param: Param, recipe: Recipe, mapping: Mapping) -> Plan:
        """Checks a parameter's tensors and says how they reach the row."""
        rows = int(mapping.state[recipe.target].shape[0])
        for pattern, column in recipe.sources.items():
            recipe.sources[pattern] = self._column(taken, param, recipe, column.keys, rows)
        if recipe.entry is None and len(recipe.sources) > 1:
            names = ", ".join(column.keys[0] for column in recipe.sources.values())
            raise blame(ConfigError, f"{names} all stand for {recipe.target}; the model has one place", None, names)
        if recipe.quantised:
            return self._stored_plan(taken, param, recipe)
        recipe.settle()
        key = next(iter(recipe.sources.values())).keys[0]
        first = self.stored[key]
        cast = mapping.dtype(recipe.target, recipe.entry, first.dtype, param.dtype, renamed=recipe.target != key)
        stored = self._dtype(first, key)
        packed = not stored.is_floating_point or stored.itemsize == 1
        if packed and param.dtype.is_floating_point and param.dtype.itemsize > 1:
            raise blame(
                ConfigError,
                f"{self.files[first.file]}: {key} is {first.dtype} and {recipe.target} is {param.dtype}, but "
                "config.json names no quantisation that would say how to unpack it; add its quantization_config",
                self.files[first.file],
                key,
            )
        final = cast or (param.dtype if param.dtype.itemsize == stored.itemsize else stored)
        same = all(self.stored[column.keys[0]].dtype == first.dtype for column in recipe.sources.values()) and (
            cast is None or cast == stored
        )
        if recipe.columns is not None:
            self._check_shape(taken, param, recipe)
        columns = [recipe.columns] if recipe.columns is not None and same else None
        return Plan([(param.name, param.shape, final)], columns, cast)

    def _column(self, taken: Taken, param: Param, recipe: Recipe, keys: list[str], rows: int) -> Column:
        """One list of tensors: a tensor for each expert, or one for all of them.

        Args:
            rows: first dimension of the model's parameter. It may have rows for experts without weights.
        """
        first = self.stored[keys[0]]
        one = len(keys) == 1
        if one and recipe.quantised:
            stacked = taken.num_experts > 1 or len(first.shape) > 2
        else:
            stacked = one and (recipe.entry is None or len(first.shape) > len(param.shape))
        found, counts = (first.shape[0] if first.shape else 1) if stacked else len(keys), {taken.num_experts, rows}
        if stacked and len(first.shape) == len(param.shape) and not recipe.quantised and found == rows:
            share = (rows // taken.num_experts, *first.shape[1:])  # experts one below the other in a matrix
            return Column(keys, taken.num_experts, share)
        ends = None if stacked or one else numbers_of([keys[0], keys[-1]])
        if found not in counts or (ends is not None and ends[1] - ends[0] != found - 1):
            numbers = None if stacked else numbers_of(keys)
            missing = sorted(set(range(taken.num_experts)) - set(numbers or ()))
            what = f"; the first one missing is expert {missing[0]}" if numbers and missing else ""
            file = self.files[first.file]
            held = f"{keys[0]} holds {found} experts" if stacked else f"there are {found} tensors like {keys[0]}"
            raise blame(
                ConfigError,
                f"{file}: {held}, and the configuration says {taken.num_experts}{what}; fetch the checkpoint again",
                file,
                keys[0],
            )
        for key in keys[1:]:
            stored = self.stored[key]
            if stored.shape != first.shape or stored.dtype != first.dtype:
                file = self.files[stored.file]
                raise blame(
                    ConfigError,
                    f"{file}: {key} is {stored.dtype} {list(stored.shape)}, and {keys[0]} is {first.dtype} "
                    f"{list(first.shape)}",
                    file,
                    key,
                )
        return Column(keys, found, first.shape[1:]) if stacked else Column(keys, 0, first.shape)

    def _check_shape(self, taken: Taken, param: Param, recipe: Recipe) -> None:
        total = 0
        for column in recipe.columns or ():
            stored = self.stored[column.keys[0]]
            shape = column.shape
            total += shape[0] if shape else 1
            if len(shape) != len(param.shape) or shape[1:] != param.shape[1:]:
                self._wrong_shape(recipe, param, stored, column.keys[0])
        if param.shape and total != param.shape[0]:
            key = (recipe.columns or [])[0].keys[0]
            self._wrong_shape(recipe, param, self.stored[key], key)

    def _wrong_shape(self, recipe: Recipe, param: Param, stored: Stored, key: str) -> None:
        raise blame(
            ConfigError,
            f"{self.files[stored.file]}: {key} {list(stored.shape)} does not fit {recipe.target}, where one expert is "
            f"{list(param.shape)}; the configuration and the files do not belong together",
            self.files[stored.file],
            key,
        )

    def _stored_plan(self, taken: Taken, param: Param, recipe: Recipe) -> Plan:
        """A quantised parameter: the row keeps its tensors as they are stored, one part for each."""
        parts, columns = [], []
        for pattern in recipe.entry.source_patterns:
            column = recipe.sources.get(pattern)
            if column is None:
                continue
            key = column.keys[0]
            name = ".".join(key.split(".")[-1 if column.whole else -2 :])
            parts.append((name, column.shape, self._dtype(self.stored[key], key)))
            columns.append([column])
        return Plan(parts, columns, None)

    def _dtype(self, stored: Stored, key: str) -> torch.dtype:
        if stored.dtype not in DTYPES:
            file = self.files[stored.file]
            raise blame(
                HeaderError, f"{file}: {key} has the dtype {stored.dtype}, which torch does not know", file, key
            )
        return DTYPES[stored.dtype]

    def _ranges(self, taken: Taken, plans: list[tuple[Param, Recipe, Plan]], parts: list[Part]) -> list[list[Range]]:
        """Byte ranges of every expert; neighbours in file and row become one."""
        pieces = [columns for _, _, plan in plans for columns in plan.columns or ()]
        rows: list[list[Range]] = []
        for expert in range(taken.num_experts):
            row: list[Range] = []
            for part, columns in zip(parts, pieces, strict=True):
                at = part.offset
                for column in columns:
                    file, offset, size = self._slice(column, expert)
                    last = row[-1] if row else None
                    if last and (last.file, last.offset + last.bytes, last.at + last.bytes) == (file, offset, at):
                        row[-1] = Range(file, last.offset, last.bytes + size, last.at)
                    else:
                        row.append(Range(file, offset, size, at))
                    at += size
            rows.append(row)
        return rows

    def _slice(self, column: Column, expert: int) -> tuple[int, int, int]:
        stored = self.stored[column.key(expert)]
        if not column.whole:
            return stored.file, stored.offset, stored.bytes
        size = stored.bytes // column.whole
        return stored.file, stored.offset + expert * size, size

    def materialise(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The parts of one expert as they stand in its row, made by transformers' own operations."""
        entry = self.layers[layer]
        made: dict[str, Tensor] = {}
        for param, recipe, plan in entry.recipes:
            if recipe.quantised:
                for (name, _, _), columns in zip(plan.parts, plan.columns or (), strict=True):
                    made[name] = self._read(columns[0], expert)
            else:
                made[param.name] = self._make(param, recipe, plan, expert)
        return made

    def _make(self, param: Param, recipe: Recipe, plan: Plan, expert: int) -> Tensor:
        """One parameter of one expert."""
        _, shape, dtype = plan.parts[0]
        cast = plan.cast
        if recipe.columns is not None:  # whole pieces end to end: only the dtype is another
            pieces = [self._read(column, expert) for column in recipe.columns]
            result = torch.cat([piece if cast is None else piece.to(cast) for piece in pieces])
        else:
            tensors = {}
            for pattern, column in recipe.sources.items():
                tensor = self._read(column, expert)
                tensor = tensor.unsqueeze(0) if column.whole else tensor
                tensors[pattern] = [tensor if cast is None else tensor.to(cast)]
            try:
                result = recipe.convert(tensors, shape, dtype, self)
            except Exception as error:  # whatever an operation of transformers raises
                key = next(iter(recipe.sources.values())).key(expert)
                raise blame(ConfigError, f"{key} cannot become {recipe.target}: {error}", None, key) from error
        if tuple(result.shape) != shape:
            key = next(iter(recipe.sources.values())).key(expert)
            self._wrong_shape(recipe, param, self.stored[key], key)
        # Without a cast the bits stay: scales may be stored as plain bytes.
        return (result.contiguous().view(dtype) if cast is None else result.to(dtype)).contiguous()

    def _read(self, column: Column, expert: int) -> Tensor:
        file, offset, size = self._slice(column, expert)
        path = self.files[file]
        key = column.key(expert)
        data = bytearray(size)
        try:
            with path.open("rb", buffering=0) as opened:
                opened.seek(offset)
                view, done = memoryview(data), 0
                while done < size:
                    got = opened.readinto(view[done:])
                    if not got:
                        raise blame(FileError, f"{path}: {key} ends early; fetch the file again", path, key)
                    done += got
        except OSError as error:
            if isinstance(error, MoecoreError):
                raise
            raise blame(FileError, f"{path}: {error.strerror or error}", path, key) from error
        dtype = self._dtype(self.stored[key], key)
        return (
            torch.frombuffer(data, dtype=dtype).reshape(column.shape)
            if size
            else torch.empty(column.shape, dtype=dtype)
        )


class Decoder:
    """Turns the stored parts of one expert into parameters, with the operations that transformers loads them with."""

    def __init__(self, config: Any, plans: list[tuple[Param, Recipe, Plan]]) -> None:
        self.config = config
        self.plans = plans

    def __call__(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for param, recipe, plan in self.plans:
            if not recipe.quantised:
                made[param.name] = parts[param.name]
                continue
            tensors = {}
            patterns = [pattern for pattern in recipe.entry.source_patterns if pattern in recipe.sources]
            for pattern, (name, _, _) in zip(patterns, plan.parts, strict=True):
                part = parts[name]
                tensors[pattern] = [part.unsqueeze(0) if recipe.sources[pattern].whole else part]
            made[param.name] = recipe.convert(tensors, param.shape, param.dtype, self).to(param.dtype)
        return made
