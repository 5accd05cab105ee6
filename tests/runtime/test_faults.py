"""Faults: of the disk, of the arguments, of other threads and processes. A clear error, no hang, and never a wrong token."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import tiny
import torch
import transformers
from moecore.errors import BudgetError, DeviceError, FileError, MoecoreError, TargetError
from moecore.runtime import budget, rows
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TINY_MOE = Path(__file__).parents[1] / "data" / "tiny-moe"
SLOT = 49152
NEW = 8

pytestmark = [
    pytest.mark.timeout(60),  # a hang is a failure
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def prompt(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 2000, (1, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(0) % 100).logits


def greedy(model: Any, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    ids = prompt(seed)
    kwargs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | kwargs
    with torch.no_grad(), tiny.quiet():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)


@pytest.fixture(scope="module")
def truth() -> list[torch.Tensor]:
    """What the resident model says to some prompts."""
    model = tiny.aligned(transformers.AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype="auto").eval())
    model.set_experts_implementation("grouped_mm")
    return [greedy(model, seed) for seed in range(8)]


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


def load(folder: Path, expert_memory: budget.Budget = "12%", **kwargs: Any) -> Any:
    return tiny.aligned(moecore.load(folder, expert_memory=expert_memory, device="cpu", **kwargs))


@contextlib.contextmanager
def running(folder: Path = TINY_MOE, expert_memory: budget.Budget = "12%", **kwargs: Any) -> Iterator[Any]:
    model = load(folder, expert_memory, **kwargs)
    with model.moecore:
        yield model


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
    if change == "dtype":  # other bytes, the same numbers: loads, by way of a spill file
        with running(folder):
            return
    with pytest.raises(MoecoreError, match=r"layers\.5\.mlp\.experts"):
        load(folder)


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
    files = len(os.listdir("/proc/self/fd"))
    for kwargs in ({"expert_memory": 1}, {"expert_memory": "x"}, {"spill_dir": tmp_path / "none"}, {"policy": "x"}):
        with pytest.raises(MoecoreError):
            moecore.wrap(model, **kwargs)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(os.listdir("/proc/self/fd")) == files
    with moecore.wrap(model, expert_memory="25%").moecore:
        logits(model)


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


# ------------------------------------------------------------------------------------------------- threads, processes
def test_two_models(truth: list[torch.Tensor]) -> None:
    other = tiny.build("qwen3_moe")
    before = logits(other)
    with running() as one, running(TINY_MOE, "25%") as two, moecore.wrap(other, expert_memory="12%").moecore:
        for seed in range(3):
            assert torch.equal(greedy(one, seed), truth[seed])
            assert torch.equal(greedy(two, seed), truth[seed])
            assert torch.equal(logits(other), before)
        one.moecore.close()
        assert torch.equal(greedy(two), truth[0])


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 24, 96])
def test_threads(slots: int, truth: list[torch.Tensor]) -> None:
    """Long prompts stream while the steps of other threads go through the cache, in few slots."""
    found: dict[int, list[bool]] = {}
    with running(TINY_MOE, slots * SLOT) as model:

        def work(number: int) -> None:
            with torch.no_grad():
                model(prompt(number, 40))
            found[number] = [torch.equal(greedy(model, seed), truth[seed]) for seed in (number, (number + 3) % 8)]

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert found == {number: [True, True] for number in range(5)}


def in_child(work: Callable[[], None]) -> int:
    """How a forked child ends; SIGALRM ends one that hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        status = 0
        try:
            work()
        except DeviceError as error:
            status = 3 if "forked" in str(error) else 4
        except BaseException:
            status = 5
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork(truth: list[torch.Tensor]) -> None:
    with running() as model:
        greedy(model)
        assert in_child(lambda: greedy(model)) == 3
        assert in_child(lambda: moecore.unwrap(model)) == 3
        assert in_child(lambda: model.moecore.close()) == 0
        assert in_child(lambda: print(model.moecore.report(), file=open(os.devnull, "w"))) == 0  # noqa: PTH123, SIM115
        assert torch.equal(greedy(model), truth[0])
    with running() as model:
        assert in_child(lambda: reload(truth)) == 0


