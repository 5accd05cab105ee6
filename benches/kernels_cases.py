"""What `kernels_sweep.py` launches: for each kernel its inputs, its geometry under given numbers, and its right answer.

Geometries are those that the kernels' comments give, with the numbers of cuda/tuning.cuh by name (`n`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from kernels_clock import sets_for
from kernels_data import Shape, make_ids, make_logits, normal, same_choice
from kernels_launch import CombineArgs, ExpertArgs, GateArgs, Launch, PermuteArgs, RouteArgs
from kernels_peers import torch_gate, torch_index
from torch import Tensor

if TYPE_CHECKING:
    from kernels_launch import Defines

    #: File, launch, arguments.
    Step = tuple[str, Launch, Any]

SMS = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
FORMATS = {torch.float32: ("f32", 0), torch.bfloat16: ("bf16", 1), torch.float16: ("f16", 2)}
RENORMALIZE, GROUP_TOP2, BY_LOGITS, BY_SCORES = 1, 2, 8, 16
SIGMOID = 1


def at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def up16(size: int) -> int:
    return ceil(size, 16) * 16


class Case:
    """One kernel or chain on one shape. `steps` are the launches of a call on input set i."""

    sets: int
    bytes: int
    outputs: list[Tensor]

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device

    def empty(self, *size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=self.device)

    def poison(self) -> None:
        """So that what is not written is seen."""
        for one in self.outputs:
            one.view(torch.uint8).fill_(0xA5)

    def steps(self, n: Defines, i: int) -> list[Step]:
        """Launches, in order."""
        raise NotImplementedError

    def right(self) -> bool:
        """Whether the outputs are those of input set 0."""
        raise NotImplementedError


def rule(shape: Shape) -> tuple[str, int]:
    """The end of a gate kernel's name, and the flag that goes with it: these shapes all have a short way."""
    way, flag = ("scores", BY_SCORES) if shape.groups > 1 else ("logits", BY_LOGITS)
    each = next(n for n in (2, 4, 8, 16) if shape.experts <= 32 * n)
    return f"{way}_{FORMATS[shape.dtype][0]}_w{each}", flag


