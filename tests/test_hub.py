"""Scanning one repository over a fake hub: what it costs, what it survives, what it refuses, what it keeps.

The fake hub is a real server process with its own log (`fakehub.py`): the tests believe that log, not the report.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import pytest
from fakehub import FakeHub, Request
from hubdata import (
    Made,
    claim,
    command,
    header,
    json_lines,
    qwen3_moe,
    run_cli,
    shard_name,
    write_folder,
    write_hub_cache,
)
from moecore import (
    AccessError,
    HeaderError,
    HubError,
    MoecoreError,
    NetworkError,
    NotFoundError,
    OfflineError,
    RateLimitError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakehub import Content

MADE = qwen3_moe()
REPO = "org/moe"
FIRST_RANGE = 100_001  # what the tool that we are compared with asks for; we ask for no more


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The fake hub with one good repository, and a cache folder and environment of the test's own."""
    server.reset()
    server.add(REPO, MADE.files)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setenv("MOECORE_CACHE", str(tmp_path / "headers"))
    return server


def scan(hub: FakeHub, target: str = REPO, **more: Any) -> dict[str, Any]:
    """One scan as the JSON that users get."""
    return dict(moecore.scan(target, endpoint=hub.url, **more).to_dict())


def check(report: dict[str, Any], made: Made = MADE, status: str = "ok") -> None:
    """The figures are those that follow from the shapes."""
    assert (report["status"], report["error"]) == (status, None), report
    assert report["bytes"]["total"] == made.total
    assert report["bytes"]["routed_experts"] == made.routed
    assert report["bytes"]["base"] == made.total - made.routed


def attempt(call: Callable[[], Any]) -> tuple[dict[str, Any] | None, MoecoreError | None]:
    """The report or the error of a scan that may end in either."""
    try:
        report = call()
    except MoecoreError as error:
        return None, error
    return report if isinstance(report, dict) else report.to_dict(), None


def one_file_refused(call: Callable[[], Any], name: str) -> None:
    """A file that cannot be used is named, and what the others say is kept."""
    report, error = attempt(call)
    assert error is None
    assert report is not None
    assert report["status"] == "partial"
    assert name in report["error"]
    assert 0 < report["bytes"]["total"] < MADE.total


def shard_requests(log: list[Request]) -> list[Request]:
    return [one for one in log if ".safetensors" in one.path.split("?")[0] or one.origin == "cdn"]


def resolves(log: list[Request], name: str = "") -> list[Request]:
    return [one for one in log if one.origin == "hub" and "/resolve/" in one.path and name in one.path]


# --------------------------------------------------------------------------------------------------- the server itself


def ask(url: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("GET", path, headers={key.replace("_", "-"): value for key, value in headers.items()})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), body


def test_the_fake_hub_signs_and_checks_its_urls(hub: FakeHub) -> None:
    name = MADE.shards[0]
    status, headers, _ = ask(hub.url, f"/{REPO}/resolve/main/{name}")
    assert status == 302
    path = headers["Location"].removeprefix(hub.cdn)
    status, headers, body = ask(hub.cdn, path, Range="bytes=0-7")
    length = MADE.files[name][1]
    assert (status, headers["Content-Range"], len(body)) == (206, f"bytes 0-7/{length}", 8)
    assert ask(hub.cdn, path, Range=f"bytes={length}-")[0] == 416
    assert ask(hub.cdn, path, Authorization="Bearer hf_x")[0] == 400
    assert ask(hub.cdn, path.replace("Signature=", "Signature=0"))[0] == 403


