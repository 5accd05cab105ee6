"""Rows of logits that are hard to rank, and what a gate makes of them in float64: for the tests of gate and route."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from guarded import DTYPES, FORMATS
from moecore.ops import reference

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_topk")
RENORMALIZE, TOP2, IDS_I64, BY_LOGITS, BY_SCORES = 1, 2, 4, 8, 16
WAYS = {BY_LOGITS: "logits_", BY_SCORES: "scores_"}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Below this a float32 has fewer digits than the tolerance asks for.
SMALLEST = 1.2e-38


@dataclass(frozen=True)
class Gate:
    """What a gate is asked for, but for its tensors."""

    k: int
    scoring: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    renormalize: bool = False
    scale: float = 1.0
    eps: float = 0.0

    @property
    def flags(self) -> int:
        return RENORMALIZE * self.renormalize + TOP2 * (self.group_score == "top2")

    def fields(self) -> dict[str, float]:
        """Fields of GateArgs."""
        return {
            "k": self.k, "groups": self.groups, "top_groups": self.top_groups, "scoring": SCORINGS.index(self.scoring),
            "flags": self.flags, "scale": self.scale, "eps": self.eps,
        }  # fmt: skip

    def reference(self, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.gate(
            logits, self.k, self.scoring, bias, self.groups, self.top_groups, self.group_score, self.renormalize,
            self.scale, self.eps,
        )  # fmt: skip


def width(experts: int) -> int:
    """Experts that each lane owns, in the short ways."""
    return next((n for n in (2, 4, 8, 16) if experts <= 32 * n), 16)


def kernel(family: str, dtype: torch.dtype, experts: int, way: int) -> str:
    """The name of a family's kernel for one of the short ways, or for 0 of the long one."""
    wide = f"_w{width(experts)}" if way else ""
    return f"moecore_{family}_{WAYS.get(way, '')}{NAMES[dtype]}{wide}"


