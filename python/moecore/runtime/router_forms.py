"""The routers of transformers that moecore's gate can stand in for: what each one computes, by the code of its forward.

A family needs a row here only if its router's code is like no other's: `fingerprint.fingerprint(router)` is its key.
Seventeen families share the row of DeepSeek-V3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Settings(NamedTuple):
    """Numbers of one router, as :func:`moecore.ops.gate` takes them."""

    k: int
    scoring: str
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"


@dataclass(frozen=True)
class Form:
    """What one forward computes: a linear layer, then the gate. T tokens, H hidden width, E experts, k of a token.

    Attributes:
        settings: reads the router's numbers; None where it is set to something that the gate has no words for.
        logits: (router, hidden [T, H]) -> [T, E], by the very operations of the original.
        weights: dtype of the gate's weights: "float32", or that of the "logits" or of the "hidden" states.
        bias: (router, second argument or None) -> [E], added to the scores for the choice.
        takes: name of the forward's second argument, if it has one.
        finish: (router, hidden, weights [T, k], ids [T, k]) -> weights: what is left to do after the gate.
        first: logits -> what the original returns in their place.
        returns: order of the results: 0 for `first`, 1 for the weights, 2 for the ids.
        dims: dimensions that the original's input must have; None: any.
        only_float32: whether the original rounds its scores to the dtype of the logits before it chooses, so that the
            gate chooses the same experts only if that dtype is float32.
    """

    settings: Callable[[Any], Settings | None]
    logits: Callable[[Any, Tensor], Tensor]
    weights: str = "float32"
    bias: Callable[[Any, Tensor | None], Tensor] | None = None
    takes: str | None = None
    finish: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None
    first: Callable[[Tensor], Tensor] | None = None
    returns: tuple[int, ...] = (0, 1, 2)
    dims: int | None = None
    only_float32: bool = False


def _linear(router: Any, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, router.weight)


def _linear_bias(router: Any, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, router.weight, router.bias)


def _linear_then_float(router: Any, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, router.weight).float()


def _linear_of_weight(router: Any, hidden: Tensor) -> Tensor:
    return functional.linear(hidden.to(router.weight.dtype), router.weight)


def _float_linear(router: Any, hidden: Tensor) -> Tensor:
    return functional.linear(hidden.float(), router.weight.float())


def _float_linear_bias(router: Any, hidden: Tensor) -> Tensor:
    return functional.linear(hidden.float(), router.weight.float(), router.bias.float())


def _hunyuan(router: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = router.wg(hidden.float() if router.wg.weight.dtype == torch.float32 else hidden)
    return logits


def _laguna(router: Any, hidden: Tensor) -> Tensor:
    logits, cap = _linear_then_float(router, hidden), router.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0.0 else logits


def _gemma(router: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)
    return logits


def _own(router: Any, _: Tensor | None) -> Tensor:
    bias: Tensor = router.e_score_correction_bias
    return bias


def _given(_: Any, bias: Tensor | None) -> Tensor:
    assert bias is not None  # noqa: S101  # a call without it goes to the original
    return bias


def _clamped(router: Any, hidden: Tensor, weights: Tensor, _: Tensor) -> Tensor:
    """Ernie's division, by no less than its least norm."""
    return (weights / torch.clamp(weights.sum(-1, keepdim=True), min=router.norm_min)).to(hidden.dtype)


def _in_groups(router: Any, settings: Settings) -> Settings:
    """With the router's groups, unless every one of them may be chosen from."""
    if router.num_group is None or router.topk_group >= router.num_group:
        return settings
    return settings._replace(groups=router.num_group, top_groups=router.topk_group)


def _deepseek_v2(router: Any) -> Settings | None:
    settings = Settings(router.top_k, "softmax", scale=router.routed_scaling_factor)
    if router.topk_method == "group_limited_greedy":
        return _in_groups(router, settings)
    return settings if router.topk_method == "greedy" else None


def _deepseek_v3(router: Any) -> Settings:
    scale = router.routed_scaling_factor
    settings = Settings(router.top_k, "sigmoid", router.norm_topk_prob, 1e-20, scale, group_score="top2")
    return _in_groups(router, settings)


