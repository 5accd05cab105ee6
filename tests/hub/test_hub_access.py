"""Revisions, private and gated repositories, and where the token goes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hubdata import qwen3_moe, run_cli
from hubscans import MADE, REPO, attempt, check, resolves, scan
from moecore import AccessError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from fakehub import FakeHub


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
