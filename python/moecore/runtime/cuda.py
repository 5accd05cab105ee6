"""A model on an NVIDIA GPU: slots in device memory, rows in pinned host memory, files below."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moecore._core import CudaExperts, HostRows, cuda_available
from moecore.errors import DeviceError
from moecore.ops import check, launch

from . import budget, compute, memory
from .host import DECODE_TOKENS, PAGE
from .kernels import Kernels
from .stats import Stats, collect

if TYPE_CHECKING:
    from moecore.ops.check import Gating

    from .families import Taken
    from .rows import Layout, Store
    from .takeover import Options

#: A prefill that asks for at least this share of a layer's experts has the next layer's first ones fetched ahead.
AHEAD_SHARE = 0.75

#: Bytes of the kernels' `State`, before the stall times.
STATE_BYTES = 64


def host_rows(store: Store, device: torch.device, options: Options, notes: list[str]) -> HostRows:
    """Pinned host memory for as many experts as `options.host_memory` allows and the host gives."""
    reason = cuda_available()
    if reason is not None:
        raise DeviceError(f"moecore cannot use {device}: {reason}")
    experts = store.core.experts
    if options.host_memory == "auto":
        allowed = int(budget.free_host_memory() * (1 - budget.RESERVE))
    else:
        allowed = budget.parse(options.host_memory, store.bytes, "host_memory")
    wanted = min(max(allowed // store.slot_bytes, store.min_slots), experts)
    number = index_of(device)
    rows = HostRows(store.core, device=number, rows=wanted, policy=options.policy)
    pinned = rows.settle()
    if pinned < wanted:
        notes.append(f"host memory: {size_of(store, wanted)} were wanted and {size_of(store, pinned)} could be pinned")
        if pinned < store.min_slots:
            raise DeviceError(
                f"the host gives {size_of(store, pinned)} of pinned memory, and one token needs "
                f"{size_of(store, store.min_slots)}; free host memory or raise the limit of the container"
            )
        rows = HostRows(store.core, device=number, rows=pinned, policy=options.policy)
        pinned = rows.settle()
    if pinned < experts:
        notes.append(f"host memory: {pinned:,} of {experts:,} experts are pinned at a time; the others are on disk")
    return rows


def size_of(store: Store, rows: int) -> str:
    """Bytes of so many rows, for people."""
    return budget.size(rows * store.slot_bytes)


def put(rows: HostRows, store: Store, taken: list[Taken]) -> None:
    """Moves the experts of a loaded model into host rows."""
    for layout, one in zip(store.layouts, taken, strict=True):
        row = torch.zeros(layout.row_bytes, dtype=torch.uint8)
        views = layout.views(row)
        for expert in range(layout.experts):
            for name, part in one.resident(expert).items():
                views[name].copy_(part)
            rows.put(layout.number, expert, row.data_ptr(), layout.row_bytes)


def copied_row(rows: HostRows, layout: Layout, expert: int) -> dict[str, Tensor]:
    """The parts of one expert, copied out of host rows."""
    row = torch.empty(layout.row_bytes, dtype=torch.uint8)
    rows.copy(layout.number, expert, row.data_ptr(), layout.row_bytes)
    return layout.views(row)


def index_of(device: torch.device) -> int:
    """The device's number."""
    return int(torch.cuda.current_device() if device.index is None else device.index)


class Routed(NamedTuple):
    """A choice whose experts have not been called yet.

    The ids are held, so that no other tensor can lie where they do. Slots are good for the stream that found them, and
    for a graph only if it holds both calls.
    """

    layer: int
    ids: Tensor
    version: int
    slots: Tensor
    stream: int
    capturing: bool


