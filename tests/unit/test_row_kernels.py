"""Triton's products and sums give a row its own bits, and are right, under Triton's interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from triton_runs import output_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PREPARE = """
import json
import torch
from torch.nn import functional as F
import triton_runs
from cpinfer.models.invariant_rows import invariant_rows
from cpinfer.ops import row_kernels, row_reductions
from cpinfer.ops.row_sizes import each_by_rows, grouped_by_rows, linear_by_rows

triton_runs.force_triton()
CUTS = [(0, 1), (5, 12), (3, 68), (69, 70)]

def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

def cancelling(M, K, dtype=torch.float32):
    half = normal(M, K // 2)
    return torch.cat([half, -half], dim=1).to(dtype)

def weight_of(N, K, dtype=torch.float32):
    # Products with it are what rounding leaves: any other order shows.
    half = normal(N, K // 2, seed=1)
    return torch.cat([half, half], dim=1).to(dtype)

def differing(function, rows):
    whole = function(rows)
    return [cut for cut in CUTS if not torch.equal(function(rows[slice(*cut)]), whole[slice(*cut)])]

def relative(found, wanted):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, (found.shape, wanted.shape)
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
"""

PRODUCTS = (
    PREPARE
    + """
found, bits = {}, {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for N, K in ((7, 34), (130, 200)):
        x, w, bias = normal(70, K, dtype=dtype), normal(N, K, dtype=dtype, seed=1), normal(N, dtype=dtype, seed=2)
        wide = torch.zeros(N, 2 * K, dtype=dtype)
        wide[:, ::2] = w
        # As Linear has it, as Conv1D has it, and as nobody has it.
        wanted = F.linear(*(t.double() for t in (x, w, bias))).to(dtype)
        found[f"{dtype} {N} {K}"] = relative(linear_by_rows(x, w, bias), wanted)
        ours = linear_by_rows(x, w)
        assert all(torch.equal(linear_by_rows(x, v), ours) for v in (w.t().contiguous().t(), wide[:, ::2]))
        v = weight_of(N, K, dtype)
        bits[f"{dtype} {N} {K}"] = differing(lambda rows: linear_by_rows(rows, v, bias), cancelling(70, K, dtype))
assert linear_by_rows(x[:0], w).shape == (0, N) and linear_by_rows(x.view(2, 35, K), w).shape == (2, 35, N)
# Of rows wherever they lie, and by any number of programs.
flat = torch.zeros(14003)
for shift in range(4):
    x = flat[shift : shift + 14000].view(70, 200).copy_(cancelling(70, 200))
    row_kernels._INTERPRETED_PROGRAMS = 1 + 2 * shift
    out = linear_by_rows(x, v.float())
    first = out if shift == 0 else first
    assert torch.equal(out, first)

heads, experts = normal(70, 3, 34), normal(3, 50, 34, seed=1)
alone = torch.stack([linear_by_rows(heads[:, e], experts[e]) for e in range(3)], dim=1)
assert torch.equal(each_by_rows(heads, experts), alone)
turned = experts.transpose(1, 2).contiguous().transpose(1, 2)
assert torch.equal(each_by_rows(heads, turned), alone)
rows, four = heads[:, 0], torch.cat([experts, experts[:1]])
for ends in ([0, 40, 40, 65], [1, 2, 3, 70]):
    out = grouped_by_rows(rows, four, torch.tensor(ends, dtype=torch.int32))
    wanted = [linear_by_rows(rows[a:b], four[e]) for e, (a, b) in enumerate(zip([0, *ends], ends))]
    assert torch.equal(out, torch.cat([*wanted, rows.new_zeros(70 - ends[-1], 50)]))

# Where gradients are wanted, they are those of linear, and the bits are the same.
x, w = normal(5, 34).requires_grad_(), normal(50, 34, seed=1).requires_grad_()
out = linear_by_rows(x, w)
assert torch.equal(out, linear_by_rows(x.detach(), w.detach()))
out.square().sum().backward()
assert relative(w.grad, 2 * out.detach().t() @ x.detach()) < 1e-6
several = experts.clone().requires_grad_()
assert torch.equal(each_by_rows(heads, several), alone) and each_by_rows(heads, several).requires_grad

# Each of these would go unseen, if the comparisons above could not fail.
product, blocks = row_kernels.product, dict(row_kernels.BLOCKS_N_K)
x, w = cancelling(70, 200), weight_of(50, 200)

def split_k(rows, weight):
    if len(rows) > 16:
        return product(rows, weight)
    return product(rows[:, :100], weight[:, :100]) + product(rows[:, 100:], weight[:, 100:])

def tiles_by_rows(rows, weight):
    row_kernels.BLOCKS_N_K = {4: (64, 16 if len(rows) < 16 else 32)}
    return product(rows, weight)

controls = [differing(function, x) for function in (lambda rows: split_k(rows, w), lambda rows: tiles_by_rows(rows, w))]
print(json.dumps([found, bits, controls]))
"""
)


def test_products_are_right_and_give_a_row_its_own_bits() -> None:
    found, bits, controls = output_of(PRODUCTS, TRITON_INTERPRET="1")
    # The interpreter cuts half precision off, by up to an ulp, where it should round.
    limits = {"torch.float32": 1e-6, "torch.bfloat16": 2**-7, "torch.float16": 2**-10}
    assert len(found) == 6
    assert all(error <= limits[case.split()[0]] for case, error in found.items()), str(found)
    assert not any(bits.values()), bits
    assert all(controls), "a split K, and tiles chosen by the number of rows, would show"


SUMS = (
    PREPARE
    + """
WAYS = {
    "sum": lambda x: x.sum(-1),
    "torch.sum": lambda x: torch.sum(x, dim=-1, keepdim=True),
    "mean": lambda x: x.pow(2).mean(-1, keepdim=True),
    "mean of the middle": lambda x: x.view(len(x), 2, -1).mean(dim=(1,)),
    "in float32": lambda x: x.sum(dim=1, dtype=torch.float32),
    "softmax": lambda x: x.softmax(-1),
    "F.softmax": lambda x: F.softmax(x, dim=1, dtype=torch.float32),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "cumsum": lambda x: x.softmax(-1).cumsum(dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], *normal(2, x.shape[-1], dtype=x.dtype, seed=3)),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], normal(x.shape[-1], dtype=x.dtype, seed=3), 1e-6),
    "rms_norm of torch": lambda x: torch.rms_norm(x, x.shape[-1:]),
}
found, bits, grads = {}, {}, {}
for dtype, D in ((torch.float32, 50), (torch.float32, 1400), (torch.bfloat16, 50)):
    x = normal(70, D, dtype=dtype)
    for way, function in WAYS.items():
        with invariant_rows():
            ours, bits[f"{way} {dtype} {D}"] = function(x), differing(function, x)
        found[f"{way} {dtype} {D}"] = relative(ours, function(x))
