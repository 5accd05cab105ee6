"""Servers that fail, that ask for patience, and that answer wrongly."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import moecore
import pytest
from fakehub import FakeHub, Request
from hubdata import qwen3_moe
from hubscans import MADE, attempt, check, scan, shard_requests, widen
from moecore import HeaderError, HubError, NetworkError, RateLimitError

# --------------------------------------------------------------------------------------------------- servers that fail


@dataclass(frozen=True)
class Case:
    """One fault at one place: how often (-1: always), and whether the scan has to get over it."""

    kind: str
    params: dict[str, Any]
    place: str
    count: int
    want: str  # "figures": the right ones; "error": a typed one; "either" of these, and nothing else

    @property
    def name(self) -> str:
        params = "-".join(str(one)[:8] for one in self.params.values())
        return "-".join(filter(None, [self.kind, params, self.place, "always" if self.count < 0 else ""]))


@dataclass(frozen=True)
class Outcome:
    """How a case ended, and what the server saw of it."""

    report: dict[str, Any] | None
    error: Exception | None
    seconds: float
    log: list[Request]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("short", {"keep": 100}, "figures"),
    ("short", {"keep": 1}, "figures"),
    ("short", {}, "figures"),
    ("truncate", {"keep": 100}, "either"),
    ("truncate", {}, "either"),
    ("length", {"delta": 1000}, "either"),
    ("length", {"delta": -1000}, "either"),
    ("start", {"delta": 8}, "either"),
    ("no_range", {}, "either"),
    ("total", {"total": 123}, "either"),
    ("total", {"total": 10**7}, "either"),
    ("gzip", {}, "either"),
    ("chunked", {}, "figures"),
    ("slow", {"piece": 2000, "pause": 0.02}, "figures"),
    ("status", {"status": 403, "body": "<Error><Code>AccessDenied</Code></Error>"}, "figures"),
    ("drop_body", {"after": 3}, "figures"),
]
ANYWHERE = ("api", "config", "shard", "cdn")
CASES = [
    *(Case("status", {"status": status}, place, 2, "figures") for status in (500, 503, 408) for place in ANYWHERE),
    *(Case("drop", {"how": how}, place, 2, "figures") for how in ("reset", "close") for place in ANYWHERE),
    *(Case("drop_body", {}, place, 2, "figures") for place in ANYWHERE),
    *(Case("status", {"status": 500}, place, -1, "error") for place in ANYWHERE),
    *(Case("drop", {}, place, -1, "error") for place in ANYWHERE),
    *(Case("garbage", {}, place, -1, "error") for place in ANYWHERE),
    *(Case("body", {"body": "<html>log in to the hotel network</html>"}, place, -1, "error") for place in ANYWHERE),
    *(Case("redirect", {"location": "{cdn}/loop"}, place, -1, "error") for place in ("config", "shard")),
    *(Case("redirect", {"location": "{hub}{path}"}, place, -1, "error") for place in ANYWHERE),
    *(
        Case("redirect", {"location": to}, "shard", -1, "error")
        for to in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "")
    ),
    *(Case(kind, params, "cdn", 1, want) for kind, params, want in WRONG),
    *(Case(kind, params, "cdn", -1, "either") for kind, params, _ in WRONG),
    Case("expired", {}, "shard", 2, "figures"),
    Case("expired", {}, "shard", -1, "error"),
    *(
        Case("limit", {"status": 429, "headers": {"Retry-After": "0"}}, place, -1, "error")
        for place in ("api", "shard")
    ),
    Case("nobody listens", {}, "api", -1, "error"),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[int, Outcome]:
    """All cases at once, each on a repository of its own: most of the time goes into waiting before retries."""

    def run(number: int) -> Outcome:
        start = time.monotonic()
        call = partial(moecore.scan, name(number), endpoint=endpoints[number], token=False, cache=False)
        try:
            report, error = attempt(call)
        except Exception as surprise:  # the case's own test says so, and only that one
            report, error = None, surprise
        return Outcome(report, error, time.monotonic() - start, [])

    def name(number: int) -> str:
        return f"case/{number:03d}"

    with ExitStack() as stack:
        hubs = {"": stack.enter_context(FakeHub())}
        endpoints = []
        for number, case in enumerate(CASES):
            if case.kind == "nobody listens":
                endpoints.append("http://127.0.0.1:1")
                continue
            # A rate limit holds for a host: those that never end get a host of their own.
            own = case.name if case.kind == "limit" else ""
            hub = hubs.get(own) or hubs.setdefault(own, stack.enter_context(FakeHub()))
            endpoints.append(hub.url)
            hub.add(name(number), MADE.files, salt=name(number))
            pattern, origin = {
                "api": (f"^/api/models/{name(number)}(/|$|[?])", "hub"),
                "config": (f"^/{name(number)}/resolve/.*config[.]json", "hub"),
                "shard": (f"^/{name(number)}/resolve/.*[.]safetensors", "hub"),
                "cdn": (f"repo={name(number)}&", "cdn"),
            }[case.place]
            kind = "status" if case.kind == "limit" else case.kind
            hub.fault(pattern, kind, count=case.count, origin=origin, **case.params)
        with ThreadPoolExecutor(len(CASES)) as pool:
            found = list(pool.map(run, range(len(CASES))))
        log = [request for hub in hubs.values() for request in hub.log()]
    logs: list[list[Request]] = [[] for _ in CASES]
    for request in log:
        if match := re.search(r"\bcase/(\d{3})\b", request.path):
            logs[int(match[1])].append(request)
    return {i: replace(one, log=own) for i, (one, own) in enumerate(zip(found, logs, strict=True))}


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_a_fault_is_got_over_or_named(outcomes: dict[int, Outcome], number: int) -> None:
    case, outcome = CASES[number], outcomes[number]
    assert outcome.seconds < 40
    assert len(outcome.log) < 120, "retries and redirects have an end"
    if outcome.report is not None:
        report = outcome.report
        if case.place == "config" and case.count < 0:  # the weights are known: what they say is not lost
            assert report["status"] == "partial"
            assert report["warnings"] or report["error"]
            assert report["bytes"]["total"] == MADE.total
        elif report["status"] == "partial":
            assert case.want == "either", report["error"]
            assert "model-0000" in report["error"], "names the file"
        else:
            assert case.want != "error", "nothing can be read here"
            check(report)
        return
    text = str(outcome.error)
    assert isinstance(outcome.error, (HubError, HeaderError)), repr(outcome.error)
    assert case.want != "figures", text
    assert "Traceback" not in text
    assert "\n" not in text
    if case.place in ("shard", "cdn"):
        assert "model-0000" in str(outcome.error.file), "names the file"
    if case.kind == "limit":
        assert isinstance(outcome.error, RateLimitError)
        assert "HF_TOKEN" in text
    if case.kind in ("drop", "garbage", "nobody listens") or case.params.get("status") == 500:
        assert isinstance(outcome.error, NetworkError)
        assert "check" in text or "again" in text, "says what to do"


# --------------------------------------------------------------------------------------------------------- rate limits


def pause_kept(log: list[Request], pause: float) -> None:
    """No request reaches the hub's origin during the pause after the first 429; those under way may still arrive."""
    first = next(one for one in log if one.status == 429)
    during = [one for one in log if one.origin == "hub" and first.time + 0.2 < one.time < first.time + pause - 0.05]
    assert during == [], [(round(one.time - first.time, 3), one.path) for one in during]


