"""One connection: requests in, answers out, right or wrong."""

from __future__ import annotations

import asyncio
import gzip
import re
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

from .answers import field, plain, redirect, start_line
from .faults import Call

if TYPE_CHECKING:
    from .content import Blob
    from .faults import Fault
    from .hub import Hub

DIRECT = 1 << 20  # bodies up to this size are written at once, longer ones with flow control
SHAPES = ("gzip", "length", "drop_body", "stall", "chunked", "slow")


class Connection(asyncio.Protocol):
    """One connection of a client to either origin."""

    def __init__(self, hub: Hub, origin: str) -> None:
        self.hub = hub
        self.origin = origin
        self.buffer = b""
        self.busy = False
        self.close_after = False
        self.entry: list[Any] | None = None
        self.limit = b""
        self.writable = asyncio.Event()
        self.writable.set()
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.hub.connections += 1
        self.hub.totals["connections"] += 1
        self.number = self.hub.connections
        self.ready = time.monotonic() + self.hub.latency  # the connection's own round trip
        transport.set_write_buffer_limits(high=1 << 20)

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()
        if self.task:
            self.task.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        self.buffer = self.buffer + data if self.buffer else data
        self.next_request()

    def next_request(self) -> None:
        if self.busy:
            return
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self.buffer) > 65536:
                self.transport.abort()
            return
        head, self.buffer = self.buffer[:end], self.buffer[end + 4 :]
        self.busy = True
        if self.hub.latency:
            wait = max(0.0, self.ready - time.monotonic()) + self.hub.latency
            asyncio.get_running_loop().call_later(wait, self.handle, head)
        else:
            self.handle(head)

    def handle(self, head: bytes) -> None:
        if self.transport.is_closing():
            return
        hub = self.hub
        try:
            method, target, _ = head[: head.index(b"\r\n")].decode("latin-1").split(" ")
        except ValueError:
            self.transport.abort()
            return
        low = head.lower()
        call = Call(method, target, field(head, low, b"\r\nrange:"), field(head, low, b"\r\nauthorization:"), None)
        self.close_after = b"\r\nconnection: close" in low
        totals = hub.totals
        totals["requests"] += 1
        totals[self.origin] += 1
        self.entry = None
        if hub.record:
            self.entry = [
                time.monotonic(), self.origin, method, target, call.range, call.authorization, 0, 0, self.number,
                field(head, low, b"\r\nuser-agent:") or "", field(head, low, b"\r\naccept-encoding:") or "",
            ]  # fmt: skip
            hub.entries.append(self.entry)
        if method not in ("GET", "HEAD"):
            plain(405, {"error": "method not allowed"})(self, call)
            return
        self.limit = b""
        if hub.quota is not None and self.origin == "hub":
            self.limit, wait = hub.over_quota()
            if wait:
                plain(429, {"error": "We had to rate limit you"})(self, call)
                return
        if hub.faults:
            for fault in hub.faults:
                if fault.takes(self.origin, method, target):
                    call.fault = fault
                    if self.fail_now(call, fault):
                        return
                    break
        hub.route(self.origin, target)(self, call)

    def fail_now(self, call: Call, fault: Fault) -> bool:
        """Faults that replace the answer as a whole."""
        params = fault.params
        if fault.kind == "status":
            call.fault = None
            plain(params["status"], params.get("body", {"error": "fault"}), params.get("headers"))(self, call)
        elif fault.kind == "drop":
            if params.get("how", "reset") == "reset":
                sock = self.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.transport.abort()
            else:
                self.transport.close()
        elif fault.kind == "garbage":
            self.transport.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
            self.transport.close()
        elif fault.kind == "redirect":
            call.fault = None
            values = {**self.hub.origins, "path": call.target}
            redirect(params.get("status", 302), params["location"].format(**values), b"")(self, call)
        elif fault.kind == "body":
            call.fault = None
            plain(200, params["body"], {"Content-Type": params.get("type", "text/html")})(self, call)
        else:
            return False
        return True

    # --------------------------------------------------------------------------------------------------------- answers

    def send_blob(self, call: Call, blob: Blob, extra: bytes) -> None:
        """The file or the range of it that was asked for, with the call's fault."""
        fault = call.fault
        kind = fault.kind if fault else ""
        params = fault.params if fault else {}
        span = parse_range(call.range, blob.length) if call.range and kind != "ignore_range" else None
        if span is None:
            self.send(call, 200, start_line(200) + extra + blob.static, blob, 0, blob.length)
            return
        start, end = span
        if start >= end:
            head = start_line(416) + extra + b"Content-Range: bytes */%d\r\n" % blob.length
            self.send(call, 416, head, blob, 0, 0)
            return
        total = blob.length
        if kind == "short":
            end = start + min(end - start, params.get("keep", (end - start) // 2))
        elif kind == "start":
            start = min(end - 1, start + params.get("delta", 8))
        elif kind == "total":
            total = params["total"]
        head = start_line(206) + extra + blob.static
        if kind != "no_range":
            head += b"Content-Range: bytes %d-%d/%d\r\n" % (start, end - 1, total)
        if kind == "truncate":
            end = start + min(end - start, params.get("keep", (end - start) // 2))
        self.send(call, 206, head, blob, start, end)

    def send(self, call: Call, status: int, head: bytes, blob: Blob, start: int, end: int) -> None:
        """Head (without length) and body."""
        if call.fault is not None and call.fault.kind in SHAPES:
            self.task = asyncio.ensure_future(self.send_faulty(call.fault, call, status, head, blob, start, end))
            return
        size = end - start
        head = b"%s%sContent-Length: %d\r\n\r\n" % (head, self.limit, size)
        if call.method == "HEAD":
            size = 0
        if size > DIRECT:
            self.task = asyncio.ensure_future(self.stream(status, head, blob, start, end))
            return
        if size:
            if end > len(blob.prefix):
                self.transport.write(b"".join([head, *blob.pieces(start, end)]))
            elif size > 32768:
                self.transport.write(head)
                self.transport.write(blob.prefix[start:end])
            else:
                self.transport.write(head + blob.prefix[start:end])
        else:
            self.transport.write(head)
        self.count(status, size, len(head) + size)
        self.done()

    async def stream(self, status: int, head: bytes, blob: Blob, start: int, end: int) -> None:
        self.transport.write(head)
        self.count(status, 0, len(head))
        for piece in blob.pieces(start, end):
            await self.writable.wait()
            if self.transport.is_closing():
                return
            self.transport.write(piece)
            self.count(status, len(piece), len(piece))
        self.done()

    async def send_faulty(
        self, fault: Fault, call: Call, status: int, head: bytes, blob: Blob, start: int, end: int
    ) -> None:
        kind, params = fault.kind, fault.params
        body = b"".join(blob.pieces(start, min(end, start + (64 << 20))))
        claim = len(body)
        if kind == "gzip":
            body = gzip.compress(body)
            head += b"Content-Encoding: gzip\r\n"
            claim = len(body)
        elif kind == "length":
            claim = max(0, claim + params.get("delta", 100))
        elif kind == "drop_body":
            body = body[: params.get("after", claim // 2)]
        elif kind == "stall":
            body = body[: params.get("after", 0)]
        if kind == "chunked":
            head += b"Transfer-Encoding: chunked\r\n\r\n"
            piece = params.get("piece", 1000)
            parts = [body[i : i + piece] for i in range(0, len(body), piece)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in parts) + b"0\r\n\r\n"
        else:
            head += b"Content-Length: %d\r\n\r\n" % claim
        self.transport.write(head)
        if call.method == "HEAD":
            body = b""
        self.count(status, len(body), len(head) + len(body))
        if kind == "slow":
            piece = params.get("piece", 1000)
            for i in range(0, len(body), piece):
                if self.transport.is_closing():
                    return
                self.transport.write(body[i : i + piece])
                await asyncio.sleep(params.get("pause", 0.05))
        else:
            self.transport.write(body)
        if kind == "stall":
            await asyncio.sleep(params.get("seconds", 600))
        if kind in ("drop_body", "length", "stall"):
            self.transport.close()
            return
        self.done()

    def count(self, status: int, size: int, wire: int) -> None:
        self.hub.totals["bytes"] += size
        self.hub.totals["wire"] += wire
        if self.entry is not None:
            self.entry[6] = status
            self.entry[7] += size

    def done(self) -> None:
        self.busy = False
        if self.close_after:
            self.transport.close()
        elif self.buffer:
            self.next_request()


def parse_range(text: str, length: int) -> tuple[int, int] | None:
    """start, end (exclusive); start >= end when it cannot be satisfied; None when it is not a range."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", text)
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, length - int(last)), length
    return int(first), min(length, int(last) + 1) if last else length