def _axk2(router: Any) -> Settings | None:
    # Experts outside of the best groups get 0 here, not -inf, and may still win against negative ones.
    settings = _deepseek_v3(router)
    return settings if settings.groups == 1 else None


def _mistral(router: Any, renormalize: bool) -> Settings:
    scale = router.routed_scaling_factor
    return _in_groups(router, Settings(router.top_k, "softmax", renormalize, 1e-20, scale, group_score="top2"))


def _cohere(router: Any) -> Settings | None:
    if router.expert_selection_fn == "softmax":
        return Settings(router.top_k, "softmax_topk")
    sigmoid = router.expert_selection_fn == "sigmoid"
    return Settings(router.top_k, "sigmoid", router.norm_topk_prob) if sigmoid else None


def _scored(scoring: str) -> Callable[[Any], Settings]:
    """DeepSeek-V4's, where the configuration names the score."""
    return lambda router: Settings(router.top_k, scoring, True, 1e-20, router.routed_scaling_factor)


_ERNIE = Form(
    lambda router: Settings(router.top_k, "softmax"),
    _float_linear,
    bias=lambda router, _: router.moe_statics.e_score_correction_bias.squeeze(),
    finish=_clamped,
)
_GRANITE = Form(lambda router: Settings(router.top_k, "softmax_topk"), _linear_then_float, weights="hidden", dims=2)
_LONGCAT = Form(
    lambda router: Settings(router.top_k, "softmax", scale=router.routed_scaling_factor),
    lambda router, hidden: functional.linear(hidden.float(), router.classifier.weight.float()),
    bias=_own,
)