class Gate(Case):
    """moecore_gate_*."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__(shape, device)
        s = shape
        self.bytes = s.tokens * (s.experts * s.dtype.itemsize + s.k * 8)
        self.sets = sets_for(s.tokens, self.bytes)
        self.logits = make_logits(s, self.sets, device)
        self.bias = torch.rand(s.experts, device=device) * 0.1 if s.groups > 1 else None
        self.weights = self.empty(s.tokens, s.k, dtype=torch.float32)
        self.ids = self.empty(s.tokens, s.k)
        self.outputs = [self.weights, self.ids]

    def gate_args(self, i: int) -> GateArgs:
        s = self.shape
        grouped = s.groups > 1
        return GateArgs(
            logits=at(self.logits[i]), bias=at(self.bias), weights=at(self.weights), ids=at(self.ids), valid=0,
            stride=s.experts, tokens=s.tokens, experts=s.experts, k=s.k, groups=s.groups,
            top_groups=s.groups // 2 if grouped else 1, scoring=SIGMOID if grouped else 0,
            flags=RENORMALIZE | (GROUP_TOP2 if grouped else 0) | rule(s)[1], weights_format=0, scale=1.0, eps=0.0,
        )  # fmt: skip

    def steps(self, n: Defines, i: int) -> list[Step]:
        s = self.shape
        name, early = f"moecore_gate_{rule(s)[0]}", bool(n.get("EARLY", 1))
        if s.tokens <= n.get("GATE_SMALL_TOKENS", 0):
            launch = Launch(name, (s.tokens, 1), 32, 0, 0, early)
        else:
            blocks = min(ceil(s.tokens, n["GATE_WARPS"]), n["GATE_BLOCKS"] * SMS)
            launch = Launch(name, (blocks, 1), 32 * n["GATE_WARPS"], 0, 0, early)
        return [("gate.cu", launch, self.gate_args(i))]

    def right(self) -> bool:
        from kernels_peers import torch_grouped

        s = self.shape
        if self.bias is None:
            want = torch_gate(self.logits[0], s.k)
        else:
            want = torch_grouped(self.logits[0], self.bias, s.groups, s.groups // 2, s.k, 1.0)
        return same_choice(self.logits[0], (self.weights, self.ids), want)


class Route(Gate):
    """Gate and index, in one launch (`one`) or in tiles; with `hidden` rows are copied, too."""

    def __init__(self, shape: Shape, device: torch.device, one: bool) -> None:
        super().__init__(shape, device)
        s, self.one = shape, one
        pairs = s.tokens * s.k
        self.ends, self.source, self.inverse = self.empty(s.experts), self.empty(pairs), self.empty(s.tokens, s.k)
        self.outputs += [self.ends, self.source, self.inverse]
        tiles = ceil(s.tokens, 16)
        self.counts, self.starts = self.empty(tiles * s.experts, dtype=torch.int16), self.empty(tiles * s.experts)
        self.bytes += pairs * 8 + s.experts * 4
        self.x: list[Tensor] = []
        self.rows = None
        if s.hidden:
            size = s.tokens * s.hidden * 2
            self.sets = sets_for(s.tokens, size)
            self.logits = make_logits(s, self.sets, device)
            self.x = normal(s.tokens, s.hidden, self.sets, device)
            self.rows = self.empty(pairs, s.hidden, dtype=torch.bfloat16)
            self.outputs.append(self.rows)
            self.bytes += size * (1 + s.k)

    def steps(self, n: Defines, i: int) -> list[Step]:
        s = self.shape
        tile = n.get("TILE") or self.tile(n)
        tiles = ceil(s.tokens, tile)
        scan = tiles > n["ROUTE_SCAN_TILES"]
        args = RouteArgs(
            gate=self.gate_args(i), bin_of=0, ends=at(self.ends), source=at(self.source), inverse=at(self.inverse),
            counts=at(self.counts), starts=at(self.starts) if scan else 0, x=at(self.x[i]) if self.x else 0,
            rows=at(self.rows), scales=0, bins=s.experts, row_bytes=s.hidden * 2, x_format=1, tile=tile,
        )  # fmt: skip
        suffix = rule(s)[0]
        if self.one:
            return [("route_small.cu", self.small(n, f"moecore_route_small_{suffix}"), args)]
        early = bool(n.get("EARLY", 1))
        count = Launch(
            f"moecore_route_count_{suffix}", (tiles, 1), 32 * n["ROUTE_COUNT_WARPS"], up16(4 * s.experts), 0, early,
        )  # fmt: skip
        found: list[Step] = [("route_tiles.cu", count, args)]
        if scan:
            found.append(
                ("route_tiles.cu", Launch("moecore_route_scan", (ceil(s.experts, 32), 1), 1024, 0, 0, early), args)
            )
        long = bool(self.x) and self.x[0].shape[1] * self.x[0].element_size() > n["ROUTE_PLACE_BYTES"]
        splits = n["ROUTE_PLACE_LONG_SPLIT" if long else "ROUTE_PLACE_SPLIT"] if self.x else 1
        shared = up16(4 * (s.experts * (tile // 32) + 3 * s.experts + 32 + tile * s.k))
        place = Launch("moecore_route_place_plain", (tiles, splits), n["ROUTE_PLACE_THREADS"], shared, 0, early)
        return [*found, ("route_tiles.cu", place, args)]

    def tile(self, n: Defines) -> int:
        limit = n["ROUTE_TILE32_TOKENS"]
        return 32 if self.shape.tokens <= limit else 64 if self.shape.tokens <= 2 * limit else 128

    def small(self, n: Defines, name: str) -> Launch:
        s, early = self.shape, bool(n.get("EARLY", 1))
        if s.tokens == 1:
            return Launch(name, (1, 1), 32, 0, 0, early)
        shared = up16(4 * (s.experts * ceil(s.tokens, 32) + s.experts + 32) + 2 * s.tokens * s.k)
        if s.tokens >= n["ROUTE_CLUSTER_FROM"]:
            blocks = n["ROUTE_CLUSTER"]
            few = s.tokens <= n["ROUTE_CLUSTER_FEW"]
            warps = n["ROUTE_CLUSTER_WARPS" if few else "ROUTE_SMALL_WARPS"]
            return Launch(name, (blocks, 1), 32 * warps, shared, blocks, early)
        return Launch(name, (1, 1), 32 * min(s.tokens, n["ROUTE_SMALL_WARPS"]), shared, 0, early)

    def right(self) -> bool:
        s = self.shape
        if not super().right():
            return False
        ends, source, inverse = torch_index(self.ids, s.experts)
        same = torch.equal(self.ends, ends) and torch.equal(self.source.long(), source.long())
        same = same and torch.equal(self.inverse.long(), inverse.long())
        if self.rows is not None and same:
            want = self.x[0].index_select(0, source.long())
            same = torch.equal(self.rows.view(torch.int16), want.view(torch.int16))
        return bool(same)


class Permute(Case):
    """moecore_permute; with fp8 the e4m3 one."""

    def __init__(self, shape: Shape, device: torch.device, fp8: bool = False) -> None:
        super().__init__(shape, device)
        s, self.fp8 = shape, fp8
        size, pairs = s.tokens * s.hidden * 2, s.tokens * s.k
        self.sets = sets_for(s.tokens, size)
        self.x = normal(s.tokens, s.hidden, self.sets, device)
        made = [torch_index(one, s.experts) for one in make_ids(s, self.sets, device)]
        self.source, self.inverse = made[0][1], [one[2].int().contiguous() for one in made]
        if fp8:
            self.out = self.empty(pairs, s.hidden, dtype=torch.uint8)
            self.scales = self.empty(pairs, s.hidden // 128, dtype=torch.float32)
            self.outputs = [self.out, self.scales]
            self.bytes = size + pairs * (s.hidden + s.hidden // 32 + 4)
        else:
            self.out, self.scales = self.empty(pairs, s.hidden, dtype=torch.bfloat16), None
            self.outputs = [self.out]
            self.bytes = size * (1 + s.k) + pairs * 4

    def steps(self, n: Defines, i: int) -> list[Step]:
        s = self.shape
        args = PermuteArgs(
            x=at(self.x[i]), inverse=at(self.inverse[i]), out=at(self.out), scales=at(self.scales), tokens=s.tokens,
            k=s.k, rows=s.tokens * s.k, row_bytes=s.hidden * 2, x_format=1, reserved=0,
        )  # fmt: skip
        few = s.tokens <= n["PERMUTE_SMALL_TOKENS"]
        depth = 1 if few else n["PERMUTE_FP8_DEPTH" if self.fp8 else "PERMUTE_DEPTH"]
        items = s.tokens * ceil(s.hidden if self.fp8 else s.hidden * 2, 512 * depth)
        blocks = max(1, min(ceil(items, n["PERMUTE_WARPS"]), SMS * n["PERMUTE_BLOCKS"]))
        name = "moecore_permute_fp8_bf16" if self.fp8 else "moecore_permute"
        return [("permute.cu", Launch(name, (blocks, 1), 32 * n["PERMUTE_WARPS"]), args)]

    def right(self) -> bool:
        want = self.x[0].index_select(0, self.source.long())
        if not self.fp8:
            return bool(torch.equal(self.out.view(torch.int16), want.view(torch.int16)))
        assert self.scales is not None
        got = self.out.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 128)) * self.scales[..., None]
        want = want.float().unflatten(-1, (-1, 128))
        return bool((got - want).norm() < 4e-2 * want.norm())


class Combine(Case):
    """moecore_combine_bf16, with or without what is added."""

    def __init__(self, shape: Shape, device: torch.device, more: bool = False) -> None:
        super().__init__(shape, device)
        s = shape
        size, pairs = s.tokens * s.hidden * 2, s.tokens * s.k
        self.sets = min(8, sets_for(s.tokens, size * s.k))
        self.rows = normal(pairs, s.hidden, self.sets, device)
        self.inverse = [torch_index(one, s.experts)[2].int().contiguous() for one in make_ids(s, self.sets, device)]
        self.weights = torch.rand(s.tokens, s.k, device=device)
        self.more = [normal(s.tokens, s.hidden, self.sets, device) for _ in range(2 if more else 0)]
        self.out = self.empty(s.tokens, s.hidden, dtype=torch.bfloat16)
        self.outputs = [self.out]
        self.bytes = size * (1 + s.k + len(self.more)) + pairs * 8

    def steps(self, n: Defines, i: int) -> list[Step]:
        s = self.shape
        shared, residual = (self.more[0][i], self.more[1][i]) if self.more else (None, None)
        args = CombineArgs(
            rows=at(self.rows[i]), inverse=at(self.inverse[i]), weights=at(self.weights), shared=at(shared),
            residual=at(residual), out=at(self.out), tokens=s.tokens, k=s.k, row_count=s.tokens * s.k,
            row_bytes=s.hidden * 2, weights_format=0, scale=1.0,
        )  # fmt: skip
        flight = n["COMBINE_IN_FLIGHT"]
        units = max(1, flight // (s.k + 2)) if s.k in (1, 2, 4, 6, 8, 10, 16) else 1
        items = s.tokens * ceil(s.hidden * 2, 512 * units)
        blocks = max(1, min(ceil(items, n["COMBINE_WARPS"]), SMS * n["COMBINE_BLOCKS"]))
        launch = Launch("moecore_combine_bf16", (blocks, 1), 32 * n["COMBINE_WARPS"], 0, 0, bool(n.get("EARLY", 1)))
        return [("combine.cu", launch, args)]

    def right(self) -> bool:
        s = self.shape
        rows = self.rows[0][self.inverse[0].long().view(-1)].float().view(s.tokens, s.k, -1)
        want = (rows * self.weights[..., None]).sum(1)
        for one in self.more:
            want = want + one[0].float()
        return bool((self.out.float() - want).norm() < 6e-3 * want.norm())


class Experts(Case):
    """moecore_expert_up_bf16 or moecore_expert_down_bf16 over resident weights."""

    def __init__(self, shape: Shape, device: torch.device, down: bool) -> None:
        super().__init__(shape, device)
        s, self.down, self.sets = shape, down, 8
        inputs, outputs = (s.inner, s.hidden) if down else (s.hidden, s.inner)
        self.inputs, self.made = inputs, outputs
        shape3 = (s.experts, outputs if down else 2 * outputs, inputs)
        self.matrix = torch.empty(shape3, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        self.ids = make_ids(s, self.sets, device)
        self.x = normal(s.tokens * (s.k if down else 1), inputs, self.sets, device)
        self.weights = torch.rand(s.tokens, s.k, device=device)
        self.out = self.empty(s.tokens * (1 if down else s.k), outputs, dtype=torch.bfloat16)
        self.outputs = [self.out]
        asked = sum(int(one.unique().numel()) for one in self.ids) / self.sets
        self.bytes = int(asked * math.prod(shape3[1:]) * 2)

    def steps(self, n: Defines, i: int) -> list[Step]:
        s = self.shape
        args = ExpertArgs(
            arena=at(self.matrix), slot_bytes=self.matrix.stride(0) * 2, offset=0, bias_offset=2**64 - 1,
            x=at(self.x[i]), slots=at(self.ids[i]), weights=at(self.weights), out=at(self.out), tokens=s.tokens,
            k=s.k, inputs=self.inputs, outputs=self.made, act=0, flags=1, slot_count=s.experts,
        )  # fmt: skip
        if self.down:
            columns = n["DOWN_WARPS"] // n["DOWN_SHARES"] * n["DOWN_OUTPUTS"]
            launch = Launch("moecore_expert_down_bf16", (s.tokens, ceil(self.made, columns)), 32 * n["DOWN_WARPS"])
        else:
            columns = n["EXPERT_WARPS"]
            launch = Launch("moecore_expert_up_bf16", (s.tokens * s.k, ceil(self.made, columns)), 32 * columns)
        return [("experts.cu", launch, args)]

    def right(self) -> bool:
        s = self.shape
        ids = self.ids[0].long().view(-1)
        x = self.x[0].float() if self.down else self.x[0].float().repeat_interleave(s.k, 0)
        rows = torch.stack([self.matrix[e].float() @ one for e, one in zip(ids.tolist(), x, strict=True)])
        if self.down:
            want = (rows.view(s.tokens, s.k, -1) * self.weights[..., None]).sum(1)
        else:
            gate, linear = rows.chunk(2, dim=-1)
            want = torch.nn.functional.silu(gate) * linear
        return bool((self.out.float() - want).norm() < 2e-2 * want.norm())
