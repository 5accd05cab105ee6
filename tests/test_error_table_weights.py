"""The table of errors of the compared tool, section 2.2: parameters and breakdown; and what it has right.

Numbers of rows are those of the accounting reference, section 2. Each expectation is the row's formula in bytes, not
its rounded GiB; where a row prints GiB, the formula is held against it, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import realrepo
from reports import BF16, GIB, rebuild

if TYPE_CHECKING:
    from pathlib import Path


def test_row_21_gpt_oss_120b(tmp_path: Path) -> None:
    # Logical: two values in each byte of blocks, none in scales; biases are parameters.
    weights = 36 * 128 * 3 * 2880 * 2880
    biases = 36 * 128 * 3 * 2880
    table = 201_088 * 2880
    rest = (
        2 * table
        + 36 * (2 * 4096 * 2880 + 2 * 512 * 2880 + 4096 + 2 * 512 + 2880 + 64)  # attention with biases and sinks
        + 36 * (128 * 2880 + 128)  # router
        + 36 * 2 * 2880
        + 2880  # norms
    )
    routed_bytes = weights // 2 + weights // 32 + 2 * biases
    report = rebuild("openai/gpt-oss-120b", tmp_path)
    found, size = report["parameters"], report["bytes"]
    assert found["total"] == weights + biases + rest
    assert round(found["total"] / 1e9, 2) == 116.83
    assert found["routed"] == weights + biases
    assert size["routed_experts"] == routed_bytes
    assert round(routed_bytes / GIB, 2) == 56.80
    assert size["base"] == 2 * rest
    assert round(2 * rest / GIB, 2) in (3.96, 3.97)
    assert size["per_expert"] == routed_bytes // (36 * 128)
    active = rest + (weights + biases) * 4 // 128
    assert found["active"] == active
    assert round(active / 1e9, 2) == 5.71
    assert round((active - table) / 1e9, 2) == 5.13
    assert report["architecture"]["num_experts"] == 128
    assert report["architecture"]["experts_per_token"] == 4


def test_row_22_llama_4_scout(tmp_path: Path) -> None:
    # Fused experts, top-1.
    report = rebuild("meta-llama/Llama-4-Scout-17B-16E-Instruct", tmp_path)
    size, roles = report["bytes"], report["bytes"]["by_role"]
    assert size["routed_experts"] == 16 * 48 * 3 * 8192 * 5120 * BF16 == 180 * GIB
    assert roles["shared_expert"] == 48 * 3 * 8192 * 5120 * BF16 == 11.25 * GIB
    assert round((size["total"] - roles["vision"]) / GIB, 2) == 200.74
    assert report["architecture"]["experts_per_token"] == 1
    rest = 2 * 202_048 * 5120 + 48 * (2 * 5120 * 5120 + 2 * 1024 * 5120 + 2 * 5120 + 16 * 5120) + 5120
    active = rest + 48 * 2 * 3 * 8192 * 5120  # one routed and one shared expert a layer
    assert report["parameters"]["active"] == active
    assert round(active / 1e9, 2) == 17.17


def test_row_23_mixtral_gptq(tmp_path: Path) -> None:
    # Each int32 of qweight holds eight values; scales, zeros and g_idx hold none.
    experts = 32 * 8 * 3 * 4096 * 14_336
    attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    plain = 2 * 32_000 * 4096 + 32 * (2 * 4096 + 8 * 4096) + 4096
    report = rebuild("TheBloke/Mixtral-8x7B-v0.1-GPTQ", tmp_path)
    found, size = report["parameters"], report["bytes"]
    assert found["total"] == experts + attention + plain
    assert round(found["total"] / 1e9, 2) == 46.70
    assert found["routed"] == experts

    def packed(values: int, inputs: int) -> int:
        """Half a byte a value; for groups of 128 a 16-bit scale and a 4-bit zero; an int32 for each input."""
        return values // 2 + values // 128 * BF16 + values // 128 // 2 + 4 * inputs

    routed = packed(experts, 32 * 8 * (2 * 4096 + 14_336))
    total = routed + packed(attention, 32 * 4 * 4096) + BF16 * plain
    assert size["routed_experts"] == routed
    assert size["per_expert"] == routed // (32 * 8)
    assert size["total"] == total
    assert round(total / GIB, 2) == 22.98
    assert found["active"] == plain + attention + experts // 4
    # Stored elements: words, scales, zeros and indices as they lie there.
    linear = experts + attention
    indices = 32 * 8 * (2 * 4096 + 14_336) + 32 * 4 * 4096
    assert found["stored_elements"] == plain + linear // 8 + linear // 128 + linear // 128 // 8 + indices


def fp8(out: int, inner: int) -> int:
    return out * inner + 4 * -(-out // 128) * -(-inner // 128)


def test_row_24_deepseek_v3_breakdown(tmp_path: Path) -> None:
    attention = 61 * (
        fp8(1536, 7168) + fp8(128 * 192, 1536) + fp8(576, 7168) + fp8(128 * 256, 512) + fp8(7168, 128 * 128)
    )
    expert = 2 * fp8(2048, 7168) + fp8(7168, 2048)
    dense = 3 * (2 * fp8(18_432, 7168) + fp8(7168, 18_432))
    router = 58 * (256 * 7168 * BF16 + 256 * 4)
    table = 129_280 * 7168 * BF16
    norm = BF16 * (61 * (2 * 7168 + 1536 + 512) + 7168)
    report = rebuild("deepseek-ai/DeepSeek-V3", tmp_path)
    size, roles = report["bytes"], report["bytes"]["by_role"]
    assert roles["attention"] == attention
    assert roles["dense_mlp"] == dense
    assert roles["shared_expert"] == 58 * expert, "a shared expert is not a routed one"
    assert roles["router"] == router
    assert roles["embedding"] == roles["lm_head"] == table
    assert roles["norm"] == norm
    assert size["routed_experts"] == roles["routed_expert"] == 58 * 256 * expert
    assert size["per_expert"] == expert
    main = size["total"] - roles["mtp"]
    assert main == attention + dense + 58 * 257 * expert + router + 2 * table + norm
    # MTP: a MoE layer, its own embedding and head, the projection of both inputs and three norms.
    mtp = (
        attention // 61
        + 257 * expert
        + router // 58
        + 2 * table
        + BF16 * (2 * 7168 * 7168 + 3 * 7168 + 2 * 7168 + 1536 + 512)
    )
    assert roles["mtp"] == mtp
    printed = {
        10.63: attention,
        1.11: dense,
        2.38: 58 * expert,
        0.20: router,
        3.45: 2 * table,
        609.15: 58 * 256 * expert,
        626.92: main,
        14.36: mtp,
        10.50: 256 * expert,
    }
    assert {gib: round(value / GIB, 2) for gib, value in printed.items()} == {gib: gib for gib in printed}


def test_row_25_deepseek_v3_active(tmp_path: Path) -> None:
    # 37.55B, 36.63B without the input embedding, 35.70B without embedding and head; not 36.73B, which is what comes
    # out when shared experts are taken for routed ones.
    attention = 61 * (1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 128 * 256 * 512 + 7168 * 128 * 128)
    expert = 3 * 7168 * 2048
    table = 129_280 * 7168
    rest = 58 * (256 * 7168 + 256) + 61 * (2 * 7168 + 1536 + 512) + 7168
    active = attention + 3 * 3 * 7168 * 18_432 + 58 * 9 * expert + 2 * table + rest
    found = rebuild("deepseek-ai/DeepSeek-V3", tmp_path)["parameters"]
    assert found["active"] == active
    assert found["active_without_embeddings"] == active - 2 * table
    assert found["shared"] == 58 * expert
    assert [round(value / 1e9, 2) for value in (active, active - table, active - 2 * table)] == [37.55, 36.63, 35.70]


# --- what the compared tool has right, and must stay right -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base", "routed", "context", "kv"),
    [
        ("Qwen/Qwen3-30B-A3B", 2.87, 54.00, 40_960, 3.75),
        ("mistralai/Mixtral-8x7B-v0.1", 2.99, 84.00, 32_768, 4.0),
    ],
    ids=["right-qwen3-30b", "right-mixtral"],
)
def test_figures_that_were_right_before(
    name: str, base: float, routed: float, context: int, kv: float, tmp_path: Path
) -> None:
    report = rebuild(name, tmp_path, max_model_len=context)
    assert round(report["bytes"]["base"] / GIB, 2) == base
    assert round(report["bytes"]["routed_experts"] / GIB, 2) == routed
    assert report["kv_cache"]["bytes"] == kv * GIB


def test_shared_experts_are_not_routed(tmp_path: Path) -> None:
    # The trap beside row 26: `experts\.down_proj` also matches `shared_experts.down_proj`.
    names = [tensor.name for tensor in realrepo.spec("deepseek-ai/DeepSeek-V2-Lite").tensors]
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in names
    report = rebuild("deepseek-ai/DeepSeek-V2-Lite", tmp_path)
    assert report["parameters"]["shared"] == 26 * 3 * 2048 * 2 * 1408
    assert report["parameters"]["routed"] == 26 * 64 * 3 * 2048 * 1408
