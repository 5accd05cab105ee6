"""First light of the kernels on a GPU: correctness of the main cases, then times. Run as a script."""

from __future__ import annotations

import statistics
import sys

import torch
from engine_rig import Rig, stream
from moecore import _core

print("available:", _core.cuda_available() or "yes", torch.cuda.get_device_name())
GEN = torch.Generator(device="cuda").manual_seed(1)


def timed(run, n=50):
    """Median microseconds of `run()` by events."""
    for _ in range(5):
        run()
    times = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e3)
    return statistics.median(times)


# 1. residency: random calls, few slots; every slot must hold its expert's bytes.
rig = Rig(layers=3, experts=16, row_bytes=48 * 1024 + 16, slots=10)
gen = torch.Generator().manual_seed(0)
for call in range(600):
    layer = call % 3
    ids = torch.randint(-1, 18, (8,), generator=gen) if call % 3 else torch.randperm(16, generator=gen)[:8]
    slots = rig.acquire(layer, ids.cuda())
    got = slots.cpu().tolist()
    for e, s in zip(ids.tolist(), got, strict=True):
        if 0 <= e < 16:
            want = torch.from_numpy(rig.row(layer * 16 + e)[: rig.row_bytes].copy())
            assert s >= 0, (call, e, s, rig.engine.error())
            assert torch.equal(rig.arena[s, : rig.row_bytes].cpu(), want), (call, e, s)
        else:
            assert s == -1, (call, e, s)
print("residency ok", rig.engine.stats(), rig.engine.error())
rig.close()

# 2. expert products against float64.
H, I, E, K = 2048, 768, 64, 8
row = 3 * H * I * 2
rig = Rig(layers=1, experts=E, row_bytes=row, slots=E, fill=False)
w = [((torch.randn(3 * I * H, generator=GEN, device="cuda") * 0.02).to(torch.bfloat16)) for _ in range(E)]
for e in range(E):
    rig.row(e)[:row] = w[e].view(torch.uint8).cpu().numpy()
for T in (1, 2, 4, 8, 16):
    x = torch.randn(T, H, generator=GEN, device="cuda").to(torch.bfloat16)
    ids = torch.stack([torch.randperm(E, device="cuda", generator=GEN)[:K] for _ in range(T)])
    weights = torch.rand(T, K, generator=GEN, device="cuda")
    slots = rig.acquire(0, ids)
    h = torch.full((T * K, I), float("nan"), dtype=torch.bfloat16, device="cuda")
    out = torch.full((T, H), float("nan"), dtype=torch.bfloat16, device="cuda")

    def up(x=x, slots=slots, h=h, T=T):
        rig.engine.expert_up("bfloat16", 0, x.data_ptr(), slots.data_ptr(), h.data_ptr(), T, K, H, I, 0, stream())

    def down(slots=slots, h=h, out=out, weights=weights, T=T):
        rig.engine.expert_down(
            "bfloat16", 2 * I * H * 2, h.data_ptr(), slots.data_ptr(), weights.data_ptr(), True, out.data_ptr(), T, K, I, H,
            stream(),
        )  # fmt: skip

    up()
    down()
    ref_h, ref = [], torch.zeros(T, H, dtype=torch.float64, device="cuda")
    for t in range(T):
        for k in range(K):
            wt = w[int(ids[t, k])].double()
            gu = wt[: 2 * I * H].view(2 * I, H) @ x[t].double()
            hh = torch.nn.functional.silu(gu[:I]) * gu[I:]
            ref_h.append(hh)
            ref[t] += weights[t, k].double() * (wt[2 * I * H :].view(H, I) @ hh)
    ref_h = torch.stack(ref_h)
    eh = ((h.double() - ref_h).norm() / ref_h.norm()).item()
    eo = ((out.double() - ref).norm() / ref.norm()).item()
    assert eh < 1e-2 and eo < 1e-2, (T, eh, eo)
    print(f"T={T}: up err {eh:.1e} down err {eo:.1e}", rig.engine.error())
