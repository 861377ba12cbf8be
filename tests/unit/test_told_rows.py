"""Which rows ranks tell of, and where each stands in what its rank sends."""

import numpy as np
import pytest

from cpinfer.layout.prefill import zigzag_split
from cpinfer.layout.told_rows import ToldRows


def told_by_ranks(told, packed):
    """Tokens as every rank finds them in what all ranks send, whose packed rows are `packed[rank]`."""
    sent = [[packed[rank][row] for row in told.own(rank)] for rank in range(len(packed))]
    assert told.most == max(map(len, sent))
    return [sent[rank][place] for rank, place in zip(told.ranks, told.places, strict=True)]


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("pcp_size", [1, 2, 3, 4])
def test_tokens_of_any_prompts_come_in_sequence_order(pcp_size, page_size):
    lens, assigned = [25, 4, 1, 40], [None, pcp_size - 1, 0, None]
    split = zigzag_split(lens, pcp_size, page_size=page_size, assigned=assigned)
    packed = [[(p.prompt, t) for p in split.part(r) for t in range(p.start, p.end)] for r in range(pcp_size)]
    for prompts in ([0], [3], [0, 1, 2, 3], [1, 3], [2], [3, 0]):
        wanted = [(prompt, t) for prompt in prompts for t in range(lens[prompt])]
        assert told_by_ranks(ToldRows.of_prompts(split, prompts), packed) == wanted


def test_a_rank_sends_the_rows_that_are_asked_for_and_no_other():
    # Four rows on two ranks, of which the first of rank 1 does not ask.
    told = ToldRows(np.array([1, 0, 0]), np.array([1, 1, 0]))
    assert told.own(0).tolist() == [0, 1] and told.own(1).tolist() == [1]
    assert told_by_ranks(told, [["a", "b"], ["c", "d"]]) == ["d", "b", "a"]
    assert told.own(2).tolist() == []


def test_head_and_tail_swapped_would_be_seen():
    split = zigzag_split([16], 2)
    told = ToldRows.of_prompts(split, [0])
    swapped = [[t for p in reversed(split.part(r)) for t in range(p.start, p.end)] for r in range(2)]
    assert told_by_ranks(told, swapped) != list(range(16))
    assert np.array_equal(told.ranks, [0] * 4 + [1] * 8 + [0] * 4)
