"""Loading a model without its experts.

The experts' parameters are taken out of the empty model before transformers' loader runs: a tensor that has no place
in the model is never read. The way in is transformers' own hook for quantisers, which sees the empty model and the
list of files. A quantised checkpoint keeps its own quantiser, with the hook put in front of it.
"""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from typing import TYPE_CHECKING, Any

import transformers
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from moecore.errors import ConfigError, MoecoreError

from .families import MOVABLE, REFUSED, Taken, find, model_type
from .index import ExpertIndex

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch import nn

METHOD = "moecore"
"""Name of the hook among the quantisation methods, there only while a model loads."""

LOCK = threading.Lock()

FOUND = "_moecore_index"

IGNORED = "_keys_to_ignore_on_load_unexpected"

HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Arguments that both the configuration and the weights are fetched with."""

LOADER = ("dtype", "torch_dtype", "device_map", "max_memory", "key_mapping", "model_class")
"""Arguments that never belong to a configuration."""


def load_skeleton(repo_or_path: str | os.PathLike[str], **kwargs: Any) -> tuple[Any, ExpertIndex]:
    """Loads a model without its experts, and says where those are.

    Args:
        repo_or_path: a folder, or a repo of the hub.
        kwargs: for `from_pretrained` (`dtype`, `device_map`, `revision`, `config`, ...); `model_class` picks the class
            where the one that the configuration names is not wanted.

    Raises:
        ConfigError: the checkpoint has no safetensors files, no experts, or an unsupported form.
    """
    forbid(kwargs)
    config = configuration(repo_or_path, kwargs)
    kind = str(config.model_type)
    if kind in REFUSED:
        raise ConfigError(f"moecore cannot load {kind} models: {REFUSED[kind]}")
    cls = kwargs.pop("model_class", None) or model_class(config, kwargs)
    kwargs.setdefault("dtype", "auto")
    stored = quantization(config)
    if stored is None:
        kwargs["quantization_config"] = HookConfig(key_mapping=kwargs.get("key_mapping"))
    else:
        config.quantization_config = {
            "quant_method": METHOD,
            "stored": stored,
            "key_mapping": kwargs.get("key_mapping"),
        }
    with registered():
        try:
            model = cls.from_pretrained(repo_or_path, config=config, use_safetensors=True, **kwargs)
        except OSError as error:
            if isinstance(error, MoecoreError) or "safetensors" not in str(error):
                raise
            raise ConfigError(
                f"{repo_or_path}: there are no safetensors files in it, and moecore reads experts from those only; "
                "load the model with transformers and save it again, or use another revision"
            ) from error
    index: ExpertIndex = vars(model).pop(FOUND)
    check(model, index)
    return model, index


def forbid(kwargs: dict[str, Any]) -> None:
    """Refuses arguments of `from_pretrained` that read the experts or put something in their place."""
    reasons = {
        "quantization_config": "moecore moves experts in the form in which they are stored",
        "gguf_file": "GGUF packs all experts of a layer in forms that transformers does not run through its interface",
        "use_kernels": "kernels from the hub replace the code that calls the experts",
        "state_dict": "the experts would be in memory already",
        "disable_mmap": "each file would be read into memory as a whole",
        "distributed_config": "expert parallelism is another way to spread experts",
        "tp_plan": "tensor parallelism cuts the experts into slices",
        "output_loading_info": "load_skeleton gives the index in its place",
    }
    for name, reason in reasons.items():
        if kwargs.get(name):
            raise ConfigError(f"moecore cannot load a model with {name}: {reason}; leave it out")
    if kwargs.get("use_safetensors") is False:
        raise ConfigError("moecore reads experts from safetensors files only; leave out use_safetensors=False")
    kwargs.pop("use_safetensors", None)
    device_map = kwargs.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ConfigError(
            "moecore cannot load a model with 'disk' in its device_map; it keeps the experts on disk itself"
        )


def configuration(repo_or_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """The model's configuration: the caller's, else the checkpoint's. Takes what belongs to it from `kwargs`."""
    given = kwargs.pop("config", None)
    if given is not None and not isinstance(given, str):
        return copy.deepcopy(given)
    hub = {name: kwargs[name] for name in HUB if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in HUB and name not in LOADER}
    config, unused = transformers.AutoConfig.from_pretrained(
        given or repo_or_path, return_unused_kwargs=True, **hub, **rest
    )
    for name in rest.keys() - unused.keys():
        del kwargs[name]
    return config


def model_class(config: Any, kwargs: dict[str, Any]) -> Any:
    """The class that the checkpoint was saved from; else the one that an auto class knows for its configuration."""
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and not kwargs.get("trust_remote_code"):
            return cls
    autos = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")
    for name in autos:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping or name == autos[-1] or getattr(config, "auto_map", None):
            return auto
    raise AssertionError("AutoModel is the last resort")


