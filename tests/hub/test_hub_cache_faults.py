"""What one bad moment of the hub must not leave behind in the cache, and local files that must not be waited for."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import moecore
import pytest
from fakehub import FakeHub
from hubdata import Made, qwen3_moe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MADE: Made = qwen3_moe()
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fake hub, and a cache folder of the test's own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MOECORE_CACHE", str(tmp_path / "headers"))
    with FakeHub() as server:
        yield server


def scan(hub: FakeHub) -> dict[str, Any]:
    """One scan of the repo."""
    return moecore.scan("org/moe", endpoint=hub.url, token=False).to_dict()


def odd_names() -> tuple[dict[str, Any], list[str]]:
    """The repo with shard names that say nothing, so that only an index tells which files count."""
    shards = sorted(name for name in MADE.files if name.endswith(".safetensors"))
    renamed = {name: f"part_{at}.safetensors" for at, name in enumerate(shards)}
    files = {renamed.get(name, name): content for name, content in MADE.files.items() if name != INDEX}
    return files, sorted(renamed.values())


def test_a_quantisation_config_that_failed_is_asked_for_again(hub: FakeHub) -> None:
    quantisation = json.dumps({"quantization": {"kv_cache_quant_algo": "FP8"}}).encode()
    hub.add("org/moe", {**MADE.files, "hf_quant_config.json": quantisation})
    hub.fault("hf_quant_config.json", "status", status=403)
    first = scan(hub)
    assert first["status"] == "partial"
    assert "hf_quant_config.json" in first["error"]
    second = scan(hub)
    assert (second["status"], second["kv_cache"]["dtype"]) == ("ok", "fp8")


def test_an_index_that_failed_does_not_decide_for_ever(hub: FakeHub) -> None:
    files, parts = odd_names()
    index = json.dumps({"weight_map": {"any.tensor": parts[0]}}).encode()
    hub.add("org/moe", {**files, INDEX: index})
    hub.fault(INDEX, "status", status=403)
    first = scan(hub)
    assert (first["status"], first["files"]) == ("partial", len(parts))
    second = scan(hub)
    assert (second["status"], second["files"]) == ("ok", 1)


def test_an_index_of_other_files_is_told_and_all_are_counted(hub: FakeHub) -> None:
    files, parts = odd_names()
    hub.add("org/moe", {**files, INDEX: json.dumps({"weight_map": {"x": "gone.safetensors"}}).encode()})
    report = scan(hub)
    assert (report["status"], report["files"]) == ("ok", len(parts))
    assert any("names none of the files" in warning for warning in report["warnings"])


@pytest.mark.timeout(20)
def test_a_pipe_for_a_config_is_not_waited_for(tmp_path: Path) -> None:
    for name, content in MADE.files.items():
        if isinstance(content, bytes):
            continue
        (tmp_path / name).write_bytes(content[0])
        os.truncate(tmp_path / name, content[1])
    os.mkfifo(tmp_path / "config.json")
    report = moecore.scan(tmp_path)
    assert report.status == "partial"
    assert "not a regular file" in (report.error or "")