def reload(truth: list[torch.Tensor]) -> None:
    with running() as model:
        if not torch.equal(greedy(model), truth[0]):
            raise AssertionError


def script(text: str, *args: Any, timeout: float = 45) -> str:
    """Runs a program that prints what it found."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    head = "import os, sys, signal, threading, time\nimport tiny, torch, moecore\ntorch.set_num_threads(1)\n"
    ran = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(text), *map(str, args)],
        capture_output=True, text=True, timeout=timeout, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_a_forked_child_that_ends_in_its_own_time() -> None:
    """The interpreter of the child frees everything at its end: nothing of it may wait for threads of the parent."""
    found = script(
        """
        import gc
        model = moecore.load(sys.argv[1], expert_memory="12%", device="cpu")
        model(torch.tensor([[5, 6, 7]]))
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            del model
            gc.collect()
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        TINY_MOE,
    )
    assert found.split()[-1] == "0"


# ------------------------------------------------------------------------------------- what ends in the middle of work
class Raises(transformers.LogitsProcessor):
    """Fails at the third token."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return scores


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt(), MemoryError()])
def test_an_exception_inside_generate(error: BaseException, truth: list[torch.Tensor]) -> None:
    with running() as model:
        for _ in range(3):
            with pytest.raises(type(error)):
                greedy(model, logits_processor=[Raises(error)])
            assert torch.equal(greedy(model), truth[0])


@pytest.mark.parametrize("long", [False, True])
def test_an_exception_inside_an_expert(long: bool, truth: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots of a call that fails are given back: with 3 of them, one lost would hang the next call."""
    with running(TINY_MOE, 3 * SLOT) as model:
        real = moecore.runtime.compute.expert_rows
        for _ in range(6):
            monkeypatch.setattr(moecore.runtime.compute, "expert_rows", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(prompt(0, 60 if long else 2))
            monkeypatch.setattr(moecore.runtime.compute, "expert_rows", real)
        assert torch.equal(greedy(model), truth[0])


@pytest.mark.parametrize("memory", [SLOT, 3 * SLOT, 11 * SLOT])
def test_interrupts_at_any_moment(memory: int, truth: list[torch.Tensor]) -> None:
    with running(TINY_MOE, memory) as model:
        hit = 0
        for attempt in range(25):
            timer = threading.Timer(0.001 * attempt, _thread.interrupt_main)
            try:
                timer.start()
                greedy(model, attempt % 8)
                timer.join()
                time.sleep(0.01)
            except KeyboardInterrupt:
                hit += 1
        assert hit
        for seed in range(3):
            assert torch.equal(greedy(model, seed), truth[seed])


@pytest.mark.parametrize("length", [9, 200])
def test_close_while_another_thread_generates(length: int) -> None:
    for attempt in range(6):
        model = load(TINY_MOE, 5 * SLOT)
        caught: list[BaseException] = []

        def work(model: Any = model, caught: list[BaseException] = caught) -> None:
            try:
                for seed in range(100):
                    with torch.no_grad():
                        model(prompt(seed, length))
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        time.sleep(0.02 + 0.003 * attempt)
        model.moecore.close()
        thread.join(20)
        assert not thread.is_alive(), "the thread hangs"
        assert type(caught[0]) is MoecoreError
        assert "were closed; load or wrap the model again" in str(caught[0])


def test_unwrap_while_the_file_is_damaged(model: Any, folder: Path, truth: list[torch.Tensor]) -> None:
    shard = last_shard(folder)
    state = shard.stat()
    os.utime(shard, ns=(0, 0))
    with pytest.raises(FileError, match="changed since"):
        moecore.unwrap(model)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert torch.equal(greedy(model), truth[0])
    assert moecore.unwrap(model) is model
