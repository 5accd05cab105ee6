"""Direct launches: who has to see them, and tensors that have no memory where they say."""

from __future__ import annotations

import io
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from moecore import ops
from moecore.ops import launch
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

Calls = list[tuple[str, tuple[Any, ...]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Tensors of the CPU say that they are on a GPU; what is launched for them is written down."""
    calls: Calls = []

    class Core(SimpleNamespace):
        def routing_workspace(self, tokens: int, bins: int) -> int:
            return 0

        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, args))

    monkeypatch.setattr(launch, "_core", Core())
    monkeypatch.setattr(launch, "_stream", lambda device: 77)
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    return calls


def test_plain_tensors_are_launched_for(launched: Calls) -> None:
    ops.gate(torch.zeros(3, 8), 2, bias=torch.nn.Parameter(torch.zeros(8), requires_grad=False))
    assert [name for name, _ in launched] == ["routing_gate"]


def test_a_trace_holds_the_op_and_not_the_memory_alone(launched: Calls) -> None:
    logits = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and traced sizes are constants
        traced = torch.jit.trace(lambda x: ops.gate(x, 2)[0], (logits,), check_trace=False)
    assert launched == []
    assert "moecore::gate" in str(traced.graph)
    other = torch.randn(3, 8)
    assert torch.equal(traced(other), torch.ops.moecore.gate(other, 2)[0])


def test_transforms_of_functions_are_obeyed(launched: Calls) -> None:
    logits = torch.randn(4, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no batching rule: torch goes through the batch
        weights, _ = torch.func.vmap(lambda x: ops.gate(x, 2))(logits)
    plain = torch.func.functionalize(lambda x: ops.gate(x, 2)[0])(logits[1])
    assert launched == []
    assert torch.equal(weights[1], plain)
    assert torch.equal(plain, torch.ops.moecore.gate(logits[1], 2)[0])


def test_what_has_no_memory_is_not_taken_for_left_out(launched: Calls) -> None:
    """A wrapper's address is 0, as that of an argument that is not given."""
    rows, weights, bias = torch.randn(6, 8), torch.rand(3, 2), torch.arange(8.0)
    inverse = torch.arange(6, dtype=torch.int32).view(3, 2)
    assert TwoTensor(bias, bias).data_ptr() == 0
    out = ops.combine(rows, inverse, TwoTensor(weights, weights.clone()))
    _, ids = ops.gate(torch.zeros(3, 8), 2, bias=TwoTensor(bias, bias.clone()))
    assert launched == []
    assert isinstance(out, TwoTensor)
    assert torch.equal(out.a, torch.ops.moecore.combine(rows, inverse, weights))
    assert (ids.a if isinstance(ids, TwoTensor) else ids).tolist() == [[7, 6]] * 3


def test_whole_numbers_of_numpy_are_whole_numbers(launched: Calls) -> None:
    two: Any = np.int64(2)
    weights, _ = ops.gate(torch.zeros(3, 8), two, groups=two, top_groups=two)
    ops.index(torch.zeros(3, 2, dtype=torch.int32), np.int32(8))  # type: ignore[arg-type]
    assert weights.shape == (3, 2)
    assert len(launched) == 2


def tangents(rows: Tensor) -> Tensor:
    return ops.combine(rows, torch.arange(6, dtype=torch.int32).view(3, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own, at its first dual tensor
@pytest.mark.parametrize("way", ["launched", "dispatched"])
def test_forward_gradients_are_refused_too(way: str, request: pytest.FixtureRequest) -> None:
    if way == "launched":
        request.getfixturevalue("launched")
    rows = torch.randn(6, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows, torch.ones_like(rows))
        with pytest.raises(RuntimeError, match="no gradients"):
            tangents(dual)
        with torch.no_grad(), pytest.raises(RuntimeError, match="no gradients"):
            tangents(dual)  # forward-mode does not ask whether gradients are on
        tangents(rows)
    with pytest.raises(RuntimeError, match="no gradients"):
        torch.func.jvp(tangents, (rows,), (torch.ones_like(rows),))


def test_a_number_of_rows_that_depends_on_data() -> None:
    torch.compiler.reset()

    def padded(x: Tensor, inverse: Tensor, rows: Tensor) -> Tensor:
        return ops.combine(ops.permute(x, inverse, rows.item()), inverse)  # type: ignore[arg-type]

    x, inverse = torch.randn(3, 8), torch.arange(6, dtype=torch.int32).view(3, 2)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(padded, fullgraph=True, backend="aot_eager")
        for rows in (9, 12):
            assert torch.equal(compiled(x, inverse, torch.tensor(rows)), padded(x, inverse, torch.tensor(rows)))
        with pytest.raises(RuntimeError):
            compiled(x, inverse, torch.tensor(-1))


def test_an_exported_route_is_saved() -> None:
    class Module(torch.nn.Module):
        def forward(self, logits: Tensor) -> ops.Route:
            return ops.route(logits, 2)

    logits = torch.randn(3, 8)
    torch.export.save(torch.export.export(Module(), (logits,)), file := io.BytesIO())
    file.seek(0)
    loaded = torch.export.load(file).module()(logits)
    assert all(torch.equal(a, b) for a, b in zip(loaded, ops.route(logits, 2), strict=True))
