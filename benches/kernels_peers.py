"""The peers of `kernels.py`: compiled ops of vLLM and SGLang, SGLang's and TransformerEngine's Triton kernels, torch,
transformers' op chain.

None of them is in this repository. `--peers` names a folder with `vllm_moe*.so[.xz]`, `sglang_kernel*.so[.xz]` (the
packages' compiled ops), `sglang/*.py` (its Triton files) and `te/{common,pytorch}/triton/permutation.py` (as they lie
in the wheel of `transformer-engine`); what is not there is left out and said.
"""

from __future__ import annotations

import importlib.util
import lzma
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

#: Rows of a block in the lists that fused-MoE products take.
BLOCK = 64


class Peers:
    """What could be loaded; `notes` says what, and why the rest could not."""

    def __init__(self, folder: Path | None, skip: list[str], begin: Callable[[str], None]) -> None:
        self.notes: list[str] = []
        self.loaded: dict[str, str] = {}
        self.skip, self.begin = skip, begin
        self.vllm: Vllm | None = None
        self.sglang: Sglang | None = None
        self.triton: Any = None
        self.small_align: Any = None
        self.te: TransformerEngine | None = None
        if folder is None or not folder.is_dir():
            self.notes.append("no folder of peers: torch and transformers alone")
            return
        self._load(folder, "vllm_moe", "_moe_C", self._vllm)
        self._load(folder, "sglang_kernel", "sgl_kernel", self._sglang)
        try:
            stub_sglang()
            self.triton = by_path("moe_fused_gate", folder / "sglang" / "moe_fused_gate.py").moe_fused_gate
            module = by_path("moe_align_small_numel", folder / "sglang" / "moe_align_small_numel.py")
            self.small_align = module.moe_align_small_numel
            self.notes.append("SGLang's Triton router (0.5.23) by path")
        except Exception as error:
            self.notes.append(f"SGLang's Triton files: {error}")
        self._transformer_engine(folder / "te")

    def _vllm(self, ops: Any) -> None:
        self.vllm = Vllm(ops)

    def _sglang(self, ops: Any) -> None:
        self.sglang = Sglang(ops)

    def _transformer_engine(self, folder: Path) -> None:
        """Tried before it is used: it compiles when it is first called."""
        name = "TransformerEngine's Triton permutation (2.20.2)"
        if name in self.skip or not folder.is_dir():
            return
        if not torch.cuda.is_available():
            self.notes.append(f"{name} needs a GPU")
            return
        try:
            self.begin(name)
            # The second imports the first, by the name that it has in its package.
            kernels = by_path("transformer_engine.common.triton.permutation", folder / "common/triton/permutation.py")
            found = TransformerEngine(by_path("te_permutation", folder / "pytorch/triton/permutation.py"), kernels)
            found.check()
            self.te = found
            self.notes.append(f"{name} by path")
        except Exception as error:
            self.notes.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")

    def _load(self, folder: Path, stem: str, namespace: str, found: Callable[[Any], None]) -> None:
        for packed in sorted(folder.glob(f"{stem}*"), reverse=True):  # the newest that loads
            name = packed.name.removesuffix(".xz")
            if name in self.skip:
                continue
            try:
                path = packed
                if packed.suffix == ".xz":
                    path = Path(tempfile.gettempdir()) / f"bench_{name}"
                    if not path.exists():
                        path.write_bytes(lzma.decompress(packed.read_bytes()))
                self.begin(name)
                torch.ops.load_library(str(path))
                found(getattr(torch.ops, namespace))
                self.loaded[stem] = name
                self.notes.append(f"{name} loaded")
                return
            except Exception as error:
                self.notes.append(f"{name}: {str(error).splitlines()[0][:200]}")


