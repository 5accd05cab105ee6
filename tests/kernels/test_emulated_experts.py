"""The expert products: numbers for which every sum is exact, so that results are compared bit for bit."""

from __future__ import annotations

import guarded
import pytest
import torch
from emulated import ExpertArgs, library
from guarded import DTYPES, Launch, Memory

#: Inputs and outputs of a matrix: aligned, not aligned, narrower than a warp, wider than one round of its loads.
SHAPES = [(256, 96), (70, 33), (8, 8), (1, 1), (33, 5), (1544, 12)]
EXPERTS = 5
WEIGHTS_F32, ROW_PER_PAIR, SLOTS_I64 = 1, 2, 4
NO_BIAS = 2**64 - 1


def exact(shape: tuple[int, ...], dtype: torch.dtype, seed: int, step: float = 0.25, most: int = 3) -> torch.Tensor:
    """Small multiples of a power of two: products and sums of some thousand of them are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-most, most + 1, shape, generator=generator) * step).to(dtype)


def some_slots(tokens: int, k: int, seed: int = 0, *, i64: bool = False) -> torch.Tensor:
    """Slots, and numbers that are none between them."""
    slots = torch.randint(0, EXPERTS, (tokens * k,), generator=torch.Generator().manual_seed(seed))
    for place, nobody in enumerate([-1, EXPERTS, 2**31 - 1, -(2**31)]):
        if 2 * place + 1 < len(slots):
            slots[2 * place + 1] = nobody
    slots = slots.view(tokens, k)
    if not i64:
        return slots.int()
    return slots.masked_fill(slots == EXPERTS, 2**32 + 1)  # a slot, for who forgets the upper half


def is_slot(slot: int) -> bool:
    return 0 <= slot < EXPERTS


def blocks(outputs: int, of_a_block: int) -> int:
    return -(-outputs // of_a_block)


@pytest.mark.parametrize("format_", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("off", [0, 4])
def test_up(format_: str, inputs: int, outputs: int, off: int) -> None:
    dtype, tokens, k = DTYPES[format_], 3, 3
    memory, lib = Memory(), library("experts.cu")
    x = memory.input(exact((tokens, inputs), dtype, 1), off)
    w = memory.input(exact((EXPERTS, 2 * outputs, inputs), dtype, 2))
    slots = memory.input(some_slots(tokens, k, i64=off > 0))
    out = memory.output((tokens, k, outputs), dtype)
    args = ExpertArgs(
        arena=w, slot_bytes=w.stride(0) * w.element_size(), bias_offset=NO_BIAS, x=x, slots=slots, out=out,
        tokens=tokens, k=k, inputs=inputs, outputs=outputs, act=3, slot_count=EXPERTS,
        flags=SLOTS_I64 if off else 0,
    )  # fmt: skip
    name = f"moecore_expert_up_{format_}"
    guarded.run(memory, [Launch(lib, name, (tokens * k, blocks(outputs, 4)), (args,))])
    for t in range(tokens):
        for j, slot in enumerate(slots[t].tolist()):
            if not is_slot(slot):
                assert (out[t, j] == 0).all()
                continue
            gate, up = (w[slot].double() @ x[t].double()).to(dtype).chunk(2)
            assert torch.equal(out[t, j], gate.relu() * up)


@pytest.mark.parametrize("act", [0, 1, 2])
def test_activations(act: int) -> None:
    functional = torch.nn.functional
    function = [functional.silu, functional.gelu, lambda x: functional.gelu(x, approximate="tanh")][act]
    memory, lib = Memory(), library("experts.cu")
    x, w = memory.input(exact((1, 16), torch.float32, 1)), memory.input(exact((1, 64, 16), torch.float32, 2))
    slots, out = memory.input(torch.zeros(1, dtype=torch.int32)), memory.output((32,), torch.float32)
    args = ExpertArgs(
        arena=w, slot_bytes=4096, bias_offset=NO_BIAS, x=x, slots=slots, out=out, tokens=1, k=1, inputs=16, outputs=32,
        act=act, slot_count=1,
    )  # fmt: skip
    guarded.run(memory, [Launch(lib, "moecore_expert_up_f32", (1, 8), (args,))])
    gate, up = (w[0].double() @ x[0].double()).chunk(2)
    torch.testing.assert_close(out.double(), function(gate) * up, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("format_", DTYPES)
@pytest.mark.parametrize("wide_weights", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "k"), [(256, 96, 8), (70, 33, 3), (8, 1, 1), (33, 5, 11), (1544, 12, 17)]
)
def test_down(format_: str, wide_weights: bool, inputs: int, outputs: int, k: int) -> None:
    dtype, tokens = DTYPES[format_], 3
    memory, lib = Memory(), library("experts.cu")
    x = memory.input(exact((tokens, k, inputs), dtype, 3))
    w = memory.input(exact((EXPERTS, outputs, inputs), dtype, 4))
    slots = memory.input(some_slots(tokens, k, 1))
    weights = memory.input(exact((tokens, k), torch.float32 if wide_weights else dtype, 5, 0.5))
    out = memory.output((tokens, outputs), dtype)
    args = ExpertArgs(
        arena=w, slot_bytes=w.stride(0) * w.element_size(), bias_offset=NO_BIAS, x=x, slots=slots, weights=weights,
        out=out, tokens=tokens, k=k, inputs=inputs, outputs=outputs, flags=WEIGHTS_F32 if wide_weights else 0,
        slot_count=EXPERTS,
    )  # fmt: skip
    name = f"moecore_expert_down_{format_}"
    guarded.run(memory, [Launch(lib, name, (tokens, blocks(outputs, 2)), (args,))])
    for t in range(tokens):
        total = torch.zeros(outputs, dtype=torch.float64)
        for j, slot in enumerate(slots[t].tolist()):
            if is_slot(slot):
                row = (w[slot].double() @ x[t, j].double()).to(dtype)
                total += (row * weights[t, j, None]).double()
        assert torch.equal(out[t], total.to(dtype))


@pytest.mark.parametrize("format_", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_pair", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 96), (70, 33), (8, 300), (33, 5)])
def test_linear(format_: str, transposed: bool, per_pair: bool, bias: bool, inputs: int, outputs: int) -> None:
    dtype, tokens, k = DTYPES[format_], 3, 2
    memory, lib = Memory(), library("experts.cu")
    x = memory.input(exact((tokens, k, inputs) if per_pair else (tokens, inputs), dtype, 6))
    matrix = exact((EXPERTS, inputs, outputs) if transposed else (EXPERTS, outputs, inputs), dtype, 7)
    offsets = exact((EXPERTS, outputs), dtype, 8)
    # A slot: the matrix, then the bias, then what makes slots begin on 16 bytes.
    gap = -(inputs * outputs + outputs) % (16 // dtype.itemsize)
    slot = torch.cat([matrix.flatten(1), offsets, torch.zeros(EXPERTS, gap, dtype=dtype)], dim=1)
    arena, slots = memory.input(slot), memory.input(some_slots(tokens, k, 2))
    out = memory.output((tokens, k, outputs), dtype)
    args = ExpertArgs(
        arena=arena, slot_bytes=slot.stride(0) * dtype.itemsize, x=x, slots=slots, out=out, tokens=tokens, k=k,
        bias_offset=inputs * outputs * dtype.itemsize if bias else NO_BIAS, inputs=inputs, outputs=outputs,
        flags=ROW_PER_PAIR if per_pair else 0, slot_count=EXPERTS,
    )  # fmt: skip
    name, columns = ("slot_linear_t", 512 // dtype.itemsize) if transposed else ("slot_linear", 4)
    grid = (tokens * k, blocks(outputs, columns))
    guarded.run(memory, [Launch(lib, f"moecore_{name}_{format_}", grid, (args,))])
    for t in range(tokens):
        for j, which in enumerate(slots[t].tolist()):
            if not is_slot(which):
                assert (out[t, j] == 0).all()
                continue
            one = matrix[which].T if transposed else matrix[which]
            row = (one.double() @ (x[t, j] if per_pair else x[t]).double()).to(dtype)
            assert torch.equal(out[t, j], row + offsets[which] if bias else row)


@pytest.mark.parametrize("product", ["expert_up", "expert_down", "slot_linear", "slot_linear_t"])
@pytest.mark.parametrize(("offset", "behind"), [(0, 4), (4, 12), (16, 0), (32, 8)])
def test_matrices_anywhere_in_their_slots(product: str, offset: int, behind: int) -> None:
    """Between bytes that are no numbers, on 16 bytes in every slot, in some, or in none."""
    dtype, inputs, outputs, memory = torch.float16, 64, 24, Memory()
    up, transposed = product == "expert_up", product == "slot_linear_t"
    matrix = exact((EXPERTS, 2 * outputs if up else outputs, inputs), dtype, 1)
    stored = (matrix.transpose(1, 2) if transposed else matrix).flatten(1)
    no_numbers = [torch.full((EXPERTS, size // dtype.itemsize), torch.nan, dtype=dtype) for size in (offset, behind)]
    arena = memory.input(torch.cat([no_numbers[0], stored, no_numbers[1]], dim=1))
    x, chosen = memory.input(exact((3, inputs), dtype, 2)), [3, 0, 4]
    out = memory.output((3, outputs), dtype)
    args = ExpertArgs(
        arena=arena, slot_bytes=arena.stride(0) * dtype.itemsize, offset=offset, bias_offset=NO_BIAS, x=x, out=out,
        slots=memory.input(torch.tensor(chosen, dtype=torch.int32)), weights=memory.input(torch.ones(3, dtype=dtype)),
        tokens=3, k=1, inputs=inputs, outputs=outputs, act=3, slot_count=EXPERTS,
    )  # fmt: skip
    columns = {"expert_down": 2, "slot_linear_t": 512 // dtype.itemsize}.get(product, 4)
    launch = Launch(library("experts.cu"), f"moecore_{product}_f16", (3, blocks(outputs, columns)), (args,))
    guarded.run(memory, [launch], (0, 3))
    rows = torch.stack([(matrix[slot].double() @ one.double()).to(dtype) for slot, one in zip(chosen, x, strict=True)])
    assert torch.equal(out, rows[:, :outputs].relu() * rows[:, outputs:] if up else rows)


@pytest.mark.parametrize("act", [0, 1, 2, 3])
def test_a_nan_stays(act: int) -> None:
    """Also through relu, whose maximum with 0 would be 0."""
    memory = Memory()
    gate_up = torch.ones(1, 4, 4)
    gate_up[0, :2] = torch.nan  # of the gate alone
    x, w = memory.input(torch.ones(1, 4)), memory.input(gate_up)
    out = memory.output((2,), torch.float32)
    args = ExpertArgs(
        arena=w, slot_bytes=64, bias_offset=NO_BIAS, x=x, slots=memory.input(torch.zeros(1, dtype=torch.int32)),
        out=out, tokens=1, k=1, inputs=4, outputs=2, act=act, slot_count=1,
    )  # fmt: skip
    guarded.run(memory, [Launch(library("experts.cu"), "moecore_expert_up_f32", (1, 1), (args,))], (0,))
    assert out.isnan().all()
