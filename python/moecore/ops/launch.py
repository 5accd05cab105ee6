"""The ops on CUDA: check, allocate the results, launch on torch's current stream.

A call costs the host more than the kernel costs the GPU, so nothing here is done twice, and no torch op runs beside the
launch. Nothing waits for the GPU, so that all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moecore import _core
from moecore.errors import DeviceError

from . import check
from .check import ACTIVATIONS, FORMATS, FP8_BLOCK, SCORINGS

if TYPE_CHECKING:
    from torch import Tensor

    from .check import Gating

# As cuda/routing.cuh has them.
_RENORMALIZE, _GROUP_TOP2, _IDS_I64 = 1, 2, 4

_F32 = torch.float32
_I32, _I64 = torch.int32, torch.int64

#: The stream of a device that torch launches on, as an integer; the public way to it makes an object.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: int(torch.cuda.current_stream(device).cuda_stream)
)


#: GPUs whose kernels are loaded.
_loaded: set[int] = set()


def load(device: int) -> None:
    """Loads the kernels of a GPU, if nobody has. The first call of an op there does so, too.

    Raises:
        DeviceError: torch's stream of this GPU captures a CUDA graph, which the driver would end; or loading failed.
    """
    global _stream
    if device in _loaded:
        return
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        raise DeviceError(
            f"moecore's kernels are not loaded on cuda:{device} yet, and loading them cannot be captured in a CUDA "
            "graph; call once before you capture, or moecore.fuse(model) when the model is on the GPU"
        )
    _core.cuda_available()  # which also finds the compiler in NVIDIA's packages
    _core.load_kernels(device)
    _loaded.add(device)
    if len(_loaded) >= torch.cuda.device_count():
        _stream = _raw_stream


def _known_stream(device: int) -> int:
    """The stream of a device, while there are GPUs without kernels."""
    if device not in _loaded:
        load(device)
    return int(_raw_stream(device))


_stream = _known_stream


def gate(logits: Tensor, g: Gating) -> tuple[Tensor, Tensor]:
    """weights [T, k], ids [T, k]."""
    check.gate(logits, g)
    (tokens, experts), device = logits.shape, logits.device
    weights = torch.empty((tokens, g.k), dtype=g.weights_dtype, device=device)
    ids = torch.empty((tokens, g.k), dtype=g.ids_dtype, device=device)
    if tokens:
        number = device.index
        _core.routing_gate(
            number, FORMATS[logits.dtype], logits.data_ptr(), logits.stride(0), tokens, experts, g.k, g.groups,
            g.top_groups, SCORINGS[g.scoring], flags(g), address(g.bias), weights.data_ptr(),
            FORMATS[g.weights_dtype], ids.data_ptr(), address(g.valid), g.scale, g.eps, _stream(number),
        )  # fmt: skip
    return weights, ids


def route(logits: Tensor, g: Gating) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weights [T, k], ids [T, k], ends [bins], source [T * k], inverse [T, k]."""
    check.route(logits, g)
    return _route(logits, g, None, None, None)


def route_permute(
    x: Tensor, logits: Tensor, fp8: bool, g: Gating
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor, Tensor | None]:
    """What route gives, rows [T * k, H], and scales [T * k, H / 128] of fp8 rows."""
    check.route_permute(x, logits, g, fp8=fp8)
    check.aligned("x", x.data_ptr())
    rows, scales = _rows(x, logits.shape[0] * g.k, fp8)
    return _route(logits, g, x, rows, scales), rows, scales


