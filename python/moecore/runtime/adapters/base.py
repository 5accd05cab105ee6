"""What every kind of experts module has in common: where it is, what a row of it holds, how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Run = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""`run(module, hidden [T, H], index [T, k], weights [T, k]) -> [T, H]`: what takes an experts module's place."""


@dataclass(frozen=True)
class Param:
    """One parameter of an experts module.

    Attributes:
        name: relative to the experts module (`gate_up_proj`, `mlp.w1`).
        shape: of one expert.
        dtype: in which the model computes with it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False)
class Taken:
    """An experts module that moecore runs in the model's place.

    Attributes:
        module: the experts module.
        name: its path in the model.
        layer: the layer's number, for people; not unique where a model has text and vision experts.
        num_experts: experts that have weights. Identity experts and sentinels have higher numbers.
        params: parameters in row order.
        adapter: how this kind of module is run.
        top_k: experts for each token, if the model says so.
        decode: turns the stored parts of one expert (FP8 or MXFP4 with scales) into parameters; None when the parts
            are the parameters.
    """

    module: nn.Module
    name: str
    layer: int
    num_experts: int
    params: tuple[Param, ...]
    adapter: Adapter
    top_k: int | None = None
    decode: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of a row of results before it is weighted, when the hidden states have the weights' dtype."""
        return self.params[-1].dtype

    def resident(self, expert: int) -> dict[str, Tensor]:
        """One expert's parameters as views of a loaded module."""
        found = {}
        for param in self.params:
            whole = attribute(self.module, param.name)
            rows = whole.reshape(-1, *param.shape) if whole.dim() == len(param.shape) else whole
            found[param.name] = rows[expert]
        return found

    def restore(self) -> None:
        """Gives the module back to transformers. Harmless when called twice."""
        while self.undo:
            self.undo.pop()()


class Adapter(Protocol):
    """How one kind of experts module is found, run, and switched over."""

    served_by_interface: bool
    """Whether transformers' registry reaches it: then its config is switched and nothing else is touched."""

    rounds_weights: bool
    """Whether the routing weights take the results' dtype before they multiply (FP8 modules)."""

    def owns(self, module: nn.Module) -> bool:
        """Whether this is an experts module of that kind."""

    def num_experts(self, module: nn.Module) -> int:
        """Experts that have weights."""

    def params(self, module: nn.Module) -> tuple[Param, ...]:
        """What a row holds."""

    def expert(self, module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """One expert's rows, not weighted."""

    def can_group(self, module: nn.Module) -> bool:
        """Whether the layout is the one that grouped products understand."""

    def without_weights(self, module: nn.Module, hidden: Tensor, index: Tensor, out: Tensor) -> None:
        """Fills the rows of `out` that no expert with weights serves."""

    def install(self, model: nn.Module, taken: Taken, run: Run) -> None:
        """Leads the module's calls to `run`; `taken.undo` gets the way back."""


def attribute(module: nn.Module, path: str) -> Any:
    """An attribute of a module or of a child of it."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner) if owner else module, name)


def direct_params(module: nn.Module, experts: int, prefix: str = "") -> tuple[Param, ...]:
    """The module's own parameters that have a row for each expert."""
    found = []
    for name, tensor in module.named_parameters(recurse=False):
        if tensor.dim() and tensor.shape[0] == experts:
            found.append(Param(prefix + name, tuple(tensor.shape[1:]), tensor.dtype))
    return tuple(found)


def zero_out_of_range(experts: int, index: Tensor, out: Tensor) -> None:
    """Zeroes the rows of expert-parallel sentinels: nothing else writes them, and 0 x NaN is NaN."""
    gone = (index.reshape(-1) >= experts) | (index.reshape(-1) < 0)
    out.masked_fill_(gone.unsqueeze(-1), 0.0)


def replace_forward(module: nn.Module, forward: Callable[..., Any], taken: Taken) -> None:
    """Gives one module another forward, until `taken.restore()`."""
    before = vars(module).get("forward")
    object.__setattr__(module, "forward", forward)

    def undo() -> None:
        if before is None:
            vars(module).pop("forward", None)
        else:
            object.__setattr__(module, "forward", before)

    taken.undo.append(undo)
