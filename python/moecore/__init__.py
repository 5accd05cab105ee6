"""Know, run and operate Mixture-of-Experts models that are larger than their accelerators.

>>> import moecore
>>> report = moecore.scan("Qwen/Qwen3-30B-A3B")      # doctest: +SKIP
>>> report.bytes.routed_experts                       # doctest: +SKIP
57982058496
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moecore._core import __version__
from moecore.errors import (
    AccessError,
    BudgetError,
    CancelledError,
    ConfigError,
    DeviceError,
    FileError,
    HeaderError,
    HubError,
    MoecoreError,
    NetworkError,
    NotFoundError,
    OfflineError,
    RateLimitError,
    TargetError,
)
from moecore.report import ScanReport
from moecore.scan import scan, scan_many

__all__ = [
    "AccessError",
    "BudgetError",
    "CancelledError",
    "ConfigError",
    "DeviceError",
    "FileError",
    "HeaderError",
    "HubError",
    "MoecoreError",
    "NetworkError",
    "NotFoundError",
    "OfflineError",
    "RateLimitError",
    "ScanReport",
    "TargetError",
    "__version__",
    "fuse",
    "load",
    "ops",
    "register",
    "scan",
    "scan_many",
    "unfuse",
    "unwrap",
    "wrap",
]

if TYPE_CHECKING:
    from moecore import ops
    from moecore.runtime import fuse, load, register, unfuse, unwrap, wrap


def __getattr__(name: str) -> Any:
    """Imports what needs torch at its first use: scanning must neither need it nor wait for it."""
    if name not in ("fuse", "load", "ops", "register", "unfuse", "unwrap", "wrap"):
        raise AttributeError(f"module 'moecore' has no attribute {name!r}")
    try:
        if name == "ops":
            return import_module("moecore.ops")
        from moecore import runtime
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise MoecoreError(f'moecore.{name} needs {error.name}; run: pip install "moecore[torch]"') from error
    return getattr(runtime, name)
