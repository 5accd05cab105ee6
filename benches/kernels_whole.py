"""Rows of `kernels.py` about whole layers: expert products for a few tokens, and all that is not a product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kernels_ours as ours
import kernels_stock as stock
import torch
from kernels_clock import launches, sets_for
from kernels_data import Shape, make_ids, make_logits, near, normal
from kernels_jobs import OURS, Made, Row
from kernels_peers import torch_gate, torch_index
from moecore import ops
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kernels_peers import Peers

SETS = 8
#: transformers' batched_mm copies each pair's weights: beyond so many tokens it is out of question.
BATCHED_TOKENS = 16
_WEIGHTS: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}


def weights_of(s: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2I, H] and down [E, H, I], made once."""
    key = (s.experts, s.hidden, s.inner)
    if key not in _WEIGHTS:
        make = {"device": device, "dtype": torch.bfloat16}
        up = torch.empty(s.experts, 2 * s.inner, s.hidden, **make).normal_(0, 0.02)
        _WEIGHTS[key] = up, torch.empty(s.experts, s.hidden, s.inner, **make).normal_(0, 0.02)
    return _WEIGHTS[key]


def experts(s: Shape, others: Peers, device: torch.device) -> Made:
    """Ids, weights and activations to the layer's output: both products, activation, weighted sum."""
    up, down = weights_of(s, device)
    x, ids = normal(s.tokens, s.hidden, SETS, device), make_ids(s, SETS, device)
    wide = [one.long() for one in ids]
    weights = [torch.rand(s.tokens, s.k, device=device) for _ in range(SETS)]
    narrow = [one.to(torch.bfloat16) for one in weights]
    indices = [ops.index(one, s.experts) for one in ids]
    pairs = s.tokens * s.k
    turned = up.transpose(1, 2), down.transpose(1, 2)

    def products(rows: Tensor, ends: Tensor) -> Tensor:
        gate, linear = functional.grouped_mm(rows, turned[0], offs=ends).chunk(2, dim=-1)
        return functional.grouped_mm(functional.silu(gate) * linear, turned[1], offs=ends)

    def around_grouped(i: int) -> Tensor:
        ends, _, inverse = ops.index(ids[i], s.experts)
        return ops.combine(products(ops.permute(x[i], inverse, pairs), ends), inverse, weights[i])

    rows = [ops.permute(one, index[2], pairs) for one, index in zip(x, indices, strict=True)]
    module = stock.module(up, down)
    grouped, batched = stock.forward("grouped_mm"), stock.forward("batched_mm")
    sides: dict[str, Any] = {
        OURS: lambda i: ops.expert_matvec(x[i], ids[i], weights[i], up, down),
        "moecore index, permute, combine; grouped_mm": around_grouped,
        "grouped_mm and silu alone": lambda i: products(rows[i], indices[i][0]),
        "transformers grouped_mm": lambda i: grouped(module, x[i], wide[i], narrow[i]),
    }
    if s.tokens <= BATCHED_TOKENS:
        sides["transformers batched_mm"] = lambda i: batched(module, x[i], wide[i], narrow[i])
    want = grouped(module, x[0], wide[0], narrow[0])
    right = {name: (lambda run=run: near(run(0), want)) for name, run in sides.items() if "alone" not in name}
    asked = sum(int(one.unique().numel()) for one in ids) / SETS
    size = int(asked * 3 * s.hidden * s.inner * 2) + 2 * s.tokens * s.hidden * 2
    return Made(sides, SETS, size, right)


class GlueRow:
    """Logits and activations to permuted rows, and finished expert rows to the layer's output."""

    launches: dict[str, list[str]]

    def __call__(self, s: Shape, others: Peers, device: torch.device) -> Made:
        sets = max(2, sets_for(s.tokens, s.tokens * s.hidden * 2))
        pairs = s.tokens * s.k
        logits, x = make_logits(s, sets, device), normal(s.tokens, s.hidden, sets, device)
        done = torch.randn(pairs, s.hidden, device=device, dtype=torch.bfloat16)
        glue = stock.Glue(s.experts, s.hidden, s.inner, done)

        def our_glue(i: int) -> Tensor:
            route, _, _ = ours.route_permute(logits[i], x[i], s.k)
            return ops.combine(done, route.inverse, route.weights)

        def theirs(i: int) -> Tensor:
            with glue.patched():
                return glue(x[i], logits[i], s.k)

        sides: dict[str, Any] = {OURS: our_glue, "transformers": theirs}
        if vllm := others.vllm:

            def with_vllm(i: int) -> Tensor:
                weights, ids = vllm.softmax(logits[i], s.k)
                _, _, inverse = vllm.permute(x[i], ids, s.experts)
                return vllm.unpermute(done, inverse, weights)

            sides["vLLM"] = with_vllm
        self.launches = {name: launches(run) for name, run in sides.items()}
        row = s.tokens * s.hidden * 2
        size = s.tokens * s.experts * s.dtype.itemsize + pairs * 24 + row * (1 + s.k) + row * (s.k + 1)

        def right(run: Any) -> bool:
            weights, ids = torch_gate(logits[0], s.k)
            inverse = torch_index(ids, s.experts)[2].view(-1)
            rows = done[inverse].float().view(s.tokens, s.k, -1)
            return near(run(0), (rows * weights[..., None]).sum(1))

        # transformers' sort is not stable, so which token gets which of an expert's finished rows is open there.
        checked = {name: (lambda run=run: right(run)) for name, run in sides.items() if name != "transformers"}
        return Made(sides, sets, size, checked)


def first() -> Iterator[Row]:
    """What an aim is set for."""
    yield Row("experts", Shape(1, 128, 8, 2048, 768, dtype=torch.bfloat16), experts)
    yield Row("glue", Shape(4096, 128, 8, 2048, 768), GlueRow())


def rest() -> Iterator[Row]:
    """The crossover, and the glue of a small batch."""
    for tokens in (2, 4, 8, 16, 32, 64):
        yield Row("experts", Shape(tokens, 128, 8, 2048, 768, dtype=torch.bfloat16), experts)
    for tokens in (1, 64):
        yield Row("glue", Shape(tokens, 128, 8, 2048, 768), GlueRow())
