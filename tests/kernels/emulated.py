"""The project's CUDA kernels on the CPU: compiled by g++, launched on ordinary memory. See README.md here."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "cuda"
#: The files of the emulator: what a library is built of besides the kernels.
RUNTIME = ("emulate.hpp", "fibers.hpp", "meeting.hpp", "emulate.cpp", "checks.hpp", "checks.cpp")
#: Seeds that differ most: ascending, descending, by turns, by chance.
SCHEDULES = (0, 1, 2, 3)
#: Text after a kernel's own: how a launch calls it, and what it expects.
EPILOGUE = """
#define UNCHECKED __attribute__((noinline, no_sanitize("thread")))
template <class... Left> struct emulated_call {
    template <class K, class... Got> UNCHECKED static void go(K kernel, const void *const *, const Got &...got) {
        kernel(got...);
    }
};
template <class First, class... Left> struct emulated_call<First, Left...> {
    template <class K, class... Got>
    UNCHECKED static void go(K kernel, const void *const *args, const Got &...got) {
        emulated_call<Left...>::go(kernel, args + 1, got..., *(const First *)args[0]);
    }
};
template <class... A> static void emulated_go(void (*kernel)(A...), const void *const *args) {
    emulated_call<A...>::go(kernel, args);
}
template <class... A> UNCHECKED static void emulated_sizes(void (*)(A...), unsigned long *into) {
    const unsigned long sizes[] = {sizeof...(A), sizeof(A)..., 0};
    for (unsigned i = 0; i <= sizeof...(A); ++i)
        into[i] = sizes[i];
}
"""
KERNEL = re.compile(r'extern "C" __global__ ([^{;]*?)\b(\w+)\s*\(((?:const )?\w[^(){};]*)\)\s*\{')
BOUNDS = re.compile(r"__launch_bounds__\s*\(")


class EmulatedError(RuntimeError):
    """A launch that went wrong: a deadlock, a misuse of an intrinsic, arguments that do not fit the kernel."""


class _Args(ctypes.Structure):
    """Arguments by name. A pointer is an address, a tensor, an array or None; what is left out is 0."""

    def __init__(self, **given: Any) -> None:
        self.kept = given  # the memory lives as long as its address
        known = {name for name, *_ in self._fields_}
        if extra := given.keys() - known:
            raise TypeError(f"{type(self).__name__} has no {sorted(extra)}")
        super().__init__(**{name: address(value) for name, value in given.items()})


def address(value: Any) -> Any:
    """The address of a tensor's or an array's memory; anything else as it is."""
    if hasattr(value, "data_ptr"):
        return value.data_ptr() or None
    if hasattr(value, "__array_interface__"):
        return value.__array_interface__["data"][0]
    return value


def _fields(pointers: str, rest: str) -> list[tuple[str, Any]]:
    kinds = {"u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "f32": ctypes.c_float}
    out: list[tuple[str, Any]] = [(name, ctypes.c_void_p) for name in pointers.split()]
    return out + [(name, kinds[kind]) for name, kind in (word.split(":") for word in rest.split())]


class GateArgs(_Args):
    _fields_ = _fields(
        "logits bias weights ids valid",
        "stride:u64 tokens:u32 experts:u32 k:u32 groups:u32 top_groups:u32 scoring:u32 flags:u32 weights_format:u32"
        " scale:f32 eps:f32",
    )


class RouteArgs(_Args):
    _fields_ = [
        ("gate", GateArgs),
        *_fields(
            "bin_of ends source inverse counts starts x rows scales", "bins:u32 row_bytes:u32 x_format:u32 tile:u32"
        ),
    ]


class PermuteArgs(_Args):
    _fields_ = _fields("x inverse out scales", "tokens:u32 k:u32 rows:u32 row_bytes:u32 x_format:u32 reserved:u32")


class CombineArgs(_Args):
    _fields_ = _fields(
        "rows inverse weights shared residual out",
        "tokens:u32 k:u32 row_count:u32 row_bytes:u32 weights_format:u32 scale:f32",
    )


class AlignArgs(_Args):
    _fields_ = _fields("ends inverse order owner places", "pairs:u32 bins:u32 block:u32 capacity:u32")


class ExpertArgs(_Args):
    _fields_ = [
        ("arena", ctypes.c_void_p),
        *_fields("", "slot_bytes:u64 offset:u64 bias_offset:u64"),
        *_fields(
            "x slots weights out",
            "tokens:u32 k:u32 inputs:u32 outputs:u32 act:u32 flags:u32 slot_count:u32 reserved:u32",
        ),
    ]


for _type, _size in (
    (GateArgs, 88),
    (RouteArgs, 176),
    (PermuteArgs, 56),
    (CombineArgs, 72),
    (AlignArgs, 56),
    (ExpertArgs, 96),
):
    if ctypes.sizeof(_type) != _size:
        raise AssertionError(f"{_type.__name__} has {ctypes.sizeof(_type)} bytes, not {_size}")


class Library:
    """The kernels of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        self._lib.emulated_launch.restype = ctypes.c_char_p
        self._lib.emulated_names.restype = ctypes.c_char_p
        self._checks = hasattr(self._lib, "emulated_ranges")
        self.kernels: tuple[str, ...] = tuple(self._lib.emulated_names().decode().split())

    def threads(self, name: str) -> int:
        """The most threads of a block that the kernel allows (`__launch_bounds__`)."""
        return self._expects(name)[0]

    def launch(
        self,
        name: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        shared: int,
        *args: ctypes.Structure,
        cluster: int = 1,
        seed: int = 0,
    ) -> None:
        """One launch, over when it returns. `shared`: bytes of dynamic shared memory. `cluster`: blocks of a cluster.
        `seed`: which thread goes first."""
        most, sizes = self._expects(name)
        if sizes != [ctypes.sizeof(a) for a in args]:
            raise EmulatedError(f"{name} takes arguments of {sizes} bytes, not {[ctypes.sizeof(a) for a in args]}")
        grid, block = _three(grid), _three(block)
        if grid[1] > 65535 or grid[2] > 65535 or grid[0] > 2**31 - 1 or 0 in grid:
            raise EmulatedError(f"{name}: no GPU launches a grid of {grid}")
        if block[0] * block[1] * block[2] > most:
            raise EmulatedError(f"{name}: a block of {block}, and __launch_bounds__ says {most}")
        if self._checks:
            self._tell_ranges(args)
        error = self._lib.emulated_launch(
            ctypes.cast(self._lib[f"emulated_go_{name}"], ctypes.c_void_p),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_uint(cluster),
            ctypes.c_size_t(shared),
            (ctypes.c_void_p * len(args))(*[ctypes.addressof(a) for a in args]),
            ctypes.c_uint64(seed),
        )
        if error is not None:
            raise EmulatedError(f"{name}, grid {grid}, block {block}, seed {seed}: {self._lines(error.decode())}")

    def _tell_ranges(self, args: tuple[ctypes.Structure, ...]) -> None:
        """All that the launch may touch, as far as the arguments say it."""
        ranges, known = [], True
        todo: list[Any] = list(args)
        while todo:
            one = todo.pop()
            if isinstance(one, _Args):
                todo += one.kept.values()
                names = {name for name, kind, *_ in one._fields_ if kind is ctypes.c_void_p}
                known &= not any(isinstance(one.kept.get(name), int) for name in names)
            elif hasattr(one, "data_ptr") and one.numel():
                last = sum((n - 1) * step for n, step in zip(one.shape, one.stride(), strict=True))
                ranges += [one.data_ptr(), (last + 1) * one.element_size()]
            elif hasattr(one, "__array_interface__"):
                ranges += [address(one), one.nbytes]
            else:
                known &= not isinstance(one, ctypes.c_void_p)
        self._lib.emulated_ranges(
            (ctypes.c_size_t * len(ranges))(*ranges), ctypes.c_size_t(len(ranges) // 2), int(known)
        )

    def _lines(self, message: str) -> str:
        """Places in the library as lines of the source, where there is a program that knows them."""
        tool = shutil.which("addr2line")
        if tool is None:
            return message

        def line(found: re.Match[str]) -> str:
            # The call's return address: one less is inside of it.
            place = f"{int(found.group(1), 16) - 1:#x}"
            done = subprocess.run([tool, "-e", str(self.path), place], check=False, capture_output=True, text=True)
            return done.stdout.split(" ")[0].strip() or found.group(0)

        return re.sub(r"\[\+(0x[0-9a-f]+)\]", line, message)

    def _expects(self, name: str) -> tuple[int, list[int]]:
        if name not in self.kernels:
            raise EmulatedError(f"no kernel {name} in {self.path}; there are {', '.join(self.kernels)}")
        into = (ctypes.c_ulong * 16)()
        most: int = self._lib[f"emulated_expects_{name}"](into)
        return most, list(into[1 : 1 + into[0]])


def _three(shape: int | tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z, *_ = (*((shape,) if isinstance(shape, int) else shape), 1, 1)
    return x, y, z


def compiler() -> str | None:
    """The C++ compiler, or None: then there is nothing to test with."""
    name = os.environ.get("CXX", "g++")
    return shutil.which(name) or shutil.which("c++")


@functools.cache
def library(source: str, *defines: str, folder: Path = CUDA) -> Library:
    """The kernels of `folder`/`source`, e.g. "gate.cu", compiled if no test did so yet.

    `defines` as for the compiler, e.g. "EXPERT_WARPS=2". Every access is checked (checks.cpp), unless
    MOECORE_EMULATED_SANITIZE=address,undefined in the environment asks for those of the compiler (see README.md)."""
    cxx = compiler()
    if cxx is None:
        raise EmulatedError("no C++ compiler")
    sanitize = os.environ.get("MOECORE_EMULATED_SANITIZE", "")
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden"]
    flags += ["-fno-gnu-unique", "-Wno-unknown-pragmas", "-Wno-attributes"]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    text = _text(cxx, folder / source, defines)
    checked = not sanitize
    runtime = [(HERE / name).read_text() for name in RUNTIME]
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([text, *runtime, *flags, cxx, version]).encode()).hexdigest()[:24]
    cache = Path(tempfile.gettempdir()) / f"moecore-emulated-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise EmulatedError(f"{cache} belongs to somebody else: set TMPDIR to a folder of your own")
    built = cache / f"{Path(source).stem}-{key}.so"
    with _locked(cache / f"{built.name}.lock"):
        if not built.exists():
            _build(cxx, flags, text, built, checked=checked)
            for old in cache.glob(f"{Path(source).stem}-*"):
                if old.stat().st_mtime < time.time() - 7 * 86400:
                    old.unlink(missing_ok=True)
    return Library(built)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Test processes beside each other build once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _text(cxx: str, source: Path, defines: tuple[str, ...]) -> str:
    """The preprocessed source, with what C++ lacks rewritten, and an entry for each kernel."""
    command = [cxx, "-E", "-x", "c++", "-std=c++17", "-DMOECORE_EMULATED", *(f"-D{d}" for d in defines), str(source)]
    text = _run(command)
    text = re.sub(r"__shared__\s+(alignas\s*\((?:[^()]|\([^()]*\))*\))", r"\1 __shared__", text)
    text = re.sub(
        r"((?:alignas|__align__)\s*\((?:[^()]|\([^()]*\))*\))\s+extern\s+__shared__", "extern __shared__", text
    )
    text = re.sub(
        r"extern\s+(?:alignas\s*\((?:[^()]|\([^()]*\))*\)\s+)?__shared__\s+(?:__align__\s*\([^()]*\)\s+)?([\w\s]+?)\b(\w+)\s*\[\s*\]\s*;",
        r"\1 *const \2 = (\1 *)emulated_dynamic_shared;",
        text,
    )
    entries = []
    kernels = list(KERNEL.finditer(text))
    for kernel in kernels:
        words, name = kernel.group(1), kernel.group(2)
        most = _bounds(words)
        entries.append(
            f"EMULATED_EXPORT void emulated_go_{name}(const void *const *args) {{ emulated_go({name}, args); }}\n"
            f"EMULATED_EXPORT int emulated_expects_{name}(unsigned long *into) {{"
            f" emulated_sizes({name}, into); return {most}; }}\n"
        )
    names = " ".join(kernel.group(2) for kernel in kernels)
    export = '#define EMULATED_EXPORT extern "C" __attribute__((visibility("default")))\n'
    entries.append(f'EMULATED_EXPORT const char *emulated_names() {{ return "{names}"; }}\n')
    return f'#include "emulate.hpp"\n{text}\n{EPILOGUE}{export}{"".join(entries)}'


def _bounds(words: str) -> str:
    """The first argument of `__launch_bounds__`, or what every GPU allows."""
    found = BOUNDS.search(words)
    if found is None:
        return "1024"
    depth, at = 1, found.end()
    while depth and (depth > 1 or words[at] != ","):
        depth += {"(": 1, ")": -1}.get(words[at], 0)
        at += 1
    return words[found.end() : at - (depth == 0)]


def _build(cxx: str, flags: list[str], text: str, built: Path, *, checked: bool) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        work = Path(folder)
        (work / "kernels.cpp").write_text(text)
        # The linker lays .bss in the order of the files: shared memory is what lies between the two marks.
        for end in ("begin", "end"):
            (work / f"{end}.cpp").write_text(
                f'extern "C" {{ __attribute__((aligned(128))) char emulated_shared_{end}[128]; }}\n'
            )
            _run([cxx, "-fPIC", "-c", "-o", str(work / f"{end}.o"), str(work / f"{end}.cpp")])
        checks = ["-DMOECORE_EMULATED_CHECKED"] if checked else []
        # The calls before each access, without the library that they are meant for.
        calls = [*checks, "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"] if checked else []
        _run([cxx, *flags, *calls, "-I", str(HERE), "-c", "-o", str(work / "kernels.o"), str(work / "kernels.cpp")])
        objects = ["begin", "kernels", "end"]
        for name in ("emulate", *(["checks"] if checked else [])):
            _run([cxx, *flags, *checks, "-O2", "-c", "-o", str(work / f"{name}.o"), str(HERE / f"{name}.cpp")])
            objects.append(name)
        objects = [str(work / f"{name}.o") for name in objects]
        done = work / "done.so"
        _run([cxx, *flags, "-shared", "-Wl,-Bsymbolic", "-o", str(done), *objects, "-lm"])
        done.replace(built)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise EmulatedError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
