"""Triton's attention in order: right, and of a query the same bits in any company and wherever its keys lie.

Under Triton's interpreter, once, in a process of its own. What `test_ordered_attention.py` says of the CPU kernel.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from triton_runs import output_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CASES = """
import json
import numpy as np
import torch
import triton_runs
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import KVSharding
from cpinfer.ops import ordered_attention, ordered_kernels
from cpinfer.ops.ordered_attention import OrderedAttention, merge_ordered

on_cpu = ordered_attention._kernels_for
triton_runs.force_triton()
on_triton = ordered_attention._kernels_for
SHARDS, INTERLEAVE = 4, 4
found, errors = {}, {}

def tensors(T, S, K, G, D, V, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1000 * T + S)
    shapes = [(T, K * G, D), (S, K, D), (S, K, V)]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]

def causal(num_queries, num_keys, window=None, slots=None, block_size=1):
    table = list(range(num_keys) if slots is None else slots)
    rows = AttentionRows.build([num_queries], [num_keys], [table], block_size=block_size, causal=True)
    return rows if window is None else rows.within(window)

def attend(rows, q, k, v, shards=SHARDS, **more):
    return OrderedAttention(rows, shards, INTERLEAVE).run(q, k, v, **{"scale": 0.2, **more})

def same(a, b):
    return all(map(torch.equal, a, b))

def error(a, b):
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b))

def part(state, first, last):
    return state[0][first:last], state[1][first:last]

# As the CPU kernel, in its order: of groups that fill a program and that do not, of more heads than it has rows.
for name, shape, window, soft_cap in (
    ("gqa", (9, 70, 2, 4, 32, 32), None, None),
    ("mqa", (3, 20, 1, 70, 16, 16), None, None),
    ("windows and caps", (30, 90, 1, 3, 24, 40), 20, 2.0),
    ("latents", (3, 40, 1, 20, 80, 256), None, None),
):
    q, k, v = tensors(*shape)
    whole = attend(causal(*shape[:2], window), q, k, v, soft_cap=soft_cap)
    ordered_attention._kernels_for = on_cpu
    errors[name] = error(whole, attend(causal(*shape[:2], window), q, k, v, soft_cap=soft_cap))
    ordered_attention._kernels_for = on_triton
    T, S = shape[:2]
    found[name] = all(
        same(attend(causal(b - a, S - T + b, window), q[a:b], k, v, soft_cap=soft_cap), part(whole, a, b))
        for a, b in ((0, 1), (1, T), (T - 1, T))
    )

# Single queries of several sequences, as decode has them, and no keys at all.
q, k, v = tensors(70, 70, 1, 2, 16, 16)
whole = attend(causal(70, 70), q, k, v)
at = [3, 40, 69, 0]
tables = [list(range(p + 1)) for p in at]
rows = AttentionRows.build([1] * 5, [*(p + 1 for p in at), 0], [*tables, []], block_size=1, causal=False)
several = attend(rows, q[[*at, 0]], k, v)
found["decode"] = same(part(several, 0, 4), (whole[0][at], whole[1][at]))
found["no keys"] = not several[0][4].any() and bool((several[1][4] == -torch.inf).all())

# Few states at a time.
for num_bytes in (1, 20_000):
    ordered_kernels.STATE_BYTES, kept = num_bytes, ordered_kernels.STATE_BYTES
    found[f"at once {num_bytes}"] = same(attend(causal(70, 70), q, k, v), whole)
    ordered_kernels.STATE_BYTES = kept