for way in WAYS.keys() - {"cumsum"}:  # which has none
    got = []
    for context in (invariant_rows(), torch._C.DisableTorchFunction()):
        x = normal(9, 50).requires_grad_()
        with context:
            out = WAYS[way](x)
            (out * normal(*out.shape, seed=5)).sum().backward()
        got.append(x.grad)
    grads[way] = relative(*got)

# Sums of integers, and of all numbers at once, are torch's own.
x = x.detach()
with invariant_rows():
    plain = [torch.arange(5).sum(0), x.sum(), x.double().sum(-1), x.sum((0, 1))]
assert all(map(torch.equal, plain, [torch.tensor(10), x.sum(), x.double().sum(-1), x.sum((0, 1))]))

# A row whose sum is taken in other blocks would show.
x, blocks_of = cancelling(70, 1400), row_kernels._blocks_of
control = []
for blocks in (blocks_of, lambda D: (4, 512)):
    row_kernels._blocks_of = blocks
    control.append(row_kernels.sums(x))
print(json.dumps([found, bits, grads, torch.equal(*control)]))
"""
)


def test_sums_are_right_and_give_a_row_its_own_bits() -> None:
    found, bits, grads, is_same = output_of(SUMS, TRITON_INTERPRET="1")
    assert len(found) == len(bits) == 3 * 12 and len(grads) == 11
    limits = {"float32": 1e-6, "bfloat16": 2**-8}
    wrong = {case: error for case, error in found.items() if error > limits[case.split()[-2].removeprefix("torch.")]}
    assert not wrong, wrong
    assert not any(bits.values()), bits
    assert max(grads.values()) <= 1e-5, grads
    assert not is_same, "another order of adding shows"


# What Triton makes a binary for, told by what it is called with; no device is needed to ask.
BINARIES = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops import ordered_kernels, row_kernels, state_kernels

binaries = {}

class Kernel:
    def __init__(self, kernel):
        self.name = kernel.__name__
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("num_warps", "num_stages")}
            binaries.setdefault(self.name, set()).add(str(self.bind(*args, **kwargs)[1]))
        return launch

for module, names in (
    (row_kernels, ("_products", "_sums", "_cumulative_sums")),
    (ordered_kernels, ("_states",)),
    (state_kernels, ("_merge",)),
):
    for name in names:
        setattr(module, name, Kernel(getattr(module, name)))

def rows_of(M, D, at):
    return torch.zeros((M + 1) * D + at)[at : at + M * D].view(M, D)

w = torch.zeros(WIDTH, WIDTH)
for M in (1, 2, 15, 16, 64, 300):
    for at in (0, 1, 4):
        x = rows_of(M, WIDTH, at)
        row_kernels.product(x, w)
        row_kernels.sums(x), row_kernels.cumulative_sums(x)
for slots, begin in ((1, 0), (16, 1), (333, 48), (5000, 7)):
    for heads_first in (False, True):
        T, K, G = min(slots, 40), 1 + heads_first, 3 + heads_first
        q = rows_of(T, K * G * WIDTH, begin).view(T, K * G, WIDTH)
        both = torch.zeros(slots, K, 2 * WIDTH) if slots % 16 else torch.zeros(2, slots, K, WIDTH)
        keys, values = both.split(WIDTH, dim=-1) if slots % 16 else both
        if heads_first:
            keys, values = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (keys, values))
        for causal in (True, False):
            rows = AttentionRows.build([T], [slots], [list(range(slots))], block_size=1, causal=causal)
            for rows in (rows, rows.within(16)) if causal else (rows,):
                queries_per_unit = ordered_kernels.queries_per_unit(q, keys, values)
                placed = ordered_kernels.PlacedRows.of(rows, queries_per_unit, q.device)
                for shards in (8, 4, 1):
                    order = ordered_kernels.Order(shards, 1 + slots, 0.1, None)
                    ordered_kernels.states(placed, q, keys, values, order)
for rows in (1, 16, 33):
    state_kernels.merge_in_order(torch.zeros(rows, 8, WIDTH).movedim(1, 0), torch.zeros(rows, 8).movedim(1, 0))
    state_kernels.merge_in_order(torch.zeros(8, rows, WIDTH), torch.zeros(8, rows))
print(json.dumps({name: len(found) for name, found in binaries.items()}))
"""


