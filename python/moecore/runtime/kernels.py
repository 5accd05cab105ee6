"""Which of moecore's kernels serve a kind of experts, and their launches: a few tokens straight over slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .families import Taken
    from .rows import Layout

#: Activations that the fused kernel knows, by the name that transformers gives their class.
ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUActivation": 1, "GELUTanh": 2, "PytorchGELUTanh": 2, "ReLU": 3}

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def activation(module: Any) -> int | None:
    """The activation's number where gate, product and sum are the plain ones; None where the module has its own way."""
    plain = (
        getattr(type(module)._apply_gate, "__module__", "") == "transformers.integrations.moe"
        and getattr(module, "has_gate", True)
        and getattr(module, "is_concatenated", True)
        and not getattr(module, "has_bias", False)
        and not getattr(module, "is_transposed", False)
        and not getattr(module, "has_post_expert_norm", False)
    )
    return ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__) if plain else None


class Kernels:
    """Launches over the slots of one engine."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._serves: dict[int, bool] = {}
        self._fused: dict[int, int | None] = {}

    def serves(self, taken: Taken) -> bool:
        """Whether the kernels can run these experts: the interface's layout, in a dtype that they know."""
        known = self._serves.get(id(taken))
        if known is None:
            names = {param.name for param in taken.params}
            up = "gate_up_proj" if getattr(taken.module, "has_gate", True) else "up_proj"
            known = (
                taken.decode is None
                and taken.adapter.served_by_interface
                and {up, "down_proj"} <= names
                and all(param.dtype in DTYPES for param in taken.params)
                and names <= {up, "down_proj", f"{up}_bias", "down_proj_bias"}
            )
            self._serves[id(taken)] = known
        return known

    def fused(self, taken: Taken) -> int | None:
        """The activation's number where gate, product and sum can be fused; None where the module has its own way."""
        key = id(taken)
        if key not in self._fused:
            self._fused[key] = None if taken.adapter.rounds_weights else activation(taken.module)
        return self._fused[key]

    def experts(
        self,
        taken: Taken,
        layout: Layout,
        hidden: Tensor,
        index: Tensor,
        slots: Tensor,
        weights: Tensor,
        stream: int,
    ) -> Tensor:
        """The whole layer over slots [T, k] int32 -> [T, H]."""
        from . import compute

        activation = self.fused(taken)
        if activation is None or weights.dtype not in (torch.float32, taken.dtype):
            rows = self.rows(taken, layout, hidden, slots, stream)
            return compute.combine(taken, rows, weights, hidden.shape[0], hidden.dtype, index)
        up, down = _part(layout, "gate_up_proj"), _part(layout, "down_proj")
        (tokens, top_k), width = slots.shape, hidden.shape[-1]
        x = hidden.to(taken.dtype).contiguous()
        between = torch.empty(tokens * top_k, up.shape[0] // 2, dtype=taken.dtype, device=x.device)
        out = torch.empty(tokens, width, dtype=taken.dtype, device=x.device)
        weights = weights.contiguous()
        dtype = DTYPES[taken.dtype]
        self.engine.expert_up(
            dtype, up.offset, x.data_ptr(), slots.data_ptr(), between.data_ptr(), tokens, top_k, width,
            up.shape[0] // 2, activation, stream,
        )  # fmt: skip
        self.engine.expert_down(
            dtype, down.offset, between.data_ptr(), slots.data_ptr(), weights.data_ptr(),
            weights.dtype == torch.float32, out.data_ptr(), tokens, top_k, up.shape[0] // 2, width, stream,
        )  # fmt: skip
        return out.to(hidden.dtype)

    def rows(self, taken: Taken, layout: Layout, hidden: Tensor, slots: Tensor, stream: int) -> Tensor:
        """Rows of every pair, not weighted: [T * k, H]. Pairs without a slot get zeros."""
        module: Any = taken.module
        gate = getattr(module, "has_gate", True)
        up = self._linear(taken, layout, "gate_up_proj" if gate else "up_proj", hidden, slots, stream, per_pair=False)
        between = module._apply_gate(up) if gate else module.act_fn(up)
        out = self._linear(taken, layout, "down_proj", between, slots, stream, per_pair=True)
        return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out

    def _linear(
        self, taken: Taken, layout: Layout, name: str, x: Tensor, slots: Tensor, stream: int, *, per_pair: bool
    ) -> Tensor:
        part = _part(layout, name)
        transposed = bool(getattr(taken.module, "is_transposed", False))
        outputs, inputs = reversed(part.shape) if transposed else part.shape
        bias = next((one.offset for one in layout.parts if one.name == f"{name}_bias"), None)
        x = x.to(part.dtype).contiguous()
        out = torch.empty(slots.numel(), outputs, dtype=part.dtype, device=x.device)
        self.engine.slot_linear(
            DTYPES[part.dtype], part.offset, bias, transposed, per_pair, x.data_ptr(), slots.data_ptr(),
            out.data_ptr(), slots.shape[0], slots.shape[1], inputs, outputs, stream,
        )  # fmt: skip
        return out


def _part(layout: Layout, name: str) -> Any:
    return next(part for part in layout.parts if part.name == name)
