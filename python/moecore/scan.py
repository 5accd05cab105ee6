"""Front doors of scanning: :func:`scan` for one target, :func:`scan_many` for thousands."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from moecore import hub as _hub
from moecore import report as _report
from moecore._core import Cancel, Scanner, __version__
from moecore.errors import CancelledError, MoecoreError, TargetError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from moecore.report import ScanReport

_REPO = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?(?:/[A-Za-z0-9_](?:[\w.-]{0,94}\w)?)?", re.ASCII)
_HOSTS = ("huggingface.co", "hf.co")

#: What a batch or a context may count at most: far beyond any machine, and its bytes still fit the core's numbers.
_MOST = 2**40


@dataclass(frozen=True)
class Target:
    """A parsed target: a local path, or a repo and its revision."""

    requested: str
    path: str | None = None
    repo: str = ""
    revision: str = "main"

    @property
    def source(self) -> Literal["hub", "local"]:
        """Where it is."""
        return "local" if self.path is not None else "hub"

    @property
    def name(self) -> str:
        """The name in reports."""
        return self.path if self.path is not None else self.repo

    @classmethod
    def parse(cls, target: str | Path, revision: str | None = None, endpoint: str | None = None) -> Target:
        """Tells paths from repo ids. What exists on disk is a path; ``org/name[@revision]`` is a repo.

        A repo's page is its repo too, on the public hub or on ``endpoint`` (``HF_ENDPOINT`` by default);
        ``…/tree/REV`` says its revision.

        Raises:
            TargetError: neither.
        """
        text = os.fspath(target)
        looks_local = isinstance(target, Path) or text.startswith(("/", "./", "../", "~"))
        if not text.strip():
            raise TargetError("empty target; give a repo id such as org/name, a folder or a file")
        # A name too long, with a NUL or of a user that does not exist is the name of no file.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            path = Path(text).expanduser()
            if path.exists():
                return cls(requested=text, path=str(path))
        if looks_local or (text.endswith((".json", ".safetensors")) and "://" not in text):
            raise TargetError(f"{text}: no such file or folder; check the path, or give a repo id such as org/name")
        bare = _from_page(text, endpoint)
        repo, at, own_revision = bare.partition("@")
        kind, _, rest = repo.partition("/")
        if rest and kind in ("datasets", "spaces"):
            raise TargetError(f"{text}: of the {kind}, not of the models; give a model's repo id such as org/name")
        if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or (at and not own_revision):
            raise TargetError(
                f"{text!r}: neither a path that exists nor a repo id such as org/name or org/name@revision"
            )
        if own_revision and revision and own_revision != revision:
            raise TargetError(f"{text}: the revision is given twice, as {own_revision} and {revision}; give it once")
        return cls(requested=text, repo=repo, revision=own_revision or revision or "main")


def _from_page(text: str, endpoint: str | None) -> str:
    """``org/name[@revision]`` of a repo's page on the hub; other text as it is, but for ``hf://``."""
    if not re.match(r"https?://", text, re.IGNORECASE):
        return text.removeprefix("hf://").rstrip("/")
    own = urlsplit(endpoint or os.environ.get("HF_ENDPOINT") or "")
    try:
        page = urlsplit(text)
    except ValueError as error:
        raise TargetError(f"{text}: no address: {error}") from error
    host, path = page.netloc.lower(), page.path
    if host == own.netloc.lower():
        path = path.removeprefix(own.path.rstrip("/"))
    elif host not in _HOSTS:
        raise TargetError(f"{text}: not a page of {' or '.join(_HOSTS)}; set HF_ENDPOINT for a hub of your own")
    parts = path.strip("/").split("/")
    # `tree` may be a repo's name as well: only what comes after a repo's name is the page of a revision.
    at = next((at for at in (2, 1) if parts[at : at + 1] == ["tree"] and len(parts) > at + 1), None)
    if at is None:
        return unquote("/".join(parts))
    repo, revision = "/".join(parts[:at]), "/".join(parts[at + 1 :])
    # Slashes in branch names are quoted in such addresses, but for those of pull requests and conversions.
    if "/" in revision and not re.fullmatch(r"refs/[\w-]+/[\w.-]+", revision):
        raise TargetError(f"{text}: a folder inside a repo; give the repo, as org/name or org/name@revision")
    return f"{repo}@{unquote(revision)}"


