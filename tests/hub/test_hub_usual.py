"""Scanning one repository over a fake hub: what it costs, and what the report says."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import moecore
from hubdata import header, qwen3_moe, write_folder
from hubscans import FIRST_RANGE, MADE, REPO, check, resolves, scan, shard_requests, widen

if TYPE_CHECKING:
    from fakehub import FakeHub


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
    tool = [sys.executable, str(Path(__file__).parents[1] / "fakehub"), "--repo", f"{REPO}={folder}", "--until-eof"]
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
