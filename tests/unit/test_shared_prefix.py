"""What rows share is cut off all of them, and nothing else: every query sees the keys it saw, each once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shared_prefix import SharedPrefix, share_prefix

LAW = settings(max_examples=300, deadline=None, derandomize=True)
BLOCK_SIZE = 4


def rows_of(tables: list[list[int]], kv_lens: list[int], q_lens: list[int] | None = None) -> AttentionRows:
    q_lens = [1] * len(tables) if q_lens is None else q_lens
    return AttentionRows.build(q_lens, kv_lens, tables, block_size=BLOCK_SIZE, causal=False)


def full(*tables: list[int]) -> AttentionRows:
    """Rows that see all but one key of their last blocks."""
    return rows_of(list(tables), [len(table) * BLOCK_SIZE - 1 for table in tables])


def cut_of(rows: AttentionRows) -> SharedPrefix:
    cut = share_prefix(rows)
    assert cut is not None
    return cut


def num_read(rows: AttentionRows) -> int:
    return int((rows.kv_hi - rows.kv_lo).sum())


@st.composite
def batches(draw: st.DrawFn) -> AttentionRows:
    """Rows whose tables come from a few stems, so that neighbours begin alike for a while, or not at all."""
    stems = draw(st.lists(st.permutations(range(8)), min_size=1, max_size=3))
    tables, kv_lens, q_lens = [], [], []
    for row in range(draw(st.integers(0, 8))):
        stem = list(draw(st.sampled_from(stems)))[: draw(st.integers(0, 6))]
        own = [100 + 10 * row + i for i in range(draw(st.integers(0, 3)))]
        tables.append(stem + own)
        kv_lens.append(draw(st.integers(0, len(tables[-1]) * BLOCK_SIZE)))
        q_lens.append(draw(st.integers(0, 3)))
    return rows_of(tables, kv_lens, q_lens)


@LAW
@given(batches())
def test_every_query_sees_the_keys_it_saw_in_order_and_once(rows: AttentionRows) -> None:
    cut = share_prefix(rows)
    if cut is None:
        return
    seen: list[list[int]] = []
    for row, q_len in enumerate(cut.shared.q_lens.tolist()):
        seen += [cut.shared.slots(row).tolist()] * q_len
    query = 0
    for row, q_len in enumerate(rows.q_lens.tolist()):
        for _ in range(q_len):
            assert seen[query] + cut.own.slots(row).tolist() == rows.slots(row).tolist()
            query += 1
    assert query == len(seen) == cut.own.num_queries


@LAW
@given(batches())
def test_what_is_saved_is_what_is_no_longer_read(rows: AttentionRows) -> None:
    cut = share_prefix(rows)
    if cut is not None:
        assert num_read(rows) - num_read(cut.shared) - num_read(cut.own) == cut.num_saved_keys > 0


@LAW
@given(batches())
def test_neighbours_that_begin_alike_always_share_something(rows: AttentionRows) -> None:
    """The rule that tells groups apart may cut where less is shared, never everywhere."""
    tables = [rows.block_ids[a:b].tolist() for a, b in zip(rows.block_indptr, rows.block_indptr[1:], strict=False)]
    whole = (rows.kv_hi // BLOCK_SIZE).tolist()
    alike = any(min(whole[i], whole[i + 1]) > 0 and tables[i][0] == tables[i + 1][0] for i in range(len(tables) - 1))
    assert (share_prefix(rows) is not None) == alike


def test_groups_are_told_apart_though_all_begin_with_one_system_prompt() -> None:
    groups = [[1, 2, group, group + 1, group + 2, 1000 + i] for group in (10, 20) for i in range(3)]
    cut = cut_of(full(*groups))
    assert cut.shared.q_lens.tolist() == [3, 3]
    assert cut.shared.block_ids.tolist() == [1, 2, 10, 11, 12, 1, 2, 20, 21, 22]


def test_a_stranger_between_two_groups_is_in_neither() -> None:
    cut = cut_of(full([1, 2, 3], [1, 2, 4], [9, 8], [7], [5, 6, 10], [5, 6, 11]))
    assert cut.shared.q_lens.tolist() == [2, 2, 2]
    assert cut.shared.kv_hi.tolist() == [2 * BLOCK_SIZE, 0, 2 * BLOCK_SIZE]


def test_a_block_that_one_row_sees_in_part_is_shared_by_none() -> None:
    cut = cut_of(rows_of([[1, 2], [1, 2]], [8, 7]))
    assert cut.shared.block_ids.tolist() == [1]
    assert cut.own.kv_hi.tolist() == [4, 3]


@pytest.mark.parametrize(
    "rows",
    [
        rows_of([], []),
        full([1, 2]),
        full([1, 2], [3, 4], [1, 2]),
        rows_of([[1], [1]], [3, 3]),
        rows_of([[], []], [0, 0]),
    ],
    ids=["no rows", "one row", "no neighbours", "no whole block", "no keys"],
)
def test_where_nothing_is_shared_there_is_nothing_to_cut(rows: AttentionRows) -> None:
    assert share_prefix(rows) is None


def test_rows_whose_first_keys_are_cut_off_share_nothing() -> None:
    assert share_prefix(full([1, 2, 3], [1, 2, 4]).above(np.array([1, 1]))) is None


def test_causal_rows_are_refused() -> None:
    rows = AttentionRows.build([1], [1], [[0]], block_size=1, causal=True)
    with pytest.raises(ValueError, match="causal"):
        share_prefix(rows)
