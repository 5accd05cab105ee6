"""The ops as torch sees them: schemas, fake tensors, compiled graphs, and no gradients."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from moecore import ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.moecore
INT32 = torch.int32


def distinct(tokens: int, k: int, experts: int) -> Tensor:
    return torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int()


def calls() -> list[tuple[str, tuple[Any, ...]]]:
    """Arguments with and without everything that may be left out."""
    logits, x = torch.randn(5, 12), torch.randn(5, 128)
    inverse = torch.randperm(15).int().view(5, 3)
    bins, valid = torch.randperm(12).int(), torch.tensor([4], dtype=INT32)
    gating = (3, "sigmoid", torch.randn(12), 4, 2, "top2", True, 2.5, 1e-20, valid, torch.bfloat16, torch.int64)
    rows, weights = torch.randn(15, 8), torch.rand(5, 3)
    matrices = torch.randn(12, 6, 128), torch.randn(12, 128, 3)
    return [
        ("gate", (logits, 3)),
        ("gate", (logits, 3, "softmax", None, 1, 1, "max", False, 1.0, 0.0, None, torch.float32, torch.int64)),
        ("gate", (logits.bfloat16(), *gating)),
        ("route", (logits, 3)),
        ("route", (logits, *gating, bins, 20)),
        ("index", (distinct(5, 3, 12), 12)),
        ("index", (distinct(5, 3, 12).long(), 12, bins, 20)),
        ("permute", (x, inverse, 15)),
        ("permute_fp8", (x.bfloat16(), inverse, 15)),
        ("route_permute", (x, logits, False, 3)),
        ("route_permute", (x, logits, True, 3, *gating[1:9])),
        ("combine", (rows, inverse)),
        ("combine", (rows, None, weights, torch.randn(5, 8), torch.randn(5, 8), 2.0)),
        ("expert_matvec", (x, distinct(5, 3, 12), weights, *matrices)),
        ("expert_matvec", (x.half(), distinct(5, 3, 12).long(), weights, *[one.half() for one in matrices], "gelu")),
    ]


CALLS = calls()
NAMES = [f"{name}-{number}" for number, (name, _) in enumerate(CALLS)]


@pytest.mark.parametrize(("name", "args"), CALLS, ids=NAMES)
def test_opcheck(name: str, args: tuple[Any, ...]) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(OPS, name).default, args, test_utils=checks)


@pytest.mark.parametrize("name", sorted({name for name, _ in CALLS}))
def test_opcheck_compiled(name: str) -> None:
    args = next(args for other, args in CALLS if other == name)
    if name in ("permute_fp8", "route_permute"):
        pytest.skip("opcheck cannot compare float8; the test below compiles them")
    torch.library.opcheck(getattr(OPS, name).default, args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("name", "args"), CALLS, ids=NAMES)
def test_fakes_have_the_shapes_dtypes_and_strides_of_results(name: str, args: tuple[Any, ...]) -> None:
    op = getattr(OPS, name).default
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*[mode.from_tensor(one) if isinstance(one, Tensor) else one for one in args])
    for one, other in zip(*((real, fake) if isinstance(real, tuple) else ((real,), (fake,))), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    x, logits = torch.randn(tokens, 128), torch.randn(tokens, 6)
    route, rows, scales = ops.route_permute(x, logits, 2, fp8=True)
    assert scales is not None
    assert [tuple(one.shape) for one in (*route, rows, scales)] == [
        (tokens, 2), (tokens, 2), (6,), (2 * tokens,), (tokens, 2), (2 * tokens, 128), (2 * tokens, 1),
    ]  # fmt: skip
    assert route.ends[-1] == 2 * tokens
    plain = ops.permute(x, route.inverse)
    assert ops.combine(plain, route.inverse, route.weights, residual=x).shape == (tokens, 128)
    matrices = torch.randn(6, 4, 128), torch.randn(6, 128, 2)
    assert ops.expert_matvec(x, route.ids, route.weights, *matrices).shape == (tokens, 128)


def layer(x: Tensor, logits: Tensor, bias: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """All ops at once."""
    route = ops.route(logits, 3, scoring="sigmoid", bias=bias, groups=2, top_groups=1, group_score="top2")
    rows = ops.permute(x, route.inverse)
    other, moved, scales = ops.route_permute(x, logits, 3, renormalize=True, fp8=True)
    assert scales is not None
    quantised, _ = ops.permute_fp8(x, other.inverse)
    weights, ids = ops.gate(logits, 3, ids_dtype=torch.int64)
    ends, _, inverse = ops.index(ids, 12)
    out = ops.combine(rows, route.inverse, route.weights, shared=x, residual=x)
    return (
        out + ops.expert_matvec(x, ids, weights, gate_up, down),
        route.ends,
        ends + inverse.sum().int(),
        (moved.float() - quantised.float()).sum() + scales.sum(),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    bias, gate_up, down = torch.randn(12), torch.randn(12, 4, 128), torch.randn(12, 128, 2)
    for tokens in (5, 9, 2):
        x, logits = torch.randn(tokens, 128), torch.randn(tokens, 12)
        with torch._dynamo.config.patch(error_on_recompile=True):  # one graph for any number of tokens
            results = compiled(x, logits, bias, gate_up, down)
        for got, want in zip(results, layer(x, logits, bias, gate_up, down), strict=True):
            torch.testing.assert_close(got, want)


def test_compiles_for_a_number_of_tokens_that_depends_on_data() -> None:
    torch.compiler.reset()

    def some(x: Tensor, logits: Tensor) -> Tensor:
        rows = (logits[:, 0] > 0).nonzero().flatten()
        route = ops.route(logits[rows], 2)
        return ops.combine(ops.permute(x[rows], route.inverse), route.inverse, route.weights)

    x, logits = torch.randn(9, 8), torch.randn(9, 6)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(some, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, logits), some(x, logits))


def test_gradients_are_refused() -> None:
    matrices = [torch.randn(6, 4, 8), torch.randn(6, 8, 2)]
    x, logits, weights, inverse = torch.randn(3, 8), torch.randn(3, 6), torch.rand(3, 2), distinct(3, 2, 6)
    wide = torch.randn(3, 128)
    for op, args, options in [
        (ops.gate, (logits, 2), {}),
        (ops.gate, (logits, 2), {"bias": torch.zeros(6)}),
        (ops.route, (logits, 2), {}),
        (ops.permute, (x, inverse), {}),
        (ops.permute_fp8, (wide, inverse), {}),
        (ops.route_permute, (x, logits, 2), {}),
        (ops.combine, (x, inverse, weights), {"shared": x, "residual": x.clone()}),
        (ops.expert_matvec, (x, inverse, weights, *matrices), {}),
    ]:
        tensors = [one for one in (*args, *options.values()) if isinstance(one, Tensor) and one.is_floating_point()]
        for one in tensors:
            one.requires_grad_()
            with pytest.raises(RuntimeError, match=r'no gradients: call it under torch.no_grad.*"grouped_mm"'):
                op(*args, **options)
            with torch.no_grad():
                op(*args, **options)
            one.requires_grad_(False)
        op(*args, **options)
        with torch.inference_mode():
            op(*args, **options)


def test_a_compiled_graph_refuses_gradients_too() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda logits: ops.gate(logits, 2)[0], fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="no gradients"):
        compiled(torch.randn(3, 6, requires_grad=True))


def test_scanning_needs_no_torch_and_ops_come_at_their_first_use() -> None:
    probe = "import sys, moecore; before = 'torch' in sys.modules; print(before, moecore.ops.gate.__name__)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "gate"]
