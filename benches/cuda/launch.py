"""Kernels compiled with other numbers than the shipped ones, launched by the bench: NVRTC and driver by ctypes."""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ProcessPoolExecutor
from ctypes import c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from multiprocessing import get_context
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[2] / "cuda"


def _nvrtc() -> ctypes.CDLL:
    # torch brings it; its folder is not on the loader's path.
    found = [path for folder in sys.path for path in Path(folder).glob("nvidia/*/lib/libnvrtc.so.*")]
    for name in [*map(str, found), "libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise SystemExit("no NVRTC: install torch for CUDA, or nvidia-cuda-nvrtc")


def compile_one(job: tuple[str, tuple[tuple[str, int], ...], str]) -> bytes:
    """Machine code of a source under some -D, for one architecture."""
    source, defines, arch = job
    lib = _nvrtc()
    program, size = c_void_p(), c_size_t()
    path = Path(source)
    args = (ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None)
    assert lib.nvrtcCreateProgram(*args) == 0
    options = [f"--gpu-architecture={arch}", "--std=c++17", f"-I{KERNELS}", f"-I{path.parent}"]
    encoded = [option.encode() for option in [*options, *(f"-D{name}={value}" for name, value in defines)]]
    status = lib.nvrtcCompileProgram(program, len(encoded), (c_char_p * len(encoded))(*encoded))
    if status != 0:
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{path.name} {defines}: {log.value.decode()}")
    lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetCUBIN(program, code)
    return code.raw


def compile_all(jobs: list[tuple[str, tuple[tuple[str, int], ...], str]]) -> list[bytes]:
    """Compiles in processes of their own: NVRTC has locks."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, jobs))


class AcquireArgs(ctypes.Structure):
    """`AcquireArgs` of cuda/mailbox.cuh."""

    _fields_ = [
        *[
            (n, c_uint64)
            for n in ["ids", "slots", "table", "counts", "state", "mailbox", "arena", "slot_bytes", "row_bytes"]
        ],
        *[(n, c_uint32) for n in ["pairs", "layer", "first", "experts", "phase", "reserved"]],
    ]


class ExpertArgs(ctypes.Structure):
    """`ExpertArgs` of cuda/experts.cu."""

    _fields_ = [
        *[(n, c_uint64) for n in ["arena", "slot_bytes", "offset", "bias_offset", "x", "slots", "weights", "out"]],
        *[(n, c_uint32) for n in ["tokens", "k", "inputs", "outputs", "act", "flags", "slot_count", "reserved"]],
    ]


class Module:
    """Machine code in torch's context."""

    def __init__(self, code: bytes) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.module = c_void_p()
        self._check(self.driver.cuModuleLoadData(ctypes.byref(self.module), code), "cuModuleLoadData")
        self.functions: dict[str, c_void_p] = {}

    def launch(self, name: str, grid: tuple[int, int], threads: int, args: ctypes.Structure, stream: int) -> None:
        """One launch of a kernel that takes one struct."""
        function = self.functions.get(name)
        if function is None:
            function = self.functions[name] = c_void_p()
            status = self.driver.cuModuleGetFunction(ctypes.byref(function), self.module, name.encode())
            self._check(status, name)
        parameters = (c_void_p * 1)(ctypes.addressof(args))
        status = self.driver.cuLaunchKernel(
            function, grid[0], grid[1], 1, threads, 1, 1, 0, c_void_p(stream), parameters, None
        )
        self._check(status, name)

    def wait_for_word(self, stream: int, address: int, value: int) -> None:
        """Holds a stream until a 32-bit word equals `value`."""
        status = self.driver.cuStreamWaitValue32_v2(c_void_p(stream), c_uint64(address), c_uint32(value), c_int(1))
        self._check(status, "cuStreamWaitValue32")

    @staticmethod
    def _check(status: int, what: str) -> None:
        if status != 0:
            raise RuntimeError(f"{what}: CUDA error {status}")


def acquire_args(rig: Any, mailbox: int, ids: Any, slots: Any) -> AcquireArgs:
    """The arguments of a call of layer 0 of a rig."""
    return AcquireArgs(
        ids=ids.data_ptr(), slots=slots.data_ptr(), table=rig.table.data_ptr(), counts=rig.counts.data_ptr(),
        state=rig.state.data_ptr(), mailbox=mailbox, arena=rig.arena.data_ptr(), slot_bytes=rig.slot_bytes,
        row_bytes=rig.row_bytes, pairs=ids.numel(), layer=0, first=0, experts=rig.experts, phase=0, reserved=0,
    )  # fmt: skip
