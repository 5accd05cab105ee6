"""The models that `offload.py` runs: a real shape, random weights, and routing that comes from a trace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from moecore.runtime import cuda, rows
from moecore.runtime.families import configurations, find
from moecore.runtime.skeleton import strip
from moecore.runtime.takeover import Options, free_params, open_backend, start
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

if TYPE_CHECKING:
    from pathlib import Path

    from moecore.runtime import Handle

#: Under this name the experts do nothing: what is left is the model's own time.
IDENTITY = "bench_identity"
POOL = 64
THREADS = 16
SPREAD = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 128
    top_k: int = 8
    width: int = 2

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return 3 * self.hidden * self.inner * self.width

    def config(self, layers: int) -> Qwen3MoeConfig:
        """What transformers builds it from."""
        return Qwen3MoeConfig(
            num_hidden_layers=layers, hidden_size=self.hidden, moe_intermediate_size=self.inner,
            intermediate_size=4 * self.hidden, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, vocab_size=self.vocabulary, num_experts=self.experts,
            num_experts_per_tok=self.top_k, norm_topk_prob=True, max_position_embeddings=40_960,
            rope_theta=1_000_000.0, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=None,
        )  # fmt: skip


REAL = Shape("Qwen3-30B-A3B", 48, 2048, 768, 32, 4, 128, 151_936)
TINY = Shape("tiny", 3, 64, 32, 4, 2, 16, 512)


def identity(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, **_: Any) -> Tensor:
    """In place of the experts. A compiler must not find out that nobody needs the router."""
    return hidden * weights.sum(-1, keepdim=True) if torch.compiler.is_compiling() else hidden


class Nothing:
    """In place of a backend while kernels are compiled: shapes are right, and no expert is touched."""

    path = "none"

    def run(self, layer: int, taken: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return hidden.clone()

    def close(self) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------- the routing


def traced(path: Path, shape: Shape, layers: int) -> np.ndarray:
    """Experts of each decode token of a trace, [tokens, layers, top-k].

    Where the trace has fewer than top-k, each token gets the layer's most popular experts that it has not.
    """
    with np.load(path) as data:
        experts = data["experts"][data["phase"] == 1][:, :layers].astype(np.int64)
    tokens, _, known = experts.shape
    whole = np.empty((tokens, layers, shape.top_k), dtype=np.int64)
    for layer in range(layers):
        popular = np.argsort(-np.bincount(experts[:, layer].ravel(), minlength=shape.experts), kind="stable")
        for token in range(tokens):
            own = experts[token, layer].tolist()
            more = [int(one) for one in popular if one not in own]
            whole[token, layer] = (own + more)[: max(known, shape.top_k)][: shape.top_k]
    return whole


class ReplayRouter(nn.Module):
    """The router with all its work, whose choice is then replaced by the trace's. No look at the device, so a CUDA
    graph can hold it: the step is a number in device memory."""

    def __init__(self, router: Any, counter: Tensor) -> None:
        super().__init__()
        self.weight = router.weight
        self.top_k = int(router.top_k)
        self.register_buffer("counter", counter, persistent=False)
        self.register_buffer("steps", torch.zeros(1, 1, self.top_k, dtype=torch.int64), persistent=False)
        self.register_buffer("prompt", torch.zeros(1, self.top_k, dtype=torch.int64), persistent=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = hidden.reshape(-1, self.weight.shape[1])
        logits = functional.linear(hidden, self.weight)
        top, _ = torch.topk(functional.softmax(logits, dtype=torch.float, dim=-1), self.top_k, dim=-1)
        weights = (top / top.sum(dim=-1, keepdim=True)).to(logits.dtype)
        if hidden.shape[0] == self.steps.shape[1]:
            return logits, weights, self.steps.index_select(0, self.counter).view(-1, self.top_k)
        return logits, weights, self.prompt[: hidden.shape[0]]


class Replay:
    """Puts routers of the trace into a model."""

    def __init__(self, model: Any, trace: np.ndarray, shape: Shape, tokens: int, device: torch.device) -> None:
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.trace = trace
        self.tokens = trace.shape[0]
        self.routers = []
        # A prompt asks for nearly every expert; uniform routing makes it every one.
        chance = torch.Generator(device=device).manual_seed(1)
        for layer in model.model.layers:
            router = ReplayRouter(layer.mlp.gate, self.counter)
            drawn = torch.rand(tokens, shape.experts, generator=chance, device=device)
            router.prompt = drawn.topk(shape.top_k, dim=-1).indices.contiguous()
            layer.mlp.gate = router
            self.routers.append(router)
        self.use(1)

    def use(self, batch: int) -> None:
        """Batch row b runs the trace from its token b * tokens / batch on."""
        starts = [row * self.tokens // batch for row in range(batch)]
        rolled = np.stack([np.roll(self.trace, -start, axis=0) for start in starts], axis=2)  # [S, L, B, k]
        for layer, router in enumerate(self.routers):
            steps = torch.from_numpy(np.ascontiguousarray(rolled[:, layer]))
            router.steps = steps.to(self.counter.device)


# ------------------------------------------------------------------------------------------------------------ the model


def build(shape: Shape, layers: int, device: torch.device, *, experts: bool) -> tuple[Any, list[Any]]:
    """A model with random weights, and its experts modules, whose parameters are never made without `experts`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(layers), dtype=torch.bfloat16)
    found = find(model)
    if not experts:
        strip(found)
    model.to_empty(device=device)
    # Not a weight, and empty like all the rest now.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.fill_(1)
            else:
                param.normal_(0, SPREAD)
    ALL_EXPERTS_FUNCTIONS.register(IDENTITY, identity)
    return model.eval().requires_grad_(False), found


