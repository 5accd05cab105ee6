"""The table of errors of the compared tool, section 2.1: the KV cache.

Numbers of rows are those of the accounting reference, section 2. Each expectation is the row's formula in bytes, not
its rounded GiB; where a row prints GiB, the formula is held against it, too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import realrepo
from reports import BF16, GIB, rebuild, scan

if TYPE_CHECKING:
    from pathlib import Path

MLA = (512 + 64) * BF16  # one latent and one rope key for all heads, no factor 2
INDEXER = 128 + 4  # an fp8 key and its fp32 scale
# Gated delta of 16 key and 32 value heads of 128: fp32 state, three columns of a bf16 convolution.
GATED_DELTA = 32 * 128 * 128 * 4 + (2 * 16 * 128 + 32 * 128) * 3 * BF16
KDA = 32 * 128 * 128 * 4 + 3 * 32 * 128 * 3 * BF16
MAMBA_1 = 8192 * 16 * BF16 + 8192 * 3 * BF16
MAMBA_2 = 64 * 64 * 128 * 4 + (64 * 64 + 2 * 8 * 128) * 3 * BF16
LIGHTNING = 64 * 128 * 128 * BF16

# id, repository, tokens, dtype flag, bytes a token, fixed bytes (windows and states), states, GiB that the row prints.
KV_ROWS: list[tuple[str, str, int, str, int, int, int, float]] = [
    ("row-01-deepseek-v3-mla", "deepseek-ai/DeepSeek-V3", 163_840, "auto", 61 * MLA, 0, 0, 10.72),
    ("row-01-deepseek-v3-fp8_ds_mla", "deepseek-ai/DeepSeek-V3", 163_840, "fp8_ds_mla", 61 * 656, 0, 0, 6.11),
    ("row-02-kimi-k2-mla", "moonshotai/Kimi-K2-Instruct", 131_072, "auto", 61 * MLA, 0, 0, 8.58),
    ("row-03-deepseek-v2-lite-mla", "deepseek-ai/DeepSeek-V2-Lite", 163_840, "auto", 27 * MLA, 0, 0, 4.75),
    (
        "row-04-deepseek-v3.2-indexer",
        "deepseek-ai/DeepSeek-V3.2",
        163_840,
        "bfloat16",
        61 * (MLA + INDEXER),
        0,
        0,
        11.95,
    ),
    ("row-05-glm-5-indexer", "zai-org/GLM-5", 202_752, "bfloat16", 78 * (MLA + INDEXER), 0, 0, 18.91),
    (
        "row-06-kimi-linear-kda",
        "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        1_048_576,
        "auto",
        7 * MLA,
        20 * KDA,
        20 * KDA,
        7.88 + 41.4 / 1024,
    ),
    (
        "row-07-qwen3-next-gated-delta",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        262_144,
        "auto",
        12 * 2 * 2 * 256 * BF16,
        36 * GATED_DELTA,
        36 * GATED_DELTA,
        6.00 + 73.7 / 1024,
    ),
    (
        "row-08-qwen3.5-gated-delta",
        "Qwen/Qwen3.5-35B-A3B",
        262_144,
        "auto",
        10 * 2 * 2 * 256 * BF16,
        30 * GATED_DELTA,
        30 * GATED_DELTA,
        5.06,
    ),
    (
        "row-09-jamba-mamba-1",
        "ai21labs/AI21-Jamba-Mini-1.6",
        262_144,
        "auto",
        4 * 2 * 8 * 128 * BF16,
        28 * MAMBA_1,
        28 * MAMBA_1,
        4.01,
    ),
    (
        "row-10-minimax-text-01-lightning",
        "MiniMaxAI/MiniMax-Text-01",
        1_000_000,
        "auto",
        10 * 2 * 8 * 128 * BF16,
        70 * LIGHTNING,
        70 * LIGHTNING,
        38.28,
    ),
    (
        "row-11-nemotron-3-nano-mamba-2",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        262_144,
        "auto",
        6 * 2 * 2 * 128 * BF16,
        23 * MAMBA_2,
        23 * MAMBA_2,
        1.55,
    ),
    (
        "row-12-gpt-oss-120b-sliding",
        "openai/gpt-oss-120b",
        131_072,
        "bfloat16",
        18 * 2 * 8 * 64 * BF16,
        18 * 2 * 8 * 64 * BF16 * 128,
        0,
        4.50,
    ),
    (
        "row-12-gpt-oss-20b-sliding",
        "openai/gpt-oss-20b",
        131_072,
        "bfloat16",
        12 * 2 * 8 * 64 * BF16,
        12 * 2 * 8 * 64 * BF16 * 128,
        0,
        3.00,
    ),
    (
        "row-13-llama-4-scout-chunks",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        10_485_760,
        "auto",
        12 * 2 * 8 * 128 * BF16,
        36 * 2 * 8 * 128 * BF16 * 8192,
        0,
        481.1,
    ),
    (
        "row-14-mistral-7b-window",
        "mistralai/Mistral-7B-v0.1",
        32_768,
        "auto",
        0,
        32 * 2 * 8 * 128 * BF16 * 4096,
        0,
        0.50,
    ),
    (
        "row-15-gemma-3-27b-pattern",
        "google/gemma-3-27b-it",
        131_072,
        "auto",
        10 * 2 * 16 * 128 * BF16,
        52 * 2 * 16 * 128 * BF16 * 1024,
        0,
        10.41,
    ),
    (
        "row-16-gemma-4-head-kinds",
        "google/gemma-4-26B-A4B",
        262_144,
        "auto",
        5 * 2 * 2 * 512 * BF16,
        25 * 2 * 8 * 256 * BF16 * 1024,
        0,
        5.20,
    ),
    (
        "row-17-mimo-v2-flash-head-kinds",
        "XiaomiMiMo/MiMo-V2-Flash",
        262_144,
        "bfloat16",
        9 * 4 * (192 + 128) * BF16,
        39 * 8 * (192 + 128) * BF16 * 128,
        0,
        5.65,
    ),
]


@pytest.mark.parametrize(
    ("name", "tokens", "dtype", "per_token", "fixed", "state", "gib"),
    [row[1:] for row in KV_ROWS],
    ids=[row[0] for row in KV_ROWS],
)
def test_kv_cache(
    name: str, tokens: int, dtype: str, per_token: int, fixed: int, state: int, gib: float, tmp_path: Path
) -> None:
    expected = tokens * per_token + fixed
    digit = 0.1 if gib > 100 else 0.01
    assert expected / GIB == pytest.approx(gib, abs=digit * 0.51 + 0.003), "the formula is the row's"
    found = rebuild(name, tmp_path, max_model_len=tokens, kv_cache_dtype=dtype)["kv_cache"]
    assert found["status"] == "exact", found["reason"]
    assert found["bytes"] == expected
    assert found["bytes_per_token"] == per_token
    assert found["state_bytes"] == state


def test_row_01_fp8_weights_are_no_fp8_cache(tmp_path: Path) -> None:
    # The compared tool takes fp8 weights for an fp8 cache, which hides half of its factor of 24.9.
    assert rebuild("deepseek-ai/DeepSeek-V3", tmp_path)["kv_cache"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "layers", "gib"),
    [("openai/gpt-oss-120b", 36, 4.79), ("openai/gpt-oss-20b", 24, 3.19)],
    ids=["row-12-gpt-oss-120b-reserved", "row-12-gpt-oss-20b-reserved"],
)
def test_reserved_windows(name: str, layers: int, gib: float, tmp_path: Path) -> None:
    # A window of 128 with steps of 8,192 tokens in blocks of 16: (ceil(min(127 + 8192, T) / 16) + 1) * 16 tokens.
    window = (-(-min(127 + 8192, 131_072) // 16) + 1) * 16
    expected = layers // 2 * 2 * 8 * 64 * BF16 * (131_072 + window)
    assert expected / GIB == pytest.approx(gib, abs=0.0051)
    found = rebuild(name, tmp_path, max_model_len=131_072)["kv_cache"]
    assert found["bytes_reserved"] == expected


def test_row_07_state_dtype_follows_the_config(tmp_path: Path) -> None:
    # 73.7 MiB with an fp32 state, 37.7 MiB when the config asks for bf16.
    name = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    assert round(36 * GATED_DELTA / 2**20, 1) == 73.7
    repo = realrepo.build(name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**repo.config, "mamba_ssm_dtype": "bfloat16"}))
    expected = 36 * (32 * 128 * 128 * BF16 + (2 * 16 * 128 + 32 * 128) * 3 * BF16)
    assert round(expected / 2**20, 1) == 37.7
    assert scan(tmp_path)["kv_cache"]["state_bytes"] == expected
