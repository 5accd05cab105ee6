"""The tests of this folder need torch and transformers; without them each module is skipped, with that reason."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]

sys.path[:0] = [str(Path(__file__).parents[1] / "tools")]


class Skipped(pytest.Module):
    """Stands for a module that cannot be imported here."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip(f"the runtime's tests need {' and '.join(MISSING)}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Skipped.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny checkpoints are kept for all tests, and for all workers where tests run in parallel."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "tiny-checkpoints"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny products on many threads are slower, and the workers share the cores."""
    if not MISSING:
        import torch

        torch.set_num_threads(1)
