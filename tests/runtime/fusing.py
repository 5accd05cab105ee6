"""Small models to be fused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from moecore.runtime import families


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if tiny.VERSION < (5, 23) and name in ("aria_text", "muse_spark_text"):
        pytest.skip(f"transformers {tiny.transformers.__version__} has another {name}, or none")
    with tiny.quiet():
        return tiny.build(name, dtype)


def experts_of(model: Any) -> Any:
    return families.find(model)[0].module
