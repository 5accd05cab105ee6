"""Models whose experts fit the device: moecore's kernels in place of transformers' own, and of its routers.

What transformers calls for ``experts_implementation="moecore"`` where moecore does not offload the experts. A few
tokens go straight through the experts' matrices; more are sorted by expert and go through grouped products. Whatever
the kernels do not serve, and every call that wants gradients, goes to what the model ran its experts by before: nobody
gets an error for it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moecore import ops
from moecore._core import cuda_available
from moecore.errors import ConfigError
from moecore.ops import check, launch

from . import families, routers
from .compute import GROUPS
from .kernels import DTYPES, activation

if TYPE_CHECKING:
    from collections.abc import Callable

MATVEC_TOKENS = 32
"""Up to so many tokens each reads its experts' matrices for itself; above, the tokens of an expert share one read.

Measured on an H100 (benches/results/kernels.md): 0.91 of the time at 32 tokens, 1.46 at 64."""

ACTIVATION_NAMES = ("silu", "gelu", "gelu_tanh", "relu")
"""By the numbers of `kernels.ACTIVATIONS`."""

REPEATING = {"DeepseekV4Experts"}
"""Classes whose router may name an expert twice for a token: a table says which, and sorting wants them distinct."""

OWN = "grouped_mm"
"""The implementation of transformers that is called where moecore's is not, and nobody knows of another: the default
there."""

BEFORE = "_moecore_before"
"""Under this name an experts module of a fused model holds the implementation that was selected before."""

REPORT = "moecore_fused"
"""Under this name a fused model holds its report."""


@functools.cache
def _ready() -> bool:
    return cuda_available() is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def ready() -> bool:
    """Whether the kernels can run on this machine: asked once, and not a part of compiled graphs."""
    return _ready()


def run(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """hidden [T, H], index int64 [T, k], weights [T, k] -> [T, H]: experts whose parameters are in their module."""
    if usable(module, hidden, weights):
        out = kernels(module, hidden, index, weights)
        if out is not None:
            return out
    return own(module)(module, hidden, index, weights)


def usable(module: Any, hidden: Tensor, weights: Tensor) -> bool:
    """Whether this call may go to the kernels: on CUDA, for inference, on one device."""
    if not hidden.is_cuda or module.training or spread(module) or not ready():
        return False
    return not (torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad or trains(module)))


def spread(module: nn.Module) -> bool:
    """Whether ids may be those of experts on other devices."""
    parallel = getattr(module, "_is_expert_parallel", None)
    if parallel is None:  # versions of transformers that do not say so
        return bool(torch.distributed.is_available() and torch.distributed.is_initialized())
    return bool(parallel)


def trains(module: nn.Module) -> bool:
    """Whether a parameter of the experts wants a gradient."""
    return any(param.requires_grad for param in module.parameters())


def own(module: nn.Module) -> Callable[..., Tensor]:
    """What transformers itself runs experts by: as before `fuse`, where that has selected moecore."""
    known = ALL_FP8_EXPERTS_FUNCTIONS if hasattr(module, "activation_scheme") else ALL_EXPERTS_FUNCTIONS
    name = getattr(module, BEFORE, OWN)
    # The interface gives way to the family's own code, around which its decorator has put the choice.
    eager = getattr(type(module).forward, "__wrapped__", None) if name in ("eager", None) else None
    function: Callable[..., Tensor] = eager or known[name if name in known else OWN]
    return function


def kernels(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
    """The experts by moecore's ops, or None where their layout or their dtype is none that these serve."""
    up = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    down = getattr(module, "down_proj", None)
    if up is None or down is None:
        raise ConfigError("the parameters of these experts are not in memory; load the model again")
    if type(up.data) not in (Tensor, FakeTensor) or up.dtype not in DTYPES:
        return None
    if not up.dtype == down.dtype == hidden.dtype:
        return None
    # What a parametrisation gives (an adapter's sum, say) is no parameter of the module.
    if torch.is_grad_enabled() and (up.requires_grad or down.requires_grad):
        return None
    if index.dtype not in (torch.int32, torch.int64):
        return None
    if up.shape[0] != module.num_experts or not (up.is_contiguous() and down.is_contiguous()):
        return None
    if few(hidden.shape[0]) and weights.dtype in (torch.float32, up.dtype):
        act = activation(module)
        if act is not None:
            x, chosen = hidden.contiguous(), weights.contiguous()
            return ops.expert_matvec(x, index.contiguous(), chosen, up, down, act=ACTIVATION_NAMES[act])
    if can_group(module, up, down) and index.shape[1] <= check.MAX_K and weights.dtype in DTYPES:
        return grouped(module, hidden, index, weights, up, down)
    return None


