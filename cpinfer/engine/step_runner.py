"""One scheduled step on this rank: plan it, run the model, sample, and agree with the other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpinfer.attention.linear_attention import LinearStep
from cpinfer.attention.steps import AttentionStep
from cpinfer.engine.agreement import Says
from cpinfer.engine.decode_cuda_graphs import DecodeCudaGraphs
from cpinfer.engine.experts_reader import ExpertsReader
from cpinfer.engine.logits_reader import LogitsReader
from cpinfer.engine.request import SampledRequest, SampledToken, TokenScore
from cpinfer.engine.step import Step
from cpinfer.engine.step_attention import StepAttention
from cpinfer.engine.step_plans import DecodeInput, StepPlanner
from cpinfer.engine.step_states import StepStates
from cpinfer.kv_cache.expert_record import Experts
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.models.runner import ModelRunner


@dataclass(frozen=True)
class StepOutput:
    """The tokens of `step.samples`, and the scores of its chunks' `scored_positions`, one after another.

    `heard`: what ranks said, as `agree_on_tokens` has it. `experts`: those of the tokens of `step.told_of_experts`, one
    after another; None where there are none.
    """

    sampled: list[SampledToken]
    scores: Sequence[TokenScore] = ()
    heard: Says | None = None
    experts: Experts | None = None


class StepRunner:
    """Runs steps on one rank: each passes through its parts in turn.

    `graphs` replay decode steps, where there are; `states` are those of layers of linear attention. `others` run steps
    of other layouts over the same cache, by number of KV shards.
    """

    def __init__(
        self,
        runner: ModelRunner,
        cache: PagedKVCache,
        planner: StepPlanner,
        attention: StepAttention,
        reader: LogitsReader,
        experts: ExpertsReader,
        graphs: DecodeCudaGraphs | None,
        states: StepStates | None = None,
        others: Mapping[int, StepRunner] = MappingProxyType({}),
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._planner = planner
        self._attention = attention
        self._reader = reader
        self._experts = experts
        self._graphs = graphs
        self._states = states
        self._others = others
        # Whether nobody waits for this rank within a forward of a home that has no sequence.
        self._may_rest = states is None and not runner.weights_come_and_go
        # On a device the model still runs when it has been called. On CPU it has run, and nothing would be gained.
        self._plans_ahead = runner.device.type != "cpu"

    def over(self, num_shards: int) -> StepRunner:
        """Who runs steps of sequences in so many KV shards."""
        return self._others.get(num_shards, self)

    def begin(self) -> None:
        """Before the first of many steps. Graphs of weights that have moved, on any rank, are forgotten by all.

        Copies of weights that have changed are made anew.
        """
        self._runner.prepacked.renew()
        for runner in (self, *self._others.values()):
            if runner._graphs is not None:
                runner._graphs.forget_what_moved()

    def end(self) -> None:
        """After the last of many steps: nothing is held on to of who took part."""
        for runner in (self, *self._others.values()):
            runner._planner.forget()

    def weights_changed(self) -> None:
        """Other adapters may be other modules: what was captured without them says nothing of them."""
        self._runner.prepacked.pack()
        self._cache.forget_faults()
        for runner in (self, *self._others.values()):
            if runner._graphs is not None:
                runner._graphs.forget()

    def clear_cache(self, num_blocks: int | None = None) -> None:
        """Nothing of what is cached will be read again, or of its first blocks: they are zeros."""
        self._cache.clear(num_blocks)

    def run(self, step: Step, says: Says = Says.NOTHING) -> StepOutput:
        """What `step` samples and scores, the same on every rank. `says` travels with it."""
        return self._prefill(step, says) if step.chunks else self._decode(step.running, says)

    def rehearse(self, running: Sequence[SampledRequest]) -> None:
        """Run the model on a decode step of which nothing comes, to its end. Their blocks are written to."""
        planned = self._planner.decode(running)
        self._decode_logits(planned)[:1, :1].cpu()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks of this rank's home, (from, to)."""
        self._cache.copy_blocks(pairs)

    def _prefill(self, step: Step, says: Says) -> StepOutput:
        planned = self._planner.prefill(step.chunks)
        staging = self._cache.staging
        with staging.together():
            attention = self._attention.prefill(planned)
            linear = None if self._states is None else self._states.prefill(planned)
            inputs = self._inputs(planned.token_ids, planned.plan.positions, planned.kept_rows)
            drawn, targets = (staging.put(_int64(rows)) for rows in (planned.drawn, planned.targets))
        with self._experts.watching(planned.told) as watched:
            logits = self._forward(inputs, attention, linear)
        num_sampled = len(planned.sampled_rows)
        # As a rule each row is drawn from once.
        rows = logits[:num_sampled] if len(planned.drawn) == num_sampled else logits[drawn]
        num_top = max((c.prefill.requests[0].num_top for c in step.chunks if c.scored_positions), default=0)
        sampled, heard = self._reader.sample(rows, planned.requests, step.samples, planned.places, says)
        scores, heard_again = self._reader.score(logits[num_sampled:], targets, planned.scored.places, num_top, says)
        experts = self._experts.agree(planned.told, watched, len(planned.token_ids))
        return StepOutput(sampled, scores, heard_again if heard is None else heard, experts)

    def _decode(self, running: Sequence[SampledRequest], says: Says) -> StepOutput:
        planned = self._planner.decode(running)
        with self._experts.watching(planned.told) as watched:
            logits = self._decode_logits(planned)
        if self._plans_ahead:
            self._planner.plan_ahead()
        sampled, heard = self._reader.sample(logits, planned.requests, running, planned.places, says)
        experts = self._experts.agree(planned.told, watched, len(planned.requests))
        return StepOutput(sampled, heard=heard, experts=experts)

    def _decode_logits(self, planned: DecodeInput) -> Tensor:
        """`[N, vocab]` of this rank's rows. A rank whose home has none runs no model, if nobody waits for it."""
        tokens, plan = planned.token_ids, planned.plan
        if plan is None and planned.told is None and self._may_rest:
            return torch.empty(0, self._runner.vocab_size, dtype=torch.float32, device=self._runner.device)
        if plan is not None and self._graphs is not None:  # of models without experts
            return self._graphs.forward(plan, planned.rows, tokens)
        num_padding = 0 if plan is None else len(plan.own) - len(tokens)
        positions: Any = [] if plan is None else plan.positions
        with self._cache.staging.together():
            attention = self._attention.decode(planned)
            linear = None if self._states is None else self._states.decode(planned)
            inputs = self._inputs([*tokens, *[0] * num_padding], positions, range(len(tokens)) if num_padding else None)
        return self._forward(inputs, attention, linear)

    def _inputs(self, token_ids: Sequence[int], positions: Any, keep: Sequence[int] | None) -> _Inputs:
        """Where the model reads them; `keep` None: all rows, in order.

        It crashes on zero rows, so where there is none a dummy is computed.
        """

        def put(values: Any) -> Tensor:
            return self._cache.staging.put(_int64(values if len(values) else [0]))

        num_kept = len(token_ids if keep is None else keep)
        return _Inputs(put(token_ids), put(positions), None if keep is None else put(keep), num_kept)

    def _forward(self, inputs: _Inputs, attention: AttentionStep, linear: LinearStep | None) -> Tensor:
        """`[num_kept, vocab]` logits."""
        logits = self._runner.forward(inputs.token_ids, inputs.positions, attention, inputs.keep, linear)
        return logits[: inputs.num_kept]


class _Inputs(NamedTuple):
    """What the model is given beside its step: ids, positions, and the rows whose logits are asked for, None: all."""

    token_ids: Tensor
    positions: Tensor
    keep: Tensor | None
    num_kept: int


def _int64(values: Any) -> NDArray[np.int64]:
    return np.asarray(values, dtype=np.int64)
