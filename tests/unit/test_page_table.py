"""Page tables spell out exactly the keys that rows see."""

from __future__ import annotations

import numpy as np
import pytest

from cpinfer.attention.backends.flashinfer.page_table import PageTable, page_table
from cpinfer.layout.rows import AttentionRows

TABLES = [[7, 8, 9, 2, 3], [], [4], [0, 1]]


def rows_of(q_lens: list[int], kv_hi: list[int], *, causal: bool = False, block_size: int = 4) -> AttentionRows:
    return AttentionRows.build(q_lens, kv_hi, TABLES, block_size=block_size, causal=causal)


def slots_in(table: PageTable, row: int) -> list[int]:
    """The slots of a row, walked as FlashInfer walks them."""
    pages = table.kv_indices[table.kv_indptr[row] : table.kv_indptr[row + 1]]
    num_keys = (len(pages) - 1) * table.page_size + table.last_page_len[row]
    assert num_keys == table.kv_lens[row]
    slots = [page * table.page_size + i for page in pages.tolist() for i in range(table.page_size)]
    return slots[:num_keys]


@pytest.mark.parametrize("single_tokens", [False, True])
@pytest.mark.parametrize("kv_lo", [[0, 0, 0, 0], [3, 0, 1, 0], [4, 0, 0, 5], [17, 0, 2, 7]])
def test_pages_are_the_slots_of_their_row(kv_lo: list[int], single_tokens: bool) -> None:
    rows = rows_of([1, 2, 3, 1], [18, 0, 3, 8]).above(np.array(kv_lo))
    table = page_table(rows, single_tokens=single_tokens)
    assert table.page_size == (1 if single_tokens or rows.kv_lo.any() else 4)
    for row in (0, 2, 3):
        assert slots_in(table, row) == rows.slots(row).tolist()
    assert slots_in(table, 1) == [0], "a row without keys is told that it has one"
    assert table.empty.tolist() == [False, True, True, False, False, False, False]
    assert table.qo_indptr.tolist() == [0, 1, 3, 6, 7]


def test_everything_is_int32_and_contiguous() -> None:
    for rows in (rows_of([1, 1, 1, 1], [18, 0, 3, 8]), rows_of([1, 1, 1, 1], [18, 0, 3, 8]).above(np.full(4, 2))):
        table = page_table(rows)
        for array in (table.qo_indptr, table.kv_indptr, table.kv_indices, table.last_page_len, table.kv_lens):
            assert array.dtype == np.int32 and array.flags.c_contiguous


def test_rows_without_queries_have_no_place_in_the_batch() -> None:
    table = page_table(rows_of([2, 1, 0, 1], [18, 0, 3, 8]))
    assert table.num_rows == 3 and table.num_queries == 4
    assert slots_in(table, 2) == list(range(8))


def test_a_window_needs_no_pages_of_one_token_where_it_hides_what_lies_before_the_first_key() -> None:
    rows = rows_of([3, 0, 2, 8], [18, 0, 3, 8], causal=True).within(5)
    assert rows.kv_lo.any()
    table = page_table(rows)
    assert table.page_size == 4 and table.window_left == 4
    # Counted from the end of the row, as windows and causal masks are, the keys are where they were.
    assert slots_in(table, 0)[-7:] == rows.slots(0).tolist()


def test_keys_that_no_window_hides_are_left_out_by_pages_of_one_token() -> None:
    rows = rows_of([3, 0, 2, 8], [18, 0, 3, 8], causal=True).within(6)
    table = page_table(rows.above(rows.kv_lo + np.array([1, 0, 0, 0])))
    assert table.page_size == 1


def test_tables_longer_than_needed_are_cut() -> None:
    rows = AttentionRows(
        q_lens=np.array([1, 1], dtype=np.int32),
        kv_lo=np.array([0, 0], dtype=np.int32),
        kv_hi=np.array([3, 5], dtype=np.int32),
        block_indptr=np.array([0, 3, 6], dtype=np.int32),
        block_ids=np.array([5, 6, 7, 2, 1, 0], dtype=np.int32),
        block_size=4,
        causal=False,
    )
    assert page_table(rows).kv_indices.tolist() == [5, 2, 1]


def test_a_batch_is_decode_when_every_row_has_one_query_and_no_window() -> None:
    assert page_table(rows_of([1, 1, 1, 1], [18, 0, 3, 8])).is_decode
    assert not page_table(rows_of([1, 2, 1, 1], [18, 0, 3, 8])).is_decode
    assert not page_table(rows_of([1, 1, 1, 1], [18, 0, 3, 8], causal=True).within(3)).is_decode


def test_a_plan_without_rows_is_empty() -> None:
    table = page_table(AttentionRows.build([], [], [], block_size=4, causal=True))
    assert (table.num_rows, table.num_queries, len(table.kv_indices)) == (0, 0, 0)
