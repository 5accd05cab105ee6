"""The expert products against float64: fresh random inputs, results and their surroundings poisoned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import need  # noqa: F401
import pytest
import torch
from engine_rig import Rig, stream
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    torch.nn.functional.silu,
    torch.nn.functional.gelu,
    lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    torch.nn.functional.relu,
]
EXPERTS = 12
#: Hidden and intermediate width: aligned, not aligned, narrower than a warp's loads, wider than one round of them.
SHAPES = [(256, 96), (70, 33), (8, 8), (2048, 768), (1032, 520)]
#: Numbers after a result that nobody may touch.
GUARD = 64


class Experts:
    """Experts with all kinds of parts, resident."""

    def __init__(self, dtype: str, hidden: int, between: int, seed: int = 0) -> None:
        self.name, self.dtype, self.hidden, self.between = dtype, DTYPES[dtype], hidden, between
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "up": (2 * between, hidden),
            "down": (hidden, between),
            "up_t": (hidden, 2 * between),
            "down_t": (between, hidden),
            "up_bias": (2 * between,),
            "down_bias": (hidden,),
        }
        self.offset, self.parts, at = {}, {}, 0
        for name, shape in shapes.items():
            whole = torch.randn(EXPERTS, *shape, generator=generator, dtype=torch.float64)
            self.parts[name] = (whole / shape[-1] ** 0.5).to(self.dtype)
            self.offset[name] = at
            at = -(-(at + self.parts[name][0].nbytes) // 256) * 256
        self.rig = Rig(layers=1, experts=EXPERTS, row_bytes=at, slots=EXPERTS, fill=False)
        for expert in range(EXPERTS):
            row = self.rig.row(expert)
            for name, whole in self.parts.items():
                begin, part = self.offset[name], whole[expert].contiguous()
                row[begin : begin + part.nbytes] = part.reshape(-1).view(torch.uint8).numpy()
        self.parts = {name: whole.cuda() for name, whole in self.parts.items()}

    def random(self, *shape: int) -> Tensor:
        """Activations."""
        return torch.randn(*shape, device="cuda").to(self.dtype)

    def empty(self, *shape: int) -> tuple[Tensor, Tensor]:
        """A poisoned result, and what lies after it."""
        count = int(torch.Size(shape).numel())
        whole = torch.full((count + GUARD,), float("nan"), device="cuda", dtype=self.dtype)
        return whole[:count].view(*shape), whole[count:]

    def acquire(self, ids: Tensor) -> Tensor:
        """Slots, none below 0 apart from those of nobody."""
        slots = self.rig.acquire(0, ids)
        assert torch.equal(slots < 0, (ids < 0) | (ids >= EXPERTS)), self.rig.engine.error()
        return slots

    def up(self, x: Tensor, slots: Tensor, act: int) -> Tensor:
        """The fused up kernel."""
        (tokens, k), (out, after) = slots.shape, self.empty(slots.numel(), self.between)
        self.rig.engine.expert_up(
            self.name, self.offset["up"], x.data_ptr(), slots.data_ptr(), out.data_ptr(), tokens, k, self.hidden,
            self.between, act, stream(),
        )  # fmt: skip
        assert after.isnan().all()
        return out

    def down(self, h: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """The fused down kernel."""
        (tokens, k), (out, after) = slots.shape, self.empty(slots.shape[0], self.hidden)
        self.rig.engine.expert_down(
            self.name, self.offset["down"], h.data_ptr(), slots.data_ptr(), weights.data_ptr(),
            weights.dtype == torch.float32, out.data_ptr(), tokens, k, self.between, self.hidden, stream(),
        )  # fmt: skip
        assert after.isnan().all()
        return out

    def linear(self, part: str, x: Tensor, slots: Tensor, *, bias: bool, per_pair: bool) -> Tensor:
        """The plain product."""
        transposed = part.endswith("_t")
        name = part.removesuffix("_t")
        outputs, inputs = self.parts[name].shape[1:]
        (tokens, k), (out, after) = slots.shape, self.empty(slots.numel(), outputs)
        self.rig.engine.slot_linear(
            self.name, self.offset[part], self.offset[f"{name}_bias"] if bias else None, transposed, per_pair,
            x.data_ptr(), slots.data_ptr(), out.data_ptr(), tokens, k, inputs, outputs, stream(),
        )  # fmt: skip
        assert after.isnan().all()
        return out

    def round(self, x: Tensor) -> Tensor:
        """A value as the model's type holds it, in float64."""
        return x.to(self.dtype).double()

    def close(self, got: Tensor, want: Tensor) -> None:
        """That a result is as near as its type allows: sums in float32, some roundings on the way."""
        assert not got.isnan().any()
        unit = torch.finfo(self.dtype).eps
        scale = want.abs().amax().clamp(min=1e-3)
        distance = (got.double() - want).abs()
        assert (distance <= 4 * unit * (want.abs() + scale / 8) + 1e-5 * scale).all(), (distance.max(), scale)


@pytest.fixture(
    scope="module", params=[(d, s) for d in DTYPES for s in SHAPES], ids=lambda p: f"{p[0]}-{p[1][0]}x{p[1][1]}"
)
def experts(request: pytest.FixtureRequest) -> Iterator[Experts]:
    """Experts of all types and shapes."""
    dtype, (hidden, between) = request.param
    made = Experts(dtype, hidden, between, seed=hidden)
    yield made
    made.rig.close()


