"""How replicated schedulers stay alike: after each step, one gather of what was sampled, from the ranks that sampled.

Every rank sends a record per row it computed; of the copies on tp ranks, the first is the authority. A rank whose
logits are not numbers says so in the record, and all ranks raise the same error instead of drifting apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

import numpy as np
import torch

from cpinfer.comm.axis import AxisComm
from cpinfer.engine.request import SampledToken, TokenScore
from cpinfer.errors import EngineFaultError

_FAULT = 1
# Columns of a record, int32; floats as their bits. Behind them num_top likeliest tokens, then their logprobs.
_TOKEN, _STATUS, _LOGPROB, _PROCESSED, _TOP = range(5)


def agree_on_tokens(
    replica: AxisComm,
    tp_size: int,
    places: Sequence[tuple[int, int]],
    own: Sequence[SampledToken | None],
    device: torch.device,
    num_top: int = 0,
) -> list[SampledToken]:
    """The tokens of a step, the same on every rank; none when the step samples none.

    `places[i]` is (pcp rank, row there) that computed token i; `own` are this rank's rows, None where its logits were
    not finite. `num_top` bounds the `top` of every token of the step. EngineFaultError, on every rank, when any rank
    reports such a row.
    """
    if not places:  # as every rank knows: chunks of prompts that go on in another step
        return []
    num_rows = max(row for _, row in places) + 1
    ints = np.zeros((num_rows, _TOP + 2 * num_top), dtype=np.int32)
    floats = ints.view(np.float32)  # the same bits
    for row, token in enumerate(own):
        if token is None:
            ints[row, _STATUS] = _FAULT
            continue
        ints[row, _TOKEN] = token.token_id
        floats[row, _LOGPROB], floats[row, _PROCESSED] = token.logprob, token.processed_logprob
        ints[row, _TOP : _TOP + num_top] = -1
        for i, (token_id, logprob) in enumerate(token.top):
            ints[row, _TOP + i], floats[row, _TOP + num_top + i] = token_id, logprob
    gathered = replica.all_gather(torch.from_numpy(ints).to(device)).cpu().numpy()
    faults = np.flatnonzero((gathered[..., _STATUS] == _FAULT).any(axis=1)).tolist()
    if faults:
        raise EngineFaultError(
            f"logits are not finite on rank(s) {faults} of the replica; check the model's weights and dtype"
        )
    pcp_ranks, rows = np.array(places).T
    mine = gathered[pcp_ranks * tp_size, rows]
    return [_decode(*row, num_top) for row in zip(mine.tolist(), mine.view(np.float32).tolist(), strict=True)]


def agree_on_scores(
    replica: AxisComm,
    tp_size: int,
    places: Sequence[tuple[int, int]],
    own: Sequence[TokenScore | None],
    device: torch.device,
) -> list[TokenScore]:
    """The scores of a step, the same on every rank; arguments and faults as `agree_on_tokens` has them."""
    as_tokens = [None if s is None else SampledToken(int(s.is_greedy), s.logprob, 0.0) for s in own]
    agreed = agree_on_tokens(replica, tp_size, places, as_tokens, device)
    return [TokenScore(token.logprob, bool(token.token_id)) for token in agreed]


def _decode(ints: list[int], floats: list[float], num_top: int) -> SampledToken:
    ids, logprobs = ints[_TOP : _TOP + num_top], floats[_TOP + num_top :]
    top = tuple((i, p) for i, p in zip(ids, logprobs, strict=True) if i >= 0)
    return SampledToken(ints[_TOKEN], floats[_LOGPROB], floats[_PROCESSED], top)


def smallest(replica: AxisComm, value: int, device: torch.device) -> int:
    """The smallest `value` of all ranks: what they can all afford."""
    return int(replica.all_gather(torch.tensor([value], device=device)).min())


def gather_token_lists(
    replica: AxisComm, own: Sequence[Sequence[int]], device: torch.device
) -> list[list[tuple[int, ...]]]:
    """What every rank gave, in rank order: lists of token ids, of any number and length. Two collectives."""
    lens = [len(tokens) for tokens in own]
    packed = np.array([len(lens), *lens, *chain.from_iterable(own)], dtype=np.int64)
    longest = int(replica.all_gather(torch.tensor([len(packed)], device=device)).max())
    padded = np.zeros(longest, dtype=np.int64)
    padded[: len(packed)] = packed
    gathered = replica.all_gather(torch.from_numpy(padded).to(device)).cpu().tolist()
    return [_unpack(numbers) for numbers in gathered]


def _unpack(numbers: list[int]) -> list[tuple[int, ...]]:
    """The lists behind their number and their lengths; what follows them is padding."""
    num_lists = numbers[0]
    ends = list(accumulate(numbers[1 : 1 + num_lists], initial=1 + num_lists))
    return [tuple(numbers[start:end]) for start, end in pairwise(ends)]
