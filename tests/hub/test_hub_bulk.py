"""Scanning many repositories: one line each whatever happens, exit status, interruption and going on."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import moecore
import pytest
from fakehub import FakeHub
from hubdata import Made, claim, command, header, json_lines, qwen3_moe, run_cli, write_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GOOD = {f"org/good-{i:02d}": qwen3_moe(layers=1 + i % 4, experts=4 + i % 3, shards=1 + i % 5) for i in range(22)}

# What is wrong with each of these, and a word that its error has to have.
BAD = {
    "org/gated": "HF_TOKEN",
    "org/none": "org/none",
    "org/huge": "model.safetensors",
    "org/cut": "model.safetensors",
    "org/bins": "safetensors",
    "org/good-00@nosuch": "nosuch",
}
# These two never recover: it takes seconds until the retries are used up, so only one test has them.
LOST = {"org/down": "again", "org/dropped": "HF_ENDPOINT"}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def hub(server: FakeHub) -> FakeHub:
    """The fake hub with 22 good repositories and 6 that fail in their own ways."""
    server.reset()
    for name, made in GOOD.items():
        server.add(name, made.files)
    made = GOOD["org/good-00"]
    config = {"config.json": made.files["config.json"]}
    server.add("org/gated", made.files, gated=True)
    server.add("org/huge", {**config, "model.safetensors": claim(10**12, 2 * 10**12)})
    server.add("org/cut", {**config, "model.safetensors": (header([("a", "BF16", [100])])[0], 150)})
    server.add("org/bins", {**config, "pytorch_model.bin": b"pickle"})
    server.add("org/down", made.files)
    server.add("org/dropped", made.files)
    return server


def check(line: dict[str, Any], made: Made) -> None:
    assert (line["status"], line["error"]) == ("ok", None), line
    assert line["bytes"]["total"] == made.total
    assert line["bytes"]["routed_experts"] == made.routed


def check_all(lines: list[dict[str, Any]], bad: dict[str, str] = BAD) -> None:
    """Every target has its one line: the good ones their figures, the bad ones an error that says something."""
    by_target = {line["requested"]: line for line in lines}
    assert len(lines) == len(by_target) == len(GOOD) + len(bad)
    for name, made in GOOD.items():
        check(by_target[name], made)
    for name, word in bad.items():
        line = by_target[name]
        assert line["status"] == "error", line
        assert word in line["error"], line["error"]
        assert "\n" not in line["error"]
        assert "Traceback" not in line["error"]


def mixed(bad: dict[str, str] = BAD) -> list[str]:
    """Good and bad targets in turn."""
    targets = list(GOOD)
    for i, name in enumerate(bad):
        targets.insert(3 * i, name)
    return targets


# -------------------------------------------------------------------------------------------------------- as a library


def test_scan_many_yields_one_report_for_each_target(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECORE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    reports = moecore.scan_many(mixed(), jobs=4, endpoint=hub.url)
    check_all([report.to_dict() for report in reports])


def test_scan_many_yields_as_they_complete(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECORE_CACHE", str(tmp_path))
    hub.fault("/org/good-00/.*config", "slow", piece=200, pause=0.3, origin="hub")
    reports = moecore.scan_many(list(GOOD), jobs=4, endpoint=hub.url)
    names = [report.to_dict()["target"] for report in reports]
    assert sorted(names) == sorted(GOOD)
    assert names.index("org/good-00") > 5, "the slow first one does not hold up the others"


def test_scan_many_may_be_given_up(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECORE_CACHE", str(tmp_path))
    hub.settings(latency_ms=50)
    start = time.monotonic()
    for _ in moecore.scan_many(list(GOOD) * 20, jobs=2, endpoint=hub.url, cache=False):
        break
    assert time.monotonic() - start < 10
    time.sleep(0.3)
    hub.clear()
    time.sleep(0.5)
    assert len(hub.log()) < 5, "nobody goes on scanning"


def test_scan_many_of_nothing() -> None:
    assert list(moecore.scan_many([])) == []


def test_the_same_target_twice(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECORE_CACHE", str(tmp_path))
    reports = list(moecore.scan_many(["org/good-01", "org/good-02", "org/good-01"], endpoint=hub.url))
    assert sorted(report.to_dict()["target"] for report in reports)[:1] == ["org/good-01"]
    for report in reports:
        check(report.to_dict(), GOOD[report.to_dict()["target"]])


# --------------------------------------------------------------------------------------------------- as a command line


def test_thirty_repos_of_which_some_fail(hub: FakeHub, tmp_path: Path) -> None:
    hub.fault("/org/down/", "status", status=500, count=-1)
    hub.fault("/org/dropped/", "drop", count=-1)
    bad = {**BAD, **LOST}
    targets = mixed(bad)
    (tmp_path / "repos.txt").write_text("# the list\n\n" + "\n".join(targets[2:]) + "\n")
    args = ["scan", *targets[:2], "--from-file", "repos.txt", "--format", "jsonl", "--jobs", "6"]
    done = run_cli(args, hub.env(tmp_path), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    check_all(json_lines(done.stdout), bad)
    assert "Traceback" not in done.stderr


def test_all_well_is_status_0(hub: FakeHub, tmp_path: Path) -> None:
    done = run_cli(["scan", *GOOD, "--format", "jsonl"], hub.env(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {line["target"] for line in json_lines(done.stdout)} == set(GOOD)


@pytest.mark.parametrize(
    "args",
    [
        ["scan"],
        ["scan", "org/good-01", "--format", "xml"],
        ["scan", "org/good-01", "--jobs", "0"],
        ["scan", "org/good-01", "--no-such-flag"],
        ["scan", "--from-file", "nosuch.txt"],
        ["nosuch"],
        ["scan", "org/good-01", "--resume"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_status_2(hub: FakeHub, tmp_path: Path, args: list[str]) -> None:
    done = run_cli(args, hub.env(tmp_path), cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert hub.log() == []


@pytest.mark.parametrize("target", ["a/b/c", "org/na me", "org/..", "../x", "@main", "org/name@", "-", ""])
def test_targets_that_are_none(hub: FakeHub, tmp_path: Path, target: str) -> None:
    done = run_cli(["scan", "--format", "jsonl", "--", target], hub.env(tmp_path), cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert hub.log() == []


def test_output_is_clean_when_piped(hub: FakeHub, tmp_path: Path) -> None:
    env = hub.env(tmp_path)
    one = run_cli(["scan", "org/good-03", "--format", "json"], env)
    check(json.loads(one.stdout), GOOD["org/good-03"])
    names = ["org/good-03", "org/good-04", "org/none"]
    done = run_cli(["scan", *names, "--format", "json"], env)
    parsed = json.loads(done.stdout)
    assert [line["target"] for line in parsed] == names
    assert done.returncode == 1
    lines = run_cli(["scan", *names, "--format", "jsonl"], env)
    assert {line["target"] for line in json_lines(lines.stdout)} == set(names)
    rows = list(csv.DictReader(io.StringIO(run_cli(["scan", *names, "--format", "csv"], env).stdout)))
    assert [row["target"] for row in rows] == names or {row["target"] for row in rows} == set(names)
    good = next(row for row in rows if row["target"] == "org/good-03")
    assert str(GOOD["org/good-03"].total) in good.values()
    for run in (one, done, lines):
        assert "\x1b" not in run.stdout + run.stderr


def test_a_table_when_piped(hub: FakeHub, tmp_path: Path) -> None:
    done = run_cli(["scan", "org/good-03"], hub.env(tmp_path))
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "org/good-03" in done.stdout


def test_one_failing_target_is_one_line_and_status_1(hub: FakeHub, tmp_path: Path) -> None:
    done = run_cli(["scan", "org/none"], hub.env(tmp_path))
    assert done.returncode == 1
    assert "org/none" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_fail_fast(hub: FakeHub, tmp_path: Path) -> None:
    targets = ["org/good-01", "org/none", *list(GOOD)[2:]]
    done = run_cli(["scan", *targets, "--format", "jsonl", "--jobs", "1", "--fail-fast"], hub.env(tmp_path))
    assert done.returncode == 1
    lines = json_lines(done.stdout)
    assert [line["target"] for line in lines if line["status"] == "error"] == ["org/none"]
    assert len(lines) < 6, "the rest is left out"


def test_output_file(hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run_cli(["scan", *mixed(), "--format", "jsonl", "--output", str(out)], hub.env(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    check_all(json_lines(out.read_text()))


def test_local_and_hub_targets_together(hub: FakeHub, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "local", GOOD["org/good-05"].files)
    done = run_cli(["scan", str(folder), "org/good-06", "--format", "jsonl"], hub.env(tmp_path))
    assert done.returncode == 0, done.stderr
    by_source = {line["source"]: line for line in json_lines(done.stdout)}
    check(by_source["local"], GOOD["org/good-05"])
    check(by_source["hub"], GOOD["org/good-06"])


def test_a_reader_that_goes_away(hub: FakeHub, tmp_path: Path) -> None:
    args = command("scan", *GOOD, "--format", "jsonl", "--jobs", "1")
    env = hub.env(tmp_path)
    running = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stderr is not None
    json.loads(running.stdout.readline())
    running.stdout.close()
    errors = running.stderr.read()
    running.wait(30)
    running.stderr.close()
    assert "Traceback" not in errors
    assert running.returncode != 0


# ------------------------------------------------------------------------------------------------ rate limits, in bulk


def test_a_quota_holds_up_but_fails_nobody(hub: FakeHub, tmp_path: Path) -> None:
    hub.settings(quota=(60, 1.0))
    done = run_cli(["scan", *GOOD, "--format", "jsonl", "--jobs", "8"], hub.env(tmp_path))
    assert done.returncode == 0, done.stdout
    for line in json_lines(done.stdout):
        check(line, GOOD[line["target"]])
    log = [one for one in hub.log() if one.origin == "hub"]
    refused = [one.status for one in log].count(429)
    assert refused < len(log) / 2, "one refusal stops the whole host"


def test_retry_after_stops_all_repos(hub: FakeHub, tmp_path: Path) -> None:
    hub.settings(latency_ms=10)
    hub.fault("/org/good-07/resolve/.*safetensors", "status", status=429, headers={"Retry-After": "2"})
    done = run_cli(["scan", *GOOD, "--format", "jsonl", "--jobs", "8"], hub.env(tmp_path))
    assert done.returncode == 0, done.stdout
    log = hub.log()
    first = next(one for one in log if one.status == 429)
    during = [one for one in log if one.origin == "hub" and first.time + 0.25 < one.time < first.time + 1.9]
    assert during == [], [(round(one.time - first.time, 3), one.path) for one in during]


# ---------------------------------------------------------------------------------------------- interruption, going on


def interrupted(hub: FakeHub, tmp_path: Path, out: Path, after: int) -> subprocess.CompletedProcess[str]:
    """A run that gets Ctrl-C when `after` lines are in its output."""
    args = command("scan", *GOOD, "--format", "jsonl", "--jobs", "2", "--output", str(out))
    running = subprocess.Popen(
        args, env=hub.env(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and running.poll() is None:
        if out.exists() and out.read_bytes().count(b"\n") >= after:
            break
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    start = time.monotonic()
    stdout, stderr = running.communicate(timeout=20)
    assert time.monotonic() - start < 5, "Ctrl-C is heard at once"
    return subprocess.CompletedProcess(args, running.returncode, stdout, stderr)


def test_ctrl_c_leaves_lines_that_resume_goes_on_from(hub: FakeHub, tmp_path: Path) -> None:
    hub.settings(latency_ms=40)
    out = tmp_path / "out.jsonl"
    done = interrupted(hub, tmp_path, out, after=5)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    text = out.read_text()
    assert text.endswith("\n")
    finished = json_lines(text)
    assert 5 <= len(finished) < len(GOOD)
    assert all(line["status"] == "ok" for line in finished), "what was cut short is left out, not an error"

    hub.settings()
    hub.clear()
    empty_cache(tmp_path)  # so that the log tells what was scanned again
    again = run_cli(["scan", *GOOD, "--format", "jsonl", "--output", str(out), "--resume"], hub.env(tmp_path))
    assert again.returncode == 0, again.stderr
    assert out.read_text().startswith(text), "what was there stays"
    lines = json_lines(out.read_text())
    assert sorted(line["target"] for line in lines) == sorted(GOOD)
    for line in lines:
        check(line, GOOD[line["target"]])
    for line in finished:
        assert not any(f"/{line['target']}/" in one.path + "/" for one in hub.log()), "done is done"


def empty_cache(tmp_path: Path) -> None:
    """Forgets all parsed headers."""
    for path in sorted((tmp_path / "moecore").rglob("*"), reverse=True):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize("tail", [b'{"schema":"moecore.scan/1","target":"org/good-0', b"{"])
def test_resume_tolerates_a_broken_last_line(hub: FakeHub, tmp_path: Path, tail: bytes) -> None:
    out = tmp_path / "out.jsonl"
    first = list(GOOD)[:3]
    assert run_cli(["scan", *first, "--format", "jsonl", "--output", str(out)], hub.env(tmp_path)).returncode == 0
    whole = out.read_bytes()
    out.write_bytes(whole + tail)
    done = run_cli(["scan", *list(GOOD)[:6], "--format", "jsonl", "--output", str(out), "--resume"], hub.env(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = json_lines(out.read_text())
    assert sorted(line["target"] for line in lines) == list(GOOD)[:6]


def test_resume_tries_the_failed_ones_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.fault("/org/good-02/", "status", status=403, count=-1)
    out = tmp_path / "out.jsonl"
    args = ["scan", *mixed(), "--format", "jsonl", "--output", str(out)]
    assert run_cli(args, hub.env(tmp_path)).returncode == 1
    hub.unfault()
    hub.clear()
    done = run_cli([*args, "--resume"], hub.env(tmp_path))
    assert done.returncode == 1
    last = {line["requested"]: line for line in json_lines(out.read_text())}
    assert {name for name, line in last.items() if line["status"] == "error"} == set(BAD)
    assert not any("/org/good-01/" in one.path + "/" for one in hub.log())


def test_resume_with_nothing_left_to_do(hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    args = ["scan", *GOOD, "--format", "jsonl", "--output", str(out)]
    assert run_cli(args, hub.env(tmp_path)).returncode == 0
    text = out.read_text()
    hub.clear()
    assert run_cli([*args, "--resume"], hub.env(tmp_path)).returncode == 0
    assert out.read_text() == text
    assert hub.log() == []


def test_ctrl_c_without_an_output_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.settings(latency_ms=100)
    args = command("scan", *GOOD, "--format", "jsonl", "--jobs", "2")
    running = subprocess.Popen(
        args, env=hub.env(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    first = running.stdout.readline()
    os.kill(running.pid, signal.SIGINT)
    rest, errors = running.communicate(timeout=20)
    json_lines(first + rest)
    assert "Traceback" not in errors
    assert running.returncode != 0


def test_a_repeat_of_many_costs_one_request_each(hub: FakeHub, tmp_path: Path) -> None:
    args = ["scan", *GOOD, "--format", "jsonl"]
    first = run_cli(args, hub.env(tmp_path))
    hub.clear()
    again = run_cli(args, hub.env(tmp_path))
    assert len(hub.log()) == len(GOOD)

    def figures(text: str) -> dict[str, Any]:
        return {line["target"]: {**line, "cost": None} for line in json_lines(text)}

    assert figures(again.stdout) == figures(first.stdout)
