"""Models with a vision tower."""

from __future__ import annotations

from .figures import Expected, gqa, params, w


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
