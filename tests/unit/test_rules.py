import pytest

from cpinfer.errors import UnsupportedError
from cpinfer.layout.grid import RankGrid, legal_dcp_sizes
from cpinfer.layout.heads import HeadPlacement, head_errors
from cpinfer.layout.rules import LayoutSizes, layout_errors
from cpinfer.refusals import REFUSALS, not_yet_table, refuse


def errors(tp, pcp, dcp, q=8, kv=2, **more):
    return layout_errors(LayoutSizes(tp, pcp, dcp, q, kv, **more))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 2), (4, 2, 4), (8, 1, 2), (1, 1, 1), (1, 4, 4)], ids=str)
def test_the_known_layouts_are_legal(sizes):
    assert errors(*sizes) == []


@pytest.mark.parametrize(
    "sizes, q, kv", [((2, 2, 4), 8, 2), ((6, 1, 2), 12, 2), ((6, 1, 3), 12, 3), ((2, 1, 2), 8, 8), ((8, 2, 16), 8, 2)]
)
def test_groups_that_mix_kv_heads_are_legal(sizes, q, kv):
    assert HeadPlacement(q, kv, sizes[0]).mixes_heads(RankGrid(*sizes))
    assert errors(*sizes, q=q, kv=kv) == []


def test_every_number_of_homes_that_divides_the_pcp_ranks_is_legal():
    assert [dcp for dcp in range(1, 13) if not errors(1, 12, dcp)] == [1, 2, 3, 4, 6, 12]
    assert errors(2, 4, 2) == errors(4, 4, 1) == []


def test_every_fault_is_named_at_once():
    found = errors(3, 2, 5, q=8, kv=2, interleave=0, block_size=-1)
    for words in ("dcp=5 does not fit", "8 query heads do not divide over tp=3", "interleave=0", "block_size=-1"):
        assert any(words in message for message in found), words


@pytest.mark.parametrize("tp, pcp, dcp, dp", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0), (-1, -1, -1, -1)])
def test_sizes_below_one_are_errors_not_exceptions(tp, pcp, dcp, dp):
    assert any("is not a positive number of ranks" in e for e in errors(tp, pcp, dcp, dp_size=dp))


@pytest.mark.parametrize("q, kv", [(0, 0), (0, 1), (8, 0), (-8, -2)])
def test_a_model_without_heads_is_an_error_not_an_exception(q, kv):
    assert any("at least 1" in e for e in errors(2, 1, 1, q=q, kv=kv))


def test_a_dcp_is_legal_for_every_model_whose_heads_can_be_dealt_or_for_none():
    for tp in (1, 2, 3, 4, 6, 8):
        for pcp in (1, 2, 3, 4):
            for kv in (1, 2, 3, 4, 8):
                found = [dcp for dcp in range(1, 33) if not errors(tp, pcp, dcp, q=24, kv=kv)]
                assert found == ([] if head_errors(24, kv, tp) else legal_dcp_sizes(tp, pcp))


def test_a_refusal_says_what_was_found_what_is_missing_and_what_to_do():
    for key, refusal in REFUSALS.items():
        error = refuse(key, "found here")
        assert isinstance(error, UnsupportedError)
        assert str(error) == f"found here: cpinfer does not support {refusal.what} yet. {refusal.instead}"
        assert f"| {refusal.what} | {refusal.instead} |" in not_yet_table()


def test_the_not_yet_table_is_one_markdown_row_per_refusal():
    lines = not_yet_table().splitlines()
    assert len(lines) == len(REFUSALS) + 2
    assert all(line.startswith("|") and line.count("|") == 3 for line in lines)
