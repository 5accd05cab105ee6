"""The emulator itself: what it must find in kernels that are wrong, and the conversions that stand for PTX."""

from __future__ import annotations

import ctypes
from pathlib import Path

import guarded
import pytest
import torch
from emulated import CUDA, SCHEDULES, EmulatedError, Library, _Args, library

SOURCE = (
    f'#include "{CUDA}/numbers.cuh"\n'
    + """
struct A { u32 *out; };
#define KERNEL(name, ...)                                                                          \\
    extern "C" __global__ void __launch_bounds__(4 *LANES, 1) name(const A a) {                    \\
        extern __shared__ alignas(16) u32 many[];                                                  \\
        __shared__ alignas(16) u32 some[128];                                                      \\
        const u32 t = threadIdx.x;                                                                 \\
        u32 *out = a.out + blockIdx.x * 128;                                                       \\
        (void)many, (void)some, (void)out;                                                         \\
        __VA_ARGS__                                                                                \\
    }
// Right.
KERNEL(passes_block, many[t] = t; __syncthreads(); out[t] = many[127 - t];)
KERNEL(passes_warp, some[t] = t; __syncwarp(); out[t] = some[t ^ 31];)
KERNEL(shuffles_up, out[t] = __shfl_up_sync(FULL_WARP, t, 3, 8);)
KERNEL(votes_apart, out[t] = 0; if (t % 2) { out[t] = __ballot_sync(0xaaaaaaaau, t > 5); })
KERNEL(leaves_early, out[t] = 0; if (t % 3 == 0) return; out[t] = __reduce_max_sync(FULL_WARP, t); __syncthreads();)
KERNEL(counts, if (t == 0) some[0] = 0; __syncthreads(); atomicAdd(some, 1u); __syncthreads(); out[t] = some[0];)
KERNEL(says_or, out[t] = __syncthreads_or(t == 77) + 2 * __syncthreads_count(t < 5) + 100 * __syncthreads_and(t < 128);)
KERNEL(asks_neighbour, some[t] = blockIdx.x * 1000 + t; emulated_cluster_arrive(); emulated_cluster_wait();
       out[t] = *(u32 *)emulated_cluster_map(some + t, emulated_cluster_rank() ^ 1);
       emulated_cluster_arrive(); emulated_cluster_wait();)
// Wrong.
KERNEL(no_block_barrier, some[t] = t; __syncwarp(); out[t] = some[127 - t];)
KERNEL(no_warp_barrier, some[t] = t; __ballot_sync(FULL_WARP, 1); out[t] = some[t ^ 1];)
KERNEL(writes_back, some[t] = t; __syncthreads(); out[t] = some[127 - t]; some[t] = 0;)
KERNEL(unwritten, out[t] = many[t];)
KERNEL(same_result, out[0] = t;)
KERNEL(two_blocks, a.out[t] = t;)
KERNEL(past_result, a.out[t + 128 * gridDim.x] = t;)
KERNEL(before_result, out[t] = a.out[(i32)t - 1];)
KERNEL(past_shared, many[t + 1] = t;)
KERNEL(not_aligned, out[t] = load_shared(a.out + 1).word[0];)
KERNEL(stuck, if (t < 16) __syncthreads(); else if (t < 32) __syncwarp();)
KERNEL(not_in_mask, out[t] = __shfl_sync(1u, t, 0);)
KERNEL(plain_and_atomic, if (t == 0) some[0] = 0; __syncthreads(); atomicAdd(some, 1u); out[t] = some[0];)
KERNEL(neighbour_is_gone, some[t] = t; if (emulated_cluster_rank() == 1) return; emulated_pause(1);
       out[t] = *(u32 *)emulated_cluster_map(some + t, 1);)

extern "C" __global__ void two_lines(const A a) {
    if (threadIdx.x < 64)
        __syncthreads();
    else
        __syncthreads();
}

extern "C" __global__ void convert(const float *x, u16 *b, u16 *h, u16 *q, float *back, u32 n) {
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        b[i] = Bf16::bits(x[i]);
        h[i] = F16::bits(x[i]);
        q[i] = emulated_e4m3(x[i]);
        back[i] = F16::value(h[i]);
    }
}
"""
)


class Args(_Args):
    _fields_ = (("out", ctypes.c_void_p),)


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "samples.cu").write_text(SOURCE)
    return library("samples.cu", folder=Path(folder))


def launch(lib: Library, name: str, seed: int, blocks: int = 1, cluster: int = 1) -> list[int]:
    out = torch.zeros(128 * blocks, dtype=torch.int32)
    lib.launch(name, blocks, 128, 512, Args(out=out), cluster=cluster, seed=seed)
    return out.tolist()


