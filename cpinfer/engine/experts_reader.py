"""From the experts that this rank's rows went through to those of all tokens of a step that ask, known to all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cpinfer.comm.topology import Topology
from cpinfer.kv_cache.expert_record import Experts
from cpinfer.layout.told_rows import ToldRows
from cpinfer.models.routed_experts import WatchedExperts
from cpinfer.models.runner import ModelRunner


class ExpertsReader:
    """Watches forwards whose tokens ask, and tells the other ranks. Where no token of a step asks it does nothing."""

    def __init__(self, topology: Topology, runner: ModelRunner) -> None:
        self._topology = topology
        self._runner = runner

    @contextmanager
    def watching(self, told: ToldRows | None) -> Iterator[WatchedExperts | None]:
        """A block for the forward of a step in which `told` ask; None: nobody does."""
        if told is None:
            yield None
            return
        with self._runner.expert_layers.watched() as watched:
            yield watched

    def agree(self, told: ToldRows | None, watched: WatchedExperts | None, num_rows: int) -> Experts | None:
        """`[N, L, E]`: the experts of all N tokens that ask, the same on every rank. None where nobody does.

        `num_rows` of this rank's rows were real. One collective, along the replica: all ranks of a tp group have seen
        the same, and the first of them is the authority, as it is for tokens.
        """
        if told is None or watched is None:
            return None
        topology, num_experts = self._topology, self._runner.spec.experts_per_token
        assert num_experts is not None, "who asks a model without experts is refused"
        seen = watched.rows(num_rows, num_experts)
        own = seen[torch.from_numpy(told.own(topology.coords.pcp_rank)).to(seen.device)]
        message = own.new_zeros(told.most, *own.shape[1:]).to(self._runner.device)
        message[: len(own)] = own
        # As bytes: no backend of torch.distributed sends int16.
        gathered = topology.replica.all_gather(message.view(torch.uint8)).cpu().view(torch.int16).numpy()
        agreed: Experts = gathered[told.ranks * topology.grid.tp_size, told.places]
        return agreed
