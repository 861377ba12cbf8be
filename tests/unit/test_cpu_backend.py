"""The CPU backend: rows of every kind by its kernel, and those of many queries by torch's, equal attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cpinfer.attention.backends import cpu_backend
from cpinfer.attention.backends.base import AttentionNeeds, LayerKind
from cpinfer.attention.backends.cpu_backend import CpuBackend
from cpinfer.attention.backends.registry import make_backend
from cpinfer.attention.backends.self_check import check_backend
from cpinfer.errors import UserError
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.attention import dense_attention
from cpinfer.ops.cpu_kernels import compiling
from cpinfer.ops.float8 import take_rows
from cpinfer.ops.states import State

CPU = torch.device("cpu")
H, K, D, V = 6, 2, 24, 16
SCALE, SLOTS, BLOCK = 0.3, 2400, 4
TOLERANCE = 1e-5  # logits are of size 10, of which float32 has 1e-6
MAX_QUERIES = 16


@pytest.fixture(params=[None, MAX_QUERIES], ids=["all rows", "rows of few queries"])
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    return CpuBackend(request.param)


def rows_of(q_lens: list[int], kv_lens: list[int], *, causal: bool) -> AttentionRows:
    """Over blocks that lie anywhere, none of them in two tables."""
    free = iter(np.random.default_rng(0).permutation(SLOTS // BLOCK).tolist())
    tables = [[next(free) for _ in range(-(-n // BLOCK))] for n in kv_lens]
    return AttentionRows.build(q_lens, kv_lens, tables, block_size=BLOCK, causal=causal)


def inputs(rows: AttentionRows, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q heads first in memory; keys and values of one buffer, NaN wherever no row looks."""
    draw = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(H, rows.num_queries, D, generator=draw)
    store = torch.randn(SLOTS, K, D + V, generator=draw)
    seen = np.concatenate([rows.slots(row) for row in range(rows.num_rows)])
    store[np.setdiff1d(np.arange(SLOTS), seen)] = torch.nan
    store = store.to(dtype)
    return q.to(dtype).transpose(0, 1), store[..., :D], store[..., D:]


def expected(rows: AttentionRows, q: Tensor, keys: Tensor, values: Tensor, soft_cap: float | None = None) -> State:
    def states() -> Iterator[State]:
        ends = np.cumsum(rows.q_lens)
        for row, (end, num) in enumerate(zip(ends.tolist(), rows.q_lens.tolist(), strict=True)):
            slots = torch.from_numpy(rows.slots(row))
            k, v = take_rows(keys, slots).double(), take_rows(values, slots).double()
            seen = {"causal": rows.causal, "window": rows.window, "soft_cap": soft_cap}
            yield dense_attention(q[end - num : end].double(), k, v, scale=SCALE, **seen)

    outs, lses = zip(*states(), strict=True)
    return torch.cat(outs), torch.cat(lses)


def assert_equal(found: State, want: State, tolerance: float = TOLERANCE) -> None:
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=0)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(rows_of([1] * 9, [0, 1, 3, 4, 64, 65, 200, 2, 500], causal=False), id="decode"),
        pytest.param(rows_of([1, 40, 3, 0, 17], [5, 100, 0, 8, 30], causal=False), id="context"),
        pytest.param(rows_of([1, 40, 16, 17], [5, 100, 16, 80], causal=True), id="prefill"),
        pytest.param(rows_of([300], [700], causal=True), id="one long row"),
        pytest.param(rows_of([1, 40, 16, 17], [5, 100, 16, 80], causal=True).within(7), id="windows"),
        pytest.param(rows_of([1, 40, 5], [50, 100, 80], causal=False).above(np.array([7, 30, 79])), id="far keys"),
    ],
)
def test_rows_of_every_kind(backend: CpuBackend, rows: AttentionRows, soft_cap: float | None) -> None:
    q, keys, values = inputs(rows)
    found = backend.plan(rows).run(q, keys, values, scale=SCALE, soft_cap=soft_cap)
    assert_equal(found, expected(rows, q, keys, values, soft_cap))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_out_has_the_dtype_of_queries_and_lse_float32(backend: CpuBackend, dtype: torch.dtype) -> None:
    rows = rows_of([1, 40, 16, 17], [5, 100, 16, 80], causal=True)
    q, keys, values = inputs(rows, dtype)
    found = backend.plan(rows).run(q, keys, values, scale=SCALE)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert_equal(found, expected(rows, q, keys, values), 2e-2)


