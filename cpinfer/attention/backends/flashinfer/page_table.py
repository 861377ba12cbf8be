"""Rows as FlashInfer reads them: for each row its pages, and how full the last one is. numpy, on the host.

A page table can only begin at the first key of a page. Where a row does not (windows cut keys off its front), the store
is read as pages of one token instead; such rows see few keys, so their tables stay short.

    block table 7 8 9, blocks of 4, keys [0, 10)      pages 7 8 9              last page holds 2
                                    keys [3, 10)      pages 31 32 ... 37       pages of one token, 7 of them

A row without keys is given one page and told that it holds one key: kernel families differ in what they make of a row
of nothing, so none is asked. `empty` says whose result is to be overwritten.

Letters: B rows that have queries, P pages of all of them, T queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpinfer.layout.rows import AttentionRows, Int32Array, ends_of


@dataclass(frozen=True)
class PageTable:
    """Rows in FlashInfer's terms; all arrays int32 except `empty`.

    `qo_indptr [B + 1]`, `kv_indptr [B + 1]`: where queries and pages of each row begin. `kv_indices [P]`: the pages.
    `last_page_len [B]`, in `[1, page_size]`. `kv_lens [B]`, at least 1. `empty [T]` bool: queries without keys.
    `window_left`: keys that a query sees before its own, -1 for all. `v_is_prefix_of_k`: see `AttentionRows`.
    """

    qo_indptr: Int32Array
    kv_indptr: Int32Array
    kv_indices: Int32Array
    last_page_len: Int32Array
    kv_lens: Int32Array
    empty: NDArray[np.bool_]
    page_size: int
    causal: bool
    window_left: int
    v_is_prefix_of_k: bool

    @property
    def num_rows(self) -> int:
        return len(self.kv_lens)

    @property
    def num_queries(self) -> int:
        return len(self.empty)

    @property
    def is_decode(self) -> bool:
        """One query per row, which then sees all keys of its row, causal or not."""
        return self.window_left < 0 and self.num_queries == self.num_rows


def page_table(rows: AttentionRows, *, single_tokens: bool = False) -> PageTable:
    """The page table of `rows`; with `single_tokens` in pages of one token whatever the rows.

    >>> rows = AttentionRows.build([1, 2], [10, 0], [[7, 8, 9], []], block_size=4, causal=False)
    >>> table = page_table(rows)
    >>> table.kv_indptr.tolist(), table.kv_indices.tolist(), table.last_page_len.tolist(), table.empty.tolist()
    ([0, 3, 4], [7, 8, 9, 0], [2, 1], [False, True, True])
    >>> table = page_table(rows.above(np.array([3, 0])))
    >>> table.page_size, table.kv_indices.tolist()
    (1, [31, 32, 33, 34, 35, 36, 37, 0])
    """
    has_keys = rows.kv_hi > rows.kv_lo
    if not single_tokens and _begin_at_pages(rows, has_keys):
        page_size, first = rows.block_size, np.zeros_like(rows.kv_lo)
    else:
        page_size, first = 1, rows.kv_lo
    kv_lens = np.where(has_keys, rows.kv_hi - first, 1)
    num_pages = -(-kv_lens // page_size)
    whole = _whole_blocks(rows, has_keys, num_pages) if page_size == rows.block_size else None
    pages = _pages(rows, has_keys, first, num_pages, page_size) if whole is None else whole
    kept = rows.q_lens > 0  # rows without queries have no place in a batch
    if not kept.all():
        pages = pages[np.repeat(kept, num_pages)]
    return PageTable(
        qo_indptr=ends_of(rows.q_lens[kept]),
        kv_indptr=ends_of(num_pages[kept]),
        kv_indices=np.ascontiguousarray(pages, dtype=np.int32),
        last_page_len=((kv_lens[kept] - 1) % page_size + 1).astype(np.int32),
        kv_lens=kv_lens[kept].astype(np.int32),
        empty=np.repeat(~has_keys, rows.q_lens),
        page_size=page_size,
        causal=rows.causal,
        window_left=-1 if rows.window is None else rows.window - 1,
        v_is_prefix_of_k=rows.v_is_prefix_of_k,
    )


def _begin_at_pages(rows: AttentionRows, has_keys: NDArray[np.bool_]) -> bool:
    """Whether every row may begin at the first key of its table: it does, or its window hides what lies before."""
    lo = rows.kv_lo[has_keys]
    if rows.window is None:
        return not lo.any()
    hidden = np.maximum(0, rows.kv_hi - rows.q_lens - rows.window + 1)[has_keys]
    return bool((lo <= hidden).all())


def _whole_blocks(
    rows: AttentionRows, has_keys: NDArray[np.bool_], num_pages: Int32Array
) -> NDArray[np.integer] | None:
    """The block tables as they are, with a page for each empty row; None where they hold more than that."""
    held = np.diff(rows.block_indptr)
    if not np.array_equal(held, np.where(has_keys, num_pages, 0)):
        return None
    return rows.block_ids if has_keys.all() else np.insert(rows.block_ids, rows.block_indptr[:-1][~has_keys], 0)


def _pages(
    rows: AttentionRows, has_keys: NDArray[np.bool_], first: Int32Array, num_pages: Int32Array, page_size: int
) -> NDArray[np.integer]:
    """The pages of every row from key `first` on, one after another."""
    row = np.repeat(np.arange(rows.num_rows), num_pages)
    page = np.arange(len(row)) - np.repeat(ends_of(num_pages)[:-1], num_pages)
    key = first[row] + page * page_size
    block, offset = np.divmod(key, rows.block_size)
    found = np.zeros(len(row), dtype=np.int64)
    real = has_keys[row]
    found[real] = rows.block_ids[(rows.block_indptr[row] + block)[real]]
    pages: NDArray[np.integer] = np.where(real, found * (rows.block_size // page_size) + offset // page_size, 0)
    return pages
