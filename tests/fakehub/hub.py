"""The hub's state and its routes: API, resolve, and the CDN with its signed URLs."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .answers import Answer, plain, redirect, refuse, xml
from .content import Blob, Commit, Repo, blobs, folder_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .connection import Connection
    from .faults import Call, Fault

SIGNATURE_LIFE = 3600
SHA = re.compile(r"[0-9a-f]{40}")
API = re.compile(r"/api/models/((?:[^/]+/)?[^/]+?)(?:/(revision|tree)/([^/]+)(/.*)?)?")
RESOLVE = re.compile(r"/((?:[^/]+/)?[^/]+?)/resolve/([^/]+)/(.+)")
CACHED = re.compile(r"/api/resolve-cache/models/((?:[^/]+/)?[^/]+)/([0-9a-f]{40})/(.+)")


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
