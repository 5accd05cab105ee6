"""How quantised checkpoints pack a weight matrix: a collector for each layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .collect import Collector
from .tensors import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


class Fp8Blocks(Collector):
    """DeepSeek's FP8: ``weight`` F8_E4M3 and ``weight_scale_inv`` F32, one scale for each 128 x 128 block."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        blocks = (-(-out // 128), -(-inner // 128))
        self.tensors.append(Tensor(name + ".weight", "F8_E4M3", (out, inner)))
        self.tensors.append(Tensor(name + ".weight_scale_inv", "F32", blocks))
        if bias:
            self.tensors.append(Tensor(name + ".bias", self.dtype, (out,)))


class Nvfp4(Collector):
    """ModelOpt NVFP4: two values in a byte, one F8 scale for 16 values, two scalars for each matrix."""

    def __init__(self, excluded: Callable[[str], bool]) -> None:
        super().__init__("BF16")
        self.excluded = excluded

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        if self.excluded(name):
            self.plain(name, out, inner, bias)
            return
        self.tensors += (
            Tensor(name + ".weight", "U8", (out, inner // 2)),
            Tensor(name + ".weight_scale", "F8_E4M3", (out, inner // 16)),
            Tensor(name + ".weight_scale_2", "F32", ()),
            Tensor(name + ".input_scale", "F32", ()),
        )


class Gptq(Collector):
    """GPTQ at 4 bits, groups of 128, with ``g_idx``: each int32 holds eight values along the input."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        groups = inner // 128
        self.tensors += (
            Tensor(name + ".g_idx", "I32", (inner,)),
            Tensor(name + ".qweight", "I32", (inner // 8, out)),
            Tensor(name + ".qzeros", "I32", (groups, out // 8)),
            Tensor(name + ".scales", self.dtype, (groups, out)),
        )


class Gptq3(Collector):
    """GPTQ at 3 bits: 32 values in 3 words."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.add(name + ".qweight", inner * 3 // 32, out, dtype="I32")
        self.add(name + ".qzeros", inner // 128, out * 3 // 32, dtype="I32")
        self.add(name + ".scales", inner // 128, out, dtype="F16")


class Awq(Collector):
    """AWQ: eight values of an output row in each int32, groups of 128."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.add(name + ".qweight", inner, out // 8, dtype="I32")
        self.add(name + ".qzeros", inner // 128, out // 8, dtype="I32")
        self.add(name + ".scales", inner // 128, out, dtype="F16")


class Nf4(Collector):
    """bitsandbytes nf4: two values in a byte of a column, with its tables."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.add(name + ".weight", out * inner // 2, 1, dtype="U8")
        self.add(name + ".weight.absmax", out * inner // 64, dtype="U8")
        self.add(name + ".weight.nested_absmax", -(-out * inner // 64 // 256), dtype="F32")
        self.add(name + ".weight.nested_quant_map", 256, dtype="F32")
        self.add(name + ".weight.quant_map", 16, dtype="F32")
        self.add(name + ".weight.quant_state.bitsandbytes__nf4", 88, dtype="U8")


class Int8(Collector):
    """bitsandbytes int8: a byte a value, a scale a row, and a mark."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.add(name + ".weight", out, inner, dtype="I8")
        self.add(name + ".SCB", out, dtype="F32")
        self.add(name + ".weight_format", dtype="U8")


class CompressedInt4(Collector):
    """compressed-tensors, pack-quantized: eight values in each int32; the shape is data, not header."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.add(name + ".weight_packed", out, inner // 8, dtype="I32")
        self.add(name + ".weight_scale", out, inner // 128)
        self.add(name + ".weight_shape", 2, dtype="I64")


class CompressedNvfp4(Collector):
    """compressed-tensors, nvfp4-pack-quantized: two values in a byte."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.add(name + ".weight_packed", out, inner // 2, dtype="U8")
        self.add(name + ".weight_scale", out, inner // 16, dtype="F8_E4M3")
        self.add(name + ".weight_global_scale", 1, dtype="F32")
        self.add(name + ".input_global_scale", 1, dtype="F32")


class Fp8Tensor(Collector):
    """One scale for each matrix, and one for its input."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.add(name + ".weight", out, inner, dtype="F8_E4M3")
        self.add(name + ".weight_scale", dtype="F32")
        self.add(name + ".input_scale", dtype="F32")


class Mlx(Collector):
    """MLX at 4 bits: eight values in each uint32, a scale and a bias for 64."""

    def linear(self, name: str, out: int, inner: int, bias: bool = False) -> None:
        self.add(name + ".weight", out, inner // 8, dtype="U32")
        self.add(name + ".scales", out, inner // 64)
        self.add(name + ".biases", out, inner // 64)
