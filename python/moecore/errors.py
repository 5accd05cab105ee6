"""Exceptions of moecore. Every one is a :class:`MoecoreError`; messages name the file and say what to do."""

from __future__ import annotations


class MoecoreError(Exception):
    """Base of all errors of this package.

    Attributes:
        file: the file the error is about, or None.
        tensor: the tensor the error is about, or None.
    """

    file: str | None = None
    tensor: str | None = None


class HeaderError(MoecoreError, ValueError):
    """A safetensors header breaks the format's rules."""


class ConfigError(MoecoreError, ValueError):
    """``config.json`` or an index file cannot be used."""


class TargetError(MoecoreError, ValueError):
    """The target or an option cannot be used."""


class FileError(MoecoreError, OSError):
    """A local file cannot be read or written."""


class CancelledError(MoecoreError):
    """The work was cancelled."""


class BudgetError(MoecoreError, ValueError):
    """The memory given to experts cannot hold what one call needs."""


class DeviceError(MoecoreError, RuntimeError):
    """A device, its driver or its memory failed."""


class HubError(MoecoreError):
    """The hub cannot give what was asked for."""


class NotFoundError(HubError):
    """A repo, revision or file does not exist."""


class AccessError(HubError):
    """A repo is gated or private, or the token is not accepted."""


class RateLimitError(HubError):
    """The hub asks for fewer requests than the scan may still make."""


class NetworkError(HubError):
    """The connection failed after all retries, or the server's answer contradicts itself."""


class OfflineError(HubError):
    """The network is switched off and the answer is not cached."""