LIMITS = [{"Retry-After": "1"}, {"RateLimit": '"resolve";r=0;t=1', "RateLimit-Policy": '"fixed window";q=500;w=300'}]


@pytest.mark.parametrize("headers", LIMITS, ids=["retry-after", "ratelimit"])
@pytest.mark.parametrize("pattern", ["/api/", "/resolve/.*config.json", "/resolve/.*safetensors"])
def test_a_rate_limit_is_waited_for(hub: FakeHub, pattern: str, headers: dict[str, str]) -> None:
    hub.fault(pattern, "status", status=429, headers=headers)
    check(scan(hub))
    pause_kept(hub.log(), 1.0)


def test_a_rate_limit_holds_for_the_whole_host(hub: FakeHub) -> None:
    made = qwen3_moe(layers=8, experts=16, shards=60)
    hub.add("org/many", made.files)
    hub.settings(latency_ms=20)
    hub.fault("/resolve/.*-00020-", "status", status=429, headers={"Retry-After": "2"})
    check(scan(hub, "org/many"), made)
    log = hub.log()
    pause_kept(log, 2.0)
    assert [one.status for one in log].count(429) == 1


def test_a_date_in_retry_after(hub: FakeHub) -> None:
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    hub.fault("/resolve/.*safetensors", "status", status=429, headers={"Retry-After": soon})
    check(scan(hub))


def test_a_quota_that_runs_out_and_comes_back(hub: FakeHub) -> None:
    made = qwen3_moe(layers=8, experts=16, shards=60)
    hub.add("org/many", made.files)
    hub.settings(quota=(25, 1.0))
    check(scan(hub, "org/many"), made)
    refused = [one.status for one in hub.log()].count(429)
    assert refused <= 60, "each of 60 may be refused once while the quota runs out, not again and again"


@pytest.mark.parametrize("pattern", ["/api/", "/resolve/.*safetensors"])
def test_a_rate_limit_of_an_hour_is_said_not_slept(hub: FakeHub, pattern: str) -> None:
    hub.fault(pattern, "status", status=429, headers={"Retry-After": "3600"}, count=-1)
    start = time.monotonic()
    with pytest.raises(RateLimitError, match=r"3600|60 min|1 h|hour"):
        scan(hub)
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------------------------------------- answers that are wrong


def test_200_for_206_costs_no_download(hub: FakeHub) -> None:
    files = {name: widen(content) for name, content in MADE.files.items()}
    hub.add("org/big", files)
    hub.fault("", "ignore_range", origin="cdn", count=-1)
    report = scan(hub, "org/big")
    assert report["bytes"]["total"] == MADE.total + 2 * 10**9 * len(MADE.shards)
    assert sum(one.sent for one in hub.log()) < 64_000_000, "6 GB were on offer"


def test_200_for_206_of_a_small_file(hub: FakeHub) -> None:
    hub.fault("", "ignore_range", origin="cdn", count=-1)
    check(scan(hub))


def test_a_signed_url_that_expires_between_two_ranges(hub: FakeHub) -> None:
    made = qwen3_moe(layers=24, experts=200, shards=2)  # headers of about 900 KB: a second range is needed
    hub.add("org/tail", made.files)
    hub.fault("", "status", origin="cdn", status=403, body="<Error><Code>AccessDenied</Code></Error>", skip=2)
    check(scan(hub, "org/tail"), made)


def test_nobody_asks_for_compression(hub: FakeHub) -> None:
    scan(hub)
    assert {one.accept_encoding for one in shard_requests(hub.log())} <= {"", "identity"}
