"""Into how many KV shards the sequences of a phase are cut while they decode: into one, or into as many as pcp ranks.

Over P ranks that hold the same weights, dcp=1 makes each of them a home: a sequence decodes on one rank, no collective
runs, and all wait for the home that has the most to do. dcp=P makes one home of all: rows and keys are shared evenly,
and every layer has two collectives.

    rows 0..7, P=2    dcp=1   home 0: 0 2 4 6   home 1: 1 3 5 7     step = the slower home
                      dcp=2   one home: 0 1 2 3 4 5 6 7             step = half of all, collectives included

What a step takes is linear in the rows and keys of a rank, by rates that were measured where it runs, for either. A
phase is the sum of its steps, from one end of an answer to the next.

>>> one, both = DecodeRates(8e-3, 5e-4, key_s=1e-7), DecodeRates(12e-3, 6e-4, key_s=1e-7)
>>> long_answer, long_prompt = ([512] * 8, [256] + [16] * 7), ([200000], [64])
>>> [round(phase_seconds(one, *long_answer, num_homes=2), 3), round(phase_seconds(both, *long_answer, num_shards=2), 3)]
[2.081, 3.098]
>>> [best_shards({1: one, 2: both}, *phase) for phase in (long_answer, long_prompt)]
[1, 2]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DecodeRates:
    """What decode steps take on a rank in one layout, all layers and collectives together, while all ranks run.

    Attributes:
        first_s: seconds of a step of one row, without keys.
        row_s: of each more row.
        key_s: of each key of a row.
    """

    first_s: float
    row_s: float
    key_s: float

    @classmethod
    def through(cls, one: float, rows: tuple[int, float], keys: tuple[int, float]) -> DecodeRates:
        """From the seconds of one row, of so many rows, and of one row over so many keys. More never takes less.

        Where one row is all, or no key, another one is taken to cost nothing.
        """
        return cls(one, max(0.0, (rows[1] - one) / max(1, rows[0] - 1)), max(0.0, (keys[1] - one) / max(1, keys[0])))


def phase_seconds(
    rates: DecodeRates,
    context_lens: Sequence[int],
    num_new: Sequence[int],
    *,
    num_homes: int = 1,
    num_shards: int = 1,
    max_num_seqs: int | None = None,
) -> float:
    """What all decode steps of a phase take; 0 for no sample.

    Args:
        rates: of one rank in this layout.
        context_lens: tokens of each sample before its answer; samples are dealt to homes in turn.
        num_new: tokens of each answer.
        num_homes: ranks, or groups of them, that hold whole sequences.
        num_shards: ranks of a home, which share its rows and keys.
        max_num_seqs: samples that run at once; where there are more, the phase has more steps.

    Returns:
        Seconds.
    """
    if not len(num_new):
        return 0.0
    contexts, new = np.asarray(context_lens, dtype=np.int64), np.asarray(num_new, dtype=np.int64)
    ends, end_of = np.unique(new, return_inverse=True)
    # [ends, homes]: samples that are alive up to each end, and their tokens before they began.
    rows, tokens = np.zeros((2, len(ends), num_homes), dtype=np.int64)
    homes = np.arange(len(new)) % num_homes
    np.add.at(rows, (end_of, homes), 1)
    np.add.at(tokens, (end_of, homes), contexts)
    rows, tokens = (x[::-1].cumsum(axis=0)[::-1] for x in (rows, tokens))
    begins = np.concatenate([[1], ends[:-1]])  # the first token of an answer comes from its prompt
    keys = tokens + rows * ((begins + ends) / 2)[:, None]
    alive = rows.sum(axis=1)
    at_once = np.ones(len(ends)) if max_num_seqs is None else np.minimum(1.0, max_num_seqs / alive)
    own_rows = np.ceil(rows * at_once[:, None] / num_shards)
    seconds = rates.first_s + rates.row_s * np.maximum(0, own_rows - 1)
    seconds = np.where(rows > 0, seconds + rates.key_s * keys * at_once[:, None] / num_shards, 0.0)
    num_steps = np.maximum(0, ends - begins) / at_once
    return float((seconds.max(axis=1) * num_steps).sum())


def best_shards(
    rates: Mapping[int, DecodeRates],
    context_lens: Sequence[int],
    num_new: Sequence[int],
    max_num_seqs: int | None = None,
) -> int:
    """How many shards decode a phase the soonest, of those that `rates` are known of; the fewest of equal ones.

    Args:
        rates: by number of shards. The largest is that of the ranks, which several homes share for fewer.
        context_lens: as `phase_seconds` has it, like what follows.
        num_new: tokens of each answer.
        max_num_seqs: samples that run at once.

    Returns:
        A key of `rates`.
    """
    num_ranks = max(rates)
    return min(
        sorted(rates),
        key=lambda n: phase_seconds(
            rates[n], context_lens, num_new, num_homes=num_ranks // n, num_shards=n, max_num_seqs=max_num_seqs
        ),
    )
