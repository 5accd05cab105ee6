"""Other threads and processes, and what ends in the middle of work: a clear error, no hang, the same tokens after."""

from __future__ import annotations

import _thread
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import moecore
import pytest
import shipped
import tiny
import torch
import transformers
from moecore.errors import DeviceError, MoecoreError
from shipped import SLOT, TINY_MOE, greedy, load, logits, prompt, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.timeout(60),  # a hang is a failure
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def truth() -> list[torch.Tensor]:
    return shipped.answers()


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


def script(text: str, *args: Any, **environment: str) -> str:
    """Runs a program that prints what it found."""
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    head = "import os, sys, signal, threading, time\nimport tiny, torch, moecore\ntorch.set_num_threads(1)\n"
    ran = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(text), *map(str, args)],
        capture_output=True, text=True, timeout=55, env=os.environ | environment,
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


def test_a_repo_of_the_hub(tmp_path: Path, truth: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TINY_MOE.parents[1]))
    from fakehub import FakeHub

    files = {path.name: path.read_bytes() for path in TINY_MOE.iterdir() if path.suffix in (".json", ".safetensors")}
    with FakeHub() as hub:
        hub.add("org/tiny", files)
        found = script(
            """
            ids = torch.tensor([list(map(int, sys.argv[1].split(",")))])
            with moecore.load("org/tiny", expert_memory="12%", device="cpu").moecore as handle:
                pass
            model = moecore.load("org/tiny", expert_memory="12%", device="cpu")
            print(model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist())
            """,
            ",".join(map(str, prompt(0)[0].tolist())),
            HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET="1",
        )  # fmt: skip
    assert json.loads(found.splitlines()[-1]) == truth[0][0].tolist()
