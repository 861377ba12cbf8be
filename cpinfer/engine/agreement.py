"""How ranks stay alike: before a call they compare what must be equal, after each step they share what was sampled.

Before a call, `begin_together`: one gather of a fixed size, the digest of everything that must be the same. Where it is
not, or where a rank cannot begin, all ranks raise the same error, which names ranks and the first difference.

After a step, `agree_on_tokens`: every rank sends a record per row it computed; of the copies on tp ranks, the first is
the authority. A rank whose logits are unusable, or whose consumer has stopped taking results, says so in the record,
and all ranks raise the same error instead of drifting apart. What else a rank has to say (`Says`) travels along. Where
records say that tokens have kept ids, these follow in a second gather, of as many as there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from itertools import accumulate, chain, pairwise
from typing import Generic, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cpinfer.comm.axis import AxisComm
from cpinfer.comm.topology import Topology
from cpinfer.engine.fingerprint import difference, digest_of, table_of
from cpinfer.engine.request import SampledToken, TokenScore
from cpinfer.engine.token_records import NO_TOKEN, NUM_KEPT, STATUS, TokenRecords, read_tokens
from cpinfer.errors import EngineFaultError, RanksDifferError, StreamEndedError, UserError

T = TypeVar("T")
Number = TypeVar("Number", bound=np.generic)

# What a rank says before a call: it can begin, its user made a mistake, something else went wrong.
_READY, _USER_ERROR, _ERROR = range(3)


class Says(IntFlag):
    """What a rank tells the others with its tokens of a step.

    `FAULT`: its logits are unusable. `LEAVES`: it takes no more results of a stream. `NEWS`: it has arrivals to hand
    over before the next step. `WAITS`: it goes on though nothing of its own may be under way.
    """

    NOTHING = 0
    FAULT = 1
    LEAVES = 2
    NEWS = 4
    WAITS = 8


def _nothing() -> Mapping[str, object]:
    return {}


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """What one rank has made ready for a call of all ranks.

    `same` names what has to be equal on every rank, `same_in_column` what has to be on those of one tp rank: they hold
    the same slices of the weights. `number` is told to everyone. Both are asked only where there are other ranks.
    """

    value: T
    same: Callable[[], Mapping[str, object]]
    same_in_column: Callable[[], Mapping[str, object]] = _nothing
    number: int = 0


def begin_together(topology: Topology, device: torch.device, prepare: Callable[[], Prepared[T]]) -> tuple[T, list[int]]:
    """What `prepare` made here, and the numbers of all ranks; or an error, on every rank of the replica.

    RanksDifferError when what has to be equal is not. A rank whose `prepare` raises has its own error, the others one
    that quotes it: UserError for a UserError. One gather of four numbers per rank; more only on the way to an error.
    """
    replica = topology.replica
    if replica.size == 1:
        alone = prepare()
        return alone.value, [alone.number]
    prepared: Prepared[T] | None = None
    own_error: Exception | None = None
    same: Mapping[str, object] = {}
    in_column: Mapping[str, object] = {}
    record = [_READY, 0, 0, 0]
    try:
        prepared = prepare()
        same, in_column = prepared.same(), prepared.same_in_column()
        record = [_READY, digest_of(same), digest_of(in_column), prepared.number]
    except Exception as error:  # whatever it is, the others must not wait for this rank
        own_error = error
        record[0] = _USER_ERROR if isinstance(error, UserError) else _ERROR
    try:
        with topology.watch.at("the comparison before a call"):
            states, *digests, numbers = replica.all_gather(torch.tensor(record, device=device)).T.tolist()
    except RuntimeError as lost:  # the others have gone: what is wrong here may be why
        if own_error is not None:
            raise own_error from lost
        raise
    if any(states):
        _raise_complaint(topology, device, states, own_error)
    assert prepared is not None, "a rank without an error is prepared"
    tp_size = topology.grid.tp_size
    ranks = topology.replica_ranks
    everyone, column = [0] * replica.size, [i % tp_size for i in range(replica.size)]
    for values, references, mine in zip(digests, (everyone, column), (same, in_column), strict=True):
        if any(value != values[reference] for value, reference in zip(values, references, strict=True)):
            tables = _gather_texts(replica, table_of(mine), device)
            raise RanksDifferError(
                f"{difference(tables, ranks, references)}. Nothing was run: the ranks of a replica must make the same "
                "calls, with the same arguments, on equal weights."
            )
    return prepared.value, numbers


def _raise_complaint(
    topology: Topology, device: torch.device, states: Sequence[int], own_error: Exception | None
) -> NoReturn:
    """The error of this rank, or one that quotes those of others. Collective."""
    told = "" if own_error is None else str(own_error) or type(own_error).__name__
    texts = _gather_texts(topology.replica, told, device)
    if own_error is not None:
        raise own_error
    ranks = topology.replica_ranks
    place = next(i for i, state in enumerate(states) if state)
    if states[place] == _USER_ERROR:
        raise UserError(f"rank {ranks[place]}: {texts[place]}")
    raise RanksDifferError(f"rank {ranks[place]} could not begin this call, so no rank does: {texts[place]}")


def agree_on_tokens(
    replica: AxisComm,
    tp_size: int,
    places: ArrayLike,
    own: TokenRecords,
    num_top: int = 0,
    *,
    says: Says = Says.NOTHING,
    is_fault: Tensor | None = None,
) -> tuple[list[SampledToken | None], Says | None]:
    """The tokens of a step and what ranks say, the same on every rank; when it samples none, nobody is asked: None.

    `places [N, 2]`, integers: (pcp rank, row there) that computed each token; `own` are this rank's rows, on its
    device. What is returned is None where no token could be chosen. `num_top` bounds the `top` of every token of the
    step. `is_fault`: where this rank says `FAULT`, on its device, too. One collective, and another where any token has
    `kept_ids`; the host waits for the device once in each. EngineFaultError, on every rank, when any says `FAULT`;
    StreamEndedError when one `LEAVES`.
    """
    places = np.asarray(places, dtype=np.int64).reshape(-1, 2)
    if not len(places):  # as every rank knows: chunks of prompts that go on in another step
        return [], None
    pcp_ranks, rows = places.T
    num_rows = int(rows.max()) + 1
    record = own.padded(num_rows, num_top)
    flags = int(says) if is_fault is None else is_fault * int(Says.FAULT) + int(says)
    record[0, STATUS].bitwise_or_(flags)
    gathered = replica.all_gather(record).cpu().numpy()
    said = gathered[:, 0, STATUS]
    heard = Says(int(np.bitwise_or.reduce(said)) & ~NO_TOKEN)
    if Says.LEAVES in heard:
        raise ended_by(np.flatnonzero(said & Says.LEAVES).tolist())
    if Says.FAULT in heard:
        faults = np.flatnonzero(said & Says.FAULT).tolist()
        raise EngineFaultError(
            f"logits are not finite on rank(s) {faults} of the replica (NaN, +inf, or -inf for every token); check the "
            "model's weights and dtype, and hooks that mask its logits"
        )
    tokens = read_tokens(gathered[pcp_ranks * tp_size, rows])
    if gathered[:, :, NUM_KEPT].any():
        num_kept = gathered[:, :, NUM_KEPT].sum(axis=1)
        own_kept = [ids or () for ids in own.kept_ids]
        packed = pack_token_lists([*own_kept, *[()] * (num_rows - len(own_kept))])
        kept = gather_packed(replica, packed, (1 + num_rows + num_kept).tolist(), own.numbers.device)
        tokens = [
            token and token._replace(kept_ids=kept[pcp_rank * tp_size][row] or None)
            for token, (pcp_rank, row) in zip(tokens, places.tolist(), strict=True)
        ]
    return tokens, heard


def ended_by(places: Sequence[int]) -> StreamEndedError:
    """The error on every rank when those of the replica say that they leave."""
    return StreamEndedError(
        f"rank(s) {list(places)} of the replica stopped taking the results of a stream, or steps, by leaving a loop, "
        "by another call or by an error. Every rank must take the same: what was under way has ended on all of them.",
        tuple(places),
    )


def agree_on_scores(
    replica: AxisComm,
    tp_size: int,
    places: ArrayLike,
    own: TokenRecords,
    num_top: int = 0,
    *,
    says: Says = Says.NOTHING,
    is_fault: Tensor | None = None,
) -> tuple[list[TokenScore], Says | None]:
    """The scores of a step and what ranks say; arguments and errors as `agree_on_tokens` has them.

    Of a score the token says whether the given one is the likeliest.
    """
    agreed, heard = agree_on_tokens(replica, tp_size, places, own, num_top, says=says, is_fault=is_fault)
    return [TokenScore(token.logprob, bool(token.token_id), token.top) for token in agreed if token is not None], heard


def smallest(replica: AxisComm, value: int, device: torch.device) -> int:
    """The smallest `value` of all ranks: what they can all afford."""
    return int(replica.all_gather(torch.tensor([value], device=device)).min())


def pack_token_lists(lists: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Lists of token ids as one row of numbers: how many lists, their lengths, and their tokens."""
    lens = [len(tokens) for tokens in lists]
    return np.array([len(lens), *lens, *chain.from_iterable(lists)], dtype=np.int64)


