"""From this rank's rows of logits to the tokens and scores of a step, which all ranks then know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpinfer.comm.topology import Topology
from cpinfer.engine.agreement import agree_on_scores, agree_on_tokens
from cpinfer.engine.request import SampledRequest, SampledToken, TokenScore
from cpinfer.engine.sampling import sample_tokens, score_tokens
from cpinfer.engine.step_plans import TokenPlace
from cpinfer.engine.stop_checker import StopChecker


class LogitsReader:
    """Samples and scores on the ranks that are the authority for their rows, and agrees with the others."""

    def __init__(self, topology: Topology, device: torch.device, stop_checker: StopChecker) -> None:
        self._topology = topology
        self._device = device
        self._stop_checker = stop_checker

    def sample(
        self,
        logits: Tensor,
        requests: Sequence[SampledRequest],
        samples: Sequence[SampledRequest],
        places: Sequence[TokenPlace],
        *,
        leaves: bool,
    ) -> list[SampledToken]:
        """Sample this rank's rows, `requests`, where it is their authority; learn the tokens of all `samples`."""
        own: Sequence[SampledToken | None] = []
        if not bool(torch.isfinite(logits).all()):
            own = [None] * len(requests)
        elif self._topology.coords.tp_rank == 0:
            own = sample_tokens(logits, requests, self._stop_checker)
        topology, device = self._topology, self._device
        num_top = max((s.params.top_logprobs for s in samples), default=0)
        return agree_on_tokens(topology.replica, topology.grid.tp_size, places, own, device, num_top, leaves=leaves)

    def score(
        self, logits: Tensor, targets: Sequence[int], places: Sequence[TokenPlace], *, leaves: bool
    ) -> list[TokenScore]:
        """The scores of all `places` of a step, from this rank's rows of them, which are asked for `targets`."""
        own: Sequence[TokenScore | None] = []
        if not bool(torch.isfinite(logits).all()):
            own = [None] * len(logits)
        elif self._topology.coords.tp_rank == 0:
            own = score_tokens(logits, targets)
        topology, device = self._topology, self._device
        return agree_on_scores(topology.replica, topology.grid.tp_size, places, own, device, leaves=leaves)
