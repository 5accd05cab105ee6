"""The house keeps its arrows: who may know whom, read from the `use` and `import` lines themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Rooms of the core crate and the rooms each may use. `error` and `dtype` are the ground floor.
ROOMS: dict[str, set[str]] = {
    "error": set(),
    "dtype": set(),
    "header": {"dtype", "error"},
    "scan": {"header", "dtype", "error"},
    "model": {"header", "dtype", "error"},
    "memory": {"model", "header", "dtype", "error"},
    "experts": {"error"},
    "telemetry": set(),
    "device": {"experts", "error"},
    "io": {"experts", "error"},
    "residency": {"error"},
    "scheduler": {"residency", "io", "device", "telemetry", "experts", "error"},
}

#: Crates and the crates of this workspace each may use.
CRATES: dict[str, set[str]] = {
    "moecore": set(),
    "moecore-cuda": {"moecore"},
    "moecore-py": {"moecore", "moecore-cuda"},
}

#: Modules of the Python package and what each may import from it.
MODULES: dict[str, set[str]] = {
    "errors": set(),
    "report": {"render"},
    "render": {"report"},
    "hub": {"errors", "_core"},
    "scan": {"errors", "hub", "report", "_core"},
    "output": {"errors", "render", "report"},
    "progress": {"render", "report", "scan"},
    "cli": {"errors", "output", "progress", "report", "scan", "runtime", "_core"},
    "__init__": {"errors", "ops", "report", "runtime", "scan", "_core"},
    "__main__": {"cli"},
}

#: What the runtime may import of the rest of the package: it stands beside the scan, not on it.
RUNTIME = {"errors", "ops", "_core"}

#: What the ops may import: they know tensors, not models.
OPS = {"errors", "_core"}

#: What an installation without extras does not have.
OPTIONAL = {"torch", "transformers"}


def rust_uses(source: str) -> set[str]:
    """First names after `crate::` outside of test modules."""
    code = re.sub(r"//[^\n]*", "", source.split("#[cfg(test)]\nmod tests {")[0])
    names = set(re.findall(r"\bcrate::(\w+)", code))
    for group in re.findall(r"\bcrate::\{([^;]*)\}", code):
        names |= set(re.findall(r"(?:^|,)\s*(\w+)", group))
    return names


def python_imports(source: str) -> set[str]:
    """Full names of imported modules; `from moecore import x` counts as `moecore.x`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "moecore":
                names |= {f"moecore.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def test_rooms_of_the_core() -> None:
    source = ROOT / "rust/moecore/src"
    rooms = {path.stem for path in source.iterdir() if path.name not in ("lib.rs",)}
    assert rooms == set(ROOMS), "a new room needs its arrows here and in ARCHITECTURE.md"
    for room, allowed in ROOMS.items():
        files = [source / f"{room}.rs"] if (source / f"{room}.rs").exists() else sorted((source / room).rglob("*.rs"))
        for path in files:
            if "tests" in path.parts or path.name == "tests.rs":
                continue
            # `crate::Error` and its like are re-exports of `error`.
            used = {name for name in rust_uses(path.read_text()) if name[0].islower()} - {room}
            assert used <= allowed, f"{path.relative_to(ROOT)} uses {sorted(used - allowed)}"


def test_crates_of_the_workspace() -> None:
    for crate, allowed in CRATES.items():
        manifest = (ROOT / "rust" / crate / "Cargo.toml").read_text()
        used = set(re.findall(r"^(moecore[\w-]*)(?:\.workspace)? *=", manifest, re.MULTILINE))
        assert used <= allowed
        if crate != "moecore-py":
            assert "pyo3" not in manifest, "Python is known to the bindings alone"


@pytest.mark.parametrize("path", sorted((ROOT / "python/moecore").glob("*.py")), ids=lambda path: path.stem)
def test_modules_of_the_package(path: Path) -> None:
    imports = python_imports(path.read_text())
    own = {name.split(".")[1] for name in imports if name.startswith("moecore.")}
    assert own <= MODULES[path.stem], f"{path.name} imports {sorted(own - MODULES[path.stem])}"
    assert not {name.split(".")[0] for name in imports} & OPTIONAL


@pytest.mark.parametrize("path", sorted((ROOT / "python/moecore/runtime").rglob("*.py")), ids=lambda path: path.stem)
def test_modules_of_the_runtime(path: Path) -> None:
    own = {name.split(".")[1] for name in python_imports(path.read_text()) if name.startswith("moecore.")}
    assert own <= RUNTIME, f"{path.name} imports {sorted(own - RUNTIME)}"


@pytest.mark.parametrize("path", sorted((ROOT / "python/moecore/ops").rglob("*.py")), ids=lambda path: path.stem)
def test_modules_of_the_ops(path: Path) -> None:
    own = {name.split(".")[1] for name in python_imports(path.read_text()) if name.startswith("moecore.")}
    assert own <= OPS, f"{path.name} imports {sorted(own - OPS)}"


def test_gpu_code_is_in_its_crate_alone() -> None:
    for path in (ROOT / "rust").rglob("*.rs"):
        if "moecore-cuda" not in path.parts:
            text = path.read_text()
            assert "libloading" not in text, path
            assert "libcuda" not in text, path


def test_the_readers_see_what_they_should() -> None:
    assert rust_uses("use crate::{scan::http, Error};\n// crate::model\nlet x = crate::header::y();") == {
        "scan",
        "Error",
        "header",
    }
    assert python_imports("from moecore import hub as h\nimport moecore.scan\nfrom moecore.report import X") == {
        "moecore.hub",
        "moecore.scan",
        "moecore.report",
    }
