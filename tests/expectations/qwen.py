"""Qwen3 and what followed."""

from __future__ import annotations

from .figures import Expected, fp8, glu, gqa, params, w


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
