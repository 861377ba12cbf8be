"""From this rank's rows of logits to the tokens and scores of a step, which all ranks then know."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cpinfer.comm.topology import Topology
from cpinfer.engine.agreement import Says, agree_on_scores, agree_on_tokens
from cpinfer.engine.request import SampledRequest, SampledToken, TokenScore
from cpinfer.engine.sampling import sample_tokens, score_tokens
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.engine.token_records import TokenRecords
from cpinfer.errors import NoTokenError, quoted
from cpinfer.models.invariant_rows import invariant_rows


class LogitsReader:
    """Samples and scores on the ranks that are the authority for their rows, and agrees with the others."""

    def __init__(
        self, topology: Topology, device: torch.device, stop_checker: StopChecker, *, as_trained: bool = False
    ) -> None:
        self._as_trained = as_trained
        # Logprobs are sums over a row, which on a GPU depend on how many rows there are.
        self._around = invariant_rows if as_trained and device.type != "cpu" else nullcontext
        self._topology = topology
        self._device = device
        self._stop_checker = stop_checker

    def sample(
        self,
        logits: Tensor,
        requests: Sequence[SampledRequest],
        samples: Sequence[SampledRequest],
        places: ArrayLike,
        says: Says,
    ) -> tuple[list[SampledToken], Says | None]:
        """Sample this rank's rows, `requests`, where it is their authority; learn the tokens of all `samples`.

        And what ranks say, as `agree_on_tokens` has it.
        """
        topology, own = self._topology, TokenRecords.none(self._device)
        if topology.coords.tp_rank == 0:
            with self._around():
                own = sample_tokens(logits, requests, self._stop_checker, as_trained=self._as_trained)
        num_top = max((s.params.top_logprobs for s in samples), default=0)
        agreed, heard = agree_on_tokens(
            topology.replica,
            topology.grid.tp_size,
            places,
            own,
            num_top,
            says=says,
            is_fault=usable(logits).logical_not(),
        )
        tokens = [token for token in agreed if token is not None]
        if len(tokens) < len(agreed):
            raise _no_token(samples[agreed.index(None)])
        return tokens, heard

    def score(
        self, logits: Tensor, targets: Tensor, places: ArrayLike, num_top: int, says: Says
    ) -> tuple[list[TokenScore], Says | None]:
        """The scores of all `places` of a step, from this rank's rows of them, which are asked for `targets`.

        With the `num_top` likeliest tokens of each. And what ranks say, as `agree_on_scores` has it.
        """
        topology, own = self._topology, TokenRecords.none(self._device)
        if topology.coords.tp_rank == 0:
            with self._around():
                own = score_tokens(logits, targets, num_top)
        return agree_on_scores(
            topology.replica,
            topology.grid.tp_size,
            places,
            own,
            num_top,
            says=says,
            is_fault=usable(logits).logical_not(),
        )


def usable(logits: Tensor) -> Tensor:
    """Whether every row of `logits [N, vocab]` is one to choose a token by: a bool, where the logits are.

    A token may be ruled out (-inf), as hooks do that mask vocabulary which nobody trained. NaN, +inf, and rows that
    rule out all tokens, are faults: each of them shows in the largest of its row. True for N = 0.
    """
    return (logits.amax(dim=-1).abs() < torch.inf).all()


def _no_token(request: SampledRequest) -> NoTokenError:
    prompt, params = request.prompt, request.params
    return NoTokenError(
        f"prompt {quoted(prompt.id)}, sample {request.sample_index}: no token is left to choose behind "
        f"{len(request.sampled)} of the answer; min_new_tokens={params.min_new_tokens} rules out those that end it, "
        "the model all others. Lower min_new_tokens, name fewer stop_token_ids, or look at what masks its logits."
    )