def test_the_fake_hub_serves_folders_by_itself(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "repo", MADE.files)
    tool = [sys.executable, str(Path(__file__).with_name("fakehub.py")), "--repo", f"{REPO}={folder}", "--until-eof"]
    with subprocess.Popen(tool, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        check(dict(moecore.scan(REPO, endpoint=json.loads(running.stdout.readline())["hub"], cache=False).to_dict()))
        running.communicate(b"")


# ------------------------------------------------------------------------------------------------------ the usual case


def test_one_request_for_the_commit_one_for_the_config_one_for_each_shard(hub: FakeHub) -> None:
    report = scan(hub)
    check(report)
    log = hub.log()
    assert [one.method for one in log] == ["GET"] * len(log)
    assert len([one for one in log if one.path.startswith("/api/")]) == 1
    assert len(resolves(log, "config.json")) == 1
    assert sorted(one.path.rsplit("/", 1)[-1] for one in resolves(log, ".safetensors")) == MADE.shards
    assert len([one for one in log if one.origin == "cdn"]) == len(MADE.shards)
    assert len(log) == 2 + 2 * len(MADE.shards), "nothing else is fetched, the index file neither"
    assert all(one.range for one in shard_requests(log))


def test_the_report_says_where_from_and_at_what_cost(hub: FakeHub) -> None:
    sha = hub.add(REPO, MADE.files)
    report = scan(hub)
    assert (report["schema"], report["target"], report["source"]) == ("moecore.scan/1", REPO, "hub")
    assert report["revision"] == sha
    cost, log = report["cost"], hub.log()
    assert cost["header_bytes"] in (MADE.headers, MADE.headers - 8 * len(MADE.shards))
    assert cost["requests"] in (2 + len(MADE.shards), len(log)), "redirects may count or not, nothing may be left out"
    assert 0 < cost["seconds"] < 30
    fetched = sum(one.sent for one in log if one.status in (200, 206) and "/api/" not in one.path)
    whole = sum(one.sent for one in log)
    assert fetched <= cost["bytes_fetched"] <= whole


def test_figures_follow_from_the_shapes(hub: FakeHub) -> None:
    report = scan(hub)
    # 2 layers x 8 experts x 3 projections x 64 x 32 x 2 bytes; one expert over one layer: 3 x 64 x 32 x 2
    assert report["bytes"]["routed_experts"] == 2 * 8 * 3 * 64 * 32 * 2
    assert report["bytes"]["per_expert"] == 3 * 64 * 32 * 2
    assert report["parameters"]["total"] == MADE.total // 2
    # a token skips 6 of 8 experts in both layers
    assert report["parameters"]["active"] == (MADE.total - MADE.routed * 6 // 8) // 2
    # K and V of 2 layers x 2 heads x 16 x 2 bytes for 1,024 tokens
    assert report["kv_cache"]["status"] == "exact"
    assert report["kv_cache"]["bytes"] == 2 * 2 * 2 * 16 * 2 * 1024
    assert report["architecture"] == report["architecture"] | {
        "model_type": "qwen3_moe", "layers": 2, "moe_layers": 2, "num_experts": 8, "experts_per_token": 2,
    }  # fmt: skip
    assert report["unrecognised"] == []


def test_a_config_behind_a_relative_redirect(hub: FakeHub) -> None:
    hub.settings(small="redirect")
    check(scan(hub))
    assert [one.status for one in resolves(hub.log(), "config.json")] == [307]


def test_single_file_repo(hub: FakeHub) -> None:
    made = qwen3_moe(shards=1)
    hub.add("org/single", made.files)
    check(scan(hub, "org/single"), made)
    assert len(shard_requests(hub.log())) == 2


def test_small_headers_are_not_overfetched(hub: FakeHub) -> None:
    hub.add("org/big", {name: widen(content) for name, content in MADE.files.items()})
    scan(hub, "org/big")
    ranged = [one for one in hub.log() if one.origin == "cdn"]
    assert max(one.sent for one in ranged) <= FIRST_RANGE


def widen(content: Any) -> Any:
    """A shard like the given one with 2 GB of data behind its header."""
    if isinstance(content, bytes):
        return content
    text = json.loads(content[0][8:])
    last = max(one["data_offsets"][1] for name, one in text.items() if name != "__metadata__")
    text["padding.weight"] = {"dtype": "BF16", "shape": [10**9], "data_offsets": [last, last + 2 * 10**9]}
    data = json.dumps(text).encode()
    return len(data).to_bytes(8, "little") + data, 8 + len(data) + last + 2 * 10**9


def test_the_first_range_is_learnt_from_earlier_shards(hub: FakeHub) -> None:
    made = qwen3_moe(layers=48, experts=400, shards=40)  # 57,600 expert tensors: headers of about 170 KB
    hub.add("org/wide", made.files)
    report = scan(hub, "org/wide")
    check(report, made)
    ranged = [one for one in hub.log() if one.origin == "cdn"]
    assert len(ranged) <= len(made.shards) + 16, "only the shards that started before one was known ask twice"
    assert sum(one.sent for one in ranged) <= 1.6 * made.headers
    seen = {one.path.split("?")[0] for one in ranged[-10:]}
    assert len(seen) == 10, "each of the last shards took one request"


def test_paged_listings_are_read_to_the_end(hub: FakeHub) -> None:
    made = qwen3_moe(shards=20)
    hub.settings(page_size=10)
    hub.add("org/paged", made.files, siblings=False)
    check(scan(hub, "org/paged"), made)
    pages = [one for one in hub.log() if "/tree/" in one.path]
    assert len(pages) == 3, "23 files in pages of 10"
    assert len(resolves(hub.log(), ".safetensors")) == 20


def test_other_weights_beside_the_sharded_ones_are_left_alone(hub: FakeHub) -> None:
    more = {
        "consolidated.safetensors": header([("x", "BF16", [10])]),
        "original/model.safetensors": header([("y", "BF16", [10])]),
        "onnx/model.onnx": b"onnx",
        "pytorch_model.bin": b"pickle",
        "tokenizer.json": b"{}" * 1000,
    }
    hub.add("org/more", {**MADE.files, **more})
    report = scan(hub, "org/more")
    assert report["bytes"]["total"] == MADE.total
    fetched = {one.path.rsplit("/", 1)[-1] for one in resolves(hub.log())}
    assert fetched == {"config.json", *MADE.shards}


# ------------------------------------------------------------------------------------------------ revisions and tokens


def test_revisions(hub: FakeHub) -> None:
    other = qwen3_moe(layers=3)
    main = hub.add(REPO, MADE.files)
    branch = hub.add(REPO, other.files, revision="refs/pr/1")
    check(scan(hub), MADE)
    for given in ({"revision": "refs/pr/1"}, {"revision": branch}):
        report = scan(hub, **given)
        check(report, other)
        assert report["revision"] == branch
    report = scan(hub, f"{REPO}@refs/pr/1")
    check(report, other)
    assert report["revision"] == branch
    report = scan(hub, f"{REPO}@{main}")
    check(report, MADE)
    assert report["revision"] == main


def test_files_come_from_the_commit_that_was_resolved(hub: FakeHub) -> None:
    sha = hub.add(REPO, MADE.files)
    scan(hub)
    assert all(f"/resolve/{sha}/" in one.path for one in resolves(hub.log()))


def test_missing_revision(hub: FakeHub) -> None:
    with pytest.raises(NotFoundError, match="nosuch") as caught:
        scan(hub, revision="nosuch")
    assert "revision" in str(caught.value)
    assert resolves(hub.log()) == []


def test_missing_repo(hub: FakeHub) -> None:
    with pytest.raises(NotFoundError, match="org/none"):
        scan(hub, "org/none")
    with pytest.raises(NotFoundError, match="org/none"):
        scan(hub, "org/none", token="hf_good")


def test_private_repo(hub: FakeHub) -> None:
    hub.add("org/private", MADE.files, private=True, allow=["hf_good"])
    with pytest.raises((NotFoundError, AccessError), match=r"HF_TOKEN|token"):
        scan(hub, "org/private")
    check(scan(hub, "org/private", token="hf_good"))


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_gated_repo_says_what_to_do(hub: FakeHub, token: str | None) -> None:
    hub.add("org/gated", MADE.files, gated=True, allow=["hf_good"])
    with pytest.raises(AccessError, match=r"(?i)licen[cs]e|terms|access") as caught:
        scan(hub, "org/gated", token=token)
    assert "HF_TOKEN" in str(caught.value)
    assert "hf_other" not in str(caught.value)
    hub.clear()
    check(scan(hub, "org/gated", token="hf_good"))


def test_a_token_that_the_hub_does_not_know(hub: FakeHub) -> None:
    with pytest.raises(AccessError, match=r"(?i)token") as caught:
        scan(hub, token="hf_bad")
    assert "hf_bad" not in str(caught.value)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: FakeHub) -> None:
    hub.settings(small="redirect")
    check(scan(hub, token="hf_secret"))
    log = hub.log()
    assert {one.authorization for one in log if one.origin == "hub"} == {"Bearer hf_secret"}
    assert {one.authorization for one in log if one.origin == "cdn"} == {None}
    assert not any("hf_secret" in one.path + one.agent for one in log)


def test_the_token_does_not_follow_any_redirect_to_another_origin(hub: FakeHub) -> None:
    hub.fault("/resolve/.*config.json", "redirect", location="{cdn}/elsewhere", count=-1)
    hub.fault("/api/", "redirect", location="{cdn}/elsewhere", count=-1, skip=1)
    attempt(lambda: scan(hub, token="hf_secret"))
    attempt(lambda: scan(hub, token="hf_secret"))
    assert {one.authorization for one in hub.log() if one.origin == "cdn"} <= {None}


def test_no_token_means_no_header(hub: FakeHub) -> None:
    scan(hub)
    assert {one.authorization for one in hub.log()} == {None}


def test_environment_names_token_and_endpoint(hub: FakeHub, tmp_path: Path) -> None:
    env = hub.env(tmp_path, HF_TOKEN="hf_from_env")
    done = run_cli(["scan", REPO, "--format", "json"], env)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout))
    assert {one.authorization for one in hub.log() if one.origin == "hub"} == {"Bearer hf_from_env"}
    assert "hf_from_env" not in done.stdout + done.stderr