@dataclass(frozen=True)
class Options:
    """What every scan of a call shares; see :func:`scan` for their meaning."""

    revision: str | None = None
    max_model_len: int | None = None
    batch_size: int = 1
    kv_cache_dtype: str = "auto"
    token: str | bool | None = None
    endpoint: str | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        """Checks the counts.

        Raises:
            TargetError: out of range.
        """
        for name in ("max_model_len", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _MOST:
                raise TargetError(f"{name} must be between 1 and 2^40, not {value}")


def cache_dir() -> Path:
    """Folder of parsed headers: ``MOECORE_CACHE``, else ``moecore`` in the user's cache folder."""
    own = os.environ.get("MOECORE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "moecore"


def scan(
    target: str | Path,
    *,
    revision: str | None = None,
    max_model_len: int | None = None,
    batch_size: int = 1,
    kv_cache_dtype: str = "auto",
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache: bool = True,
) -> ScanReport:
    """Says what memory a model takes, from its safetensors headers alone.

    Args:
        target: a repo id ``org/name[@revision]``, a folder, a ``.safetensors`` file or a
            ``.safetensors.index.json``.
        revision: branch, tag or commit of a repo; ``main`` by default.
        max_model_len: tokens a sequence for the KV cache; the config's longest context by default.
        batch_size: sequences for the KV cache.
        kv_cache_dtype: "auto" (what the checkpoint says, else the model's dtype), "float32", "bfloat16", "float16",
            "fp8" and its kinds, or "fp8_ds_mla" (656 bytes a token and layer for DeepSeek's latents).
        token: a hub token; the one huggingface_hub knows by default; False sends none.
        endpoint: hub address; ``HF_ENDPOINT`` or the public hub by default.
        cache: whether parsed headers of former scans may be used and are stored (see :func:`cache_dir`).

    Returns:
        The report. Its ``status`` is "partial" when a file could not be read; ``error`` says which.

    Raises:
        MoecoreError: nothing could be read; its subclass says why.
    """
    options = Options(revision, max_model_len, batch_size, kv_cache_dtype, token, endpoint, cache)
    return Session(options).scan(target)


def scan_many(
    targets: Iterable[str | Path],
    *,
    jobs: int = 16,
    revision: str | None = None,
    max_model_len: int | None = None,
    batch_size: int = 1,
    kv_cache_dtype: str = "auto",
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache: bool = True,
) -> Generator[ScanReport, None, None]:
    """Scans many targets, ``jobs`` at a time, and yields each report when it is complete.

    A target that fails gives a report with ``status`` "error"; it never ends the others. Closing the iterator cancels
    what is still running. Other arguments are those of :func:`scan`.
    """
    if jobs < 1:
        raise TargetError(f"jobs must be at least 1, not {jobs}")
    options = Options(revision, max_model_len, batch_size, kv_cache_dtype, token, endpoint, cache)
    return Session(options).scan_many(targets, jobs=jobs)


_scanner_lock = threading.Lock()
_scanners: dict[tuple[int, Path], Scanner] = {}


def _shared_scanner() -> Scanner:
    """The process's one scanner: connections and pauses are shared by all scans. A forked process makes its own."""
    key = (os.getpid(), cache_dir())
    with _scanner_lock:
        if key not in _scanners:
            _scanners[key] = Scanner(cache_dir=key[1], user_agent=f"moecore/{__version__}")
        return _scanners[key]


class Session:
    """Scans with the same options and one cancel switch."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._scanner = _shared_scanner()
        self._cancel = Cancel()
        self._hub: _hub.Hub | None = None
        self._hub_lock = threading.Lock()
        self._api_requests = 0
        self._before = self._scanner.counters()

    def scan(self, target: str | Path) -> ScanReport:
        """See :func:`scan`."""
        parsed = Target.parse(target, self._options.revision, self._options.endpoint)
        start = time.perf_counter()
        if parsed.path is not None:
            document = self._scan_folder(parsed.path)
            return self._report(document, parsed, None, start)
        if _hub.is_offline():
            folder, commit = _hub.offline_snapshot(parsed.repo, parsed.revision)
            return self._report(self._scan_folder(folder), parsed, commit, start)
        return self._scan_hub(parsed, start)

    def scan_many(self, targets: Iterable[str | Path], *, jobs: int) -> Generator[ScanReport, None, None]:
        """See :func:`scan_many`."""
        with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="moecore-scan") as pool:
            futures = [pool.submit(self.attempt, target) for target in targets]
            try:
                for future in as_completed(futures):
                    # The list would keep every report alive until the end.
                    futures.remove(future)
                    yield future.result()
            finally:
                if futures:
                    self.cancel()
                    pool.shutdown(wait=True, cancel_futures=True)

    def attempt(self, target: str | Path) -> ScanReport:
        """The report of a target, with ``status`` "error" when it cannot be scanned."""
        start = time.perf_counter()
        requested = os.fspath(target)
        try:
            return self.scan(target)
        except MoecoreError as error:
            return _failed(error, requested, self._options, time.perf_counter() - start)
        except Exception as error:  # one repo's surprise must not end a run over thousands
            surprise = MoecoreError(f"{requested}: {type(error).__name__}: {error}")
            return _failed(surprise, requested, self._options, time.perf_counter() - start)

    def cancel(self) -> None:
        """Ends running and future scans of this session."""
        self._cancel.cancel()

    def counters(self) -> tuple[int, int]:
        """Requests sent and bytes received since the session began, API requests included in the first."""
        requests, received = (now - before for now, before in zip(self._scanner.counters(), self._before, strict=True))
        return requests + self._api_requests, received

    def _scan_folder(self, path: str) -> str:
        options = self._options
        with _panics_reported(path):
            return Scanner.scan_local(
                path=path,
                max_model_len=options.max_model_len,
                batch_size=options.batch_size,
                kv_cache_dtype=options.kv_cache_dtype,
            )

    def _scan_hub(self, target: Target, start: float) -> ScanReport:
        options = self._options
        if self._cancel.is_cancelled():
            raise CancelledError(f"{target.requested}: cancelled")
        with self._hub_lock:
            self._hub = self._hub or _hub.Hub.resolve(endpoint=options.endpoint, token=options.token)
        hub = self._hub
        commit = _hub.resolve_commit(
            hub, self._scanner, target.repo, target.revision, cache=options.cache, cancelled=self._cancel.is_cancelled
        )
        self._api_requests += commit.requests
        with _panics_reported(target.requested):
            document = self._scanner.scan_hub(
                endpoint=hub.endpoint,
                token=hub.token,
                repo=target.repo,
                commit=commit.sha,
                files=commit.files,
                max_model_len=options.max_model_len,
                batch_size=options.batch_size,
                kv_cache_dtype=options.kv_cache_dtype,
                cache=options.cache,
                cancel=self._cancel,
            )
        report = self._report(document, target, commit.sha, start)
        cost = replace(
            report.cost,
            requests=report.cost.requests + commit.requests,
            bytes_fetched=report.cost.bytes_fetched + commit.bytes_fetched,
        )
        return replace(report, cost=cost)

    @staticmethod
    def _report(document: str, target: Target, revision: str | None, start: float) -> ScanReport:
        return _report.from_core(
            document,
            target=target.name,
            requested=target.requested,
            revision=revision,
            source=target.source,
            seconds=round(time.perf_counter() - start, 6),
        )


@contextlib.contextmanager
def _panics_reported(target: str) -> Iterator[None]:
    """Turns a panic of the core into an error: it is no Exception, and would end a run over thousands."""
    try:
        yield
    except BaseException as error:
        # The class cannot be imported: the binding makes it when first it is needed.
        if type(error).__name__ == "PanicException":
            raise MoecoreError(f"{target}: internal error: {error}; please report it, with the target") from None
        raise


def _failed(error: MoecoreError, requested: str, options: Options, seconds: float) -> ScanReport:
    try:
        source = Target.parse(requested, options.revision, options.endpoint).source
    except Exception:  # the report of one surprise must not be the next
        source = "local"
    return _report.failed(error, target=requested, source=source, seconds=round(seconds, 6))


__all__ = ["Options", "Session", "Target", "cache_dir", "scan", "scan_many"]
