"""For all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Ctrl-C is tested, and a process that was started in the background ignores it, with all its children."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
