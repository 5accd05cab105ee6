"""Which modules of a model hold its experts, and how they are given to moecore and back.

Modules are found by what they are (transformers' experts interface marks them), not by the name of the family. A
family that the interface does not serve has an adapter, or is refused by name with the reason.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from moecore.errors import ConfigError

from .adapters import ADAPTERS, Param, Run, Taken

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["NAME", "Param", "Run", "Taken", "find", "refuse", "register", "take_over"]

NAME = "moecore"
"""Under this name transformers' registries hold moecore's experts function."""

REFUSED = {
    "doge": "its experts are single rows of an embedding, read by product keys: there is no expert to move",
    "nllb-moe": "its experts are modules of their own with a capacity limit that drops tokens",
    "switch_transformers": "its experts are modules of their own with a capacity limit that drops tokens",
    "vitpose_backbone": "it has no router: the caller names the expert, one for each data set",
}
"""Model types that cannot be taken over, and why."""

TOP_K_FIELDS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
"""Where a configuration says it, if neither the block nor its router does."""

MOVABLE = {"fp8", "mxfp8"}
"""Quantisation methods of a loaded model whose experts stay plain tensors."""


def register(run: Run) -> None:
    """Puts `run` into transformers' registries (plain and FP8) under `NAME`."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # Names are transformers': a hook or a block may call experts by keyword.
    def dispatch(module: nn.Module, hidden_states: Any, top_k_index: Any, top_k_weights: Any, **_: Any) -> Any:
        return run(module, hidden_states, top_k_index, top_k_weights)

    # Each registry has a table of its own, and transformers' check of the name takes either for both.
    ALL_EXPERTS_FUNCTIONS.register(NAME, dispatch)
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, dispatch)


def refuse(model: nn.Module) -> None:
    """Raises ConfigError for a model that moecore cannot take over, with the reason."""
    kind = model_type(model)
    for name in {kind, *(model_type(part) for part in pretrained(model))} & set(REFUSED):
        raise ConfigError(f"moecore cannot take over {name} models: {REFUSED[name]}")
    if getattr(model, "use_kernels", False):
        raise ConfigError(
            f"moecore cannot take over this {kind} model: it was loaded with use_kernels=True, which replaces the code "
            "that calls the experts; load it with use_kernels=False"
        )
    if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
        raise ConfigError(
            f"moecore cannot take over this {kind} model: accelerate keeps parts of it on disk; load it with "
            "moecore.load, or with a device_map without 'disk'"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = str(
            getattr(quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method)
        )
        if method not in MOVABLE:
            raise ConfigError(
                f"moecore cannot take over this {kind} model: its weights are packed by {method}, and only fp8 and, "
                "through moecore.load, mxfp4 can be moved in their stored form; load it unquantised"
            )
    for name, module in model.named_modules():
        if getattr(module, "_is_expert_parallel", False):
            raise ConfigError(
                f"moecore cannot take over this {kind} model: {name} runs under expert parallelism, which spreads "
                "experts in its own way; load it without a distributed_config"
            )


def find(model: nn.Module) -> list[Taken]:
    """The experts modules of a model, in its order. Nothing is changed; an empty list is an answer."""
    found = []
    for name, module in model.named_modules():
        adapter = next((adapter for adapter in ADAPTERS if adapter.owns(module)), None)
        if adapter is None:
            continue
        params = adapter.params(module)
        experts = adapter.num_experts(module)
        if not params or not experts:
            continue
        found.append(Taken(module, name, layer_number(name), experts, params, adapter, top_k(model, name, module)))
    return found


def take_over(model: nn.Module, run: Run | None = None, found: list[Taken] | None = None) -> list[Taken]:
    """Leads every call of the model's experts modules to `run`, and says which modules those are.

    Args:
        run: called with (module, hidden, index, weights); default: what `register` got under `NAME`.
        found: what `find` gave before the parameters were taken out of the model; default: looks now.

    Raises:
        ConfigError: the model is refused, was taken over before, or has no experts that moecore can find.
    """
    refuse(model)
    taken = find(model) if found is None else found
    if not taken:
        raise ConfigError(
            f"moecore found no experts in this {model_type(model)} model ({type(model).__name__}): it is not a "
            "Mixture-of-Experts model, or its experts modules follow no layout that moecore knows"
        )
    call = registered() if run is None else run
    try:
        if run is not None:
            register(run)
        switch_configs(model, taken)
        for one in taken:
            one.adapter.install(model, one, call)
    except BaseException:
        for one in taken:
            one.restore()
        raise
    return taken


def registered() -> Run:
    """The function that `register` put under `NAME`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS:
        raise ConfigError("moecore's experts function is not registered: call families.register first")
    function: Run = ALL_EXPERTS_FUNCTIONS[NAME]
    return function


def switch_configs(model: nn.Module, taken: list[Taken]) -> None:
    """Selects `NAME` on every configuration of the model, as each module looks it up at every call.

    All of them, not only those with experts: `generate` exchanges `grouped_mm` for `batched_mm` while it decodes, and
    where it finds one to exchange it also overwrites nested configurations that have another value.
    """
    reached = [one for one in taken if one.adapter.served_by_interface]
    if not reached:
        return
    configs = {id(config): config for config in configurations(model)}
    for one in reached:
        configs.setdefault(id(one.module.config), one.module.config)
    before = [(config, getattr(config, "_experts_implementation_internal", None)) for config in configs.values()]
    if any(value == NAME for _, value in before):
        raise ConfigError(
            f"this {model_type(model)} model is already taken over: its experts_implementation is 'moecore'; call "
            "moecore.unwrap on what was wrapped, or model.set_experts_implementation('grouped_mm') if nothing was"
        )

    def undo() -> None:
        for config, value in before:
            config._experts_implementation_internal = value

    reached[0].undo.append(undo)
    for config, _ in before:
        config._experts_implementation_internal = NAME


def configurations(model: nn.Module) -> Iterator[Any]:
    """Every configuration that a model or a part of it has, nested ones too."""
    waiting = [part.config for part in (model, *pretrained(model)) if getattr(part, "config", None) is not None]
    while waiting:
        config = waiting.pop()
        yield config
        nested = (getattr(config, key, None) for key in getattr(config, "sub_configs", None) or {})
        waiting.extend(
            part for part in nested if part is not None and hasattr(part, "_experts_implementation_internal")
        )


def pretrained(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of a model that are transformers models themselves."""
    from transformers import PreTrainedModel

    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def model_type(model: nn.Module) -> str:
    """The model type that a configuration names, else the class."""
    return str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)


def layer_number(name: str) -> int:
    """The first number of a module's path: the decoder layer."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number.group(1)) if number else 0


def top_k(model: nn.Module, name: str, module: nn.Module) -> int | None:
    """Experts for each token, as the block that owns the experts or its router says; else its configuration."""
    block = model.get_submodule(name.rpartition(".")[0])
    for part in (block, *block.children(), module):
        value = getattr(part, "top_k", None)
        if isinstance(value, int):
            return value
    for part in (module, block, *block.children(), model):
        for field in TOP_K_FIELDS:
            value = getattr(getattr(part, "config", None), field, None)
            if isinstance(value, int):
                return value
    return None
