"""moecore's figures for every real config, against figures worked out here by hand.

No figure below comes from moecore or from the tensor lists of ``realrepo``: each is closed-form arithmetic over the
numbers of the model's config.json, written out with the layer counts. ``w(out, in)`` is one weight matrix; a role's
bytes are its parameters times the width of its dtype plus, where the checkpoint is quantised, its scales.

Conventions (they are the report's): total = logical parameters without MTP, towers included; active = everything but
towers and MTP, with top-k of E routed experts in each MoE layer; without embeddings = active less embedding and head.
Norms inside attention count as norm, a router's bias as router, a shared expert's gate as shared expert.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import realrepo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Report = dict[str, Any]

ROLES = (
    "embedding",
    "attention",
    "dense_mlp",
    "norm",
    "router",
    "shared_expert",
    "routed_expert",
    "mtp",
    "vision",
    "lm_head",
    "other",
)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, or several of the same size."""

    out: int
    inner: int
    times: int = 1

    @property
    def params(self) -> int:
        return self.out * self.inner * self.times

    @property
    def fp8(self) -> int:
        """One byte each, and an fp32 scale for each started block of 128 x 128."""
        return (self.out * self.inner + 4 * -(-self.out // 128) * -(-self.inner // 128)) * self.times

    @property
    def nvfp4(self) -> int:
        """Half a byte each, an fp8 scale for 16 values, and two fp32 scalars."""
        return (self.out * self.inner // 2 + self.out * self.inner // 16 + 8) * self.times


w = Matrix


def params(*matrices: Matrix) -> int:
    return sum(matrix.params for matrix in matrices)


def fp8(*matrices: Matrix) -> int:
    return sum(matrix.fp8 for matrix in matrices)


def nvfp4(*matrices: Matrix) -> int:
    return sum(matrix.nvfp4 for matrix in matrices)


def glu(hidden: int, inner: int, times: int = 1) -> tuple[Matrix, ...]:
    """gate, up and down projection."""
    return (w(inner, hidden, 2 * times), w(hidden, inner, times))


def gqa(hidden: int, heads: int, kv: int, head: int, times: int = 1) -> tuple[Matrix, ...]:
    """q, k, v and o projection."""
    return (w(heads * head, hidden, times), w(kv * head, hidden, 2 * times), w(hidden, heads * head, times))


def mla(
    hidden: int, heads: int, q_rank: int, kv_rank: int, nope: int, rope: int, value: int, times: int
) -> tuple[Matrix, ...]:
    """q_a, q_b (or q), kv_a, kv_b and o projection."""
    query = (
        (w(q_rank, hidden, times), w(heads * (nope + rope), q_rank, times))
        if q_rank
        else (w(heads * (nope + rope), hidden, times),)
    )
    return (
        *query,
        w(kv_rank + rope, hidden, times),
        w(heads * (nope + value), kv_rank, times),
        w(hidden, heads * value, times),
    )


@dataclass(frozen=True)
class Expected:
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    shared: int
    params: dict[str, int]
    """Logical parameters by role, MTP and towers among them."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes by role, where they are not two for each parameter."""
    kv_token: int | None = None
    """Bytes a token, full-attention layers; None: no figure can be exact."""
    kv_fixed: int = 0
    """Bytes a sequence in windows and chunks, all full."""
    kv_state: int = 0
    context: int = 0
    """max_position_embeddings of the config; 0: not in it."""
    kv_dtype: str = "bfloat16"
    width: int = 2
    stored: int | None = None
    """Elements as they are stored, scales counted; None: as many as parameters."""

    def bytes_of(self, role: str) -> int:
        return self.bytes.get(role, self.width * self.params.get(role, 0))

    @property
    def total(self) -> int:
        return sum(self.params.values()) - self.params.get("mtp", 0)

    @property
    def routed(self) -> int:
        return self.params.get("routed_expert", 0)

    @property
    def active(self) -> int:
        routed = self.routed * self.top_k // self.experts if self.experts else 0
        return self.total - self.params.get("vision", 0) - self.routed + routed

    @property
    def active_without_embeddings(self) -> int:
        return self.active - self.params.get("embedding", 0) - self.params.get("lm_head", 0)

    @property
    def active_without_input(self) -> int:
        return self.active - self.params["embedding"]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_of(role) for role in ROLES)

    @property
    def per_expert(self) -> int:
        return self.bytes_of("routed_expert") // (self.moe_layers * self.experts) if self.experts else 0


# --- the models -------------------------------------------------------------------------------------------------


def minimax_m2() -> Expected:
    # 62 layers, hidden 3072, 48 heads, 8 kv heads of 128, 256 experts of 1536, top-8; vocabulary 200,064.
    # FP8 for attention and experts. The config sets use_mtp, the checkpoint ships no MTP modules (assumption).
    # Router weight and its bias in fp32 (assumption). qk norm "per_layer": one weight over all heads.
    attention = gqa(3072, 48, 8, 128, times=62)
    routed = glu(3072, 1536, times=62 * 256)
    router = 62 * (256 * 3072 + 256)
    norm = 62 * (2 * 3072 + 48 * 128 + 8 * 128) + 3072
    table = 200_064 * 3072
    scales = (fp8(*attention, *routed) - params(*attention, *routed)) // 4
    total = 2 * table + params(*attention, *routed) + router + norm
    return Expected(
        layers=62,
        moe_layers=62,
        experts=256,
        top_k=8,
        shared=0,
        params={
            "embedding": table,
            "attention": params(*attention),
            "norm": norm,
            "router": router,
            "routed_expert": params(*routed),  # 62*256*3*3072*1536
            "lm_head": table,
        },
        bytes={"attention": fp8(*attention), "routed_expert": fp8(*routed), "router": 4 * router},
        kv_token=62 * 2 * 8 * 128 * 2,
        context=196_608,  # no dtype in the config: bf16 of the unquantised weights
        stored=total + scales,
    )


def qwen3_30b(*, quantised: bool = False) -> Expected:
    # 48 layers, hidden 2048, 32 heads, 4 kv heads of 128, 128 experts of 768, top-8; vocabulary 151,936.
    attention = gqa(2048, 32, 4, 128, times=48)
    routed = glu(2048, 768, times=48 * 128)
    parts = {
        "embedding": 151_936 * 2048,
        "attention": params(*attention),
        "norm": 48 * (2 * 2048 + 2 * 128) + 2048,
        "router": 48 * 128 * 2048,
        "routed_expert": params(*routed),  # 48*128*3*2048*768
        "lm_head": 151_936 * 2048,
    }
    scales = (fp8(*attention, *routed) - params(*attention, *routed)) // 4
    return Expected(
        layers=48,
        moe_layers=48,
        experts=128,
        top_k=8,
        shared=0,
        params=parts,
        bytes={"attention": fp8(*attention), "routed_expert": fp8(*routed)} if quantised else {},
        kv_token=48 * 2 * 4 * 128 * 2,  # FP8 weights do not make the cache FP8
        context=40_960,
        stored=sum(parts.values()) + scales if quantised else None,
    )


def qwen3_8b() -> Expected:
    # 36 layers, hidden 4096, 32 heads, 8 kv heads of 128, MLP 12288; no experts.
    return Expected(
        layers=36,
        moe_layers=0,
        experts=0,
        top_k=0,
        shared=0,
        params={
            "embedding": 151_936 * 4096,
            "attention": params(*gqa(4096, 32, 8, 128, times=36)),
            "dense_mlp": 36 * 3 * 4096 * 12_288,
            "norm": 36 * (2 * 4096 + 2 * 128) + 4096,
            "lm_head": 151_936 * 4096,
        },
        kv_token=36 * 2 * 8 * 128 * 2,
        context=40_960,
    )


def qwen_tower(mergers_after: int) -> int:
    """27 blocks of width 1152 and MLP 4304, patches of 2x16x16x3, 2,304 positions, mergers of 4x1152 to 2048."""
    width, inner, merged = 1152, 4304, 4 * 1152
    block = 4 * width + (3 * width * width + 3 * width) + (width * width + width) + (2 * width * inner + inner + width)
    merger = merged * merged + merged + 2048 * merged + 2048
    first = width * 3 * 2 * 16 * 16 + width + 2304 * width
    return first + 27 * block + (2 * width + merger) + mergers_after * (2 * merged + merger)


def qwen3_vl() -> Expected:
    # The text part of Qwen3-30B-A3B with its experts fused and transposed, and the tower with three deepstack mergers.
    text = qwen3_30b()
    return Expected(
        layers=48,
        moe_layers=48,
        experts=128,
        top_k=8,
        shared=0,
        params={**text.params, "vision": qwen_tower(3)},
        kv_token=98_304,
        context=262_144,
    )


def qwen3_5() -> Expected:
    # 40 layers, every 4th full attention (10), else gated delta (30); hidden 2048; 256 experts of 512, top-8;
    # a shared expert of 512 with its gate; 16 heads, 2 kv heads of 256, query projection doubled by the output gate.
    # Gated delta: 16 key and 32 value heads of 128, so 8,192 channels through a convolution of 4.
    gated = params(w(8192, 2048), w(2048, 512, 2), w(2048, 4096))
    delta = params(w(8192, 2048), w(4096, 2048), w(32, 2048, 2), w(2048, 4096)) + 8192 * 4 + 32 + 32
    norm = 40 * 2 * 2048 + 10 * 2 * 256 + 30 * 128 + 2048
    layer_moe = 256 * 3 * 2048 * 512
    shared = 3 * 2048 * 512 + 2048
    # MTP: one layer with attention and its own experts, a 4096 -> 2048 projection and three norms.
    mtp = 2 * 2048 * 2048 + 3 * 2048 + 2 * 2048 + gated + 2 * 256 + 256 * 2048 + layer_moe + shared
    return Expected(
        layers=40,
        moe_layers=40,
        experts=256,
        top_k=8,
        shared=1,
        params={
            "embedding": 248_320 * 2048,
            "attention": 10 * gated + 30 * delta,
            "norm": norm,
            "router": 40 * 256 * 2048,
            "shared_expert": 40 * shared,
            "routed_expert": 40 * layer_moe,
            "mtp": mtp,
            "vision": qwen_tower(0),
            "lm_head": 248_320 * 2048,
        },
        # A_log (32 a layer) and the norm of the gated output (128 a layer) are fp32 (assumption).
        bytes={"attention": 2 * (10 * gated + 30 * delta) + 30 * 2 * 32, "norm": 2 * norm + 30 * 2 * 128},
        kv_token=10 * 2 * 2 * 256 * 2,
        # Recurrent state in fp32 (mamba_ssm_dtype), three columns of the convolution in bf16.
        kv_state=30 * (32 * 128 * 128 * 4 + (2 * 16 * 128 + 32 * 128) * 3 * 2),
        context=262_144,
    )


def mimo_v2_flash() -> Expected:
    # 48 layers: 9 full (4 kv heads), 39 sliding over 128 tokens (8 kv heads); 64 query heads; keys of 192, values of
    # 128; layer 0 dense with 16,384, else 256 experts of 2,048, top-8. q, k, v, experts and dense MLP in FP8,
    # o_proj in BF16 (assumption). 64 sink biases in each sliding layer.
    hidden = 4096
    qkv_full = (w(64 * 192, hidden), w(4 * 192, hidden), w(4 * 128, hidden))
    qkv_swa = (w(64 * 192, hidden), w(8 * 192, hidden), w(8 * 128, hidden))
    out = hidden * 64 * 128
    dense, routed = glu(hidden, 16_384), glu(hidden, 2048, times=47 * 256)
    attention = 9 * (params(*qkv_full) + out) + 39 * (params(*qkv_swa) + out + 64)
    attention_bytes = 9 * (fp8(*qkv_full) + 2 * out) + 39 * (fp8(*qkv_swa) + 2 * (out + 64))
    router, router_bias = 47 * 256 * hidden, 47 * 256
    # Three MTP layers: sliding attention, dense MLP, a projection of both inputs, five norms (assumption).
    mtp = params(*qkv_swa, *dense) + out + 64 + 2 * hidden * hidden + 5 * hidden
    mtp_bytes = fp8(*qkv_swa, *dense) + 2 * (out + 64 + 2 * hidden * hidden + 5 * hidden)
    table = 152_576 * hidden
    parts = {
        "embedding": table,
        "attention": attention,
        "dense_mlp": params(*dense),
        "norm": 48 * 2 * hidden + hidden,
        "router": router + router_bias,
        "routed_expert": params(*routed),
        "mtp": 3 * mtp,
        "lm_head": table,
    }
    blocks = sum(
        (fp8(*m) - params(*m)) * n // 4 for m, n in ((qkv_full, 9), (qkv_swa, 39 + 3), (dense, 1 + 3), (routed, 1))
    )
    return Expected(
        layers=48,
        moe_layers=47,
        experts=256,
        top_k=8,
        shared=0,
        params=parts,
        bytes={
            "attention": attention_bytes,
            "dense_mlp": fp8(*dense),
            "router": 2 * router + 4 * router_bias,
            "routed_expert": fp8(*routed),
            "mtp": 3 * mtp_bytes,
        },
        kv_token=9 * 4 * (192 + 128) * 2,
        kv_fixed=39 * 8 * (192 + 128) * 2 * 128,
        context=262_144,
        stored=sum(parts.values()) + blocks,
    )


def jamba() -> Expected:
    # 32 layers: attention where i % 8 == 4 (4 of them), else Mamba-1 (28) of 8,192 channels, state 16, dt rank 256,
    # convolution 4; 16 experts of 14,336, top-2, in every second layer (16), a dense MLP in the others.
    mamba = (
        8192 * 16  # A_log
        + 8192  # D
        + 8192 * 4
        + 8192  # convolution and bias
        + 2 * 8192 * 4096  # in
        + (256 + 2 * 16) * 8192  # x
        + 8192 * 256
        + 8192  # dt and bias
        + 4096 * 8192  # out
    )
    return Expected(
        layers=32,
        moe_layers=16,
        experts=16,
        top_k=2,
        shared=0,
        params={
            "embedding": 65_536 * 4096,
            "attention": params(*gqa(4096, 32, 8, 128, times=4)) + 28 * mamba,
            "dense_mlp": 16 * 3 * 4096 * 14_336,
            "norm": 32 * 2 * 4096 + 28 * (256 + 16 + 16) + 4096,
            "router": 16 * 16 * 4096,
            "routed_expert": 16 * 16 * 3 * 4096 * 14_336,
            "lm_head": 65_536 * 4096,
        },
        kv_token=4 * 2 * 8 * 128 * 2,
        kv_state=28 * (8192 * 16 * 2 + 8192 * 3 * 2),
        context=262_144,
    )


def olmoe() -> Expected:
    # 16 layers, hidden 2048, 16 heads of 128 (all kv heads), q and k norms over all heads, 64 experts of 1024, top-8.
    return Expected(
        layers=16,
        moe_layers=16,
        experts=64,
        top_k=8,
        shared=0,
        params={
            "embedding": 50_304 * 2048,
            "attention": 16 * 4 * 2048 * 2048,
            "norm": 16 * 4 * 2048 + 2048,
            "router": 16 * 64 * 2048,
            "routed_expert": 16 * 64 * 3 * 2048 * 1024,
            "lm_head": 50_304 * 2048,
        },
        kv_token=16 * 2 * 16 * 128 * 2,
        context=4096,
    )


def dbrx() -> Expected:
    # 40 blocks, d_model 6144, 48 heads of 128, 8 kv heads, 16 experts of 10,752 in 2-D matrices, top-4.
    return Expected(
        layers=40,
        moe_layers=40,
        experts=16,
        top_k=4,
        shared=0,
        params={
            "embedding": 100_352 * 6144,
            "attention": 40 * ((6144 + 2 * 8 * 128) * 6144 + 6144 * 6144),
            "norm": 40 * 2 * 6144 + 6144,
            "router": 40 * 16 * 6144,
            "routed_expert": 40 * 16 * 3 * 6144 * 10_752,
            "lm_head": 100_352 * 6144,
        },
        kv_token=40 * 2 * 8 * 128 * 2,
        context=32_768,
    )


def deepseek_v2_lite() -> Expected:
    # 27 layers, hidden 2048, 16 heads, MLA with kv rank 512, rope 64, nope 128, v 128, no q rank; layer 0 dense with
    # 10,944; else 64 experts of 1408, top-6, and 2 shared ones.
    return Expected(
        layers=27,
        moe_layers=26,
        experts=64,
        top_k=6,
        shared=2,
        params={
            "embedding": 102_400 * 2048,
            "attention": params(*mla(2048, 16, 0, 512, 128, 64, 128, times=27)),
            "dense_mlp": 3 * 2048 * 10_944,
            "norm": 27 * (2 * 2048 + 512) + 2048,
            "router": 26 * 64 * 2048,
            "shared_expert": 26 * 3 * 2048 * 2 * 1408,
            "routed_expert": 26 * 64 * 3 * 2048 * 1408,
            "lm_head": 102_400 * 2048,
        },
        kv_token=27 * (512 + 64) * 2,
        context=163_840,
    )


def deepseek_v3(*, indexer: bool = False) -> Expected:
    # 61 layers, hidden 7168, 128 heads, MLA with q rank 1536, kv rank 512, rope 64, nope 128, v 128; 3 dense layers
    # of 18,432; 58 MoE layers of 256 experts of 2048, top-8, one shared expert; router bias in fp32.
    # All projections in FP8 blocks. MTP: a 62nd layer with experts, own embedding and head, eh_proj in BF16, 3 norms.
    # V3.2 adds to each layer an indexer: 64 heads of 128 from the q rank, one key, a norm with bias in fp32 and the
    # head weights in BF16 (dtypes are an assumption).
    hidden = 7168
    one_attention = mla(hidden, 128, 1536, 512, 128, 64, 128, times=1)
    index_plain = index_norm = 0
    if indexer:
        one_attention = (*one_attention, w(64 * 128, 1536), w(128, hidden))
        index_plain, index_norm = 64 * hidden, 2 * 128
    dense = glu(hidden, 18_432, times=3)
    one_shared, one_routed = glu(hidden, 2048), glu(hidden, 2048, times=256)
    one_norm = 2 * hidden + 1536 + 512
    router, bias = 256 * hidden, 256
    table = 129_280 * hidden
    mtp_plain = 2 * table + 2 * hidden * hidden + 3 * hidden + one_norm + router + index_plain
    mtp_packed = (*one_attention, *one_shared, *one_routed)
    parts = {
        "embedding": table,
        "attention": 61 * (params(*one_attention) + index_plain),
        "dense_mlp": params(*dense),
        "norm": 61 * (one_norm + index_norm) + hidden,
        "router": 58 * (router + bias),
        "shared_expert": 58 * params(*one_shared),
        "routed_expert": 58 * params(*one_routed),  # 58*256*3*7168*2048
        "mtp": params(*mtp_packed) + mtp_plain + index_norm + bias,
        "lm_head": table,
    }
    scale_bytes = (
        62 * (fp8(*one_attention) - params(*one_attention))
        + (fp8(*dense) - params(*dense))
        + 59 * (fp8(*one_shared, *one_routed) - params(*one_shared, *one_routed))
    )
    return Expected(
        layers=61,
        moe_layers=58,
        experts=256,
        top_k=8,
        shared=1,
        params=parts,
        bytes={
            "attention": 61 * (fp8(*one_attention) + 2 * index_plain),
            "dense_mlp": fp8(*dense),
            "norm": 2 * (61 * one_norm + hidden) + 4 * 61 * index_norm,
            "router": 58 * (2 * router + 4 * bias),
            "shared_expert": 58 * fp8(*one_shared),
            "routed_expert": 58 * fp8(*one_routed),
            "mtp": fp8(*mtp_packed) + 2 * mtp_plain + 4 * (index_norm + bias),
        },
        # The indexer keeps one fp8 key of 128 and an fp32 scale a token and layer.
        kv_token=61 * ((512 + 64) * 2 + (132 if indexer else 0)),
        context=163_840,
        stored=sum(parts.values()) + scale_bytes // 4,
    )


def deepseek_moe_16b() -> Expected:
    # 28 layers, hidden 2048, 16 heads of 128, layer 0 dense with 10,944, else 64 experts of 1408, top-6, 2 shared.
    return Expected(
        layers=28,
        moe_layers=27,
        experts=64,
        top_k=6,
        shared=2,
        params={
            "embedding": 102_400 * 2048,
            "attention": 28 * 4 * 2048 * 2048,
            "dense_mlp": 3 * 2048 * 10_944,
            "norm": 28 * 2 * 2048 + 2048,
            "router": 27 * 64 * 2048,
            "shared_expert": 27 * 3 * 2048 * 2 * 1408,
            "routed_expert": 27 * 64 * 3 * 2048 * 1408,
            "lm_head": 102_400 * 2048,
        },
        kv_token=28 * 2 * 16 * 128 * 2,
        context=4096,
    )


def gemma4() -> Expected:
    # 30 layers: 25 sliding over 1,024 (8 kv heads of 256), 5 full (2 kv heads of 512, keys are the values, so no v
    # projection); 16 heads; hidden 2816; in every layer a dense MLP of 2112 beside 128 experts of 704, top-8; the
    # router is a projection, a scale of the hidden size and one scale for each expert; a scalar for each layer.
    sliding = params(w(16 * 256, 2816), w(8 * 256, 2816, 2), w(2816, 16 * 256))
    full = params(w(16 * 512, 2816), w(2 * 512, 2816), w(2816, 16 * 512))
    # Tower: 27 layers of width 1152 and MLP 4304, 16 heads of 72, patches of 16x16x3, 2 x 10,240 positions.
    block = 4 * 1152 + 4 * 1152 * 1152 + 2 * 72 + 3 * 1152 * 4304
    tower = 1152 * 768 + 2 * 10_240 * 1152 + 27 * block + 2 * 1152 + 2816 * 1152
    return Expected(
        layers=30,
        moe_layers=30,
        experts=128,
        top_k=8,
        shared=0,
        params={
            "embedding": 262_144 * 2816,  # tied: it is the head, too
            "attention": 25 * sliding + 5 * full,
            "dense_mlp": 30 * 3 * 2816 * 2112,
            "norm": 30 * 7 * 2816 + 25 * 2 * 256 + 5 * 2 * 512 + 2816,
            "router": 30 * (128 * 2816 + 2816 + 128),
            "routed_expert": 30 * 128 * 3 * 2816 * 704,
            "vision": tower,
            "other": 30,
        },
        kv_token=5 * 2 * 2 * 512 * 2,
        kv_fixed=25 * 2 * 8 * 256 * 2 * 1024,
        context=262_144,
    )


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


def granite() -> Expected:
    # 24 layers, hidden 1024, 16 heads, 8 kv heads of 64, 32 experts of 512 in fused matrices, top-8, tied.
    return Expected(
        layers=24,
        moe_layers=24,
        experts=32,
        top_k=8,
        shared=0,
        params={
            "embedding": 49_152 * 1024,
            "attention": params(*gqa(1024, 16, 8, 64, times=24)),
            "norm": 24 * 2 * 1024 + 1024,
            "router": 24 * 32 * 1024,
            "routed_expert": 24 * 32 * 3 * 1024 * 512,
        },
        kv_token=24 * 2 * 8 * 64 * 2,
        context=0,  # this copy of the config has neither context length nor dtype
    )


def ling_lite() -> Expected:
    # 28 layers, hidden 2048, 16 heads, 4 kv heads of 128 in one matrix, 64 experts of 1408, top-6, 2 shared.
    return Expected(
        layers=28,
        moe_layers=28,
        experts=64,
        top_k=6,
        shared=2,
        params={
            "embedding": 126_464 * 2048,
            "attention": 28 * ((16 + 2 * 4) * 128 * 2048 + 2048 * 2048),
            "norm": 28 * 2 * 2048 + 2048,
            "router": 28 * 64 * 2048,
            "shared_expert": 28 * 3 * 2048 * 2 * 1408,
            "routed_expert": 28 * 64 * 3 * 2048 * 1408,
            "lm_head": 126_464 * 2048,
        },
        kv_token=28 * 2 * 4 * 128 * 2,
        context=16_384,
    )


def llama_3_1_8b() -> Expected:
    # 32 layers, hidden 4096, 32 heads, 8 kv heads of 128, MLP 14,336; no experts.
    return Expected(
        layers=32,
        moe_layers=0,
        experts=0,
        top_k=0,
        shared=0,
        params={
            "embedding": 128_256 * 4096,
            "attention": params(*gqa(4096, 32, 8, 128, times=32)),
            "dense_mlp": 32 * 3 * 4096 * 14_336,
            "norm": 32 * 2 * 4096 + 4096,
            "lm_head": 128_256 * 4096,
        },
        kv_token=32 * 2 * 8 * 128 * 2,
        context=131_072,
    )


def llama4_scout() -> Expected:
    # 48 layers, hidden 5120, 40 heads, 8 kv heads of 128, 16 experts of 8192, top-1, one shared; every 4th layer has
    # full attention (12), the others chunks of 8,192 tokens (36).
    # Tower (published sizes): 34 layers of width 1408 and MLP 5632 with biases, patches of 14x14x3, 577 positions,
    # an adapter 5632 -> 4096 -> 4096 and a projection 4096 -> 5120.
    block = 4 * 1408 + 4 * (1408 * 1408 + 1408) + 2 * 1408 * 5632 + 5632 + 1408
    tower = 1408 + 577 * 1408 + 1408 * 588 + 4 * 1408 + 34 * block + 4096 * 5632 + 4096 * 4096 + 5120 * 4096
    return Expected(
        layers=48,
        moe_layers=48,
        experts=16,
        top_k=1,
        shared=1,
        params={
            "embedding": 202_048 * 5120,
            "attention": params(*gqa(5120, 40, 8, 128, times=48)),
            "norm": 48 * 2 * 5120 + 5120,
            "router": 48 * 16 * 5120,
            "shared_expert": 48 * 3 * 5120 * 8192,
            "routed_expert": 48 * 16 * 3 * 5120 * 8192,
            "vision": tower,
            "lm_head": 202_048 * 5120,
        },
        kv_token=12 * 2 * 8 * 128 * 2,
        kv_fixed=36 * 2 * 8 * 128 * 2 * 8192,
        context=10_485_760,
    )


def phi_3_5_moe() -> Expected:
    # 32 layers, hidden 4096, 32 heads, 8 kv heads of 128, biases on q, k, v, o, on the norms and on the head;
    # 16 experts of 6400, top-2. The window is as long as the context: every layer holds 131,072 tokens.
    biases = 2 * 4096 + 2 * 8 * 128
    return Expected(
        layers=32,
        moe_layers=32,
        experts=16,
        top_k=2,
        shared=0,
        params={
            "embedding": 32_064 * 4096,
            "attention": params(*gqa(4096, 32, 8, 128, times=32)) + 32 * biases,
            "norm": 32 * 4 * 4096 + 2 * 4096,
            "router": 32 * 16 * 4096,
            "routed_expert": 32 * 16 * 3 * 4096 * 6400,
            "lm_head": 32_064 * 4096 + 32_064,
        },
        kv_token=32 * 2 * 8 * 128 * 2,
        context=131_072,
    )


def phi_3_mini() -> Expected:
    # 32 layers, hidden 3072, 32 heads of 96, q, k, v in one matrix, gate and up in one; sliding over 2,047 tokens.
    return Expected(
        layers=32,
        moe_layers=0,
        experts=0,
        top_k=0,
        shared=0,
        params={
            "embedding": 32_064 * 3072,
            "attention": 32 * 4 * 3072 * 3072,
            "dense_mlp": 32 * 3 * 3072 * 8192,
            "norm": 32 * 2 * 3072 + 3072,
            "lm_head": 32_064 * 3072,
        },
        kv_token=0,
        kv_fixed=32 * 2 * 32 * 96 * 2 * 2047,
        context=4096,
    )


def mixtral() -> Expected:
    # 32 layers, hidden 4096, 32 heads, 8 kv heads of 128, 8 experts of 14,336, top-2.
    return Expected(
        layers=32,
        moe_layers=32,
        experts=8,
        top_k=2,
        shared=0,
        params={
            "embedding": 32_000 * 4096,
            "attention": params(*gqa(4096, 32, 8, 128, times=32)),
            "norm": 32 * 2 * 4096 + 4096,
            "router": 32 * 8 * 4096,
            "routed_expert": 32 * 8 * 3 * 4096 * 14_336,
            "lm_head": 32_000 * 4096,
        },
        kv_token=32 * 2 * 8 * 128 * 2,
        context=32_768,
    )


def kimi_k2() -> Expected:
    # DeepSeek-V3's layers with 64 heads, 384 experts, one dense layer, vocabulary 163,840 and no MTP.
    hidden = 7168
    attention = mla(hidden, 64, 1536, 512, 128, 64, 128, times=61)
    dense, shared, routed = glu(hidden, 18_432), glu(hidden, 2048, times=60), glu(hidden, 2048, times=60 * 384)
    parts = {
        "embedding": 163_840 * hidden,
        "attention": params(*attention),
        "dense_mlp": params(*dense),
        "norm": 61 * (2 * hidden + 1536 + 512) + hidden,
        "router": 60 * (384 * hidden + 384),
        "shared_expert": params(*shared),
        "routed_expert": params(*routed),
        "lm_head": 163_840 * hidden,
    }
    packed = (*attention, *dense, *shared, *routed)
    return Expected(
        layers=61,
        moe_layers=60,
        experts=384,
        top_k=8,
        shared=1,
        params=parts,
        bytes={
            "attention": fp8(*attention),
            "dense_mlp": fp8(*dense),
            "router": 60 * (384 * hidden * 2 + 384 * 4),
            "shared_expert": fp8(*shared),
            "routed_expert": fp8(*routed),
        },
        kv_token=61 * (512 + 64) * 2,
        context=131_072,
        stored=sum(parts.values()) + (fp8(*packed) - params(*packed)) // 4,
    )


def deepseek_nvfp4() -> Expected:
    # DeepSeek-V3's shapes. NVFP4: experts, shared experts, dense MLP and o_proj; excluded and so in BF16: the other
    # four attention projections, the head and (assumption: whole, in BF16) layer 61, the MTP layer.
    hidden = 7168
    v3 = deepseek_v3()
    kept = params(*mla(hidden, 128, 1536, 512, 128, 64, 128, times=61)) - 61 * hidden * 128 * 128
    out = w(hidden, 128 * 128, times=61)
    dense, shared = glu(hidden, 18_432, times=3), glu(hidden, 2048, times=58)
    routed = glu(hidden, 2048, times=58 * 256)
    packed = (out, *dense, *shared, *routed)
    matrices = sum(matrix.times for matrix in packed)
    plain = sum(v3.params.values()) - params(*packed)
    return Expected(
        layers=61,
        moe_layers=58,
        experts=256,
        top_k=8,
        shared=1,
        params=v3.params,  # logical parameters do not change with the packing
        bytes={
            "attention": 2 * kept + out.nvfp4,
            "dense_mlp": nvfp4(*dense),
            "router": v3.bytes["router"],
            "shared_expert": nvfp4(*shared),
            "routed_expert": nvfp4(*routed),
            "mtp": 2 * (v3.params["mtp"] - 256) + 4 * 256,
        },
        kv_token=61 * (512 + 64) * 1,  # kv_cache_quant_algo: FP8
        context=163_840,
        kv_dtype="fp8",
        stored=plain + params(*packed) // 2 + params(*packed) // 16 + 2 * matrices,
    )


def nemotron_3_nano() -> Expected:
    # 52 layers: 23 Mamba-2, 6 attention, 23 MoE; hidden 2688. Mamba-2: 64 heads of 64, 8 groups, state 128,
    # convolution 4 with bias over 4096 + 2*8*128 = 6144 channels. Attention: 32 heads, 2 kv heads of 128.
    # MoE: 128 experts of 1856 without a gate projection, top-6, one shared expert of 3712; router in fp32 (assumption).
    hidden = 2688
    mamba = (4096 + 6144 + 64) * hidden + 6144 * 4 + 6144 + 3 * 64 + hidden * 4096
    router = 23 * (128 * hidden + 128)
    return Expected(
        layers=52,
        moe_layers=23,
        experts=128,
        top_k=6,
        shared=1,
        params={
            "embedding": 131_072 * hidden,
            "attention": 23 * mamba + params(*gqa(hidden, 32, 2, 128, times=6)),
            "norm": 52 * hidden + 23 * 4096 + hidden,
            "router": router,
            "shared_expert": 23 * 2 * hidden * 3712,
            "routed_expert": 23 * 128 * 2 * hidden * 1856,
            "lm_head": 131_072 * hidden,
        },
        bytes={"router": 4 * router},
        kv_token=6 * 2 * 2 * 128 * 2,
        # State in fp32 (mamba_ssm_cache_dtype), three columns of the convolution in bf16.
        kv_state=23 * (64 * 64 * 128 * 4 + (4096 + 2 * 8 * 128) * 3 * 2),
        context=262_144,
    )


def gpt_oss(layers: int = 24, experts: int = 32) -> Expected:
    # Hidden 2880, 64 heads, 8 kv heads of 64, biases on all four projections, 64 sinks; experts of 2880, top-4, with
    # biases, in MXFP4: half a byte each, a scale byte for 32. Every second layer slides over 128 tokens.
    hidden = 2880
    attention = layers * (params(*gqa(hidden, 64, 8, 64)) + 4096 + 2 * 512 + hidden + 64)
    blocks = layers * experts * 3 * hidden * hidden
    biases = layers * experts * 3 * hidden
    parts = {
        "embedding": 201_088 * hidden,
        "attention": attention,
        "norm": layers * 2 * hidden + hidden,
        "router": layers * (experts * hidden + experts),
        "routed_expert": blocks + biases,
        "lm_head": 201_088 * hidden,
    }
    return Expected(
        layers=layers,
        moe_layers=layers,
        experts=experts,
        top_k=4,
        shared=0,
        params=parts,
        bytes={"routed_expert": blocks // 2 + blocks // 32 + 2 * biases},
        kv_token=layers // 2 * 2 * 8 * 64 * 2,
        kv_fixed=layers // 2 * 2 * 8 * 64 * 2 * 128,
        context=131_072,  # no dtype in the config: bf16 of the unquantised weights
        stored=sum(parts.values()) - blocks + blocks // 2 + blocks // 32,
    )


def step_3_7_flash() -> Expected:
    # 45 layers: every 4th full (12), the others (33) slide over 512 tokens; hidden 4096; 8 kv heads of 128; 64 query
    # heads in full layers and 96 in sliding ones (published; the config here leaves it out), a gate for each head.
    # 3 dense layers of 11,264; 42 MoE layers with 288 experts of 1280, top-8, and a shared expert of 1280.
    hidden = 4096

    def attention(heads: int) -> int:
        return params(*gqa(hidden, heads, 8, 128)) + heads * hidden

    norm = 2 * hidden + 2 * 128
    router, bias = 42 * 288 * hidden, 42 * 288
    table = 128_896 * hidden
    dense = 3 * hidden * 11_264
    # Three MTP layers: sliding attention, dense MLP, projection of both inputs, own head, three norms.
    mtp = 3 * (attention(96) + dense + norm + 2 * hidden * hidden + table + 3 * hidden)
    # Tower: 47 blocks of width 1536 and MLP 8960 with biases and two layer scales; two 3x3 downsamplers; projector.
    width, inner = 1536, 8960
    block = 4 * width * width + 4 * width + 4 * width + 2 * width + 2 * width * inner + inner + width
    tower = (
        width * 3 * 14 * 14
        + 2704 * width
        + 2 * width
        + 47 * block
        + (2 * width * width * 9 + 2 * width)
        + (4 * width * 2 * width * 9 + 4 * width)
        + hidden * 4 * width
    )
    return Expected(
        layers=45,
        moe_layers=42,
        experts=288,
        top_k=8,
        shared=1,
        params={
            "embedding": table,
            "attention": 12 * attention(64) + 33 * attention(96),
            "dense_mlp": 3 * dense,
            "norm": 45 * norm + hidden,
            "router": router + bias,
            "shared_expert": 42 * 3 * hidden * 1280,
            "routed_expert": 42 * 288 * 3 * hidden * 1280,
            "mtp": mtp,
            "vision": tower,
            "lm_head": table,
        },
        bytes={"router": 2 * router + 4 * bias},  # the bias in fp32 (assumption)
        kv_token=12 * 2 * 8 * 128 * 2,
        kv_fixed=33 * 2 * 8 * 128 * 2 * 512,
        context=65_536,
    )


def hunyuan_a13b() -> Expected:
    # 32 layers, hidden 4096, 32 heads, 8 kv heads of 128 (attention_head_dim), 64 experts of 3072, top-8, one shared;
    # sizes, top-k and shared count are lists in the config; kv_lora_rank is null, use_cla is off; tied.
    return Expected(
        layers=32,
        moe_layers=32,
        experts=64,
        top_k=8,
        shared=1,
        params={
            "embedding": 128_167 * 4096,
            "attention": params(*gqa(4096, 32, 8, 128, times=32)),
            "norm": 32 * (2 * 4096 + 2 * 128) + 4096,
            "router": 32 * 64 * 4096,
            "shared_expert": 32 * 3 * 4096 * 3072,
            "routed_expert": 32 * 64 * 3 * 4096 * 3072,
        },
        kv_token=32 * 2 * 8 * 128 * 2,
        context=32_768,
    )


def glm_5() -> Expected:
    # 78 layers, hidden 6144, 64 heads, MLA with q rank 2048, kv rank 512, rope 64, nope 192, v 256; an indexer of 32
    # heads of 128 in each layer; 3 dense layers of 12,288; 75 MoE layers of 256 experts of 2048, top-8, one shared.
    # MTP: a 79th layer with experts and eh_proj, without own embedding and head (assumption). All BF16.
    hidden = 6144
    attention = params(*mla(hidden, 64, 2048, 512, 192, 64, 256, times=1))
    indexer = params(w(32 * 128, 2048), w(128, hidden), w(32, hidden))
    norm = 2 * hidden + 2048 + 512 + 2 * 128
    layer_moe, shared = 256 * 3 * hidden * 2048, 3 * hidden * 2048
    router, bias = 256 * hidden, 256
    mtp = attention + indexer + norm + layer_moe + shared + router + bias + 2 * hidden * hidden + 3 * hidden
    return Expected(
        layers=78,
        moe_layers=75,
        experts=256,
        top_k=8,
        shared=1,
        params={
            "embedding": 154_880 * hidden,
            "attention": 78 * (attention + indexer),
            "dense_mlp": 3 * 3 * hidden * 12_288,
            "norm": 78 * norm + hidden,
            "router": 75 * (router + bias),
            "shared_expert": 75 * shared,
            "routed_expert": 75 * layer_moe,
            "mtp": mtp,
            "lm_head": 154_880 * hidden,
        },
        bytes={"router": 75 * (2 * router + 4 * bias), "mtp": 2 * mtp + 2 * bias},
        kv_token=78 * ((512 + 64) * 2 + 132),
        context=202_752,
    )


EXPECTED: dict[str, Callable[[], Expected]] = {
    "MiniMaxAI/MiniMax-M2.5": minimax_m2,
    "Qwen/Qwen3-30B-A3B": qwen3_30b,
    "Qwen/Qwen3-30B-A3B-FP8": lambda: qwen3_30b(quantised=True),
    "Qwen/Qwen3-8B": qwen3_8b,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": qwen3_vl,
    "Qwen/Qwen3.5-35B-A3B": qwen3_5,
    "XiaomiMiMo/MiMo-V2-Flash": mimo_v2_flash,
    "ai21labs/AI21-Jamba-Mini-1.6": jamba,
    "allenai/OLMoE-1B-7B-0924": olmoe,
    "databricks/dbrx-instruct": dbrx,
    "deepseek-ai/DeepSeek-V2-Lite": deepseek_v2_lite,
    "deepseek-ai/DeepSeek-V3": deepseek_v3,
    "deepseek-ai/DeepSeek-V3.2": lambda: deepseek_v3(indexer=True),
    "deepseek-ai/deepseek-moe-16b-base": deepseek_moe_16b,
    "google/gemma-4-26B-A4B": gemma4,
    "google/switch-base-128": switch_base_128,
    "ibm-granite/granite-3.1-1b-a400m-base": granite,
    "inclusionAI/Ling-lite-base": ling_lite,
    "meta-llama/Llama-3.1-8B": llama_3_1_8b,
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": llama4_scout,
    "microsoft/Phi-3.5-MoE-instruct": phi_3_5_moe,
    "microsoft/phi-3-mini-4k-instruct": phi_3_mini,
    "mistralai/Mixtral-8x7B-v0.1": mixtral,
    "moonshotai/Kimi-K2-Instruct": kimi_k2,
    "nvidia/DeepSeek-V3.1-NVFP4": deepseek_nvfp4,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": nemotron_3_nano,
    "openai/gpt-oss-20b": gpt_oss,
    "stepfun-ai/Step-3.7-Flash": step_3_7_flash,
    "tencent/Hunyuan-A13B-Instruct": hunyuan_a13b,
    "zai-org/GLM-5": glm_5,
}

# Every stored config: the model's own, and other public copies of it. All must give the same figures.
CASES = [(name, file) for name in EXPECTED for file in realrepo.config_variants(name)]
# Copies of the config that leave out the context length.
NO_CONTEXT = {
    ("ibm-granite/granite-3.1-1b-a400m-base", "config.json"),
    ("deepseek-ai/DeepSeek-V2-Lite", "config.alt2.json"),
}


def scan(folder: Path, **options: Any) -> Report:
    report: Report = moecore.scan(folder, **options).to_dict()
    return report


def case_id(case: tuple[str, str]) -> str:
    name, file = case
    return name if file == "config.json" else f"{name}:{file}"


@dataclass(frozen=True)
class Case:
    name: str
    file: str
    expected: Expected
    report: Report
    folder: Path


@pytest.fixture(scope="module", params=CASES, ids=[case_id(one) for one in CASES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, file = request.param
    folder = tmp_path_factory.mktemp("repo")
    realrepo.build(name, folder, config=file)
    return Case(name, file, EXPECTED[name](), scan(folder), folder)


def test_every_stored_config_has_a_case() -> None:
    assert set(EXPECTED) == set(realrepo.STORED)


def test_status_and_names(case: Case) -> None:
    report = case.report
    assert report["schema"] == "moecore.scan/1"
    assert report["status"] == "ok", (report["error"], report["warnings"])
    assert report["source"] == "local"
    assert report["unrecognised"] == []


def test_architecture(case: Case) -> None:
    found, expected = case.report["architecture"], case.expected
    assert found["layers"] == expected.layers
    assert found["moe_layers"] == expected.moe_layers
    assert found["num_experts"] == expected.experts
    assert found["experts_per_token"] == expected.top_k
    assert found["shared_experts"] == expected.shared


def test_parameters(case: Case) -> None:
    found, expected = case.report["parameters"], case.expected
    assert found["routed"] == expected.routed
    assert found["shared"] == expected.params.get("shared_expert", 0)
    assert found["mtp"] == expected.params.get("mtp", 0)
    assert found["vision"] == expected.params.get("vision", 0)
    assert found["total"] == expected.total
    assert found["active"] == expected.active
    assert found["active_without_embeddings"] == expected.active_without_embeddings


def test_bytes_by_role(case: Case) -> None:
    found = case.report["bytes"]["by_role"]
    assert found == {role: case.expected.bytes_of(role) for role in ROLES}


def test_headline_bytes(case: Case) -> None:
    found, expected = case.report["bytes"], case.expected
    assert found["total"] == expected.total_bytes
    assert found["routed_experts"] == expected.bytes_of("routed_expert")
    assert found["base"] == expected.total_bytes - expected.bytes_of("routed_expert")
    assert found["per_expert"] == expected.per_expert
    assert sum(found["by_dtype"].values()) == expected.total_bytes


def test_logical_stored_and_bytes_are_three_numbers(case: Case) -> None:
    # Stored elements count every tensor as it lies there, MTP and scales too; logical parameters count neither scales
    # nor packing.
    found, expected = case.report["parameters"], case.expected
    logical = sum(expected.params.values())
    assert found["total"] + found["mtp"] == logical
    assert found["stored_elements"] == (logical if expected.stored is None else expected.stored)


def test_kv_cache_at_the_longest_context(case: Case) -> None:
    found, expected = case.report["kv_cache"], case.expected
    if expected.kv_token is None:
        assert found["status"] != "exact", "cross-attention depends on the encoder's tokens"
        assert found["reason"]
        return
    if (case.name, case.file) in NO_CONTEXT:
        found, context = scan(case.folder, max_model_len=8192)["kv_cache"], 8192
    else:
        context = expected.context
    assert found["status"] == "exact", found["reason"]
    assert found["max_model_len"] == context
    assert found["batch_size"] == 1
    assert found["bytes"] == context * expected.kv_token + expected.kv_fixed + expected.kv_state
    assert found["bytes_upper"] >= found["bytes"]
    assert found["state_bytes"] == expected.kv_state
    if case.name == "microsoft/Phi-3.5-MoE-instruct":
        # The window equals the context, so full and sliding cost the same: both answers to "growth" are right.
        assert found["bytes_per_token"] in (0, expected.kv_token)
    else:
        assert found["bytes_per_token"] == expected.kv_token
    if expected.kv_dtype == "fp8":
        assert re.search("fp8|float8", found["dtype"])
    else:
        assert found["dtype"] == expected.kv_dtype


SHORT = [
    # Inside every window: all attention layers hold all tokens.
    ("openai/gpt-oss-20b", 100, 100 * 24 * 2 * 8 * 64 * 2),
    ("google/gemma-4-26B-A4B", 1000, 1000 * (5 * 2 * 2 * 512 * 2 + 25 * 2 * 8 * 256 * 2)),
    ("XiaomiMiMo/MiMo-V2-Flash", 128, 128 * (9 * 4 * 320 * 2 + 39 * 8 * 320 * 2)),
    ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 4096, 4096 * 48 * 2 * 8 * 128 * 2),
    ("microsoft/phi-3-mini-4k-instruct", 2000, 2000 * 32 * 2 * 32 * 96 * 2),
    # One token beyond the window.
    ("openai/gpt-oss-20b", 129, 12 * 2 * 8 * 64 * 2 * (129 + 128)),
]


@pytest.mark.parametrize(("name", "tokens", "expected"), SHORT)
def test_windows_hold_no_more_than_the_tokens_given(name: str, tokens: int, expected: int, tmp_path: Path) -> None:
    realrepo.build(name, tmp_path)
    assert scan(tmp_path, max_model_len=tokens)["kv_cache"]["bytes"] == expected


@pytest.mark.parametrize("name", ["Qwen/Qwen3.5-35B-A3B", "google/gemma-4-26B-A4B", "deepseek-ai/DeepSeek-V2-Lite"])
def test_batch_multiplies_windows_and_states_too(name: str, tmp_path: Path) -> None:
    realrepo.build(name, tmp_path)
    expected = EXPECTED[name]()
    assert expected.kv_token is not None
    found = scan(tmp_path, max_model_len=10_000, batch_size=7)["kv_cache"]
    assert found["batch_size"] == 7
    assert found["bytes"] == 7 * (10_000 * expected.kv_token + expected.kv_fixed + expected.kv_state)
    assert found["state_bytes"] == 7 * expected.kv_state
    assert found["bytes_per_token"] == expected.kv_token, "for one sequence"


DTYPES = [
    ("deepseek-ai/DeepSeek-V3", "bfloat16", 61 * 576 * 2),
    ("deepseek-ai/DeepSeek-V3", "fp8", 61 * 576),
    ("deepseek-ai/DeepSeek-V3", "fp8_ds_mla", 61 * 656),
    ("deepseek-ai/DeepSeek-V3.2", "fp8_ds_mla", 61 * (656 + 132)),  # the indexer's keys come on top
    ("nvidia/DeepSeek-V3.1-NVFP4", "bfloat16", 61 * 576 * 2),  # the flag wins over hf_quant_config
    ("Qwen/Qwen3-30B-A3B", "fp8_e4m3", 48 * 2 * 4 * 128),
    ("Qwen/Qwen3-30B-A3B", "auto", 98_304),
]


@pytest.mark.parametrize(("name", "dtype", "per_token"), DTYPES)
def test_kv_cache_dtype_flag(name: str, dtype: str, per_token: int, tmp_path: Path) -> None:
    realrepo.build(name, tmp_path)
    found = scan(tmp_path, max_model_len=1000, kv_cache_dtype=dtype)["kv_cache"]
    assert found["bytes_per_token"] == per_token
    assert found["bytes"] == 1000 * per_token


def test_by_dtype_of_fp8_mxfp4_and_nvfp4(tmp_path: Path) -> None:
    v3 = deepseek_v3()
    realrepo.build("deepseek-ai/DeepSeek-V3", tmp_path / "v3")
    found = scan(tmp_path / "v3")["bytes"]["by_dtype"]
    # Everything but embeddings, head, norms, router and the MTP layer's plain parts is FP8; scales and biases fp32.
    plain = 4 * 129_280 * 7168 + 62 * (2 * 7168 + 1536 + 512) + 7168 + 59 * 256 * 7168 + 2 * 7168 * 7168 + 3 * 7168
    bias = 59 * 256
    packed = sum(v3.params.values()) - plain - bias
    assert found == {"BF16": 2 * plain, "F8_E4M3": packed, "F32": v3.total_bytes - 2 * plain - packed}

    realrepo.build("openai/gpt-oss-20b", tmp_path / "oss")
    blocks = 24 * 32 * 3 * 2880 * 2880
    found = scan(tmp_path / "oss")["bytes"]["by_dtype"]
    assert found == {"U8": blocks // 2 + blocks // 32, "BF16": gpt_oss().total_bytes - blocks // 2 - blocks // 32}

    realrepo.build("nvidia/DeepSeek-V3.1-NVFP4", tmp_path / "nv")
    nibbles = 58 * 257 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18_432 + 61 * 7168 * 16_384
    matrices = 58 * 257 * 3 + 3 * 3 + 61
    found = scan(tmp_path / "nv")["bytes"]["by_dtype"]
    assert found["U8"] == nibbles // 2
    assert found["F8_E4M3"] == nibbles // 16
    assert found["F32"] == 8 * matrices + 4 * 59 * 256


# --- published figures ------------------------------------------------------------------------------------------

# Row of published_facts.csv, model, digits that the authors give for the total, convention that fits the active
# figure, digits given. Conventions (section 5 of the accounting reference): "all" = active; "input" = without the
# input embedding; "both" = without embedding and head.
PUBLISHED = [
    ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3", 671.0, 1.0, "input", 37.0, 1.0),
    # "16B" and "2.4B": 15.71 and 2.449 without the input embedding.
    ("deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite", 16.0, 1.0, "input", 2.4, 0.1),
    ("deepseek-ai/deepseek-moe-16b-base", "deepseek-ai/deepseek-moe-16b-base", 16.4, 0.1, "", 0.0, 0.0),
    # The names say 30B and 3B: 30.53 cut, not rounded; 3.35, 3.04 and 2.73 all round to 3.
    ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", 30.5, 1.0, "all", 3.0, 1.0),
    ("moonshotai/Kimi-K2-Instruct", "moonshotai/Kimi-K2-Instruct", 1000.0, 1000.0, "input", 32.0, 1.0),
    ("zai-org/GLM-5", "zai-org/GLM-5", 744.0, 1.0, "both", 40.0, 1.0),
    ("openai/gpt-oss-20b", "openai/gpt-oss-20b", 21.0, 1.0, "input", 3.6, 0.1),
    ("allenai/OLMoE-1B-7B", "allenai/OLMoE-1B-7B-0924", 6.9, 0.1, "all", 1.3, 0.1),
    ("MiniMaxAI/MiniMax-M2", "MiniMaxAI/MiniMax-M2.5", 230.0, 10.0, "input", 10.0, 1.0),
    ("databricks/dbrx", "databricks/dbrx-instruct", 132.0, 1.0, "all", 36.0, 1.0),
    ("inclusionAI/Ling-lite", "inclusionAI/Ling-lite-base", 16.8, 0.1, "all", 2.75, 0.01),
    ("XiaomiMiMo/MiMo-V2-Flash", "XiaomiMiMo/MiMo-V2-Flash", 309.0, 1.0, "input", 15.0, 1.0),
    # 109B holds the vision tower, 17B does not.
    ("meta-llama/Llama-4-Scout", "meta-llama/Llama-4-Scout-17B-16E-Instruct", 109.0, 1.0, "all", 17.0, 1.0),
    ("ibm-granite/granite-3.0-1b-a400m", "ibm-granite/granite-3.1-1b-a400m-base", 1.0, 1.0, "all", 0.4, 0.1),
]

# Rows that state bytes or exact parameters: checked here when they are parameters, in test_realrepo.py when bytes.
EXACT = {
    "Qwen/Qwen3-30B-A3B [params]": ("Qwen/Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704),
    "deepseek-ai/DeepSeek-V2-Lite [index total_size bytes]": ("deepseek-ai/DeepSeek-V2-Lite", 15_706_484_224, None),
}


def published_rows() -> dict[str, dict[str, str]]:
    with (realrepo.DATA / "published_facts.csv").open(newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def billions(text: str) -> float:
    found = re.match(r"([\d.]+)([TBM])", text)
    assert found, text
    return float(found[1]) * {"T": 1000.0, "B": 1.0, "M": 0.001}[found[2]]


def fits(value: float, published: float, digit: float) -> bool:
    """Rounded, or cut, to the digit that the authors give."""
    return abs(value - published) <= digit / 2 or published <= value < published + digit


@pytest.mark.parametrize(
    ("row", "model", "total", "total_digit", "convention", "active", "active_digit"),
    PUBLISHED,
    ids=[row[0] for row in PUBLISHED],
)
def test_published_parameters(
    row: str,
    model: str,
    total: float,
    total_digit: float,
    convention: str,
    active: float,
    active_digit: float,
    tmp_path: Path,
) -> None:
    stated = published_rows()[row]
    if row == "Qwen/Qwen3-30B-A3B":
        assert stated["total_params"] == "30B (name)"  # 30.5 is the figure of the same model's card
    else:
        assert billions(stated["total_params"]) == total, "the row that this test is about"
    realrepo.build(model, tmp_path)
    report = scan(tmp_path)
    found = report["parameters"]
    assert fits(found["total"] / 1e9, total, total_digit)
    if convention:
        assert billions(stated["active_params"]) == active
        by_role = found["by_role"]
        figure = {
            "all": found["active"],
            "input": found["active"] - by_role["embedding"],
            "both": found["active_without_embeddings"],
        }[convention]
        assert fits(figure / 1e9, active, active_digit)


def test_published_mtp_of_deepseek_v3(tmp_path: Path) -> None:
    # "685B = 671B main + 14B MTP". "MTP 11.5B unique" leaves out the embedding and head that equal the main ones, and
    # fits without the projection of both inputs (0.10B), too: the bare layer.
    realrepo.build("deepseek-ai/DeepSeek-V3", tmp_path)
    found = scan(tmp_path)["parameters"]
    assert found["mtp"] == deepseek_v3().params["mtp"]
    assert round((found["total"] + found["mtp"]) / 1e9) in (684, 685)
    assert round((found["mtp"] - 2 * 129_280 * 7168 - 2 * 7168 * 7168) / 1e9, 1) == 11.5
    # The hub counts 684,531,386,000 elements, scales among them.
    assert found["stored_elements"] == 684_531_386_000


@pytest.mark.parametrize("row", EXACT)
def test_published_exact_parameters(row: str, tmp_path: Path) -> None:
    model, total, active = EXACT[row]
    stated = published_rows()[row]
    assert str(total) in stated["total_params"] + stated["active_params"]
    realrepo.build(model, tmp_path)
    found = scan(tmp_path)["parameters"]
    assert found["total"] == total
    if active is not None:
        assert str(active) in stated["active_params"]
        assert found["active"] == active


def test_every_published_row_of_a_model_here_is_used() -> None:
    sizes = {row for row in published_rows() if row.endswith("bytes]")}  # test_realrepo.py
    used = {row[0] for row in PUBLISHED} | set(EXACT) | sizes | {"deepseek-ai/DeepSeek-V3 (weights doc)"}
    assert set(published_rows()) <= used


# The table of section 5: total, active, without input embedding, without embedding and head, in billions.
CONVENTIONS = [
    ("deepseek-ai/DeepSeek-V3", 671.03, 37.55, 36.63, 35.70),
    ("moonshotai/Kimi-K2-Instruct", 1026.41, 32.86, 31.69, 30.51),
    ("deepseek-ai/DeepSeek-V2-Lite", 15.71, 2.66, 2.45, 2.24),
    ("Qwen/Qwen3-30B-A3B", 30.53, 3.35, 3.04, 2.73),
    ("Qwen/Qwen3-Next-80B-A3B-Instruct", 79.67, 3.88, 3.56, 3.25),
    ("mistralai/Mixtral-8x7B-v0.1", 46.70, 12.88, 12.75, 12.62),
    ("openai/gpt-oss-120b", 116.83, 5.71, 5.13, 4.55),
    ("openai/gpt-oss-20b", 20.91, 4.19, 3.61, 3.03),
    ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 107.77, 17.17, 16.14, 15.10),
]


@pytest.mark.parametrize(("name", "total", "active", "no_input", "neither"), CONVENTIONS)
def test_conventions_table(
    name: str, total: float, active: float, no_input: float, neither: float, tmp_path: Path
) -> None:
    realrepo.build(name, tmp_path)
    found = scan(tmp_path)["parameters"]
    text = found["total"] - found["vision"]  # the table leaves Scout's tower out
    embedding = found["by_role"]["embedding"]
    figures = (text, found["active"], found["active"] - embedding, found["active_without_embeddings"])
    assert figures == pytest.approx(tuple(x * 1e9 for x in (total, active, no_input, neither)), abs=0.0051e9)
