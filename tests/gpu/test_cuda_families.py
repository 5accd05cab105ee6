"""Families other than the shipped model's, whole, on a GPU: a budget of a quarter gives what all slots give."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import moecore  # noqa: E402
from moecore import _core  # noqa: E402

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "tools"), str(TESTS / "runtime")]

import packed  # noqa: E402
import tiny  # noqa: E402

reason = _core.cuda_available()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no GPU: {reason}")

#: One of each kind: gated and not, biases, transposed, interleaved, groups, identity experts, adapters.
NAMES = [
    "mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "olmoe", "glm4_moe", "ernie4_5_moe", "dbrx", "jetmoe",
    "llama4_text", "granitemoe", "nemotron_h", "phimoe",
]  # fmt: skip
STEPS = 6


@torch.no_grad()
def outputs(model: Any) -> list[Any]:
    """Logits of a prefill of 37 tokens and of some decode steps, on a fixed path."""
    torch.manual_seed(1)
    ids = torch.randint(3, 100, (2, 37 + STEPS), device="cuda")
    found, cache = [], None
    for start, end in [(0, 37), *((37 + step, 38 + step) for step in range(STEPS))]:
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits.float())
    return found


def run(folder: Path, budget: str) -> list[Any]:
    with tiny.quiet():
        model = moecore.load(folder, expert_memory=budget, device="cuda")
        try:
            found = outputs(model)
            stats = model.moecore.stats()
            assert stats.decode.lookups + stats.prefill.lookups
            assert budget == "100%" or stats.slots < stats.experts
            return found
        finally:
            model.moecore.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("name", NAMES)
def test_a_quarter_gives_what_all_give(name: str, folder: Path) -> None:
    where = tiny.checkpoint(name, folder, torch.bfloat16)
    few, all_ = run(where, "25%"), run(where, "100%")
    assert all(torch.equal(a, b) for a, b in zip(few[1:], all_[1:], strict=True))
    assert torch.equal(few[0], all_[0])
    with tiny.quiet():
        stock = outputs(tiny.tiny_configs.model_class(name).from_pretrained(where).cuda().eval())
    for ours, theirs in zip(few, stock, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_quantised_experts(kind: str, folder: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers loads FP8 and MXFP4 checkpoints with accelerate only")
    if kind == "fp8":
        from transformers.utils import is_kernels_available

        if not is_kernels_available():
            pytest.skip("on a GPU transformers' own FP8 layers need the package kernels, in a version that it takes")
    where = packed.mxfp4(folder) if kind == "mxfp4" else packed.fp8("deepseek_v3", folder)
    few, all_ = run(where, "25%"), run(where, "100%")
    assert all(torch.equal(a, b) for a, b in zip(few, all_, strict=True))
    assert all(bool(one.isfinite().all()) for one in few)
