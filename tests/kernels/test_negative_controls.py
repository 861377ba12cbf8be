"""Does the comparison see what is wrong? The backend is spoilt on purpose, each time in one place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from attention_cases import Heads, check, rows_of
from torch import Tensor

from cpinfer.attention.backends.flashinfer import backend as flashinfer_backend
from cpinfer.attention.backends.flashinfer.page_table import PageTable, page_table
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from interpreted_cuda.interpreter import KernelFaultError
from interpreted_cuda.tensors import CudaTensor, host_of

pytestmark = pytest.mark.timeout(900)

HEADS = Heads(8, KVLayout(2, 128, 128))
SMALL = Heads(8, KVLayout(2, 64, 64))
LATENT = Heads(16, KVLayout(1, 576, 512, v_is_prefix_of_k=True))
ROWS = rows_of([5, 40, 7], [50, 61, 90], 16, causal=True)


def with_page(index: int, page: Callable[[int], int]) -> Callable[[PageTable], PageTable]:
    def change(table: PageTable) -> PageTable:
        pages = table.kv_indices.copy()
        pages[index] = page(int(pages[index]))
        return replace(table, kv_indices=pages)

    return change


def with_last_page(length: Callable[[Any], Any]) -> Callable[[PageTable], PageTable]:
    return lambda table: replace(table, last_page_len=length(table.last_page_len).astype(np.int32))


TABLES: dict[str, Callable[[PageTable], PageTable]] = {
    "not causal": lambda table: replace(table, causal=False),
    "the last page a key short": with_last_page(lambda n: np.maximum(1, n - 1)),
    "the last page a key long, which is NaN": with_last_page(lambda n: n % 16 + 1),
    "a page off by one": with_page(3, lambda page: page + 1),
    "the page table shifted by one": lambda table: replace(table, kv_indices=np.roll(table.kv_indices, 1)),
}


def test_what_is_not_spoilt_passes() -> None:
    assert not check(ROWS, HEADS)


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_a_wrong_page_table_is_seen(change: Callable[[PageTable], PageTable], monkeypatch: Any) -> None:
    monkeypatch.setattr(flashinfer_backend, "page_table", lambda rows, **at: change(page_table(rows, **at)))
    assert check(ROWS, HEADS)


def test_a_window_a_key_short_is_seen(monkeypatch: Any) -> None:
    rows = ROWS.within(17)
    assert not check(rows, SMALL)

    def shorter(rows: AttentionRows, **at: Any) -> PageTable:
        table = page_table(rows, **at)
        return replace(table, window_left=table.window_left - 1)

    monkeypatch.setattr(flashinfer_backend, "page_table", shorter)
    assert check(rows, SMALL)


def test_a_page_outside_of_the_store_ends_the_kernel_by_name(monkeypatch: Any) -> None:
    change = with_page(3, lambda page: 10**6)
    monkeypatch.setattr(flashinfer_backend, "page_table", lambda rows, **at: change(page_table(rows, **at)))
    with pytest.raises(KernelFaultError, match=r"outside of the memory of the call; CTA .* thread .*BatchPrefill"):
        check(ROWS, HEADS)


def test_a_causal_mask_aligned_to_the_first_key_is_seen(monkeypatch: Any) -> None:
    def aligned(rows: AttentionRows, **at: Any) -> PageTable:
        tables = np.split(rows.block_ids, rows.block_indptr[1:-1])
        same = {"block_size": rows.block_size, "causal": True}
        return page_table(AttentionRows.build(rows.q_lens, rows.q_lens, tables, **same), **at)  # type: ignore[arg-type]

    monkeypatch.setattr(flashinfer_backend, "page_table", aligned)
    assert check(ROWS, HEADS)


def test_an_lse_to_base_2_is_seen(monkeypatch: Any) -> None:
    monkeypatch.setattr(flashinfer_backend, "LN_2", 1.0)
    assert "lse by" in check(ROWS, HEADS)


def spoilt_run(monkeypatch: Any, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    run = flashinfer_backend.Wrapper.run

    def spoilt(self: Any, page_size: int, call: Any, q: Tensor, keys: Tensor, values: Tensor, *results: Tensor) -> None:
        run(self, page_size, call, q, *change(keys, values), *results)

    monkeypatch.setattr(flashinfer_backend.Wrapper, "run", spoilt)


def test_keys_and_values_swapped_are_seen(monkeypatch: Any) -> None:
    spoilt_run(monkeypatch, lambda keys, values: (values, keys))
    assert check(ROWS, HEADS)


def test_strides_of_a_packed_store_ignored_are_seen(monkeypatch: Any) -> None:
    def dense(x: Tensor) -> Tensor:
        host = host_of(x)
        strides = (host.shape[1] * host.shape[2], host.shape[2], 1)
        return CudaTensor(host.as_strided(host.shape, strides, host.storage_offset()))

    spoilt_run(monkeypatch, lambda keys, values: (dense(keys), dense(values)))
    assert check(ROWS, HEADS, packed=True)
    assert not check(ROWS, HEADS, packed=False)  # where they are so


def test_latents_handed_over_as_in_0_6_are_seen_where_that_is_deprecated(monkeypatch: Any) -> None:
    wrapper = flashinfer_backend.Wrapper
    plan = wrapper.plan

    def as_before(self: Any, *given: Any) -> None:
        self._metadata = None
        plan(self, *given)

    monkeypatch.setattr(wrapper, "plan", as_before)
    is_deprecated = hasattr(import_module("flashinfer.mla"), "MLAPlanMetadata")
    with pytest.raises(DeprecationWarning, match="MLA") if is_deprecated else nullcontext():
        assert not check(rows_of([1, 1], [60, 3], 16, causal=False), LATENT)
