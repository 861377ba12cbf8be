"""The blocks of a request as packed numbers are its blocks, whatever is done to them between two steps."""

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest
from cpinfer.layout.rows import AttentionRows

CHANGES = st.lists(st.sampled_from(["grow", "drop", "take", "hand over", "look"]), max_size=30)


@given(CHANGES)
def test_packed_blocks_follow_blocks(changes):
    request = SampledRequest(Prompt(0, "a", (1,)), 0, SamplingParams(), 4)
    fresh = iter(range(1000))
    for change in changes:
        if change == "grow":
            request.blocks += [next(fresh), next(fresh)]
        elif change == "drop":
            request.drop_blocks(min(len(request.blocks), request.num_dropped + 1))
        elif change == "take":
            request.take_blocks()
            request.blocks = [next(fresh)]
        elif change == "hand over":
            heir = SampledRequest(Prompt(0, "a", (1,)), 1, SamplingParams(), 4)
            heir.blocks, heir.num_dropped = request.blocks, request.num_dropped
            request.blocks, request.num_dropped = [], 0
            assert not request.packed_blocks
            request = heir
        if change != "grow":  # several times between two looks
            assert request.packed_blocks == array("i", request.blocks)
    assert request.packed_blocks == array("i", request.blocks)


def test_rows_of_packed_tables_are_those_of_lists_padding_included():
    tables = [[7, 8, 9], [], [2, 3]]
    wanted = AttentionRows.build([1, 1, 1], [9, 0, 8], tables, block_size=4, causal=False)
    packed = [array("i", table) if table else () for table in tables]
    found = AttentionRows.build([1, 1, 1], [9, 0, 8], packed, block_size=4, causal=False)
    assert found.block_ids.tolist() == wanted.block_ids.tolist() == [7, 8, 9, 2, 3]
    assert found.block_ids.dtype == np.int32 and found.block_ids.flags.writeable
    nothing = AttentionRows.build([1], [0], [array("i")], block_size=4, causal=False)
    assert len(nothing.block_ids) == 0
