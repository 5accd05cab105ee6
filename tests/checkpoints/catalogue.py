"""Every repository that can be rebuilt: its family, its shards, and what is assumed about it."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import configs
from .decoders import bailing, dbrx, gpt_oss, granitemoe, hunyuan, minimax_m2, mixtral, mixtral_gptq, phi3, phimoe
from .deepseek import deepseek_bf16, deepseek_fp8, deepseek_nvfp4, glm5
from .encoder_decoder import switch
from .hybrid import jamba, kimi_linear, mimo, minimax_text_01, nemotron_h
from .multimodal import ernie_vl, gemma3, gemma4, llama4, step3p7
from .qwen import qwen3, qwen3_5, qwen3_fp8, qwen3_next, qwen3_vl
from .stored import MODELS, folder_of, load_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from .tensors import Json, Tensor


@dataclass(frozen=True)
class Entry:
    """How a repository is rebuilt."""

    build: Callable[[Json], list[Tensor]]
    shards: int | None = None  # published count; None: cut at 5 GB
    pattern: str = "model-{:05d}-of-{:05d}.safetensors"
    first: int = 1  # number of the first shard
    assumed: str = ""
    config: Callable[[], Json] | None = None  # for configs that are written out
    library_writer: bool = True
    by_layer: bool = False  # one file a layer, the ends in the first and the last
    index_of: str | None = None  # folder of the real index, when it is not the model's own


_DTYPES = "dtypes of router, norms and biases; shard borders"
_BORDERS = "shard borders"
_WRITTEN = "config written out from the published architecture; "

CATALOGUE: dict[str, Entry] = {
    "MiniMaxAI/MiniMax-M2.5": Entry(
        minimax_m2, assumed="MTP modules are not shipped; router weight in F32; shard count and borders"
    ),
    "Qwen/Qwen3-30B-A3B": Entry(qwen3),
    "Qwen/Qwen3-30B-A3B-FP8": Entry(qwen3_fp8, shards=7, assumed=_BORDERS),
    "Qwen/Qwen3-8B": Entry(qwen3, shards=5, assumed=_BORDERS),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": Entry(qwen3_vl, shards=13, assumed=_BORDERS),
    "Qwen/Qwen3.5-35B-A3B": Entry(
        qwen3_5,
        shards=14,
        pattern="model.safetensors-{:05d}-of-{:05d}.safetensors",
        assumed="linear_attn.A_log and linear_attn.norm in F32; shard borders",
    ),
    "XiaomiMiMo/MiMo-V2-Flash": Entry(
        mimo, assumed="o_proj in BF16; three MTP layers; dtypes of router and sinks; shard count and borders"
    ),
    "ai21labs/AI21-Jamba-Mini-1.6": Entry(jamba, shards=21, assumed=_DTYPES),
    "allenai/OLMoE-1B-7B-0924": Entry(qwen3),
    "databricks/dbrx-instruct": Entry(dbrx, shards=61, assumed=_BORDERS),
    "deepseek-ai/DeepSeek-V2-Lite": Entry(
        deepseek_bf16, shards=4, pattern="model-{:05d}-of-{:06d}.safetensors", assumed=_BORDERS
    ),
    "deepseek-ai/DeepSeek-V3": Entry(
        deepseek_fp8,
        shards=163,
        pattern="model-{:05d}-of-{:06d}.safetensors",
        library_writer=False,
        assumed=_BORDERS,
    ),
    "deepseek-ai/DeepSeek-V3.2": Entry(
        deepseek_fp8,
        shards=163,
        pattern="model-{:05d}-of-{:06d}.safetensors",
        library_writer=False,
        assumed="indexer: k_norm in F32, weights_proj in BF16, wq_b and wk in FP8; shard borders",
    ),
    "deepseek-ai/deepseek-moe-16b-base": Entry(deepseek_bf16, shards=7, assumed=_BORDERS),
    "google/gemma-4-26B-A4B": Entry(gemma4, shards=2, assumed=_DTYPES),
    "google/switch-base-128": Entry(
        switch, assumed="one shared table for both embeddings and the head; written by current transformers, at 5 GB"
    ),
    "ibm-granite/granite-3.1-1b-a400m-base": Entry(granitemoe, shards=1, assumed="BF16"),
    "inclusionAI/Ling-lite-base": Entry(bailing, shards=4, assumed=_BORDERS),
    "meta-llama/Llama-3.1-8B": Entry(mixtral, shards=4, assumed=_BORDERS),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": Entry(
        llama4, shards=50, assumed="sizes of the vision tower are the published ones, not in the config; shard borders"
    ),
    "microsoft/Phi-3.5-MoE-instruct": Entry(phimoe, shards=17, assumed=_BORDERS),
    "microsoft/phi-3-mini-4k-instruct": Entry(phi3),
    "mistralai/Mixtral-8x7B-v0.1": Entry(mixtral, index_of="mistralai__Mixtral-8x7B-v0.1--yangulei"),
    "moonshotai/Kimi-K2-Instruct": Entry(
        deepseek_fp8,
        pattern="model-{:d}-of-{:d}.safetensors",
        by_layer=True,
        assumed="names are DeepSeek-V3's; files of a public listing are 192 bytes longer (metadata, presumably)",
    ),
    "nvidia/DeepSeek-V3.1-NVFP4": Entry(
        deepseek_nvfp4,
        assumed="MTP layer kept whole in BF16; no k_scale and v_scale tensors; shard count and borders",
    ),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Entry(
        nemotron_h, shards=13, assumed="A_log, D and dt_bias in BF16, router in F32; shard borders"
    ),
    "openai/gpt-oss-20b": Entry(gpt_oss),
    "stepfun-ai/Step-3.7-Flash": Entry(
        step3p7,
        assumed="96 query heads in sliding and MTP layers and the tower's sizes (published, not in the config); "
        "BF16 checkpoint with router_bias in F32; shard count and borders",
    ),
    "tencent/Hunyuan-A13B-Instruct": Entry(hunyuan, assumed="router in BF16; shard count and borders"),
    "zai-org/GLM-5": Entry(
        glm5, assumed="MTP layer without own embedding and head; dtypes of the indexer; shard count and borders"
    ),
    # Shapes of the error table that have no config in data/models.
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Entry(
        qwen3_next, shards=41, config=lambda: configs.QWEN3_NEXT, assumed=_WRITTEN + _BORDERS
    ),
    "openai/gpt-oss-120b": Entry(
        gpt_oss,
        shards=15,
        pattern="model-{:05d}-of-{:05d}.safetensors",
        first=0,
        config=lambda: configs.deeper(load_config("openai/gpt-oss-20b"), configs.GPT_OSS_120B),
        assumed=_WRITTEN + _BORDERS,
    ),
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": Entry(
        kimi_linear,
        shards=20,
        config=lambda: configs.KIMI_LINEAR,
        assumed=_WRITTEN + "A_log and dt_bias in F32; " + _BORDERS,
    ),
    "MiniMaxAI/MiniMax-Text-01": Entry(
        minimax_text_01, config=lambda: configs.MINIMAX_TEXT_01, assumed=_WRITTEN + "BF16; shard count and borders"
    ),
    "google/gemma-3-27b-it": Entry(gemma3, shards=12, config=lambda: configs.GEMMA3_27B, assumed=_WRITTEN + _BORDERS),
    "google/gemma-3-4b-it": Entry(gemma3, shards=2, config=lambda: configs.GEMMA3_4B, assumed=_WRITTEN + _BORDERS),
    "mistralai/Mistral-7B-v0.1": Entry(
        mixtral, shards=2, config=lambda: configs.MISTRAL_7B, assumed=_WRITTEN + _BORDERS
    ),
    "TheBloke/Mixtral-8x7B-v0.1-GPTQ": Entry(
        mixtral_gptq,
        shards=1,
        config=lambda: {**load_config("mistralai/Mixtral-8x7B-v0.1"), **configs.MIXTRAL_GPTQ},
        assumed="4 bit, groups of 128 with g_idx; router, norms, embedding and head unpacked in F16",
    ),
    "baidu/ERNIE-4.5-VL-28B-A3B-PT": Entry(
        ernie_vl, config=lambda: configs.ERNIE_VL, assumed=_WRITTEN + "without vision tower and resampler; " + _BORDERS
    ),
}

NAMES: tuple[str, ...] = tuple(CATALOGUE)
"""Every repository that can be rebuilt, as ``org/name``."""

STORED: tuple[str, ...] = tuple(name for name, entry in CATALOGUE.items() if entry.config is None)
"""Those whose config.json is a real one, kept in ``data/models``."""


def stored_index(name: str) -> bytes | None:
    """The real ``model.safetensors.index.json``, if it is kept here."""
    entry = CATALOGUE[name]
    path = (MODELS / entry.index_of if entry.index_of else folder_of(name)) / "model.safetensors.index.json.gz"
    return gzip.decompress(path.read_bytes()) if path.exists() else None
