"""Experts modules that transformers' experts interface serves, quantised ones (`FP8Experts`) among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from .base import Param, direct_params, zero_out_of_range

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .base import Run, Taken

# What the decorator leaves on every module. Class names say nothing: FP8 and subclasses have others.
MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "num_experts")


class Interface:
    """One code path for every family that transformers decorates."""

    served_by_interface = True
    rounds_weights = False

    def owns(self, module: Any) -> bool:
        return all(hasattr(module, mark) for mark in MARKS)

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def params(self, module: Any) -> tuple[Param, ...]:
        return direct_params(module, self.num_experts(module))

    def can_group(self, module: Any) -> bool:
        return True

    def expert(self, module: Any, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        up = "gate_up_proj" if module.has_gate else "up_proj"
        hidden = self.linear(module, weights, up, x)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        out = self.linear(module, weights, "down_proj", hidden)
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        return out

    def linear(self, module: Any, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        """One projection, rounded as transformers' grouped path rounds it: product first, then the bias."""
        weight = weights[name]
        x = x.to(weight.dtype)
        out = torch.matmul(x, weight) if module.is_transposed else functional.linear(x, weight)
        return out.add_(weights[f"{name}_bias"]) if module.has_bias else out

    def without_weights(self, module: Any, hidden: Tensor, index: Tensor, out: Tensor) -> None:
        zero_out_of_range(self.num_experts(module), index, out)

    def install(self, model: nn.Module, taken: Taken, run: Run) -> None:
        """Nothing to do here: the registry leads the call to `run`, see `families.switch_configs`."""


class FP8(Interface):
    """`FP8Experts`, which takes the place of experts modules in FP8 checkpoints on machines that have the kernels."""

    rounds_weights = True

    def owns(self, module: Any) -> bool:
        return (
            super().owns(module) and hasattr(module, "activation_scheme") and callable(getattr(module, "linear", None))
        )

    def can_group(self, module: Any) -> bool:
        return False

    def linear(self, module: Any, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        scale = weights.get(f"{name}_activation_scale")
        out: Tensor = module.linear(x, weights[name], weights[f"{name}_scale_inv"], activation_scale=scale)
        return out
