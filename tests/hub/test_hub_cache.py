"""What a second scan costs, what the cache survives and keeps, and scans without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import moecore
import pytest
from fakehub import FakeHub
from hubdata import command, json_lines, qwen3_moe, run_cli, write_folder, write_hub_cache
from hubscans import MADE, REPO, attempt, check, resolves, scan
from moecore import HubError, OfflineError

if TYPE_CHECKING:
    from pathlib import Path


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
