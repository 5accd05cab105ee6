"""Figures of every real config, worked out by hand; by repository.

No figure here comes from moecore or from the tensor lists of ``realrepo``: each is closed-form arithmetic over the
numbers of the model's config.json, written out with the layer counts. ``w(out, in)`` is one weight matrix; a role's
bytes are its parameters times the width of its dtype plus, where the checkpoint is quantised, its scales.

Conventions (they are the report's): total = logical parameters without MTP, towers included; active = everything but
towers and MTP, with top-k of E routed experts in each MoE layer; without embeddings = active less embedding and head.
Norms inside attention count as norm, a router's bias as router, a shared expert's gate as shared expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .decoders import (
    dbrx,
    gpt_oss,
    granite,
    hunyuan_a13b,
    ling_lite,
    llama_3_1_8b,
    minimax_m2,
    mixtral,
    olmoe,
    phi_3_5_moe,
    phi_3_mini,
)
from .deepseek import deepseek_moe_16b, deepseek_nvfp4, deepseek_v2_lite, deepseek_v3, glm_5, kimi_k2
from .encoder_decoder import switch_base_128
from .hybrid import jamba, mimo_v2_flash, nemotron_3_nano
from .multimodal import gemma4, llama4_scout, step_3_7_flash
from .qwen import qwen3_5, qwen3_8b, qwen3_30b, qwen3_vl

if TYPE_CHECKING:
    from collections.abc import Callable

    from .figures import Expected

EXPECTED: dict[str, Callable[[], Expected]] = {
    "MiniMaxAI/MiniMax-M2.5": minimax_m2,
    "Qwen/Qwen3-30B-A3B": qwen3_30b,
    "Qwen/Qwen3-30B-A3B-FP8": lambda: qwen3_30b(quantised=True),
    "Qwen/Qwen3-8B": qwen3_8b,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": qwen3_vl,
    "Qwen/Qwen3.5-35B-A3B": qwen3_5,
    "XiaomiMiMo/MiMo-V2-Flash": mimo_v2_flash,
    "ai21labs/AI21-Jamba-Mini-1.6": jamba,
    "allenai/OLMoE-1B-7B-0924": olmoe,
    "databricks/dbrx-instruct": dbrx,
    "deepseek-ai/DeepSeek-V2-Lite": deepseek_v2_lite,
    "deepseek-ai/DeepSeek-V3": deepseek_v3,
    "deepseek-ai/DeepSeek-V3.2": lambda: deepseek_v3(indexer=True),
    "deepseek-ai/deepseek-moe-16b-base": deepseek_moe_16b,
    "google/gemma-4-26B-A4B": gemma4,
    "google/switch-base-128": switch_base_128,
    "ibm-granite/granite-3.1-1b-a400m-base": granite,
    "inclusionAI/Ling-lite-base": ling_lite,
    "meta-llama/Llama-3.1-8B": llama_3_1_8b,
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": llama4_scout,
    "microsoft/Phi-3.5-MoE-instruct": phi_3_5_moe,
    "microsoft/phi-3-mini-4k-instruct": phi_3_mini,
    "mistralai/Mixtral-8x7B-v0.1": mixtral,
    "moonshotai/Kimi-K2-Instruct": kimi_k2,
    "nvidia/DeepSeek-V3.1-NVFP4": deepseek_nvfp4,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": nemotron_3_nano,
    "openai/gpt-oss-20b": gpt_oss,
    "stepfun-ai/Step-3.7-Flash": step_3_7_flash,
    "tencent/Hunyuan-A13B-Instruct": hunyuan_a13b,
    "zai-org/GLM-5": glm_5,
}