def test_keys_in_fp8_are_the_numbers_they_say(backend: CpuBackend) -> None:
    rows = rows_of([1, 40, 3], [5, 100, 30], causal=False)
    q, keys, values = inputs(rows)
    keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    assert_equal(backend.plan(rows).run(q, keys, values, scale=SCALE), expected(rows, q, keys, values))


def test_values_may_be_columns_of_keys(backend: CpuBackend) -> None:
    rows = replace(rows_of([1, 40, 3], [5, 100, 30], causal=False), v_is_prefix_of_k=True)
    q, keys, _ = inputs(rows)
    found = backend.plan(rows).run(q, keys, keys[..., :V], scale=SCALE)
    assert_equal(found, expected(rows, q, keys, keys[..., :V]))


def test_it_passes_the_check_of_foreign_backends(backend: CpuBackend) -> None:
    calls = ((8, KVLayout(2, 64, 64)), (4, KVLayout(1, 40, 32, True)))
    check_backend(
        backend,
        AttentionNeeds(torch.float32, calls, layers=(LayerKind(), LayerKind(has_window=True, has_cap=True))),
        CPU,
    )


def test_plans_made_later_leave_earlier_ones_valid(backend: CpuBackend) -> None:
    rows, other = (rows_of([1, 40], [5, n], causal=True) for n in (100, 60))
    q, keys, values = inputs(rows)
    plan = backend.plan(rows)
    backend.plan(other).run(*inputs(other), scale=SCALE)
    assert_equal(plan.run(q, keys, values, scale=SCALE), expected(rows, q, keys, values))


def test_rows_of_many_queries_are_those_of_torch() -> None:
    rows = rows_of([1, 40, 16, 17], [5, 100, 16, 80], causal=True)
    q, keys, values = inputs(rows)
    by_torch = CpuBackend(MAX_QUERIES)._torch.plan(rows).run(q, keys, values, scale=SCALE)
    by_kernel = CpuBackend(None).plan(rows).run(q, keys, values, scale=SCALE)
    found = CpuBackend(MAX_QUERIES).plan(rows).run(q, keys, values, scale=SCALE)
    is_long = torch.from_numpy(np.repeat(rows.q_lens > MAX_QUERIES, rows.q_lens))
    assert is_long.sum() == 40 + 17
    for x, torchs, kernels in zip(found, by_torch, by_kernel, strict=True):
        assert torch.equal(x[is_long], torchs[is_long]) and torch.equal(x[~is_long], kernels[~is_long])
        assert not torch.equal(torchs, kernels)


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel(R) Xeon(R) Processor", None])
def test_who_takes_long_rows_is_said_by_the_processor(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name} if name else {})
    made = cpu_backend.make(CPU, AttentionNeeds(torch.float32, ()))
    of_others = cpu_backend.MAX_QUERIES_WHERE_TORCH_MULTIPLIES_FASTER
    assert made._max_queries == (None if name == "AMD EPYC" else of_others)


def test_it_is_what_auto_takes_where_it_can_be_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    needs = AttentionNeeds(torch.float32, ())
    assert make_backend("auto", CPU, needs).name == make_backend("cpu", CPU, needs).name == "cpu"
    # Rollouts in half precision run what training forwards run, unless it is asked for by name.
    half = AttentionNeeds(torch.bfloat16, ())
    assert (make_backend("auto", CPU, half).name, make_backend("cpu", CPU, half).name) == ("torch", "cpu")
    with pytest.raises(UserError, match="float64"):
        make_backend("cpu", CPU, AttentionNeeds(torch.float64, ()))
    with pytest.raises(UserError, match="on other devices"):
        make_backend("cpu", torch.device("cuda"), needs)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    compiling.compiled.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"torch, which is slower on CPU: no C\+\+ compiler was found"):
            assert make_backend("auto", CPU, needs).name == "torch"
    finally:
        compiling.compiled.cache_clear()
