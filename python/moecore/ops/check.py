"""Checks of arguments, before anything is launched: a kernel reads whatever an address and a size tell it to.

Plain comparisons of what a tensor says of itself, so that they cost about a microsecond, and hold for fake tensors with
symbolic sizes too. None looks at numbers in a tensor. Everything is said as `argument: what it is, what it must be`.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

MAX_EXPERTS = 1024
MAX_K = 32
MAX_GROUPS = 32
MAX_BLOCK = 1024
"""Places of an aligned block."""

MAX_PAIRS = 2**31 - 1
"""Rows are numbered by int32."""

ALIGNMENT = 16
"""Bytes of one load."""

FP8_BLOCK = 128
"""Columns that share one scale, as in DeepSeek-V3's activations."""

#: Number formats, scorings and activations by number, as cuda/routing.cuh and cuda/experts.cu have them.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2, "softmax_topk": 3}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

_SIZES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
_INTEGERS = (torch.int32, torch.int64)
_INT32 = (torch.int32,)
_WHOLE = (int, Integral)
"""What counts as a whole number: NumPy's too, as torch's dispatcher takes them."""
_FLOAT32 = (torch.float32,)


def refuse_gradients(*tensors: Tensor | None) -> None:
    """Raises RuntimeError where a backward pass would have to go through a kernel. For where gradients are on."""
    if any(tensor is not None and tensor.requires_grad for tensor in tensors) or has_tangent(*tensors):
        raise RuntimeError(
            "moecore.ops is for inference and computes no gradients: call it under torch.no_grad(), or train with "
            'experts_implementation="grouped_mm" and the model\'s own router'
        )


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through one of them: it does not ask whether gradients are on."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


class Gating(NamedTuple):
    """What gate, route and route_permute are told beside the logits, in the order of their schemas."""

    k: int
    scoring: str = "softmax"
    bias: Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    renormalize: bool = False
    scale: float = 1.0
    eps: float = 0.0
    valid: Tensor | None = None
    weights_dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int32
    bin_of: Tensor | None = None
    bins: int | None = None


def gate(logits: Tensor, g: Gating) -> None:
    """Arguments of gate."""
    _tensor("logits", logits, FORMATS)
    shape = logits.shape
    if len(shape) != 2:
        _shape("logits", logits, "[T, E]")
    experts, k = shape[1], g.k
    if not 1 <= experts <= MAX_EXPERTS:
        _value("logits", f"{experts} experts", f"from 1 to {MAX_EXPERTS}")
    if logits.stride(1) != 1 and experts > 1:
        _value("logits", f"strides {tuple(logits.stride())}", "rows without gaps between experts; call .contiguous()")
    if not isinstance(k, _WHOLE) or not 1 <= k <= MAX_K or k > experts:
        _value("k", k, f"from 1 to {min(experts, MAX_K)}: at most the {experts} experts, and at most {MAX_K}")
    if g.scoring not in SCORINGS:
        _value("scoring", repr(g.scoring), f"one of {', '.join(SCORINGS)}")
    if g.group_score not in ("max", "top2"):
        _value("group_score", repr(g.group_score), "max or top2")
    if g.groups != 1:
        _groups(experts, g)
    elif g.top_groups != 1:
        _value("top_groups", g.top_groups, "1 where there is one group")
    if not g.eps >= 0:
        _value("eps", g.eps, "0 or more")
    if g.bias is not None:
        _beside("bias", g.bias, _FLOAT32, logits, (experts,), "[E]")
    if g.valid is not None:
        _beside("valid", g.valid, _INT32, logits, (1,), "[1]")
    if g.weights_dtype not in FORMATS:
        raise TypeError(f"weights_dtype: {_name(g.weights_dtype)}, must be {_names(FORMATS)}")
    if g.ids_dtype not in _INTEGERS:
        raise TypeError(f"ids_dtype: {_name(g.ids_dtype)}, must be {_names(_INTEGERS)}")
    _pairs("logits", shape[0], k)


def route(logits: Tensor, g: Gating) -> None:
    """Arguments of route."""
    gate(logits, g)
    _bins(logits.shape[1], g.bin_of, g.bins, logits)


def route_permute(x: Tensor, logits: Tensor, g: Gating, *, fp8: bool) -> None:
    """Arguments of route_permute."""
    route(logits, g)
    _rows("x", x, fp8=fp8)
    _device("logits", logits, x, "x")
    if logits.shape[0] != x.shape[0]:
        _shape("logits", logits, f"[T, E] with the {x.shape[0]} tokens of x")


