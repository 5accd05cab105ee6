"""transformers' conversion mapping, asked for experts only: which tensors of a file become which parameter, and how.

Nothing here knows a family. Names go through the same functions as in transformers' loader; operations are recognised
by their class, and those that are not recognised are run as they are on one expert.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

SMALL = 32
"""Names that differ in numbers only are renamed one by one up to this many; beyond, by representatives."""


@dataclass
class Route:
    """What becomes of one tensor: the parameter, and the converter's pattern that its name matched."""

    target: str
    pattern: str | None


class Mapping:
    """The conversion mapping of one model, as its loader would use it."""

    def __init__(self, model: Any, hf_quantizer: Any = None, key_mapping: dict[str, str] | None = None) -> None:
        self.model = model
        self.quantizer = hf_quantizer
        self.key_mapping = key_mapping
        self.state: dict[str, Tensor] = model.state_dict()
        self.plan = {}
        if model.config.dtype is not None:
            self.plan = model._get_dtype_plan(model.config.dtype)
        self._fresh()

    def _fresh(self) -> None:
        """Transforms remember what they matched: each pass over the names has objects of its own."""
        entries = get_model_conversion_mapping(self.model, self.key_mapping, self.quantizer)
        self.renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
        self.by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}

    def route(self, key: str) -> Route:
        """Target of one tensor, as `convert_and_load_state_dict_in_model` finds it."""
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(key, self.renamings, self.converters, prefix, self.state)
        if target not in self.state and key in self.state:  # an own name that a pattern hit by mistake
            target, pattern = rename_source_key(key, [], [], prefix, self.state)
        return Route(target, pattern)

    def routes(self, keys: Iterable[str]) -> dict[str, Route]:
        """Targets of all tensors.

        A model has tens of thousands of names that differ in the expert's number only. Where changing a number does not
        change the target, the first and the last name of such a run are renamed, and stand for the run if they agree.
        """
        families: dict[str, list[tuple[tuple[int, ...], str]]] = {}
        for key in keys:
            parts = key.split(".")
            numbers = tuple(int(part) for part in parts if part.isdigit())
            families.setdefault(".".join("#" if part.isdigit() else part for part in parts), []).append((numbers, key))
        alone: list[str] = []
        runs: list[list[str]] = []
        for members in families.values():
            column = self._column(members) if len(members) > SMALL else None
            if column is None:
                alone += [key for _, key in members]
                continue
            split: dict[tuple[int, ...], list[tuple[int, str]]] = {}
            for numbers, key in members:
                split.setdefault(numbers[:column] + numbers[column + 1 :], []).append((numbers[column], key))
            runs += [[key for _, key in sorted(run)] for run in split.values()]
        # The loader's order: some renamings are armed by a name that must have come before.
        self._fresh()
        found: dict[str, Route] = {}
        for key in sorted({*alone, *(key for run in runs for key in (run[0], run[-1]))}, key=dot_natural_key):
            found[key] = self.route(key)
        for run in runs:
            agreed = found[run[0]] == found[run[-1]]
            for key in run[1:-1]:
                found[key] = found[run[0]] if agreed else self.route(key)
        return found

    def _column(self, members: list[tuple[tuple[int, ...], str]]) -> int | None:
        """Which number of a name does not show in its target: the expert's."""
        first, key = min(members)
        here = self.route(key).target
        others: dict[int, str] = {}
        for numbers, other in members:
            different = [at for at, (a, b) in enumerate(zip(first, numbers, strict=True)) if a != b]
            if len(different) == 1:
                others.setdefault(different[0], other)
        return next((column for column, other in others.items() if self.route(other).target == here), None)

    def dtype(self, target: str, entry: Any, stored: str, wanted: torch.dtype, *, renamed: bool) -> torch.dtype | None:
        """Dtype in which the loader hands a tensor to the operations; None: as it is stored."""
        if self.plan:
            policy, by_group, _ = build_glob_alternation(list(self.plan))
            match = policy.search(target)
            if match is not None and match.lastgroup is not None:
                wanted = self.plan[by_group[match.lastgroup]]
        quantizer = self.quantizer
        if quantizer is None or not quantizer.pre_quantized:
            return wanted
        if hasattr(quantizer, "get_new_dtype"):
            found: torch.dtype | None = quantizer.get_new_dtype(
                entry, SimpleNamespace(get_dtype=lambda: stored), wanted
            )
            return found
        # transformers before 5.19 leaves every renamed tensor of a quantised checkpoint as it is.
        return None if renamed or not stored.startswith(("F", "BF")) else wanted


