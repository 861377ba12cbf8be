"""A backend against the definition of attention, on some hundred tokens, before any model runs on it.

Two mistakes ruin context parallelism and pass unnoticed in a single process: an lse in another base, which is right up
to a factor and wrong in every merge, and a causal mask aligned to the first key, which is right for prompts without
context. Both are looked for by name. (Others shipped each of them: see the tests' negative controls.)

Letters: T queries, H query heads, K KV heads, D head dim of keys, V of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend, AttentionNeeds
from cpinfer.errors import BackendFaultError
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.attention import dense_attention
from cpinfer.ops.float8 import take_rows
from cpinfer.ops.states import State

# Half precision keeps 8 bits of an output of size 1, and lse is float32 sums of products that are exact.
MAX_OUT_ERROR = 5e-2
MAX_LSE_ERROR = 2e-2
# Of the size of the logits, so that it changes every one of them. A model's own is a number that kernels are told.
SOFT_CAP = 3.0

# Neighbours in a table are no neighbours in the store.
_BLOCK_SIZE = 4
_NUM_BLOCKS = 97
_SHORT_TABLES = [[5, 1], [6, 2, 0], [7]]
_LONG_TABLE = [block * 5 % _NUM_BLOCKS for block in range(_NUM_BLOCKS)]


class CheckCase(NamedTuple):
    """Rows of one kind of call and of layer, over stores of `layout` in `key_dtype`."""

    name: str
    rows: AttentionRows
    num_q_heads: int
    layout: KVLayout
    key_dtype: torch.dtype
    soft_cap: float | None


def check_backend(backend: AttentionBackend, needs: AttentionNeeds, device: torch.device) -> None:
    """BackendFaultError, saying what is wrong, when `backend` does not compute attention as everything here expects."""
    for case in check_cases(needs):
        what = _fault(backend, case, _inputs(case, needs.dtype, device))
        if what is not None:
            raise BackendFaultError(
                f"the {backend.name} backend fails its check ({case.name}, {case.num_q_heads} heads over "
                f"{case.layout}, {needs.dtype} over {case.key_dtype}): {what}. Nothing was computed with it. "
                'Use backend "torch", or another version of its library.'
            )


def check_cases(needs: AttentionNeeds) -> Iterator[CheckCase]:
    """Everything that a model of these needs will ask for, in small: what it runs later is of one of these kinds."""
    for num_q_heads, layout in needs.calls:
        for key_dtype in needs.key_dtypes(layout):
            only_cached = layout.v_is_prefix_of_k or key_dtype != needs.dtype
            for kind in needs.layers:
                cap, under = (SOFT_CAP, " under a soft cap") if kind.has_cap else (None, "")
                for name, rows in _rows(kind.has_window, only_cached):
                    yield CheckCase(name + under, rows.over(layout), num_q_heads, layout, key_dtype, cap)


def _fault(backend: AttentionBackend, case: CheckCase, inputs: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """What `backend` does wrong with these rows; None when nothing."""
    try:
        found = backend.plan(case.rows).run(*inputs, scale=_scale(case), soft_cap=case.soft_cap)
    except (RuntimeError, ValueError) as error:  # of libraries: no such kernel, compilation failed, out of memory
        return f"it raised {type(error).__name__}: {error}"
    want = _oracle(case, *inputs)
    return None if _equal(found, want) else _diagnosis(case, *inputs, found, want)


def _rows(has_window: bool, only_cached: bool) -> Iterator[tuple[str, AttentionRows]]:
    """What a layer runs, with few queries and with several tiles of them, which may be other kernels.

    What is cached alone, as latents and fp8 are, is never attended to under a mask. Layers with windows have their
    context in front of the new tokens, under the same mask, and decode over the keys that are left.
    """

    def rows(q_lens: list[int], kv_lens: list[int], *, causal: bool) -> AttentionRows:
        tables = _SHORT_TABLES if len(q_lens) > 1 else [_LONG_TABLE]
        return AttentionRows.build(q_lens, kv_lens, tables, block_size=_BLOCK_SIZE, causal=causal)

    prefill, long_prefill = rows([5, 3, 2], [5, 10, 4], causal=True), rows([300], [387], causal=True)
    decode = rows([1, 1, 1], [7, 9, 0], causal=False)
    if has_window:
        if not only_cached:
            yield "prefill in a window", prefill.within(3)
            yield "long prefill in a window", long_prefill.within(100)
        yield "decode in a window", decode.above(decode.kv_hi - 3)
        return
    yield "context", rows([5, 3, 2], [5, 10, 0], causal=False)
    yield "long context", rows([300], [387], causal=False)
    if not only_cached:
        yield "prefill", prefill
        yield "long prefill", long_prefill
    yield "decode", decode


def _scale(case: CheckCase) -> float:
    return float(case.layout.k_dim**-0.5)


def _inputs(case: CheckCase, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q `[T, H, D]` as a model's attention has it (heads first in memory), keys and values of a store."""
    layout, num_queries = case.layout, case.rows.num_queries
    generator = torch.Generator().manual_seed(0)
    slots = _NUM_BLOCKS * _BLOCK_SIZE

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.key_dtype)

    # Peaked logits: of std 3.
    q = 3 * torch.randn(case.num_q_heads, num_queries, layout.k_dim, generator=generator)
    q = q.to(device, dtype).transpose(0, 1)
    keys = normal(slots, layout.num_heads, layout.k_dim)
    if layout.v_is_prefix_of_k:
        return q, keys, keys[..., : layout.v_dim]
    if layout.k_dim == layout.v_dim:
        return q, keys, normal(slots, layout.num_heads, layout.v_dim)
    both = torch.cat([keys, normal(slots, layout.num_heads, layout.v_dim)], dim=-1)
    return q, both[..., : layout.k_dim], both[..., layout.k_dim :]


