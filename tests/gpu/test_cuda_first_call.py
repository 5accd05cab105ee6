"""The first call of a process in the midst of a capture: a clear error, after which the graph's owner can go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import need  # noqa: F401
import pytest

PRELUDE = """
import torch, moecore
from moecore import ops
from moecore.errors import DeviceError

logits = torch.randn(4, 64, device="cuda")

def captured(call):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    torch.cuda.synchronize()
    return out

def check():
    weights, ids = captured(lambda: ops.gate(logits, 4))
    assert torch.equal(ids.long(), logits.topk(4).indices)
"""

REFUSED = """
for gate in (ops.gate, torch.ops.moecore.gate):
    try:
        captured(lambda: gate(logits, 4))
    except DeviceError as error:
        assert "call once before you capture" in str(error), error
    else:
        raise AssertionError("the first call was captured")
ops.gate(logits, 4)
check()
"""

LOADED = """
from moecore.ops import launch
launch.load(0)
check()
"""

FUSED = """
import tiny
model = tiny.build("qwen3_moe").to("cuda", torch.bfloat16)
moecore.fuse(model)
check()
"""


@pytest.mark.parametrize("program", [REFUSED, LOADED, FUSED], ids=["refused", "loaded", "fused"])
def test_the_first_call_of_a_process(program: str) -> None:
    tests = Path(__file__).parents[1]
    paths = [*sys.path, str(tests / "runtime"), str(tests / "tools")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", PRELUDE + program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