def by_path(name: str, path: Path) -> ModuleType:
    """A module from a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def stub_sglang() -> None:
    """What SGLang's Triton files import of SGLang: nothing of it does any work."""
    off = SimpleNamespace(get=lambda: False)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    made: dict[str, dict[str, Any]] = {
        "sglang": {}, "sglang.kernels": {}, "sglang.kernels.jit": {}, "sglang.kernels.ops": {}, "sglang.srt": {},
        "sglang.kernels.jit.utils": {
            "get_jit_cuda_arch": lambda: SimpleNamespace(major=9, minor=0), "is_arch_support_pdl": lambda: hopper,
        },
        "sglang.kernels.kernel_api_logging": {"debug_kernel_api": lambda function: function},
        "sglang.kernels.ops.moe": {},
        "sglang.kernels.ops.moe.moe_route_radix": {"covered": lambda *_: False},
        "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_OPT_SM120_MTP_ROUTER_TOP22=off)},
    }  # fmt: skip
    for name, content in made.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        module.__path__ = []
        vars(module).update(content)
        if "." in name:
            parent, _, last = name.rpartition(".")
            setattr(sys.modules[parent], last, module)


def bound(op: Any, known: dict[str, Any]) -> list[Any]:
    """Arguments of an op in its schema's order: versions differ in which they have."""
    values = []
    for argument in op.default._schema.arguments:
        if argument.name in known:
            values.append(known[argument.name])
        elif argument.has_default_value():
            values.append(argument.default_value)
        else:
            raise KeyError(f"{op}: {argument.name}")
    return values


