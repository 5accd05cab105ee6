"""Switch Transformers: an encoder and a decoder."""

from __future__ import annotations

from .figures import Expected


def switch_base_128() -> Expected:
    # Encoder and decoder of 12 layers, d_model 768, 12 heads of 64, d_ff 3072, relu; every second layer has 128
    # experts, top-1. One table for both embeddings and the head. fp32. A relative bias of 32 x 12 on each side.
    # Cross-attention grows with the encoder's tokens, which nobody gave: no exact cache figure.
    attention = 4 * 768 * 768
    return Expected(
        layers=24,
        moe_layers=12,
        experts=128,
        top_k=1,
        shared=0,
        params={
            "embedding": 32_128 * 768,
            "attention": (12 + 2 * 12) * attention + 2 * 32 * 12,
            "dense_mlp": 12 * 2 * 768 * 3072,
            "norm": (12 * 2 + 12 * 3 + 2) * 768,
            "router": 12 * 128 * 768,
            "routed_expert": 12 * 128 * 2 * 768 * 3072,
        },
        width=4,
    )
