"""Every model family: what `scan` says against what the modules of transformers are and what their cache holds.

The fixtures in `data/families` were written by `tools/make_family_fixtures.py`. Each has a tiny checkpoint as
`save_pretrained` lays it out on disk, the role of every parameter by the class that owns it, and the measured bytes of
a real cache after 40 tokens of 2 sequences. Nothing of that was worked out with moecore.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import families_repo
import moecore
import pytest

NAMES = families_repo.names()

# No text model: one expert for each data set, chosen by the caller. Its weights count, its roles are a matter of taste.
NOT_A_LANGUAGE_MODEL = {"vitpose_backbone"}

# Its dense MLP stands beside product-key experts that are embeddings. Its source calls the MLP a shared expert; by its
# names alone it is a dense MLP, and that is what the report says.
DENSE_OR_SHARED = {"doge"}

# Caches that depend on more than the config and the length, that hold compressed parts no engine has documented, or
# that do not exist. These may answer `unknown` or a range, with a reason; all the others are exact.
MAY_BE_UNKNOWN = {
    *("bailing_hybrid", "deepseek_v4", "glm5_next", "glm5_next_text", "qwen4_exp_text", "zaya"),
    *("inkling2", "inkling2_text", "inkling_mm_model", "inkling_text"),
    *("dots3_note", "dots3_note_text", "mistral_large4", "mistral_large4_text"),
    *("unlimited_ocr", "unlimited_ocr_text"),
    *("nllb-moe", "switch_transformers"),
    "zamba2",
    *("openai_privacy_filter", "vitpose_backbone"),
}


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """A fixture and the report on the checkpoint that it describes."""
    fixture = families_repo.load(request.param)
    folder = families_repo.write(fixture, tmp_path_factory.mktemp("family") / request.param)
    kv = fixture["truth"]["kv"]
    report = moecore.scan(str(folder), max_model_len=kv["tokens"], batch_size=kv["batch"])
    return fixture, report.to_dict()


def test_the_whole_checkpoint_is_counted(case: tuple[dict[str, Any], Any]) -> None:
    fixture, report = case
    tensors = list(families_repo.unfold(fixture))
    assert report["status"] == "ok"
    assert report["bytes"]["total"] == sum(tensor.nbytes for tensor in tensors)
    assert sum(report["bytes"]["by_role"].values()) == report["bytes"]["total"]
    truth = fixture["truth"]
    # Lookup tables of integers are stored, and are no learnt parameters: either count is right, none other is.
    assert report["parameters"]["total"] in {truth["total"], truth["total"] + truth["integer_elements"]}


def test_roles_are_those_of_the_owning_classes(case: tuple[dict[str, Any], Any]) -> None:
    fixture, report = case
    if fixture["model_type"] in NOT_A_LANGUAGE_MODEL:
        pytest.skip(fixture["notes"])
    truth = fixture["truth"]
    said, known = dict(report["bytes"]["by_role"]), dict(truth["by_role_bytes"])
    if fixture["model_type"] in DENSE_OR_SHARED:
        assert said.pop("dense_mlp") + said.pop("shared_expert") == known.pop("dense_mlp") + known.pop("shared_expert")
    else:
        assert report["parameters"]["shared"] == truth["by_role_parameters"]["shared_expert"]
    assert said == known
    assert report["parameters"]["routed"] == truth["by_role_parameters"]["routed_expert"]
    assert report["bytes"]["routed_experts"] == truth["by_role_bytes"]["routed_expert"]


def test_every_name_is_recognised(case: tuple[dict[str, Any], Any]) -> None:
    fixture, report = case
    if fixture["model_type"] not in NOT_A_LANGUAGE_MODEL:
        assert report["unrecognised"] == []


def test_architecture_and_active_parameters(case: tuple[dict[str, Any], Any]) -> None:
    fixture, report = case
    if fixture["model_type"] in NOT_A_LANGUAGE_MODEL:
        pytest.skip(fixture["notes"])
    truth = fixture["truth"]
    keys = ["layers", "moe_layers", "num_experts", "experts_per_token", "shared_experts"]
    if fixture["model_type"] in DENSE_OR_SHARED:
        keys.remove("shared_experts")
    assert {key: report["architecture"][key] for key in keys} == {key: truth[key] for key in keys}
    # JetMoE routes attention heads too. The truth counts that role whole; a token passes top-k of E of its experts.
    heads = [
        tensor
        for tensor in families_repo.unfold(fixture)
        if re.search(r"self_attention\.experts\.\w+_linear", tensor.name)
    ]
    unused = sum(math.prod(tensor.shape) for tensor in heads)
    unused -= unused * truth["experts_per_token"] // max(truth["num_experts"], 1)
    for key in ("active", "active_without_embeddings"):
        integers = truth["integer_elements"]
        assert report["parameters"][key] - truth[key] + unused in {0, integers}, key


def test_kv_cache_is_the_measured_one_or_unknown(case: tuple[dict[str, Any], Any]) -> None:
    fixture, report = case
    kv, said = fixture["truth"]["kv"], report["kv_cache"]
    if said["status"] == "unknown":
        assert said["reason"]
        assert said["bytes"] == 0
        assert fixture["model_type"] in MAY_BE_UNKNOWN, said["reason"]
        return
    assert "bytes" in kv, "transformers keeps no cache for this model"
    figures = expected(kv, fixture["config"])
    if said["status"] == "bounded":
        assert said["reason"]
        assert fixture["model_type"] in MAY_BE_UNKNOWN, said["reason"]
        assert said["bytes"] <= max(figures)
        assert said["bytes_upper"] >= min(figures)
        return
    assert said["status"] == "exact"
    assert said["bytes"] in figures, f"off by {[said['bytes'] - figure for figure in sorted(figures)]}"
    states = {figure - kv["engine_kv_bytes"] for figure in figures}
    if not kv["indexer_elements"]:
        assert said["state_bytes"] in states
    if kv["recurrent_elements"] or kv["engine_conv_elements"]:
        assert said["state_bytes"] > 0


def expected(kv: dict[str, Any], config: dict[str, Any]) -> set[int]:
    """Sizes that engines give the measured cache.

    Elements and tokens are fixed by the measurement. What engines choose is the number format of recurrent states
    (what the config says; else float32, as transformers keeps them, or the model's) and of the indexer's keys
    (bfloat16, or fp8 with a float32 scale for each 128).
    """
    indexer = kv["indexer_elements"]
    text = config.get("text_config", config)
    stated = text.get("mamba_ssm_cache_dtype") or text.get("mamba_ssm_dtype")
    widths = {"float32": (4,), "bfloat16": (2,)}.get(stated, (2, 4))
    return {
        kv["engine_kv_bytes"] + 2 * kv["engine_conv_elements"] + width * kv["recurrent_elements"] + keys
        for width in widths
        for keys in (2 * indexer, indexer + 4 * indexer // 128)
    }


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_the_class_works_out_may_be_missing(name: str, tmp_path: Path) -> None:
    """Keys that the configuration class works out may be missing: that may cost the KV figure, and not falsify it."""
    fixture = families_repo.load(name)
    short = json.loads(json.dumps(fixture["config"]))
    for path in fixture["may_lack"]:
        *outer, key = path.split(".")
        del (short[outer[0]] if outer else short)[key]
    kv = fixture["truth"]["kv"]
    whole, report = (
        moecore.scan(str(folder), max_model_len=kv["tokens"], batch_size=kv["batch"]).to_dict()
        for folder in (
            families_repo.write(fixture, tmp_path / "whole"),
            families_repo.write(fixture, tmp_path / "short", config=short),
        )
    )
    assert report["bytes"] == whole["bytes"]
    assert report["parameters"] == whole["parameters"]
    said = report["kv_cache"]
    if said["status"] == "unknown":
        assert said["reason"]
    else:
        figures = expected(kv, fixture["config"])
        assert said["bytes"] <= max(figures), f"{said['bytes']} without {fixture['may_lack']}"
        assert said["bytes_upper"] >= min(figures), f"{said['bytes_upper']} without {fixture['may_lack']}"


# Where a family keeps its multi-token-prediction layer, and what that layer has beside a decoder layer's tensors.
NEXT_N = ["enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight"]
MTP = {
    "axk1": ("model.layers.4.", NEXT_N),
    "deepseek_v3": ("model.layers.4.", NEXT_N),
    "glm4_moe": ("model.layers.4.", [*NEXT_N, "embed_tokens.weight"]),
    "glm_moe_dsa": ("model.layers.4.", NEXT_N),
    "mellum": ("mtp.layers.0.", []),
    "mimo_v2_flash": ("model.mtp.layers.0.", ["enorm.weight", "hnorm.weight", "eh_proj.weight"]),
    "qwen3_5_moe_text": ("mtp.layers.0.", []),
    "qwen3_next": ("mtp.layers.0.", []),
}


@pytest.mark.parametrize("name", MTP)
def test_mtp_modules_stand_apart(name: str, tmp_path: Path) -> None:
    """With a prediction layer, a copy of the last decoder layer, everything but `mtp` stays as it was."""
    fixture = families_repo.load(name)
    prefix, beside = MTP[name]
    last = [tensor for tensor in families_repo.unfold(fixture) if tensor.name.startswith("model.layers.3.")]
    own = [{**tensor._asdict(), "name": prefix + tensor.name.removeprefix("model.layers.3.")} for tensor in last]
    hidden, vocabulary = 64, 112
    shapes = {"eh_proj": [hidden, 2 * hidden], "head": [vocabulary, hidden], "embed_tokens": [vocabulary, hidden]}
    own += [
        {"name": prefix + leaf, "dtype": "BF16", "shape": shapes.get(leaf.split(".")[-2], [hidden])} for leaf in beside
    ]
    if prefix == "mtp.layers.0.":
        own += [
            {"name": "mtp.fc.weight", "dtype": "BF16", "shape": [hidden, 2 * hidden]},
            {"name": "mtp.norm.weight", "dtype": "BF16", "shape": [hidden]},
            {"name": "mtp.pre_fc_norm_embedding.weight", "dtype": "BF16", "shape": [hidden]},
            {"name": "mtp.pre_fc_norm_hidden.weight", "dtype": "BF16", "shape": [hidden]},
        ]
    extra = sum(tensor.nbytes for tensor in families_repo.unfold({"tensors": own}))
    both = {**fixture, "tensors": fixture["tensors"] + own}
    report = moecore.scan(str(families_repo.write(both, tmp_path)), max_model_len=40, batch_size=2).to_dict()
    truth = fixture["truth"]
    assert report["bytes"]["by_role"] == {**truth["by_role_bytes"], "mtp": extra}
    assert report["parameters"]["total"] == truth["total"]
    assert report["parameters"]["active"] == truth["active"]
    assert report["architecture"]["layers"] == truth["layers"]
    assert report["architecture"]["moe_layers"] == truth["moe_layers"]
    assert report["unrecognised"] == []


def test_deepseek_v4_as_published(tmp_path: Path) -> None:
    """The published checkpoints lack the prefix that transformers writes."""
    fixture = families_repo.load("deepseek_v4")
    tensors = [
        {**tensor, "name": tensor["name"].removeprefix("model.").replace("embed_tokens.", "embed.")}
        for tensor in fixture["tensors"]
    ]
    assert {"embed.weight", "head.weight", "norm.weight"} <= {tensor["name"] for tensor in tensors}
    repo = families_repo.write({**fixture, "tensors": tensors}, tmp_path)
    report = moecore.scan(str(repo), max_model_len=40, batch_size=2).to_dict()
    assert report["bytes"]["by_role"] == fixture["truth"]["by_role_bytes"]
    assert report["unrecognised"] == []


def test_there_is_a_fixture_for_every_family() -> None:
    assert len(NAMES) >= 89
    assert sum(path.stat().st_size for path in Path(families_repo.FOLDER).glob("*.json")) < 1_200_000
