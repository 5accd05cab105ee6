"""Same tokens: a model that runs in a part of its experts' memory says what the resident model says.

The resident model runs transformers' `grouped_mm`; logits are compared bit by bit, tokens one by one. What differs from
call to call (batch, length, what is resident) is varied; what must not matter is the budget.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import tiny
import torch
import transformers
from moecore.errors import ConfigError, MoecoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY_MOE = Path(__file__).parents[1] / "data" / "tiny-moe"
TRAINED = Path(__file__).parents[3] / "shared" / "models" / "qwen3moe-43m"
BUDGETS = ["6%", "12%", "25%", "50%", "100%"]
SHAPES = [(batch, length) for batch in (1, 4) for length in (1, 37, 700)]
FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "nemotron_h", "llama4_text", "dbrx"]
#: Its own loop sums in another order than a sum over rows.
ROUNDED = {"llama4_text"}
NEW = 6

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def prompt(batch: int, length: int, vocabulary: int = 100) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def greedy(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    kwargs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | kwargs
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    with torch.no_grad(), tiny.quiet():
        return model.generate(ids, **kwargs)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), tiny.quiet():
        return model(ids).logits


@functools.cache
def resident(folder: Path) -> Any:
    """The whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with contextlib.suppress(ValueError):  # families with code of their own
        model.set_experts_implementation("grouped_mm")
    return tiny.aligned(model)


@functools.cache
def truth(folder: Path, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompt(batch, length)
    return greedy(resident(folder), ids), logits(resident(folder), ids)


def agrees(model: Any, folder: Path, batch: int, length: int, *, exact: bool = True) -> None:
    tokens, scores = truth(folder, batch, length)
    ids = prompt(batch, length)
    assert torch.equal(greedy(model, ids), tokens)
    mine = logits(model, ids)
    if exact:
        assert torch.equal(mine, scores)
    else:
        torch.testing.assert_close(mine, scores, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def loaded(folder: Path, budget: str, **kwargs: Any) -> Iterator[Any]:
    model = tiny.aligned(moecore.load(folder, expert_memory=budget, device="cpu", **kwargs))
    with model.moecore:
        yield model


@pytest.fixture
def small() -> Iterator[Any]:
    """The trained model that ships, in a quarter of its experts' memory."""
    with loaded(TINY_MOE, "25%") as model:
        yield model


@pytest.fixture
def wrapped(checkpoints: Path) -> Iterator[Any]:
    """A random model whose experts were taken out of it."""
    model = tiny.build("qwen3_moe")
    moecore.wrap(model, expert_memory="25%")
    yield model
    if isinstance(vars(model).get("moecore"), moecore.runtime.Handle):
        model.moecore.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY_MOE)


# ------------------------------------------------------------------------------------------------------ every budget
@pytest.mark.parametrize("budget", BUDGETS)
def test_load(budget: str) -> None:
    with loaded(TINY_MOE, budget) as model:
        for batch, length in SHAPES:
            agrees(model, TINY_MOE, batch, length)
        stats = model.moecore.stats()
        assert stats.slots == int(96 * int(budget[:-1]) / 100)
        assert stats.resident <= stats.slots
        if budget != "100%":
            assert stats.total.evictions > 0, "this budget has tested nothing"


@pytest.mark.parametrize("budget", BUDGETS)
def test_wrap(budget: str, checkpoints: Path) -> None:
    folder = tiny.checkpoint("qwen3_moe", checkpoints)
    model = moecore.wrap(tiny.load_whole("qwen3_moe", folder), expert_memory=budget)
    with model.moecore:
        for batch, length in SHAPES:
            agrees(model, folder, batch, length)


def test_one_slot() -> None:
    with loaded(TINY_MOE, "49152") as model:
        assert model.moecore.stats().slots == 1
        agrees(model, TINY_MOE, 4, 37)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "ema", "cyclic"])
def test_policies_change_no_token(policy: str) -> None:
    with loaded(TINY_MOE, "12%", policy=policy) as model:
        agrees(model, TINY_MOE, 4, 37)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, checkpoints: Path) -> None:
    folder, exact = tiny.checkpoint(name, checkpoints), name not in ROUNDED
    for budget in ("6%", "50%"):
        with loaded(folder, budget) as model:
            agrees(model, folder, 1, 1, exact=exact)
            agrees(model, folder, 4, 37, exact=exact)
    model = moecore.wrap(tiny.load_whole(name, folder), expert_memory="12%")
    with model.moecore:
        agrees(model, folder, 4, 37, exact=exact)


