"""Which stored rows are a rank's rows of heads that were copied."""

from __future__ import annotations

import numpy as np
import pytest

from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.weight_parts import stored_ranges


@pytest.mark.parametrize(("num_kv_heads", "tp_size"), [(1, 1), (1, 4), (2, 4), (2, 8), (4, 8), (8, 4), (3, 3), (4, 2)])
@pytest.mark.parametrize("head_dim", [1, 3])
def test_the_ranges_of_all_ranks_are_what_repeated_heads_are_cut_to(
    num_kv_heads: int, tp_size: int, head_dim: int
) -> None:
    placement = HeadPlacement(24 if num_kv_heads == 3 else 8, num_kv_heads, tp_size)
    stored = np.arange(num_kv_heads * head_dim)
    copies = stored.reshape(num_kv_heads, head_dim).repeat(placement.rep, axis=0).reshape(-1)
    each = len(copies) // tp_size
    for tp_rank in range(tp_size):
        start, stop = tp_rank * each, (tp_rank + 1) * each
        ranges = stored_ranges(start, stop, head_dim=head_dim, rep=placement.rep)
        assert np.concatenate([stored[slice(*part)] for part in ranges]).tolist() == copies[start:stop].tolist()
        # The layout floor says which heads these are.
        heads = placement.kv_heads(tp_rank)
        assert ranges[0][0] == heads.start * head_dim and ranges[-1][1] == heads.stop * head_dim


@pytest.mark.parametrize("rep", [1, 2, 3])
def test_any_cut_of_any_copies_is_found(rep: int) -> None:
    head_dim, stored = 4, np.arange(3 * 4)
    copies = stored.reshape(3, head_dim).repeat(rep, axis=0).reshape(-1)
    for start in range(len(copies) + 1):
        for stop in range(start, len(copies) + 1):
            ranges = stored_ranges(start, stop, head_dim=head_dim, rep=rep)
            found = np.concatenate([stored[slice(*part)] for part in ranges])
            assert found.tolist() == copies[start:stop].tolist(), (start, stop)