def _oracle(case: CheckCase, q: Tensor, keys: Tensor, values: Tensor, *, top_left: bool = False) -> State:
    """Row by row, in float32; under `top_left` with the causal mask aligned to the first key, as it must not be."""
    outs, lses = [], []
    rows, first = case.rows, 0
    for row, q_len in enumerate(rows.q_lens.tolist()):
        slots = torch.from_numpy(rows.slots(row)).to(q.device)
        if top_left and rows.causal:
            slots = slots[:q_len]
        part = q[first : first + q_len].float()
        k, v = take_rows(keys, slots).float(), take_rows(values, slots).float()
        attend = partial(dense_attention, scale=_scale(case), soft_cap=case.soft_cap)
        out, lse = attend(part, k, v, causal=rows.causal, window=rows.window)
        outs.append(out)
        lses.append(lse)
        first += q_len
    return torch.cat(outs), torch.cat(lses)


def _equal(found: State, want: State) -> bool:
    out_error = (found[0].float() - want[0]).abs()
    empty = want[1] == -torch.inf
    lse_error = torch.where(empty, 0.0, found[1] - want[1]).abs()
    # A NaN is no smaller than anything.
    same_empty = bool(((found[1] == -torch.inf) == empty).all())
    return same_empty and bool((out_error <= MAX_OUT_ERROR).all()) and bool((lse_error <= MAX_LSE_ERROR).all())


def _diagnosis(case: CheckCase, q: Tensor, keys: Tensor, values: Tensor, found: State, want: State) -> str:
    out, lse = found
    for factor, base in ((math.log(2), "2"), (1 / math.log(2), "e, where 2 was expected")):
        if _equal((out, lse * factor), want):
            return f"its lse is a logarithm to base {base}"
    if case.rows.causal and _equal(found, _oracle(case, q, keys, values, top_left=True)):
        return "its causal mask is aligned to the first key, not to the last"
    if case.soft_cap is not None and _equal(found, _oracle(case._replace(soft_cap=None), q, keys, values)):
        return "its logits have no soft cap"
    empty = want[1] == -torch.inf
    errors = ((out.float() - want[0]).abs().max(), torch.where(empty, 0.0, lse - want[1]).abs().max())
    return "out differs by {:.3g} and lse by {:.3g}, or a row without keys is not (0, -inf)".format(*errors)