def _route(
    logits: Tensor, g: Gating, x: Tensor | None, rows: Tensor | None, scales: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (tokens, experts), device = logits.shape, logits.device
    bins = experts if g.bins is None else g.bins
    weights = torch.empty((tokens, g.k), dtype=g.weights_dtype, device=device)
    ids = torch.empty((tokens, g.k), dtype=g.ids_dtype, device=device)
    ends, source, inverse, workspace = _index(tokens, g.k, bins, device)
    if tokens:
        number = device.index
        _core.routing_route(
            number, FORMATS[logits.dtype], logits.data_ptr(), logits.stride(0), tokens, experts, g.k, g.groups,
            g.top_groups, SCORINGS[g.scoring], flags(g), address(g.bias), weights.data_ptr(),
            FORMATS[g.weights_dtype], ids.data_ptr(), address(g.valid), g.scale, g.eps, address(g.bin_of), bins,
            ends.data_ptr(), source.data_ptr(), inverse.data_ptr(), address(workspace), address(x),
            0 if x is None else FORMATS[x.dtype], 0 if x is None else x.shape[1] * x.element_size(), address(rows),
            address(scales), _stream(number),
        )  # fmt: skip
    return weights, ids, ends, source, inverse


def index(
    ids: Tensor, experts: int, bin_of: Tensor | None = None, bins: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ends [bins], source [T * k], inverse [T, k]."""
    check.index(ids, experts, bin_of, bins)
    (tokens, k), device = ids.shape, ids.device
    bins = experts if bins is None else bins
    ends, source, inverse, workspace = _index(tokens, k, bins, device)
    if tokens:
        number = device.index
        _core.routing_route(
            number, 0, 0, 0, tokens, experts, k, 1, 1, 0, _IDS_I64 if ids.dtype is _I64 else 0, 0, 0, 0,
            ids.data_ptr(), 0, 1.0, 0.0, address(bin_of), bins, ends.data_ptr(), source.data_ptr(),
            inverse.data_ptr(), address(workspace), 0, 0, 0, 0, 0, _stream(number),
        )  # fmt: skip
    return ends, source, inverse


def align(ends: Tensor, inverse: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """order [capacity], owner [capacity / block], places [1]."""
    check.align(ends, inverse, block)
    pairs, bins, device = inverse.numel(), ends.shape[0], ends.device
    room = check.capacity(pairs, bins, block)
    order = torch.empty(room, dtype=_I32, device=device)
    owner = torch.empty(room // block, dtype=_I32, device=device)
    if not pairs:
        return order, owner, torch.zeros(1, dtype=_I32, device=device)
    places = torch.empty(1, dtype=_I32, device=device)
    number = ends.get_device()
    _core.routing_align(
        number, ends.data_ptr(), inverse.data_ptr(), order.data_ptr(), owner.data_ptr(), places.data_ptr(), pairs, bins,
        block, room, _stream(number),
    )  # fmt: skip
    return order, owner, places


def permute(x: Tensor, inverse: Tensor, rows: int) -> Tensor:
    """[rows, H]."""
    return _permute(x, inverse, rows, False)[0]


def permute_fp8(x: Tensor, inverse: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """[rows, H] float8_e4m3fn, [rows, H / 128] float32."""
    out, scales = _permute(x, inverse, rows, True)
    assert scales is not None  # noqa: S101  # fp8 rows have scales
    return out, scales


def _permute(x: Tensor, inverse: Tensor, rows: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    check.permute(x, inverse, rows, fp8=fp8)
    if x.data_ptr() % check.ALIGNMENT:
        x = x.clone()
    out, scales = _rows(x, rows, fp8)
    tokens, k = inverse.shape
    if tokens and rows:
        device = x.get_device()
        _core.routing_permute(
            device, x.data_ptr(), FORMATS[x.dtype], inverse.data_ptr(), out.data_ptr(), address(scales), tokens, k,
            rows, x.shape[1] * x.element_size(), _stream(device),
        )  # fmt: skip
    return out, scales


def combine(
    rows: Tensor,
    inverse: Tensor | None,
    weights: Tensor | None = None,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """[T, H]."""
    check.combine(rows, inverse, weights, shared, residual)
    for name, one in (("rows", rows), ("shared", shared), ("residual", residual)):
        if one is not None:
            check.aligned(name, one.data_ptr())
    pairs = weights if inverse is None else inverse
    assert pairs is not None  # noqa: S101  # checked above
    tokens, k = pairs.shape
    row_count, width = rows.shape
    out = torch.empty((tokens, width), dtype=rows.dtype, device=rows.device)
    if tokens:
        device = rows.get_device()
        _core.routing_combine(
            device, FORMATS[rows.dtype], rows.data_ptr(), address(inverse), address(weights),
            0 if weights is None else FORMATS[weights.dtype], address(shared), address(residual), out.data_ptr(),
            tokens, k, row_count, width * rows.element_size(), scale, _stream(device),
        )  # fmt: skip
    return out


def expert_matvec(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str = "silu") -> Tensor:
    """[T, H]."""
    check.expert_matvec(x, ids, weights, gate_up, down, act)
    tokens, width = x.shape
    k = ids.shape[1]
    half = gate_up.shape[1] // 2
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    experts, wide = gate_up.shape[0], ids.dtype is _I64
    between = torch.empty((tokens * k, half), dtype=x.dtype, device=x.device)
    device, number, size = x.get_device(), FORMATS[x.dtype], x.element_size()
    stream = _stream(device)
    _core.experts_up(
        device, number, gate_up.data_ptr(), gate_up.stride(0) * size, experts, x.data_ptr(), ids.data_ptr(), wide,
        between.data_ptr(), tokens, k, width, half, ACTIVATIONS[act], stream,
    )  # fmt: skip
    _core.experts_down(
        device, number, down.data_ptr(), down.stride(0) * size, experts, between.data_ptr(), ids.data_ptr(), wide,
        weights.data_ptr(), weights.dtype is _F32, out.data_ptr(), tokens, k, half, width, stream,
    )  # fmt: skip
    return out


def flags(g: Gating) -> int:
    return (
        (_RENORMALIZE if g.renormalize else 0)
        | (_GROUP_TOP2 if g.groups > 1 and g.group_score == "top2" else 0)
        | (_IDS_I64 if g.ids_dtype is _I64 else 0)
    )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())


def _index(tokens: int, k: int, bins: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Memory for ends, source and inverse, and between the launches of one call, which the stream's order keeps."""
    ends = torch.empty(bins, dtype=_I32, device=device) if tokens else torch.zeros(bins, dtype=_I32, device=device)
    source = torch.empty(tokens * k, dtype=_I32, device=device)
    inverse = torch.empty((tokens, k), dtype=_I32, device=device)
    size = _core.routing_workspace(tokens, bins) if tokens else 0
    return ends, source, inverse, torch.empty(size, dtype=torch.uint8, device=device) if size else None


def _rows(x: Tensor, count: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Memory for permuted rows and their scales."""
    width, device = x.shape[1], x.device
    if not fp8:
        return torch.empty((count, width), dtype=x.dtype, device=device), None
    return (
        torch.empty((count, width), dtype=torch.float8_e4m3fn, device=device),
        torch.empty((count, width // FP8_BLOCK), dtype=_F32, device=device),
    )