def routing(tokens: int, k: int) -> Tensor:
    """Experts of tokens, with duplicates, and with a nobody in most calls."""
    ids = torch.randint(-1, EXPERTS + 1, (tokens, k), device="cuda")
    ids[0, 0] = 0
    return ids


def reference_up(experts: Experts, x: Tensor, ids: Tensor, act: int) -> Tensor:
    """act(gate) * up in float64, rounded where the kernel rounds."""
    whole = experts.parts["up"].double()[ids.clamp(0, EXPERTS - 1)]
    products = experts.round(torch.einsum("tkoi,ti->tko", whole, x.double()))
    gate, up = products.chunk(2, dim=-1)
    out = experts.round(ACTIVATIONS[act](gate)) * up
    return torch.where(nobody(ids), 0.0, out).reshape(-1, experts.between)


def nobody(ids: Tensor) -> Tensor:
    """Pairs without an expert, to be laid over rows."""
    return ((ids < 0) | (ids >= EXPERTS)).unsqueeze(-1)


@pytest.mark.parametrize("act", range(len(ACTIVATIONS)))
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 8), (3, 2), (16, 4)])
def test_up(experts: Experts, act: int, tokens: int, k: int) -> None:
    ids, x = routing(tokens, k), experts.random(tokens, experts.hidden)
    got = experts.up(x, experts.acquire(ids), act)
    experts.close(got, reference_up(experts, x, ids, act))
    assert (got[nobody(ids).reshape(-1)] == 0).all()


@pytest.mark.parametrize("float32_weights", [True, False])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 8), (2, 3), (5, 12), (16, 4)])
def test_down(experts: Experts, float32_weights: bool, tokens: int, k: int) -> None:
    ids, h = routing(tokens, k), experts.random(tokens, k, experts.between)
    weights = torch.rand(tokens, k, device="cuda").to(torch.float32 if float32_weights else experts.dtype)
    got = experts.down(h, experts.acquire(ids), weights)
    whole = experts.parts["down"].double()[ids.clamp(0, EXPERTS - 1)]
    rows = experts.round(torch.einsum("tkoi,tki->tko", whole, h.double())) * weights.double().unsqueeze(-1)
    rows = rows if float32_weights else experts.round(rows)
    experts.close(got, torch.where(nobody(ids), 0.0, rows).sum(1))


@pytest.mark.parametrize("part", ["up", "down", "up_t", "down_t"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_pair", [False, True])
def test_linear(experts: Experts, part: str, bias: bool, per_pair: bool) -> None:
    name = part.removesuffix("_t")
    for tokens, k in ((1, 1), (1, 8), (16, 4)):
        ids = routing(tokens, k)
        x = experts.random(tokens * k if per_pair else tokens, experts.parts[name].shape[2])
        got = experts.linear(part, x, experts.acquire(ids), bias=bias, per_pair=per_pair)
        whole = experts.parts[part].double()[ids.clamp(0, EXPERTS - 1)]
        whole = whole.transpose(-1, -2) if part.endswith("_t") else whole
        each = x.view(tokens, k, -1) if per_pair else x.unsqueeze(1).expand(tokens, k, -1)
        want = experts.round(torch.einsum("tkoi,tki->tko", whole, each.double()))
        if bias:
            want = experts.round(want + experts.parts[f"{name}_bias"].double()[ids.clamp(0, EXPERTS - 1)])
        experts.close(got, torch.where(nobody(ids), 0.0, want).reshape(got.shape))
        assert (got[nobody(ids).reshape(-1)] == 0).all()


def all_of(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """Every kernel on a call."""
    slots = experts.acquire(ids)
    h = experts.up(x, slots, 0)
    linear = [experts.linear(part, x, slots, bias=True, per_pair=False) for part in ("up", "up_t")]
    return [h, experts.down(h, slots, weights), *linear]


def test_a_token_does_not_see_the_others(experts: Experts) -> None:
    tokens, k = 16, 4
    ids, x = routing(tokens, k), experts.random(tokens, experts.hidden)
    weights = torch.rand(tokens, k, device="cuda")
    together = all_of(experts, x, ids, weights)
    for token in range(tokens):
        one = slice(token, token + 1)
        alone = all_of(experts, x[one].clone(), ids[one].clone(), weights[one].clone())
        for whole, part in zip(together, alone, strict=True):
            rows = whole.view(tokens, -1, whole.shape[-1])[token]
            assert torch.equal(rows, part)


def test_slots_do_not_matter(experts: Experts) -> None:
    ids, x = routing(4, 3), experts.random(4, experts.hidden)
    weights = torch.rand(4, 3, device="cuda")
    first = all_of(experts, x, ids, weights)
    before = experts.rig.table.clone()
    # The same experts come in another order, and so lie in other slots.
    order = torch.arange(EXPERTS).roll(-5).tolist()
    other = Experts(experts.name, experts.hidden, experts.between, seed=experts.hidden)
    for expert in order:
        other.acquire(torch.tensor([[expert]], device="cuda"))
    again = all_of(other, x, ids, weights)
    assert (other.rig.table != before).any()
    other.rig.close()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
