"""Prompts of many owners as one batch: each distinct prompt once, with its samples dealt back to whoever asked.

owner 0 asks  A A B        prompts  A (3 samples)  B (1)  C (2)
owner 1 asks  A C C        owner 0 gets  A0 A1 B0        owner 1 gets  A2 C0 C1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpinfer.errors import RanksDifferError

TokenIds = tuple[int, ...]
# Samples by (prompt index, sample index).
SamplePlaces = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PooledPrompts:
    """`prompts`, in the order in which they first appear; `counts`, the samples each is asked for; and for each owner
    the `(prompt index, sample index)` of what it asked, in its own order.
    """

    prompts: tuple[TokenIds, ...]
    counts: tuple[int, ...]
    places: tuple[SamplePlaces, ...]

    @classmethod
    def of_ranks(cls, asked: Sequence[Sequence[Sequence[int]]], num_copies: int) -> PooledPrompts:
        """Pool what each rank asks, where `num_copies` neighbours are one owner. RanksDifferError when they differ."""
        for first in range(0, len(asked), num_copies):
            if any(copy != asked[first] for copy in asked[first : first + num_copies]):
                raise RanksDifferError(
                    f"places {first} to {first + num_copies - 1} of the replica train on the same data (num_copies="
                    f"{num_copies}), so they should bring the same prompts; they bring others."
                )
        return cls.of(asked[::num_copies])

    @classmethod
    def of(cls, asked: Sequence[Sequence[Sequence[int]]]) -> PooledPrompts:
        """Pool what each owner asks, one sample for each time a prompt stands there. Owners may ask for nothing.

        >>> pooled = PooledPrompts.of([[[1], [1], [2]], [[1], [3], [3]]])
        >>> pooled.prompts, pooled.counts
        (((1,), (2,), (3,)), (3, 1, 2))
        >>> pooled.places
        (((0, 0), (0, 1), (1, 0)), ((0, 2), (2, 0), (2, 1)))
        """
        index_of: dict[TokenIds, int] = {}
        counts: list[int] = []
        places = []
        for prompts in asked:
            own = []
            for prompt in prompts:
                index = index_of.setdefault(tuple(prompt), len(counts))
                if index == len(counts):
                    counts.append(0)
                own.append((index, counts[index]))
                counts[index] += 1
            places.append(tuple(own))
        return cls(tuple(index_of), tuple(counts), tuple(places))
