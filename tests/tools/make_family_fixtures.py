"""Writes one small fixture for each model family: tensors as on disk, config.json as saved, and the truth about both.

Run by hand, never in CI. It needs Python 3.11, torch, `transformers==5.23.0`, scipy and pillow; a CPU is enough:

    python tests/tools/make_family_fixtures.py [--out tests/data/families] [--audit] [model_type ...]

For each model type a tiny configuration is made, the transformers class is built on the CPU with random weights, and
`save_pretrained` writes it: that is where the tensor names of a real checkpoint come from (transformers undoes its own
weight conversion on saving). The truth does not look at those names. It comes from the module tree: which class owns
a parameter, and under which module it hangs. The KV cache is measured: a prefill and some decode steps run, then the
tensors that the cache holds are counted.

`--audit` prints every parameter group with its role and the classes that own it, for people to check by eye.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import struct
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_configs import FAMILIES, model_class, small  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOKENS = 40
PREFILL = 36
BATCH = 2
ROLES = (
    *("embedding", "attention", "dense_mlp", "norm", "router", "shared_expert", "routed_expert"),
    *("mtp", "vision", "lm_head", "other"),
)


def build(model_type: str) -> Any:
    cls = CONFIG_MAPPING[model_type]
    config = cls(**small(cls, FAMILIES[model_type]))
    torch.manual_seed(0)
    return model_class(model_type)._from_config(config, dtype=torch.bfloat16).eval()


# --------------------------------------------------------------------------------------------------- what is on disk


def headers(folder: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        found += [{"name": name, "dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in header.items()]
    return found


def save(model: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        return config, headers(Path(folder))


def may_lack(config: dict[str, Any]) -> list[str]:
    """Keys that can go from a config.json, all at once, and leave the same configuration.

    Only those that the class works out from other keys: files that older releases wrote lack them. Keys with a
    constant as their default stay.
    """
    cls = CONFIG_MAPPING[config["model_type"]]

    def read(config: dict[str, Any]) -> dict[str, Any]:
        return cls.from_dict(cls._decode_special_floats(copy.deepcopy(config))).to_dict()

    whole = read(config)
    left = copy.deepcopy(config)
    gone = []
    subs = cls.sub_configs or {}
    places = [("", left, cls), *((f"{key}.", left[key], sub) for key, sub in subs.items() if key == "text_config")]
    for prefix, part, owner in places:
        for key in sorted(set(part) - {"model_type", "architectures", "transformers_version"} - set(subs)):
            if getattr(owner, key, None) == part[key] or part[key] is None or key == "rope_parameters":
                continue
            value = part.pop(key)
            try:
                same = read(left) == whole
            except Exception:  # a key that the class insists on
                same = False
            if same and (config["model_type"] != "bailing_hybrid" or key.endswith("_types")):  # it misreads its own
                gone.append(prefix + key)
            else:
                part[key] = value
    return gone


def fold(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Folds numbered names of one dtype and shape: `layers.{0..3}.q`, `layers.{0,2}.experts.{0..7}.up`."""
    groups: dict[tuple[str, str, str], set[tuple[int, ...]]] = {}
    for tensor in tensors:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", tensor["name"])
        numbers = tuple(int(part) for part in re.findall(r"(?<=\.)\d+(?=\.|$)", tensor["name"]))
        groups.setdefault((pattern, tensor["dtype"], json.dumps(tensor["shape"])), set()).add(numbers)
    folded = []
    for (pattern, dtype, shape), rows in groups.items():
        for axes in boxes(rows):
            folded.append({"name": pattern.format(*map(run, axes)), "dtype": dtype, "shape": json.loads(shape)})
    return folded


def boxes(rows: set[tuple[int, ...]]) -> Iterator[list[list[int]]]:
    """Splits `rows` into products of lists: by the first number, those with the same rest together."""
    if not rows or not next(iter(rows)):
        yield []
        return
    rests: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in rows:
        rests.setdefault(first, set()).add(tuple(rest))
    same: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first in sorted(rests):
        same.setdefault(frozenset(rests[first]), []).append(first)
    for rest_rows, firsts in same.items():
        for axes in boxes(set(rest_rows)):
            yield [firsts, *axes]


