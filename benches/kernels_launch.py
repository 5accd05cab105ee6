"""Kernels compiled with other numbers than the shipped ones, for `kernels_sweep.py`: nvcc or NVRTC, and the driver.

On a machine without a GPU the same launches go to the emulator of tests/kernels, so that the script can be tried there.
"""

from __future__ import annotations

import ctypes
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "cuda"))
from launch import KERNELS, ExpertArgs, Module, compile_one  # noqa: E402  # the path comes first

__all__ = ["CombineArgs", "ExpertArgs", "GateArgs", "PermuteArgs", "RouteArgs"]

Defines = dict[str, int]


def fields(pointers: str, *rest: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Addresses first, then numbers of a type."""
    found = [(name, c_uint64) for name in pointers.split()]
    return found + [(name, kind) for names, kind in rest for name in names.split()]


class GateArgs(ctypes.Structure):
    """As cuda/routing.cuh has it."""

    _fields_ = fields(
        "logits bias weights ids valid", ("stride", c_uint64),
        ("tokens experts k groups top_groups scoring flags weights_format", c_uint32), ("scale eps", c_float),
    )  # fmt: skip


class RouteArgs(ctypes.Structure):
    """As cuda/routing.cuh has it."""

    _fields_ = [
        ("gate", GateArgs),
        *fields(
            "bin_of ends source inverse counts starts x rows scales", ("bins row_bytes x_format tile", c_uint32)
        ),
    ]  # fmt: skip


class PermuteArgs(ctypes.Structure):
    """As cuda/routing.cuh has it."""

    _fields_ = fields("x inverse out scales", ("tokens k rows row_bytes x_format reserved", c_uint32))


class CombineArgs(ctypes.Structure):
    """As cuda/routing.cuh has it."""

    _fields_ = fields(
        "rows inverse weights shared residual out", ("tokens k row_count row_bytes weights_format", c_uint32),
        ("scale", c_float),
    )  # fmt: skip


for one, size in ((GateArgs, 88), (RouteArgs, 176), (PermuteArgs, 56), (CombineArgs, 72), (ExpertArgs, 96)):
    assert ctypes.sizeof(one) == size, one


class Attribute(ctypes.Structure):
    """`CUlaunchAttribute`: a number, padding, a value of 64 bytes."""

    _fields_ = [("id", c_uint32), ("pad", c_uint32), ("value", c_uint32 * 16)]


class Config(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = [
        ("grid", c_uint32 * 3), ("block", c_uint32 * 3), ("shared", c_uint32), ("stream", c_void_p),
        ("attributes", ctypes.POINTER(Attribute)), ("count", c_uint32),
    ]  # fmt: skip


assert (ctypes.sizeof(Attribute), ctypes.sizeof(Config)) == (72, 56)
#: Numbers of launch attributes and of a function's.
CLUSTER, SERIALIZATION, MAX_DYNAMIC_SHARED = 4, 6, 8


@dataclass(frozen=True)
class Launch:
    """One launch but for its arguments. `early`: it may begin before the one before it is over (PDL)."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared: int = 0
    cluster: int = 0
    early: bool = False


class Gpu(Module):
    """A cubin, with all that launches can have."""

    def start(self, launch: Launch, args: ctypes.Structure, stream: int) -> None:
        """One launch."""
        if not launch.cluster and not launch.early and launch.shared == 0:
            self.launch(launch.kernel, launch.grid, launch.threads, args, stream)
            return
        function = self.functions.get(launch.kernel)
        if function is None:
            function = c_void_p()
            status = self.driver.cuModuleGetFunction(ctypes.byref(function), self.module, launch.kernel.encode())
            self._check(status, launch.kernel)
            self.functions[launch.kernel] = function
        if launch.shared > 48 << 10:
            self._check(self.driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, launch.shared), "shared memory")
        wanted = []
        if launch.cluster:
            wanted.append(Attribute(CLUSTER, 0, (c_uint32 * 16)(launch.cluster, 1, 1)))
        if launch.early:
            wanted.append(Attribute(SERIALIZATION, 0, (c_uint32 * 16)(1)))
        attributes = (Attribute * max(1, len(wanted)))(*wanted)
        config = Config(
            (c_uint32 * 3)(*launch.grid, 1), (c_uint32 * 3)(launch.threads, 1, 1), launch.shared, stream, attributes,
            len(wanted),
        )  # fmt: skip
        parameters = (c_void_p * 1)(ctypes.addressof(args))
        self._check(self.driver.cuLaunchKernelEx(ctypes.byref(config), function, parameters, None), launch.kernel)