@pytest.mark.parametrize("width", [64, 40])
def test_one_binary_runs_whatever_the_number_of_rows_and_wherever_they_lie(width: int) -> None:
    """Another one could add in another order."""
    found = output_of(BINARIES.replace("WIDTH", str(width)))
    assert found == dict.fromkeys(("_products", "_sums", "_cumulative_sums", "_states", "_merge"), 1)


COMPILED = """
import json
from cpinfer.ops import row_kernels as kernels
from triton_runs import compiled

made = []
for dtype, bytes_each in (("fp32", 4), ("bf16", 2)):
    n, k = kernels.BLOCKS_N_K[bytes_each]
    pointers = dict.fromkeys(("x", "w", "out"), f"*{dtype}") | {"ends": "*i32"}
    blocks = {"BLOCK_M": kernels.BLOCK_M, "BLOCK_N": n, "BLOCK_K": k}
    made += [compiled(kernels._products, pointers, {"HAS_ENDS": has, "w_k": 1, **blocks}, 4) for has in (True, False)]
    made += [
        compiled(kernel, {"x": f"*{dtype}", "out": "*fp32"}, {"ROWS": 4, "BLOCK": 1024}, 4)
        for kernel in (kernels._sums, kernels._cumulative_sums)
    ]
assert all(kernel.asm["cubin"] for kernel in made)
print(json.dumps([made[0].asm["ptx"].count("tf32"), "mma" in made[4].asm["ptx"]]))
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """In full precision without tf32, in half precision by its units for products."""
    assert output_of(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == [0, True]
