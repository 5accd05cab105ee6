"""The Rust core."""

from pathlib import Path
from types import ModuleType
from typing import Any, final

__all__ = [
    "Cancel",
    "CudaEngine",
    "CudaExperts",
    "ExpertStore",
    "HostEngine",
    "HostRows",
    "PinnedArena",
    "Rows",
    "Scanner",
    "Stream",
    "__version__",
    "_testing",
    "check_policy",
    "cuda_available",
    "experts_down",
    "experts_up",
    "load_kernels",
    "replay_policy",
    "routing_align",
    "routing_combine",
    "routing_gate",
    "routing_permute",
    "routing_route",
    "routing_workspace",
]

__version__: str

@final
class Cancel:
    """Ends the scans it was given to."""

    def __new__(cls) -> Cancel: ...
    def cancel(self) -> None:
        """Ends running and future scans that have this switch, with `CancelledError`."""

    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""

@final
class Scanner:
    """Reads headers and reports on them. Safe to use from many threads."""

    def __new__(
        cls,
        *,
        cache_dir: str | Path | None,
        user_agent: str,
        connections: int = 64,
        timeout: float = 30.0,
        retries: int = 5,
    ) -> Scanner: ...
    def scan_hub(
        self,
        *,
        endpoint: str,
        token: str | None,
        repo: str,
        commit: str,
        files: list[str],
        max_model_len: int | None,
        batch_size: int,
        kv_cache_dtype: str,
        cache: bool,
        cancel: Cancel,
    ) -> str:
        """Scans a repo at a commit; returns the report as JSON."""

    @staticmethod
    def scan_local(*, path: str | Path, max_model_len: int | None, batch_size: int, kv_cache_dtype: str) -> str:
        """Scans a local folder or file; returns the report as JSON."""

    def has_cached(self, endpoint: str, repo: str, commit: str) -> bool:
        """Whether the cache has headers of a commit."""

    def pause_for(self, url: str) -> float:
        """Seconds for which a URL's host asked everybody to wait."""

    def note_response(self, url: str, status: int, headers: list[tuple[str, str]]) -> None:
        """Tells about an answer that somebody else got, so that a pause holds for all."""

    def counters(self) -> tuple[int, int]:
        """Requests sent and bytes received so far."""

def check_policy(name: str) -> None:
    """Raises `TargetError` for a name that is no policy's: to be asked before anything is moved or written."""

def replay_policy(
    policy: str,
    experts_per_layer: list[int],
    slots: int,
    calls: list[tuple[int, list[int]]],
    *,
    warm_up: int = 0,
    pinned: list[int] = ...,
    prepare: int = 0,
) -> dict[str, Any]:
    """Replays calls, each a layer and its experts, from empty slots; returns counts."""

#: Counters by name.
_Named = dict[str, int]
#: Prefill and decode counters of each layer, and tokens routed to each expert by dense id.
_Stats = tuple[list[tuple[_Named, _Named]], list[int]]

@final
class ExpertStore:
    """Where every expert's bytes lie."""

    def __new__(
        cls,
        files: list[Path] | list[str],
        layers: list[tuple[str, int, int, list[list[tuple[int, int, int, int]]]]],
    ) -> ExpertStore: ...
    @property
    def slot_bytes(self) -> int:
        """Distance between slots in bytes."""

    @property
    def experts(self) -> int:
        """The number of all experts."""

@final
class HostEngine:
    """Experts in host memory that somebody else has allocated."""

    def __new__(
        cls, store: ExpertStore, *, address: int, bytes: int, owner: object, policy: str, threads: int = 8
    ) -> HostEngine: ...
    def acquire(self, layer: int, experts: list[int], tokens: list[int], prefill: bool) -> Rows:
        """Makes experts of a layer resident and holds them until the result is released."""

    def stream(self, layer: int, experts: list[int], tokens: list[int], prefill: bool) -> Stream:
        """Streams experts of a layer in waves."""

    def prefetch(self, layer: int, experts: list[int]) -> None:
        """Brings experts of a layer where there is room."""

    @property
    def slots(self) -> tuple[int, int]:
        """Slots, and how many of them are one half of the ring."""

    @property
    def resident(self) -> int:
        """How many experts are resident."""

    def stats(self) -> _Stats:
        """Counters of each layer, prefill and decode, and tokens routed to each expert."""

    def reset_stats(self) -> None:
        """Sets every counter to zero."""

    def close(self) -> None:
        """Ends the thread and the reads. Calls after it fail."""

@final
class Rows:
    """Slots that are safe from being overwritten until they are released."""

    @property
    def slots(self) -> list[int]:
        """The slots, in the order in which their experts were asked for. Empty after `release`."""

    def release(self) -> None:
        """Lets the slots go."""

@final
class Stream:
    """Waves of experts: an iterator of (experts, slots)."""

    def __iter__(self) -> Stream: ...
    def __next__(self) -> tuple[list[int], list[int]]: ...
    def close(self) -> None:
        """Gives the ring back, also where waves are left."""

