"""Listings, headers and configs that somebody made to do harm, or that make no sense."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import moecore
import pytest
from hubdata import claim, header, shard_name, write_folder
from hubscans import MADE, attempt, one_file_refused, resolves, scan
from moecore import HeaderError, HubError, MoecoreError

if TYPE_CHECKING:
    from pathlib import Path

    from fakehub import Content, FakeHub


# ---------------------------------------------------------------------------------------------------- hostile listings


EVIL = [
    "../../../api/whoami-v2/model-00001-of-00002.safetensors",
    "..%2f..%2fother/model.safetensors",
    "/etc/model.safetensors",
    "a/../../../../x/model.safetensors",
    "model.safetensors?x=../../api",
    "model.safetensors#x",
    "a\\..\\..\\model.safetensors",
    "x\0y.safetensors",
    "n" * 300 + ".safetensors",
]


@pytest.mark.parametrize("siblings", [True, False])
@pytest.mark.parametrize("name", EVIL)
def test_names_that_leave_the_repo_are_not_asked_for(hub: FakeHub, name: str, siblings: bool) -> None:
    sha = hub.add("org/evil", {**MADE.files, name: header([("evil", "BF16", [4])])}, siblings=siblings)
    report, error = attempt(lambda: scan(hub, "org/evil"))
    if report is None:
        assert "name" in str(error) or "path" in str(error)
    else:
        assert report["bytes"]["total"] == MADE.total
        assert report["warnings"], "what was left out is said"
    own = (f"/org/evil/resolve/{sha}/", "/api/models/org/evil")
    hub_paths = [one.path for one in hub.log() if one.origin == "hub"]
    assert all(path.startswith(own) for path in hub_paths), hub_paths
    assert not any(".." in path or "%2e" in path.lower() or "whoami" in path for path in hub_paths)


HEX = "c" * 40


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"sha": 5},
        {"sha": "../../../api/whoami-v2?", "siblings": [{"rfilename": "model.safetensors"}]},
        {"sha": "x/../../other/resolve/main", "siblings": [{"rfilename": "model.safetensors"}]},
        {"sha": "../../../../api/whoami-v2?"},
        {"sha": HEX, "siblings": "model.safetensors"},
        {"sha": HEX, "siblings": [{"name": "model.safetensors"}]},
        {"sha": HEX, "siblings": [{"rfilename": 7}]},
        {"sha": HEX, "siblings": ["model.safetensors"]},
        {"sha": HEX, "siblings": {"rfilename": "model.safetensors"}},
    ],
    ids=str,
)
def test_an_api_that_answers_nonsense_is_a_typed_error(hub: FakeHub, answer: Any) -> None:
    hub.fault("/api/models/org/moe/revision", "status", status=200, body=answer, count=-1)
    with pytest.raises(MoecoreError):
        scan(hub, token="hf_secret")
    for one in hub.log():
        assert ".." not in one.path
        assert "whoami" not in one.path
        assert "/other/" not in one.path


@pytest.mark.parametrize("answer", [None, {}, "x", [7], [{"type": "file"}], [{"type": "file", "path": 7}]], ids=str)
def test_a_listing_that_makes_no_sense_is_a_typed_error(hub: FakeHub, answer: Any) -> None:
    hub.add("org/listed", MADE.files, siblings=False)
    hub.fault("/tree/", "status", status=200, body=answer, count=-1)
    with pytest.raises(HubError):
        scan(hub, "org/listed")


@pytest.mark.timeout(20)
def test_a_listing_without_end_has_an_end(hub: FakeHub) -> None:
    sha = hub.add("org/listed", MADE.files, siblings=False)
    link = {"Link": f'<{hub.url}/api/models/org/listed/tree/{sha}?recursive=true&cursor=x>; rel="next"'}
    rows = [{"type": "file", "path": "README.md", "size": 1, "oid": "0"}]
    hub.fault("/tree/", "status", status=200, body=rows, headers=link, count=-1)
    with pytest.raises(HubError):
        scan(hub, "org/listed")
    assert len(hub.log()) <= 2000


def test_a_listing_that_goes_on_elsewhere_gets_no_token(hub: FakeHub) -> None:
    hub.add("org/listed", MADE.files, siblings=False)
    link = {"Link": f'<{hub.cdn}/api/models/org/listed/tree/x>; rel="next"'}
    hub.fault("/tree/", "status", status=200, body=[], headers=link)
    attempt(lambda: scan(hub, "org/listed", token="hf_secret"))
    assert {one.authorization for one in hub.log() if one.origin == "cdn"} <= {None}


@pytest.mark.parametrize("name", [*EVIL[:4], "http://127.0.0.1:1/x.safetensors", "//127.0.0.1:1/x.safetensors"])
def test_names_in_an_index_file_that_leave_the_repo(hub: FakeHub, name: str) -> None:
    index = json.loads(MADE.files["model.safetensors.index.json"])  # type: ignore[arg-type]
    index["weight_map"]["model.embed_tokens.weight"] = name
    files = {**MADE.files, "model.safetensors.index.json": json.dumps(index).encode()}
    sha = hub.add("org/evil", files)
    report, _ = attempt(lambda: scan(hub, "org/evil"))
    if report is not None:
        assert report["bytes"]["total"] == MADE.total
    own = (f"/org/evil/resolve/{sha}/", "/api/models/org/evil")
    assert all(one.path.startswith(own) for one in hub.log() if one.origin == "hub")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "sub/../../secret.safetensors"])
def test_names_in_a_local_index_file_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, {"secret.safetensors": header([("secret", "BF16", [4])])})
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    files = {**MADE.files, "model.safetensors.index.json": json.dumps(index).encode()}
    folder = write_folder(tmp_path / "repo", files)
    for target in (folder, folder / "model.safetensors.index.json"):
        report, error = attempt(partial(moecore.scan, str(target)))
        if report is None:
            assert name in str(error) or "index" in str(error)
        else:
            assert report["bytes"]["total"] == MADE.total
            assert "secret" not in json.dumps(report["unrecognised"])


# ----------------------------------------------------------------------------------------------------- hostile headers


@pytest.mark.parametrize("size", [100_000_001, 10**12, 2**64 - 1])
def test_huge_header_claims_are_refused_without_a_download(hub: FakeHub, size: int) -> None:
    hub.add("org/huge", {"config.json": MADE.files["config.json"], "model.safetensors": claim(size, 2 * 10**12)})
    with pytest.raises(HeaderError) as caught:
        scan(hub, "org/huge")
    assert "model.safetensors" in str(caught.value.file)
    assert sum(one.sent for one in hub.log()) < 1_500_000
    assert len([one for one in hub.log() if one.origin == "cdn"]) == 1


def test_a_header_longer_than_its_file(hub: FakeHub) -> None:
    hub.add("org/cut", {"config.json": MADE.files["config.json"], "model.safetensors": claim(50_000_000, 1_000_000)})
    with pytest.raises(HeaderError) as caught:
        scan(hub, "org/cut")
    assert "model.safetensors" in str(caught.value.file)
    assert len([one for one in hub.log() if one.origin == "cdn"]) == 1


@pytest.mark.parametrize("length", [0, 5, 8])
def test_files_too_short_for_a_header(hub: FakeHub, length: int) -> None:
    hub.add(
        "org/short", {"config.json": MADE.files["config.json"], "model.safetensors": b"\x10\0\0\0\0\0\0\0"[:length]}
    )
    with pytest.raises(HeaderError) as caught:
        scan(hub, "org/short")
    assert "model.safetensors" in str(caught.value.file)


@pytest.mark.parametrize("delta", [-2, 2, 4096])
def test_data_that_does_not_fill_the_file(hub: FakeHub, delta: int) -> None:
    name = MADE.shards[1]
    data, length = MADE.files[name]
    hub.add("org/hole", {**MADE.files, name: (data, length + delta)})  # type: ignore[operator, dict-item]
    one_file_refused(lambda: scan(hub, "org/hole"), name)


def test_not_json_at_all(hub: FakeHub) -> None:
    name = MADE.shards[0]
    hub.add("org/text", {**MADE.files, name: ((2000).to_bytes(8, "little") + b"<html>" * 400, 10_000)})
    one_file_refused(lambda: scan(hub, "org/text"), name)


def test_a_tensor_in_two_shards_is_reported(hub: FakeHub) -> None:
    files: dict[str, Content] = {
        "config.json": MADE.files["config.json"],
        shard_name(1, 2): header([("model.norm.weight", "BF16", [64]), ("model.embed_tokens.weight", "BF16", [9, 64])]),
        shard_name(2, 2): header([("model.norm.weight", "BF16", [64]), ("lm_head.weight", "BF16", [9, 64])]),
    }
    hub.add("org/twice", files)
    report = scan(hub, "org/twice")
    assert any("model.norm.weight" in one for one in report["warnings"]), report["warnings"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_missing_shard_is_reported(hub: FakeHub, which: int) -> None:
    hub.add("org/missing", MADE.without(MADE.shards[which]))
    one_file_refused(lambda: scan(hub, "org/missing"), MADE.shards[which])


def test_no_weights_that_can_be_scanned(hub: FakeHub) -> None:
    hub.add("org/bins", {"config.json": MADE.files["config.json"], "pytorch_model.bin": b"pickle"})
    with pytest.raises(MoecoreError, match="safetensors"):
        scan(hub, "org/bins")
    assert resolves(hub.log(), ".bin") == []


def test_a_repo_without_a_config_still_gives_its_bytes(hub: FakeHub) -> None:
    hub.add("org/bare", MADE.without("config.json"))
    report = scan(hub, "org/bare")
    assert report["status"] in ("ok", "partial")
    assert report["bytes"]["total"] == MADE.total
    assert report["kv_cache"]["status"] == "unknown"
    assert report["kv_cache"]["reason"]
    assert resolves(hub.log(), "config.json") == [], "the listing says that there is none"


@pytest.mark.parametrize("text", [b"", b"<html>", b"[]", b'{"num_hidden_layers": "many"}', b'{"a":' * 10_000])
def test_a_broken_config_never_loses_the_bytes(hub: FakeHub, text: bytes) -> None:
    hub.add("org/broken", {**MADE.files, "config.json": text})
    report = scan(hub, "org/broken")
    assert report["status"] in ("ok", "partial")
    assert report["bytes"]["total"] == MADE.total
    assert report["kv_cache"]["status"] == "unknown"


def test_a_huge_config_is_not_read_to_the_end(hub: FakeHub) -> None:
    hub.add("org/fat", {**MADE.files, "config.json": (b'{"a":"', 10**9)})
    report = scan(hub, "org/fat")
    assert report["bytes"]["total"] == MADE.total
    assert sum(one.sent for one in resolves(hub.log(), "config.json")) < 100_000_000