#: By fingerprint. Comments name the families of transformers 5.17 to 5.23.
FORMS: dict[str, Form] = {
    # olmoe, flex_olmo, mellum, qwen2_moe, qwen3_moe, qwen3_next, qwen3_omni_moe, qwen4_exp
    "9e3f7e2635a21bc3": Form(
        lambda router: Settings(router.top_k, "softmax", router.norm_topk_prob), _linear, weights="logits"
    ),
    # qwen3_5_moe, qwen3_vl_moe
    "a11c3088759d2369": Form(lambda router: Settings(router.top_k, "softmax", True), _linear, weights="logits"),
    # mixtral, minimax
    "87a44a843db052a5": Form(lambda router: Settings(router.top_k, "softmax", True), _linear),
    # deepseek_v2, deepseek_ocr2, unlimited_ocr
    "36a8fd2be430cd8d": Form(_deepseek_v2, _float_linear),
    # deepseek_v3, deepseek_v32, axk1, bailing_hybrid, dots1, dots3_note, exaone_moe, glm4_moe, glm4_moe_lite,
    # glm4v_moe, glm5_next, glm_moe_dsa, hy_v4, kimi_linear, mimo_v2_flash, nemotron_h, solar_open
    "fd8cb098c1418326": Form(_deepseek_v3, _float_linear, bias=_own),
    "ba3057938dd49c79": Form(_axk2, _float_linear, bias=_own),  # axk2
    # beam
    "8eaeed21e78cbcf7": Form(
        lambda router: _in_groups(
            router, Settings(router.top_k, "sigmoid", router.norm_topk_prob, 1e-20, group_score="top2")
        ),
        _float_linear,
        bias=_own,
    ),
    # deepseek_v4: by sqrtsoftplus, by sigmoid
    "c7777e9ff8389db4": Form(_scored("sqrtsoftplus"), _linear, "logits", bias=_own, only_float32=True),
    "012ea5b4b52b99d5": Form(_scored("sigmoid"), _linear, "logits", bias=_own, only_float32=True),
    # inkling2: by sigmoid, by sqrtsoftplus
    "132ac66ff1112e3a": Form(
        _scored("sigmoid"), lambda router, hidden: functional.linear(hidden.float(), router.weight), bias=_own
    ),
    "950b99c9b14adf6e": Form(
        _scored("sqrtsoftplus"), lambda router, hidden: functional.linear(hidden.float(), router.weight), bias=_own
    ),
    # mistral4, mistral_large4
    "b90364c4c2896cdc": Form(
        lambda router: _mistral(router, router.norm_topk_prob), _linear, "logits", only_float32=True
    ),
    "db5655937e11f73c": Form(lambda router: _mistral(router, True), _float_linear),
    # minimax_m2; minimax_m3_vl, step3p5, step3p7
    "b2b59f50c9bcdbba": Form(
        lambda router: Settings(router.top_k, "sigmoid", True),
        _linear_of_weight,
        bias=_given,
        takes="e_score_correction_bias",
    ),
    "b554f8930a8ad112": Form(lambda router: Settings(router.top_k, "sigmoid", True), _linear_of_weight, bias=_own),
    # hy_v3, the vision tower of dots3_note
    "25fc26671ae062d5": Form(
        lambda router: Settings(router.top_k, "sigmoid", True, 1e-20, router.router_scaling_factor),
        _float_linear,
        bias=_given,
        takes="e_score_correction_bias",
    ),
    # muse_spark
    "8f3772b3cacbf91b": Form(
        lambda router: Settings(router.top_k, "sigmoid", True, router.norm_topk_prob_eps, router.routed_scaling_factor),
        lambda router, hidden: _float_linear(router, hidden) * router.output_multiplier,
        bias=_own,
    ),
    # afmoe
    "bbd458d150545f8a": Form(
        lambda router: Settings(router.top_k, "sigmoid", True, 1e-20, router.route_scale),
        lambda router, hidden: router.gate(hidden).to(torch.float32),
        bias=_given,
        takes="expert_bias",
        dims=3,
    ),
    # lfm2_moe
    "d68124a05ccb3f47": Form(
        lambda router: (
            Settings(router.top_k, "sigmoid", router.norm_topk_prob, 1e-6, router.routed_scaling_factor)
            if router.use_expert_bias
            else None
        ),
        _linear,
        "logits",
        bias=_given,
        takes="expert_bias",
        dims=2,
        only_float32=True,
    ),
    "bbdd68e1a9227ef6": Form(  # laguna
        lambda router: Settings(router.top_k, "sigmoid", True), _laguna, "hidden", bias=_own
    ),
    "2503a45dc513e222": Form(  # flint
        lambda router: Settings(router.top_k, "sigmoid", router.norm_topk_prob), _float_linear
    ),
    "9cc9959eab4ccc0b": Form(  # hunyuan_v1_moe
        lambda router: Settings(router.top_k, "softmax", True), _hunyuan, "logits"
    ),
    "57dd637121b88fb4": Form(  # jamba
        lambda router: Settings(router.top_k, "softmax"), _linear, "hidden", dims=2
    ),
    "4611448f4127e777": Form(  # aria
        lambda router: Settings(router.top_k, "softmax_topk"), _linear, "logits", dims=2
    ),
    "ea9c8c2d99d318f4": Form(  # gpt_oss
        lambda router: Settings(router.top_k, "softmax_topk"), _linear_bias, "logits", dims=2
    ),
    "7bc1f6699e9fc4f6": Form(  # openai_privacy_filter
        lambda router: Settings(router.top_k, "softmax_topk"),
        _float_linear_bias,
        finish=lambda router, hidden, weights, ids: weights / router.top_k,
        dims=2,
    ),
    "a3546440c6d72b11": Form(_cohere, _linear, "hidden", dims=2),  # cohere2_moe
    # granitemoe, granitemoehybrid, granitemoeshared, granitemoe_swa; all but the last in 5.17
    "a08566ee419ebcd1": _GRANITE,
    "8c7908f314612df2": replace(_GRANITE, returns=(2, 1, 0)),
    # ernie4_5_moe, ernie4_5_vl_moe; in 5.17
    "f174a1617ff512f3": _ERNIE,
    "0a99dab311aa8ffd": _ERNIE,
    # longcat_flash; in 5.17
    "10bac51feb11651e": _LONGCAT,
    "d4abf4169caabf0e": replace(_LONGCAT, returns=(1, 2)),
    # gemma4, diffusion_gemma
    "c820957929134b71": Form(
        lambda router: Settings(router.config.top_k_experts, "softmax", True),
        _gemma,
        finish=lambda router, hidden, weights, ids: weights * router.per_expert_scale[ids],
        first=lambda logits: functional.softmax(logits, dim=-1, dtype=torch.float32),
        dims=2,
    ),
}