@dataclass
class Column:
    """Bytes that every expert has in one place of its row: tensor keys by expert, or one tensor with all of them.

    Attributes:
        keys: by expert, or one.
        whole: into how many rows the one tensor is cut; 0 where each expert has a tensor.
        shape: of one expert's share.
    """

    keys: list[str]
    whole: int = 0
    shape: tuple[int, ...] = ()

    def key(self, expert: int) -> str:
        return self.keys[0 if self.whole else expert]


@dataclass
class Recipe:
    """How the tensors of the files become one parameter of an experts module.

    Attributes:
        entry: the converter, or None.
        at: which of the converter's targets this is.
        sources: pattern (or the key, without a converter) -> its column.
        columns: what lies end to end in the row; None when the operations must be run.
    """

    target: str
    entry: Any
    at: int
    sources: dict[str, Column] = field(default_factory=dict)
    columns: list[Column] | None = None

    @property
    def quantised(self) -> bool:
        """Whether the operations undo a quantisation: such a row keeps the stored parts."""
        return any(getattr(op, "hf_quantizer", None) is not None for op in self.operations)

    @property
    def operations(self) -> list[Any]:
        return list(self.entry.operations) if self.entry is not None else []

    def settle(self) -> None:
        """Works out the row's columns, where the operations only put whole pieces of an expert end to end."""
        state = dict(self.sources)
        for op in self.operations:
            if type(op) is MergeModulelist and op.dim == 0 and not any(column.whole for column in state.values()):
                continue
            if type(op) is Concatenate and op.dim == 1:
                # Along the first dimension of an expert: in the order of the patterns.
                state = {pattern: state[pattern] for pattern in self.entry.source_patterns if pattern in state}
                continue
            if type(op) is ErnieFuseAndSplitTextVisionExperts and (op.stack_dim, op.concat_dim) == (0, 1):
                continue  # the lists were cut into the targets' shares when they were collected
            return
        if self.entry is None or len(self.sources) == 1 or any(joins(op) for op in self.operations):
            self.columns = list(state.values())

    def convert(
        self, tensors: dict[str, list[Tensor]], shape: tuple[int, ...], dtype: torch.dtype, model: Any
    ) -> Tensor:
        """Runs the operations on one expert's tensors."""
        state: dict[str, Any] = dict(tensors)
        for op in self.operations:
            state = op.convert(
                state,
                source_patterns=self.entry.source_patterns,
                target_patterns=self.entry.target_patterns,
                full_layer_name=self.target,
                model=OneExpert(self.target, shape, dtype),
                config=model.config,
                missing_keys=set(),
            )
        wanted = self.entry.target_patterns[self.at] if self.entry is not None else None
        result = state[wanted] if wanted in state else next(iter(state.values()))
        result = result[0] if isinstance(result, list) else result
        one: Tensor = result[0] if result.dim() == len(shape) + 1 else result
        return one


class OneExpert:
    """Stands in for the model in operations that look up the shape or dtype of the parameter they make."""

    def __init__(self, target: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._owner, _, self._name = target.rpartition(".")
        self._tensor = torch.empty((1, *shape), dtype=dtype, device="meta")

    def get_submodule(self, _: str) -> Any:
        return SimpleNamespace(**{self._name: self._tensor})

    def get_parameter(self, _: str) -> Tensor:
        return self._tensor


def joins(op: Any) -> bool:
    """Whether an operation makes one tensor of several."""
    return isinstance(op, (Concatenate, ErnieFuseAndSplitTextVisionExperts))


def siblings(route: Route, entry: Any) -> list[str]:
    """Full names of all targets of a converter; names are matched to the first one only."""
    patterns = entry.target_patterns
    return [route.target.replace(patterns[0], pattern) for pattern in patterns]


def shares(entry: Any, keys: list[str], at: int) -> list[str]:
    """The keys of one target, where a converter spreads one list over several targets."""
    count = len(entry.target_patterns) if entry is not None else 1
    if count == 1:
        return keys
    size = -(-len(keys) // count)
    return keys[at * size : (at + 1) * size]


def numbers_of(keys: list[str]) -> list[int] | None:
    """The expert's number in each key: the one that differs between them."""
    rows = [[int(number) for number in re.findall(r"(?:(?<=\.)|^)\d+(?=\.|$)", key)] for key in keys]
    if len({len(row) for row in rows}) != 1:
        return None
    for column in zip(*rows, strict=True):
        if len(set(column)) == len(keys):
            return list(column)
    return None
