"""DeepSeek and those built on it."""

from __future__ import annotations

from .figures import Expected, fp8, glu, mla, nvfp4, params, w


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
