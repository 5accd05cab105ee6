"""What people see: the JSON's shape, the page, the table, usage errors, and that the README shows what is printed."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import moecore
import pytest
import realrepo
from moecore import render
from moecore.cli import main
from rich.console import Console

ROOT = Path(__file__).parents[1]

#: Schema moecore.scan/1: these keep name and meaning.
SCHEMA: dict[str, Any] = {
    "architecture": ["model_type", "layers", "moe_layers", "num_experts", "experts_per_token", "shared_experts"],
    "parameters": ["total", "active", "active_without_embeddings", "routed", "shared"],
    "bytes": ["total", "base", "routed_experts", "per_expert", "by_role", "by_dtype"],
    "kv_cache": [
        "status", "bytes", "bytes_upper", "bytes_per_token", "state_bytes", "max_model_len", "batch_size", "dtype",
        "reason",
    ],
    "cost": ["requests", "bytes_fetched", "header_bytes", "seconds"],
}  # fmt: skip
ROLES = [
    "embedding", "attention", "dense_mlp", "norm", "router", "shared_expert", "routed_expert", "mtp", "vision",
    "lm_head", "other",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three repos, by their names."""
    folder = tmp_path_factory.mktemp("repos")
    for name in ("Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V2-Lite", "meta-llama/Llama-3.1-8B"):
        realrepo.build(name, folder / name)
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the repos as the working folder, so that names are targets."""
    monkeypatch.chdir(folder)
    return folder


def test_the_json_has_the_keys_of_its_schema(inside: Path) -> None:
    report = moecore.scan("Qwen/Qwen3-30B-A3B")
    document = json.loads(report.to_json())
    assert document == report.to_dict()
    assert document["schema"] == "moecore.scan/1"
    assert (document["target"], document["revision"], document["source"]) == ("Qwen/Qwen3-30B-A3B", None, "local")
    assert (document["status"], document["error"]) == ("ok", None)
    for section, keys in SCHEMA.items():
        assert set(keys) <= set(document[section]), section
    assert set(document["bytes"]["by_role"]) == set(ROLES)
    assert (document["unrecognised"], document["warnings"]) == ([], [])
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.status = "error"  # type: ignore[misc]


def test_the_readme_shows_what_is_printed(inside: Path) -> None:
    block = re.search(r"```\n\$ moecore scan Qwen/Qwen3-30B-A3B\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    buffer = io.StringIO()
    Console(file=buffer, width=140, color_system=None).print(render.page(moecore.scan("Qwen/Qwen3-30B-A3B")))
    printed = [" ".join(line.strip("│ \n").split()) for line in buffer.getvalue().splitlines()]
    shown = [" ".join(line.split()) for line in block[1].splitlines() if line.strip()]
    assert [line for line in shown if line not in printed] == []


def test_the_table_has_one_line_a_model(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "deepseek-ai/DeepSeek-V2-Lite", "meta-llama/Llama-3.1-8B"]) == 0
    out = capsys.readouterr().out
    lite = next(line for line in out.splitlines() if "DeepSeek-V2-Lite" in line)
    assert "15.71B" in lite
    assert "6/64" in lite
    assert "dense" in next(line for line in out.splitlines() if "Llama-3.1-8B" in line)


def test_csv_has_a_row_a_target(inside: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    names = ["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B", "./missing"]
    assert main(["scan", *names, "--format", "csv", "--output", str(out)]) == 1
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["target"] for row in rows] == names
    assert int(rows[1]["bytes_routed_experts"]) == 48 * 128 * 3 * 2048 * 768 * 2
    assert (rows[2]["status"], rows[2]["bytes_total"]) == ("error", "")
    assert "no such file" in rows[2]["error"]


def test_the_flags_of_hf_mem_are_understood(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--experimental", "--details", "--ignore-table-width", "--max-model-len", "1024", "--batch-size", "2"]
    assert main(["scan", "--model-id", "Qwen/Qwen3-30B-A3B", "--json-output", *flags]) == 0
    kv = json.loads(capsys.readouterr().out)["kv_cache"]
    assert kv["bytes"] == 2 * 1024 * 48 * 2 * 4 * 128 * 2  # batch, tokens, layers, K and V, heads, head size, bf16


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["scan"], "no targets"),
        (["scan", "x/y", "--resume"], "--output"),
        (["scan", "x/y", "--jobs", "0"], "--jobs"),
        (["scan", "x/y", "--batch-size", "0"], "--batch-size"),
        (["scan", "x/y", "--output", "/nowhere/at/all.jsonl"], "folder does not exist"),
        (["scan", "--from-file", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["scan", "x/y", "--format", "xml"], ["scan", "x/y", "--kv-cache-dtype", "fp7"]]
)
def test_what_argparse_refuses_is_status_2_too(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_targets_of_a_file_may_have_comments(inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "repos.txt"
    listed.write_text("# models\n\nQwen/Qwen3-30B-A3B  # the MoE\nmeta-llama/Llama-3.1-8B\nQwen/Qwen3-30B-A3B\n")
    assert main(["scan", "--from-file", str(listed), "--format", "jsonl"]) == 0
    lines = [json.loads(line)["target"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(lines) == ["Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.1-8B"]


def test_a_file_that_is_not_replaced_stays_as_it_was(inside: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.jsonl"
    out.write_text('{"note": "not a report"}\n{"note": "nor this"}\n')
    assert main(["scan", "Qwen/Qwen3-30B-A3B", "--output", str(out), "--resume"]) == 2
    assert "nor this" in out.read_text()


def test_a_failed_report_is_a_page_too() -> None:
    (report,) = moecore.scan_many(["./missing"])
    assert report.status == "error"
    assert report.error_type == "TargetError"
    assert "no such file" in str(report)


def test_the_error_of_a_damaged_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(moecore.HeaderError) as caught:
        moecore.scan(tmp_path)
    assert "model.safetensors" in (caught.value.file or "")
    assert isinstance(caught.value, ValueError)


def test_index_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    realrepo.build("openai/gpt-oss-20b", tmp_path / "inside")
    for bad in ("../outside.safetensors", "/etc/passwd", "a\\b.safetensors"):
        index = tmp_path / "inside/model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"x": bad, "y": "model-00000-of-00002.safetensors"}}))
        with pytest.raises(moecore.ConfigError, match="leave its folder"):
            moecore.scan(tmp_path / "inside")


def test_the_module_runs_as_a_program() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shown = subprocess.run(
        [sys.executable, "-m", "moecore", "--version"], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert shown.strip() == f"moecore {moecore.__version__}"
