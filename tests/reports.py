"""How tests get a report as users read it in JSON, and the units they count in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import moecore
import realrepo

if TYPE_CHECKING:
    from pathlib import Path

Report = dict[str, Any]

GIB = 2**30
BF16 = 2


def scan(folder: Path, **options: Any) -> Report:
    """The report on a folder."""
    report: Report = moecore.scan(folder, **options).to_dict()
    return report


def rebuild(name: str, folder: Path, **options: Any) -> Report:
    """Rebuilds a real repository in the folder, and reports on it."""
    realrepo.build(name, folder)
    return scan(folder, **options)
