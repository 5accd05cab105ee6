"""Reports as frozen dataclasses. :meth:`ScanReport.to_dict` is the JSON document ``moecore.scan/1``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = "moecore.scan/1"

Status = Literal["ok", "partial", "error"]

#: A report names this many failed files; a repo of a thousand shards would fill the screen.
_MOST_FAILURES = 5


def printable(text: str) -> str:
    """Foreign text on one line, its control characters as escapes: names in a repo must not steer a terminal."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


@dataclass(frozen=True)
class Architecture:
    """What the model is. Counts are 0 where a model has no routed experts."""

    model_type: str | None
    layers: int
    moe_layers: int
    num_experts: int
    experts_per_token: int
    shared_experts: int
    quantization: str | None
    tied_embeddings: bool


@dataclass(frozen=True)
class Parameters:
    """Logical parameters: packed values unpacked, scales and buffers not counted.

    ``total`` leaves multi-token-prediction modules out (``checkpoint = total + mtp``). ``active`` is what one text
    token multiplies with: everything but routed experts, MTP and towers, plus top-k of E routed experts a layer, with
    the embedding and the head as whole matrices; ``active_without_embeddings`` leaves both of those out.
    """

    total: int
    active: int
    active_without_embeddings: int
    routed: int
    shared: int
    mtp: int
    vision: int
    checkpoint: int
    stored_elements: int
    by_role: dict[str, int]


@dataclass(frozen=True)
class Bytes:
    """Bytes of weights. ``base + routed_experts == total``; ``per_expert`` has an expert's scales and biases."""

    total: int
    base: int
    routed_experts: int
    per_expert: int
    per_moe_layer: int
    mtp_routed_experts: int
    active: int
    by_role: dict[str, int]
    by_dtype: dict[str, int]


@dataclass(frozen=True)
class ExpertGroup:
    """Routed experts of one size: ``experts`` of them in each of ``layers``."""

    layers: list[int]
    experts: int
    bytes: int
    parameters: int
    mtp: bool


@dataclass(frozen=True)
class LayerGroup:
    """Layers that keep the same cache. ``bytes`` is one layer's, for the batch; ``window`` is in tokens."""

    kind: str
    layers: list[int]
    bytes_per_token: int
    window: int | None
    state_bytes: int
    bytes: int


@dataclass(frozen=True)
class KvCache:
    """What the past takes at ``max_model_len`` tokens in ``batch_size`` sequences.

    ``bytes`` has recurrent states (``state_bytes``) in it and is the lower bound when ``status`` is "bounded";
    ``bytes_reserved`` is what an engine's block arithmetic sets aside for the same.
    """

    status: Literal["exact", "bounded", "unknown"]
    bytes: int
    bytes_upper: int
    bytes_reserved: int
    bytes_per_token: int
    state_bytes: int
    max_model_len: int
    batch_size: int
    dtype: str
    reason: str | None
    per_layer: list[LayerGroup]


@dataclass(frozen=True)
class Cost:
    """What the scan itself took."""

    requests: int
    bytes_fetched: int
    header_bytes: int
    seconds: float


@dataclass(frozen=True)
class ScanReport:
    """What a checkpoint takes. Sections are None only when ``status`` is "error"."""

    target: str
    revision: str | None
    source: Literal["hub", "local"]
    status: Status
    error: str | None
    architecture: Architecture | None
    parameters: Parameters | None
    bytes: Bytes | None
    kv_cache: KvCache | None
    unrecognised: list[str]
    warnings: list[str]
    cost: Cost
    requested: str
    error_type: str | None = None
    files: int = 0
    tensors: int = 0
    expert_groups: list[ExpertGroup] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, schema ``moecore.scan/1``."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def to_json(self, *, indent: int | None = None) -> str:
        """The report as JSON, in ASCII and on one line unless ``indent`` is given."""
        separators = (",", ":") if indent is None else None
        return json.dumps(self.to_dict(), indent=indent, separators=separators)

    def __str__(self) -> str:
        """The report as a table."""
        from moecore.render import to_text

        return to_text(self)


def from_core(
    document: str, *, target: str, requested: str, revision: str | None, source: Literal["hub", "local"], seconds: float
) -> ScanReport:
    """Builds the report from what the core returns (JSON). Requests of the caller are added by the caller."""
    data = json.loads(document)
    report = data["report"]
    kv = report["kv_cache"]
    failures = data["failures"]
    no_config = any(warning.startswith("no config.json") for warning in report["warnings"])
    return ScanReport(
        target=target,
        revision=revision,
        source=source,
        status="partial" if failures or no_config else "ok",
        error=_joined([failure["message"] for failure in failures]),
        error_type=failures[0]["type"] if failures else None,
        architecture=Architecture(**report["architecture"]),
        parameters=Parameters(**report["parameters"]),
        bytes=Bytes(**report["bytes"]),
        kv_cache=KvCache(**{**kv, "per_layer": [LayerGroup(**group) for group in kv["per_layer"]]}),
        unrecognised=report["unrecognised"],
        warnings=report["warnings"],
        cost=Cost(**data["cost"], seconds=seconds),
        requested=requested,
        files=data["files"],
        tensors=data["tensors"],
        expert_groups=[ExpertGroup(**group) for group in report["expert_groups"]],
    )


def _joined(messages: list[str]) -> str | None:
    left = len(messages) - _MOST_FAILURES
    shown = [*messages[:_MOST_FAILURES], *([f"and {left} more"] if left > 0 else [])]
    return "; ".join(shown) or None


def failed(error: Exception, *, target: str, source: Literal["hub", "local"], seconds: float) -> ScanReport:
    """The report of a target that could not be scanned. It keeps the name it was asked for by."""
    return ScanReport(
        target=target,
        revision=None,
        source=source,
        status="error",
        error=str(error) or type(error).__name__,
        error_type=type(error).__name__,
        architecture=None,
        parameters=None,
        bytes=None,
        kv_cache=None,
        unrecognised=[],
        warnings=[],
        cost=Cost(requests=0, bytes_fetched=0, header_bytes=0, seconds=seconds),
        requested=target,
    )