@pytest.mark.parametrize("seed", SCHEDULES)
def test_right_kernels(lib: Library, seed: int) -> None:
    index = range(128)
    assert launch(lib, "passes_block", seed) == [127 - t for t in index]
    assert launch(lib, "passes_warp", seed) == [t ^ 31 for t in index]
    assert launch(lib, "shuffles_up", seed) == [t - 3 if t % 8 >= 3 else t for t in index]
    assert launch(lib, "votes_apart", seed)[5:8] == [-0x55555580, 0, -0x55555580]
    largest = [max(s for s in range(t // 32 * 32, t // 32 * 32 + 32) if s % 3) for t in index]
    assert launch(lib, "leaves_early", seed) == [largest[t] if t % 3 else 0 for t in index]
    assert launch(lib, "counts", seed) == [128] * 128
    assert launch(lib, "says_or", seed) == [111] * 128
    pairs = [(block ^ 1) * 1000 + t for block in range(4) for t in index]
    assert launch(lib, "asks_neighbour", seed, 4, 2) == pairs


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_block_barrier", "nobody has written|a race in shared memory"),
        ("no_warp_barrier", "a race in shared memory"),
        ("writes_back", "a race in shared memory"),
        ("unwritten", "reads shared memory that nobody has written"),
        ("same_result", "a race in global memory"),
        ("two_blocks", "a race in global memory: it writes what thread of another block writes"),
        ("past_result", r"writes 4 bytes from byte \d+ on of a buffer of 1024 bytes"),
        ("before_result", r"reads 4 bytes from byte -4 on of a buffer of 1024 bytes"),
        ("past_shared", r"4 bytes from byte 512 on of 512 bytes of dynamic shared memory"),
        ("not_aligned", "a load from an address that is not aligned"),
        ("stuck", r"deadlock.*\n.*threads 0..15: in __syncthreads at .*\n.*threads 16..31: in __syncwarp at "),
        ("two_lines", r"deadlock"),
        ("not_in_mask", "is not in its own mask 00000001"),
        ("plain_and_atomic", "a race in shared memory"),
    ],
)
@pytest.mark.parametrize("seed", SCHEDULES)
def test_wrong_kernels(lib: Library, name: str, says: str, seed: int) -> None:
    if guarded.sanitized() and not says.startswith(("deadlock", "is not", "a load")):
        pytest.skip("the compiler's own checks are inside instead")
    with pytest.raises(EmulatedError, match=says):
        launch(lib, name, seed, 2)
    launch(lib, "passes_block", seed)  # and the next launch is none the worse for it


def test_wrong_launches(lib: Library) -> None:
    args = Args(out=torch.zeros(128, dtype=torch.int32))
    with pytest.raises(EmulatedError, match="__launch_bounds__ says 128"):
        lib.launch("counts", 1, 160, 0, args)
    with pytest.raises(EmulatedError, match="no kernel moecore_none"):
        lib.launch("moecore_none", 1, 32, 0, args)
    with pytest.raises(EmulatedError, match=r"arguments of \[8\] bytes, not \[8, 8\]"):
        lib.launch("counts", 1, 32, 0, args, args)
    with pytest.raises(EmulatedError, match="no GPU launches a grid"):
        lib.launch("counts", (1, 65536), 32, 0, args)
    with pytest.raises(EmulatedError, match="made of whole clusters"):
        lib.launch("counts", 3, 32, 0, args, cluster=2)
    with pytest.raises(EmulatedError, match="has returned"):
        launch(lib, "neighbour_is_gone", 1, 2, 2)


def test_conversions(lib: Library) -> None:
    """To nearest, ties to even: numbers of all kinds, and those half way between two of the shorter format."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator, dtype=torch.int32).view(
        torch.float32
    )
    short = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    fp8 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    half = torch.cat([(short[1:] + short[:-1]) / 2, (fp8[1:] + fp8[:-1]) / 2, short]).float()
    nan, inf = torch.nan, torch.inf
    odd = torch.tensor([0.0, -0.0, inf, -inf, nan, 65519.9, 65520.0, 448.0, 464.0, 464.1, 2.0**-10, 2.0**-25, 3.4e38])
    near = torch.cat([half, torch.nextafter(half, half * 2), torch.nextafter(half, half / 2)])
    x = torch.cat([any_bits, torch.randn(100_000, generator=generator) * 10, near, -near, odd])
    n = len(x)
    b, h, q, back = (torch.zeros(n, dtype=d) for d in (torch.int16, torch.int16, torch.int16, torch.float32))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, b, h, q, back)]
    lib.launch("convert", 1, 64, 0, *pointers, ctypes.c_uint32(n))
    real = ~x.isnan()
    assert torch.equal(b[real], x[real].bfloat16().view(torch.int16))
    assert torch.equal(h[real], x[real].half().view(torch.int16))
    assert torch.equal(q[real], x[real].clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).short())
    assert torch.equal(back[real], x[real].half().float())
    assert (b[~real] == 0x7FFF).all()
    assert (h[~real] == 0x7FFF).all()
    assert (q[~real] == 0x7F).all()
    assert back[~real].isnan().all()
