"""Inputs of the kernels' benches, and what a right choice is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: As an input's dtype is written in a table.
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Shape:
    """Of one row. E experts, k of them for a token, H hidden, I intermediate; groups where the gate has them."""

    tokens: int
    experts: int = 0
    k: int = 0
    hidden: int = 0
    inner: int = 0
    groups: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        parts = [f"T={self.tokens}"]
        parts += [f"E={self.experts}"] if self.experts else []
        parts += [f"k={self.k}", f"H={self.hidden}" if self.hidden else ""]
        parts += [f"{self.groups} groups" if self.groups > 1 else "", NAMES[self.dtype]]
        return " ".join(part for part in parts if part)


def make_logits(s: Shape, sets: int, device: torch.device) -> list[Tensor]:
    """Normal logits: every expert is as likely as every other."""
    chance = torch.Generator(device=device).manual_seed(s.tokens + s.experts)
    return [torch.randn(s.tokens, s.experts, generator=chance, device=device).to(s.dtype) for _ in range(sets)]


def make_ids(s: Shape, sets: int, device: torch.device) -> list[Tensor]:
    """int32 ids, distinct in a token."""
    drawn = make_logits(Shape(s.tokens, s.experts), sets, device)
    return [one.topk(s.k, dim=-1).indices.int() for one in drawn]


def normal(rows: int, width: int, sets: int, device: torch.device) -> list[Tensor]:
    """bf16 activations."""
    return [torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(sets)]


def same_choice(logits: Tensor, got: Any, want: Any) -> bool:
    """Experts of equal logits and weights near enough: which of two equal logits comes first is a side's own matter."""
    ids, expected = got[1].long(), want[1].long()
    if bool((ids < 0).any() | (ids >= logits.shape[1]).any()):
        return False
    chosen = torch.gather(logits, 1, ids).sort(dim=-1).values
    wanted = torch.gather(logits, 1, expected).sort(dim=-1).values
    weights = got[0].float().sort(dim=-1).values - want[0].float().sort(dim=-1).values
    return bool(torch.equal(chosen, wanted)) and float(weights.abs().max()) < 2e-3


def near(got: Tensor, want: Tensor, limit: float = 2e-2) -> bool:
    """By the norm of the difference; NaN never passes."""
    a, b = got.double().flatten(), want.double().flatten()
    return bool((a - b).norm() <= limit * b.norm())
