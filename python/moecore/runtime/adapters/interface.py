"""Experts modules that transformers' experts interface serves, quantised ones (`FP8Experts`) among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from .base import Param, direct_params, zero_out_of_range

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Run, Taken

# What the decorator leaves on every module. Class names say nothing: FP8 and subclasses have others.
MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "num_experts")


class Interface:
    """One code path for every family that transformers decorates."""

    served_by_interface = True
    rounds_weights = False

    def owns(self, module: nn.Module) -> bool:
        return all(hasattr(module, mark) for mark in MARKS)

    def num_experts(self, module: nn.Module) -> int:
        return int(module.num_experts)  # type: ignore[arg-type]  # a plain integer on every experts class

    def params(self, module: nn.Module) -> tuple[Param, ...]:
        return direct_params(module, self.num_experts(module))

    def can_group(self, module: nn.Module) -> bool:
        return True

    def expert(self, module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        up = "gate_up_proj" if module.has_gate else "up_proj"
        hidden = self.linear(module, weights, up, x)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)  # type: ignore[operator]
        out = self.linear(module, weights, "down_proj", hidden)
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)  # type: ignore[operator]
        return out

    def linear(self, module: nn.Module, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        """One projection, rounded as transformers' grouped path rounds it: product first, then the bias."""
        weight = weights[name]
        x = x.to(weight.dtype)
        out = torch.matmul(x, weight) if module.is_transposed else functional.linear(x, weight)
        return out.add_(weights[f"{name}_bias"]) if module.has_bias else out

    def without_weights(self, module: nn.Module, hidden: Tensor, index: Tensor, out: Tensor) -> None:
        zero_out_of_range(self.num_experts(module), index, out)

    def install(self, model: nn.Module, taken: Taken, run: Run) -> None:
        """Nothing to do here: the registry leads the call to `run`, see `families.switch_configs`."""


class FP8(Interface):
    """`FP8Experts`, which takes the place of experts modules in FP8 checkpoints on machines that have the kernels."""

    rounds_weights = True

    def owns(self, module: nn.Module) -> bool:
        return (
            super().owns(module) and hasattr(module, "activation_scheme") and callable(getattr(module, "linear", None))
        )

    def can_group(self, module: nn.Module) -> bool:
        return False

    def linear(self, module: nn.Module, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        scale = weights.get(f"{name}_activation_scale")
        return module.linear(x, weights[name], weights[f"{name}_scale_inv"], activation_scale=scale)  # type: ignore[operator, no-any-return]
