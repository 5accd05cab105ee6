"""The specification against the routers of transformers, on logits without ties."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moecore import ops
from torch import Tensor

pytest.importorskip("transformers", reason="its routers are the reference")

from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

TOKENS, EXPERTS, K = 200, 32, 6


def router(kind: type[torch.nn.Module], dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    """A router whose logits are its input."""
    config = {"num_experts_per_tok": K, "num_experts": EXPERTS, "num_local_experts": EXPERTS, "hidden_size": EXPERTS}
    module = kind(SimpleNamespace(**config, **options)).to(dtype).eval()
    module.weight.data = torch.eye(EXPERTS, dtype=dtype)
    return module


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    """No two of a row are equal, in bfloat16 neither."""
    order = torch.stack([torch.randperm(EXPERTS) for _ in range(TOKENS)])
    return ((order - EXPERTS // 2) / 8 + torch.rand(TOKENS, 1).bfloat16().float() / 16).to(dtype)


@torch.no_grad()
def compare(module: torch.nn.Module, x: Tensor, exact: bool = True, **options: Any) -> None:
    _, want, want_ids = module(x)
    weights, ids = ops.gate(x, K, weights_dtype=want.dtype, ids_dtype=torch.int64, **options)
    if exact:
        assert torch.equal(ids, want_ids)
    else:  # in any order
        ids, order = ids.sort()
        weights = weights.gather(1, order)
        want_ids, order = want_ids.sort()
        want = want.gather(1, order)
        assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [False, True])
def test_qwen3_moe(renormalize: bool, dtype: torch.dtype) -> None:
    compare(router(Qwen3MoeTopKRouter, dtype, norm_topk_prob=renormalize), logits(dtype), renormalize=renormalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtral(dtype: torch.dtype) -> None:
    compare(router(MixtralTopKRouter, dtype), logits(dtype), renormalize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt_oss(dtype: torch.dtype) -> None:
    compare(router(GptOssTopKRouter, dtype), logits(dtype), scoring="softmax_topk")


@pytest.mark.parametrize("groups", [1, 8])
def test_deepseek_v3(groups: int) -> None:
    module = router(
        DeepseekV3TopkRouter,
        routed_scaling_factor=2.5,
        n_group=groups,
        topk_group=max(1, groups // 2),
        norm_topk_prob=True,
    )
    module.e_score_correction_bias.copy_(torch.randn(EXPERTS) / 4)
    options = {"groups": 8, "top_groups": 4, "group_score": "top2"} if groups > 1 else {}
    compare(
        module,
        torch.randn(TOKENS, EXPERTS),
        exact=False,
        scoring="sigmoid",
        bias=module.e_score_correction_bias,
        renormalize=True,
        eps=1e-20,
        scale=2.5,
        **options,
    )
