"""Gathers tensors in checkpoint order, with the groups that most families have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .tensors import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping


class Collector:
    """Gathers tensors in checkpoint order. ``linear`` packs a weight as the checkpoint's quantisation does."""

    def __init__(self, dtype: str = "BF16") -> None:
        self.dtype = dtype
        self.tensors: list[Tensor] = []

    def add(self, name: str, *shape: int, dtype: str | None = None) -> None:
        self.tensors.append(Tensor(name, dtype or self.dtype, shape))

    def plain(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.tensors.append(Tensor(name + ".weight", self.dtype, (out, inner)))
        if bias:
            self.tensors.append(Tensor(name + ".bias", self.dtype, (out,)))

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.plain(name, out, inner, bias)

    def norm(self, name: str, width: int, bias: bool = False) -> None:
        self.tensors.append(Tensor(name + ".weight", self.dtype, (width,)))
        if bias:
            self.tensors.append(Tensor(name + ".bias", self.dtype, (width,)))

    def glu(self, prefix: str, hidden: int, inner: int, names: tuple[str, str, str] | None = None) -> None:
        gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
        self.linear(f"{prefix}.{gate}", inner, hidden)
        self.linear(f"{prefix}.{up}", inner, hidden)
        self.linear(f"{prefix}.{down}", hidden, inner)


# Mixtral's names of gate, up and down projection.
W123 = ("w1", "w3", "w2")


def head_dim(cfg: Mapping[str, Any]) -> int:
    """The stated head size, or the hidden size shared out."""
    return int(cfg.get("head_dim") or cfg["hidden_size"] // cfg["num_attention_heads"])


def gqa(c: Collector, prefix: str, cfg: Mapping[str, Any], *, bias: bool = False, o_bias: bool = False) -> None:
    """Grouped-query attention: q, k, v and o projection."""
    hidden, head = cfg["hidden_size"], head_dim(cfg)
    heads, kv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    c.linear(f"{prefix}.q_proj", heads * head, hidden, bias)
    c.linear(f"{prefix}.k_proj", kv * head, hidden, bias)
    c.linear(f"{prefix}.v_proj", kv * head, hidden, bias)
    c.linear(f"{prefix}.o_proj", hidden, heads * head, o_bias)


def ends(c: Collector, cfg: Mapping[str, Any], prefix: str = "model.", head: bool | None = None) -> None:
    """Embedding, final norm and (unless tied) LM head."""
    vocab, hidden = cfg["vocab_size"], cfg["hidden_size"]
    c.add(f"{prefix}embed_tokens.weight", vocab, hidden)
    c.norm(f"{prefix}norm", hidden)
    if not cfg.get("tie_word_embeddings") if head is None else head:
        c.add("lm_head.weight", vocab, hidden)