# Keys anywhere: pages of seven, between what is no number; in one buffer, heads first; at an odd address.
few, of_few = q[-20:], part(whole, 50, 70)
pages = np.random.default_rng(0).permutation(14)[:11]
slots = (pages[:, None] * 7 + np.arange(7)).ravel()[:70]
far = [torch.full((98, 1, 16), torch.nan) for _ in range(2)]
far[0][slots], far[1][slots] = k, v
found["pages"] = same(attend(causal(20, 70, slots=pages.tolist(), block_size=7), few, *far), of_few)
both = torch.cat([k, v], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
found["one buffer"] = same(attend(causal(20, 70), few, both[..., :16], both[..., 16:]), of_few)
shifted = torch.zeros(70 * 16 + 1)[1:].view(70, 1, 16).copy_(k)
found["an odd address"] = same(attend(causal(20, 70), few, shifted, v), of_few)
heads_first = few.transpose(0, 1).contiguous().transpose(0, 1)
found["queries heads first"] = same(attend(causal(20, 70), heads_first, k, v), of_few)

# A window leaves the same bits wherever the table begins.
windowed = attend(causal(70, 70, 20), q, k, v)
rows = causal(20, 60, 20)
assert rows.places_of_tables[0] > 0
found["a window"] = same(attend(rows, q[40:60], k, v), part(windowed, 40, 60))

# Shards hold virtual shards, whose states are those of the whole; in another order they are other bits.
for dcp_size in (1, 2, 4):
    sharding, states = KVSharding(dcp_size, INTERLEAVE, block_size=1), []
    for shard in range(dcp_size):
        held = sharding.positions(70, shard)
        rows = AttentionRows.build([1], [len(held)], [list(range(len(held)))], block_size=1, causal=False)
        planned = OrderedAttention(rows, SHARDS // dcp_size, INTERLEAVE)
        states.append(planned.states(q[-1:], k[held], v[held], scale=0.2))
    outs, lses = (torch.stack(x, dim=3).flatten(2, 3).movedim(2, 0) for x in zip(*states))
    found[f"dcp {dcp_size}"] = same(merge_ordered(outs, lses), part(whole, 69, 70))
    found[f"flipped {dcp_size}"] = not same(merge_ordered(outs.flip(0), lses.flip(0)), part(whole, 69, 70))

# What is stored in half precision and in eight bits is read as it is.
for dtype, stored in (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float8_e4m3fn),
    (torch.bfloat16, torch.float8_e5m2),
):
    x, y, z = q[-20:].to(dtype), k.to(stored), v.to(stored)
    got = attend(causal(20, 70), x, y, z)
    found[f"{dtype} over {stored}"] = same(got, attend(causal(20, 70), x, y.to(dtype), z.to(dtype)))
    found[f"{dtype} over {stored}, alone"] = same(attend(causal(1, 70), x[-1:], y, z), part(got, 19, 20))
    ordered_attention._kernels_for = on_cpu
    errors[f"{dtype} over {stored}"] = error(got, attend(causal(20, 70), x, y, z))
    ordered_attention._kernels_for = on_triton

# Faults of keys reach the queries that see them alone.
for window in (None, 5):
    sound = attend(causal(10, 70, window), q[60:], k, v)
    bad_k, bad_v, place = k.clone(), v.clone(), torch.arange(60, 70)
    bad_k[63], bad_v[63] = torch.nan, torch.inf
    sees = (place >= 63) & (place < 63 + (window or 70))
    faulty, of_values = (attend(causal(10, 70, window), q[60:], keys, bad_v) for keys in (bad_k, k))
    found[f"faults {window}"] = (
        same([x[~sees] for x in faulty], [x[~sees] for x in sound])
        and bool(faulty[0][sees].isnan().all() and faulty[1][sees].isnan().all())
        and same((of_values[0][~sees], of_values[1]), (sound[0][~sees], sound[1]))
        and not torch.isfinite(of_values[0][sees]).any()
    )
large = attend(causal(10, 70), 200 * q[60:], k, v)
ordered_attention._kernels_for = on_cpu
errors["large"] = error(large, attend(causal(10, 70), 200 * q[60:], k, v)) / 200
ordered_attention._kernels_for = on_triton

# Another width of tiles, and products of another width for few queries, would show.
one = attend(causal(70, 70), q, k, v, shards=1)
ordered_kernels.TILE = 32
narrow = attend(causal(70, 70), q, k, v, shards=1)
ordered_kernels.TILE = 64
found["another tile shows"] = not same(narrow, one) and error(narrow, one) < 1e-5
found["another number of shards shows"] = not same(one, whole)
q, k, v = tensors(70, 70, 1, 2, 64, 64)
wide = attend(causal(70, 70), q, k, v)
ordered_kernels.MAX_BLOCK_D = 16
found["other products show"] = not same(attend(causal(1, 70), q[-1:], k, v), part(wide, 69, 70))
print(json.dumps([found, errors]))
"""


def test_it_is_attention_in_one_order() -> None:
    found, errors = output_of(CASES, TRITON_INTERPRET="1")
    assert len(found) == 4 + 2 + 2 + 4 + 1 + 6 + 8 + 2 + 3
    wrong = [name for name, is_so in found.items() if not is_so]
    assert not wrong, wrong
    # In half precision weights of values are rounded, and by the interpreter cut off, by up to an ulp.
    limits = {"torch.bfloat16": 2**-7, "torch.float16": 2**-10}
    largest = {name: error / limits.get(name.split()[0], 2e-6) for name, error in errors.items()}
    assert max(largest.values()) <= 1, errors


COMPILED = """
import json
from cpinfer.ops import ordered_kernels as kernels
from triton_runs import compiled

tables = dict.fromkeys(("unit_rows", "unit_firsts", "kv_lo", "kv_hi", "block_indptr", "block_ids"), "*i32")
tables |= {"q_indptr": "*i64", "begins": "*i64", "scale": "fp32", "soft_cap": "fp32"}
tables |= dict.fromkeys(("meanings", "out", "lse"), "*fp32")
made = []
for dtype, stored, D, V, flags in CALLS:
    pointers = tables | {"q": f"*{dtype}", "keys": f"*{stored}", "values": f"*{stored}"}
    rows = kernels.BLOCK_ROWS[V >= kernels.WIDE_V]
    sizes = {"DIM": D, "V_DIM": V, "ROWS": rows}
    sizes |= {"TILE": kernels.TILE, "BLOCK_D": kernels.MAX_BLOCK_D, "BLOCK_V": V}
    made.append(compiled(kernels._states, pointers, sizes | dict(zip(("IS_BYTES", "HAS_CAP", "IS_ALIGNED"), flags)), 4))
assert all(kernel.asm["cubin"] for kernel in made)
told = []
for kernel in made:
    ptx = kernel.asm["ptx"]  # of 16 bytes are these loads alone
    told.append((kernel.metadata.shared, "tf32" in ptx, "ld.global.v4" in ptx or "cp.async.cg" in ptx))
print(json.dumps(told))
"""


HALF = ("bf16", "bf16", 64, 64, (False, True, True))
OTHERS = [
    ("fp32", "fp32", 128, 128, (False, False, True)),
    ("bf16", "bf16", 128, 128, (False, False, True)),
    ("bf16", "u8", 64, 64, (True, False, False)),
    ("bf16", "bf16", 576, 512, (False, False, True)),
    ("fp32", "fp32", 576, 512, (False, False, True)),
]


@pytest.mark.parametrize("calls", [[HALF], pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["half", "others"])
def test_kernels_compile_for_a_gpu(calls: list[tuple[object, ...]], tmp_path: Path) -> None:
    """Within the shared memory of an Ampere, in full precision where it is asked for, and with wide loads."""
    told = output_of(f"CALLS = {calls!r}\n" + COMPILED, timeout_s=300, TRITON_CACHE_DIR=str(tmp_path))
    assert all(shared <= 99 * 2**10 and not has_tf32 for shared, has_tf32, _ in told), told
    assert all(is_wide for (_, _, is_wide), (*_, flags) in zip(told, calls, strict=True) if flags[2]), told  # type: ignore[index]