def cuda_available() -> str | None:
    """Why there is no GPU to use, or None if there is one."""

def load_kernels(device: int) -> None:
    """Loads all kernels on a GPU, or finds them loaded. Not while a stream captures: loading ends the capture."""

@final
class PinnedArena:
    """Rows of pinned host memory."""

    def __new__(cls, device: int, row_bytes: int, rows: int) -> PinnedArena: ...
    def settle(self) -> int:
        """Waits until all rows are there, or as many as the host can pin: their number."""

    def address(self, row: int) -> int | None:
        """Address of a row, or None while it is not there."""

    @property
    def rows(self) -> int:
        """Rows that were asked for."""

@final
class HostRows:
    """Rows of experts in pinned host memory, over their files."""

    def __new__(cls, store: ExpertStore, *, device: int, rows: int, policy: str, threads: int = 8) -> HostRows: ...
    def put(self, layer: int, expert: int, address: int, bytes: int) -> None:
        """Takes an expert from memory: `bytes` bytes at `address`."""

    def copy(self, layer: int, expert: int, address: int, bytes: int) -> None:
        """Gives an expert back: `bytes` bytes to `address`."""

    def settle(self) -> int:
        """Waits until the memory is pinned, or as much of it as the host gives: rows."""

    @property
    def rows(self) -> int:
        """Rows that were asked for."""

    def stats(self) -> _Stats:
        """Counters of the tier below the device."""

@final
class CudaEngine:
    """Launches of one model's experts on one GPU. Addresses are integers, and the caller answers for them."""

    def acquire(self, layer: int, ids: int, pairs: int, slots: int, phase: int, stream: int) -> None:
        """Finds the slots of a call's experts and brings those that are missing."""

    def gate_acquire(
        self,
        layer: int,
        logits_format: int,
        logits: int,
        stride: int,
        tokens: int,
        experts: int,
        k: int,
        groups: int,
        top_groups: int,
        scoring: int,
        flags: int,
        bias: int,
        weights: int,
        weights_format: int,
        ids: int,
        scale: float,
        eps: float,
        slots: int,
        phase: int,
        stream: int,
    ) -> None:
        """The same, with ids that the kernel chooses by the router's logits, and writes as int64."""

    def expert_up(
        self,
        dtype: str,
        offset: int,
        x: int,
        slots: int,
        out: int,
        tokens: int,
        k: int,
        hidden: int,
        intermediate: int,
        act: int,
        stream: int,
    ) -> None:
        """h[p] = act(gate) * up for each pair, over concatenated weights."""

    def expert_down(
        self,
        dtype: str,
        offset: int,
        x: int,
        slots: int,
        weights: int,
        weights_float32: bool,
        out: int,
        tokens: int,
        k: int,
        intermediate: int,
        hidden: int,
        stream: int,
    ) -> None:
        """out[t] = sum over k of weight * down(h[t, k])."""

    def slot_linear(
        self,
        dtype: str,
        offset: int,
        bias_offset: int | None,
        transposed: bool,
        row_per_pair: bool,
        x: int,
        slots: int,
        out: int,
        tokens: int,
        k: int,
        inputs: int,
        outputs: int,
        stream: int,
    ) -> None:
        """y[p] = W[slot] x (+ bias[slot])."""

    def update_table(self, entries: list[tuple[int, int | None]], stream: int) -> None:
        """Changes the table in `stream`: (expert, slot or None)."""

    def fill(self, slot: int, source: int, bytes: int) -> None:
        """Copies a pinned row into a slot with the copy engine."""

    def fill_from_slot(self, slot: int, source: int, bytes: int) -> None:
        """Copies one slot into another with the copy engine."""

    def mark(self, event: int) -> None:
        """Marks the end of the copies so far as event `event`."""

    def hold(self, event: int, stream: int) -> None:
        """Makes `stream` wait for the copies before `mark(event)`."""

    def after(self, event: int, stream: int) -> None:
        """Makes later copies wait for what is in `stream` now."""

    def error(self) -> str | None:
        """What has failed, or None."""

    def check(self) -> None:
        """Raises what has failed."""

    def clear_error(self) -> None:
        """Goes on after an error: waits for the GPU, forgets the error and which experts are resident."""

    def set_patience(self, seconds: float) -> None:
        """Changes how long the GPU waits for an answer, in seconds."""

    def stats(self) -> dict[str, Any]:
        """Counters of the answering thread."""

    def close(self) -> None:
        """Ends the engine; a second call does nothing."""