class CudaBackend:
    """Experts in a GPU's memory, `slots` of them at a time."""

    path = "kernels fetch from pinned host memory; no host synchronisation in decode"

    def __init__(self, store: Store, slots: int, device: torch.device, options: Options, rows: HostRows) -> None:
        self.store = store
        self.layouts = store.layouts
        self.device = torch.device("cuda", index_of(device))
        self.slots = slots
        self.rows = rows
        self.stride = store.slot_bytes
        experts = store.core.experts
        try:
            # torch's allocator holds the slots, so that its statistics count them.
            whole = torch.empty(slots * self.stride + PAGE, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{budget.size(slots * self.stride)} for experts do not fit the free memory of {self.device}: "
                f"{budget.size(memory.free_memory(self.device))}; give less expert_memory"
            ) from error
        start = -whole.data_ptr() % PAGE
        self.arena = whole[start : start + slots * self.stride]
        self.table = torch.full((experts,), -1, dtype=torch.int32, device=self.device)
        self.counts = torch.zeros(experts, dtype=torch.int32, device=self.device)
        state = torch.zeros(STATE_BYTES + 8 * len(self.layouts), dtype=torch.uint8, device=self.device)
        #: Nanoseconds for which decode calls of each layer waited and copied, counted by the kernel.
        self.stalls = state[STATE_BYTES:].view(torch.int64)
        torch.cuda.synchronize(self.device)
        self.core = CudaExperts(
            rows,
            arena=self.arena.data_ptr(),
            slots=slots,
            table=self.table.data_ptr(),
            counts=self.counts.data_ptr(),
            state=state.data_ptr(),
            owners=(whole, self.table, self.counts, state),
            policy=options.policy,
        )
        self.engine = self.core.engine
        # The engine has loaded the kernels: whoever captures the first step may do so.
        launch.load(self.device.index)
        self.ring_first, self.chunk, self.halves = self.core.ring
        self.kernels = Kernels(self.engine)
        self.streaming = False
        self.routed: Routed | None = None
        # Calls of several threads are enqueued one after another: slots are free when the next call comes.
        # Also close(), which a signal's handler may call in the midst of a call.
        self._lock = threading.RLock()
        #: Half of the ring, layer and experts that were staged before they were asked for.
        self.ahead: tuple[int, int, list[int]] | None = None
        self._views: dict[tuple[int, int, int], dict[str, Tensor]] = {}

    def run(self, layer: int, taken: Taken, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """One call of a layer: hidden [T, H], index and weights [T, k] -> [T, H]."""
        if hidden.device != self.device:
            raise DeviceError(f"the experts are on {self.device}, and hidden states come from {hidden.device}")
        with self._lock:
            return self._run(layer, taken, hidden, index, weights)

    def _run(self, layer: int, taken: Taken, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = index.shape
        if tokens <= DECODE_TOKENS and self.kernels.serves(taken):
            # Every pair may want an expert of its own, and the host does not look at the index.
            if min(tokens * top_k, taken.num_experts) <= self.slots:
                return self._decode(layer, taken, hidden, index, weights)
            return self._prefill(layer, taken, hidden, index, weights, few=True)
        return self._prefill(layer, taken, hidden, index, weights, few=False)

    def _decode(self, layer: int, taken: Taken, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        stream = self._stream()
        index = index.contiguous()
        slots = self._routed_slots(layer, index, stream)
        if slots is None:
            if self.streaming:
                self._end_prefill(stream)
            slots = torch.empty(index.shape, dtype=torch.int32, device=self.device)
            self.engine.acquire(layer, index.data_ptr(), index.numel(), slots.data_ptr(), 1, stream)
        return self.kernels.experts(taken, self.layouts[layer], hidden, index, slots, weights, stream)

    def route(self, layer: int, taken: Taken, logits: Tensor, gating: Gating) -> tuple[Tensor, Tensor] | None:
        """The router's choice and the fetch of what it has chosen, in one launch.

        The call of the experts that follows with these very ids finds its slots ready.

        Returns:
            Weights [T, k] of ``gating.weights_dtype`` and ids int64 [T, k]; None where the call is none for the kernel.
        """
        if logits.device != self.device:
            return None
        tokens, experts = logits.shape
        pairs = tokens * gating.k
        if not (0 < tokens <= DECODE_TOKENS and self.kernels.serves(taken) and experts == taken.num_experts):
            return None
        if min(pairs, experts) > self.slots:
            return None
        check.gate(logits, gating)
        with self._lock:
            stream = self._stream()
            if self.streaming:
                self._end_prefill(stream)
            weights = torch.empty(tokens, gating.k, dtype=gating.weights_dtype, device=self.device)
            with torch.inference_mode(False):  # inference tensors do not count their changes
                ids = torch.empty(tokens, gating.k, dtype=torch.int64, device=self.device)
            slots = torch.empty(tokens, gating.k, dtype=torch.int32, device=self.device)
            self.routed = None
            self.engine.gate_acquire(
                layer, check.FORMATS[logits.dtype], logits.data_ptr(), logits.stride(0), tokens, experts, gating.k,
                gating.groups, gating.top_groups, check.SCORINGS[gating.scoring], launch.flags(gating),
                launch.address(gating.bias), weights.data_ptr(), check.FORMATS[gating.weights_dtype], ids.data_ptr(),
                gating.scale, gating.eps, slots.data_ptr(), 1, stream,
            )  # fmt: skip
            capturing = torch.cuda.is_current_stream_capturing()
            self.routed = Routed(layer, ids, ids._version, slots, stream, capturing)
        return weights, ids

    def _routed_slots(self, layer: int, index: Tensor, stream: int) -> Tensor | None:
        """The slots that :meth:`route` has found for these ids, if no call has come between."""
        routed, self.routed = self.routed, None
        if routed is None or routed.layer != layer or routed.ids.data_ptr() != index.data_ptr():
            return None
        if routed.ids.shape != index.shape or routed.ids._version != routed.version:
            return None
        same = routed.stream == stream and routed.capturing == torch.cuda.is_current_stream_capturing()
        return routed.slots if same else None

    def forget(self) -> None:
        """The ids of the next call may have been changed since :meth:`route`."""
        self.routed = None

    def _stream(self) -> int:
        # A tenth of a microsecond; torch.cuda.current_stream takes eight.
        return int(torch._C._cuda_getCurrentRawStream(self.device.index))

    def _prefill(
        self, layer: int, taken: Taken, hidden: Tensor, index: Tensor, weights: Tensor, *, few: bool
    ) -> Tensor:
        """Streams the call's experts through the ring. `few`: with the kernels of a decode step."""
        if torch.cuda.is_current_stream_capturing():
            raise DeviceError(
                f"a call of {hidden.shape[0]} tokens cannot be captured in a CUDA graph: its experts pass through a "
                "ring; capture decode steps only, with a budget that holds the experts of one step"
            )
        stream = self._stream()
        self.routed = None
        # Ordered after every call before it, on whatever stream; the look at the index below then waits for them all.
        self.engine.update_table([], stream)
        routing = compute.Routing.of(taken, index)
        if not self.streaming:
            self.streaming = True
            self.engine.update_table([(expert, None) for expert in self.core.begin_prefill()], stream)
        experts = routing.asked()
        counts = [routing.starts[expert + 1] - routing.starts[expert] for expert in experts]
        self.core.prefill(layer, experts, counts)
        keep = self._admissions(layer, experts, counts)
        waves = [experts[start : start + self.chunk] for start in range(0, len(experts), self.chunk)]
        out = compute.begin(taken, hidden, index)
        first_half = self._start(layer, waves, stream)
        for number, wave in enumerate(waves):
            half = (first_half + number) % self.halves
            if number + 1 < len(waves) and self.halves > 1:
                self.core.stage((half + 1) % self.halves, layer, waves[number + 1], stream)
            self.core.ready(half, stream)
            if few:
                self._few(taken, self.layouts[layer], hidden, index, wave, half, out, stream)
            else:
                self._many(taken, self.layouts[layer], hidden, routing, wave, half, out)
            self._keep(keep, wave, half)
            if number + 1 < len(waves) and self.halves == 1:
                self.core.stage(0, layer, waves[number + 1], stream)
        self.engine.update_table([(self._id(layer, expert), slot) for expert, slot in keep.items()], stream)
        self.core.settle(layer, list(keep))
        self._go_ahead(layer, len(experts), (first_half + len(waves)) % self.halves, stream)
        return compute.combine(taken, out, weights, hidden.shape[0], hidden.dtype, index)

    def _start(self, layer: int, waves: list[list[int]], stream: int) -> int:
        """Stages the first wave, or finds it staged by the layer before; its half."""
        ahead, self.ahead = self.ahead, None
        if not waves:
            return 0
        half = ahead[0] if ahead is not None else 0
        if ahead is None or ahead[1:] != (layer, waves[0]):
            self.core.stage(half, layer, waves[0], stream)
        return half

    def _go_ahead(self, layer: int, asked: int, half: int, stream: int) -> None:
        """Has the link work on the next layer's first experts while the model is between two layers."""
        following = layer + 1
        if following == len(self.layouts) or asked < AHEAD_SHARE * self.layouts[layer].experts or self.halves == 1:
            return
        wave = list(range(min(self.chunk, self.layouts[following].experts)))
        self.core.stage(half, following, wave, stream)
        self.ahead = (half, following, wave)

    def _end_prefill(self, stream: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            return  # the ring stays out of use until a step is run for real
        for half in range(self.halves):
            self.core.ready(half, stream)
        self.streaming = False
        self.ahead = None
        self.core.end_prefill()

    def _admissions(self, layer: int, experts: list[int], counts: list[int]) -> dict[int, int]:
        """Free slots for the busiest experts: expert -> slot."""
        busiest = [expert for _, expert in sorted(zip(counts, experts, strict=True), reverse=True)]
        return dict(self.core.admit(layer, busiest))

    def _keep(self, keep: dict[int, int], wave: list[int], half: int) -> None:
        base = self.ring_first + half * self.chunk
        for at, expert in enumerate(wave):
            slot = keep.get(expert)
            if slot is not None:
                self.slot(slot).copy_(self.slot(base + at))

    def _many(
        self,
        taken: Taken,
        layout: Layout,
        hidden: Tensor,
        routing: compute.Routing,
        wave: list[int],
        half: int,
        out: Tensor,
    ) -> None:
        start, end = routing.starts[wave[0]], routing.starts[wave[-1] + 1]
        rows = routing.order[start:end]
        ends = [routing.starts[expert + 1] - start for expert in wave]
        offsets = torch.tensor(ends, dtype=torch.int32, pin_memory=True).to(self.device, non_blocking=True)
        weights = self.views(layout, self.ring_first + half * self.chunk, len(wave))
        out[rows] = compute.wave(taken, weights, hidden, rows // routing.top_k, offsets)

    def _few(
        self,
        taken: Taken,
        layout: Layout,
        hidden: Tensor,
        index: Tensor,
        wave: list[int],
        half: int,
        out: Tensor,
        stream: int,
    ) -> None:
        base = self.ring_first + half * self.chunk
        slot_of = torch.full((taken.num_experts + 1,), -1, dtype=torch.int32)
        slot_of[wave] = torch.arange(base, base + len(wave), dtype=torch.int32)
        served = torch.where((index < 0) | (index >= taken.num_experts), taken.num_experts, index)
        slots = slot_of.to(self.device)[served].contiguous()
        rows = self.kernels.rows(taken, layout, hidden, slots, stream)
        mine = (slots >= 0).reshape(-1, 1)
        out.copy_(torch.where(mine, rows, out))

    def slot(self, slot: int) -> Tensor:
        """The bytes of a slot."""
        return self.arena[slot * self.stride : (slot + 1) * self.stride]

    def views(self, layout: Layout, first: int, count: int) -> dict[str, Tensor]:
        """The parts of experts in neighbouring slots: name -> [count, *shape] over the arena."""
        key = (layout.number, first, count)
        views = self._views.get(key)
        if views is None:
            views = {}
            for part in layout.parts:
                width = part.dtype.itemsize
                flat = self.arena.view(part.dtype)
                inner = torch.empty(part.shape, device="meta").stride()
                start = (first * self.stride + part.offset) // width
                views[part.name] = flat.as_strided(
                    (count, *part.shape), (self.stride // width, *inner), flat.storage_offset() + start
                )
            self._views[key] = views
        return views

    def _id(self, layer: int, expert: int) -> int:
        return sum(layout.experts for layout in self.layouts[:layer]) + expert

    def row(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The parts of one expert, copied out."""
        return copied_row(self.rows, self.layouts[layer], expert)

    def stats(self) -> Stats:
        """What host and device have counted."""
        self.engine.check()
        layers, routed = self.core.stats()
        on_device = self.counts.tolist()
        stalls = self.stalls.tolist()
        layers = [
            (prefill, decode | {"stall_ns": stall}) for (prefill, decode), stall in zip(layers, stalls, strict=True)
        ]
        both = [host + device for host, device in zip(routed, on_device, strict=True)]
        return collect(
            (layers, both),
            [layout.experts for layout in self.layouts],
            slots=self.slots,
            resident=self.core.resident,
            slot_bytes=self.stride,
            path=self.path,
        )

    def reset_stats(self) -> None:
        """Counts from zero."""
        self.core.reset_stats()
        self.counts.zero_()
        self.stalls.zero_()

    def close(self) -> None:
        """Ends threads and frees the slots."""
        with self._lock:  # a call that is under way is enqueued whole; those that come after it find the engine closed
            torch.cuda.synchronize(self.device)
            self.core.close()
            self._views.clear()
            self.routed = None
            empty: Any = torch.empty(0, dtype=torch.uint8)
            self.arena = self.table = self.counts = self.stalls = empty
