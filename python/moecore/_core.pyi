"""The Rust core."""

from pathlib import Path
from typing import Any, final

__all__ = ["Cancel", "Scanner", "__version__", "replay_policy"]

__version__: str

@final
class Cancel:
    """Ends the scans it was given to."""

    def __new__(cls) -> Cancel: ...
    def cancel(self) -> None:
        """Ends running and future scans that have this switch, with `CancelledError`."""

    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""

@final
class Scanner:
    """Reads headers and reports on them. Safe to use from many threads."""

    def __new__(
        cls,
        *,
        cache_dir: str | Path | None,
        user_agent: str,
        connections: int = 64,
        timeout: float = 30.0,
        retries: int = 5,
    ) -> Scanner: ...
    def scan_hub(
        self,
        *,
        endpoint: str,
        token: str | None,
        repo: str,
        commit: str,
        files: list[str],
        max_model_len: int | None,
        batch_size: int,
        kv_cache_dtype: str,
        cache: bool,
        cancel: Cancel,
    ) -> str:
        """Scans a repo at a commit; returns the report as JSON."""

    @staticmethod
    def scan_local(*, path: str | Path, max_model_len: int | None, batch_size: int, kv_cache_dtype: str) -> str:
        """Scans a local folder or file; returns the report as JSON."""

    def has_cached(self, endpoint: str, repo: str, commit: str) -> bool:
        """Whether the cache has headers of a commit."""

    def pause_for(self, url: str) -> float:
        """Seconds for which a URL's host asked everybody to wait."""

    def note_response(self, url: str, status: int, headers: list[tuple[str, str]]) -> None:
        """Tells about an answer that somebody else got, so that a pause holds for all."""

    def counters(self) -> tuple[int, int]:
        """Requests sent and bytes received so far."""

def replay_policy(
    policy: str,
    experts_per_layer: list[int],
    slots: int,
    calls: list[tuple[int, list[int]]],
    *,
    warm_up: int = 0,
    pinned: list[int] = ...,
    prepare: int = 0,
) -> dict[str, Any]:
    """Replays calls, each a layer and its experts, from empty slots; returns counts."""
