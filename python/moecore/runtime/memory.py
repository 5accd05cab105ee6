"""What a device has free, and what a model needs of it beside its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import budget

if TYPE_CHECKING:
    from torch import nn

#: Tokens for which ``"auto"`` keeps room where nobody says a number and the model's own limit is longer.
DEFAULT_TOKENS = 8192

#: Tokens of one forward pass for which activations are set aside.
PREFILL_TOKENS = 4096


def auto_budget(
    model: nn.Module, device: torch.device, whole: int, max_model_len: int | None, freed: int = 0
) -> budget.Auto:
    """The budget of ``expert_memory="auto"``: what is free less KV cache, activations and a reserve.

    `freed`: bytes that will be free by the time the experts start, and are not yet.
    """
    free = free_memory(device) + freed
    config = text_config(model)
    tokens = max_model_len or min(int(getattr(config, "max_position_embeddings", 0) or DEFAULT_TOKENS), DEFAULT_TOKENS)
    return budget.auto(free, kv_cache_bytes(config, tokens), activation_bytes(config), whole)


def free_memory(device: torch.device) -> int:
    """Bytes that the device has free, with what torch holds and does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return budget.free_host_memory()


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model inside."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def kv_cache_bytes(config: Any, tokens: int) -> int:
    """Upper bound for one sequence: keys and values of every layer at full length, in 16 bits.

    2 x layers x KV heads x head dimension x tokens x 2 bytes. Windows and compressed caches take less.
    """
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    kv_heads = int(getattr(config, "num_key_value_heads", 0) or heads)
    head_dim = int(getattr(config, "head_dim", 0) or (getattr(config, "hidden_size", 0) // max(heads, 1)))
    return 2 * int(config.num_hidden_layers) * kv_heads * head_dim * tokens * 2


def activation_bytes(config: Any) -> int:
    """Generous: for each token of a prefill 32 hidden vectors, and its logits, in 16 bits."""
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    top_k = int(getattr(config, "num_experts_per_tok", 0) or 8)
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)
    return 2 * (PREFILL_TOKENS * hidden * (32 + 2 * top_k) + vocabulary * 4)