class Emulated:
    """The same kernels on a CPU."""

    def __init__(self, source: str, defines: Defines) -> None:
        sys.path.insert(0, str(HERE.parent / "tests" / "kernels"))
        import emulated  # type: ignore[import-not-found]

        self.emulated = emulated
        self.library = emulated.library(source, *(f"{name}={value}" for name, value in sorted(defines.items())))

    def start(self, launch: Launch, args: ctypes.Structure, stream: int) -> None:
        """One launch, over when it returns."""
        given = self.theirs(args)
        cluster = launch.cluster or 1
        self.library.launch(launch.kernel, launch.grid, launch.threads, launch.shared, given, cluster=cluster)

    def theirs(self, args: ctypes.Structure) -> Any:
        """Arguments in the emulator's own class: it knows by that that addresses are all it gets."""
        values = {name: getattr(args, name) for name, *_ in args._fields_}
        values = {name: self.theirs(one) if isinstance(one, ctypes.Structure) else one for name, one in values.items()}
        return getattr(self.emulated, type(args).__name__)(**values)


# ---------------------------------------------------------------------------------------------------------- compilation


def tuned() -> Defines:
    """The defaults of cuda/tuning.cuh."""
    text = (KERNELS / "tuning.cuh").read_text()
    return {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)\s*$", text, re.MULTILINE)}


def closure(source: str) -> list[Path]:
    """A source and all that it includes."""
    found: list[Path] = []
    todo = [KERNELS / source]
    while todo:
        path = todo.pop()
        if path not in found and path.exists():
            found.append(path)
            todo += [KERNELS / name for name in re.findall(r'#include "([^"]+)"', path.read_text())]
    return found


def relevant(source: str, defines: Defines) -> Defines:
    """The numbers that the code looks at: the others shape launches alone, and cost no compilation."""
    text = "".join(path.read_text() for path in closure(source) if path.name != "tuning.cuh")
    return {name: value for name, value in defines.items() if re.search(rf"\b{name}\b", text)}


def nvcc() -> str | None:
    """The compiler, where there is one."""
    places = [os.environ.get("NVCC"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and Path(place).exists()), None)


class Cubins:
    """Machine code by source and numbers, kept in a folder."""

    def __init__(self, folder: Path | None, arch: str = "sm_90") -> None:
        self.folder = folder or Path(tempfile.mkdtemp())
        self.folder.mkdir(parents=True, exist_ok=True)
        self.arch = arch
        self.failed: dict[str, str] = {}

    def path(self, source: str, defines: Defines) -> Path:
        """Where it lies, by all that it depends on."""
        parts = [source, self.arch, *(f"{name}={value}" for name, value in sorted(relevant(source, defines).items()))]
        digest = hashlib.sha256("\0".join(parts).encode())
        for one in sorted(closure(source)):
            digest.update(one.read_bytes())
        return self.folder / f"{Path(source).stem}-{digest.hexdigest()[:16]}.cubin.xz"

    def compile(self, jobs: list[tuple[str, Defines]], workers: int | None = None) -> None:
        """All that is not there yet, side by side. What does not compile is in `failed`."""
        todo = {self.path(source, defines): (source, defines) for source, defines in jobs}
        missing = [(path, *job) for path, job in todo.items() if not path.exists()]
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            for path, error in pool.map(self._one, missing):
                if error:
                    self.failed[path.name] = error

    def _one(self, job: tuple[Path, str, Defines]) -> tuple[Path, str | None]:
        path, source, defines = job
        wanted = relevant(source, defines)
        compiler = nvcc()
        half = path.with_suffix(".half")
        try:
            if compiler is None:
                code = compile_one((str(KERNELS / source), tuple(sorted(wanted.items())), self.arch))
            else:
                options = [f"-D{name}={value}" for name, value in sorted(wanted.items())]
                command = [compiler, "-cubin", f"-arch={self.arch}", "-O3", "-std=c++17", *options]
                command += ["-o", str(half), str(KERNELS / source)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=400)
                if done.returncode:
                    return path, (done.stderr.strip().splitlines() or ["nvcc failed"])[0][:300]
                code = half.read_bytes()
            half.write_bytes(lzma.compress(code, preset=2))
            half.replace(path)
        except Exception as error:
            return path, str(error)[:300]
        return path, None

    def load(self, source: str, defines: Defines) -> Gpu:
        """A module."""
        path = self.path(source, defines)
        if not path.exists():
            raise RuntimeError(self.failed.get(path.name, "not compiled"))
        return Gpu(lzma.decompress(path.read_bytes()))