def run(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


# ------------------------------------------------------------------------------------------ the truth from the modules

SHARED = {"shared_expert", "shared_experts", "shared_mlp", "share_expert", "shared_expert_gate"}
ROUTER_CLASS = re.compile(r"Router|TopKGating|TopKGate|MoEV1Gate|MoeStatics")
ROUTER_LEAF = {"e_score_correction_bias", "expert_bias", "router_bias", "router_gate"}
EXPERTS_CLASS = re.compile(r"Experts$|ParallelExperts$|DbrxExpertGLU$")
NORM_CLASS = re.compile(r"Norm(Gated)?\d*$|^RMSNorm|LayerNorm|GatedNorm|GroupNorm")
EMBEDDING_CLASS = re.compile(r"Embedding")
HYPER_CLASS = re.compile(r"Hyper|HCHead|ResidualScal|ResidualGate|AttnRes|AttentionResidual")
MIXER_CLASS = re.compile(
    r"Attention|MLA|DeltaNet|DeltaAttention|Mamba|Mixer|ShortConv|Convolution|Indexer|Lightning|Kda|KDA|Compressor|SSM"
)
MLP_CLASS = re.compile(r"MLP|FeedForward|DenseAct|FFN|MoE|Moe|SparseMLP|CDMoE")


def text_of(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def owners(model: Any, name: str) -> list[tuple[str, Any]]:
    """The modules from the root down to the one that owns parameter `name`, each with its attribute's name."""
    chain = [("", model)]
    for part in name.split(".")[:-1]:
        chain.append((part, getattr(chain[-1][1], part)))
    return chain


def in_tower(model: Any, chain: list[tuple[str, Any]]) -> bool:
    """Not under the text decoder, in a model that has more than a text configuration."""
    config = model.config
    parts = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
    if not parts:
        return False
    text = text_of(model)
    head = model.get_output_embeddings()
    for _, module in chain:
        if module is head:
            return False
        if module is not model and getattr(module, "config", None) is text:
            return False
    return True


def role(model: Any, name: str) -> str:
    chain = owners(model, name)
    leaf = name.rsplit(".", 1)[-1]
    owner = chain[-1][1]
    path = [part for part, _ in chain]
    classes = [type(module).__name__ for _, module in chain]
    if model.config.model_type == "vitpose_backbone" or in_tower(model, chain):
        return "vision"
    if owner is model.get_output_embeddings():
        return "lm_head"
    in_attention = "JetMoeMoA" in classes
    if NORM_CLASS.search(classes[-1]) or any(NORM_CLASS.search(c) and "Attention" not in c for c in classes[-3:]):
        return "norm"
    if in_attention:
        return "attention"
    if SHARED & set(path):
        return "shared_expert"
    if any(ROUTER_CLASS.search(c) for c in classes) or leaf in ROUTER_LEAF or ROUTER_LEAF & set(path):
        return "router"
    if "DogeCDMoE" in classes:
        if path[-1] in ("down_embed", "up_embed"):
            return "routed_expert"
        return "shared_expert"
    if any(EXPERTS_CLASS.search(c) for c in classes):
        return "routed_expert"
    if any(HYPER_CLASS.search(c) for c in classes):
        return "other"
    embeds = any(EMBEDDING_CLASS.search(c) and "Rotary" not in c for c in classes[-2:])
    if embeds and not any("Attention" in c for c in classes):  # T5's position bias is an Embedding inside attention
        return "embedding"
    for name in reversed(classes[1:]):  # the nearest one decides; a layer as a whole says nothing
        if re.search(r"(Decoder|Encoder|Hybrid)Layer$|Model$|Block$", name) and "Sparse" not in name:
            continue
        if MIXER_CLASS.search(name):
            return "attention"
        if MLP_CLASS.search(name):
            return "dense_mlp"
    return "other"


def weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and saved buffers, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def audit(model: Any) -> None:
    rows: dict[tuple[str, str, str], int] = {}
    for name, tensor in weights(model):
        chain = owners(model, name)
        shown = re.sub(r"\.\d+(?=\.|$)", ".N", name)
        key = (role(model, name), shown, " > ".join(type(module).__name__ for _, module in chain[-3:]))
        rows[key] = rows.get(key, 0) + tensor.numel()
    for (kind, name, classes), count in sorted(rows.items()):
        print(f"    {kind:14} {name:75} {count:8} {classes}")


# --------------------------------------------------------------------------------------------------- the measured cache


def inner(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from inner(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from inner(part, f"{name}.{index}")


def held(layer: Any) -> dict[str, Any]:
    """The tensors that one cache layer holds; K = V that share storage count once."""
    found: dict[str, Any] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for attribute, value in vars(layer).items():
        if attribute.startswith("_") or attribute in ("cumulative_length", "device", "dtype"):
            continue
        for name, tensor in inner(value, attribute):
            key = (tensor.data_ptr(), tuple(tensor.shape))
            if tensor.numel() and tensor.dim() and key not in seen:
                seen.add(key)
                found[name] = tensor
    return found


@torch.no_grad()
def measure(model: Any) -> list[dict[str, Any]]:
    """Runs `PREFILL` tokens at once, then the rest one by one, and lists what each layer of the cache holds."""
    text = text_of(model)
    ids = torch.randint(3, 100, (BATCH, TOKENS))
    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(ids)
        cache = model(encoder_outputs=encoded, decoder_input_ids=ids[:, :PREFILL], use_cache=True).past_key_values
        for at in range(PREFILL, TOKENS):
            model(encoder_outputs=encoded, decoder_input_ids=ids[:, at : at + 1], past_key_values=cache)
        layers = []
        for own, cross in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True):
            crossed = {f"cross_{name}": tensor for name, tensor in held(cross).items()}
            layers.append(({**held(own), **crossed}, own))
    else:

        def step(part: Any, cache: Any) -> Any:
            if model.config.model_type == "qwen3_omni_moe_talker_text":
                return model(
                    inputs_embeds=model.codec_embedding(part), past_key_values=cache, use_cache=True
                ).past_key_values
            if text.model_type == "mamba2":
                return model(input_ids=part, cache_params=cache, use_cache=True).cache_params
            return model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values

        cache = step(ids[:, :PREFILL], None)
        for at in range(PREFILL, TOKENS):
            cache = step(ids[:, at : at + 1], cache)
        layers = [(held(layer), layer) for layer in cache.layers]
        linear = getattr(cache, "linear_cache", [])  # MiniMax keeps its linear states beside the layers
        for index, state in enumerate(linear):
            if isinstance(state, torch.Tensor):
                layers[index : index + 1] = [({"recurrent_states": state}, None)]
    kinds = getattr(text, "layer_types", None) or [None] * len(layers)
    rows: list[dict[str, Any]] = []
    for index, (tensors, layer) in enumerate(layers):
        kind = kinds[index] if index < len(kinds) else None
        row = {
            "layers": [index],
            "cache": type(layer).__name__ if layer is not None else "MiniMaxCache.linear_cache",
            "layer_type": kind,
            "window": getattr(layer, "sliding_window", None),
            "tensors": {
                name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()
            },
        }
        for other in rows:
            if all(other[key] == row[key] for key in row if key != "layers"):
                other["layers"].append(index)
                break
        else:
            rows.append(row)
    return rows


def size(dtype: str, shape: list[int]) -> int:
    count = torch.Size(shape).numel()
    return count * torch.empty((), dtype=getattr(torch, dtype)).element_size()


def sum_up(rows: list[dict[str, Any]], model_type: str) -> dict[str, int]:
    """Measured bytes, and the same cache as engines keep it.

    Habits of transformers are put right for the `engine_` figures. A sliding layer keeps window - 1 tokens, as the
    next one comes with the step: engines keep min(tokens, window). A convolution's state keeps `kernel` columns,
    engines kernel - 1 (Zaya's and the n-gram embedding's have the shorter length already). Integers are bookkeeping.
    States and the keys of a sparse-attention indexer are given in elements, since engines keep those in other dtypes.
    DeepSeek-V4 has one tensor for keys and values, of which a plain sliding layer holds two copies.
    """
    keys = ("bytes", "state_bytes", "engine_kv_bytes", "engine_conv_elements", "recurrent_elements", "indexer_elements")
    sums = dict.fromkeys(keys, 0)
    for row in rows:
        times = len(row["layers"])
        for name, (dtype, shape) in row["tensors"].items():
            here, elements = size(dtype, shape), torch.Size(shape).numel()
            sums["bytes"] += times * here
            if dtype.startswith("int"):
                continue
            if model_type == "deepseek_v4" and name == "values":
                continue
            if name.startswith(("conv_states", "recurrent_states")):
                sums["state_bytes"] += times * here
                exact = model_type == "zaya" or (model_type, name) == ("qwen4_exp_text", "conv_states.1")
                if name.startswith("recurrent"):
                    sums["recurrent_elements"] += times * elements
                elif exact:
                    sums["engine_conv_elements"] += times * elements
                else:
                    sums["engine_conv_elements"] += times * (elements // shape[-1] * (shape[-1] - 1))
            elif name in ("indexer_keys", "idx_keys"):
                sums["indexer_elements"] += times * elements
            else:
                window = row["window"]
                if window and name in ("keys", "values") and shape[-2] == window - 1:
                    here = here // shape[-2] * min(window, TOKENS)
                sums["engine_kv_bytes"] += times * here
    return sums


# ------------------------------------------------------------------------------------------------------- one fixture

# What transformers saves and published checkpoints lack: persistent buffers, and weights of experts that have none.
DROPPED = {
    "minimax": re.compile(r"\.(slope_rate|query_decay|key_decay|diagonal_decay)$"),
    "longcat_flash": re.compile(r"\.experts\.(8|9|10|11)\."),
}
NOTES = {
    "deepseek_v4": "published checkpoints have no `model.` prefix and `embed.weight`; transformers writes the prefix",
    "longcat_flash": "gate and up of the identity experts, which transformers saves at random, are left out",
    "minimax": "decay buffers that transformers saves, and published checkpoints lack, are left out",
    "vitpose_backbone": "not a language model: one expert per data set, all counted as vision",
    "ernie4_5_vl_moe": "text and vision tokens have experts of their own; a text token uses the first half only",
    "unlimited_ocr": "the cache keeps the whole prompt and a window of decoded tokens: it depends on the prompt",
    "unlimited_ocr_text": "the cache keeps the whole prompt and a window of decoded tokens: it depends on the prompt",
}


def layer_key(name: str) -> str:
    found = re.match(r".*?\.?\b(?:layers?|blocks?|h)\.\d+(?=\.)", name)
    return found.group(0) if found else name


def truth(model: Any, tensors: list[dict[str, Any]], dropped: re.Pattern[str] | None) -> dict[str, Any]:
    counts = dict.fromkeys(ROLES, 0)
    sizes = dict.fromkeys(ROLES, 0)
    integers = 0
    moe_layers: dict[str, int] = {}
    experts = 0
    for name, tensor in weights(model):
        if dropped and dropped.search(name):
            continue
        kind = role(model, name)
        sizes[kind] += tensor.numel() * tensor.element_size()
        if not tensor.is_floating_point():
            integers += tensor.numel()
            continue
        elements = tensor.numel()
        if kind == "routed_expert":
            here = experts_of(model, name, tensor)
            if model.config.model_type == "longcat_flash":  # the identity experts have rows in this tensor only
                extra = tensor.shape[0] - here
                elements -= extra * tensor[0].numel()
                sizes[kind] -= extra * tensor[0].numel() * tensor.element_size()
            layer = layer_key(name)
            text_only = 0 if ".vision_moe." in name else elements  # ERNIE-VL: a text token uses the text experts
            moe_layers[layer] = moe_layers.get(layer, 0) + text_only
            experts = max(experts, here)
        counts[kind] += elements
    text = text_of(model)
    top_k = first(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts") or 0
    if text.model_type == "dbrx":
        top_k = text.ffn_config.moe_top_k
    if experts and not top_k:
        top_k = {"switch_transformers": 1, "nllb-moe": 2}.get(text.model_type, 0)
    shared = first(text, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
    if not counts["shared_expert"]:
        shared = 0
    elif not isinstance(shared, int) or not shared:
        shared = 1
    total = sum(counts.values())
    always = total - counts["routed_expert"] - counts["mtp"] - counts["vision"]
    active = always + (sum(moe_layers.values()) * top_k // experts if experts else 0)
    embedding_and_head = counts["embedding"] + counts["lm_head"]
    on_disk = sum(torch.Size(tensor["shape"]).numel() for tensor in tensors)
    if total + integers != on_disk:
        raise ValueError(f"the modules hold {total + integers} elements, the files {on_disk}")
    return {
        "by_role_parameters": counts,
        "by_role_bytes": sizes,
        "integer_elements": integers,
        "layers": decoder_layers(model),
        "moe_layers": len(moe_layers),
        "num_experts": experts,
        "experts_per_token": top_k,
        "shared_experts": shared,
        "total": total,
        "active": active,
        "active_without_embeddings": active - embedding_and_head,
        "tied": model.get_output_embeddings() is not None and counts["lm_head"] == 0,
    }


def decoder_layers(model: Any) -> int | None:
    """Length of the text decoder's list of layers, with the encoder's where there is one."""
    if model.config.is_encoder_decoder:
        halves = (model.get_encoder(), model.get_decoder())
        return sum(len(getattr(half, "block", None) or half.layers) for half in halves)
    text = text_of(model)
    decoders = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel) and m.config is text]
    lists = [getattr(m, name, None) for m in (*decoders, *model.children()) for name in ("layers", "blocks", "layer")]
    return next((len(found) for found in lists if isinstance(found, torch.nn.ModuleList)), None)


def first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def experts_of(model: Any, name: str, tensor: Any) -> int:
    """How many experts the module that owns `name` has, asked of the module and not of the configuration."""
    for _, module in reversed(owners(model, name)):
        if isinstance(module, torch.nn.ModuleDict | torch.nn.ModuleList) and EXPERTS_CLASS.search(
            type(module).__name__
        ):
            return sum(1 for child in module.children() if next(child.parameters(), None) is not None)
        if type(module).__name__ == "LongcatFlashExperts":
            return int(module.num_routed_experts)
        if type(module).__name__ in ("DogeCDMoE", "DbrxExpertGLU"):
            return int(first(module, "num_experts", "moe_num_experts"))
    return int(tensor.shape[0])


def fixture(model_type: str) -> dict[str, Any]:
    model = build(model_type)
    config, tensors = save(model)
    dropped = DROPPED.get(model_type)
    if dropped:
        tensors = [tensor for tensor in tensors if not dropped.search(tensor["name"])]
    result = truth(model, tensors, dropped)
    how = f"measured: transformers' cache after {PREFILL} tokens of prefill and {TOKENS - PREFILL} steps, bfloat16"
    try:
        if text_of(model).model_type == "inkling2_text":  # its convolutions give float32, its router wants bfloat16
            how += " by autocast"
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rows = measure(model)
        else:
            rows = measure(model)
    except Exception as error:  # a model without a cache, or one that cannot run like this
        result["kv"] = {"tokens": TOKENS, "batch": BATCH, "how": f"not measured: {type(error).__name__}: {error}"[:200]}
    else:
        result["kv"] = {
            "tokens": TOKENS,
            "batch": BATCH,
            **sum_up(rows, text_of(model).model_type),
            "per_layer": rows,
            "how": how,
        }
    return {
        "model_type": model_type,
        "class": type(model).__name__,
        "transformers": transformers.__version__,
        "notes": NOTES.get(model_type, ""),
        "config": config,
        "may_lack": may_lack(config),
        "truth": result,
        "tensors": fold(tensors),
    }


def dump(data: dict[str, Any]) -> str:
    """JSON with one line for each tensor and for each key of the truth."""
    head = {key: value for key, value in data.items() if key not in ("tensors", "truth")}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    inside = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in data["truth"].items())
    lines.append(f'  "truth": {{\n{inside}\n  }}')
    inside = ",\n".join(f"    {json.dumps(tensor)}" for tensor in data["tensors"])
    lines.append(f'  "tensors": [\n{inside}\n  ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model_type", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data" / "families")
    parser.add_argument("--audit", action="store_true", help="print roles and owning classes, write nothing")
    options = parser.parse_args()
    failed = 0
    for model_type in options.model_type or FAMILIES:
        try:
            if options.audit:
                print(model_type)
                audit(build(model_type))
                continue
            data = fixture(model_type)
        except Exception:  # one family must not stop the others
            failed += 1
            print(f"{model_type}: failed", file=sys.stderr)
            traceback.print_exc()
            continue
        text = dump(data)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{model_type}.json").write_text(text)
        print(f"{model_type}: {len(text)} bytes, {data['truth']['kv']['how'][:60]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
