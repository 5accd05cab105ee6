"""Routers of transformers models: which ones moecore's gate can stand in for, exchanging them, and giving them back.

A router is exchanged only if its code is known word for word (`router_forms`), its numbers are in the gate's range, and
a trial on random hidden states gives the original's experts and weights. Everything else is left as it is.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moecore import ops
from moecore.ops.check import FORMATS, MAX_EXPERTS, MAX_GROUPS, MAX_K

from .families import find
from .fingerprint import fingerprint
from .router_forms import FORMS, Form, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    #: (logits [T, E], arguments of the gate) -> weights [T, k] and ids int64 [T, k].
    Chooser = Callable[[Tensor, dict[str, Any]], tuple[Tensor, Tensor]]

TRIAL_TOKENS = 64

REPLICATE = "_replicate_for_data_parallel"
"""What `torch.nn.DataParallel` asks each module for."""

DEVICES = {"cuda"}
"""Where calls go to the gate. On others it is plain torch, and slower than what it stands in for."""


@dataclass(frozen=True)
class RouterSpec:
    """What one router computes: everything that `moecore.ops.gate` needs to know, and the logits before it.

    Attributes:
        code: the router's fingerprint, key of its form.
        experts: E, columns of the logits.
        width: H, of the hidden states.
        settings: the router's numbers when it was looked at. One that changes them later runs by its own code.
    """

    code: str
    experts: int
    width: int
    settings: Settings

    @property
    def form(self) -> Form:
        """What routers with this code have in common."""
        return FORMS[self.code]

    def logits(self, router: nn.Module, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> [T, E], by the router's own linear layer, in the dtype that it gives them."""
        return self.form.logits(router, hidden)

    def bias(self, router: nn.Module, given: Tensor | None = None) -> Tensor | None:
        """What is added to the scores for the choice: float32 [E], or None. `given`: the call's second argument."""
        return None if self.form.bias is None else self.form.bias(router, given).detach().float()

    def weights_dtype(self, logits: Tensor, hidden: Tensor) -> torch.dtype:
        """In which dtype the gate gives the weights."""
        return {"float32": torch.float32, "logits": logits.dtype, "hidden": hidden.dtype}[self.form.weights]

    def finish(self, router: nn.Module, hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The router's weights [T, k] out of the gate's."""
        return weights if self.form.finish is None else self.form.finish(router, hidden, weights, ids)

    def serves(self, router: nn.Module, hidden: Tensor, logits: Tensor) -> bool:
        """Whether the gate gives what the router gives for these logits. If not, the router has to run itself.

        Not while a gradient is wanted, where the score's dtype does not allow it, or where the router's numbers are
        not those of `settings` any more.
        """
        exact = logits.dtype == torch.float32 or not self.form.only_float32
        runs = logits.device.type in DEVICES and logits.dtype in FORMATS
        runs = runs and self.weights_dtype(logits, hidden) in FORMATS
        # A DTensor of a weight that was distributed later: there is no gate for it.
        runs = runs and (type(logits) is Tensor or not is_traceable_wrapper_subclass(logits))
        return runs and exact and not logits.requires_grad and self.form.settings(router) == self.settings

    def arguments(
        self, router: nn.Module, hidden: Tensor, logits: Tensor, given: Tensor | None = None
    ) -> dict[str, Any]:
        """What `moecore.ops.gate` takes beside the logits."""
        return {
            **self.settings._asdict(),
            "bias": self.bias(router, given),
            "weights_dtype": self.weights_dtype(logits, hidden),
            "ids_dtype": torch.int64,
        }

    def results(
        self, router: nn.Module, hidden: Tensor, logits: Tensor, weights: Tensor, ids: Tensor
    ) -> tuple[Any, ...]:
        """What the original forward returns, out of what the gate gave."""
        first = logits if self.form.first is None else self.form.first(logits)
        results = (first, self.finish(router, hidden, weights, ids), ids)
        return tuple(results[place] for place in self.form.returns)

    def route(self, router: nn.Module, hidden: Tensor, logits: Tensor, given: Tensor | None = None) -> tuple[Any, ...]:
        """What the original forward returns, of hidden [T, H] and their logits [T, E]."""
        weights, ids = ops.gate(logits, **self.arguments(router, hidden, logits, given))
        return self.results(router, hidden, logits, weights, ids)


def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of a router's own forward. Calls for which the gate is no match go to that one.

    An :class:`Exchanged` leads here.
    """
    spec: RouterSpec | None = getattr(self, "_moecore_router", None)
    if spec is None:  # given back while somebody else's wrapper held this method
        return type(self).forward(self, hidden_states, *args, **kwargs)
    form, given = spec.form, None
    plain = form.takes is None and not args and not kwargs
    if form.takes is not None and len(args) + len(kwargs) == 1:
        given = args[0] if args else kwargs.get(form.takes)
        plain = given is not None
    if (
        plain
        and not self.training
        and form.dims in (None, hidden_states.dim())
        and not torch.is_autocast_enabled(hidden_states.device.type)
    ):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = spec.logits(self, flat)
        if spec.serves(self, flat, logits):
            chooser: Chooser | None = self._moecore_chooser
            if chooser is None or self._forward_hooks:  # a hook may change the ids
                return spec.route(self, flat, logits, given)
            chosen = chooser(logits, spec.arguments(self, flat, logits, given))
            return spec.results(self, flat, logits, *chosen)
    return type(self).forward(self, hidden_states, *args, **kwargs)


class Exchanged:
    """What an exchanged router holds as its forward.

    An object of its own, since it is copied and pickled together with its router, which then has one of its own. A
    method that is bound to the router would not be: as a part of the router it comes out of a pickle as the class's.
    """

    def __init__(self, router: nn.Module) -> None:
        self.router = router

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The router's results."""
        return forward(self.router, hidden_states, *args, **kwargs)

    def replicate(self) -> nn.Module:
        """For `torch.nn.DataParallel`, whose replicas hold what their originals hold: one that holds its own."""
        router: Any = self.router
        replica: nn.Module = type(router)._replicate_for_data_parallel(router)
        Exchanged(replica).install()
        return replica

    def install(self) -> None:
        """Puts this into its router."""
        vars(self.router).update({"forward": self, REPLICATE: self.replicate})


def examine(module: nn.Module) -> tuple[RouterSpec | None, str]:
    """What a router computes; or None, and the reason: moecore does not know it, or the gate cannot do it."""
    if not is_own(module, vars(module).get("forward")):
        return None, "its forward was replaced by somebody else"
    code = fingerprint(module)
    form = FORMS.get(code or "")
    if code is None or form is None:
        return None, "its code is none that moecore knows"
    matrix = next((param for param in module.parameters() if param.dim() == 2), None)
    if matrix is None or matrix.is_meta:
        return None, "its weights are not in memory"
    if any(type(param.data) is not Tensor for param in module.parameters()):
        return None, "its weights are spread over several devices"
    experts = matrix.shape[0]
    try:
        settings = form.settings(module)
        fits = settings is not None and in_range(settings, experts)
    except (AttributeError, TypeError) as error:
        return None, f"its settings cannot be read: {error}"
    if settings is None or not fits:
        return None, f"its settings are none that the gate knows ({experts} experts, {settings})"
    if form.only_float32 and matrix.dtype != torch.float32:
        return None, f"it rounds its scores to {str(matrix.dtype).removeprefix('torch.')} before it chooses"
    return RouterSpec(code, experts, matrix.shape[1], settings), ""


def in_range(settings: Settings, experts: int) -> bool:
    """Whether the gate takes these numbers."""
    groups = settings.groups
    if not isinstance(settings.renormalize, bool):
        return False
    if not (1 <= experts <= MAX_EXPERTS and 1 <= settings.k <= min(experts, MAX_K) and 1 <= groups <= MAX_GROUPS):
        return False
    if groups == 1:
        return True
    return (
        experts % groups == 0
        and experts // groups >= 2
        and 1 <= settings.top_groups <= groups
        and settings.top_groups * (experts // groups) >= settings.k
    )


def differs(module: nn.Module, spec: RouterSpec) -> str:
    """Tries the gate against the router's own forward, on its device: what is wrong, or nothing.

    Experts may differ only where their ranks are equal up to rounding: torch leaves open which of them it takes.
    """
    matrix = next(param for param in module.parameters() if param.dim() == 2)
    random = torch.Generator().manual_seed(0)
    plain = {"generator": random, "device": "cpu", "dtype": torch.float32}  # whatever the process' defaults are
    hidden = torch.randn(TRIAL_TOKENS, spec.width, **plain).to(matrix.device, matrix.dtype)
    given = None
    if spec.form.takes is not None:
        given = torch.rand(spec.experts, **plain).to(matrix.device) / 4
    try:
        with torch.no_grad():
            # Logits of some ±2, as trained ones are.
            spread = float(spec.logits(module, hidden).float().std())
            return compare(module, spec, hidden * min(2.0 / max(spread, 1e-4), 1e3), given)
    except Exception as error:  # of code that is not ours: whatever it is, the router stays
        return f"a trial failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def compare(module: nn.Module, spec: RouterSpec, hidden: Tensor, given: Tensor | None) -> str:
    """The trial itself, on hidden [T, H]."""
    x = hidden.unsqueeze(0) if spec.form.dims == 3 else hidden
    theirs = type(module).forward(module, x, *(() if given is None else (given,)))
    logits = spec.logits(module, hidden)
    ours = spec.route(module, hidden, logits, given)
    if [(one.dtype, one.shape) for one in ours] != [(one.dtype, one.shape) for one in theirs]:
        return "in a trial its results had other shapes or dtypes"
    places = spec.form.returns
    if 0 in places and not torch.equal(ours[places.index(0)], theirs[places.index(0)]):
        return "in a trial it had other logits"
    weights, ids = places.index(1), places.index(2)
    rank = ranks(spec, logits, spec.bias(module, given))
    chosen = [rank.gather(1, result[ids]).sort(1).values for result in (ours, theirs)]
    if not torch.allclose(*chosen, rtol=1e-5, atol=1e-6):
        return "in a trial it chose other experts"
    mine, own = (torch.zeros_like(rank).scatter_(1, result[ids], result[weights].float()) for result in (ours, theirs))
    alike = ((mine != 0) == (own != 0)).all(1)
    if int(alike.sum()) < TRIAL_TOKENS // 4:
        return "in a trial too many experts had equal scores"
    dtype = theirs[weights].dtype
    relative = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    if not torch.allclose(mine[alike], own[alike], rtol=relative, atol=1e-7):
        return "in a trial it gave other weights"
    return ""


def ranks(spec: RouterSpec, logits: Tensor, bias: Tensor | None) -> Tensor:
    """What experts are chosen by, groups aside: [T, E] float32."""
    x = logits.float()
    scores = {
        "softmax": lambda: x.softmax(-1),
        "sigmoid": x.sigmoid,
        "sqrtsoftplus": lambda: torch.nn.functional.softplus(x).sqrt(),
        "softmax_topk": lambda: x,
    }[spec.settings.scoring]()
    return scores if bias is None else scores + bias


def is_own(module: nn.Module, held: Any) -> bool:
    """Whether what a module holds as its forward leads to its class's: accelerate leaves such a method when it goes."""
    return held is None or isinstance(held, Exchanged) or getattr(held, "__func__", None) is type(module).forward


def is_ours(module: nn.Module) -> bool:
    """Whether the router runs by the gate, be it under a wrapper that accelerate has put around its forward."""
    held = vars(module)
    return "_moecore_router" in held and any(
        isinstance(held.get(key), Exchanged) for key in ("forward", "_old_forward")
    )


def replaced(model: nn.Module) -> list[str]:
    """Paths of the routers that run by the gate."""
    return [name for name, module in model.named_modules() if is_ours(module)]


def replace(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Exchanges every router of a model that can be. A second call finds nothing to do.

    Returns:
        Paths of those that this call has exchanged, and for each that is left alone its path and the reason.
    """
    done, left = exchange(model)
    for name, reason in unknown(model).items():
        left.setdefault(name, reason)
    return done, left


def exchange(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """As :func:`replace`, without a look at blocks whose router is unknown: their experts may be out of the model."""
    done: list[str] = []
    left = {}
    try:
        for name, module in model.named_modules():
            if is_ours(module) or fingerprint_of(module) not in FORMS:
                continue
            spec, reason = examine(module)
            if spec is not None:
                reason = differs(module, spec)
            if spec is None or reason:
                left[name] = reason
                continue
            done.append(name)
            vars(module).update(_moecore_router=spec, _moecore_chooser=None)
            Exchanged(module).install()
    except BaseException:
        restore(model, done)
        raise
    return done, left


def fingerprint_of(module: nn.Module) -> str | None:
    """The fingerprint of a module that may be a router: those of torch are none, and need no look."""
    return None if type(module).__module__.startswith("torch.") else fingerprint(module)


def lead_to(module: nn.Module, chooser: Chooser | None) -> None:
    """Has an exchanged router ask `chooser` in place of the gate."""
    vars(module)["_moecore_chooser"] = chooser


def unknown(model: nn.Module) -> dict[str, str]:
    """Blocks with experts whose router moecore does not know: path and reason."""
    routed = {name.rpartition(".")[0] for name, module in model.named_modules() if fingerprint_of(module) in FORMS}
    found = {}
    for taken in find(model):
        block = taken.name.rpartition(".")[0]
        if block in routed:
            continue
        names = [name for name, _ in model.get_submodule(block).named_children() if name in ("gate", "router")]
        found[f"{block}.{names[0]}" if names else block] = "its code is none that moecore knows"
    return found


def restore(model: nn.Module, names: list[str] | None = None) -> None:
    """Gives routers their own forward again: those at the paths `names`, or all. Harmless when called twice."""
    for name, module in model.named_modules():
        if names is None or name in names:
            give_back(module)


def give_back(module: nn.Module) -> None:
    """Gives a router its own forward again. Harmless for other modules."""
    held = vars(module)
    if "_moecore_router" not in held:
        return
    if isinstance(held.get("forward"), Exchanged):
        del held["forward"]
    if isinstance(held.get("_old_forward"), Exchanged):  # what accelerate puts back when it takes its wrapper away
        held["_old_forward"] = types.MethodType(type(module).forward, module)
    for key in ("_moecore_router", "_moecore_chooser", REPLICATE):
        held.pop(key, None)
