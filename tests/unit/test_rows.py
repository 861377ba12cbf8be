import numpy as np
import pytest

from cpinfer.layout.rows import AttentionRows


def build(q_lens, kv_hi, tables, block_size=4, causal=True):
    return AttentionRows.build(q_lens, kv_hi, tables, block_size=block_size, causal=causal)


def test_slots_follow_the_block_table_in_key_order():
    rows = build([2, 3], [6, 3], [[5, 1], [2]])
    assert rows.slots(0).tolist() == [20, 21, 22, 23, 4, 5]
    assert rows.slots(1).tolist() == [8, 9, 10]
    assert (rows.num_rows, rows.num_queries) == (2, 5)


def test_slots_start_at_kv_lo():
    rows = build([1], [6], [[5, 1]], causal=False)
    windowed = AttentionRows(
        rows.q_lens,
        np.array([3], dtype=np.int32),
        rows.kv_hi,
        rows.block_indptr,
        rows.block_ids,
        rows.block_size,
        causal=False,
    )
    assert windowed.slots(0).tolist() == [23, 4, 5]


def test_tables_are_cut_to_the_blocks_that_a_row_needs():
    rows = build([1, 1], [4, 5], [[9, 8, 7], [6, 5, 4]])
    assert rows.block_ids.tolist() == [9, 6, 5]
    assert rows.block_indptr.tolist() == [0, 1, 3]


def test_everything_a_backend_reads_is_int32():
    rows = build([1], [5], [np.array([3, 2], dtype=np.int64)])
    for array in (rows.q_lens, rows.kv_lo, rows.kv_hi, rows.block_indptr, rows.block_ids):
        assert array.dtype == np.int32


def test_no_rows_and_rows_without_keys_are_legal():
    none = build([], [], [])
    assert (none.num_rows, none.num_queries, none.block_indptr.tolist()) == (0, 0, [0])
    empty = build([1, 1], [0, 2], [[], [4]], causal=False)
    assert empty.slots(0).tolist() == []
    assert empty.slots(1).tolist() == [16, 17]


def test_a_row_never_reads_into_the_block_table_of_the_next():
    """A table that is too short is an error: without it row 0 would see block 5 of another sequence."""
    with pytest.raises(ValueError, match="too short for its kv_hi"):
        build([1, 1], [7, 4], [[0], [5]])


def test_fewer_keys_than_causal_queries_are_refused_and_none_at_all_are_not():
    with pytest.raises(ValueError, match="at least as many keys as queries"):
        build([3], [2], [[0]])
    assert build([3], [0], [[]]).num_queries == 3
    assert build([3], [2], [[0]], causal=False).num_queries == 3


def test_arrays_that_disagree_are_refused():
    one, two = np.zeros(1, dtype=np.int32), np.zeros(2, dtype=np.int32)
    ids = np.empty(0, dtype=np.int32)
    with pytest.raises(ValueError, match="disagree on the number of rows"):
        AttentionRows(one, one, two, two, ids, 4, causal=False)
    with pytest.raises(ValueError, match="does not cover block_ids"):
        AttentionRows(one, one, one, two, one, 4, causal=False)
    with pytest.raises(ValueError, match="0 <= lo <= hi"):
        AttentionRows(one, one + 1, one, two, ids, 4, causal=False)
