"""The real metadata that is kept in ``data/models``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tensors import Json

DATA = Path(__file__).resolve().parent.parent / "data"
MODELS = DATA / "models"


def folder_of(name: str) -> Path:
    """Where a repository's metadata lies, if it is kept."""
    return MODELS / name.replace("/", "__")


def load_config(name: str, file: str = "config.json") -> Json:
    """A stored config of a repository."""
    loaded: Json = json.loads((folder_of(name) / file).read_bytes())
    return loaded


def config_variants(name: str) -> list[str]:
    """The stored config files of a repository: ``config.json`` first, then other copies of it."""
    return sorted((path.name for path in folder_of(name).glob("config*.json")), key=lambda file: (len(file), file))
