"""Faults of the disk, of arguments, of other threads and processes: a clear error, no hang, and never a wrong token."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import shipped
import tiny
import torch
import transformers
from moecore.errors import BudgetError, DeviceError, FileError, MoecoreError, TargetError
from moecore.runtime import budget, rows
from safetensors.torch import load_file, save_file
from shipped import SLOT, TINY_MOE, greedy, load, logits, prompt, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.timeout(60),  # a hang is a failure
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def truth() -> list[torch.Tensor]:
    return shipped.answers()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the trained model, in two shards, to be damaged."""
    copy = tmp_path / "model"
    shutil.copytree(TINY_MOE, copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    places = {name: f"model-{1 + ('layers.5' in name)}-of-2.safetensors" for name in tensors}
    for shard in set(places.values()):
        save_file({k: v for k, v in tensors.items() if places[k] == shard}, copy / shard, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return copy


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with running(folder) as model:
        yield model


def last_shard(folder: Path) -> Path:
    return folder / "model-2-of-2.safetensors"


# ------------------------------------------------------------------------------------------------- files that change
def test_a_shard_deleted_after_loading(model: Any, folder: Path, truth: list[torch.Tensor]) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert torch.equal(greedy(model), truth[0])


def rewrite(shard: Path) -> None:
    """Other weights, in place."""
    with shard.open("r+b") as opened:
        opened.seek(shard.stat().st_size // 3)
        opened.write(os.urandom(1 << 17))


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize("damage", [rewrite, truncate])
def test_a_shard_damaged_and_restored(
    damage: Callable[[Path], None], model: Any, folder: Path, truth: list[torch.Tensor]
) -> None:
    assert torch.equal(greedy(model), truth[0])
    shard = last_shard(folder)
    whole, state = shard.read_bytes(), shard.stat()
    damage(shard)
    for seed in range(4):
        with pytest.raises(FileError, match=r"changed since it was indexed.*load the model again") as caught:
            greedy(model, seed)
    assert "model-2-of-2.safetensors" in str(caught.value.file)
    assert "layers.5.mlp.experts, expert" in str(caught.value.tensor)
    assert "Traceback" not in str(caught.value)
    with shard.open("r+b") as opened:  # the same file, as it was
        opened.write(whole)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    for seed in range(8):
        assert torch.equal(greedy(model, seed), truth[seed])
    assert model.moecore.stats().resident == 11, "a slot was lost"


def test_a_shard_damaged_under_a_prefill(model: Any, folder: Path, truth: list[torch.Tensor]) -> None:
    shard = last_shard(folder)
    state = shard.stat()
    os.utime(shard, ns=(0, 0))
    for _ in range(20):
        with pytest.raises(FileError, match="changed since it was indexed"):
            model(prompt(0, 200))
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert torch.equal(greedy(model), truth[0])


def test_no_wrong_token_while_a_file_is_rewritten(tmp_path: Path) -> None:
    """The file changes at some moment of a read of two 24 MiB rows: the output is right, or there is an error."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=1024, moe_intermediate_size=2048, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=128, decoder_sparse_step=1,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    token, file = torch.tensor([[5]]), tmp_path / "model.safetensors"
    whole, state = file.read_bytes(), file.stat()
    with running(tmp_path, "100%") as model:
        right = model(token).logits
    wrong = errors = 0
    for attempt in range(10):
        with running(tmp_path, "100%") as model, file.open("r+b") as opened:
            opened.seek(1 << 20)

            def write(opened: Any = opened, delay: float = attempt / 1000) -> None:
                time.sleep(delay)
                opened.write(bytes(len(whole) - (1 << 21)))

            thread = threading.Thread(target=write)
            thread.start()
            try:
                wrong += not torch.equal(model(token).logits, right)
            except FileError:
                errors += 1
            thread.join()
            opened.seek(0)
            opened.write(whole)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert wrong == 0, f"{wrong} of 10 outputs were wrong, {errors} raised"


@pytest.mark.parametrize("name", ["model-2-of-2.safetensors", "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "folder", "cut"])
def test_a_folder_that_is_damaged_before(name: str, damage: str, folder: Path) -> None:
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "garbage": b"\xff" * 4096, "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises((MoecoreError, OSError, ValueError)) as caught:
        load(folder)
    assert str(caught.value)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_an_expert_that_does_not_fit(change: str, folder: Path) -> None:
    name = "model.layers.5.mlp.experts.3.down_proj.weight"
    tensors = load_file(last_shard(folder))
    assert name in tensors
    one = tensors.pop(name)
    if change == "shape":
        tensors[name] = one[:, :-1].contiguous()
    elif change == "dtype":
        tensors[name] = one.to(torch.float64)
    save_file(tensors, last_shard(folder), metadata={"format": "pt"})
    with pytest.raises(MoecoreError, match=r"layers\.5\.mlp\.experts"):
        load(folder)


def test_unwrap_while_the_file_is_damaged(model: Any, folder: Path, truth: list[torch.Tensor]) -> None:
    shard = last_shard(folder)
    state = shard.stat()
    os.utime(shard, ns=(0, 0))
    with pytest.raises(FileError, match="changed since"):
        moecore.unwrap(model)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert torch.equal(greedy(model), truth[0])
    assert moecore.unwrap(model) is model


# --------------------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    "text", [SLOT, 2 * SLOT, "96KiB", "98304", "0.1MB", "25%", " 25 % ", "1000%", 2**80, "9" * 400]
)
def test_budgets(text: budget.Budget) -> None:
    with load(TINY_MOE, text).moecore as handle:
        assert 1 <= handle.stats().slots <= 96


@pytest.mark.parametrize(
    "text", [0, -1, True, 1.5, None, "", "x", "0%", "-3%", "nan%", "inf", "1e9", "12 GiBs", b"25%", "25%%", "١٢%%"]
)
def test_budgets_that_are_none(text: Any) -> None:
    with pytest.raises(BudgetError, match="expert_memory"):
        budget.parse(text, 10**9, "expert_memory")


def test_a_budget_too_small() -> None:
    for text in (1, SLOT - 1, "0.5%"):
        with pytest.raises(BudgetError, match="the smallest that works is 49,152 bytes, and 98,304 hold"):
            load(TINY_MOE, text)


@pytest.mark.parametrize("policy", ["", "belady", "LRU ", None, 3])
def test_a_policy_that_is_none(policy: Any) -> None:
    model = tiny.build("qwen3_moe")
    before = logits(model)
    for front in (lambda: load(TINY_MOE, policy=policy), lambda: moecore.wrap(model, policy=policy)):
        with pytest.raises(TargetError, match="choose one of lru"):
            front()
    assert torch.equal(logits(model), before)


def test_a_failed_wrap_leaves_everything(tmp_path: Path) -> None:
    model = tiny.build("qwen3_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    files = len([*Path("/proc/self/fd").iterdir()])
    for kwargs in ({"expert_memory": 1}, {"expert_memory": "x"}, {"spill_dir": tmp_path / "none"}, {"policy": "x"}):
        with pytest.raises(MoecoreError):
            moecore.wrap(model, **kwargs)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len([*Path("/proc/self/fd").iterdir()]) == files
    with moecore.wrap(model, expert_memory="25%").moecore:
        logits(model)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"policy": "belady"}, TargetError, "choose one of lru"),
        ({"expert_memory": "x"}, BudgetError, "expert_memory='x' is not understood"),
        ({"expert_memory": 1}, BudgetError, "the smallest that works"),
        ({"expert_memory": "1%"}, BudgetError, "the smallest that works"),
        ({"expert_memory": None}, BudgetError, "expert_memory must be"),
        ({"expert_memory": "25%", "host_memory": "much"}, BudgetError, "host_memory='much' is not understood"),
        ({"max_model_len": "long"}, TargetError, "max_model_len must be a positive number of tokens"),
        ({"max_model_len": -1}, TargetError, "max_model_len must be a positive number of tokens"),
        ({"max_model_len": 1 << 50}, BudgetError, "the smallest that works"),
    ],
)
def test_arguments_that_are_wrong_write_nothing(
    kwargs: dict[str, Any],
    error: type[MoecoreError],
    says: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk has no room for experts that nobody will run; and a loader has read them all by then."""
    model = tiny.build("qwen3_moe")
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    written: list[Any] = []
    monkeypatch.setattr(rows, "Spill", lambda *args: written.append(args))
    with pytest.raises(error, match=says):
        moecore.wrap(model, spill_dir=tmp_path, **kwargs)
    assert not written
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert "moecore" not in vars(model)
    monkeypatch.setattr(moecore.runtime.rows, "from_index", lambda *args: written.append(args))
    with pytest.raises(error, match=says):
        moecore.load(folder, device="cpu", **{"expert_memory": "auto", **kwargs})
    assert not written


def test_a_model_on_another_kind_of_device_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("qwen3_moe")
    monkeypatch.setattr(rows, "Spill", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(moecore.runtime.takeover, "device_of", lambda _: torch.device("mps"))
    with pytest.raises(DeviceError, match="runs experts on the CPU and on NVIDIA GPUs, not on mps"):
        moecore.wrap(model, expert_memory="25%", spill_dir=tmp_path)
    with pytest.raises(DeviceError, match="not on mps"):
        moecore.load("there/is-none", device="mps")


# ---------------------------------------------------------------------------------------------------- no room on disk
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("qwen3_moe")
    before = logits(model)
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(FileError, match=r"MiB are needed .* 4\.0 KiB are free; name another folder with spill_dir="):
        moecore.wrap(model, expert_memory="25%", spill_dir=tmp_path)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("short", [1, 4096, 98304, 1 << 20])
def test_a_disk_that_is_full_in_the_middle(short: int, tmp_path: Path) -> None:
    """A write that ends `short` bytes before the end takes a part first; that must not count as the whole."""
    model = tiny.build("qwen3_moe")
    before = logits(model)
    size = 48 * 98304
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - short, limits[1]))
    try:
        with pytest.raises(FileError, match="cannot write experts there"):
            moecore.wrap(model, expert_memory="25%", spill_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), before)


def test_writes_that_take_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("qwen3_moe")
    before = logits(model)
    real = os.fdopen

    def fdopen(*args: Any, **kwargs: Any) -> Any:
        file = real(*args, **kwargs)
        return types.SimpleNamespace(write=lambda data: file.write(data[:50_000]), fileno=file.fileno, close=file.close)

    monkeypatch.setattr(rows.os, "fdopen", fdopen)
    with moecore.wrap(model, expert_memory="25%").moecore:
        assert torch.equal(logits(model), before)
