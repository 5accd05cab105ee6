"""Decoders with grouped-query attention in every layer."""

from __future__ import annotations

from .figures import Expected, fp8, glu, gqa, params


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
