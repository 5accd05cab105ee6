"""Answers that know neither repositories nor connections."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .content import Blob

if TYPE_CHECKING:
    from .connection import Connection
    from .faults import Call

REASONS = {
    200: "OK", 206: "Partial Content", 302: "Found", 307: "Temporary Redirect", 400: "Bad Request",
    401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    416: "Range Not Satisfiable", 429: "Too Many Requests", 500: "Internal Server Error", 502: "Bad Gateway",
    503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip

Answer = Callable[["Connection", "Call"], None]


def field(head: bytes, low: bytes, name: bytes) -> str | None:
    """The value of a request header; `low` is `head` in lower case."""
    at = low.find(name)
    if at < 0:
        return None
    end = head.find(b"\r\n", at + 2)
    return head[at + len(name) : end if end > 0 else len(head)].decode("latin-1").strip()


def lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{key}: {value}\r\n" for key, value in headers.items()).encode("latin-1")


def start_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\n".encode()


def plain(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
    """A fixed answer: JSON, or text as it is."""
    text = body.encode() if isinstance(body, str) else json.dumps(body, separators=(",", ":")).encode()
    kind = b"" if headers and "Content-Type" in headers else b"Content-Type: application/json; charset=utf-8\r\n"
    head = start_line(status) + lines(headers or {}) + kind
    blob = Blob(text, len(text), lfs=False)

    def answer(conn: Connection, call: Call) -> None:
        conn.send(call, status, head, blob, 0, len(text))

    return answer


def refuse(status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    return plain(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text, **(headers or {})})


def xml(status: int, code: str, text: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{text}</Message></Error>'
    return plain(status, body, {"Content-Type": "application/xml"})


def redirect(status: int, location: str, extra: bytes) -> Answer:
    text = f"{REASONS[status]}. Redirecting to {location}".encode()
    head = start_line(status) + b"Content-Type: text/plain; charset=utf-8\r\nLocation: " + location.encode() + b"\r\n"
    head += extra
    blob = Blob(text, len(text), lfs=False)

    def answer(conn: Connection, call: Call) -> None:
        conn.hub.totals["redirects"] += 1
        conn.send(call, status, head, blob, 0, len(text))

    return answer
