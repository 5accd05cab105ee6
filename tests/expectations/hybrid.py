"""Decoders whose layers are of several kinds."""

from __future__ import annotations

from .figures import Expected, fp8, glu, gqa, params, w


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
