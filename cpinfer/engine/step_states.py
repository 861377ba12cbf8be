"""Makes of a planned step what its layers of linear attention call, where a model has any."""

from __future__ import annotations

from cpinfer.attention.linear_attention import DecodeStates, LinearStep, PrefillStates
from cpinfer.comm.axis import AxisComm
from cpinfer.engine.step_plans import DecodeInput, PrefillInput
from cpinfer.kv_cache.state_store import StateStore


class StepStates:
    """The states of sequences in steps on one rank, over one store; `comm` runs over the pcp ranks."""

    def __init__(self, store: StateStore, comm: AxisComm) -> None:
        self._store = store
        self._comm = comm

    def prefill(self, planned: PrefillInput) -> LinearStep:
        """Pieces of prompts, behind what earlier steps left of them."""
        assert planned.states is not None, "the planner of such a model plans them"
        return PrefillStates(planned.states, self._store, self._comm)

    def decode(self, planned: DecodeInput) -> LinearStep:
        """This rank's rows, none where it has none."""
        return DecodeStates(planned.state_slots, self._store)
