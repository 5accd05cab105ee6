"""transformers' own experts code for `kernels.py`: whole, and as glue with products and activation taken out."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def router(logits: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `Qwen3MoeTopKRouter` does after its product."""
    probabilities = functional.softmax(logits, dtype=torch.float, dim=-1)
    top, ids = torch.topk(probabilities, k, dim=-1)
    top = top / top.sum(dim=-1, keepdim=True)
    return top.to(dtype), ids


def module(gate_up: Tensor, down: Tensor) -> Any:
    """An experts module, as far as the registered functions look at one."""
    from transformers.integrations.moe import _default_apply_gate

    stand_in = SimpleNamespace(
        num_experts=gate_up.shape[0], has_gate=True, has_bias=False, is_transposed=False, is_concatenated=True,
        gate_up_proj=gate_up, down_proj=down, act_fn=functional.silu, config=SimpleNamespace(),
        _is_expert_parallel=False, has_post_expert_norm=False,  # newer versions ask
    )  # fmt: skip
    stand_in._apply_gate = lambda both: _default_apply_gate(stand_in, both)
    return stand_in


def forward(name: str) -> Callable[..., Tensor]:
    """`grouped_mm` or `batched_mm` of transformers' registry."""
    from transformers.integrations import moe

    function: Callable[..., Tensor] = moe.ALL_EXPERTS_FUNCTIONS[name]
    return function


class Glue:
    """`grouped_mm_experts_forward` with its products and its activation replaced by finished tensors: op for op what
    transformers launches besides them."""

    def __init__(self, experts: int, hidden: int, inner: int, rows: Tensor) -> None:
        from transformers.integrations import moe

        self.moe = moe
        device, dtype = rows.device, rows.dtype
        up = torch.empty(experts, 2 * inner, 1, dtype=dtype, device=device)
        down = torch.empty(experts, hidden, 1, dtype=dtype, device=device)
        self.module = module(up, down)
        both = torch.randn(rows.shape[0], 2 * inner, dtype=dtype, device=device)
        self.done = {id(up): both, id(down): rows}
        between = both[:, :inner].contiguous()
        self.module._apply_gate = lambda _: between

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """transformers' products, for a while finished tensors."""
        before = self.moe._grouped_linear
        self.moe._grouped_linear = lambda _, weight, *__, **___: self.done[id(weight)]
        try:
            yield
        finally:
            self.moe._grouped_linear = before

    def __call__(self, x: Tensor, logits: Tensor, k: int) -> Tensor:
        """Router, index, permute, masks, weights, sum. Call it under `patched`."""
        weights, ids = router(logits, k, x.dtype)
        out: Tensor = self.moe.grouped_mm_experts_forward(self.module, x, ids, weights)
        return out