def few(tokens: int) -> bool:
    """Whether each token reads its experts' matrices for itself. An exported program of any number of tokens does not:
    it has one way, which must not bound the number."""
    if torch.compiler.is_exporting():
        return bool(statically_known_true(tokens <= MATVEC_TOKENS))
    return tokens <= MATVEC_TOKENS


def can_group(module: nn.Module, up: Tensor, down: Tensor) -> bool:
    """Whether grouped products take these matrices: bfloat16, rows of whole 16 bytes."""
    return (
        up.dtype == torch.bfloat16
        and up.shape[0] < GROUPS
        and up.shape[1] % 8 == up.shape[2] % 8 == down.shape[1] % 8 == down.shape[2] % 8 == 0
        and hasattr(functional, "grouped_mm")
        and REPEATING.isdisjoint(cls.__name__ for cls in type(module).__mro__)  # FSDP and parametrisations subclass
    )


def grouped(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Tokens sorted by expert, in the order of transformers' `grouped_mm_experts_forward`.

    Ids of nobody are sorted behind `ends[-1]`: no product reads those rows, and the sum leaves them out.
    """
    ends, _, inverse = ops.index(index.contiguous(), module.num_experts)
    expert = None
    if module.has_bias:
        rows = torch.arange(inverse.numel(), device=hidden.device)
        # Rows of nobody get some expert's bias, so that the look-up stays inside.
        expert = torch.bucketize(rows, ends, right=True).clamp(max=module.num_experts - 1)

    def linear(x: Tensor, weight: Tensor, bias: str) -> Tensor:
        out = functional.grouped_mm(x, weight if module.is_transposed else weight.transpose(-2, -1), offs=ends)
        return out if expert is None else out.add_(getattr(module, bias)[expert])

    x = ops.permute(hidden.contiguous(), inverse)
    x = linear(x, up, "gate_up_proj_bias" if module.has_gate else "up_proj_bias")
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = linear(x, down, "down_proj_bias")
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    return ops.combine(x, inverse, weights.contiguous())


@dataclass(frozen=True)
class Fused:
    """What :func:`moecore.fuse` has made of a model.

    Attributes:
        experts: paths of the experts modules that moecore's kernels run, where they can.
        routers: paths of the routers that moecore's gate runs.
        left: path -> why it is as it was.
    """

    experts: tuple[str, ...]
    routers: tuple[str, ...]
    left: dict[str, str]
    _before: list[tuple[Any, str | None]] = field(default_factory=list, repr=False)
    _exchanged: list[nn.Module] = field(default_factory=list, repr=False)
    _selected: list[nn.Module] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [f"{len(self.experts)} experts modules and {len(self.routers)} routers run by moecore"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [
            f"left alone: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
            for reason, names in reasons.items()
        ]
        return "\n".join(lines)


def register() -> None:
    """Makes ``experts_implementation="moecore"`` known to transformers, for models that are not loaded yet.

    With it ``from_pretrained(..., experts_implementation="moecore")`` loads a model whose experts are run by moecore's
    kernels; :func:`fuse` does that to a loaded one, and exchanges its routers too. May be called twice.
    """
    from .ops import run as dispatch  # which imports this module

    families.register(dispatch)


def fuse(model: nn.Module) -> Any:
    """Has a loaded model that fits its device run by moecore's routing kernels: its experts, and its routers.

    Routers are exchanged where moecore knows their code word for word and a trial gives the same experts and weights.
    Nothing else changes: parameters, hooks, saving and generation stay. Calls that train run transformers' own code,
    by the experts implementation that was selected before, as do layouts, dtypes and devices that the kernels do not
    serve. Call it before `torch.compile`, on a model in its final dtype. A second call does no harm.

    On a GPU this loads the kernels, so that any call after it can be captured in a CUDA graph.

    Of a model that moecore offloads (:func:`moecore.wrap`, :func:`moecore.load`) only the routers are exchanged.

    Returns:
        The same model, with a :class:`Fused` report as ``model.moecore_fused``.

    Raises:
        ConfigError: this is no loaded model, or it has no experts that moecore knows and no router either.
        DeviceError: the kernels cannot be loaded on the model's GPU, or a CUDA graph is being captured there.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"fuse takes a model that is loaded, not {type(model).__name__}")
    earlier: Fused = vars(model).get(REPORT) or Fused((), (), {})
    load_kernels(model)
    exchanged, left = routers.replace(model)
    experts, others = served(model)
    left |= others
    ours = routers.replaced(model)
    if not (experts or ours):
        why = next((f"{name}: {reason}" for name, reason in left.items()), "it has no experts that moecore knows")
        kind = f"{families.model_type(model)} model ({type(model).__name__})"
        raise ConfigError(f"moecore found nothing to fuse in this {kind}: {why}")
    before, selected = select(model, experts)
    vars(model)[REPORT] = Fused(
        tuple(one.name for one in experts),
        tuple(ours),
        left,
        earlier._before + before,
        # Modules, not paths: an adapter that wraps them later gives them others.
        earlier._exchanged + [model.get_submodule(name) for name in exchanged],
        earlier._selected + selected,
    )
    return model


def load_kernels(model: nn.Module) -> None:
    """Loads the kernels on the GPUs of a model, where they can run."""
    devices = {int(param.device.index) for param in model.parameters() if param.device.type == "cuda"}
    for device in sorted(devices) if devices and ready() else ():
        launch.load(device)


def served(model: nn.Module) -> tuple[list[families.Taken], dict[str, str]]:
    """The experts modules of a model that may run by the kernels, and for each of the others its path and the reason.

    Those that moecore offloads are neither.
    """
    experts, left = [], {}
    for one in families.find(model):
        dtype = one.params[-1].dtype
        if "_moecore" in vars(one.module):
            continue
        if not one.adapter.served_by_interface:
            left[one.name] = "transformers does not let others run its experts"
        elif one.adapter.rounds_weights or dtype not in DTYPES:
            left[one.name] = f"its weights are {str(dtype).removeprefix('torch.')}"
        else:
            experts.append(one)
    return experts, left


def select(model: nn.Module, experts: list[families.Taken]) -> tuple[list[tuple[Any, str | None]], list[nn.Module]]:
    """Selects "moecore" on every configuration of the model.

    Returns:
        Those configurations that this changes, with what they had, and the experts modules that were told.
    """
    if not experts:
        return [], []
    register()
    told: list[nn.Module] = []
    for one in families.find(model):  # those that are left alone, too: they may share a configuration
        value = getattr(getattr(one.module, "config", None), "_experts_implementation_internal", None)
        if one.adapter.served_by_interface and value != families.NAME:
            vars(one.module)[BEFORE] = value
            told.append(one.module)
    configs = [*families.configurations(model), *(one.module.config for one in experts)]
    before = []
    for config in configs:
        value = getattr(config, "_experts_implementation_internal", None)
        if value != families.NAME:
            before.append((config, value))
            config._experts_implementation_internal = families.NAME
    return before, told


def unfuse(model: nn.Module) -> nn.Module:
    """Gives a model back as it was before :func:`fuse`, to the bit. A model that is not fused stays as it is.

    What wraps a fused model (`torch.compile`, adapters) may be given in its place.
    """
    fused = [model] if REPORT in vars(model) else [part for part in model.modules() if REPORT in vars(part)]
    for part in fused:
        report: Fused = vars(part).pop(REPORT)
        for router in report._exchanged:
            routers.give_back(router)
        for config, value in reversed(report._before):
            config._experts_implementation_internal = value
        for module in report._selected:
            vars(module).pop(BEFORE, None)
    return model