def align_buffers(ids: Tensor, buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `moe_align_block_size` writes: room for the worst case, as vLLM and SGLang allocate it."""
    numel = ids.numel()
    room = numel * BLOCK if numel < buckets else numel + buckets * (BLOCK - 1)
    room = -(-room // 4) * 4
    make = {"dtype": torch.int32, "device": ids.device}
    return torch.empty(room, **make), torch.empty(-(-room // BLOCK), **make), torch.empty(1, **make)


class Vllm:
    """`_moe_C`. Buffers that vLLM keeps between calls are made once per shape; what it allocates, we allocate."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops
        self.kept: dict[tuple[Any, ...], Any] = {}

    def softmax(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Renormalised; token_expert_indices is an extra output that it always writes."""
        tokens = logits.shape[0]
        weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
        ids, extra = (torch.empty(tokens, k, dtype=torch.int32, device=logits.device) for _ in range(2))
        known = {
            "topk_weights": weights, "topk_indices": ids, "token_expert_indices": extra, "gating_output": logits,
            "renormalize": True, "bias": None, "is_padding": None,
        }  # fmt: skip
        self.ops.topk_softmax(*bound(self.ops.topk_softmax, known))
        return weights, ids

    def grouped(self, logits: Tensor, bias: Tensor, groups: int, top: int, k: int, scale: float) -> Any:
        """Sigmoid, bias, groups by their two best."""
        return self.ops.grouped_topk(logits, groups, top, k, True, scale, bias, 1)

    def align(self, ids: Tensor, experts: int) -> Any:
        """The block-aligned lists."""
        lists = align_buffers(ids, experts)
        known = {
            "topk_ids": ids, "num_experts": experts, "block_size": BLOCK, "sorted_token_ids": lists[0],
            "experts_ids": lists[1], "num_tokens_post_pad": lists[2], "maybe_expert_map": None, "scatter_idx": None,
        }  # fmt: skip
        self.ops.moe_align_block_size(*bound(self.ops.moe_align_block_size, known))
        return lists

    def _scratch(self, ids: Tensor, experts: int) -> SimpleNamespace:
        key = (ids.shape, experts)
        if key not in self.kept:
            numel, make = ids.numel(), {"dtype": torch.int32, "device": ids.device}
            size = int(self.ops.moe_permute_sort_workspace_size(numel, experts))
            empty = [torch.empty(numel, **make).view_as(ids) for _ in range(3)]
            self.kept[key] = SimpleNamespace(
                indices=torch.arange(numel, **make).view_as(ids), sorted_experts=empty[0], sorted_rows=empty[1],
                for_sort=empty[2], work=torch.empty(size, dtype=torch.int8, device=ids.device),
            )  # fmt: skip
        return self.kept[key]

    def scatter_index(self, ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """Offsets [E + 1] int64 and the row of each pair."""
        kept = self._scratch(ids, experts)
        first = torch.empty(experts + 1, dtype=torch.int64, device=ids.device)
        rows = torch.empty_like(ids)
        self.ops.moe_prepare_scatter(
            ids, kept.indices, None, experts, experts, first, rows, kept.work, kept.sorted_experts, kept.sorted_rows,
            kept.for_sort,
        )  # fmt: skip
        return first, rows

    def permute(self, x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sorts and expands: rows, offsets, the row of each pair."""
        kept = self._scratch(ids, experts)
        out = torch.empty(ids.numel(), x.shape[1], dtype=x.dtype, device=x.device)
        first = torch.empty(experts + 1, dtype=torch.int64, device=ids.device)
        inverse = torch.empty_like(ids)
        index = torch.full((ids.numel(),), ids.numel(), dtype=torch.int32, device=ids.device)
        self.ops.moe_permute_with_scratch(
            x, ids, kept.indices, None, experts, experts, ids.shape[1], out, first, inverse, index, kept.work,
            kept.sorted_experts, kept.sorted_rows, kept.for_sort,
        )  # fmt: skip
        return out, first, inverse

    def shuffle(self, x: Tensor, source: Tensor) -> Tensor:
        """Rows alone, from a finished index."""
        out = torch.empty(source.numel(), x.shape[1], dtype=x.dtype, device=x.device)
        self.ops.shuffle_rows(x, source, out)
        return out

    def unpermute(self, rows: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum."""
        out = torch.empty(inverse.shape[0], rows.shape[1], dtype=rows.dtype, device=rows.device)
        self.ops.moe_unpermute(rows, weights, inverse.view(-1), None, inverse.shape[1], out)
        return out


class Sglang:
    """`sgl_kernel`."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def softmax(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Renormalised."""
        weights = torch.empty(logits.shape[0], k, dtype=torch.float32, device=logits.device)
        ids = torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)
        self.ops.topk_softmax(weights, ids, logits, True, 0.0, None)
        return weights, ids

    def grouped(self, logits: Tensor, bias: Tensor, groups: int, top: int, k: int, scale: float) -> Any:
        """Sigmoid, bias, groups by their two best; the bias in the logits' dtype."""
        return self.ops.moe_fused_gate(logits, bias.to(logits.dtype), groups, top, k, 0, scale, True)

    def align(self, ids: Tensor, experts: int) -> Any:
        """The block-aligned lists, one bucket more for ids of -1."""
        lists = align_buffers(ids, experts + 1)
        sums = torch.empty(experts + 2, dtype=torch.int32, device=ids.device)
        self.ops.moe_align_block_size(ids, experts + 1, BLOCK, *lists, sums, True)
        return lists

    def prepare(self, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets, the token of each row, the row of each pair."""
        make = {"dtype": torch.int32, "device": ids.device}
        ends, source, inverse = (torch.empty(n, **make) for n in (experts + 1, ids.numel(), ids.numel()))
        sizes = [torch.empty(experts, 3, **make) for _ in range(2)]
        self.ops.prepare_moe_input(ids, ends, None, *sizes, source, inverse, experts, 768, 2048)
        return ends, source, inverse

    def shuffle(self, x: Tensor, source: Tensor) -> Tensor:
        """Rows alone, from a finished index."""
        out = torch.empty(source.numel(), x.shape[1], dtype=x.dtype, device=x.device)
        self.ops.shuffle_rows(x, source, out)
        return out

    def sum(self, rows: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum; weights in the rows' dtype."""
        out = torch.empty(inverse.shape[0], rows.shape[1], dtype=rows.dtype, device=rows.device)
        self.ops.apply_shuffle_mul_sum(rows, out, inverse.view(-1), weights.view(-1))
        return out

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """e4m3 with one scale for each 128 columns."""
        q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(x.shape[0], x.shape[1] // 128, dtype=torch.float32, device=x.device)
        self.ops.sgl_per_token_group_quant_8bit(x, q, scales, 128, 1e-10, -448.0, 448.0, False)
        return q, scales


class TransformerEngine:
    """The kernels of its mask-map permutation, without the operators and the autograd around them.

    A row map [T, 2 E + 1] is its index: three launches from the routing map [T, E]. Rows are by expert, then by token.
    """

    def __init__(self, wrappers: ModuleType, kernels: ModuleType) -> None:
        self.wrappers, self.kernels = wrappers, kernels

    def check(self) -> None:
        """Raises what keeps the kernels from running here."""
        ids = torch.tensor([[0, 3], [3, 1]], device="cuda")
        x, weights = torch.ones(2, 64, device="cuda", dtype=torch.bfloat16), torch.full((2, 2), 0.5, device="cuda")
        known = self.map_rows(self.routing(ids, 4))
        back = self.unpermute(self.permute(x, known, 4), known, self.spread(weights, ids, 4))
        if not torch.equal(back, x):
            raise RuntimeError("rows do not come back")

    def tune_anew(self) -> None:
        """Forgets the block sizes that were fastest: they are kept by width alone, and a row is for its own tokens."""
        for kernel in (self.kernels._permute_kernel, self.kernels._unpermute_kernel):
            kernel.cache.clear()

    @staticmethod
    def routing(ids: Tensor, experts: int) -> Tensor:
        """What a router gives it: whom each token is for, [T, E], as Megatron makes it."""
        none = torch.zeros(ids.shape[0], experts, dtype=torch.bool, device=ids.device)
        return none.scatter_(1, ids.long(), True)

    @staticmethod
    def spread(weights: Tensor, ids: Tensor, experts: int) -> Tensor:
        """Weights in such a map."""
        return torch.zeros(ids.shape[0], experts, device=ids.device).scatter_(1, ids.long(), weights)

    def map_rows(self, routing: Tensor) -> Tensor:
        """The row map."""
        found: Tensor = self.wrappers.make_row_id_map(routing, *routing.shape)
        return found

    def permute(self, x: Tensor, known: Tensor, pairs: int) -> Tensor:
        """Rows alone, from a finished row map."""
        tokens, width = x.shape
        experts = known.shape[1] // 2
        out: Tensor = self.wrappers.permute_with_mask_map(
            x, known, None, None, None, tokens, experts, pairs, width, None
        )[0]
        return out

    def unpermute(self, rows: Tensor, known: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum; weights [T, E]."""
        tokens, experts = weights.shape
        out: Tensor = self.wrappers.unpermute_with_mask_map(
            rows, known, weights, None, None, tokens, experts, rows.shape[1]
        )[0]
        return out


def torch_gate(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As transformers' routers do it."""
    weights, ids = torch.topk(torch.softmax(logits, dtype=torch.float32, dim=-1), k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


def torch_grouped(logits: Tensor, bias: Tensor, groups: int, top: int, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """As transformers' DeepSeek-V3 router does it."""
    scores = logits.float().sigmoid()
    ranked = scores + bias
    each = ranked.view(logits.shape[0], groups, -1)
    chosen = torch.topk(each.topk(2, dim=-1)[0].sum(-1), top, dim=-1, sorted=False)[1]
    mask = torch.zeros(logits.shape[0], groups, device=logits.device).scatter_(1, chosen, 1)
    inside = mask.unsqueeze(-1).expand_as(each).reshape(ranked.shape).bool()
    ids = torch.topk(ranked.masked_fill(~inside, 0.0), k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale, ids


def torch_index(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same outputs by a stable sort."""
    flat = ids.view(-1)
    ordered, order = torch.sort(flat, stable=True)
    counts = torch.histc(ordered.float() if flat.device.type == "cpu" else ordered.int(), experts, 0, experts - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return ends, order // ids.shape[1], inverse.view_as(ids)
