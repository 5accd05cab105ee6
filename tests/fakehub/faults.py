"""Requests, and what is to go wrong with them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class Fault:
    """What to do wrong, where, and how often."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.pattern = re.compile(spec["pattern"])
        self.kind: str = spec["kind"]
        self.left: int = spec.get("count", 1)
        self.skip: int = spec.get("skip", 0)
        self.origin: str | None = spec.get("origin")
        self.method: str | None = spec.get("method")
        self.params: dict[str, Any] = spec.get("params", {})

    def takes(self, origin: str, method: str, target: str) -> bool:
        """Whether this request is to fail; counts down."""
        if self.left == 0 or (self.origin and self.origin != origin) or (self.method and self.method != method):
            return False
        if not self.pattern.search(target):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.left -= 1
        return True


@dataclass
class Call:
    """One request, as far as anybody asks."""

    method: str
    target: str
    range: str | None
    authorization: str | None
    fault: Fault | None
