"""moecore's figures for every real config, against figures worked out by hand in ``expectations``."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import realrepo
from expectations import EXPECTED
from expectations.decoders import gpt_oss
from expectations.deepseek import deepseek_v3
from expectations.figures import ROLES, Expected
from reports import Report, scan

if TYPE_CHECKING:
    from pathlib import Path

# Every stored config: the model's own, and other public copies of it. All must give the same figures.
CASES = [(name, file) for name in EXPECTED for file in realrepo.config_variants(name)]
# Copies of the config that leave out the context length.
NO_CONTEXT = {
    ("ibm-granite/granite-3.1-1b-a400m-base", "config.json"),
    ("deepseek-ai/DeepSeek-V2-Lite", "config.alt2.json"),
}


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