def use_experts(model: Any, name: str) -> None:
    """Which function of transformers' registry runs the experts."""
    for config in configurations(model):
        config._experts_implementation_internal = name


class Subject:
    """The model under moecore, whose budget can be changed: same weights, same host rows, another device arena."""

    def __init__(self, shape: Shape, layers: int, device: torch.device, trace: np.ndarray, prompt: int) -> None:
        self.shape, self.layers, self.device = shape, layers, device
        # A GPU's experts lie in host rows alone; a CPU's go to a file, which has to be written from somewhere.
        self.model, found = build(shape, layers, device, experts=device.type == "cpu")
        self.replay = Replay(self.model, trace, shape, prompt, device)
        self.notes: list[str] = []
        self.below: Any = None
        options = Options(expert_memory="6.25%", host_memory="100%")
        if device.type == "cpu":
            self.store = rows.from_modules(found, free_params, None)
        else:
            self.store = rows.held(found)
            self.below = cuda.host_rows(self.store, device, options, self.notes)
            fill(self.below, self.store, device)
        self.options = options
        self.handle: Handle = start(self.model, self.store, found, device, options, self.below, self.notes)
        self.close_backend()

    def slots(self, share: float) -> int:
        """Experts that a budget holds."""
        return max(1, int(share / 100 * self.store.core.experts))

    def open_backend(self, share: float) -> None:
        """An empty arena of a budget's size."""
        self.close_backend()
        self.handle.backend = open_backend(
            self.store, self.slots(share), self.device, self.options, self.below, self.notes
        )

    def close_backend(self) -> None:
        """Gives the arena back."""
        old, self.handle.backend = self.handle.backend, Nothing()
        if not isinstance(old, Nothing):
            old.close()


def fill(below: Any, store: rows.Store, device: torch.device) -> None:
    """Puts random rows into host memory: a pool of them, each read from another place on when it comes again."""
    row_bytes = store.layouts[0].row_bytes
    drawn = torch.empty(POOL, row_bytes // 2, dtype=torch.bfloat16, device=device).normal_(0, SPREAD)
    pool = torch.cat([drawn, drawn], dim=1).cpu()
    step = pool.stride(0) * 2

    def put(number: int) -> None:
        layer, expert = divmod(number, store.layouts[0].experts)
        turn = number // POOL * 4096 % row_bytes // 256 * 256
        below.put(layer, expert, pool.data_ptr() + number % POOL * step + turn, row_bytes)

    with ThreadPoolExecutor(THREADS) as pool_of_threads:
        list(pool_of_threads.map(put, range(store.core.experts)))
