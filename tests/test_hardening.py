"""Hostile and unlucky input: odd targets, panics, damaged files to resume, full disks, control characters, cancels."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import stat
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import pytest
from hubdata import command, qwen3_moe, run_cli, write_folder
from moecore import hub as hub_module
from moecore import render, report
from moecore.cli import main
from moecore.scan import Options, Session, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

scan_module = importlib.import_module("moecore.scan")  # the package has a function of the same name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    return write_folder(tmp_path_factory.mktemp("model"), qwen3_moe().files)


@pytest.fixture(scope="module")
def good(folder: Path) -> moecore.ScanReport:
    """Its report."""
    return moecore.scan(folder)


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    "target", ["x" * 300, "/" + "x" * 300, "~nosuchuser/x", "a\0b", "", "  ", "https://[x/y", "\udc80"]
)
def test_odd_targets_are_target_errors(target: str) -> None:
    with pytest.raises(moecore.TargetError):
        moecore.scan(target)
    (failed,) = moecore.scan_many([target])
    assert (failed.status, failed.error_type) == ("error", "TargetError")


@pytest.mark.parametrize(
    ("address", "repo", "revision"),
    [
        ("https://huggingface.co/org/name", "org/name", "main"),
        ("https://hf.co/org/name/", "org/name", "main"),
        ("https://huggingface.co/org/name?library=x#top", "org/name", "main"),
        ("https://huggingface.co/org/name/tree/v1.0", "org/name", "v1.0"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", "org/name", "refs/pr/1"),
        ("https://huggingface.co/org/name/tree/refs/pr/1", "org/name", "refs/pr/1"),
        ("https://huggingface.co/gpt2/tree/main", "gpt2", "main"),
        ("https://huggingface.co/org/tree", "org/tree", "main"),
        ("https://huggingface.co/org/tree/tree/v2", "org/tree", "v2"),
        ("http://hub.example:8080/hf/org/name/tree/v2", "org/name", "v2"),
        ("hf://org/name@v3", "org/name", "v3"),
    ],
)
def test_pages_are_repos(address: str, repo: str, revision: str) -> None:
    target = Target.parse(address, endpoint="http://hub.example:8080/hf")
    assert (target.repo, target.revision, target.requested) == (repo, revision, address)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://example.com/org/name", "HF_ENDPOINT"),
        ("https://huggingface.co.example.com/org/name", "HF_ENDPOINT"),
        ("https://huggingface.co/datasets/org/name", "datasets"),
        ("https://huggingface.co/spaces/org/name", "spaces"),
        ("datasets/org/name", "datasets"),
        ("https://huggingface.co/org/name/tree/main/sub", "folder"),
        ("https://huggingface.co/org/name/blob/main/config.json", "neither"),
        ("https://huggingface.co/", "neither"),
    ],
)
def test_other_pages_are_refused(address: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(moecore.TargetError, match=told):
        Target.parse(address)


def test_the_endpoint_of_the_environment_is_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert Target.parse("https://mirror.example/org/name").repo == "org/name"


def test_a_page_and_an_option_that_differ_in_revision() -> None:
    with pytest.raises(moecore.TargetError, match="twice"):
        Target.parse("https://huggingface.co/org/name/tree/v1", "v2")


# -------------------------------------------------------------------------------------------------- panics and options


class PanicException(BaseException):
    """As the bindings raise it."""


class Panicking:
    """A scanner with a bug."""

    @staticmethod
    def scan_local(**_: object) -> str:
        raise PanicException("index out of bounds")


def test_a_panic_fails_one_target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Options())
    monkeypatch.setattr(scan_module, "Scanner", Panicking)
    failed = session.attempt(folder)
    assert failed.status == "error"
    assert str(folder) in (failed.error or "")
    assert "internal error: index out of bounds" in (failed.error or "")


def test_an_interrupt_is_no_panic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: object) -> str:
        raise KeyboardInterrupt

    session = Session(Options())
    monkeypatch.setattr(Panicking, "scan_local", interrupt)
    monkeypatch.setattr(scan_module, "Scanner", Panicking)
    with pytest.raises(KeyboardInterrupt):
        session.attempt(folder)


def test_a_failure_of_the_failure_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Options())

    def surprise(*_: object) -> Target:
        raise RuntimeError("surprise")

    monkeypatch.setattr(Target, "parse", surprise)
    failed = session.attempt("org/name")
    assert (failed.status, failed.source, failed.error) == ("error", "local", "org/name: RuntimeError: surprise")


@pytest.mark.parametrize("value", [-1, 0, 2**40 + 1, 2**70])
@pytest.mark.parametrize("name", ["batch_size", "max_model_len"])
def test_counts_out_of_range(folder: Path, name: str, value: int) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(moecore.TargetError, match=f"{name} must be between 1 and 2\\^40"):
        moecore.scan(folder, **options)
    with pytest.raises(moecore.TargetError, match=name):
        moecore.scan_many([folder], **options)


# -------------------------------------------------------------------------------------------------------------- resume


def resume(folder: Path, out: Path) -> int:
    return main(["scan", str(folder), "--format", "jsonl", "--output", str(out), "--resume"])


CUT = [
    b"{",
    b'{"schema":"moecore.sc',
    b'{"schema":"moecore.scan/1","target":"x',
    b'{"schema":"moecore.scan/1","target":"\xc3',
]


@pytest.mark.parametrize("tail", CUT)
def test_a_line_cut_short_is_scanned_again(good: moecore.ScanReport, folder: Path, tmp_path: Path, tail: bytes) -> None:
    out = tmp_path / "out.jsonl"
    line = replace(good, requested="org/other").to_json().encode() + b"\n"
    out.write_bytes(line + tail)
    assert resume(folder, out) == 0
    assert out.read_bytes().startswith(line)
    assert [json.loads(one)["requested"] for one in out.read_bytes().splitlines()] == ["org/other", str(folder)]


@pytest.mark.parametrize(
    "tail",
    [
        b'"x"\n', b"{\n", b'{"schema":"moecore.scan/1","tar\n', b"\n", b"\0\0\0", b"notes", b'{"a":1}', b"\xff\xfe",
        b'{"schema":"moecore.scan/1","target":["x"],"status":"ok"}\n', b"[" * 200_000 + b"\n",
    ],
    ids=lambda tail: repr(tail[:20]),
)  # fmt: skip
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_no_report_is_left_alone(
    good: moecore.ScanReport, folder: Path, tmp_path: Path, tail: bytes, alone: bool
) -> None:
    out = tmp_path / "notes.jsonl"
    whole = tail if alone else good.to_json().encode() + b"\n" + tail
    out.write_bytes(whole)
    assert resume(folder, out) == 2
    assert out.read_bytes() == whole


def test_lines_end_with_newlines_only(good: moecore.ScanReport, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    odd = replace(good, requested="a\u2028b\x85c", warnings=["\u2028"])
    assert odd.to_json().isascii()
    # Other writers need not escape.
    whole = json.dumps(odd.to_dict(), separators=(",", ":"), ensure_ascii=False).encode()
    out.write_bytes(whole)
    assert resume(folder, out) == 0
    assert out.read_bytes().startswith(whole + b"\n")


def test_resume_of_what_cannot_be_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(folder, tmp_path) == 2
    assert resume(folder, Path("/dev/null")) == 2
    assert "not a file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["table", "json", "jsonl", "csv"])
def test_names_that_are_no_text(tmp_path: Path, kind: str) -> None:
    name = os.fsdecode(b"./no\xffname")
    out = tmp_path / "out"
    assert main(["scan", name, name + "2", "--format", kind, "--output", str(out)]) == 1
    assert "udcff" in out.read_text()
    done = run_cli(["scan", name, name + "2", "--format", kind], dict(os.environ))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("kind", ["table", "json", "jsonl", "csv"])
def test_a_folder_is_refused_before_any_scan(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Session, "scan", lambda *_: pytest.fail("scanned"))
    assert main(["scan", str(folder), "--format", kind, "--output", str(tmp_path)]) == 2
    assert "a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250])
def test_long_names_of_outputs(folder: Path, tmp_path: Path, name: str) -> None:
    fits = len(name) < 256
    for kind in ("json", "jsonl"):
        assert main(["scan", str(folder), "--format", kind, "--output", str(tmp_path / name)]) == (0 if fits else 2)
        assert [path.name for path in tmp_path.iterdir()] == ([name] if fits else [])


def test_nothing_is_left_when_the_rename_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert main(["scan", str(folder), "--format", "json", "--output", str(tmp_path / "out.json")]) == 2
    assert "cannot be written: Permission denied" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real/out.json")
    assert main(["scan", str(folder), "--format", "json", "--output", str(link)]) == 0
    assert link.is_symlink()
    assert json.loads((tmp_path / "real/out.json").read_text())["status"] == "ok"
    assert len(list((tmp_path / "real").iterdir())) == 1


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_pipe_is_written_to(folder: Path, tmp_path: Path, kind: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert main(["scan", str(folder), "--format", kind, "--output", str(pipe)]) == 0
    reader.join(10)
    assert json.loads(read[0])["status"] == "ok"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert len(list(tmp_path.iterdir())) == 1


def test_dev_stdout_and_dev_null(folder: Path) -> None:
    for device in ("/dev/stdout", "/dev/null"):
        done = run_cli(["scan", str(folder), "--format", "json", "--output", device], dict(os.environ))
        assert done.returncode == 0, done.stderr
        assert bool(done.stdout) == (device == "/dev/stdout")
    assert Path("/dev/null").is_char_device()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("kind", ["table", "json", "jsonl", "csv"])
def test_a_full_disk_is_one_line(folder: Path, kind: str) -> None:
    done = run_cli(["scan", str(folder), "--format", kind, "--output", "/dev/full"], dict(os.environ))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "No space left" in done.stderr
    with Path("/dev/full").open("w") as full:
        args = command("scan", str(folder), "--format", kind)
        shown = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (shown.returncode, shown.stderr.count("\n")) == (2, 1), shown.stderr
    assert "standard output: cannot be written: No space left" in shown.stderr


# ------------------------------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.parametrize("kind", ["table", "json", "csv"])
def test_ctrl_c_writes_what_was_scanned(
    good: moecore.ScanReport, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def broken_off(*_: object, **__: object) -> Iterator[moecore.ScanReport]:
        yield replace(good, target="org/a", requested="org/a")
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "scan_many", broken_off)
    out = tmp_path / "out"
    assert main(["scan", "org/a", "org/b", "org/c", "--format", kind, "--output", str(out)]) == 130
    assert "interrupted after 1 of 3 targets" in capsys.readouterr().err
    text = out.read_text()
    if kind == "json":
        assert [one["target"] for one in json.loads(text)] == ["org/a"]
    elif kind == "csv":
        assert [row["target"] for row in csv.DictReader(io.StringIO(text))] == ["org/a"]
    assert "org/a" in text


def test_ctrl_c_before_the_first_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(*_: object, **__: object) -> Iterator[moecore.ScanReport]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Session, "scan_many", broken_off)
    out = tmp_path / "out.json"
    out.write_text("before")
    assert main(["scan", "org/a", "--format", "json", "--output", str(out)]) == 130
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]


# ------------------------------------------------------------------------------------------------------------- display


def test_control_characters_are_shown_not_sent(good: moecore.ScanReport, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x07\u202e\n[red]"
    assert good.architecture is not None
    assert good.bytes is not None
    assert good.kv_cache is not None
    shown = replace(
        good,
        target="t" + evil,
        revision="r" + evil,
        error="e" + evil,
        warnings=["w" + evil],
        unrecognised=["u" + evil],
        architecture=replace(good.architecture, model_type="m" + evil, quantization="q" + evil),
        bytes=replace(good.bytes, by_dtype={"d" + evil: 1}),
        kv_cache=replace(good.kv_cache, dtype="k" + evil, reason="n" + evil),
    )
    text = render.to_text(shown, width=300)
    assert not [one for one in text if not one.isprintable() and one != "\n"]
    for letter in "trewumqdkn":
        assert letter + "\\x1b[2J\\x07\\u202e\\n[red]"[: 9 if letter == "r" else 99] in text, letter
    failed = report.failed(moecore.MoecoreError("f" + evil), target="t" + evil, source="hub", seconds=0.0)
    buffer = io.StringIO()
    render.Console(file=buffer, width=200).print(render.page(failed), render.overview([shown, failed]))
    assert "\x1b" not in buffer.getvalue()
    assert "\x07" not in buffer.getvalue()
    assert main(["scan", "./x" + evil]) == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "./x\\x1b[2J" in captured.err


def test_unknown_top_k_and_uneven_experts(good: moecore.ScanReport) -> None:
    assert good.architecture is not None
    assert good.bytes is not None
    line = f"{good.architecture.moe_layers} × {good.architecture.num_experts} × "
    assert line in str(good)
    assert "top-2 of 8" in str(good)
    unknown = replace(good, architecture=replace(good.architecture, experts_per_token=0))
    assert "top-? of 8" in str(unknown)
    uneven = replace(good, bytes=replace(good.bytes, per_expert=good.bytes.per_expert + 1))
    assert line not in str(uneven)


# ----------------------------------------------------------------------------------------------------- cancel, failures


class Paused:
    """A scanner whose host asks for a pause."""

    def __init__(self, pause: float) -> None:
        self.pause = pause

    def pause_for(self, _: str) -> float:
        return self.pause


@pytest.mark.parametrize("pause", [0.0, 60.0])
def test_a_cancelled_wait_asks_nothing_more(pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("asked"))
    hub = hub_module.Hub("http://127.0.0.1:9", None)
    with pytest.raises(moecore.CancelledError):
        hub_module.resolve_commit(hub, Paused(pause), "org/name", "main", cache=False, cancelled=lambda: True)  # type: ignore[arg-type]


def test_a_backoff_hears_a_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the port: the first attempt fails and is to be followed by a long sleep."""
    monkeypatch.setattr(hub_module, "_backoff", lambda _: 60.0)
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    hub = hub_module.Hub("http://127.0.0.1:9", None)
    start = time.monotonic()
    with pytest.raises(moecore.CancelledError):
        hub_module.resolve_commit(hub, Paused(0.0), "org/name", "main", cache=False, cancelled=cancel.is_set)  # type: ignore[arg-type]
    assert 0.2 < time.monotonic() - start < 5


def test_of_many_failures_five_are_told() -> None:
    for count, told in ((0, None), (1, "f0"), (5, "f0; f1; f2; f3; f4"), (7, "f0; f1; f2; f3; f4; and 2 more")):
        assert report._joined([f"f{i}" for i in range(count)]) == told
