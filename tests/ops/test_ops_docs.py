"""The example of docs/kernels.md, on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.mark.skipif(not hasattr(functional, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("tokens", [5, 40])
def test_the_block_of_the_page_computes_a_moe_layer(tokens: int) -> None:
    """Both of its ways, against the layer in float64, token by token: bfloat16 rounds products by up to 1 in 256."""
    code = re.search(r"## In your own model\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code.group(1), names)  # our own page
    chance = torch.Generator().manual_seed(0)
    experts, k, width, inner = 8, 2, 32, 16

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance).bfloat16()

    hidden, router, gate_up, down = (
        random(tokens, width), random(experts, width), random(experts, 2 * inner, width), random(experts, width, inner)
    )  # fmt: skip
    seen = names["experts"](hidden, router, gate_up, down, k)
    logits = functional.linear(hidden, router).double()
    weights, ids = logits.softmax(-1).topk(k)
    weights /= weights.sum(-1, keepdim=True)
    want = torch.zeros(tokens, width, dtype=torch.float64)
    for token in range(tokens):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ hidden[token].double()).chunk(2)
            want[token] += weight * (down[expert].double() @ (functional.silu(gate) * up))
    assert (seen.double() - want).norm() <= 2**-7 * want.norm()
