"""What a step says of each token on its way to all ranks: a row of 32-bit numbers, made where the logits are.

    token | status | logprob | processed | kept mass | number of kept ids | n likeliest ids | their n logprobs

Floats travel as their bits. Nothing is read by the host before all ranks' rows have been gathered: once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpinfer.engine.request import SampledToken

# Columns. Behind them the likeliest tokens, -1 where there is none, then their logprobs.
TOKEN, STATUS, LOGPROB, PROCESSED, KEPT_MASS, NUM_KEPT, TOP = range(7)
# In the status of a row, beside what its rank says: no token could be chosen for it.
NO_TOKEN = 16

KeptIds = Sequence[tuple[int, ...] | None]


@dataclass(frozen=True)
class TokenRecords:
    """Rows `numbers [N, TOP + 2 * n]`, int32; `kept_ids` of each row, or of none where nobody asks for them."""

    numbers: Tensor
    kept_ids: KeptIds = ()

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        logprobs: Tensor,
        processed: Tensor | None = None,
        masses: Tensor | None = None,
        has_token: Tensor | None = None,
        top: tuple[Tensor, Tensor] | None = None,
        kept_ids: KeptIds = (),
    ) -> TokenRecords:
        """Of tokens `[N]`, what is said of them `[N]`, and the ids and logprobs of the likeliest, `[N, n]` each.

        What is None is 0 or no such thing, a mass 1; without `has_token` all rows have one.
        """
        num_top = 0 if top is None else top[0].shape[1]
        numbers = torch.zeros(len(tokens), TOP + 2 * num_top, dtype=torch.int32, device=tokens.device)
        floats = numbers.view(torch.float32)
        numbers[:, TOKEN], floats[:, LOGPROB] = tokens, logprobs
        floats[:, KEPT_MASS] = 1 if masses is None else masses
        if processed is not None:
            floats[:, PROCESSED] = processed
        if has_token is not None:
            numbers[:, STATUS] = NO_TOKEN * ~has_token
        if kept_ids:
            numbers[:, NUM_KEPT] = torch.tensor([len(ids or ()) for ids in kept_ids], device=tokens.device)
        if top is not None:
            numbers[:, TOP : TOP + num_top] = top[0].where(top[1] > -torch.inf, -1)
            floats[:, TOP + num_top :] = top[1]
        return cls(numbers, kept_ids)

    @classmethod
    def none(cls, device: torch.device) -> TokenRecords:
        """No row."""
        return cls(torch.zeros(0, TOP, dtype=torch.int32, device=device))

    @classmethod
    def joined(cls, parts: Sequence[tuple[Sequence[int], TokenRecords]], num_rows: int) -> TokenRecords:
        """The rows of several, each with the places that its rows have among all."""
        if len(parts) == 1:
            return parts[0][1]
        num_top = max(records.num_top for _, records in parts)
        numbers = torch.cat([records.padded(len(records.numbers), num_top) for _, records in parts])
        places = torch.tensor([place for rows, _ in parts for place in rows], device=numbers.device)
        kept: list[tuple[int, ...] | None] = [None] * num_rows
        for rows, records in parts:
            for row, ids in zip(rows, records.kept_ids, strict=False):
                kept[row] = ids
        return cls(torch.empty_like(numbers).index_copy_(0, places, numbers), kept if any(kept) else ())

    @property
    def num_top(self) -> int:
        return (self.numbers.shape[1] - TOP) // 2

    def padded(self, num_rows: int, num_top: int) -> Tensor:
        """`[num_rows, TOP + 2 * num_top]`: as wide, and as many, as other ranks may have."""
        n = self.num_top
        if self.numbers.shape == (num_rows, TOP + 2 * num_top):
            return self.numbers.clone()
        found = self.numbers.new_zeros(num_rows, TOP + 2 * num_top)
        found[:, TOP : TOP + num_top] = -1
        here = found[: len(self.numbers)]
        here[:, : TOP + n] = self.numbers[:, : TOP + n]
        here[:, TOP + num_top : TOP + num_top + n] = self.numbers[:, TOP + n :]
        return found

    def tokens(self) -> list[SampledToken | None]:
        """What they say, None where no token could be chosen."""
        found = read_tokens(self.numbers.cpu().numpy())
        if not self.kept_ids:
            return found
        return [token and token._replace(kept_ids=ids) for token, ids in zip(found, self.kept_ids, strict=True)]


def read_tokens(numbers: NDArray[np.int32]) -> list[SampledToken | None]:
    """What rows say that have arrived; their kept ids travel elsewhere."""
    floats, num_top = numbers.view(np.float32), (numbers.shape[1] - TOP) // 2
    tops: Iterable[tuple[tuple[int, float], ...]] = repeat(())
    if num_top:
        listed = zip(numbers[:, TOP : TOP + num_top].tolist(), floats[:, TOP + num_top :].tolist(), strict=True)
        tops = [tuple((i, p) for i, p in zip(*pair, strict=True) if i >= 0) for pair in listed]
    said = (numbers[:, TOKEN], floats[:, LOGPROB], floats[:, PROCESSED])
    fields = zip(*(column.tolist() for column in said), tops, floats[:, KEPT_MASS].tolist(), repeat(None))
    # As `SampledToken(...)` makes each, which is a call in Python.
    tokens: list[SampledToken | None] = list(map(partial(tuple.__new__, SampledToken), fields))
    for row in np.flatnonzero(numbers[:, STATUS] & NO_TOKEN).tolist():
        tokens[row] = None
    return tokens