def quantization(config: Any) -> dict[str, Any] | None:
    """The quantisation that a checkpoint is stored with, as a dictionary; None for a plain one."""
    found = getattr(config, "quantization_config", None)
    text = config.get_text_config(decoder=True)
    found = found if found is not None else getattr(text, "quantization_config", None)
    if found is None:
        return None
    stored = dict(found if isinstance(found, dict) else found.to_dict())
    method = str(getattr(stored.get("quant_method"), "value", stored.get("quant_method")))
    stored["quant_method"] = method
    if method == "mxfp4":
        # Only the experts are packed; their rows stay so, and a row is unpacked when it is used.
        stored["dequantize"] = True
    elif method not in MOVABLE:
        raise ConfigError(
            f"moecore cannot load a checkpoint that is packed by {method}: only fp8 and mxfp4 can be moved in their "
            "stored form; use an unquantised one"
        )
    return stored


class HookConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """Asks for the hook. `stored` is the checkpoint's own quantisation, if it has one."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.stored = kwargs.get("stored")
        self.key_mapping = kwargs.get("key_mapping")


class Plain(HfQuantizer):  # type: ignore[misc]
    """Quantises nothing: it is there for the hook."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # While a model has a quantiser, generate() refuses to compile it.
        self.remove_quantization_config(model)
        return model


class Hook:
    """Goes before a quantiser's own preparation of the empty model: index first, then the experts are gone."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        result = super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]
        files = kwargs.get("checkpoint_files") or []
        wrong = next((file for file in files if not str(file).endswith(".safetensors")), None)
        if wrong is not None or not files:
            raise ConfigError(
                f"{wrong or 'the checkpoint'}: moecore reads experts from safetensors files only; convert it"
            )
        found = find(model)
        if not found:
            raise ConfigError(
                f"moecore found no experts in this {model_type(model)} model ({type(model).__name__}): it is not a "
                "Mixture-of-Experts model, or its experts modules follow no layout that moecore knows"
            )
        own = None if isinstance(self, Plain) else self
        index = ExpertIndex(files, model, found=found, hf_quantizer=own, key_mapping=self.key_mapping)  # type: ignore[attr-defined]
        strip(found)
        settle_blocks(model, found, index)
        ignore_expert_keys(model, index.targets)
        setattr(model, FOUND, index)
        return result

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        result = super().postprocess_model(model, **kwargs)  # type: ignore[misc]
        report_expert_keys(model)
        return result


class Gate(HfQuantizer):  # type: ignore[misc]
    """What the registry of quantisers holds: makes the checkpoint's own quantiser with the hook in front."""

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        stored = quantization_config.stored
        if stored is None:
            inner, own = Plain, quantization_config
        else:
            own = AutoQuantizationConfig.from_dict(dict(stored))
            inner = type(AutoHfQuantizer.from_config(own, **kwargs))
        hooked = type(f"Moecore{inner.__name__}", (Hook, inner), {"key_mapping": quantization_config.key_mapping})
        return hooked(own, **kwargs)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Adds the hook to transformers' tables of quantisers, and takes it out again."""
    with LOCK:
        AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = HookConfig
        AUTO_QUANTIZER_MAPPING[METHOD] = Gate
        try:
            yield
        finally:
            AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
            AUTO_QUANTIZER_MAPPING.pop(METHOD, None)


def strip(found: list[Taken]) -> None:
    """Takes the experts' parameters out of a model. They leave `state_dict`; their names stay, as None."""
    for taken in found:
        for param in taken.params:
            owner, _, name = param.name.rpartition(".")
            module: Any = taken.module.get_submodule(owner) if owner else taken.module
            module._parameters[name] = None
            # Without this mark transformers would initialise the module, and fail on None.
            module._is_hf_initialized = True
        experts: Any = taken.module
        experts._is_hf_initialized = True


def settle_blocks(model: Any, found: list[Taken], index: ExpertIndex) -> None:
    """Keeps transformers from initialising the blocks around the experts: some reach into the experts for it.

    Only where there is nothing to initialise, as the files hold all that a block has.
    """
    stored = set(index.other.values())
    for taken in found:
        path = taken.name.rpartition(".")[0]
        block = model.get_submodule(path)
        own = [name for name, _ in (*block.named_parameters(recurse=False), *block.named_buffers(recurse=False))]
        if all(f"{path}.{name}" in stored for name in own):
            block._is_hf_initialized = True


def ignore_expert_keys(model: Any, targets: set[str]) -> None:
    """Keeps the loader from reporting the experts' tensors as unexpected."""
    before = vars(model).get(IGNORED)
    model._moecore_ignored = before
    setattr(model, IGNORED, set(getattr(model, IGNORED) or ()) | {f"^{re.escape(target)}$" for target in targets})


def report_expert_keys(model: Any) -> None:
    """Undoes `ignore_expert_keys`."""
    before = vars(model).pop("_moecore_ignored")
    if before is None:
        vars(model).pop(IGNORED)
    else:
        setattr(model, IGNORED, before)


def check(model: nn.Module, index: ExpertIndex) -> None:
    """Every tensor of the model is real, and no expert is among them."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    empty = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if empty is not None:
        raise ConfigError(f"{empty} was not loaded: the checkpoint lacks it; fetch the checkpoint again")
    left = tensors.keys() & index.targets
    if left:
        raise ConfigError(f"{min(left)} was loaded with the model: its class puts the experts back while it loads")
