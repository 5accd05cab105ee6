"""Where the reports of a run go: a table, JSON, JSON lines or CSV, on a stream or in a file.

A file appears whole or not at all, but for JSON lines, which grow line by line so that a run can be resumed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from moecore.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from moecore.report import ScanReport

FORMATS = ("table", "json", "jsonl", "csv")

#: Columns of the CSV: name, and the path to its value in the report.
_COLUMNS = (
    ("target", "target"),
    ("revision", "revision"),
    ("status", "status"),
    ("model_type", "architecture.model_type"),
    ("layers", "architecture.layers"),
    ("moe_layers", "architecture.moe_layers"),
    ("num_experts", "architecture.num_experts"),
    ("experts_per_token", "architecture.experts_per_token"),
    ("shared_experts", "architecture.shared_experts"),
    ("parameters_total", "parameters.total"),
    ("parameters_active", "parameters.active"),
    ("parameters_active_without_embeddings", "parameters.active_without_embeddings"),
    ("bytes_total", "bytes.total"),
    ("bytes_base", "bytes.base"),
    ("bytes_routed_experts", "bytes.routed_experts"),
    ("bytes_per_expert", "bytes.per_expert"),
    ("kv_status", "kv_cache.status"),
    ("kv_bytes", "kv_cache.bytes"),
    ("kv_bytes_per_token", "kv_cache.bytes_per_token"),
    ("kv_max_model_len", "kv_cache.max_model_len"),
    ("kv_dtype", "kv_cache.dtype"),
    ("warnings", "warnings"),
    ("error", "error"),
)


class Sink(Protocol):
    """Takes reports as they come."""

    def write(self, report: ScanReport) -> None:
        """Takes one report."""

    def close(self) -> None:
        """Writes what was held back. Not called when the run is broken off."""


class JsonLines:
    """One report a line, written and flushed whole."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, report: ScanReport) -> None:
        """Writes the line at once."""
        self._stream.write(report.to_json() + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is held back."""


class Collected:
    """Keeps all reports and writes them at the end: JSON, CSV and tables."""

    def __init__(self, stream: TextIO, path: Path | None, kind: str, order: Sequence[str]) -> None:
        self._stream, self._path, self._kind = stream, path, kind
        self._order = {target: at for at, target in enumerate(order)}
        self._reports: list[ScanReport] = []

    def write(self, report: ScanReport) -> None:
        """Keeps the report."""
        self._reports.append(report)

    def close(self) -> None:
        """Writes everything, in the order it was asked for."""
        self._reports.sort(key=lambda report: self._order.get(report.requested, len(self._order)))
        if self._path is None:
            self._dump(self._stream)
            return
        buffer = io.StringIO()
        self._dump(buffer)
        replace_file(self._path, buffer.getvalue())

    def _dump(self, stream: TextIO) -> None:
        if self._kind == "csv":
            _write_csv(stream, self._reports)
        elif self._kind == "json":
            documents = [report.to_dict() for report in self._reports]
            json.dump(documents[0] if len(documents) == 1 else documents, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
        else:
            self._tables(stream)

    def _tables(self, stream: TextIO) -> None:
        from rich.console import Console

        from moecore import render

        # A file or a pipe has no width of its own; 132 columns hold the widest table.
        console = Console(file=stream, width=None if stream.isatty() else 132)
        if len(self._reports) == 1:
            console.print(render.page(self._reports[0]))
        elif self._reports:
            console.print(render.overview(self._reports))


def open_sink(kind: str, path: Path | None, order: Sequence[str], stack: contextlib.ExitStack, *, append: bool) -> Sink:
    """The sink for a format. ``order`` is the order of targets where reports are held back.

    Raises:
        FileError: the file cannot be written.
    """
    if path is not None and not path.parent.is_dir():
        raise FileError(f"{path}: its folder does not exist; make it first")
    if kind != "jsonl":
        return Collected(sys.stdout, path, kind, order)
    if path is None:
        return JsonLines(sys.stdout)
    try:
        return JsonLines(stack.enter_context(path.open("a" if append else "w", encoding="utf-8")))
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}") from error


def finished_targets(path: Path) -> set[str]:
    """Targets that a broken-off run has done, by how they were asked for.

    The file is made ready to go on: a line cut short and lines of failed targets are taken out, since both are to be
    scanned again.

    Raises:
        FileError: the file is not the JSON lines of a scan.
    """
    kept: list[str] = []
    done: set[str] = set()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for at, line in enumerate(lines):
        try:
            document: Any = json.loads(line)
            requested, status = document.get("requested") or document["target"], document["status"]
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            if at == len(lines) - 1:
                break
            raise FileError(
                f"{path}: line {at + 1} is no scan report; give the file that the earlier run wrote"
            ) from error
        if status == "ok":
            kept.append(line if line.endswith("\n") else line + "\n")
            done.add(requested)
    if len(kept) != len(lines):
        replace_file(path, "".join(kept))
    return done


def replace_file(path: Path, text: str) -> None:
    """Writes a file whole: aside first, then renamed into place.

    Raises:
        FileError: it cannot be written.
    """
    try:
        with _aside(path) as (stream, name):
            stream.write(text)
        os.replace(name, path)  # noqa: PTH105 - both are names
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[tuple[TextIO, str]]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            yield stream, name
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # noqa: PTH101
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)  # noqa: PTH108
        raise


def _write_csv(stream: TextIO, reports: list[ScanReport]) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([name for name, _ in _COLUMNS])
    for report in reports:
        document = report.to_dict()
        writer.writerow([_cell(document, path) for _, path in _COLUMNS])


def _cell(document: dict[str, Any], path: str) -> object:
    value: Any = document
    for key in path.split("."):
        value = value[key] if value is not None else None
    if isinstance(value, list):
        return "; ".join(value)
    return "" if value is None else value
