"""A Hugging Face hub for tests and benchmarks: a real HTTP/1.1 server in a process of its own.

Two origins, as on the real hub: the hub itself (API, resolve) and a CDN on another port to which the hub redirects
safetensors files with a signed URL. A safetensors file is its header plus a virtual tail of zeros, so that a
repository of 700 GB costs the memory of its headers. A third port, the control port, takes repositories, faults and
settings, and gives back the log of requests.

    with FakeHub(latency_ms=40) as hub:
        hub.add("org/name", {"config.json": b"{}", "model.safetensors": (header, 188_000_000_000)})
        hub.fault("/resolve/", "status", status=429, headers={"Retry-After": "1"}, count=1)
        ...  # a client that works against hub.url
        hub.log()

Faults, by a regular expression on path and query, an origin and a count:

    status         answer `status` with `headers` and `body`
    drop           close without an answer (`how`: "reset" or "close")
    drop_body      right headers, then close after `after` bytes of the body (default: half of it)
    ignore_range   200 and the whole file for a ranged request
    short          a well-formed 206 with only `keep` bytes (default: half of what was asked for)
    truncate       Content-Length and body cut to `keep` bytes, Content-Range as for the whole
    length         Content-Length wrong by `delta`
    total          the total in Content-Range is `total`
    start          the Content-Range (and the body) starts `delta` bytes later than asked for
    no_range       206 without Content-Range
    slow           body in pieces of `piece` bytes with `pause` seconds between them
    stall          headers, `after` bytes of the body, then nothing
    gzip           Content-Encoding: gzip
    chunked        Transfer-Encoding: chunked, no Content-Length
    expired        the redirect's signed URL has expired already
    redirect       302 to `location`; {hub} and {cdn} stand for the origins, {path} for the path asked for
    body           200 with `body` and `type` in place of the file
    garbage        bytes that are not HTTP

Run it by hand: `python tests/fakehub.py --repo org/name=FOLDER --latency-ms 40`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gzip
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

# A file: its bytes, or its first bytes and its length with zeros up to there.
Content = bytes | tuple[bytes, int]

ZEROS = memoryview(bytes(1 << 18))
DIRECT = 1 << 20  # bodies up to this size are written at once, longer ones with flow control
SIGNATURE_LIFE = 3600
REASONS = {
    200: "OK", 206: "Partial Content", 302: "Found", 307: "Temporary Redirect", 400: "Bad Request",
    401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    416: "Range Not Satisfiable", 429: "Too Many Requests", 500: "Internal Server Error", 502: "Bad Gateway",
    503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip
SHA = re.compile(r"[0-9a-f]{40}")
API = re.compile(r"/api/models/((?:[^/]+/)?[^/]+?)(?:/(revision|tree)/([^/]+)(/.*)?)?")
RESOLVE = re.compile(r"/((?:[^/]+/)?[^/]+?)/resolve/([^/]+)/(.+)")
CACHED = re.compile(r"/api/resolve-cache/models/((?:[^/]+/)?[^/]+)/([0-9a-f]{40})/(.+)")


# ---------------------------------------------------------------------------------------------------------- the server


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


class Fault:
    """What to do wrong, where, and how often."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.pattern = re.compile(spec["pattern"])
        self.kind: str = spec["kind"]
        self.left: int = spec.get("count", 1)
        self.skip: int = spec.get("skip", 0)
        self.origin: str | None = spec.get("origin")
        self.method: str | None = spec.get("method")
        self.params: dict[str, Any] = spec.get("params", {})

    def takes(self, origin: str, method: str, target: str) -> bool:
        """Whether this request is to fail; counts down."""
        if self.left == 0 or (self.origin and self.origin != origin) or (self.method and self.method != method):
            return False
        if not self.pattern.search(target):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.left -= 1
        return True


Answer = Callable[["Connection", "Call"], None]


@dataclass
class Call:
    """One request, as far as anybody asks."""

    method: str
    target: str
    range: str | None
    authorization: str | None
    fault: Fault | None


