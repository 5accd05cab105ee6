"""The trained model that ships with the tests: loaded in a part of its memory, and what the whole model says."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import tiny
import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moecore.runtime import budget

TINY_MOE = Path(__file__).parents[1] / "data" / "tiny-moe"
#: Bytes of one expert, of 96.
SLOT = 49152
NEW = 8


def prompt(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 2000, (1, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(0) % 100).logits


def greedy(model: Any, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    ids = prompt(seed)
    kwargs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | kwargs
    with torch.no_grad(), tiny.quiet():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)


@functools.cache
def answers() -> list[torch.Tensor]:
    """What the resident model says to some prompts."""
    model = tiny.aligned(transformers.AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype="auto").eval())
    model.set_experts_implementation("grouped_mm")
    return [greedy(model, seed) for seed in range(8)]


def load(folder: Path, expert_memory: budget.Budget = "12%", **kwargs: Any) -> Any:
    return tiny.aligned(moecore.load(folder, expert_memory=expert_memory, device="cpu", **kwargs))


@contextlib.contextmanager
def running(folder: Path = TINY_MOE, expert_memory: budget.Budget = "12%", **kwargs: Any) -> Iterator[Any]:
    model = load(folder, expert_memory, **kwargs)
    with model.moecore:
        yield model
