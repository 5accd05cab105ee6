"""Starts the server, and talks to its control port."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .content import Content


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
        command = [sys.executable, str(Path(__file__).resolve().parent), "--until-eof"]
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
