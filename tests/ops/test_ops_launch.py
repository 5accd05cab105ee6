"""What the CUDA side of the ops hands to the core, seen by a core that only writes it down."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from moecore import _core
from moecore.errors import DeviceError
from moecore.ops import check, launch
from moecore.ops.check import Gating
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

Calls = list[tuple[str, tuple[Any, ...]]]
STREAM = 77


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []

    class Core(SimpleNamespace):
        def routing_workspace(self, tokens: int, bins: int) -> int:
            return 0 if tokens < 100 else tokens * bins

        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, args))

    monkeypatch.setattr(launch, "_core", Core())
    monkeypatch.setattr(launch, "_stream", lambda device: STREAM)
    return calls


def named(call: tuple[str, tuple[Any, ...]]) -> dict[str, Any]:
    """A call's arguments by the names that the core's own function has for them."""
    name, args = call
    return dict(zip(inspect.signature(getattr(_core, name)).parameters, args, strict=True))


def test_gate(core: Calls) -> None:
    logits, bias, valid = torch.zeros(3, 16).bfloat16()[:, 4:12], torch.zeros(8), torch.zeros(1, dtype=torch.int32)
    g = Gating(2, "sqrtsoftplus", bias, 4, 2, "top2", True, 2.5, 0.5, valid, torch.float16, torch.int64)
    weights, ids = launch.gate(logits, g)
    assert core == [
        ("routing_gate", (
            None, 1, logits.data_ptr(), 16, 3, 8, 2, 4, 2, 2, 1 | 2 | 4, bias.data_ptr(), weights.data_ptr(), 2,
            ids.data_ptr(), valid.data_ptr(), 2.5, 0.5, STREAM,
        ))
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", [3, 100])
def test_route(core: Calls, tokens: int) -> None:
    logits, bin_of = torch.zeros(tokens, 8), torch.arange(8, dtype=torch.int32)
    weights, ids, ends, source, inverse = launch.route(logits, Gating(2, bin_of=bin_of, bins=11))
    ((name, args),) = core
    assert name == "routing_route"
    assert args[:18] == (
        None, 0, logits.data_ptr(), 8, tokens, 8, 2, 1, 1, 0, 0, 0, weights.data_ptr(), 0, ids.data_ptr(), 0, 1.0, 0.0,
    )  # fmt: skip
    assert args[18:23] == (bin_of.data_ptr(), 11, ends.data_ptr(), source.data_ptr(), inverse.data_ptr())
    assert bool(args[23]) == (tokens == 100)
    assert args[24:] == (0, 0, 0, 0, 0, STREAM)


def test_gating_arrives_under_the_names_of_the_core(core: Calls) -> None:
    """Of route as of gate, and no two arguments are alike."""
    logits, bias = torch.zeros(3, 16).bfloat16()[:, 4:12], torch.zeros(8)
    valid, bin_of = torch.zeros(1, dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    g = Gating(2, "softmax_topk", bias, 4, 3, "top2", True, 2.5, 0.5, valid, torch.float16, torch.int64, bin_of, 11)
    x = torch.zeros(3, 128).half()
    made = [launch.gate(logits, g), launch.route(logits, g), launch.route_permute(x, logits, False, g)[0]]
    assert [name for name, _ in core] == ["routing_gate", "routing_route", "routing_route"]
    for call, (weights, ids, *index) in zip(core, made, strict=True):
        given = named(call)
        want = {
            "device": None, "logits_format": 1, "logits": logits.data_ptr(), "stride": 16, "tokens": 3, "experts": 8,
            "k": 2, "groups": 4, "top_groups": 3, "scoring": 3, "flags": 1 | 2 | 4, "bias": bias.data_ptr(),
            "weights": weights.data_ptr(), "weights_format": 2, "ids": ids.data_ptr(), "valid": valid.data_ptr(),
            "scale": 2.5, "eps": 0.5, "stream": STREAM,
        }  # fmt: skip
        if index:
            ends, source, inverse = (one.data_ptr() for one in index)
            want |= {"bin_of": bin_of.data_ptr(), "bins": 11, "ends": ends, "source": source, "inverse": inverse}
        assert {name: given[name] for name in want} == want


def test_every_call_has_the_arguments_of_the_core(core: Calls) -> None:
    """Their names: where a number goes, the tests of each op say."""
    x, inverse = torch.zeros(3, 128).half(), torch.zeros(3, 2, dtype=torch.int32)
    _, rows, scales = launch.route_permute(x, torch.zeros(3, 8), True, Gating(2))
    launch.permute_fp8(x, inverse, 9)
    launch.align(torch.zeros(4, dtype=torch.int32), inverse, 16)
    launch.combine(x[:, :8].contiguous(), inverse, torch.zeros(3, 2), scale=2.5)
    launch.expert_matvec(
        x, inverse, torch.zeros(3, 2).half(), torch.zeros(5, 6, 128).half(), torch.zeros(5, 128, 3).half()
    )
    route, permute, align, combine, up, down = (named(call) for call in core)
    assert scales is not None
    assert (route["x"], route["rows"], route["scales"]) == (x.data_ptr(), rows.data_ptr(), scales.data_ptr())
    assert (route["x_format"], route["row_bytes"], route["workspace"]) == (2, 256, 0)
    assert (permute["tokens"], permute["k"], permute["rows"], permute["row_bytes"]) == (3, 2, 9, 256)
    assert (align["pairs"], align["bins"], align["block"], align["capacity"]) == (6, 4, 16, 64)
    assert (combine["format"], combine["row_count"], combine["row_bytes"], combine["weights_format"]) == (2, 3, 16, 0)
    assert (combine["tokens"], combine["k"], combine["scale"]) == (3, 2, 2.5)
    assert (up["inputs"], up["outputs"], up["slots_i64"], up["expert_stride_bytes"]) == (128, 3, False, 1536)
    assert (down["inputs"], down["outputs"], down["weights_f32"], down["expert_stride_bytes"]) == (3, 128, False, 768)


def test_the_workspace_is_asked_for_by_tokens_and_bins(core: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def routing_workspace(*sizes: int) -> int:
        asked.append(sizes)
        return 48

    monkeypatch.setattr(launch._core, "routing_workspace", routing_workspace, raising=False)
    launch.route(torch.zeros(3, 8), Gating(2, bin_of=torch.arange(8, dtype=torch.int32), bins=11))
    launch.index(torch.zeros(5, 2, dtype=torch.int32), 7)
    assert asked == [(3, 11), (5, 7)]
    assert all(named(call)["workspace"] for call in core)


@pytest.mark.parametrize("fp8", [False, True])
def test_route_permute(core: Calls, fp8: bool) -> None:
    x, logits = torch.zeros(3, 256).half(), torch.zeros(3, 8)
    (*_, inverse), rows, scales = launch.route_permute(x, logits, fp8, Gating(2, group_score="top2"))
    ((_, args),) = core
    assert args[10] == 0  # the top2 of one group is nothing
    assert args[18:24] == (0, 8, *args[20:22], inverse.data_ptr(), 0)
    address = scales.data_ptr() if fp8 else 0
    assert args[24:] == (x.data_ptr(), 2, 512, rows.data_ptr(), address, STREAM)
    assert (rows.shape, rows.dtype) == ((6, 256), torch.float8_e4m3fn if fp8 else torch.float16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index(core: Calls, dtype: torch.dtype) -> None:
    ids = torch.zeros(3, 2, dtype=dtype)
    ends, source, inverse = launch.index(ids, 8)
    assert core == [
        ("routing_route", (
            None, 0, 0, 0, 3, 8, 2, 1, 1, 0, 4 if dtype == torch.int64 else 0, 0, 0, 0, ids.data_ptr(), 0, 1.0, 0.0,
            0, 8, ends.data_ptr(), source.data_ptr(), inverse.data_ptr(), 0, 0, 0, 0, 0, 0, STREAM,
        ))
    ]  # fmt: skip


def test_index_with_bins(core: Calls) -> None:
    ids, bin_of = torch.zeros(3, 2, dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    ends, _, _ = launch.index(ids, 8, bin_of, 11)
    given = named(core[0])
    assert (given["experts"], given["bin_of"], given["bins"], given["ends"]) == (
        8,
        bin_of.data_ptr(),
        11,
        ends.data_ptr(),
    )
    assert ends.shape == (11,)


@pytest.mark.parametrize("fp8", [False, True])
def test_permute(core: Calls, fp8: bool) -> None:
    x, inverse = torch.zeros(3, 128).bfloat16(), torch.zeros(3, 2, dtype=torch.int32)
    out, scales = launch.permute_fp8(x, inverse, 9) if fp8 else (launch.permute(x, inverse, 9), None)
    address = scales.data_ptr() if scales is not None else 0
    args = (-1, x.data_ptr(), 1, inverse.data_ptr(), out.data_ptr(), address, 3, 2, 9, 256, STREAM)
    assert core == [("routing_permute", args)]


def test_combine(core: Calls) -> None:
    rows, inverse, weights = torch.zeros(7, 8), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2).half()
    shared, residual = torch.zeros(3, 8), torch.zeros(3, 8)
    out = launch.combine(rows, inverse, weights, shared, residual, 2.5)
    launch.combine(rows, None, weights)
    launch.combine(rows, inverse)
    names, args = zip(*core, strict=True)
    assert set(names) == {"routing_combine"}
    assert args[0] == (
        -1, 0, rows.data_ptr(), inverse.data_ptr(), weights.data_ptr(), 2, shared.data_ptr(), residual.data_ptr(),
        out.data_ptr(), 3, 2, 7, 32, 2.5, STREAM,
    )  # fmt: skip
    assert args[1][3:8] == (0, weights.data_ptr(), 2, 0, 0)
    assert args[2][3:8] == (inverse.data_ptr(), 0, 0, 0, 0)


def test_expert_matvec(core: Calls) -> None:
    x, ids, weights = torch.zeros(3, 8).half(), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    gate_up, down = torch.zeros(4, 2, 6, 8).half()[:, 1], torch.zeros(4, 8, 3).half()
    out = launch.expert_matvec(x, ids, weights, gate_up, down, "gelu_tanh")
    (up_name, up), (down_name, last) = core
    assert (up_name, down_name) == ("experts_up", "experts_down")
    between = up[8]
    chosen = (ids.data_ptr(), True)
    assert up == (-1, 2, gate_up.data_ptr(), 192, 4, x.data_ptr(), *chosen, between, 3, 2, 8, 3, 2, STREAM)
    assert last == (
        -1, 2, down.data_ptr(), 48, 4, between, *chosen, weights.data_ptr(), True, out.data_ptr(), 3, 2, 3, 8, STREAM,
    )  # fmt: skip


def test_nothing_is_launched_for_no_tokens(core: Calls) -> None:
    logits, x = torch.zeros(0, 8), torch.zeros(0, 128)
    ids = torch.zeros(0, 2, dtype=torch.int32)
    assert [one.shape for one in launch.gate(logits, Gating(2))] == [(0, 2), (0, 2)]
    *_, ends, source, inverse = launch.route(logits, Gating(2))
    assert ends.tolist() == [0] * 8
    assert (source.shape, inverse.shape) == ((0,), (0, 2))
    assert launch.index(ids, 8)[0].tolist() == [0] * 8
    _, rows, scales = launch.route_permute(x, logits, True, Gating(2))
    assert scales is not None
    assert (rows.shape, scales.shape) == ((0, 128), (0, 1))
    assert launch.permute(x, ids, 4).shape == (4, 128)
    assert launch.permute(torch.zeros(2, 8), torch.zeros(2, 2, dtype=torch.int32), 0).shape == (0, 8)
    assert launch.combine(x, ids).shape == (0, 128)
    matrices = torch.zeros(4, 6, 128), torch.zeros(4, 128, 3)
    assert launch.expert_matvec(x, ids, torch.zeros(0, 2), *matrices).shape == (0, 128)
    assert core == []


class Gpus:
    """Some GPUs, of which the streams of those in `capturing` capture."""

    def __init__(self, core: Calls, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.core, self.capturing, self.current = core, set[int](), 0
        monkeypatch.setattr(launch, "_loaded", set())
        monkeypatch.setattr(launch, "_stream", launch._known_stream)
        monkeypatch.setattr(launch, "_raw_stream", lambda device: STREAM + device)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current in self.capturing)

    @contextlib.contextmanager
    def device(self, number: int) -> Iterator[None]:
        before, self.current = self.current, number
        yield
        self.current = before

    def loads(self) -> list[int]:
        return [args[0] for name, args in self.core if name == "load_kernels"]


def test_the_first_call_on_a_gpu_loads_its_kernels(core: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(core, monkeypatch, count=2)
    assert [launch._stream(device) for device in (1, 1, 1)] == [STREAM + 1] * 3
    assert gpus.loads() == [1]
    assert [name for name, _ in core] == ["cuda_available", "load_kernels"], "the compiler is looked for before"
    assert launch._stream(0) == STREAM
    assert gpus.loads() == [1, 0]
    assert launch._stream is launch._raw_stream, "nothing is left to ask"
    launch.load(1)
    assert gpus.loads() == [1, 0]


def test_the_first_call_is_not_captured(core: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(core, monkeypatch, count=2)
    gpus.capturing = {1}
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"on cuda:1 .* call once before .* captur"):
            launch._stream(1)
    assert core == [], "not even the driver was asked: that would have ended the capture"
    assert launch._stream(0) == STREAM
    gpus.capturing = set()
    assert launch._stream(1) == STREAM + 1
    gpus.capturing = {0, 1}
    assert [launch._stream(device) for device in (0, 1)] == [STREAM, STREAM + 1]


def test_kernels_that_cannot_be_loaded_are_tried_again(core: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(core, monkeypatch, count=1)

    def load_kernels(device: int) -> None:
        raise DeviceError("no memory")

    monkeypatch.setattr(launch._core, "load_kernels", load_kernels, raising=False)
    for _ in range(2):
        with pytest.raises(DeviceError, match="no memory"):
            launch._stream(0)
    monkeypatch.delattr(launch._core, "load_kernels")
    assert launch._stream(0) == STREAM
    assert gpus.loads() == [0]


def misaligned(*shape: int) -> Tensor:
    size = torch.Size(shape).numel()
    flat = torch.zeros(size + 4)
    offset = next(i for i in range(1, 4) if (flat.data_ptr() + 4 * i) % 16)
    return flat[offset : offset + size].view(shape)


def test_memory_that_begins_in_between_is_refused(core: Calls) -> None:
    inverse, rows = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(6, 8)
    with pytest.raises(ValueError, match=r"x: memory at an address of .* modulo 16, must be .* on 16 bytes"):
        launch.route_permute(misaligned(3, 8), torch.zeros(3, 4), False, Gating(2))
    with pytest.raises(ValueError, match="rows: memory"):
        launch.combine(misaligned(6, 8), inverse)
    for name in ("shared", "residual"):
        with pytest.raises(ValueError, match=f"{name}: memory"):
            launch.combine(rows, inverse, **{name: misaligned(3, 8)})
    assert core == []
    launch.permute(misaligned(3, 8), inverse, 6)  # copies what is so little
    assert core[0][1][1] % 16 == 0


def test_what_no_dispatcher_has_seen_is_checked_too(core: Calls) -> None:
    with pytest.raises(TypeError, match="logits: str, must be a Tensor"):
        launch.gate("logits", Gating(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"logits: layout torch.sparse_coo, must be strided"):
        launch.gate(torch.zeros(2, 4).to_sparse(), Gating(2))
    with pytest.raises(ValueError, match=r"k: 2.5, must be"):
        launch.gate(torch.zeros(2, 4), Gating(2.5))  # type: ignore[arg-type]
    assert core == []


def test_numbers_are_those_of_the_headers() -> None:
    cuda = Path(__file__).parents[2] / "cuda"
    text = (cuda / "routing.cuh").read_text() + (cuda / "experts.cu").read_text()
    defined = dict(
        line.split()[1:3] for line in text.splitlines() if line.startswith("#define ") and len(line.split()) > 2
    )
    names = {
        "softmax": "SOFTMAX",
        "sigmoid": "SIGMOID",
        "sqrtsoftplus": "SQRT_SOFTPLUS",
        "softmax_topk": "SOFTMAX_TOPK",
    }
    for scoring, number in check.SCORINGS.items():
        assert defined[f"SCORE_{names[scoring]}"] == f"{number}u"
    for act, number in check.ACTIVATIONS.items():
        assert defined[f"ACT_{act.upper()}"] == f"{number}u"
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
        assert defined[f"FORMAT_{name}"] == f"{check.FORMATS[dtype]}u"
    flags = {"RENORMALIZE": launch._RENORMALIZE, "GROUP_TOP2": launch._GROUP_TOP2, "IDS_I64": launch._IDS_I64}
    for name, number in flags.items():
        assert defined[f"GATE_{name}"] == f"{number}u"
    assert (int(defined["GATE_MAX_EXPERTS"]), int(defined["GATE_MAX_K"])) == (check.MAX_EXPERTS, check.MAX_K)
