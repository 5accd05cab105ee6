"""The fake hub of these tests: a real server process with its own log. The tests believe that log, not the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakehub import FakeHub
from hubscans import MADE, REPO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module", autouse=True)
def online() -> Iterator[None]:
    """Tests of models switch the hub off for their whole process, which huggingface_hub reads when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The fake hub with one good repository, and a cache folder and environment of the test's own."""
    server.reset()
    server.add(REPO, MADE.files)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setenv("MOECORE_CACHE", str(tmp_path / "headers"))
    return server
