"""The rows of `kernels.py`: shapes, inputs, the calls of each side, bytes, and what a right answer is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import kernels_ours as ours
import kernels_peers as peers
import torch
from kernels_clock import sets_for
from kernels_data import Shape, make_ids, make_logits, near, normal, same_choice
from moecore import ops
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kernels_peers import Peers

    Call = Callable[[int], Any]

OURS, ALIGN, PRODUCT = "moecore", "moecore's align alone", "the product alone"
SCALE = 2.5


@dataclass
class Made:
    """A row ready to be timed. `bytes` are the fewest that a call can move; `right` says whether a result is right."""

    sides: dict[str, Call]
    sets: int
    bytes: int
    right: dict[str, Callable[[], bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the report, and what makes it."""

    job: str
    shape: Shape
    make: Callable[[Shape, Peers, torch.device], Made]
    eager: bool = True

    @property
    def key(self) -> str:
        return f"{self.job}: {self.shape}"


# ------------------------------------------------------------------------------------------------------- gate and index


def gate(s: Shape, others: Peers, device: torch.device) -> Made:
    """Logits to weights and ids."""
    size = s.tokens * s.experts * s.dtype.itemsize
    sets = sets_for(s.tokens, size)
    logits = make_logits(s, sets, device)
    sides: dict[str, Call] = {}
    if s.groups > 1:
        bias = torch.rand(s.experts, device=device) * 0.1
        more = (bias, s.groups, s.groups // 2, s.k, SCALE)
        sides[OURS] = lambda i: ours.grouped(logits[i], *more)
        sides["torch"] = lambda i: peers.torch_grouped(logits[i], *more)
        if vllm := others.vllm:
            sides["vLLM"] = lambda i: vllm.grouped(logits[i], *more)
        if sglang := others.sglang:
            sides["SGLang"] = lambda i: sglang.grouped(logits[i], *more)
        if triton := others.triton:
            sides["SGLang Triton"] = lambda i: triton(
                logits[i], bias, s.k, "sigmoid", 0, True, SCALE, True, 0.0, s.groups, s.groups // 2
            )
    else:
        sides = {name: (lambda i, run=run: run(logits[i])) for name, run in gates(s, others).items()}
    want = peers.torch_grouped(logits[0], *more) if s.groups > 1 else peers.torch_gate(logits[0], s.k)
    right = {name: (lambda run=run: same_choice(logits[0], run(0), want)) for name, run in sides.items()}
    return Made(sides, sets, size + s.tokens * s.k * 8, right)


def router(s: Shape, others: Peers, device: torch.device) -> Made:
    """A router as models have it: activations to bf16 logits by one product, then the gate."""
    sets = sets_for(s.tokens, s.tokens * s.hidden * 2)
    x = normal(s.tokens, s.hidden, sets, device)
    weight = torch.randn(s.experts, s.hidden, device=device, dtype=torch.bfloat16) / s.hidden**0.5

    def product(i: int) -> Tensor:
        return torch.nn.functional.linear(x[i], weight)

    runs = gates(s, others)
    sides: dict[str, Call] = {name: (lambda i, run=run: run(product(i))) for name, run in runs.items()}
    sides[PRODUCT] = product
    logits = product(0)
    want = peers.torch_gate(logits, s.k)
    right = {name: (lambda run=run: same_choice(logits, run(logits), want)) for name, run in runs.items()}
    moved = (s.tokens + s.experts) * s.hidden * 2 + s.tokens * (s.experts * 4 + s.k * 8)
    return Made(sides, sets, moved, right)


def gates(s: Shape, others: Peers) -> dict[str, Callable[[Tensor], Any]]:
    """Softmax, top-k, renormalised, by everybody."""
    found: dict[str, Callable[[Tensor], Any]] = {
        OURS: lambda logits: ours.gate(logits, s.k), "torch": lambda logits: peers.torch_gate(logits, s.k),
    }  # fmt: skip
    if vllm := others.vllm:
        found["vLLM"] = lambda logits: vllm.softmax(logits, s.k)
    if sglang := others.sglang:
        found["SGLang"] = lambda logits: sglang.softmax(logits, s.k)
    if triton := others.triton:
        found["SGLang Triton"] = lambda logits: triton(logits, None, s.k, "softmax")
    return found


def index(s: Shape, others: Peers, device: torch.device) -> Made:
    """Ids to the order of rows."""
    sets = sets_for(s.tokens, s.tokens * s.k * 4)
    ids = make_ids(s, sets, device)
    want, blocks, pairs = ops.index(ids[0].cpu(), s.experts), reference_lists(ids[0], s.experts), s.tokens * s.k
    sides: dict[str, Call] = {
        OURS: lambda i: ops.index(ids[i], s.experts), "torch": lambda i: peers.torch_index(ids[i], s.experts),
    }  # fmt: skip
    right = {name: (lambda run=sides[name]: same_index(run(0), want)) for name in sides}
    if vllm := others.vllm:
        sides["vLLM align"] = lambda i: vllm.align(ids[i], s.experts)
        sides["vLLM scatter"] = lambda i: vllm.scatter_index(ids[i], s.experts)
        right["vLLM align"] = lambda: same_lists(vllm.align(ids[0], s.experts), blocks, pairs)
        right["vLLM scatter"] = lambda: bool(
            torch.equal(vllm.scatter_index(ids[0], s.experts)[1].cpu().view(-1), want[2].view(-1))
        )
    if sglang := others.sglang:
        sides["SGLang align"] = lambda i: sglang.align(ids[i], s.experts)
        right["SGLang align"] = lambda: same_lists(sglang.align(ids[0], s.experts), blocks, pairs)
    if others.small_align and s.tokens * s.k <= 64:
        sides["SGLang align, Triton"] = lambda i: small_align(others, ids[i], s.experts)
        right["SGLang align, Triton"] = lambda: same_lists(small_align(others, ids[0], s.experts), blocks, pairs)
    return Made(sides, sets, s.tokens * s.k * 12 + s.experts * 4, right)


def align(s: Shape, others: Peers, device: torch.device) -> Made:
    """Ids to block-aligned lists, by everybody; ours are index and align. And our align alone, from a finished index.

    The reference is made on the CPU from the ids.
    """
    sets = sets_for(s.tokens, s.tokens * s.k * 4)
    ids = make_ids(s, sets, device)
    known = [ops.index(one, s.experts) for one in ids]
    want = reference_lists(ids[0], s.experts)

    def from_ids(i: int) -> Any:
        ends, _, inverse = ops.index(ids[i], s.experts)
        return ops.align(ends, inverse, peers.BLOCK)

    sides: dict[str, Call] = {OURS: from_ids, ALIGN: lambda i: ops.align(known[i][0], known[i][2], peers.BLOCK)}
    if vllm := others.vllm:
        sides["vLLM"] = lambda i: vllm.align(ids[i], s.experts)
    if sglang := others.sglang:
        sides["SGLang"] = lambda i: sglang.align(ids[i], s.experts)
    if others.small_align and s.tokens * s.k <= 64:
        sides["SGLang Triton"] = lambda i: small_align(others, ids[i], s.experts)
    right = {name: (lambda run=run: same_lists(run(0), want, s.tokens * s.k)) for name, run in sides.items()}
    places = int(want[2])
    return Made(sides, sets, 4 * (s.tokens * s.k + places + places // peers.BLOCK + 1), right)


def reference_lists(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block-aligned lists by the definition: experts in order, each one's pairs, then `pairs` up to a whole block."""
    flat = ids.cpu().view(-1).long()
    order, owner = [], []
    for expert, mine in enumerate(torch.bincount(flat, minlength=experts).tolist()):
        if blocks := -(-mine // peers.BLOCK):
            listed = torch.full((blocks * peers.BLOCK,), flat.numel())
            listed[:mine] = (flat == expert).nonzero().view(-1)
            order.append(listed)
            owner += [expert] * blocks
    return torch.cat(order), torch.tensor(owner), torch.tensor([len(owner) * peers.BLOCK])


def small_align(others: Peers, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """SGLang's one launch for very few tokens."""
    lists = peers.align_buffers(ids, experts + 1)
    others.small_align(ids, experts + 1, peers.BLOCK, *lists)
    return lists


def same_index(got: Any, want: Any) -> bool:
    """ends, source, inverse."""
    return all(torch.equal(a.cpu().int().view(-1), b.view(-1)) for a, b in zip(got, want, strict=True))


def same_lists(got: Any, want: tuple[Tensor, Tensor, Tensor], pairs: int) -> bool:
    """Block-aligned lists with the same blocks, owners and padding, and each expert's pairs in any order: the peers'
    comes from atomics. What lies behind the last block is nobody's."""
    order, owner, places = (one.cpu().long() for one in got)
    used = int(places[0])
    if used != int(want[2]):
        return False
    order, owner = order[:used], owner[: used // peers.BLOCK]
    if not torch.equal(owner, want[1]) or not torch.equal(order == pairs, want[0] == pairs):
        return False
    # The reference's are sorted by expert and pair, so that sorting others the same way makes them equal.
    first = owner.repeat_interleave(peers.BLOCK) * (pairs + 1)
    return torch.equal((first + order).sort().values, first + want[0])


def route(s: Shape, others: Peers, device: torch.device) -> Made:
    """Gate and index. Each peer with its own two; the lists of `align` are less than our outputs (no inverse)."""
    size = s.tokens * s.experts * s.dtype.itemsize
    sets = sets_for(s.tokens, size)
    logits = make_logits(s, sets, device)
    by = gates(s, others)
    sides: dict[str, Call] = {OURS: lambda i: ours.route(logits[i], s.k)}
    sides["torch"] = lambda i: peers.torch_index(by["torch"](logits[i])[1], s.experts)
    if vllm := others.vllm:
        sides["vLLM, align"] = lambda i: vllm.align(by["vLLM"](logits[i])[1], s.experts)
        sides["vLLM, scatter"] = lambda i: vllm.scatter_index(by["vLLM"](logits[i])[1], s.experts)
    if sglang := others.sglang:
        sides["SGLang, align"] = lambda i: sglang.align(by["SGLang"](logits[i])[1], s.experts)
    if others.triton and others.small_align and s.tokens * s.k <= 64:
        sides["SGLang Triton, align"] = lambda i: small_align(others, by["SGLang Triton"](logits[i])[1], s.experts)
    elif others.triton and (sglang := others.sglang):
        sides["SGLang Triton, align"] = lambda i: sglang.align(by["SGLang Triton"](logits[i])[1], s.experts)

    def right() -> bool:
        weights, ids, *rest = sides[OURS](0)[:5]
        gated = same_choice(logits[0], (weights, ids), peers.torch_gate(logits[0], s.k))
        return gated and same_index(rest, ops.index(ids.cpu(), s.experts))

    return Made(sides, sets, size + s.tokens * s.k * 16 + s.experts * 4, {OURS: right})


# ----------------------------------------------------------------------------------------------------- rows that move


def route_permute(s: Shape, others: Peers, device: torch.device) -> Made:
    """Gate, index and the copy of the rows."""
    x_bytes, pairs = s.tokens * s.hidden * 2, s.tokens * s.k
    sets = sets_for(s.tokens, x_bytes)
    logits, x = make_logits(s, sets, device), normal(s.tokens, s.hidden, sets, device)
    by = gates(s, others)

    def with_torch(i: int) -> Any:
        index = peers.torch_index(by["torch"](logits[i])[1], s.experts)
        return index, x[i].index_select(0, index[1])

    sides: dict[str, Call] = {OURS: lambda i: ours.route_permute(logits[i], x[i], s.k), "torch": with_torch}
    if vllm := others.vllm:
        sides["vLLM"] = lambda i: vllm.permute(x[i], by["vLLM"](logits[i])[1], s.experts)
    if sglang := others.sglang:

        def with_sglang(i: int) -> Any:
            index = sglang.prepare(by["SGLang"](logits[i])[1], s.experts)
            return sglang.shuffle(x[i], index[1])

        sides["SGLang"] = with_sglang
    want = with_torch(0)[1]
    right = {OURS: lambda: bool(torch.equal(sides[OURS](0)[1].view(torch.int16), want.view(torch.int16)))}
    size = s.tokens * s.experts * s.dtype.itemsize + pairs * 16 + x_bytes * (1 + s.k)
    return Made(sides, sets, size, right)


def permute(s: Shape, others: Peers, device: torch.device) -> Made:
    """The copy alone, from a finished index; vLLM's own permute sorts, too."""
    x_bytes, pairs = s.tokens * s.hidden * 2, s.tokens * s.k
    sets = sets_for(s.tokens, x_bytes)
    x, ids = normal(s.tokens, s.hidden, sets, device), make_ids(s, sets, device)
    made = [ops.index(one.cpu(), s.experts) for one in ids]
    source = [one[1].to(device) for one in made]
    inverse = [one[2].to(device) for one in made]
    wide = [one.long() for one in source]
    sides: dict[str, Call] = {
        OURS: lambda i: ops.permute(x[i], inverse[i], pairs),
        "torch index_select": lambda i: x[i].index_select(0, wide[i]),
    }
    if vllm := others.vllm:
        sides["vLLM shuffle_rows"] = lambda i: vllm.shuffle(x[i], source[i])
        sides["vLLM, sort too"] = lambda i: vllm.permute(x[i], ids[i], s.experts)[0]
    if sglang := others.sglang:
        sides["SGLang shuffle_rows"] = lambda i: sglang.shuffle(x[i], source[i])
    if te := others.te:
        te.tune_anew()
        routing = [te.routing(one, s.experts) for one in ids]
        known = [te.map_rows(one) for one in routing]
        sides["TE"] = lambda i: te.permute(x[i], known[i], pairs)
        sides["TE, row map too"] = lambda i: te.permute(x[i], te.map_rows(routing[i]), pairs)
    want = x[0].index_select(0, wide[0]).view(torch.int16)
    right = {name: (lambda run=run: bool(torch.equal(run(0).view(torch.int16), want))) for name, run in sides.items()}
    return Made(sides, sets, x_bytes * (1 + s.k) + pairs * 4, right)


def permute_fp8(s: Shape, others: Peers, device: torch.device) -> Made:
    """bf16 rows in, e4m3 rows with scales out. Peers quantise first, then move rows and scales."""
    x_bytes, pairs = s.tokens * s.hidden * 2, s.tokens * s.k
    sets = sets_for(s.tokens, x_bytes)
    x, ids = normal(s.tokens, s.hidden, sets, device), make_ids(s, sets, device)
    made = [ops.index(one.cpu(), s.experts) for one in ids]
    source, inverse = [one[1].to(device) for one in made], [one[2].to(device) for one in made]
    wide = [one.long() for one in source]
    sides: dict[str, Call] = {OURS: lambda i: ops.permute_fp8(x[i], inverse[i], pairs)}

    def with_torch(i: int) -> Any:
        blocks = x[i].float().unflatten(-1, (-1, 128))
        scales = blocks.abs().amax(-1).clamp(min=1e-10) / 448
        q = (blocks / scales[..., None]).flatten(1).to(torch.float8_e4m3fn)
        return q.view(torch.uint8).index_select(0, wide[i]).view(q.dtype), scales.index_select(0, wide[i])

    sides["torch"] = with_torch
    if sglang := others.sglang:

        def with_sglang(i: int) -> Any:
            q, scales = sglang.quantize(x[i])
            moved = q.view(torch.uint8).index_select(0, wide[i])
            return moved.view(q.dtype), scales.index_select(0, wide[i])

        sides["SGLang quantise, torch index_select"] = with_sglang
    want = x[0].index_select(0, wide[0])

    def right(run: Call) -> bool:
        q, scales = run(0)[:2]
        return near(q.float().unflatten(-1, (-1, 128)) * scales[..., None], want.unflatten(-1, (-1, 128)), 4e-2)

    size = x_bytes + pairs * (s.hidden + s.hidden // 128 * 4 + 4)
    return Made(sides, sets, size, {name: (lambda run=run: right(run)) for name, run in sides.items()})


def combine(s: Shape, others: Peers, device: torch.device, more: bool = False) -> Made:
    """The weighted sum; with `more` the shared expert's rows and the residual are added."""
    x_bytes, pairs = s.tokens * s.hidden * 2, s.tokens * s.k
    sets = min(sets_for(s.tokens, x_bytes * s.k), 8)
    rows, ids = normal(pairs, s.hidden, sets, device), make_ids(s, sets, device)
    inverse = [ops.index(one.cpu(), s.experts)[2].to(device) for one in ids]
    wide = [one.long().view(-1) for one in inverse]
    weights = [torch.rand(s.tokens, s.k, device=device) for _ in range(sets)]
    narrow = [one.to(torch.bfloat16) for one in weights]
    plus = [normal(s.tokens, s.hidden, sets, device) for _ in range(2)] if more else []

    def summed(out: Tensor, i: int) -> Tensor:
        for one in plus:
            out = out.add_(one[i])
        return out

    def with_torch(i: int) -> Tensor:
        gathered = rows[i].index_select(0, wide[i]) * narrow[i].view(-1, 1)
        return summed(gathered.view(s.tokens, s.k, -1).sum(dim=1), i)

    names = ("shared", "residual")
    sides: dict[str, Call] = {
        OURS: lambda i: ops.combine(
            rows[i], inverse[i], weights[i], **{name: one[i] for name, one in zip(names, plus, strict=False)}
        ),
        "torch": with_torch,
    }
    if vllm := others.vllm:
        sides["vLLM"] = lambda i: summed(vllm.unpermute(rows[i], inverse[i], weights[i]), i)
    if sglang := others.sglang:
        sides["SGLang"] = lambda i: summed(sglang.sum(rows[i], inverse[i], narrow[i]), i)
    if te := others.te:
        te.tune_anew()
        known = [te.map_rows(te.routing(one, s.experts)) for one in ids]
        spread = [te.spread(*both, s.experts) for both in zip(weights, ids, strict=True)]
        sides["TE"] = lambda i: summed(te.unpermute(rows[i], known[i], spread[i]), i)
    want = (rows[0][wide[0]].float().view(s.tokens, s.k, -1) * weights[0][..., None]).sum(1)
    for one in plus:
        want = want + one[0].float()
    right = {name: (lambda run=run: near(run(0), want, 1e-2)) for name, run in sides.items()}
    return Made(sides, sets, x_bytes * (1 + s.k + len(plus)) + pairs * 8, right)


def combine_all(s: Shape, others: Peers, device: torch.device) -> Made:
    """With shared expert and residual."""
    return combine(s, others, device, more=True)


# ---------------------------------------------------------------------------------------------------------- all rows

GATES = [(128, 8, 1), (256, 8, 1), (60, 4, 1), (64, 4, 1), (64, 8, 1), (256, 8, 8), (384, 8, 1), (512, 10, 1)]
TOKENS = (1, 64, 512, 4096, 8192, 65536)
WIDE = [(256, 7168), (128, 2048)]


#: Rows that an aim is set for: the first ones.
AIMED = 11


def rows() -> Iterator[Row]:
    """By importance: what an aim is set for comes first."""
    yield Row("gate", Shape(1, 128, 8), gate)
    yield Row("gate", Shape(8192, 256, 8), gate)
    yield Row("route", Shape(1, 128, 8), route)
    yield Row("route", Shape(64, 256, 8), route)
    yield Row("gate + index + permute", Shape(4096, 256, 8, 7168), route_permute)
    yield Row("combine + shared + residual", Shape(4096, 256, 8, 7168, dtype=torch.bfloat16), combine_all)
    yield Row("combine + shared + residual", Shape(4096, 128, 8, 2048, dtype=torch.bfloat16), combine_all)
    for tokens in (1, 4096):
        for experts in (60, 64):
            yield Row("gate", Shape(tokens, experts, 4), gate)
    for experts, k, groups in GATES[:6]:
        for tokens in TOKENS[:5]:
            yield Row("gate", Shape(tokens, experts, k, groups=groups), gate)
    for experts in (128, 256):
        for tokens in (1, 8, 64, 512, 4096, 8192):
            yield Row("route", Shape(tokens, experts, 8), route)
            yield Row("index", Shape(tokens, experts, 8), index)
            yield Row("align", Shape(tokens, experts, 8), align)
    bf16 = {"dtype": torch.bfloat16}
    for tokens in (1, 64, 4096):
        for experts, hidden in WIDE:
            yield Row("router", Shape(tokens, experts, 8, hidden, **bf16), router)
    for experts, hidden in WIDE:
        for tokens in (64, 512, 4096):
            yield Row("gate + index + permute", Shape(tokens, experts, 8, hidden), route_permute)
            yield Row("permute", Shape(tokens, experts, 8, hidden, **bf16), permute)
            yield Row("combine", Shape(tokens, experts, 8, hidden, **bf16), combine)
            yield Row("combine + shared + residual", Shape(tokens, experts, 8, hidden, **bf16), combine_all)
            yield Row("fp8 permute", Shape(tokens, experts, 8, hidden, **bf16), permute_fp8)
    for experts, k, groups in GATES[6:]:
        for tokens in TOKENS[:5]:
            yield Row("gate", Shape(tokens, experts, k, groups=groups), gate)
    for experts, k, groups in GATES:
        for tokens in TOKENS[:5]:
            yield Row("gate", Shape(tokens, experts, k, groups=groups, **bf16), gate)
    for experts, k, groups in GATES:
        yield Row("gate", Shape(65536, experts, k, groups=groups), gate)
    for experts in (60, 384, 512):
        for tokens in (1, 64, 4096, 65536):
            yield Row("route", Shape(tokens, experts, 4 if experts == 60 else 8), route)
