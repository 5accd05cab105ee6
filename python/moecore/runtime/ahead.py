"""A router's choice and the fetch of what it has chosen, in one launch: routers of models whose experts come and go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moecore import ops
from moecore.ops.check import Gating

from . import routers
from .ops import MODULES

if TYPE_CHECKING:
    from torch import nn

    from .families import Taken
    from .handle import Handle


@dataclass(frozen=True)
class Chooser:
    """In place of the gate, for the router of one experts module.

    Attributes:
        number: the experts module's, in `MODULES`.
    """

    number: int

    def __call__(self, logits: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> weights [T, k], ids int64 [T, k]."""
        g = Gating(**arguments)
        call = torch.ops.moecore.choose if torch.compiler.is_compiling() else choose_now
        chosen: tuple[Tensor, Tensor] = call(
            logits, g.bias, self.number, g.k, g.scoring, g.groups, g.top_groups, g.group_score, g.renormalize, g.scale,
            g.eps, g.weights_dtype,
        )  # fmt: skip
        return chosen


def choose_now(
    logits: Tensor,
    bias: Tensor | None,
    number: int,
    k: int,
    scoring: str,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
    eps: float,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gate of :func:`moecore.ops.gate`, and the experts' fetch where the call is one for the kernel."""
    module = MODULES.get(number, lambda: None)()
    handle: Handle | None = None if module is None else vars(module).get("_moecore")
    gating = Gating(
        k, scoring, bias, groups, top_groups, group_score, renormalize, scale, eps, None, weights_dtype, torch.int64
    )
    chosen = None if handle is None else handle.choose(module, logits, gating)
    if chosen is not None:
        return chosen
    bare = gating._asdict()
    del bare["bin_of"], bare["bins"]
    return ops.gate(logits, **bare)


#: The opaque form for `torch.compile`.
choose = torch.library.custom_op("moecore::choose", choose_now, mutates_args=())


@choose.register_fake  # type: ignore[untyped-decorator]
def _(logits: Tensor, bias: Tensor | None, number: int, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens = logits.shape[0]
    return logits.new_empty(tokens, k, dtype=rest[-1]), logits.new_empty(tokens, k, dtype=torch.int64)


def lead(model: nn.Module, taken: list[Taken]) -> list[str]:
    """Exchanges the routers of a model, and has those of taken-over experts fetch what they choose.

    Only in blocks of transformers' own: none of them changes ids between the router and the experts. Compiled code
    may change them where they lie, which nobody could see.

    Returns:
        Paths of the routers that this call has exchanged.
    """
    done, _ = routers.exchange(model)
    ours = routers.replaced(model)
    for one in taken:
        block = one.name.rpartition(".")[0]
        if not type(model.get_submodule(block)).__module__.startswith("transformers.models."):
            continue
        beside = [name for name in ours if name.rpartition(".")[0] == block]
        if len(beside) == 1:
            routers.lead_to(model.get_submodule(beside[0]), Chooser(vars(one.module)["_moecore_number"]))
    return done
