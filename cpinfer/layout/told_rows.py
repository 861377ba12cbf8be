"""Rows of a step of which all ranks are told something: who computes each, and where it stands in what a rank sends.

tokens 0..4 of a prompt, pcp=2     ranks 0 1 1 0 0      rank 0 sends its rows 0 1 2, rank 1 its rows 0 1
packed on their ranks as           rows  0 0 1 1 2      token 3 is the second that rank 0 sends
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cpinfer.layout.prefill import PrefillSplit
from cpinfer.layout.shards import IntArray


@dataclass(frozen=True)
class ToldRows:
    """`[N]` tokens, in an order that all ranks know: token i is row `rows[i]` of the model's on pcp rank `ranks[i]`.

    A rank sends its rows in ascending order.

    >>> told = ToldRows(np.array([0, 1, 1, 0, 0]), np.array([0, 0, 1, 1, 2]))
    >>> told.places.tolist(), told.own(1).tolist(), told.most
    ([0, 0, 1, 1, 2], [0, 1], 3)
    """

    ranks: IntArray
    rows: IntArray

    @classmethod
    def of_prompts(cls, split: PrefillSplit, prompts: Sequence[int]) -> ToldRows:
        """Of all tokens of some prompts of a prefill step, prompt after prompt, in sequence order."""
        first_rows, num_packed = {}, [0] * split.pcp_size
        for piece in split.pieces:  # as each rank packs them
            first_rows[piece] = num_packed[piece.pcp_rank]
            num_packed[piece.pcp_rank] += piece.num_tokens
        pieces = [piece for prompt in prompts for piece in split.by_prompt[prompt]]
        ranks = np.repeat([piece.pcp_rank for piece in pieces], [piece.num_tokens for piece in pieces])
        return cls(ranks, np.concatenate([first_rows[piece] + np.arange(piece.num_tokens) for piece in pieces]))

    def own(self, pcp_rank: int) -> IntArray:
        """Rows that a rank sends, ascending."""
        return np.sort(self.rows[self.ranks == pcp_rank])

    @cached_property
    def places(self) -> IntArray:
        """`[N]`: where each token stands in what its rank sends."""
        order = np.lexsort((self.rows, self.ranks))
        ranks = self.ranks[order]
        places = np.empty_like(order)
        places[order] = np.arange(len(order)) - np.searchsorted(ranks, ranks)
        return places

    @property
    def most(self) -> int:
        """Rows that the rank with the most of them sends."""
        return int(np.bincount(self.ranks).max())
