"""The server's process: its three ports and its command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import sys
from typing import Any

from .answers import start_line
from .connection import Connection
from .faults import Fault
from .hub import Hub


class Control(asyncio.Protocol):
    """The control port: POST /add, /fault, /settings, /clear, /reset, /log, /totals, each JSON in and out."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).decode("latin-1")
        match = re.search(r"content-length: *(\d+)", head, re.IGNORECASE)
        size = int(match.group(1)) if match else 0
        if len(self.buffer) < end + 4 + size:
            return
        body = bytes(self.buffer[end + 4 : end + 4 + size])
        del self.buffer[: end + 4 + size]
        path = head.split(" ", 2)[1]
        try:
            status, answer = 200, self.command(path, json.loads(body) if body else None)
        except Exception as error:
            status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
        text = json.dumps(answer).encode()
        self.transport.write(start_line(status) + b"Content-Length: %d\r\n\r\n" % len(text) + text)

    def command(self, path: str, body: Any) -> Any:
        hub = self.hub
        if path == "/add":
            return [hub.add(one) for one in body]
        if path == "/fault":
            hub.faults.append(Fault(body))
        elif path == "/unfault":
            hub.faults.clear()
        elif path == "/settings":
            if body.get("quota"):
                body["quota"] = tuple(body["quota"])
            hub.settings(**body)
        elif path == "/clear":
            hub.clear()
        elif path == "/reset":
            hub.reset()
        elif path == "/log":
            return hub.entries
        elif path == "/totals":
            return {**hub.totals, "cpu": sum(os.times()[:2]), "pid": os.getpid()}
        else:
            raise ValueError(f"no such command: {path}")
        return {}


def listen(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(1024)
    return sock


async def serve(args: argparse.Namespace) -> None:
    hub = Hub()
    loop = asyncio.get_running_loop()
    socks = {name: listen(args.host, getattr(args, f"{name}_port")) for name in ("hub", "cdn", "control")}
    urls = {name: f"http://{args.host}:{sock.getsockname()[1]}" for name, sock in socks.items()}
    hub.origins = {"hub": urls["hub"], "cdn": urls["cdn"]}
    hub.settings(args.latency_ms, args.page_size, args.small, record=not args.no_log)
    for one in args.repo:
        name, _, folder = one.partition("=")
        hub.add({"repo": name, "folder": folder})
    await loop.create_server(lambda: Connection(hub, "hub"), sock=socks["hub"], backlog=1024)
    await loop.create_server(lambda: Connection(hub, "cdn"), sock=socks["cdn"], backlog=1024)
    await loop.create_server(lambda: Control(hub), sock=socks["control"])
    print(json.dumps(urls), flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if args.until_eof:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a test is for the client

        def at_input() -> None:
            if not os.read(sys.stdin.fileno(), 4096):
                stop.set()

        loop.add_reader(sys.stdin.fileno(), at_input)
    await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A fake Hugging Face hub; prints its URLs as one line of JSON.")
    parser.add_argument("--host", default="127.0.0.1")
    for name in ("hub", "cdn", "control"):
        parser.add_argument(f"--{name}-port", type=int, default=0, metavar="PORT", help="default: any free port")
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME=FOLDER", help="serve a folder")
    parser.add_argument("--latency-ms", type=float, default=0, help="round trip, per request and per new connection")
    parser.add_argument("--page-size", type=int, default=1000, help="entries per page of a tree listing")
    parser.add_argument("--small", choices=["direct", "redirect"], default="direct", help="how small files are served")
    parser.add_argument("--no-log", action="store_true", help="keep sums only")
    parser.add_argument("--until-eof", action="store_true", help="end when the standard input ends")
    asyncio.run(serve(parser.parse_args()))
