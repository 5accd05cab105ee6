"""Every family, on a tiny checkpoint: where its experts lie, that nobody reads them early, and the same tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import tiny_configs
import torch
from moecore.runtime import families
from moecore.runtime.skeleton import load_skeleton
from transformers import modeling_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

if TYPE_CHECKING:
    from pathlib import Path

# transformers runs llama4's experts as one product over all of them, of which most is zeros: another order of sums.
OTHER_PRODUCTS = {"llama4", "llama4_text"}

# The configurations are those of transformers 5.23; these types exist in older versions, and differ there.
NEWER_CONFIGURATION = {"aria", "aria_text", "minimax_m3_vl"}


def family(name: str) -> str:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {tiny.transformers.__version__} has no {name}")
    if name in NEWER_CONFIGURATION and tiny.VERSION < (5, 23):
        pytest.skip(f"transformers {tiny.transformers.__version__} has another {name}: undecorated, or another config")
    return name


def skeleton(name: str, folder: Path, **kwargs: Any) -> Any:
    with tiny.quiet():
        return load_skeleton(folder, model_class=tiny_configs.model_class(name), **kwargs)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_rows_are_the_experts_of_the_loaded_model(name: str, checkpoints: Path) -> None:
    folder = tiny.checkpoint(family(name), checkpoints)
    _, index = skeleton(name, folder)
    found = {taken.name: taken for taken in families.find(tiny.load_whole(name, folder))}
    assert [layer.name for layer in index.layers] == list(found)
    for at, layer in enumerate(index.layers):
        whole = found[layer.name]
        assert layer.num_experts == whole.num_experts
        assert layer.top_k
        assert [part.name for part in layer.parts] == [param.name for param in whole.params]
        for expert in range(layer.num_experts):
            row, made, truth = tiny.rows(index, at, expert), index.materialise(at, expert), whole.resident(expert)
            for part in layer.parts:
                assert part.offset % 256 == 0
                assert row[part.name].dtype == truth[part.name].dtype
                assert torch.equal(row[part.name], truth[part.name])
                assert torch.equal(made[part.name], truth[part.name])


@pytest.mark.parametrize("name", tiny.NAMES)
def test_nothing_of_the_experts_is_read(name: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.checkpoint(family(name), checkpoints)
    read: list[str] = []

    class Slice:
        def __init__(self, key: str, inner: Any) -> None:
            self.key, self.inner = key, inner

        def __getitem__(self, at: Any) -> Any:
            read.append(self.key)
            return self.inner[at]

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = real(*args, **kwargs)

        def get_slice(self, key: str) -> Slice:
            return Slice(key, self.inner.get_slice(key))

        def __exit__(self, *args: Any) -> Any:
            return self.inner.__exit__(*args)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

    real = modeling_utils.safe_open
    monkeypatch.setattr(modeling_utils, "safe_open", File)
    model, index = skeleton(name, folder)
    assert read
    assert not index.expert_keys & set(read)
    # Each tensor of the files has one owner, and what the model has loaded is all that is not of the experts.
    stored = tiny.headers(folder)
    assert index.expert_keys | set(index.other) | set(index.ignored) == set(stored)
    assert not index.ignored
    assert index.expert_bytes + sum(length(stored[key]) for key in index.other) == index.bytes
    loaded = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    assert sum(tensor.numel() for tensor in loaded.values()) == sum(elements(stored[key]) for key in index.other)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def length(entry: tuple[Path, int, dict[str, Any]]) -> int:
    begin, end = entry[2]["data_offsets"]
    return int(end - begin)


def elements(entry: tuple[Path, int, dict[str, Any]]) -> int:
    return math.prod(entry[2]["shape"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_same_tokens_as_the_resident_model(name: str, dtype: torch.dtype, checkpoints: Path) -> None:
    if (name, dtype) == ("deepseek_v4", torch.bfloat16) and tiny.VERSION < (5, 23):
        pytest.skip(f"transformers {tiny.transformers.__version__} cannot run deepseek_v4 in bfloat16 itself")
    folder = tiny.checkpoint(family(name), checkpoints, dtype)
    model, index = skeleton(name, folder)
    runtime = tiny.Reference(tiny.aligned(model), index)
    whole = tiny.load_whole(name, folder)
    with tiny.quiet():
        ours, truth = tiny.trace(model, name), tiny.trace(whole, name)
    called = {layer.name: calls for layer, calls in zip(index.layers, runtime.calls, strict=True)}
    assert len(ours) == len(truth) == max(called.values())
    for layer, calls in called.items():
        # A text token sees no expert of a vision tower.
        assert calls == (0 if "vision" in layer else len(truth)), layer
    for mine, stock in zip(ours, truth, strict=True):
        assert stock.isfinite().all()
        if name in OTHER_PRODUCTS and dtype == torch.float32:
            torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-5)
            assert torch.equal(mine.argmax(-1), stock.argmax(-1))
        else:
            assert torch.equal(mine, stock)


def test_a_wrong_expert_shows(checkpoints: Path) -> None:
    folder = tiny.checkpoint("olmoe", checkpoints)
    model, index = skeleton("olmoe", folder)
    runtime = tiny.Reference(tiny.aligned(model), index)
    runtime.rows[2, 3], runtime.rows[2, 4] = runtime.rows[2, 4], runtime.rows[2, 3]
    assert not torch.equal(tiny.trace(model, "olmoe")[0], tiny.trace(tiny.load_whole("olmoe", folder), "olmoe")[0])


@pytest.mark.parametrize("size", [1, 4, 16])
def test_waves_of_any_size_and_order_give_the_same_bits(size: int, checkpoints: Path) -> None:
    from moecore.runtime import compute

    whole = tiny.load_whole("gpt_oss", tiny.checkpoint("gpt_oss", checkpoints))
    taken = families.find(whole)[0]
    torch.manual_seed(2)
    hidden, index = torch.randn(29, 64), torch.stack([torch.randperm(16)[:3] for _ in range(29)])
    index[5, 1] = taken.num_experts  # a sentinel of expert parallelism
    weights = torch.rand(29, 3)
    routing = compute.Routing.of(taken, index)

    def table(waves: list[list[int]]) -> torch.Tensor:
        out = compute.begin(taken, hidden, index)
        for wave in waves:
            compute.accumulate(taken, hidden, routing, wave, taken.resident, out)
        return out

    asked = routing.asked()
    one = table([asked])
    order = asked[::-1]
    assert torch.equal(table([order[at : at + size] for at in range(0, len(order), size)]), one)
    assert torch.equal(one[5 * 3 + 1], torch.zeros(64))
    rows = torch.cat([routing.rows(expert) for expert in asked])
    offsets = torch.tensor([routing.starts[expert + 1] for expert in asked], dtype=torch.int32)
    stacked = {param.name: torch.stack([taken.resident(e)[param.name] for e in asked]) for param in taken.params}
    assert torch.equal(compute.wave(taken, stacked, hidden, rows // 3, offsets), one[rows])
    assert compute.combine(taken, one, weights, 29).shape == (29, 64)
