from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpinfer.layout.capacity import KVLayout
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


# --- rows without the keys that nobody sees ---

LAW = settings(max_examples=150, deadline=None, derandomize=True)
DROPPED = -1  # what a block table has in place of a block that was given back


def seen_by(rows, row):
    """For each query of a row the slots it sees, in key order: the words of `AttentionRows`, literally."""
    slots, q_len = rows.slots(row).tolist(), int(rows.q_lens[row])
    if not slots:
        return [[]] * q_len
    views = []
    for t in range(q_len):
        end = len(slots) - q_len + t + 1 if rows.causal else len(slots)
        views.append(slots[0 if rows.window is None else max(0, end - rows.window) : end])
    return views


@st.composite
def some_rows(draw, causal):
    """Rows of all kinds side by side: empty, one key, many blocks, key ranges that start anywhere."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    q_lens, lo, hi, tables, first_block = [], [], [], [], 5
    for _ in range(draw(st.integers(0, 4))):
        end = draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 16, 33]))
        begin = draw(st.integers(0, end))
        q_lens.append(draw(st.integers(1, max(1, end - begin) if causal else 5)))
        lo.append(begin)
        hi.append(end)
        # Longer than it need be at times, as no plan of ours is.
        n = -(-end // block_size) + draw(st.sampled_from([0, 0, 1]))
        tables.append(list(draw(st.permutations(range(first_block, first_block + n)))))
        first_block += n
    return AttentionRows(
        np.array(q_lens, dtype=np.int32),
        np.array(lo, dtype=np.int32),
        np.array(hi, dtype=np.int32),
        np.cumsum([0, *map(len, tables)]).astype(np.int32),
        np.array([b for t in tables for b in t], dtype=np.int32),
        block_size,
        causal=causal,
    )


@LAW
@given(some_rows(causal=True), st.integers(1, 40))
def test_within_a_window_each_query_sees_the_last_keys_that_it_saw_and_no_others_are_kept(rows, window):
    got = rows.within(window)
    assert got.window == window and got.causal and got.q_lens is rows.q_lens
    for row in range(rows.num_rows):
        want = [view[-window:] for view in seen_by(rows, row)]
        assert seen_by(got, row) == want
        assert got.slots(row).tolist() == list(dict.fromkeys(slot for view in want for slot in view))


@LAW
@given(some_rows(causal=False), st.data())
def test_above_a_key_exactly_the_keys_from_it_on_are_left(rows, data):
    kv_lo = np.array([data.draw(st.integers(-3, 40)) for _ in range(rows.num_rows)], dtype=np.int64)
    got = rows.above(kv_lo)
    for row in range(rows.num_rows):
        begin = max(int(kv_lo[row]), int(rows.kv_lo[row]))
        kept = rows.slots(row).tolist()[begin - int(rows.kv_lo[row]) :]
        assert got.slots(row).tolist() == kept
        assert seen_by(got, row) == [kept] * int(rows.q_lens[row])
    for array in (got.q_lens, got.kv_lo, got.kv_hi, got.block_indptr, got.block_ids):
        assert array.dtype == np.int32


@LAW
@given(some_rows(causal=False), st.data())
def test_blocks_that_hold_no_key_any_more_are_dropped_from_the_front(rows, data):
    kv_lo = np.array([data.draw(st.integers(0, 40)) for _ in range(rows.num_rows)], dtype=np.int64)
    got = rows.above(kv_lo)
    for row in range(rows.num_rows):
        table = got.block_ids[got.block_indptr[row] : got.block_indptr[row + 1]].tolist()
        original = rows.block_ids[rows.block_indptr[row] : rows.block_indptr[row + 1]].tolist()
        if not len(got.slots(row)):
            assert table == []
            continue
        assert table == original[len(original) - len(table) :]
        assert got.kv_lo[row] < rows.block_size, "the first block left holds the first key left"


@LAW
@given(some_rows(causal=True), st.integers(1, 40))
def test_blocks_given_back_are_never_among_those_that_are_left(rows, window):
    """A sequence's table has no block any more where no query can see one; nobody may look such a block up."""
    ids = rows.block_ids.copy()
    for row in range(rows.num_rows):
        seen = {slot // rows.block_size for view in seen_by(rows, row) for slot in view[-window:]}
        for i in range(rows.block_indptr[row], rows.block_indptr[row + 1]):
            if ids[i] not in seen:
                ids[i] = DROPPED
            else:
                break
    sparse = replace(rows, block_ids=ids)
    got = sparse.within(window)
    for row in range(rows.num_rows):
        assert seen_by(got, row) == [view[-window:] for view in seen_by(rows, row)]
        table = got.block_ids[got.block_indptr[row] : got.block_indptr[row + 1]].tolist()
        # What is left begins with a block that is needed.
        assert table[:1] != [DROPPED]


def test_a_known_window():
    """12 keys in blocks of 4, 3 queries at keys 9, 10, 11, each of which sees 4."""
    rows = build([3], [12], [[7, 8, 9]]).within(4)
    assert (rows.kv_lo.tolist(), rows.kv_hi.tolist()) == ([2], [8])
    assert rows.block_ids.tolist() == [8, 9] and rows.block_indptr.tolist() == [0, 2]
    assert rows.slots(0).tolist() == [34, 35, 36, 37, 38, 39]
    assert seen_by(rows, 0) == [[34, 35, 36, 37], [35, 36, 37, 38], [36, 37, 38, 39]]


def test_a_window_that_hides_nothing_drops_nothing():
    rows = build([3, 1], [12, 5], [[7, 8, 9], [1, 2]])
    got = rows.within(12)
    assert replace(got, window=None).block_ids.tolist() == rows.block_ids.tolist()
    assert (got.kv_lo.tolist(), got.kv_hi.tolist()) == ([0, 0], [12, 5])


def test_rows_that_lose_all_their_keys_are_empty_and_keep_their_queries():
    rows = build([2, 1], [6, 3], [[5, 1], [2]], causal=False).above(np.array([6, 1]))
    assert (rows.kv_lo.tolist(), rows.kv_hi.tolist()) == ([0, 1], [0, 3])
    assert rows.block_ids.tolist() == [2] and rows.q_lens.tolist() == [2, 1]


def test_a_window_off_by_one_would_be_seen():
    rows = build([3], [12], [[7, 8, 9]])
    want = [view[-4:] for view in seen_by(rows, 0)]
    assert seen_by(rows.within(4), 0) == want
    assert seen_by(rows.within(3), 0) != want and seen_by(rows.within(5), 0) != want


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_no_token_is_refused(window):
    with pytest.raises(ValueError, match="a window is at least 1"):
        build([1], [6], [[5, 1]]).within(window)


def test_a_window_over_rows_without_order_is_refused():
    with pytest.raises(ValueError, match="needs causal rows"):
        build([1], [6], [[5, 1]], causal=False).within(3)


def test_rows_over_a_layout_they_are_of_already_are_the_same_rows():
    """A decode step says it of its rows each time, and made anew they would be checked anew."""
    rows = AttentionRows.build([1], [3], [[0]], block_size=4, causal=False)
    latents = rows.over(KVLayout(1, 12, 8, v_is_prefix_of_k=True))
    assert rows.over(KVLayout(2, 8, 8)) is rows
    assert latents.v_is_prefix_of_k and latents.over(KVLayout(2, 8, 8)).v_is_prefix_of_k is False