@final
class CudaExperts:
    """The experts of one model on one GPU."""

    def __new__(
        cls,
        rows: HostRows,
        *,
        arena: int,
        slots: int,
        table: int,
        counts: int,
        state: int,
        owners: object,
        policy: str,
    ) -> CudaExperts: ...
    @property
    def engine(self) -> CudaEngine:
        """Launches of the engine."""

    @property
    def ring(self) -> tuple[int, int, int]:
        """First slot of the ring, slots of one half, halves."""

    @property
    def resident(self) -> int:
        """How many experts are on the device."""

    def begin_prefill(self) -> list[int]:
        """Clears the ring for a prefill: dense ids that the table must forget."""

    def end_prefill(self) -> bool:
        """Gives the ring back. Its copies must be over, or be waited for by the stream that runs the next call."""

    def prefill(self, layer: int, experts: list[int], tokens: list[int]) -> list[bool]:
        """Counts a call of a prefill; whether each of its experts is on the device."""

    def stage(self, half: int, layer: int, experts: list[int], stream: int) -> None:
        """Brings experts of a layer into the first slots of a half of the ring, once `stream` has come here."""

    def ready(self, half: int, stream: int) -> None:
        """Makes `stream` wait for what was last staged in a half."""

    def admit(self, layer: int, experts: list[int]) -> list[tuple[int, int]]:
        """Gives slots to experts of a layer as long as some are free: (expert, slot). The caller copies them there."""

    def settle(self, layer: int, experts: list[int]) -> None:
        """The copies of admitted experts of a layer are enqueued."""

    def stats(self) -> _Stats:
        """Counters of each layer, prefill and decode, and tokens routed to each expert in prefill."""

    def reset_stats(self) -> None:
        """Sets every counter to zero."""

    def close(self) -> None:
        """Ends the engine. Calls after it fail."""

# Launches of `moecore.ops` on `stream`. Numbers as in cuda/routing.cuh; addresses of GPU memory, 0 where there is none.
# The caller answers for them; arguments that no kernel can serve raise DeviceError.

def routing_gate(
    device: int,
    logits_format: int,
    logits: int,
    stride: int,
    tokens: int,
    experts: int,
    k: int,
    groups: int,
    top_groups: int,
    scoring: int,
    flags: int,
    bias: int,
    weights: int,
    weights_format: int,
    ids: int,
    valid: int,
    scale: float,
    eps: float,
    stream: int,
) -> None:
    """Launches the gate: weights and ids of the k best experts of each token."""

def routing_route(
    device: int,
    logits_format: int,
    logits: int,
    stride: int,
    tokens: int,
    experts: int,
    k: int,
    groups: int,
    top_groups: int,
    scoring: int,
    flags: int,
    bias: int,
    weights: int,
    weights_format: int,
    ids: int,
    valid: int,
    scale: float,
    eps: float,
    bin_of: int,
    bins: int,
    ends: int,
    source: int,
    inverse: int,
    workspace: int,
    x: int,
    x_format: int,
    row_bytes: int,
    rows: int,
    scales: int,
    stream: int,
) -> None:
    """Launches the gate (not if `logits` is 0: ids are given), the sorting of rows by bin, and with `x` their copy."""

def routing_workspace(tokens: int, bins: int) -> int:
    """Bytes of memory that `routing_route` needs between its launches; 0 where it makes one alone."""

def routing_permute(
    device: int,
    x: int,
    x_format: int,
    inverse: int,
    out: int,
    scales: int,
    tokens: int,
    k: int,
    rows: int,
    row_bytes: int,
    stream: int,
) -> None:
    """Launches the copy of tokens' rows to the rows that `inverse` names."""

def routing_combine(
    device: int,
    format: int,
    rows: int,
    inverse: int,
    weights: int,
    weights_format: int,
    shared: int,
    residual: int,
    out: int,
    tokens: int,
    k: int,
    row_count: int,
    row_bytes: int,
    scale: float,
    stream: int,
) -> None:
    """Launches out[t] = residual[t] + shared[t] + scale * sum over j of weights[t, j] * rows[inverse[t, j]]."""

def routing_align(
    device: int,
    ends: int,
    inverse: int,
    order: int,
    owner: int,
    places: int,
    pairs: int,
    bins: int,
    block: int,
    capacity: int,
    stream: int,
) -> None:
    """Launches the cut of a sorted order into blocks of one bin each."""

def experts_up(
    device: int,
    dtype: int,
    weights_ptr: int,
    expert_stride_bytes: int,
    experts: int,
    x: int,
    slots: int,
    slots_i64: bool,
    out: int,
    tokens: int,
    k: int,
    inputs: int,
    outputs: int,
    act: int,
    stream: int,
) -> None:
    """Launches h[p] = act(gate) * up for each pair, over all experts' concatenated matrices."""

def experts_down(
    device: int,
    dtype: int,
    weights_ptr: int,
    expert_stride_bytes: int,
    experts: int,
    x: int,
    slots: int,
    slots_i64: bool,
    weights: int,
    weights_f32: bool,
    out: int,
    tokens: int,
    k: int,
    inputs: int,
    outputs: int,
    stream: int,
) -> None:
    """Launches out[t] = sum over k of weight * down(h[t, k])."""

#: For the tests and benches of the kernels alone.
_testing: ModuleType
