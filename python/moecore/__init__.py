"""Know, run and operate Mixture-of-Experts models that are larger than their accelerators.

>>> import moecore
>>> report = moecore.scan("Qwen/Qwen3-30B-A3B")      # doctest: +SKIP
>>> report.bytes.routed_experts                       # doctest: +SKIP
57982058496
"""

from moecore._core import __version__
from moecore.errors import (
    AccessError,
    CancelledError,
    ConfigError,
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
    "CancelledError",
    "ConfigError",
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
    "scan",
    "scan_many",
]
