"""Scans of the fake hub's one good repository, and what tests ask of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import moecore
from hubdata import Made, qwen3_moe
from moecore import MoecoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fakehub import FakeHub, Request

MADE = qwen3_moe()
REPO = "org/moe"
FIRST_RANGE = 100_001  # what the tool that we are compared with asks for; we ask for no more


def scan(hub: FakeHub, target: str = REPO, **more: Any) -> dict[str, Any]:
    """One scan as the JSON that users get."""
    return dict(moecore.scan(target, endpoint=hub.url, **more).to_dict())


def check(report: dict[str, Any], made: Made = MADE, status: str = "ok") -> None:
    """The figures are those that follow from the shapes."""
    assert (report["status"], report["error"]) == (status, None), report
    assert report["bytes"]["total"] == made.total
    assert report["bytes"]["routed_experts"] == made.routed
    assert report["bytes"]["base"] == made.total - made.routed


def attempt(call: Callable[[], Any]) -> tuple[dict[str, Any] | None, MoecoreError | None]:
    """The report or the error of a scan that may end in either."""
    try:
        report = call()
    except MoecoreError as error:
        return None, error
    return report if isinstance(report, dict) else report.to_dict(), None


def one_file_refused(call: Callable[[], Any], name: str) -> None:
    """A file that cannot be used is named, and what the others say is kept."""
    report, error = attempt(call)
    assert error is None
    assert report is not None
    assert report["status"] == "partial"
    assert name in report["error"]
    assert 0 < report["bytes"]["total"] < MADE.total


def shard_requests(log: list[Request]) -> list[Request]:
    return [one for one in log if ".safetensors" in one.path.split("?")[0] or one.origin == "cdn"]


def resolves(log: list[Request], name: str = "") -> list[Request]:
    return [one for one in log if one.origin == "hub" and "/resolve/" in one.path and name in one.path]


def widen(content: Any) -> Any:
    """A shard like the given one with 2 GB of data behind its header."""
    if isinstance(content, bytes):
        return content
    text = json.loads(content[0][8:])
    last = max(one["data_offsets"][1] for name, one in text.items() if name != "__metadata__")
    text["padding.weight"] = {"dtype": "BF16", "shape": [10**9], "data_offsets": [last, last + 2 * 10**9]}
    data = json.dumps(text).encode()
    return len(data).to_bytes(8, "little") + data, 8 + len(data) + last + 2 * 10**9