class Hub:
    """All state of the server."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, Blob] = {}
        self.folders: dict[str, dict[str, Blob]] = {}
        self.faults: list[Fault] = []
        self.entries: list[list[Any]] = []
        self.totals = {"requests": 0, "hub": 0, "cdn": 0, "redirects": 0, "bytes": 0, "wire": 0, "connections": 0}
        self.routes: dict[tuple[str, str], Answer] = {}
        self.origins = {"hub": "", "cdn": ""}
        self.connections = 0
        self.settings()

    def settings(
        self,
        latency_ms: float = 0.0,
        page_size: int = 1000,
        small: str = "direct",
        quota: tuple[int, float] | None = None,
        record: bool = True,
    ) -> None:
        """Sets everything that is not content; what is not named goes back to its default."""
        self.latency = latency_ms / 1000
        self.page_size = page_size
        self.small = small  # how small files are served: "direct" or "redirect" (307 to a relative URL)
        self.quota = quota  # (requests, window in seconds) for all calls to the hub's origin
        self.window = (0.0, 0)
        self.record = record
        self.routes.clear()

    # --------------------------------------------------------------------------------------------------------- content

    def add(self, spec: Mapping[str, Any]) -> str:
        """Adds a commit to a repository; `spec` is what `FakeHub.add` sends."""
        if "folder" in spec:
            if spec["folder"] not in self.folders:
                self.folders[spec["folder"]] = blobs(folder_files(Path(spec["folder"])))
            files = dict(self.folders[spec["folder"]])
        else:
            files = blobs({
                name: base64.b64decode(one["data"]) if "length" not in one
                else (base64.b64decode(one["data"]), int(one["length"]))
                for name, one in spec["files"].items()
            })  # fmt: skip
        for name, blob in files.items():
            if spec.get("salt"):  # the same bytes under another identity
                oid = hashlib.sha256(f"{spec['salt']}{blob.oid}".encode()).hexdigest()
                files[name] = blob = Blob(blob.prefix, blob.length, blob.lfs, oid)
            self.blobs.setdefault(blob.oid + str(blob.lfs), blob)
        digest = hashlib.sha1("".join(f"{n}\0{b.oid}\0" for n, b in sorted(files.items())).encode())
        sha = spec.get("sha") or digest.hexdigest()
        repo = self.repos.setdefault(spec["repo"], Repo(spec["repo"], {}, {}))
        repo.commits[sha] = Commit(sha, files, spec.get("siblings", True))
        repo.branches[spec.get("revision", "main")] = sha
        repo.branches.setdefault("main", sha)
        repo.gated = spec.get("gated", False)
        repo.private = spec.get("private", False)
        repo.allow = tuple(spec.get("allow", ()))
        self.routes.clear()
        return sha

    def reset(self) -> None:
        """Forgets everything but the open ports."""
        for part in (self.repos, self.blobs, self.folders, self.faults, self.entries, self.routes):
            part.clear()
        self.clear()
        self.settings()

    def clear(self) -> None:
        """Empties the log and the sums."""
        self.entries.clear()
        self.totals = dict.fromkeys(self.totals, 0)

    # ---------------------------------------------------------------------------------------------------------- routes

    def route(self, origin: str, target: str) -> Answer:
        """The answer for a target; the same one as last time when nothing changed."""
        found = self.routes.get((origin, target))
        if found is None:
            found = self.cdn(target) if origin == "cdn" else self.hub(target)
            self.routes[origin, target] = found
        return found

    def hub(self, target: str) -> Answer:
        parts = urlsplit(target)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if match := CACHED.fullmatch(parts.path):
            return self.file(*(unquote(one) for one in match.groups()), cached=True)
        if match := RESOLVE.fullmatch(parts.path):
            return self.file(*(unquote(one) for one in match.groups()))
        if match := API.fullmatch(parts.path):
            name, kind, revision, folder = match.groups()
            name, revision = unquote(name), unquote(revision or "main")
            if kind == "tree":
                return self.guarded(name, revision, lambda c: self.tree(name, c, revision, folder or "", query))
            return self.guarded(name, revision, lambda c: self.info(name, c, query))
        return plain(404, {"error": "Sorry, we can't find the page you are looking for."})

    def guarded(self, name: str, revision: str, then: Callable[[Commit], Answer], *, read: bool = False) -> Answer:
        """`then` when the repo and its revision exist and the token may see them; the hub's own errors otherwise."""
        repo = self.repos.get(name)
        commit = repo.find(revision) if repo else None
        good = then(commit) if commit else None

        def answer(conn: Connection, call: Call) -> None:
            if call.authorization is None and good is not None and not (repo and (repo.private or repo.gated)):
                good(conn, call)
                return
            token = (call.authorization or "").removeprefix("Bearer ")
            if token.startswith("hf_bad"):
                plain(401, {"error": "Invalid credentials in Authorization header"}, {
                    "X-Error-Message": "Invalid credentials in Authorization header"})(conn, call)  # fmt: skip
            elif repo is None or (repo.private and token not in repo.allow):
                if token:
                    refuse(404, "RepoNotFound", "Repository not found")(conn, call)
                else:
                    refuse(401, "RepoNotFound", "Invalid username or password.")(conn, call)
            elif read and repo.gated and token not in repo.allow:
                text = f"Access to model {name} is restricted"
                if token:
                    refuse(403, "GatedRepo", f"{text} and you are not in the authorized list. Visit "
                           f"{self.origins['hub']}/{name} to ask for access.")(conn, call)  # fmt: skip
                else:
                    refuse(401, "GatedRepo", f"{text}. You must have access to it and be authenticated to access it. "
                           "Please log in.")(conn, call)  # fmt: skip
            elif good is None:
                refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")(conn, call)
            else:
                good(conn, call)

        return answer

    def info(self, name: str, commit: Commit, query: Mapping[str, str]) -> Answer:
        repo = self.repos[name]
        siblings = [
            {"rfilename": path, **({"size": blob.length, "blobId": blob.oid[:40]} if query.get("blobs") else {})}
            for path, blob in sorted(commit.files.items())
        ]
        answer: dict[str, Any] = {
            "_id": commit.sha[:24], "id": name, "modelId": name, "private": repo.private, "sha": commit.sha,
            "author": name.split("/")[0], "lastModified": "2026-01-01T00:00:00.000Z", "disabled": False,
            "gated": "manual" if repo.gated else False, "downloads": 0, "likes": 0, "library_name": "transformers",
            "pipeline_tag": "text-generation", "tags": ["safetensors"], "createdAt": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip
        if commit.siblings:
            answer["siblings"] = siblings
        return plain(200, answer)

    def tree(self, name: str, commit: Commit, revision: str, folder: str, query: Mapping[str, str]) -> Answer:
        inside = folder.strip("/") + "/" if folder.strip("/") else ""
        rows: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            if path.startswith(inside) and (query.get("recursive") in ("true", "True", "1") or "/" not in path):
                row: dict[str, Any] = {"type": "file", "oid": blob.oid[:40], "size": blob.length, "path": path}
                if blob.lfs:
                    row["lfs"] = {"oid": blob.oid, "size": blob.length, "pointerSize": 135}
                    row["xetHash"] = blob.oid[::-1]
                rows.append(row)
        first = int(base64.urlsafe_b64decode(query["cursor"])) if "cursor" in query else 0
        size = min(self.page_size, int(query.get("limit", self.page_size)))
        headers = {}
        if first + size < len(rows):
            more = {k: v for k, v in query.items() if k != "cursor"}
            more["cursor"] = base64.urlsafe_b64encode(b"%d" % (first + size)).decode()
            path = f"/api/models/{name}/tree/{quote(revision, safe='')}{folder}"
            url = self.origins["hub"] + path + "?" + "&".join(f"{k}={quote(v, safe='')}" for k, v in more.items())
            headers["Link"] = f'<{url}>; rel="next"'
        return plain(200, rows[first : first + size], headers)

    def file(self, name: str, revision: str, path: str, *, cached: bool = False) -> Answer:
        def found(commit: Commit) -> Answer:
            blob = commit.files.get(path)
            extra = f"X-Repo-Commit: {commit.sha}\r\n".encode()
            if blob is None:
                return refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
            if blob.lfs:
                return self.signed_redirect(name, path, blob, extra)
            if self.small == "redirect" and not cached:
                where = f"/api/resolve-cache/models/{name}/{commit.sha}/{quote(path)}?etag={blob.oid[:40]}"
                return redirect(307, where, extra + blob.static)
            return lambda conn, call: conn.send_blob(call, blob, extra)

        return self.guarded(name, revision, found, read=True)

    def sign(self, blob: Blob, repo: str, name: str, expires: int) -> str:
        proof = hashlib.sha256(f"{blob.oid}{expires}".encode()).hexdigest()
        policy = base64.b64encode((f'{{"Statement":[{{"Condition":{{"DateLessThan":{expires}}}}}]}}' * 5).encode())
        shown = quote(f"inline; filename={name.rsplit('/', 1)[-1]}")
        return (
            f"{self.origins['cdn']}/xet-bridge-us/{blob.oid[:24]}/{blob.oid}?X-Amz-Algorithm=AWS4-HMAC-SHA256"
            f"&X-Amz-Content-Sha256=UNSIGNED-PAYLOAD&X-Amz-Expires={SIGNATURE_LIFE}&X-Amz-SignedHeaders=host"
            f"&response-content-disposition={shown}&repo={repo}&x-id=GetObject"
            f"&Expires={expires}&Policy={quote(policy)}&Signature={proof}&Key-Pair-Id=K2L8F4GPSG1IFC"
        )

    def signed_redirect(self, repo: str, name: str, blob: Blob, extra: bytes) -> Answer:
        head = (
            extra
            + (
                f'X-Linked-Size: {blob.length}\r\nX-Linked-ETag: "{blob.oid}"\r\nX-Xet-Hash: {blob.oid[::-1]}\r\n'
                f"Accept-Ranges: bytes\r\nVary: Origin, Accept\r\nAccess-Control-Expose-Headers: ETag,Location,Link\r\n"
            ).encode()
        )
        key, ready = 0, redirect(302, "", b"")

        def answer(conn: Connection, call: Call) -> None:
            nonlocal key, ready
            if call.fault and call.fault.kind == "expired":
                redirect(302, self.sign(blob, repo, name, int(time.time()) - 60), head)(conn, call)
                return
            now = int(time.time())
            if now >= key:
                key = now + SIGNATURE_LIFE // 2
                ready = redirect(302, self.sign(blob, repo, name, now + SIGNATURE_LIFE), head)
            ready(conn, call)

        return answer

    def cdn(self, target: str) -> Answer:
        parts = urlsplit(target)
        query = parse_qs(parts.query)
        oid = parts.path.rsplit("/", 1)[-1]
        blob = self.blobs.get(oid + "True")
        expires = int(query.get("Expires", ["0"])[0])
        proof = hashlib.sha256(f"{oid}{expires}".encode()).hexdigest()
        signed = query.get("Signature", [""])[0] == proof

        def answer(conn: Connection, call: Call) -> None:
            if call.authorization is not None:
                xml(400, "InvalidArgument", "Only one auth mechanism allowed")(conn, call)
            elif not signed or expires <= time.time():
                xml(403, "AccessDenied", "Request has expired")(conn, call)
            elif blob is None:
                xml(404, "NoSuchKey", "The specified key does not exist.")(conn, call)
            else:
                conn.send_blob(call, blob, b"X-Cache: Hit from cloudfront\r\n")

        return answer

    def over_quota(self) -> tuple[bytes, int]:
        """The RateLimit headers of this answer, and the seconds to wait when it has to be a 429 (else 0)."""
        if self.quota is None:
            return b"", 0
        allowed, window = self.quota
        now = time.monotonic()
        start, used = self.window
        if now - start >= window:
            start, used = now, 0
        self.window = (start, used + 1)
        wait = max(1, int(start + window - now + 0.999))
        left = max(0, allowed - used - 1)
        text = f'RateLimit: "resolve";r={left};t={wait}\r\nRateLimit-Policy: "fixed window";"resolve";q={allowed};'
        return (text + f"w={int(window) or 1}\r\n").encode(), wait if used >= allowed else 0


def field(head: bytes, low: bytes, name: bytes) -> str | None:
    """The value of a request header; `low` is `head` in lower case."""
    at = low.find(name)
    if at < 0:
        return None
    end = head.find(b"\r\n", at + 2)
    return head[at + len(name) : end if end > 0 else len(head)].decode("latin-1").strip()


def lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{key}: {value}\r\n" for key, value in headers.items()).encode("latin-1")


def start_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\n".encode()


def plain(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
    """A fixed answer: JSON, or text as it is."""
    text = body.encode() if isinstance(body, str) else json.dumps(body, separators=(",", ":")).encode()
    kind = b"" if headers and "Content-Type" in headers else b"Content-Type: application/json; charset=utf-8\r\n"
    head = start_line(status) + lines(headers or {}) + kind
    blob = Blob(text, len(text), lfs=False)

    def answer(conn: Connection, call: Call) -> None:
        conn.send(call, status, head, blob, 0, len(text))

    return answer


def refuse(status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    return plain(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text, **(headers or {})})


def xml(status: int, code: str, text: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{text}</Message></Error>'
    return plain(status, body, {"Content-Type": "application/xml"})


def redirect(status: int, location: str, extra: bytes) -> Answer:
    text = f"{REASONS[status]}. Redirecting to {location}".encode()
    head = start_line(status) + b"Content-Type: text/plain; charset=utf-8\r\nLocation: " + location.encode() + b"\r\n"
    head += extra
    blob = Blob(text, len(text), lfs=False)

    def answer(conn: Connection, call: Call) -> None:
        conn.hub.totals["redirects"] += 1
        conn.send(call, status, head, blob, 0, len(text))

    return answer


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


class Connection(asyncio.Protocol):
    """One connection of a client to either origin."""

    def __init__(self, hub: Hub, origin: str) -> None:
        self.hub = hub
        self.origin = origin
        self.buffer = b""
        self.busy = False
        self.close_after = False
        self.entry: list[Any] | None = None
        self.limit = b""
        self.writable = asyncio.Event()
        self.writable.set()
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.hub.connections += 1
        self.hub.totals["connections"] += 1
        self.number = self.hub.connections
        self.ready = time.monotonic() + self.hub.latency  # the connection's own round trip
        transport.set_write_buffer_limits(high=1 << 20)

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()
        if self.task:
            self.task.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        self.buffer = self.buffer + data if self.buffer else data
        self.next_request()

    def next_request(self) -> None:
        if self.busy:
            return
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self.buffer) > 65536:
                self.transport.abort()
            return
        head, self.buffer = self.buffer[:end], self.buffer[end + 4 :]
        self.busy = True
        if self.hub.latency:
            wait = max(0.0, self.ready - time.monotonic()) + self.hub.latency
            asyncio.get_running_loop().call_later(wait, self.handle, head)
        else:
            self.handle(head)

    def handle(self, head: bytes) -> None:
        if self.transport.is_closing():
            return
        hub = self.hub
        try:
            method, target, _ = head[: head.index(b"\r\n")].decode("latin-1").split(" ")
        except ValueError:
            self.transport.abort()
            return
        low = head.lower()
        call = Call(method, target, field(head, low, b"\r\nrange:"), field(head, low, b"\r\nauthorization:"), None)
        self.close_after = b"\r\nconnection: close" in low
        totals = hub.totals
        totals["requests"] += 1
        totals[self.origin] += 1
        self.entry = None
        if hub.record:
            self.entry = [
                time.monotonic(), self.origin, method, target, call.range, call.authorization, 0, 0, self.number,
                field(head, low, b"\r\nuser-agent:") or "", field(head, low, b"\r\naccept-encoding:") or "",
            ]  # fmt: skip
            hub.entries.append(self.entry)
        if method not in ("GET", "HEAD"):
            plain(405, {"error": "method not allowed"})(self, call)
            return
        self.limit = b""
        if hub.quota is not None and self.origin == "hub":
            self.limit, wait = hub.over_quota()
            if wait:
                plain(429, {"error": "We had to rate limit you"})(self, call)
                return
        if hub.faults:
            for fault in hub.faults:
                if fault.takes(self.origin, method, target):
                    call.fault = fault
                    if self.fail_now(call, fault):
                        return
                    break
        hub.route(self.origin, target)(self, call)

    def fail_now(self, call: Call, fault: Fault) -> bool:
        """Faults that replace the answer as a whole."""
        params = fault.params
        if fault.kind == "status":
            call.fault = None
            plain(params["status"], params.get("body", {"error": "fault"}), params.get("headers"))(self, call)
        elif fault.kind == "drop":
            if params.get("how", "reset") == "reset":
                sock = self.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.transport.abort()
            else:
                self.transport.close()
        elif fault.kind == "garbage":
            self.transport.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
            self.transport.close()
        elif fault.kind == "redirect":
            call.fault = None
            values = {**self.hub.origins, "path": call.target}
            redirect(params.get("status", 302), params["location"].format(**values), b"")(self, call)
        elif fault.kind == "body":
            call.fault = None
            plain(200, params["body"], {"Content-Type": params.get("type", "text/html")})(self, call)
        else:
            return False
        return True

    # --------------------------------------------------------------------------------------------------------- answers

    def send_blob(self, call: Call, blob: Blob, extra: bytes) -> None:
        """The file or the range of it that was asked for, with the call's fault."""
        fault = call.fault
        kind = fault.kind if fault else ""
        params = fault.params if fault else {}
        span = parse_range(call.range, blob.length) if call.range and kind != "ignore_range" else None
        if span is None:
            self.send(call, 200, start_line(200) + extra + blob.static, blob, 0, blob.length)
            return
        start, end = span
        if start >= end:
            head = start_line(416) + extra + b"Content-Range: bytes */%d\r\n" % blob.length
            self.send(call, 416, head, blob, 0, 0)
            return
        total = blob.length
        if kind == "short":
            end = start + min(end - start, params.get("keep", (end - start) // 2))
        elif kind == "start":
            start = min(end - 1, start + params.get("delta", 8))
        elif kind == "total":
            total = params["total"]
        head = start_line(206) + extra + blob.static
        if kind != "no_range":
            head += b"Content-Range: bytes %d-%d/%d\r\n" % (start, end - 1, total)
        if kind == "truncate":
            end = start + min(end - start, params.get("keep", (end - start) // 2))
        self.send(call, 206, head, blob, start, end)

    def send(self, call: Call, status: int, head: bytes, blob: Blob, start: int, end: int) -> None:
        """Head (without length) and body."""
        if call.fault is not None and call.fault.kind in SHAPES:
            self.task = asyncio.ensure_future(self.send_faulty(call.fault, call, status, head, blob, start, end))
            return
        size = end - start
        head = b"%s%sContent-Length: %d\r\n\r\n" % (head, self.limit, size)
        if call.method == "HEAD":
            size = 0
        if size > DIRECT:
            self.task = asyncio.ensure_future(self.stream(status, head, blob, start, end))
            return
        if size:
            if end > len(blob.prefix):
                self.transport.write(b"".join([head, *blob.pieces(start, end)]))
            elif size > 32768:
                self.transport.write(head)
                self.transport.write(blob.prefix[start:end])
            else:
                self.transport.write(head + blob.prefix[start:end])
        else:
            self.transport.write(head)
        self.count(status, size, len(head) + size)
        self.done()

    async def stream(self, status: int, head: bytes, blob: Blob, start: int, end: int) -> None:
        self.transport.write(head)
        self.count(status, 0, len(head))
        for piece in blob.pieces(start, end):
            await self.writable.wait()
            if self.transport.is_closing():
                return
            self.transport.write(piece)
            self.count(status, len(piece), len(piece))
        self.done()

    async def send_faulty(
        self, fault: Fault, call: Call, status: int, head: bytes, blob: Blob, start: int, end: int
    ) -> None:
        kind, params = fault.kind, fault.params
        body = b"".join(blob.pieces(start, min(end, start + (64 << 20))))
        claim = len(body)
        if kind == "gzip":
            body = gzip.compress(body)
            head += b"Content-Encoding: gzip\r\n"
            claim = len(body)
        elif kind == "length":
            claim = max(0, claim + params.get("delta", 100))
        elif kind == "drop_body":
            body = body[: params.get("after", claim // 2)]
        elif kind == "stall":
            body = body[: params.get("after", 0)]
        if kind == "chunked":
            head += b"Transfer-Encoding: chunked\r\n\r\n"
            piece = params.get("piece", 1000)
            parts = [body[i : i + piece] for i in range(0, len(body), piece)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in parts) + b"0\r\n\r\n"
        else:
            head += b"Content-Length: %d\r\n\r\n" % claim
        self.transport.write(head)
        if call.method == "HEAD":
            body = b""
        self.count(status, len(body), len(head) + len(body))
        if kind == "slow":
            piece = params.get("piece", 1000)
            for i in range(0, len(body), piece):
                if self.transport.is_closing():
                    return
                self.transport.write(body[i : i + piece])
                await asyncio.sleep(params.get("pause", 0.05))
        else:
            self.transport.write(body)
        if kind == "stall":
            await asyncio.sleep(params.get("seconds", 600))
        if kind in ("drop_body", "length", "stall"):
            self.transport.close()
            return
        self.done()

    def count(self, status: int, size: int, wire: int) -> None:
        self.hub.totals["bytes"] += size
        self.hub.totals["wire"] += wire
        if self.entry is not None:
            self.entry[6] = status
            self.entry[7] += size

    def done(self) -> None:
        self.busy = False
        if self.close_after:
            self.transport.close()
        elif self.buffer:
            self.next_request()


SHAPES = ("gzip", "length", "drop_body", "stall", "chunked", "slow")


def parse_range(text: str, length: int) -> tuple[int, int] | None:
    """start, end (exclusive); start >= end when it cannot be satisfied; None when it is not a range."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", text)
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, length - int(last)), length
    return int(first), min(length, int(last) + 1) if last else length


class Control(asyncio.Protocol):
    """The control port: POST /add, /fault, /settings, /clear, /reset, /log, /totals, each JSON in and out."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).decode("latin-1")
        match = re.search(r"content-length: *(\d+)", head, re.IGNORECASE)
        size = int(match.group(1)) if match else 0
        if len(self.buffer) < end + 4 + size:
            return
        body = bytes(self.buffer[end + 4 : end + 4 + size])
        del self.buffer[: end + 4 + size]
        path = head.split(" ", 2)[1]
        try:
            status, answer = 200, self.command(path, json.loads(body) if body else None)
        except Exception as error:
            status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
        text = json.dumps(answer).encode()
        self.transport.write(start_line(status) + b"Content-Length: %d\r\n\r\n" % len(text) + text)

    def command(self, path: str, body: Any) -> Any:
        hub = self.hub
        if path == "/add":
            return [hub.add(one) for one in body]
        if path == "/fault":
            hub.faults.append(Fault(body))
        elif path == "/unfault":
            hub.faults.clear()
        elif path == "/settings":
            if body.get("quota"):
                body["quota"] = tuple(body["quota"])
            hub.settings(**body)
        elif path == "/clear":
            hub.clear()
        elif path == "/reset":
            hub.reset()
        elif path == "/log":
            return hub.entries
        elif path == "/totals":
            return {**hub.totals, "cpu": sum(os.times()[:2]), "pid": os.getpid()}
        else:
            raise ValueError(f"no such command: {path}")
        return {}


def listen(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(1024)
    return sock


async def serve(args: argparse.Namespace) -> None:
    hub = Hub()
    loop = asyncio.get_running_loop()
    socks = {name: listen(args.host, getattr(args, f"{name}_port")) for name in ("hub", "cdn", "control")}
    urls = {name: f"http://{args.host}:{sock.getsockname()[1]}" for name, sock in socks.items()}
    hub.origins = {"hub": urls["hub"], "cdn": urls["cdn"]}
    hub.settings(args.latency_ms, args.page_size, args.small, record=not args.no_log)
    for one in args.repo:
        name, _, folder = one.partition("=")
        hub.add({"repo": name, "folder": folder})
    await loop.create_server(lambda: Connection(hub, "hub"), sock=socks["hub"], backlog=1024)
    await loop.create_server(lambda: Connection(hub, "cdn"), sock=socks["cdn"], backlog=1024)
    await loop.create_server(lambda: Control(hub), sock=socks["control"])
    print(json.dumps(urls), flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if args.until_eof:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a test is for the client

        def at_input() -> None:
            if not os.read(sys.stdin.fileno(), 4096):
                stop.set()

        loop.add_reader(sys.stdin.fileno(), at_input)
    await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A fake Hugging Face hub; prints its URLs as one line of JSON.")
    parser.add_argument("--host", default="127.0.0.1")
    for name in ("hub", "cdn", "control"):
        parser.add_argument(f"--{name}-port", type=int, default=0, metavar="PORT", help="default: any free port")
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME=FOLDER", help="serve a folder")
    parser.add_argument("--latency-ms", type=float, default=0, help="round trip, per request and per new connection")
    parser.add_argument("--page-size", type=int, default=1000, help="entries per page of a tree listing")
    parser.add_argument("--small", choices=["direct", "redirect"], default="direct", help="how small files are served")
    parser.add_argument("--no-log", action="store_true", help="keep sums only")
    parser.add_argument("--until-eof", action="store_true", help="end when the standard input ends")
    asyncio.run(serve(parser.parse_args()))


# ---------------------------------------------------------------------------------------------------------- the client


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; `time` is the server's monotonic clock."""

    time: float
    origin: str
    method: str
    path: str
    range: str | None
    authorization: str | None
    status: int
    sent: int
    connection: int
    agent: str
    accept_encoding: str


class FakeHub:
    """Starts the server and talks to its control port."""

    def __init__(self, **settings: Any) -> None:
        self.defaults = settings

    def __enter__(self) -> FakeHub:
        command = [sys.executable, str(Path(__file__).resolve()), "--until-eof"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdout is not None
        urls = json.loads(self.process.stdout.readline())
        self.url: str = urls["hub"]
        self.cdn: str = urls["cdn"]
        self._control = http.client.HTTPConnection(urls["control"].removeprefix("http://"), timeout=60)
        self.settings()
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, path: str, body: Any = None) -> Any:
        self._control.request("POST", path, json.dumps(body))
        response = self._control.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise ValueError(answer["error"])
        return answer

    def add(self, repo: str, files: Mapping[str, Content], **more: Any) -> str:
        """Adds a commit and gives its sha.

        More: revision, sha, gated, private, allow (tokens), siblings (False: the API leaves them out), salt.
        """
        packed: dict[str, dict[str, Any]] = {}
        for name, content in files.items():
            data, length = (content, None) if isinstance(content, bytes) else content
            packed[name] = {"data": base64.b64encode(data).decode()}
            if length is not None:
                packed[name]["length"] = length
        sha: str = self._ask("/add", [{"repo": repo, "files": packed, **more}])[0]
        return sha

    def add_folder(self, repo: str, folder: Path, **more: Any) -> str:
        """Adds a folder as a commit; the server reads only the headers of its safetensors files."""
        sha: str = self._ask("/add", [{"repo": repo, "folder": str(folder), **more}])[0]
        return sha

    def fault(
        self,
        pattern: str,
        kind: str,
        *,
        count: int = 1,
        skip: int = 0,
        origin: str | None = None,
        method: str | None = None,
        **params: Any,
    ) -> None:
        """Makes the next `count` matching requests (-1: all) fail, after letting `skip` pass."""
        spec = {"pattern": pattern, "kind": kind, "count": count, "skip": skip, "origin": origin, "method": method}
        self._ask("/fault", {**spec, "params": params})

    def unfault(self) -> None:
        """Takes all faults back."""
        self._ask("/unfault")

    def settings(self, **settings: Any) -> None:
        """latency_ms, page_size, small, quota, record; what is not named goes back to how the hub was made."""
        self._ask("/settings", {**self.defaults, **settings})

    def log(self) -> list[Request]:
        """All requests since the last `clear`, in order of arrival."""
        return [Request(*entry) for entry in self._ask("/log")]

    def totals(self) -> dict[str, float]:
        """Sums since the last `clear`: requests (hub, cdn, redirects), body bytes, wire bytes, connections; cpu."""
        totals: dict[str, float] = self._ask("/totals")
        return totals

    def clear(self) -> None:
        """Empties the log and the sums."""
        self._ask("/clear")

    def reset(self) -> None:
        """Forgets repositories, faults, log; settings go back to how the hub was made."""
        self._ask("/reset")
        self.settings()

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """An environment for a client process: this hub, no token, and all caches below `home`."""
        mine = ("HF_", "MOECORE_", "HUGGING_FACE")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(mine) and not k.lower().endswith("_proxy")}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home / "hf"), "MOECORE_CACHE": str(home / "moecore")}
        return {**kept, **own, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **more}


if __name__ == "__main__":
    main()