def test_token_file_of_the_hub_login(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_from_file\n")
    done = run_cli(["scan", REPO, "--format", "json"], hub.env(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {one.authorization for one in hub.log() if one.origin == "hub"} == {"Bearer hf_from_file"}


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


# --------------------------------------------------------------------------------------------------- servers that fail


@dataclass(frozen=True)
class Case:
    """One fault at one place: how often (-1: always), and whether the scan has to get over it."""

    kind: str
    params: dict[str, Any]
    place: str
    count: int
    want: str  # "figures": the right ones; "error": a typed one; "either" of these, and nothing else

    @property
    def name(self) -> str:
        params = "-".join(str(one)[:8] for one in self.params.values())
        return "-".join(filter(None, [self.kind, params, self.place, "always" if self.count < 0 else ""]))


@dataclass(frozen=True)
class Outcome:
    """How a case ended, and what the server saw of it."""

    report: dict[str, Any] | None
    error: Exception | None
    seconds: float
    log: list[Request]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("short", {"keep": 100}, "figures"),
    ("short", {"keep": 1}, "figures"),
    ("short", {}, "figures"),
    ("truncate", {"keep": 100}, "either"),
    ("truncate", {}, "either"),
    ("length", {"delta": 1000}, "either"),
    ("length", {"delta": -1000}, "either"),
    ("start", {"delta": 8}, "either"),
    ("no_range", {}, "either"),
    ("total", {"total": 123}, "either"),
    ("total", {"total": 10**7}, "either"),
    ("gzip", {}, "either"),
    ("chunked", {}, "figures"),
    ("slow", {"piece": 2000, "pause": 0.02}, "figures"),
    ("status", {"status": 403, "body": "<Error><Code>AccessDenied</Code></Error>"}, "figures"),
    ("drop_body", {"after": 3}, "figures"),
]
ANYWHERE = ("api", "config", "shard", "cdn")
CASES = [
    *(Case("status", {"status": status}, place, 2, "figures") for status in (500, 503, 408) for place in ANYWHERE),
    *(Case("drop", {"how": how}, place, 2, "figures") for how in ("reset", "close") for place in ANYWHERE),
    *(Case("drop_body", {}, place, 2, "figures") for place in ANYWHERE),
    *(Case("status", {"status": 500}, place, -1, "error") for place in ANYWHERE),
    *(Case("drop", {}, place, -1, "error") for place in ANYWHERE),
    *(Case("garbage", {}, place, -1, "error") for place in ANYWHERE),
    *(Case("body", {"body": "<html>log in to the hotel network</html>"}, place, -1, "error") for place in ANYWHERE),
    *(Case("redirect", {"location": "{cdn}/loop"}, place, -1, "error") for place in ("config", "shard")),
    *(Case("redirect", {"location": "{hub}{path}"}, place, -1, "error") for place in ANYWHERE),
    *(
        Case("redirect", {"location": to}, "shard", -1, "error")
        for to in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "")
    ),
    *(Case(kind, params, "cdn", 1, want) for kind, params, want in WRONG),
    *(Case(kind, params, "cdn", -1, "either") for kind, params, _ in WRONG),
    Case("expired", {}, "shard", 2, "figures"),
    Case("expired", {}, "shard", -1, "error"),
    *(
        Case("limit", {"status": 429, "headers": {"Retry-After": "0"}}, place, -1, "error")
        for place in ("api", "shard")
    ),
    Case("nobody listens", {}, "api", -1, "error"),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[int, Outcome]:
    """All cases at once, each on a repository of its own: most of the time goes into waiting before retries."""

    def run(number: int) -> Outcome:
        start = time.monotonic()
        call = partial(moecore.scan, name(number), endpoint=endpoints[number], token=False, cache=False)
        try:
            report, error = attempt(call)
        except Exception as surprise:  # the case's own test says so, and only that one
            report, error = None, surprise
        return Outcome(report, error, time.monotonic() - start, [])

    def name(number: int) -> str:
        return f"case/{number:03d}"

    with ExitStack() as stack:
        hubs = {"": stack.enter_context(FakeHub())}
        endpoints = []
        for number, case in enumerate(CASES):
            if case.kind == "nobody listens":
                endpoints.append("http://127.0.0.1:1")
                continue
            # A rate limit holds for a host: those that never end get a host of their own.
            own = case.name if case.kind == "limit" else ""
            hub = hubs.get(own) or hubs.setdefault(own, stack.enter_context(FakeHub()))
            endpoints.append(hub.url)
            hub.add(name(number), MADE.files, salt=name(number))
            pattern, origin = {
                "api": (f"^/api/models/{name(number)}(/|$|[?])", "hub"),
                "config": (f"^/{name(number)}/resolve/.*config[.]json", "hub"),
                "shard": (f"^/{name(number)}/resolve/.*[.]safetensors", "hub"),
                "cdn": (f"repo={name(number)}&", "cdn"),
            }[case.place]
            kind = "status" if case.kind == "limit" else case.kind
            hub.fault(pattern, kind, count=case.count, origin=origin, **case.params)
        with ThreadPoolExecutor(len(CASES)) as pool:
            found = list(pool.map(run, range(len(CASES))))
        log = [request for hub in hubs.values() for request in hub.log()]
    logs: list[list[Request]] = [[] for _ in CASES]
    for request in log:
        if match := re.search(r"\bcase/(\d{3})\b", request.path):
            logs[int(match[1])].append(request)
    return {i: replace(one, log=own) for i, (one, own) in enumerate(zip(found, logs, strict=True))}


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_a_fault_is_got_over_or_named(outcomes: dict[int, Outcome], number: int) -> None:
    case, outcome = CASES[number], outcomes[number]
    assert outcome.seconds < 40
    assert len(outcome.log) < 120, "retries and redirects have an end"
    if outcome.report is not None:
        report = outcome.report
        if case.place == "config" and case.count < 0:  # the weights are known: what they say is not lost
            assert report["status"] == "partial"
            assert report["warnings"] or report["error"]
            assert report["bytes"]["total"] == MADE.total
        elif report["status"] == "partial":
            assert case.want == "either", report["error"]
            assert "model-0000" in report["error"], "names the file"
        else:
            assert case.want != "error", "nothing can be read here"
            check(report)
        return
    text = str(outcome.error)
    assert isinstance(outcome.error, (HubError, HeaderError)), repr(outcome.error)
    assert case.want != "figures", text
    assert "Traceback" not in text
    assert "\n" not in text
    if case.place in ("shard", "cdn"):
        assert "model-0000" in str(outcome.error.file), "names the file"
    if case.kind == "limit":
        assert isinstance(outcome.error, RateLimitError)
        assert "HF_TOKEN" in text
    if case.kind in ("drop", "garbage", "nobody listens") or case.params.get("status") == 500:
        assert isinstance(outcome.error, NetworkError)
        assert "check" in text or "again" in text, "says what to do"


# --------------------------------------------------------------------------------------------------------- rate limits


def pause_kept(log: list[Request], pause: float) -> None:
    """No request reaches the hub's origin during the pause after the first 429; those under way may still arrive."""
    first = next(one for one in log if one.status == 429)
    during = [one for one in log if one.origin == "hub" and first.time + 0.2 < one.time < first.time + pause - 0.05]
    assert during == [], [(round(one.time - first.time, 3), one.path) for one in during]


LIMITS = [{"Retry-After": "1"}, {"RateLimit": '"resolve";r=0;t=1', "RateLimit-Policy": '"fixed window";q=500;w=300'}]


@pytest.mark.parametrize("headers", LIMITS, ids=["retry-after", "ratelimit"])
@pytest.mark.parametrize("pattern", ["/api/", "/resolve/.*config.json", "/resolve/.*safetensors"])
def test_a_rate_limit_is_waited_for(hub: FakeHub, pattern: str, headers: dict[str, str]) -> None:
    hub.fault(pattern, "status", status=429, headers=headers)
    check(scan(hub))
    pause_kept(hub.log(), 1.0)


def test_a_rate_limit_holds_for_the_whole_host(hub: FakeHub) -> None:
    made = qwen3_moe(layers=8, experts=16, shards=60)
    hub.add("org/many", made.files)
    hub.settings(latency_ms=20)
    hub.fault("/resolve/.*-00020-", "status", status=429, headers={"Retry-After": "2"})
    check(scan(hub, "org/many"), made)
    log = hub.log()
    pause_kept(log, 2.0)
    assert [one.status for one in log].count(429) == 1


def test_a_date_in_retry_after(hub: FakeHub) -> None:
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    hub.fault("/resolve/.*safetensors", "status", status=429, headers={"Retry-After": soon})
    check(scan(hub))


def test_a_quota_that_runs_out_and_comes_back(hub: FakeHub) -> None:
    made = qwen3_moe(layers=8, experts=16, shards=60)
    hub.add("org/many", made.files)
    hub.settings(quota=(25, 1.0))
    check(scan(hub, "org/many"), made)
    refused = [one.status for one in hub.log()].count(429)
    assert refused <= 60, "each of 60 may be refused once while the quota runs out, not again and again"


@pytest.mark.parametrize("pattern", ["/api/", "/resolve/.*safetensors"])
def test_a_rate_limit_of_an_hour_is_said_not_slept(hub: FakeHub, pattern: str) -> None:
    hub.fault(pattern, "status", status=429, headers={"Retry-After": "3600"}, count=-1)
    start = time.monotonic()
    with pytest.raises(RateLimitError, match=r"3600|60 min|1 h|hour"):
        scan(hub)
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------------------------------------- answers that are wrong


def test_200_for_206_costs_no_download(hub: FakeHub) -> None:
    files = {name: widen(content) for name, content in MADE.files.items()}
    hub.add("org/big", files)
    hub.fault("", "ignore_range", origin="cdn", count=-1)
    report = scan(hub, "org/big")
    assert report["bytes"]["total"] == MADE.total + 2 * 10**9 * len(MADE.shards)
    assert sum(one.sent for one in hub.log()) < 64_000_000, "6 GB were on offer"


def test_200_for_206_of_a_small_file(hub: FakeHub) -> None:
    hub.fault("", "ignore_range", origin="cdn", count=-1)
    check(scan(hub))


def test_a_signed_url_that_expires_between_two_ranges(hub: FakeHub) -> None:
    made = qwen3_moe(layers=24, experts=200, shards=2)  # headers of about 900 KB: a second range is needed
    hub.add("org/tail", made.files)
    hub.fault("", "status", origin="cdn", status=403, body="<Error><Code>AccessDenied</Code></Error>", skip=2)
    check(scan(hub, "org/tail"), made)


def test_nobody_asks_for_compression(hub: FakeHub) -> None:
    scan(hub)
    assert {one.accept_encoding for one in shard_requests(hub.log())} <= {"", "identity"}


# --------------------------------------------------------------------------------------------------------------- cache


def without_cost(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key != "cost"}


def test_a_repeat_scan_costs_one_request(hub: FakeHub) -> None:
    first = scan(hub)
    hub.clear()
    again = scan(hub)
    assert len(hub.log()) == 1
    assert without_cost(again) == without_cost(first)
    assert again["cost"]["requests"] == 1


def test_a_repeat_scan_with_other_options_costs_one_request_too(hub: FakeHub) -> None:
    scan(hub)
    hub.clear()
    report = scan(hub, max_model_len=2048, batch_size=3)
    assert len(hub.log()) == 1
    assert report["kv_cache"]["bytes"] == 3 * 2 * 2 * 2 * 16 * 2 * 2048


def test_a_new_commit_is_fetched(hub: FakeHub) -> None:
    scan(hub)
    other = qwen3_moe(layers=3)
    hub.add(REPO, other.files)
    hub.clear()
    check(scan(hub), other)
    assert len(resolves(hub.log(), ".safetensors")) == len(other.shards)


def test_a_branch_and_its_commit_share_the_cache(hub: FakeHub) -> None:
    report = scan(hub)
    hub.clear()
    check(scan(hub, revision=report["revision"]))
    assert len(hub.log()) <= 1


def test_without_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    scan(hub, cache=False)
    assert not list((tmp_path / "headers").rglob("*.*"))
    hub.clear()
    check(scan(hub, cache=False))
    assert len(resolves(hub.log(), ".safetensors")) == len(MADE.shards)


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flip"])
def test_a_damaged_cache_is_fetched_again(hub: FakeHub, tmp_path: Path, damage: str) -> None:
    scan(hub)
    files = [one for one in (tmp_path / "headers").rglob("*") if one.is_file()]
    assert files
    for path in files:
        data = path.read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]
        path.write_bytes({"empty": b"", "cut": data[:middle], "noise": os.urandom(len(data)), "flip": flipped}[damage])
    hub.clear()
    report = scan(hub)
    check(report)
    assert report["warnings"] == []
    assert len(resolves(hub.log(), ".safetensors")) == len(MADE.shards)
    hub.clear()
    scan(hub)
    assert len(hub.log()) == 1, "and the cache is whole again"


def test_a_damaged_cache_of_a_repo_whose_listing_is_paged(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/paged", MADE.files, siblings=False)
    scan(hub, "org/paged")
    hub.clear()
    check(scan(hub, "org/paged"))
    assert len(hub.log()) == 1
    for path in (tmp_path / "headers").rglob("*"):
        if path.is_file():
            path.write_bytes(b"noise")
    check(scan(hub, "org/paged"))


def test_a_cache_that_cannot_be_written(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MOECORE_CACHE", str(tmp_path / "file" / "headers"))
    check(scan(hub))


def test_a_failed_scan_leaves_nothing_half_written(hub: FakeHub, tmp_path: Path) -> None:
    hub.fault(MADE.shards[2], "status", status=404, origin="hub", count=-1)
    attempt(lambda: scan(hub))
    hub.unfault()
    check(scan(hub))
    assert not [one for one in (tmp_path / "headers").rglob("*") if "tmp" in one.name.lower()]


def test_the_cache_holds_no_token(hub: FakeHub, tmp_path: Path) -> None:
    scan(hub, token="hf_secret")
    for path in (tmp_path / "headers").rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes()


def test_the_cache_does_not_get_round_the_gate(hub: FakeHub) -> None:
    hub.add("org/private", MADE.files, private=True, allow=["hf_good"])
    check(scan(hub, "org/private", token="hf_good"))
    with pytest.raises(HubError):
        scan(hub, "org/private")


def test_two_hubs_do_not_share_a_cache_entry(hub: FakeHub) -> None:
    sha = "a" * 40
    hub.add("org/same", MADE.files, sha=sha)
    check(scan(hub, "org/same"))
    other = qwen3_moe(layers=3)
    with FakeHub() as second:
        second.add("org/same", other.files, sha=sha)
        check(scan(second, "org/same"), other)


def test_processes_may_share_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    args = command("scan", REPO, "--format", "json")
    env = hub.env(tmp_path)
    running = [subprocess.Popen(args, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for one in running:
        out, _ = one.communicate(timeout=60)
        assert one.returncode == 0
        check(json.loads(out))


# ------------------------------------------------------------------------------------------------------------- offline


def test_offline_reads_the_hub_cache(hub: FakeHub, tmp_path: Path) -> None:
    sha = "b" * 40
    write_hub_cache(tmp_path / "hf", REPO, sha, MADE.files)
    env = hub.env(tmp_path, HF_HUB_OFFLINE="1")
    for target in (REPO, f"{REPO}@main", f"{REPO}@{sha}"):
        done = run_cli(["scan", target, "--format", "json"], env)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        check(report)
        assert report["revision"] == sha
    assert hub.log() == []


def test_offline_without_the_cache_is_said(hub: FakeHub, tmp_path: Path) -> None:
    env = hub.env(tmp_path, HF_HUB_OFFLINE="1")
    done = run_cli(["scan", REPO, "--format", "json"], env)
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr + done.stdout
    assert hub.log() == []
    code = f"import moecore\ntry: moecore.scan({REPO!r})\nexcept moecore.OfflineError as e: print('typed', e)"
    done = subprocess.run([command()[0], "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("typed"), done.stderr
    assert issubclass(OfflineError, HubError)


def test_offline_with_part_of_the_hub_cache(hub: FakeHub, tmp_path: Path) -> None:
    snapshot = write_hub_cache(tmp_path / "hf", REPO, "b" * 40, MADE.files)
    (snapshot / MADE.shards[1]).unlink()
    done = run_cli(["scan", REPO, "--format", "jsonl"], hub.env(tmp_path, HF_HUB_OFFLINE="1"))
    (report,) = json_lines(done.stdout)
    assert report["status"] in ("partial", "error"), "a part is never taken for the whole"
    assert hub.log() == []


def test_offline_after_a_scan(hub: FakeHub, tmp_path: Path) -> None:
    assert run_cli(["scan", REPO, "--format", "json"], hub.env(tmp_path)).returncode == 0
    hub.clear()
    done = run_cli(["scan", REPO, "--format", "jsonl"], hub.env(tmp_path, HF_HUB_OFFLINE="1"))
    (report,) = json_lines(done.stdout)
    assert report["status"] in ("ok", "error")
    if report["status"] == "ok":
        check(report)
    assert hub.log() == []


def test_the_same_figures_from_a_folder(hub: FakeHub, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "repo", MADE.files)
    local = moecore.scan(str(folder)).to_dict()
    check(local)
    assert (local["source"], local["revision"]) == ("local", None)
    remote = scan(hub)
    for key in ("architecture", "parameters", "bytes", "kv_cache", "unrecognised"):
        assert local[key] == remote[key]
    hub.add_folder("org/folder", folder)
    check(scan(hub, "org/folder"))
    shutil.rmtree(folder)
