"""What repositories hold: files that are their first bytes and zeros behind them."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# A file: its bytes, or its first bytes and its length with zeros up to there.
Content = bytes | tuple[bytes, int]

ZEROS = memoryview(bytes(1 << 18))


class Blob:
    """The content of one file."""

    __slots__ = ("length", "lfs", "oid", "prefix", "static")

    def __init__(self, prefix: bytes | memoryview, length: int, lfs: bool, oid: str = "") -> None:
        self.prefix = memoryview(prefix)
        self.length = length
        self.lfs = lfs
        self.oid = oid or hashlib.sha256(b"%d:" % length + bytes(prefix)).hexdigest()
        kind = b"application/octet-stream" if lfs else b"text/plain; charset=utf-8"
        self.static = b'ETag: "%s"\r\nAccept-Ranges: bytes\r\nContent-Type: %s\r\n' % (self.oid.encode(), kind)

    def pieces(self, start: int, end: int, size: int = len(ZEROS)) -> Iterator[memoryview]:
        """Bytes start..end (exclusive) in pieces of at most `size`."""
        while start < end:
            if start < len(self.prefix):
                stop = min(end, len(self.prefix), start + size)
                yield self.prefix[start:stop]
            else:
                stop = min(end, start + min(size, len(ZEROS)))
                yield ZEROS[: stop - start]
            start = stop


@dataclass
class Commit:
    """The files of one commit."""

    sha: str
    files: dict[str, Blob]
    siblings: bool


@dataclass
class Repo:
    """A repository: branches to commits, and who may read it."""

    name: str
    branches: dict[str, str]
    commits: dict[str, Commit]
    gated: bool = False
    private: bool = False
    allow: tuple[str, ...] = ()

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


def folder_files(folder: Path) -> dict[str, Content]:
    """A folder as a repository; of a safetensors file only its header is read."""
    found: dict[str, Content] = {}
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                first = file.read(8)
                claim = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
                found[name] = (first + file.read(min(claim, 100_000_000)), path.stat().st_size)
        else:
            found[name] = path.read_bytes()
    return found


def blobs(contents: Mapping[str, Content]) -> dict[str, Blob]:
    found = {}
    for name, content in contents.items():
        prefix, length = (content, len(content)) if isinstance(content, bytes) else content
        found[name] = Blob(prefix, length, lfs=name.endswith((".safetensors", ".bin", ".gguf", ".pt")))
    return found