def rule(gate: Gate, logits: torch.Tensor, stride: int, biased: bool, off: int = 0) -> int:
    """The flag of the short way that serves these rows, or 0. As rust/moecore-cuda/src/routing/rule.rs has it."""
    experts, bytes_ = logits.shape[1], logits.element_size()
    each = width(experts)
    load = min(each * bytes_, 16)
    whole = experts % (load // bytes_) == 0 and off % load == 0 and stride * bytes_ % load == 0
    if experts > 512 or gate.k > 31 or not whole:
        return 0
    if not biased and gate.groups <= 1:
        return BY_LOGITS
    size = experts // gate.groups
    lanes = size // each
    groups = gate.groups <= 1 or (each <= 8 and size % each == 0 and lanes & (lanes - 1) == 0)
    ranked = gate.scoring in ("sigmoid", "sqrtsoftplus") and (biased or gate.group_score == "top2")
    return BY_SCORES if groups and ranked else 0


def hard_rows(experts: int, dtype: torch.dtype, seed: int, more: int = 3) -> torch.Tensor:
    """[rows, experts]: random ones, then all that a ranking can get wrong."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(experts, generator=generator) * 3

    def some(share: float) -> torch.Tensor:
        return torch.rand(experts, generator=generator) < share

    def pick(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (experts,), generator=generator)]

    nan, inf = torch.nan, torch.inf
    index = torch.arange(experts)
    rows = [normal() for _ in range(more)]
    rows += [
        torch.full((experts,), 1.5),
        pick(0.5, 1.0, -2.0),
        pick(0.0, -0.0),
        pick(0.0, -0.0, -1.0),
        normal().masked_fill(some(0.3), nan),
        torch.full((experts,), nan),
        torch.full((experts,), nan).masked_fill(index == experts // 2, -inf),
        normal().masked_fill(some(0.2), inf).masked_fill(some(0.3), -inf),
        normal().masked_fill(some(0.9), -inf),
        torch.full((experts,), -inf),
        pick(nan, inf, -inf, 0.0, -0.0, 2.0),
        # Neighbouring float32 numbers, in any order: nothing but the lowest bits tells them apart.
        1.0 + torch.randperm(experts, generator=generator) * 2.0**-23,
        -1.0 - torch.randint(7, (experts,), generator=generator) * 2.0**-23,
        index * 0.125 - 3.0,
        3.0 - index * 0.125,
        # All of the best in the first experts, or in every 32nd.
        normal() + 20.0 * (index < 8),
        normal() + 20.0 * (index % 32 == 1),
        torch.where(some(0.5), 3.0e4, -3.0e4) * torch.rand(experts, generator=generator),
    ]
    if dtype == torch.float32:
        rows += [pick(3.4e38, -3.4e38, 1e-45, -1e-45, 0.0), normal() * 1e37]
    return torch.stack(rows).to(dtype)


def exact_scores(x: torch.Tensor, scoring: str) -> torch.Tensor:
    """float64 logits to float64 scores."""
    if scoring == "softmax":
        return x.softmax(-1)
    if scoring == "sigmoid":
        return x.sigmoid()
    if scoring == "sqrtsoftplus":
        return torch.logaddexp(x, torch.zeros_like(x)).sqrt()
    return x


def check_weights(gate: Gate, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """Weights [T, k] of choices that are taken as they are, against float64."""
    x = logits.double()
    chosen_logits = x.gather(-1, ids.long())
    chosen = exact_scores(x, gate.scoring).gather(-1, ids.long())
    if gate.scoring == "softmax_topk":
        chosen = chosen_logits.softmax(-1)
    expected = chosen
    usable = torch.ones(len(x), 1, dtype=torch.bool)
    if gate.renormalize:
        total = chosen.sum(-1, keepdim=True) + gate.eps
        usable = ~((total < 1e-30) & (total > -1)) | (total == 0)  # else float32 has underflown
        expected = expected / total
    expected = expected * gate.scale
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[weights.dtype]
    if gate.scoring != "sqrtsoftplus":  # e^(x - top): the difference is rounded, too
        far = (chosen_logits - x.nan_to_num(nan=-3e38).amax(-1, keepdim=True)).abs().nan_to_num(posinf=0.0)
        relative = tolerance + far.clamp(max=200.0) * 2.0**-23
    else:
        relative = torch.full_like(expected, tolerance)
    smallest = 2.0**-24 if weights.dtype == torch.float16 else SMALLEST
    got = weights.double()
    same = (got - expected).abs() <= relative * expected.abs() + 4 * smallest
    same |= (got == expected) | (got.isnan() & expected.isnan()) | ~usable
    if not same.all():
        t, j = (~same).nonzero()[0].tolist()
        raise AssertionError(f"{gate}: weight {j} of token {t} (expert {ids[t, j]}): {got[t, j]}, not {expected[t, j]}")


def check_ids(gate: Gate, logits: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor) -> float:
    """Choices [T, k] against the specification. The share of rows in which they had to be the same.

    Where scores are ranked, two of them may be so near that the last bit of `exp` decides. In such rows any choice is
    right that float64 does not call wrong."""
    _, expected = gate.reference(logits, bias)
    assert ((ids >= 0) & (ids < logits.shape[1])).all(), f"{gate}: ids outside of the experts"
    distinct = ids.sort(-1).values.diff() > 0
    assert distinct.all(), f"{gate}: ids twice"
    by_score = gate.scoring != "softmax_topk" and (bias is not None or (gate.groups > 1 and gate.group_score == "top2"))
    if not by_score:
        differ = (ids != expected).any(-1)
        if differ.any():
            t = int(differ.nonzero()[0])
            raise AssertionError(f"{gate}: token {t}: {ids[t].tolist()}, not {expected[t].tolist()}")
        return 1.0
    values = exact_scores(logits.double(), gate.scoring)
    values = values if bias is None else values + bias.double()
    clear = 0
    for t in range(len(ids)):
        is_clear = _clear(gate, values[t], logits[t], bias)
        clear += is_clear
        if is_clear:
            assert ids[t].tolist() == expected[t].tolist(), (
                f"{gate}: token {t}: {ids[t].tolist()}, not {expected[t].tolist()}"
            )
        elif gate.groups == 1 or gate.group_score == "max":
            _nearly(gate, values[t], ids[t], t)
    return clear / max(len(ids), 1)


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether float32 cannot confuse two values."""
    near = (a - b).abs() <= 1e-6 + 2e-6 * torch.maximum(a.abs(), b.abs())
    return ~near


def _clear(gate: Gate, values: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether neighbouring ranks are far apart, or equal because their logits and biases are."""
    if not values.isfinite().all():
        values = values.nan_to_num(nan=-1e30, posinf=1e30, neginf=-1e29)
    if gate.groups > 1:
        each = values.view(gate.groups, -1).sort(-1, descending=True).values
        total = (each[:, :2].sum(-1) if gate.group_score == "top2" else each[:, 0]).sort(descending=True).values
        last, first_out = total[gate.top_groups - 1], total[min(gate.top_groups, gate.groups - 1)]
        if gate.top_groups < gate.groups and not bool(_apart(last, first_out)) and last != first_out:
            return False
    order = values.sort(descending=True, stable=True).indices
    one, other = order[:-1], order[1:]
    logit = logits.double()
    alike = (logit[one] == logit[other]) | (logit[one].isnan() & logit[other].isnan())
    if bias is not None:
        alike &= bias[one] == bias[other]
    return bool((_apart(values[one], values[other]) | alike).all())


def _nearly(gate: Gate, values: torch.Tensor, ids: torch.Tensor, t: int) -> None:
    chosen = values[ids.long()].nan_to_num(nan=-1e30)
    slack = 1e-6 + 4e-6 * chosen.abs()
    assert (chosen[1:] <= chosen[:-1] + slack[:-1]).all(), f"{gate}: token {t}: {ids.tolist()} are out of order"
    if gate.groups == 1:
        left = values.nan_to_num(nan=-1e30).clone()
        left[ids.long()] = -torch.inf
        assert left.max() <= chosen[-1] + slack[-1], f"{gate}: token {t}: {ids.tolist()} leaves out a better one"


def format_of(tensor: torch.Tensor) -> int:
    return FORMATS[tensor.dtype]
