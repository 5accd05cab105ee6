"""What a repo is right now: its commit and files, by huggingface_hub's own session, token and endpoint.

Only the parts of huggingface_hub that a scan needs are imported: its ``HfApi`` alone takes a tenth of a second.
"""

from __future__ import annotations

import os
import random
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

from moecore._core import __version__
from moecore.errors import (
    AccessError,
    CancelledError,
    HubError,
    NetworkError,
    NotFoundError,
    OfflineError,
    RateLimitError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2

    from moecore._core import Scanner

#: Above this many files the hub may cut the list that comes with a repo's commit short; the paged listing is whole.
_WHOLE_LISTING = 1_000

_T = TypeVar("_T")

#: A commit becomes part of URLs and of a file name in the cache.
_COMMIT = re.compile(r"[0-9A-Za-z]{6,64}")

#: Pages of a listing, 1,000 files each; the largest repos have some hundreds of thousands of files.
_MOST_PAGES = 1_000

_RETRIES = 5
_RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_PAUSE = 330.0

#: No wait is longer than this without a look at whether the scan was cancelled.
_SLICE = 0.2


@dataclass(frozen=True)
class Hub:
    """An endpoint and the token for it."""

    endpoint: str
    token: str | None

    @classmethod
    def resolve(cls, *, endpoint: str | None = None, token: str | bool | None = None) -> Hub:
        """The endpoint and token that huggingface_hub would use. ``token=False`` sends none."""
        from huggingface_hub import constants, get_token

        chosen = endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        secret = token if isinstance(token, str) else None if token is False else get_token()
        return cls(endpoint=chosen.rstrip("/"), token=secret)


@dataclass(frozen=True)
class Commit:
    """A repo at a commit. ``requests`` and ``bytes_fetched`` are what it took to find out."""

    repo: str
    sha: str
    files: list[str]
    requests: int
    bytes_fetched: int


def is_offline() -> bool:
    """Whether the environment switches the network off (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def resolve_commit(
    hub: Hub, scanner: Scanner, repo: str, revision: str, *, cache: bool, cancelled: Callable[[], bool]
) -> Commit:
    """Asks the hub for a revision's commit and files.

    Args:
        hub: endpoint and token.
        scanner: shares its pauses with these requests, and knows which commits need no file list.
        repo: ``org/name``.
        revision: branch, tag or commit.
        cache: whether cached headers may stand in for the file list.
        cancelled: asked between waits.

    Raises:
        NotFoundError: no such repo or revision.
        AccessError: gated, private, or a token that is not accepted.
        RateLimitError, NetworkError: the hub does not answer, after retries.
        CancelledError: ``cancelled`` says so.
    """
    session = _Session(hub, scanner, repo, revision, cancelled)
    info = session.get_json(f"{hub.endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}")
    sha = info.get("sha")
    if not isinstance(sha, str) or not _COMMIT.fullmatch(sha):
        raise session.nonsense()
    files = session.names(info.get("siblings") or [], "rfilename")
    if not 0 < len(files) < _WHOLE_LISTING and not (cache and scanner.has_cached(hub.endpoint, repo, sha)):
        files = session.list_files(sha)
    return Commit(repo, sha, files, session.requests, session.bytes_fetched)


class _Session:
    """API requests about one repo, counted and retried."""

    def __init__(self, hub: Hub, scanner: Scanner, repo: str, revision: str, cancelled: Callable[[], bool]) -> None:
        self.hub, self.scanner, self.cancelled = hub, scanner, cancelled
        self.repo, self.revision = repo, revision
        self.requests = 0
        self.bytes_fetched = 0

    def list_files(self, sha: str) -> list[str]:
        """All files of a commit, page by page."""
        url: str | None = f"{self.hub.endpoint}/api/models/{self.repo}/tree/{sha}?recursive=true"
        files: list[str] = []
        seen: set[str] = set()
        while url:
            seen.add(url)
            response = self._get(url)
            entries = self._json(response, list)
            files += self.names([entry for entry in entries if _is_file(entry)], "path")
            url = response.links.get("next", {}).get("url")
            if url and urlsplit(url)[:2] != urlsplit(self.hub.endpoint)[:2]:
                raise NetworkError(
                    f"{self.repo}: the hub's file list goes on at another host; do not trust this endpoint"
                )
            if url in seen or len(seen) > _MOST_PAGES:
                raise NetworkError(f"{self.repo}: the hub's file list has no end; do not trust this endpoint")
        return files

    def names(self, entries: object, key: str) -> list[str]:
        """The file names of a listing's entries."""
        if not isinstance(entries, list):
            raise self.nonsense()
        names = [entry.get(key) if isinstance(entry, dict) else None for entry in entries]
        checked = [name for name in names if isinstance(name, str)]
        if len(checked) != len(entries):
            raise self.nonsense()
        return checked

    def nonsense(self) -> NetworkError:
        """The error for an answer that no hub gives."""
        what = f"{self.repo}: the answer is not what a hub gives"
        return NetworkError(f"{what}; check that {self.hub.endpoint} is a Hugging Face hub (HF_ENDPOINT)")

    def get_json(self, url: str) -> dict[str, Any]:
        """A JSON object."""
        return self._json(self._get(url), dict)

    def _json(self, response: httpx2.Response, kind: type[_T]) -> _T:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, kind):
            raise self.nonsense()
        return answer

    def _get(self, url: str) -> httpx2.Response:
        import httpx2
        from huggingface_hub.utils import build_hf_headers, get_session

        headers = build_hf_headers(token=self.hub.token or False, library_name="moecore", library_version=__version__)
        for attempt in range(_RETRIES + 1):
            self._wait(url)
            self._check()
            self.requests += 1
            try:
                response = get_session().get(url, headers=headers, timeout=30.0)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                if attempt == _RETRIES or not isinstance(error, httpx2.TransportError):
                    what = f"{type(error).__name__}: {error}"
                    message = (
                        f"{self.repo}: {self.hub.endpoint} does not answer ({what}); check the network and HF_ENDPOINT"
                    )
                    raise NetworkError(message) from error
                self._sleep(_backoff(attempt))
                continue
            self.bytes_fetched += len(response.content)
            self.scanner.note_response(url, response.status_code, list(response.headers.items()))
            if response.is_success:
                return response
            if response.status_code not in _RETRY_STATUS or attempt == _RETRIES:
                raise _error(response, self.repo, self.revision)
            if not self.scanner.pause_for(url):
                self._sleep(_backoff(attempt))
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, url: str) -> None:
        """Waits for as long as the host asked everybody to wait."""
        end = time.monotonic() + _LONGEST_PAUSE
        while (pause := self.scanner.pause_for(url)) > 0:
            if time.monotonic() + pause > end:
                raise RateLimitError(
                    f"{self.repo}: the hub asks to wait {pause:.0f} s; set HF_TOKEN or scan fewer repos"
                )
            self._sleep(min(pause, _SLICE))

    def _sleep(self, seconds: float) -> None:
        """Sleeps, but not on after a cancel."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left, _SLICE))

    def _check(self) -> None:
        if self.cancelled():
            raise CancelledError(f"{self.repo}: cancelled")


def _is_file(entry: object) -> bool:
    return not isinstance(entry, dict) or entry.get("type") == "file"


def _backoff(attempt: int) -> float:
    return float(min(0.3 * 2**attempt, 8.0) * (0.5 + random.random()))  # noqa: S311 - jitter


def _error(response: httpx2.Response, repo: str, revision: str) -> HubError:
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    if status == 403 or code == "GatedRepo":
        return AccessError(
            f"{repo}: gated; accept the licence on the model's page and set HF_TOKEN to a token that may read it"
        )
    if code == "RevisionNotFound":
        return NotFoundError(f"{repo}: no revision `{revision}`; check the branch, tag or commit")
    if status == 404 or code == "RepoNotFound":
        return NotFoundError(
            f"{repo}: no such repo, or a private one; check the name, or set HF_TOKEN for a private repo"
        )
    if status == 401:
        return AccessError(f"{repo}: the hub does not accept the token, or wants one; set HF_TOKEN")
    if status == 429:
        return RateLimitError(f"{repo}: too many requests; set HF_TOKEN, scan fewer repos or try again later")
    return NetworkError(f"{repo}: the hub answers {status} after {_RETRIES} retries; try again later")


def offline_snapshot(repo: str, revision: str) -> tuple[str, str]:
    """Folder and commit of a repo in the local hub cache.

    Raises:
        OfflineError: the cache does not have it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, FileNotFoundError, ValueError) as error:
        message = (
            f"{repo}@{revision}: not in the local hub cache and the network is off; unset HF_HUB_OFFLINE or download it"
        )
        raise OfflineError(message) from error
    return folder, os.path.basename(folder)  # noqa: PTH119 - a str stays a str


__all__ = ["Commit", "Hub", "is_offline", "offline_snapshot", "resolve_commit"]
