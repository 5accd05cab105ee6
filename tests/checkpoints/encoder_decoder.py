"""Switch Transformers: an encoder and a decoder, both with experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .collect import Collector

if TYPE_CHECKING:
    from .tensors import Json, Tensor


def switch(cfg: Json) -> list[Tensor]:
    """Encoder and decoder; every second layer is sparse; one table serves both embeddings and the head."""
    c = Collector("F32")
    hidden, inner, experts = cfg["d_model"], cfg["d_ff"], cfg["num_experts"]
    width = cfg["num_heads"] * cfg["d_kv"]

    def attention(prefix: str, biased: bool) -> None:
        for proj in ("q", "k", "v"):
            c.plain(f"{prefix}.{proj}", width, hidden)
        c.plain(f"{prefix}.o", hidden, width)
        if biased:
            c.add(f"{prefix}.relative_attention_bias.weight", cfg["relative_attention_num_buckets"], cfg["num_heads"])

    c.add("shared.weight", cfg["vocab_size"], hidden)
    for side, layers, step in (
        ("encoder", cfg["num_layers"], cfg["encoder_sparse_step"]),
        ("decoder", cfg["num_decoder_layers"], cfg["decoder_sparse_step"]),
    ):
        for layer in range(layers):
            prefix = f"{side}.block.{layer}.layer"
            attention(f"{prefix}.0.SelfAttention", layer == 0)
            c.norm(f"{prefix}.0.layer_norm", hidden)
            last = 1
            if side == "decoder":
                attention(f"{prefix}.1.EncDecAttention", False)
                c.norm(f"{prefix}.1.layer_norm", hidden)
                last = 2
            if layer % step == 1:
                for expert in range(experts):
                    c.plain(f"{prefix}.{last}.mlp.experts.expert_{expert}.wi", inner, hidden)
                    c.plain(f"{prefix}.{last}.mlp.experts.expert_{expert}.wo", hidden, inner)
                c.plain(f"{prefix}.{last}.mlp.router.classifier", experts, hidden)
            else:
                c.plain(f"{prefix}.{last}.mlp.wi", inner, hidden)
                c.plain(f"{prefix}.{last}.mlp.wo", hidden, inner)
            c.norm(f"{prefix}.{last}.layer_norm", hidden)
        c.norm(f"{side}.final_layer_norm", hidden)
    return c.tensors