rig.close()

# 3. speed at the Qwen3-30B-A3B shape: resident calls rotate over experts so that L2 does not serve.
src = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
dst = torch.empty_like(src)
hbm = 2 * src.numel() / timed(lambda: dst.copy_(src), 20) / 1e3
print(f"device copy {hbm:.0f} GB/s")
del src, dst
E = 128
rig = Rig(layers=1, experts=E, row_bytes=row, slots=E, fill=False)
for at in range(0, E, 8):
    rig.acquire(0, torch.arange(at, at + 8, device="cuda"))
torch.cuda.synchronize()
for T in (1, 2, 4, 8):
    calls = []
    for r in range(16):
        ids = torch.stack([(torch.arange(K, device="cuda") + (r * T + t) * K) % E for t in range(T)])
        slots = rig.acquire(0, ids)
        x = torch.randn(T, H, device="cuda").to(torch.bfloat16)
        h = torch.empty(T * K, I, dtype=torch.bfloat16, device="cuda")
        o = torch.empty(T, H, dtype=torch.bfloat16, device="cuda")
        wts = torch.rand(T, K, device="cuda")
        calls.append((ids, slots, x, h, o, wts))

    def run(which, T=T, calls=calls):
        for ids, slots, x, h, o, wts in calls:
            if "a" in which:
                rig.acquire(0, ids, slots)
            if "u" in which:
                rig.engine.expert_up(
                    "bfloat16", 0, x.data_ptr(), slots.data_ptr(), h.data_ptr(), T, K, H, I, 0, stream()
                )
            if "d" in which:
                rig.engine.expert_down(
                    "bfloat16", 4 * I * H, h.data_ptr(), slots.data_ptr(), wts.data_ptr(), True, o.data_ptr(), T, K, I, H,
                    stream(),
                )  # fmt: skip

    torch.cuda.synchronize()
    line = f"T={T}:"
    for which, name, nbytes in (
        ("a", "acquire", 0),
        ("u", "up", 2 * H * I * 2),
        ("d", "down", H * I * 2),
        ("aud", "all", 6 * H * I),
    ):
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            run(which)
        us = timed(g.replay, 30) / 16
        unique = min(T * K, E)
        rate = f" {unique * nbytes / us / 1e3:.0f} GB/s ({unique * nbytes / us / 1e3 / hbm:.0%})" if nbytes else ""
        line += f" {name} {us:.2f} us{rate};"
    print(line, rig.engine.error())
eager = timed(lambda: rig.acquire(0, calls[0][0], calls[0][1]), 200)
print(f"acquire eager, all hit: {eager:.2f} us")
print(rig.engine.stats())
rig.close()

# 4. misses: 9 MiB rows, 1..8 missing at a call.
rig = Rig(layers=1, experts=256, row_bytes=row, slots=64, fill=False)
pinned = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
target = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
one = timed(lambda: target[:row].copy_(pinned[:row], non_blocking=True))
big = timed(lambda: target.copy_(pinned, non_blocking=True), 10)
link = row / one / 1e3
print(f"copy engine: row {link:.1f} GB/s ({one:.0f} us), 256 MiB {target.numel() / big / 1e3:.1f} GB/s")
at = 0
for n in (1, 2, 4, 8):
    batch = []
    for _ in range(35):
        batch.append(torch.tensor([(at + i) % 256 for i in range(n)], device="cuda"))
        at += n
    it = iter(batch)
    out = torch.empty(n, dtype=torch.int32, device="cuda")
    us = timed(lambda it=it, out=out: rig.acquire(0, next(it), out), 30)
    print(
        f"{n} misses: {us:.0f} us, {n * row / us / 1e3:.1f} GB/s, {n * row / us / 1e3 / link:.0%} of copy engine;",
        rig.engine.error(),
    )
print(rig.engine.stats())
rig.close()
sys.exit(0)
