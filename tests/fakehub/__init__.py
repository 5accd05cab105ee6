"""A Hugging Face hub for tests and benchmarks: a real HTTP/1.1 server in a process of its own.

Two origins, as on the real hub: the hub itself (API, resolve) and a CDN on another port to which the hub redirects
safetensors files with a signed URL. A safetensors file is its header plus a virtual tail of zeros, so that a
repository of 700 GB costs the memory of its headers. A third port, the control port, takes repositories, faults and
settings, and gives back the log of requests.

    with FakeHub(latency_ms=40) as hub:
        hub.add("org/name", {"config.json": b"{}", "model.safetensors": (header, 188_000_000_000)})
        hub.fault("/resolve/", "status", status=429, headers={"Retry-After": "1"}, count=1)
        ...  # a client that works against hub.url
        hub.log()

Faults, by a regular expression on path and query, an origin and a count:

    status         answer `status` with `headers` and `body`
    drop           close without an answer (`how`: "reset" or "close")
    drop_body      right headers, then close after `after` bytes of the body (default: half of it)
    ignore_range   200 and the whole file for a ranged request
    short          a well-formed 206 with only `keep` bytes (default: half of what was asked for)
    truncate       Content-Length and body cut to `keep` bytes, Content-Range as for the whole
    length         Content-Length wrong by `delta`
    total          the total in Content-Range is `total`
    start          the Content-Range (and the body) starts `delta` bytes later than asked for
    no_range       206 without Content-Range
    slow           body in pieces of `piece` bytes with `pause` seconds between them
    stall          headers, `after` bytes of the body, then nothing
    gzip           Content-Encoding: gzip
    chunked        Transfer-Encoding: chunked, no Content-Length
    expired        the redirect's signed URL has expired already
    redirect       302 to `location`; {hub} and {cdn} stand for the origins, {path} for the path asked for
    body           200 with `body` and `type` in place of the file
    garbage        bytes that are not HTTP

Run it by hand: `python tests/fakehub --repo org/name=FOLDER --latency-ms 40`.
"""

from .client import FakeHub as FakeHub
from .client import Request as Request
from .content import Content as Content