@pytest.mark.skipif(not TRAINED.exists(), reason="the trained 43M model lies in shared/models, beside the project")
@pytest.mark.parametrize("budget", ["6%", "25%"])
def test_a_trained_model(budget: str) -> None:
    with loaded(TRAINED, budget) as model:
        agrees(model, TRAINED, 1, 37)
        agrees(model, TRAINED, 4, 1)


def test_bfloat16(checkpoints: Path) -> None:
    folder = tiny.checkpoint("mixtral", checkpoints, torch.bfloat16)
    with loaded(folder, "12%") as model:
        agrees(model, folder, 4, 37)


# --------------------------------------------------------------------------------------------------- ways to generate
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams of a batch": {"num_beams": 2, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(way: str, small: Any) -> None:
    ids = prompt(1 if way == "prompt lookup" else 3, 9)
    found = []
    for model in (resident(TINY_MOE), small):
        torch.manual_seed(7)
        found.append(greedy(model, ids, **WAYS[way]))
    assert torch.equal(*found)


def test_left_padding(small: Any, tokenizer: Any) -> None:
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(["Once", "The little dog went to the park and"], return_tensors="pt", padding=True)
    assert (batch.attention_mask == 0).any()
    found = [greedy(m, batch.input_ids, attention_mask=batch.attention_mask) for m in (resident(TINY_MOE), small)]
    assert torch.equal(*found)


