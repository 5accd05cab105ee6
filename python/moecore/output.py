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


#: How every line of JSON lines begins.
_BEGINNING = b'{"schema":"moecore.scan/'


class Sink(Protocol):
    """Takes reports as they come. Both may raise FileError, and BrokenPipeError when nobody reads on."""

    def write(self, report: ScanReport) -> None:
        """Takes one report."""

    def close(self) -> None:
        """Writes what was held back. Not called when a run ends in an error."""


class JsonLines:
    """One report a line, written and flushed whole."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, report: ScanReport) -> None:
        """Writes the line at once."""
        with _writing(self._name):
            self._stream.write(report.to_json() + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Nothing is held back."""


class Collected:
    """Keeps all reports and writes them at the end: JSON, CSV and tables."""

    def __init__(self, out: TextIO | _Aside, name: str, kind: str, order: Sequence[str]) -> None:
        self._out, self._name, self._kind = out, name, kind
        self._order = {target: at for at, target in enumerate(order)}
        self._reports: list[ScanReport] = []

    def write(self, report: ScanReport) -> None:
        """Keeps the report."""
        self._reports.append(report)

    def close(self) -> None:
        """Writes everything, in the order it was asked for."""
        self._reports.sort(key=lambda report: self._order.get(report.requested, len(self._order)))
        with _writing(self._name):
            if isinstance(self._out, _Aside):
                # Names of files need not be text; what cannot be encoded is escaped.
                self._out.commit(self._text().encode("utf-8", "backslashreplace"))
            elif self._kind == "table" and self._out.isatty():
                self._tables(self._out)
            else:
                encoding = self._out.encoding or "utf-8"
                self._out.write(self._text().encode(encoding, "backslashreplace").decode(encoding))
                self._out.flush()

    def _text(self) -> str:
        buffer = io.StringIO()
        if self._kind == "csv":
            _write_csv(buffer, self._reports)
        elif self._kind == "json":
            documents = [report.to_dict() for report in self._reports]
            # One target asked for is one document; of many, a list, also when only one of them was come to.
            alone = len(self._order) == 1 and len(documents) == 1
            json.dump(documents[0] if alone else documents, buffer, indent=2)
            buffer.write("\n")
        else:
            self._tables(buffer)
        return buffer.getvalue()

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

    That the file can be written shows here, and not after hours of scanning.

    Raises:
        FileError: the file cannot be written.
    """
    if path is None:
        name = "standard output"
        return JsonLines(sys.stdout, name) if kind == "jsonl" else Collected(sys.stdout, name, kind, order)
    with _writing(str(path)):
        if path.is_dir():
            raise FileError(f"{path}: a folder; give a file")
        if not path.parent.is_dir():
            raise FileError(f"{path}: its folder does not exist; make it first")
        if kind != "jsonl" and not _is_device(path):
            aside = _Aside(path)
            stack.callback(aside.discard)
            return Collected(aside, str(path), kind, order)
        # A device is never cut: /dev/stdout may be a file that others have written to.
        mode = "a" if append or kind != "jsonl" or _is_device(path) else "w"
        stream: TextIO = path.open(mode, encoding="utf-8")  # type: ignore[assignment]
        stack.callback(_close, stream)
    return JsonLines(stream, str(path)) if kind == "jsonl" else Collected(stream, str(path), kind, order)


def finished_targets(path: Path) -> set[str]:
    """Targets that a broken-off run has done, by how they were asked for.

    The file is made ready to go on: a last line cut short and lines of failed targets are taken out, since both are to
    be scanned again.

    Raises:
        FileError: the file is not the JSON lines of a scan. It is left as it is.
    """
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path}: not a file; --resume goes on with the file that the earlier run wrote")
        data = path.read_bytes() if path.exists() else b""
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    kept: list[bytes] = []
    done: set[str] = set()
    # Lines end with a newline and with nothing else: str.splitlines knows more ends, and text may hold those.
    lines = data.split(b"\n")
    for at, line in enumerate(lines):
        last = at == len(lines) - 1  # what comes after the last newline: nothing, or a line cut short
        if last and not line:
            break
        outcome = _outcome(line)
        if outcome is None:
            if last and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                break
            raise FileError(f"{path}: line {at + 1} is no scan report; give the file that the earlier run wrote")
        requested, status = outcome
        if status == "ok":
            kept.append(line + b"\n")
            done.add(requested)
    whole = b"".join(kept)
    if whole != data:
        replace_file(path, whole)
    return done


def _outcome(line: bytes) -> tuple[str, str] | None:
    """How the target of a line was asked for, and its status. None for what is no report."""
    try:
        document: Any = json.loads(line.decode("utf-8"))
        requested, status = document.get("requested") or document["target"], document["status"]
        known = document["schema"].startswith("moecore.scan/")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return (requested, status) if known and isinstance(requested, str) and isinstance(status, str) else None


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file whole: aside first, then renamed into place.

    Raises:
        FileError: it cannot be written.
    """
    with _writing(str(path)):
        _Aside(path).commit(data)


@contextlib.contextmanager
def _writing(name: str) -> Iterator[None]:
    """Says which file the error of writing is about."""
    try:
        yield
    except (BrokenPipeError, FileError):
        raise
    except OSError as error:
        raise FileError(f"{name}: cannot be written: {error.strerror or error}") from error


def _is_device(path: Path) -> bool:
    """Whether a path is no file of its own (a pipe, a terminal), so that nothing may be put in its place."""
    return (path.exists() and not path.is_file()) or path.absolute().parts[:2] in (("/", "dev"), ("/", "proc"))


def _close(stream: TextIO) -> None:
    # All that counts was flushed; what is left here failed before, and was said.
    with contextlib.suppress(OSError):
        stream.close()


class _Aside:
    """A file beside another one, put in its place when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = os.path.realpath(path)  # a link stays a link
        folder, name = os.path.split(self._path)
        # The name is cut, since it gets longer and names have a limit.
        handle, self._name = tempfile.mkstemp(dir=folder, prefix=f".{name[:40]}.", suffix=".tmp")
        self._stream = os.fdopen(handle, "wb")
        self._there = True

    def commit(self, data: bytes) -> None:
        """Writes the file and puts it in place; nothing is left behind when that fails."""
        try:
            with self._stream:
                self._stream.write(data)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(self._name, 0o666 & ~umask)  # noqa: PTH101 - both are names
            os.replace(self._name, self._path)  # noqa: PTH105 - both are names
            self._there = False
        finally:
            self.discard()

    def discard(self) -> None:
        """Takes the file away unless it is in place."""
        with contextlib.suppress(OSError):
            self._stream.close()
        if self._there:
            self._there = False
            with contextlib.suppress(OSError):
                os.unlink(self._name)  # noqa: PTH108 - a str stays a str


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