def gather_packed(
    replica: AxisComm, own: NDArray[np.int64], lens: Sequence[int], device: torch.device
) -> list[list[tuple[int, ...]]]:
    """The token lists of every rank, in rank order, from what each has packed; `lens` are the lengths of the rows.

    One collective, none of which depends on this rank alone.
    """
    return [_unpack(numbers) for numbers in _gather_rows(replica, own, lens, device).tolist()]


def gather_bytes(replica: AxisComm, own: bytes, lens: Sequence[int], device: torch.device) -> list[bytes]:
    """What each rank hands over, in rank order; `lens` are their lengths. One collective."""
    gathered = _gather_rows(replica, np.frombuffer(own, dtype=np.uint8), lens, device)
    return [row[:n].tobytes() for row, n in zip(gathered, lens, strict=True)]


def _gather_texts(replica: AxisComm, text: str, device: torch.device) -> list[str]:
    """What each rank has to say, in rank order. Two collectives."""
    own = text.encode(errors="replace")
    lens = replica.all_gather(torch.tensor([len(own)], device=device)).flatten().tolist()
    return [told.decode(errors="replace") for told in gather_bytes(replica, own, lens, device)]


def _gather_rows(replica: AxisComm, own: NDArray[Number], lens: Sequence[int], device: torch.device) -> NDArray[Number]:
    """`[ranks, longest]`: rows of every rank, of the lengths `lens`, with zeros behind them. One collective."""
    padded = np.zeros(max(*lens, 1), dtype=own.dtype)
    padded[: len(own)] = own
    gathered: NDArray[Number] = replica.all_gather(torch.from_numpy(padded).to(device)).cpu().numpy()
    return gathered


def _unpack(numbers: list[int]) -> list[tuple[int, ...]]:
    """The lists behind their number and their lengths; what follows them is padding."""
    num_lists = numbers[0]
    ends = list(accumulate(numbers[1 : 1 + num_lists], initial=1 + num_lists))
    return [tuple(numbers[start:end]) for start, end in pairwise(ends)]