def test_streaming_from_a_thread(small: Any, tokenizer: Any) -> None:
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=greedy, args=(small, inputs.input_ids), kwargs={"streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    whole = greedy(resident(TINY_MOE), inputs.input_ids)[0, inputs.input_ids.shape[1] :]
    assert streamed == tokenizer.decode(whole)


def test_pipeline(small: Any, tokenizer: Any) -> None:
    found = []
    for model in (resident(TINY_MOE), small):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        with tiny.quiet():
            found.append(pipe("Once upon a time", max_new_tokens=NEW, do_sample=False)[0]["generated_text"])
    assert found[0] == found[1]


def test_compiled_as_one_graph(small: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    ids = prompt(2, 9)
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, logits(resident(TINY_MOE), ids))
    assert small.moecore.stats().total.calls == 6


def test_a_compiled_graph_of_a_model_that_was_unwrapped(wrapped: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, backend="aot_eager")
    ids = prompt(2, 9)
    with torch.no_grad():
        before = compiled(ids, use_cache=False).logits
        moecore.unwrap(wrapped)
        assert torch.equal(compiled(ids, use_cache=False).logits, before)


# ----------------------------------------------------------------------------------------------- gradients, and back
def test_forward_under_grad_and_backward(wrapped: Any) -> None:
    ids = prompt(2, 5)
    found = wrapped(ids).logits
    assert torch.equal(found, logits(wrapped, ids))
    with pytest.raises(RuntimeError, match=r"inference only; call moecore\.unwrap"):
        found.sum().backward()


def test_unwrap_gives_all_back() -> None:
    model = tiny.build("qwen3_moe")
    tiny.families.find(model)[1].module.down_proj.requires_grad_(False)
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    keys = list(model.state_dict())
    moecore.wrap(model, expert_memory="12%")
    assert not any("experts.gate_up_proj" in name for name, _ in model.named_parameters())
    assert moecore.unwrap(model) is model
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (value, trains) in before.items():
        assert torch.equal(after[name], value)
        assert after[name].requires_grad == trains
    assert "moecore" not in vars(model)
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("way", ["wrap", "load"])
def test_an_unwrapped_model_trains(way: str, checkpoints: Path) -> None:
    if way == "wrap":
        model = moecore.wrap(tiny.build("qwen3_moe"), expert_memory="25%")
    else:
        model = moecore.load(tiny.checkpoint("qwen3_moe", checkpoints), expert_memory="25%", device="cpu")
    moecore.unwrap(model).train()
    model(prompt(2, 9)).logits.square().sum().backward()
    for name in ("gate_up_proj", "down_proj"):
        assert getattr(model.model.layers[0].mlp.experts, name).grad.abs().sum() > 0


def test_unwrapped_and_saved(tmp_path: Path) -> None:
    model = moecore.load(TINY_MOE, expert_memory="25%", device="cpu")
    moecore.unwrap(model).save_pretrained(tmp_path)
    assert torch.equal(logits(resident(tmp_path), prompt(1, 9)), logits(resident(TINY_MOE), prompt(1, 9)))


@pytest.mark.parametrize("name", ["longcat_flash", "dbrx", "jetmoe", "gpt_oss"])
def test_unwrap_of_other_layouts(name: str) -> None:
    model = tiny.build(name)
    before, shapes = logits(model, prompt(2, 9)), {key: value.shape for key, value in model.state_dict().items()}
    moecore.unwrap(moecore.wrap(model, expert_memory="25%"))
    assert torch.equal(logits(model, prompt(2, 9)), before)
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


# -------------------------------------------------------------------------------------------------- what is refused
def test_wrapped_twice(small: Any, wrapped: Any) -> None:
    for model in (small, wrapped, wrapped.model):
        with pytest.raises(ConfigError, match="runs this model, or a part of it, already"):
            moecore.wrap(model, expert_memory="25%")


def test_wrap_of_what_has_no_experts() -> None:
    with pytest.raises(ConfigError, match=r"no experts in this llama model \(LlamaForCausalLM\)"):
        moecore.wrap(tiny.build("llama"), expert_memory="25%")
    with pytest.raises(ConfigError, match="not str"):
        moecore.wrap("org/model", expert_memory="25%")
    with pytest.raises(ConfigError, match="does not run this model"):
        moecore.unwrap(tiny.build("llama"))


def test_nothing_is_saved_without_experts(wrapped: Any, tmp_path: Path) -> None:
    for model in (wrapped, wrapped.model):
        for way in (model.save_pretrained, model.push_to_hub):
            with pytest.raises(ConfigError, match=r"without experts; call moecore\.unwrap"):
                way(tmp_path / "saved")
    with pytest.raises(ConfigError, match="cannot be pickled"):
        torch.save(wrapped, io.BytesIO())
    assert not list(tmp_path.iterdir())


def test_a_parent_of_what_was_wrapped_is_not_saved_either(tmp_path: Path) -> None:
    """Only the inner model knows that it is run by moecore; whoever asks for its state hears it all the same."""
    model = tiny.build("qwen3_moe")
    keys, before = list(model.state_dict()), logits(model, prompt(1, 9))
    with moecore.wrap(model.model, expert_memory="25%").moecore:
        for parent in (model, torch.nn.Sequential(model)):
            with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts: .* without experts; call moecore\.unwrap"):
                parent.state_dict()
        with pytest.raises(ConfigError, match=r"without experts; call moecore\.unwrap"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.safetensors*"))
        moecore.unwrap(model.model)
    assert list(model.state_dict()) == keys
    with tiny.quiet():
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(tiny.load_whole("qwen3_moe", tmp_path), prompt(1, 9)), before)


def test_parts_without_experts_have_their_state(wrapped: Any) -> None:
    assert list(wrapped.model.layers[0].self_attn.state_dict())
    assert "weight" in wrapped.lm_head.state_dict()


def test_replicas_are_refused(wrapped: Any) -> None:
    """What `torch.nn.DataParallel` does with every module, before it moves anything to a second GPU."""
    with pytest.raises(ConfigError, match=r"DataParallel: .* a process for each GPU"):
        [module._replicate_for_data_parallel() for module in wrapped.modules()]
    moecore.unwrap(wrapped)
    assert all(module._replicate_for_data_parallel()._is_replica for module in wrapped.modules())


def test_copies_are_refused(wrapped: Any) -> None:
    for model in (wrapped, wrapped.model.layers[0]):
        with pytest.raises(ConfigError, match="cannot be copied"):
            copy.deepcopy(model)
        with pytest.raises(ConfigError, match="cannot be pickled"):
            pickle.dumps(model)
    assert logits(wrapped, prompt(1, 9)).isfinite().all()


def test_another_dtype_after_wrap(wrapped: Any) -> None:
    """Experts stay as they were wrapped; the rest of the model goes, and comes back rounded."""
    before = logits(wrapped, prompt(1, 9))
    wrapped.to(torch.bfloat16)
    low = logits(wrapped, prompt(1, 9))
    assert low.dtype == torch.bfloat16
    assert (low.float() - before).abs().mean() < before.abs().mean() / 4
    moecore.unwrap(wrapped)
    assert wrapped.model.layers[0].mlp.experts.down_proj.dtype == torch.float32


def test_closed(wrapped: Any) -> None:
    logits(wrapped, prompt(1, 9))
    handle = wrapped.moecore
    with handle:
        pass
    handle.close()
    with pytest.raises(MoecoreError, match="were closed; load or wrap the model again"):
        logits(wrapped, prompt(1, 9))
    with pytest.raises(MoecoreError, match="were closed and cannot be given back"):
        moecore.unwrap(wrapped)
    assert handle.stats().total.lookups > 0
    assert "hit rate" in handle.report()
