"""The table of errors of the compared tool, section 2.3: cases without any result.

Numbers of rows are those of the accounting reference, section 2. Each expectation is the row's formula in bytes, not
its rounded GiB; where a row prints GiB, the formula is held against it, too. Rows 18, 19, 20 and 26 and the GGUF
parts of 33 and 34 are about GGUF files, which are not scanned; of 33 the safetensors counterparts are here.
The page limit of tree listings (34) needs a server and is tested with the fake hub.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import realrepo
from checkpoints import quantised
from realrepo import Tensor
from reports import BF16, GIB, rebuild, scan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SMALL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 1000,
}
SMALL_KV = 2 * 2 * 2 * 32 * BF16  # two layers, keys and values, two heads of 32
SMALL_EXPERTS = 2 * 4 * 3 * 256 * 512
SMALL_LINEAR = SMALL_EXPERTS + 2 * (2 * 256 * 256 + 2 * 64 * 256)
SMALL_PLAIN = 2 * 1000 * 256 + 2 * 4 * 256 + (2 * 2 + 1) * 256


def small_mixtral(collector: realrepo.Collector) -> list[Tensor]:
    tensors = collector
    hidden = 256
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        tensors.norm(f"{prefix}.input_layernorm", hidden)
        tensors.norm(f"{prefix}.post_attention_layernorm", hidden)
        for proj, out in (("q", 256), ("k", 64), ("v", 64), ("o", 256)):
            tensors.linear(f"{prefix}.self_attn.{proj}_proj", out, hidden)
        tensors.plain(f"{prefix}.block_sparse_moe.gate", 4, hidden)
        for expert in range(4):
            tensors.glu(f"{prefix}.block_sparse_moe.experts.{expert}", hidden, 512, ("w1", "w3", "w2"))
    tensors.add("model.embed_tokens.weight", 1000, hidden)
    tensors.norm("model.norm", hidden)
    tensors.add("lm_head.weight", 1000, hidden)
    return tensors.tensors


# Row 27 names the first; the others are the layouts of section 4.2 that no real config here has.
PACKED: list[tuple[str, type[realrepo.Collector], dict[str, Any]]] = [
    ("gptq", quantised.Gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}),
    ("awq", quantised.Awq, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}),
    (
        "bitsandbytes-nf4",
        quantised.Nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    ("bitsandbytes-int8", quantised.Int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ("gptq-3-bit", quantised.Gptq3, {"quant_method": "gptq", "bits": 3, "group_size": 128, "desc_act": False}),
    (
        "compressed-tensors-int4",
        quantised.CompressedInt4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}},
        },
    ),
    (
        "compressed-tensors-nvfp4",
        quantised.CompressedNvfp4,
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
        },
    ),
    ("fp8-per-tensor", quantised.Fp8Tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
]


@pytest.mark.parametrize(("kind", "collector", "quantisation"), PACKED, ids=[f"row-27-{row[0]}" for row in PACKED])
def test_packed_weights(
    kind: str, collector: type[realrepo.Collector], quantisation: dict[str, Any], tmp_path: Path
) -> None:
    """Weights and a bf16 cache where the compared tool stops; logical parameters of the unpacked model."""
    tensors = small_mixtral(collector())
    realrepo.write_repo(tmp_path, {**SMALL, "quantization_config": quantisation}, tensors)
    report = scan(tmp_path)
    assert report["status"] == "ok", kind
    assert report["unrecognised"] == []
    assert report["bytes"]["total"] == sum(tensor.nbytes for tensor in tensors)
    experts = [tensor for tensor in tensors if ".experts." in tensor.name]
    assert report["bytes"]["routed_experts"] == sum(tensor.nbytes for tensor in experts)
    assert report["bytes"]["per_expert"] == sum(tensor.nbytes for tensor in experts) // 8
    assert report["parameters"]["total"] == SMALL_LINEAR + SMALL_PLAIN
    assert report["parameters"]["routed"] == SMALL_EXPERTS
    assert report["parameters"]["active"] == SMALL_LINEAR + SMALL_PLAIN - SMALL_EXPERTS // 2
    assert report["parameters"]["stored_elements"] == sum(tensor.elements for tensor in tensors)
    assert report["kv_cache"]["status"] == "exact"
    assert report["kv_cache"]["dtype"] == "bfloat16"
    assert report["kv_cache"]["bytes"] == 4096 * SMALL_KV


def test_mlx_packing(tmp_path: Path) -> None:
    # MLX names its packing under another key.
    tensors = small_mixtral(quantised.Mlx())
    realrepo.write_repo(tmp_path, {**SMALL, "quantization": {"bits": 4, "group_size": 64}}, tensors)
    report = scan(tmp_path)
    assert report["bytes"]["total"] == sum(tensor.nbytes for tensor in tensors)
    assert report["parameters"]["total"] == SMALL_LINEAR + SMALL_PLAIN
    assert report["parameters"]["routed"] == SMALL_EXPERTS
    assert report["kv_cache"]["bytes"] == 4096 * SMALL_KV


# What decides the cache's dtype, first to last: flag, quantization_config, hf_quant_config.json, config, weights.
SCHEME = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
HF_QUANT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
DTYPE_ORDER: list[tuple[str, dict[str, Any], bool, str, int]] = [
    ("flag-first", {"quantization_config": {"quant_method": "fp8", **SCHEME}}, True, "bfloat16", 2),
    ("scheme", {"quantization_config": {"quant_method": "compressed-tensors", **SCHEME}}, False, "auto", 1),
    ("hf-quant-config", {}, True, "auto", 1),
    ("scheme-null", {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": None}}, False, "auto", 2),
    ("config-float32", {"torch_dtype": "float32"}, False, "auto", 4),
    ("weights", {"torch_dtype": None}, False, "auto", 2),
]


@pytest.mark.parametrize(
    ("change", "hf_quant", "flag", "width"),
    [row[1:] for row in DTYPE_ORDER],
    ids=[f"kv-dtype-{row[0]}" for row in DTYPE_ORDER],
)
def test_order_of_kv_dtype(change: dict[str, Any], hf_quant: bool, flag: str, width: int, tmp_path: Path) -> None:
    extra = {"hf_quant_config.json": json.dumps(HF_QUANT).encode()} if hf_quant else {}
    tensors = small_mixtral(realrepo.Fp8Blocks())
    realrepo.write_repo(tmp_path, {**SMALL, **change}, tensors, extra=extra)
    found = scan(tmp_path, kv_cache_dtype=flag)["kv_cache"]
    assert found["bytes_per_token"] == SMALL_KV // BF16 * width


def test_row_27_mxfp4(tmp_path: Path) -> None:
    report = rebuild("openai/gpt-oss-20b", tmp_path)
    assert report["status"] == "ok"
    assert report["bytes"]["total"] == 13_761_264_768
    assert report["kv_cache"]["dtype"] == "bfloat16"
    assert report["kv_cache"]["bytes"] == 12 * 2 * 8 * 64 * BF16 * (131_072 + 128)


def test_row_28_ernie_vl_experts_in_groups(tmp_path: Path) -> None:
    # In one layer 64 experts of 1536 for text and 64 of 512 for vision tokens; two shared experts of 1536; routers
    # in fp32. Without the vision tower.
    text, vision = 27 * 64 * 3 * 2560 * 1536, 27 * 64 * 3 * 2560 * 512
    rest = 103_424 * 2560  # tied
    rest += 28 * (2 * 2560 * 2560 + 2 * 512 * 2560) + 3 * 2560 * 12_288 + 27 * 3 * 2560 * 2 * 1536 + (2 * 28 + 1) * 2560
    router = 27 * (2 * 2560 * 64 + 2 * 64)
    total = BF16 * (text + vision + rest) + 4 * router
    assert round(total / GIB, 2) == 53.33
    report = rebuild("baidu/ERNIE-4.5-VL-28B-A3B-PT", tmp_path)
    assert report["status"] == "ok"
    assert report["unrecognised"] == []
    assert report["bytes"]["total"] == total
    assert report["bytes"]["routed_experts"] == BF16 * (text + vision)
    assert report["parameters"]["routed"] == text + vision
    assert report["parameters"]["total"] == text + vision + rest + router
    # A text token uses 6 of the text experts, a vision token 6 of the narrower ones.
    low = rest + router + text * 6 // 64
    assert low <= report["parameters"]["active"] <= low + vision * 6 // 64
    sizes = {BF16 * 3 * 2560 * 1536, BF16 * 3 * 2560 * 512}
    assert report["bytes"]["per_expert"] in sizes
    assert {group["bytes"] for group in report["expert_groups"]} == sizes
    assert report["kv_cache"]["bytes"] == 131_072 * 28 * 2 * 4 * 128 * BF16


# dtype, elements, bytes
RARE = [
    ("BOOL", 10, 10),
    ("F4", 10, 5),
    ("F6_E2M3", 8, 6),
    ("F6_E3M2", 8, 6),
    ("F8_E8M0", 10, 10),
    ("F8_E4M3FNUZ", 10, 10),
    ("F8_E5M2FNUZ", 10, 10),
    ("C64", 10, 80),
]


@pytest.mark.parametrize(("dtype", "elements", "size"), RARE, ids=[f"row-29-{row[0]}" for row in RARE])
def test_rare_dtypes(dtype: str, elements: int, size: int, tmp_path: Path) -> None:
    odd = Tensor("model.layers.0.self_attn.extra", dtype, (elements,))
    tensors = [*small_mixtral(realrepo.Collector()), odd]
    realrepo.write_repo(tmp_path, SMALL, tensors)
    report = scan(tmp_path)
    assert report["bytes"]["by_dtype"][dtype] == size
    assert report["bytes"]["total"] == BF16 * (SMALL_LINEAR + SMALL_PLAIN) + size
    assert report["kv_cache"]["bytes"] == 4096 * SMALL_KV


def test_row_30_head_dim_null(tmp_path: Path) -> None:
    realrepo.write_repo(tmp_path, {**SMALL, "head_dim": None}, small_mixtral(realrepo.Collector()))
    found = scan(tmp_path)["kv_cache"]
    assert found["status"] == "exact"
    assert found["bytes"] == 4096 * SMALL_KV, "head_dim is hidden_size // num_attention_heads"


@pytest.mark.parametrize(
    "names",
    [
        ("consolidated.safetensors",),
        ("consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"),
    ],
    ids=["row-31-consolidated", "row-31-consolidated-shards"],
)
def test_consolidated_only(names: Sequence[str], tmp_path: Path) -> None:
    tensors = small_mixtral(realrepo.Collector())
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    for number, name in enumerate(names):
        realrepo.write_safetensors(tmp_path / name, tensors[number :: len(names)])
    report = scan(tmp_path)
    assert report["status"] == "ok"
    assert report["bytes"]["total"] == BF16 * (SMALL_LINEAR + SMALL_PLAIN)
    assert report["bytes"]["routed_experts"] == BF16 * SMALL_EXPERTS


def test_row_31_consolidated_beside_shards_is_a_copy(tmp_path: Path) -> None:
    tensors = small_mixtral(realrepo.Collector())
    realrepo.write_repo(tmp_path, SMALL, tensors)
    realrepo.write_safetensors(tmp_path / "consolidated.safetensors", tensors)
    assert scan(tmp_path)["bytes"]["total"] == BF16 * (SMALL_LINEAR + SMALL_PLAIN), "not counted twice"


@pytest.mark.parametrize("length", range(99_990, 100_004), ids=lambda length: f"row-32-header-of-{length}")
def test_unaligned_header_lengths(length: int, tmp_path: Path) -> None:
    # The compared tool asks for bytes 0-100000 and then from 100001 on, and slips by 8 for headers just below.
    tensors = small_mixtral(realrepo.Collector())
    bare, _ = realrepo.header_bytes(tensors, metadata={"pad": ""}, align=False)
    filler = "x" * (length - (len(bare) - 8))
    head, whole = realrepo.header_bytes(tensors, metadata={"pad": filler}, align=False)
    assert len(head) == 8 + length
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    realrepo.write_sparse(tmp_path / "model.safetensors", head, whole)
    report = scan(tmp_path)
    assert report["bytes"]["total"] == BF16 * (SMALL_LINEAR + SMALL_PLAIN)
    assert report["cost"]["header_bytes"] in (length, length + 8)


def test_row_33_kv_heads_by_layer(tmp_path: Path) -> None:
    # The row is about GGUF's head_count_kv array. A safetensors config that gives a list must be summed by layer, or
    # the answer is "unknown"; never one layer's figure for all.
    tensors = [
        t for t in small_mixtral(realrepo.Collector()) if not t.name.endswith(("k_proj.weight", "v_proj.weight"))
    ]
    for layer, heads in enumerate((2, 8)):
        for proj in ("k", "v"):
            tensors.append(Tensor(f"model.layers.{layer}.self_attn.{proj}_proj.weight", "BF16", (heads * 32, 256)))
    realrepo.write_repo(tmp_path, {**SMALL, "num_key_value_heads": [2, 8]}, tensors)
    report = scan(tmp_path)
    assert report["bytes"]["total"] == sum(tensor.nbytes for tensor in tensors)
    found = report["kv_cache"]
    if found["status"] == "exact":
        assert found["bytes"] == 4096 * 2 * (2 + 8) * 32 * BF16
    else:
        assert found["status"] == "unknown"
        assert found["reason"]


def test_row_33_nvfp4(tmp_path: Path) -> None:
    # The safetensors form of NVFP4: two values in a byte, an fp8 scale for 16, two fp32 scalars a matrix.
    matrices = 58 * 256 * 3
    values = 58 * 256 * 3 * 7168 * 2048
    report = rebuild("nvidia/DeepSeek-V3.1-NVFP4", tmp_path)
    assert report["status"] == "ok"
    assert report["parameters"]["routed"] == values
    assert report["bytes"]["routed_experts"] == values // 2 + values // 16 + 8 * matrices
    assert report["kv_cache"]["bytes_per_token"] == 61 * (512 + 64), "hf_quant_config.json asks for an fp8 cache"


def qwen_omni_text(prefix: str, layers: int, hidden: int, experts: int) -> list[Tensor]:
    c = realrepo.Collector()
    for layer in range(layers):
        p = f"{prefix}model.layers.{layer}"
        c.norm(f"{p}.input_layernorm", hidden)
        c.norm(f"{p}.post_attention_layernorm", hidden)
        for proj, out, inner in (("q", 4096, hidden), ("k", 512, hidden), ("v", 512, hidden), ("o", hidden, 4096)):
            c.plain(f"{p}.self_attn.{proj}_proj", out, inner)
        c.norm(f"{p}.self_attn.q_norm", 128)
        c.norm(f"{p}.self_attn.k_norm", 128)
        c.plain(f"{p}.mlp.gate", experts, hidden)
        for expert in range(experts):
            c.glu(f"{p}.mlp.experts.{expert}", hidden, 768)
    c.add(f"{prefix}model.embed_tokens.weight", 152_064, hidden)
    c.norm(f"{prefix}model.norm", hidden)
    c.add(f"{prefix}lm_head.weight", 152_064, hidden)
    return c.tensors


def test_row_34_thinker_config(tmp_path: Path) -> None:
    # Qwen3-Omni nests twice: thinker_config.text_config. The shape of the 30B model with 3 layers of 8 experts.
    text = {
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 768,
        "max_position_embeddings": 65_536,
        "model_type": "qwen3_omni_moe_text",
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152_064,
    }
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": False,
        "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "dtype": "bfloat16", "text_config": text},
    }
    realrepo.write_repo(tmp_path, config, qwen_omni_text("thinker.", 3, 2048, 8))
    report = scan(tmp_path)
    assert report["status"] == "ok"
    assert report["unrecognised"] == []
    assert report["architecture"]["layers"] == 3
    assert report["architecture"]["num_experts"] == 8
    assert report["architecture"]["experts_per_token"] == 2
    routed = 3 * 8 * 3 * 2048 * 768
    assert report["parameters"]["routed"] == routed
    always = 2 * 152_064 * 2048 + 3 * (2 * 4096 * 2048 + 2 * 512 * 2048 + 8 * 2048 + 2 * 2048 + 2 * 128) + 2048
    assert report["parameters"]["active"] == always + routed // 4
    assert report["kv_cache"]["status"] == "exact"
    assert report["kv_cache"]["bytes"] == 65_536 * 3 * 2 * 4 * 128 * BF16


def test_row_34_class_defaults_of_gemma_3_4b(tmp_path: Path) -> None:
    # The config leaves heads, kv heads, head size, pattern and context to the class: 8, 4, 256, 6, 131,072. A right
    # figure is 5 full and 29 sliding layers; without knowing the defaults only "unknown" is right. Weights always.
    report = rebuild("google/gemma-3-4b-it", tmp_path, max_model_len=131_072)
    assert report["status"] in ("ok", "partial")
    assert report["bytes"]["total"] == 8_600_158_944
    found = report["kv_cache"]
    layer = 2 * 4 * 256 * BF16
    if found["status"] == "unknown":
        assert found["reason"]
    else:
        assert found["status"] == "exact"
        assert found["bytes"] == layer * (5 * 131_072 + 29 * 1024)


def test_row_34_name_or_path_is_not_followed(tmp_path: Path) -> None:
    # text_config._name_or_path names another repository; what is here counts, and nothing is fetched.
    text = {**{key: value for key, value in SMALL.items() if key != "architectures"}, "_name_or_path": "other/model"}
    config = {"architectures": ["SomethingForConditionalGeneration"], "model_type": "llava", "text_config": text}
    realrepo.write_repo(tmp_path, config, small_mixtral(realrepo.Collector()))
    report = scan(tmp_path)
    assert report["cost"]["requests"] == 0
    assert report["bytes"]["total"] == BF16 * (SMALL_LINEAR + SMALL_PLAIN)
    assert report["kv_cache"]["bytes"] == 4096 * SMALL_KV
