"""The wheel as a user gets it: installed into an empty environment, it scans, and has brought no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import realrepo

WHEELS = Path(__file__).parents[1] / "target/test-wheel"


def test_the_wheel_scans_in_an_empty_environment(tmp_path: Path) -> None:
    wheels = sorted(WHEELS.glob("moecore-*.whl"))
    if not wheels:
        pytest.skip("no wheel is built; `make test` builds one")
    assert "-cp310-abi3-" in wheels[-1].name, "one wheel for Python 3.10 and newer"
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheels[-1])], check=True, cwd=tmp_path)

    realrepo.build("openai/gpt-oss-20b", tmp_path / "repo")
    moecore = python.with_name("moecore")
    done = subprocess.run(
        [moecore, "scan", tmp_path / "repo", "--format", "json"], check=True, capture_output=True, cwd=tmp_path
    )
    assert json.loads(done.stdout)["bytes"]["total"] == 13_761_264_768  # `total_size` of the real index

    probe = "import sys, moecore; print(moecore.__version__, sorted({'torch', 'transformers'} & set(sys.modules)))"
    shown = subprocess.run([python, "-c", probe], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert shown.split(maxsplit=1)[1].strip() == "[]"
    installed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert "torch" not in installed
    listing = "import moecore, pathlib; print(*(p.name for p in pathlib.Path(moecore.__file__).parent.iterdir()))"
    files = subprocess.run([python, "-c", listing], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert {"py.typed", "_core.pyi"} <= set(files.split())