def _groups(experts: int, g: Gating) -> None:
    groups, top_groups = g.groups, g.top_groups
    if not isinstance(groups, _WHOLE) or not 1 <= groups <= MAX_GROUPS:
        _value("groups", groups, f"from 1 to {MAX_GROUPS}")
    if experts % groups:
        _value("groups", groups, f"a divisor of the {experts} experts")
    if not isinstance(top_groups, _WHOLE) or not 1 <= top_groups <= groups:
        _value("top_groups", top_groups, f"from 1 to the {groups} groups")
    if g.group_score == "top2" and experts == groups:
        _value("group_score", "'top2' of groups of one expert", "max, or groups of two and more")
    if top_groups * (experts // groups) < g.k:
        _value("top_groups", f"{top_groups} of {experts // groups} experts each", f"enough for k = {g.k}")


def _bins(experts: int, bin_of: Tensor | None, count: int | None, beside: Tensor) -> None:
    """What route and index sort by."""
    if bin_of is None:
        if count is not None and count != experts:
            _value("bins", count, f"left out, or the {experts} experts, where bin_of is not given")
        return
    _beside("bin_of", bin_of, _INT32, beside, (experts,), "[E]")
    if count is None or not isinstance(count, _WHOLE) or not 1 <= count <= MAX_EXPERTS:
        _value("bins", count, f"from 1 to {MAX_EXPERTS} where bin_of is given")


def index(ids: Tensor, experts: int, bin_of: Tensor | None, count: int | None) -> None:
    """Arguments of index."""
    _tensor("ids", ids, _INTEGERS)
    if len(ids.shape) != 2:
        _shape("ids", ids, "[T, k]")
    _contiguous("ids", ids)
    k = ids.shape[1]
    _choices("ids", k)
    if not isinstance(experts, _WHOLE) or not 1 <= experts <= MAX_EXPERTS:
        _value("experts", experts, f"from 1 to {MAX_EXPERTS}")
    _bins(experts, bin_of, count, ids)
    _pairs("ids", ids.shape[0], k)


def align(ends: Tensor, inverse: Tensor, block: int) -> None:
    """Arguments of align."""
    _tensor("ends", ends, _INT32)
    if len(ends.shape) != 1:
        _shape("ends", ends, "[bins]")
    _contiguous("ends", ends)
    bins = ends.shape[0]
    if not 1 <= bins <= MAX_EXPERTS:
        _value("ends", f"{bins} bins", f"from 1 to {MAX_EXPERTS}")
    _tensor("inverse", inverse, _INT32)
    if len(inverse.shape) != 2:
        _shape("inverse", inverse, "[T, k]")
    _contiguous("inverse", inverse)
    _device("inverse", inverse, ends, "ends")
    if not isinstance(block, _WHOLE) or not 1 <= block <= MAX_BLOCK:
        _value("block", block, f"from 1 to {MAX_BLOCK}")
    pairs = inverse.shape[0] * inverse.shape[1]
    if capacity(pairs, bins, block) > MAX_PAIRS:
        _value("inverse", f"{pairs} pairs", f"few enough for places below 2**31 in blocks of {block}")


def capacity(pairs: Any, bins: Any, block: int) -> Any:
    """Places, in whole blocks, that suffice for so many pairs however they are spread over the bins."""
    return (pairs + torch.sym_min(pairs, bins) * (block - 1)) // block * block


def _rows(name: str, x: Tensor, *, fp8: bool) -> None:
    """A tensor [T, H] whose rows are copied in units of 16 bytes."""
    _tensor(name, x, FORMATS)
    if len(x.shape) != 2:
        _shape(name, x, "[T, H]")
    _contiguous(name, x)
    width = x.shape[1]
    if width < 1 or width * _SIZES[x.dtype] % ALIGNMENT:
        _value(
            name,
            f"rows of {width} numbers, {width * _SIZES[x.dtype]} bytes",
            f"rows whose bytes are a multiple of {ALIGNMENT}: of {ALIGNMENT // _SIZES[x.dtype]} numbers",
        )
    if fp8 and width % FP8_BLOCK:
        _value(name, f"rows of {width} numbers", f"a multiple of {FP8_BLOCK}, the numbers of one scale")


def permute(x: Tensor, inverse: Tensor, rows: int, *, fp8: bool) -> None:
    """Arguments of permute."""
    _rows("x", x, fp8=fp8)
    _tensor("inverse", inverse, _INT32)
    if len(inverse.shape) != 2 or inverse.shape[0] != x.shape[0]:
        _shape("inverse", inverse, f"[T, k] with the {x.shape[0]} tokens of x")
    _choices("inverse", inverse.shape[1])
    _contiguous("inverse", inverse)
    _device("inverse", inverse, x, "x")
    if isinstance(rows, torch.SymInt):  # may come from the GPU's numbers: then it is looked at when the graph runs
        torch._check(rows >= 0, lambda: f"rows: {rows}, must be 0 or more")
    elif rows < 0:
        _value("rows", rows, "0 or more")
    _pairs("inverse", inverse.shape[0], inverse.shape[1])
    if not isinstance(rows, torch.SymInt) and rows > MAX_PAIRS:
        _value("rows", rows, f"at most {MAX_PAIRS}")


def combine(
    rows: Tensor, inverse: Tensor | None, weights: Tensor | None, shared: Tensor | None, residual: Tensor | None
) -> None:
    """Arguments of combine."""
    _rows("rows", rows, fp8=False)
    pairs = weights if inverse is None else inverse
    if pairs is None:
        raise ValueError("weights: missing, must be given where inverse is not: nothing else tells T and k")
    if inverse is not None:
        _tensor("inverse", inverse, _INT32)
        _device("inverse", inverse, rows, "rows")
    name = "weights" if inverse is None else "inverse"
    if len(pairs.shape) != 2:
        _shape(name, pairs, "[T, k]")
    _choices(name, pairs.shape[1])
    if inverse is not None:
        _contiguous("inverse", inverse)
    tokens, k = pairs.shape
    if weights is not None:
        _beside("weights", weights, FORMATS, rows, (tokens, k), "[T, k]", "rows")
    if inverse is None and rows.shape[0] < tokens * k:
        _shape("rows", rows, f"[R, H] with at least T * k = {tokens * k} rows, as inverse is not given")
    for other, one in (("shared", shared), ("residual", residual)):
        if one is not None:
            _beside(other, one, (rows.dtype,), rows, (tokens, rows.shape[1]), "[T, H]", "rows")
    _pairs(name, tokens, k)


def expert_matvec(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str) -> None:
    """Arguments of expert_matvec."""
    _tensor("x", x, FORMATS)
    if len(x.shape) != 2 or x.shape[1] < 1:
        _shape("x", x, "[T, H]")
    _contiguous("x", x)
    tokens, width = x.shape
    _tensor("ids", ids, _INTEGERS)
    if len(ids.shape) != 2 or ids.shape[0] != tokens or ids.shape[1] < 1:
        _shape("ids", ids, f"[T, k] with the {tokens} tokens of x")
    _contiguous("ids", ids)
    _device("ids", ids, x, "x")
    _beside("weights", weights, _FLOAT32 if x.dtype == torch.float32 else (torch.float32, x.dtype), x, ids.shape,
            "[T, k]", "x")  # fmt: skip
    for name, one in (("gate_up", gate_up), ("down", down)):
        _tensor(name, one, (x.dtype,))
        _device(name, one, x, "x")
    if len(gate_up.shape) != 3 or gate_up.shape[0] < 1 or gate_up.shape[1] < 2 or gate_up.shape[1] % 2:
        _shape("gate_up", gate_up, "[E, 2 * I, H]")
    if gate_up.shape[2] != width:
        _shape("gate_up", gate_up, f"[E, 2 * I, H] with H = {width} as x")
    want = (gate_up.shape[0], width, gate_up.shape[1] // 2)
    if len(down.shape) != 3 or down.shape[0] != want[0] or down.shape[1] != want[1] or down.shape[2] != want[2]:
        _shape("down", down, f"[E, H, I] = {list(want)}")
    for name, one in (("gate_up", gate_up), ("down", down)):
        if one.stride(2) != 1 or one.stride(1) != one.shape[2]:
            _value(name, f"strides {tuple(one.stride())}", "one contiguous matrix for each expert; call .contiguous()")
    if act not in ACTIVATIONS:
        _value("act", repr(act), f"one of {', '.join(ACTIVATIONS)}")
    _pairs("ids", tokens, ids.shape[1])


def aligned(name: str, address: int) -> None:
    """An address that is read or written 16 bytes at a time. Where there is memory: fake tensors have none."""
    if address % ALIGNMENT:
        _value(name, f"memory at an address of {address % ALIGNMENT} modulo {ALIGNMENT}",
               f"memory that begins on {ALIGNMENT} bytes; call .clone()")  # fmt: skip


def _beside(
    name: str, tensor: Tensor, dtypes: Any, other: Tensor, shape: Any, letters: str, of: str = "logits"
) -> None:
    """A contiguous tensor of this shape on the device of another."""
    _tensor(name, tensor, dtypes)
    if len(tensor.shape) != len(shape) or any(is_ != want for is_, want in zip(tensor.shape, shape, strict=True)):
        _shape(name, tensor, f"{letters} = {list(shape)}")
    _contiguous(name, tensor)
    _device(name, tensor, other, of)


def _tensor(name: str, tensor: Any, dtypes: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}, must be a Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: dtype {_name(tensor.dtype)}, must be {_names(dtypes)}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: layout {tensor.layout}, must be strided")


def _contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        _value(name, f"strides {tuple(tensor.stride())}", "contiguous; call .contiguous()")


def _device(name: str, tensor: Tensor, other: Tensor, of: str) -> None:
    if tensor.device != other.device:
        _value(name, f"on {tensor.device}", f"on {other.device}, as {of}")


def _choices(name: str, k: int) -> None:
    if not 1 <= k <= MAX_K:
        _value(name, f"{k} experts of a token", f"from 1 to {MAX_K}")


def _pairs(name: str, tokens: int, k: int) -> None:
    # A symbolic size is bounded where it becomes a number: at the launch.
    if type(tokens) is int and tokens * k > MAX_PAIRS:
        _value(name, f"{tokens} tokens with {k} experts each", f"at most {MAX_PAIRS} pairs in one call")


def _shape(name: str, tensor: Tensor, must: str) -> NoReturn:
    raise ValueError(f"{name}: shape {list(tensor.shape)}, must be {must}")


def _value(name: str, what: Any, must: str) -> NoReturn:
    raise ValueError(f"{name}: {what}, must be {must}")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else repr(dtype)


def _names(dtypes: Any) -> str:
    names = [_name(dtype) for dtype in dtypes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
