"""The Triton kernels of attention states equal their definition in torch, under Triton's interpreter.

Triton reads `TRITON_INTERPRET` when it is imported, so the comparisons run in a process of their own, once.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from triton_runs import output_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CASES = """
import json, math, sys
import torch
from cpinfer.ops import state_kernels, states

INF, NAN = math.inf, math.nan
WIRES = (torch.float32, torch.bfloat16, torch.float16)
found = {}

def generator(seed=0):
    return torch.Generator().manual_seed(seed)

def state(T, H, D, dtype=torch.float32, seed=0):
    g = generator(seed)
    return torch.randn(T, H, D, generator=g).to(dtype), 3 * torch.randn(T, H, generator=g)

def error(a, b):
    worst = 0.0
    for x, y in zip(a, b):
        assert x.shape == y.shape and x.dtype == y.dtype, (x.shape, y.shape, x.dtype, y.dtype)
        same = (x == y) | (x.isnan() & y.isnan())
        difference = torch.where(same, 0.0, x - y).float().abs().max().item() if x.numel() else 0.0
        worst = math.inf if math.isnan(difference) else max(worst, difference)
    return worst

for wire in WIRES:
    for pcp, columns, R, H, D in ((2, 1, 3, 2, 8), (2, 2, 3, 2, 6), (1, 4, 2, 1, 64), (4, 1, 1, 3, 10)):
        # Half precision comes from the kernels as it is. (The interpreter cuts float32 off where it should round.)
        out, lse = state(pcp * R, columns * H, D, torch.float32 if wire == torch.float32 else wire)
        lse[0, 0] = -INF
        strided = out.transpose(0, 1).contiguous().transpose(0, 1), lse.t().contiguous().t()
        want = states.pack_by_place(out, lse, wire, pcp, columns)
        for given in ((out, lse), strided):
            got = state_kernels.pack_by_place(*given, wire, pcp, columns)
            assert got.shape == want.shape and got.dtype == wire
            same = torch.equal(got.view(torch.uint8), want.view(torch.uint8))
            found[f"pack {wire} {pcp} {columns}"] = 0.0 if same else INF

for wire in WIRES:
    for N, R, H, D in ((1, 2, 2, 8), (2, 3, 2, 64), (5, 2, 3, 6), (8, 4, 1, 12)):
        parts = [state(R, H, D, seed=n) for n in range(N)]
        parts[0][1][0, 0] = -INF
        for _, lse in parts:
            lse[1, 0] = -INF  # nobody has a key for this row
        packed = torch.stack([states.pack_states(*part, wire) for part in parts])
        got, want = state_kernels.merge_packed(packed, D), states.merge_packed(packed, D)
        if N > 1:
            assert (got[0][1, 0] == 0).all() and got[1][1, 0] == -INF
        found[f"merge {wire} {N}"] = error(got, want) if N > 1 else error((got[1],), (want[1],))

for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
    a, b = state(4, 3, 12, dtypes[0]), state(4, 3, 12, dtypes[1], seed=1)
    a[1][0, 0] = -INF; b[1][1, 1] = -INF; a[1][2, 2] = b[1][2, 2] = -INF
    b = b[0].transpose(0, 1).contiguous().transpose(0, 1), b[1]
    got, want = state_kernels.merge_pair(a, b, torch.float32), states.merge_states([(a[0].float(), a[1]), b])
    found[f"pair {dtypes}"] = error(got, want)
    rounded = state_kernels.merge_pair(a, b, dtypes[0])[0]
    assert rounded.dtype == dtypes[0]

# What is not a number comes through; what is large does not overflow.
for out_value, lse_value in ((NAN, 0.0), (1.0, NAN), (NAN, -INF)):
    a, b = state(1, 1, 4), state(1, 1, 4, seed=1)
    a[0][:] = out_value; a[1][:] = lse_value
    got = state_kernels.merge_pair(a, b, torch.float32)
    packed = torch.stack([states.pack_states(*part, torch.float32) for part in (a, b)])
    both = (got, state_kernels.merge_packed(packed, 4))
    want = states.merge_states([a, b])
    found[f"nan {out_value} {lse_value}"] = max(error(g, want) for g in both)
    assert all(g[0].isnan().all() for g in both)
a, b = state(1, 1, 4), state(1, 1, 4, seed=1)
a[1][:] = 1e4; b[1][:] = 1e4 + 1
found["large"] = error(state_kernels.merge_pair(a, b, torch.float32), states.merge_states([a, b])) / 1e4

# As `states` itself takes them on CUDA: many states one by one, of which only the last result is rounded.
for dtype in (torch.float32, torch.bfloat16):
    many = [state(3, 2, 8, dtype, seed=n) for n in range(4)]
    want = states.merge_states(many)
    on_cpu, states._kernels_for = states._kernels_for, lambda *tensors: state_kernels
    got = states.merge_states(many)
    packed = states.merge_packed(torch.stack([states.pack_states(*s, dtype) for s in many]), 8)
    states._kernels_for = on_cpu
    assert got[0].dtype == dtype
    # The interpreter cuts off where it should round: half an ulp more, of outputs of size 4 at most.
    found[f"many {dtype}"] = error(got, want) if dtype == torch.float32 else max(0.0, error(got, want) - 2**-6)
    found[f"many packed {dtype}"] = error(packed, states.merge_states([(o.float(), l) for o, l in many]))

empty = state_kernels.merge_packed(torch.zeros(2, 0, 3, 10), 8)
assert empty[0].shape == (0, 3, 8) and empty[1].shape == (0, 3)
assert state_kernels.pack_by_place(torch.zeros(0, 2, 8), torch.zeros(0, 2), torch.bfloat16, 1, 1).shape == (1, 0, 2, 10)
print(json.dumps(found))
"""

# The real compiler needs no GPU either, when it is told for which.
COMPILED = """
import json
from cpinfer.ops import state_kernels as kernels
from triton_runs import compiled

states = {"out": "*fp32", "lse": "*fp32", "packed": "*bf16", "packed_f32": "*fp32"}
pair = {"out_a": "*fp32", "lse_a": "*fp32", "out_b": "*bf16", "lse_b": "*fp32", "out": "*bf16", "lse": "*fp32"}
merged = {"outs": "*bf16", "lses": "*fp32", "out": "*fp32", "lse": "*fp32"}
found = [
    compiled(kernels._pack, states, {"BLOCK": 128}),
    compiled(kernels._merge, merged, {"N": 8, "ROWS": 4, "BLOCK": 128}, num_warps=4),
    compiled(kernels._merge_pair, pair, {"BLOCK": 128}),
]
assert all(kernel.asm["cubin"] for kernel in found)
print(json.dumps(["cvt.rn.bf16" in found[0].asm["ptx"], "cvt.rn.bf16" in found[2].asm["ptx"]]))
"""


def test_kernels_compile_for_a_gpu_and_round_to_the_nearest(tmp_path: Path) -> None:
    assert output_of(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == [True, True]


def test_kernels_equal_their_definition() -> None:
    found = output_of(CASES, TRITON_INTERPRET="1")
    assert len(found) == 12 + 12 + 3 + 3 + 1 + 4
    assert max(found.values()) <= 1e-6, found
