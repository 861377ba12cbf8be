"""Every legal layout of up to 12 ranks, one case each: minutes, so not part of `make test`."""

from __future__ import annotations

import pytest

from cpinfer.layout.grid import RankGrid, legal_dcp_sizes
from cpinfer.layout.rules import LayoutSizes, layout_errors
from cpinfer_tools.gpu.attention_ranks import Case, run_case

MAX_RANKS = 12
NUM_Q_HEADS = 12
TOLERANCE = 1e-5


def legal_layouts() -> list[tuple[int, int, int, int]]:
    """(tp, pcp, dcp, KV heads) of all layouts that the engine takes, for every number of KV heads of 12 query heads."""
    return [
        (tp, pcp, dcp, kv)
        for tp in range(1, MAX_RANKS + 1)
        for pcp in range(1, MAX_RANKS // tp + 1)
        for dcp in legal_dcp_sizes(tp, pcp)
        for kv in (1, 2, 3, 4, 6, 12)
        if not layout_errors(LayoutSizes(tp, pcp, dcp, NUM_Q_HEADS, kv))
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("interleave", [1, 5])
def test_attention_of_every_layout_of_up_to_12_ranks_equals_dense_attention(interleave: int) -> None:
    layouts = legal_layouts()
    assert len(layouts) > 100
    for tp, pcp, dcp, kv in layouts:
        case = Case(RankGrid(tp, pcp, dcp), NUM_Q_HEADS, kv, (1, 11, 47, 64), interleave=interleave, num_new_tokens=2)
        assert run_case(case).max_error <= TOLERANCE, case
