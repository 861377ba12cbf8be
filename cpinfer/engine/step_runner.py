"""One scheduled step on this rank: plan it, run the model, sample, and agree with the other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
from cpinfer.engine.step_plans import StepPlanner
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

    `graphs` replay decode steps, where there are; `states` are those of layers of linear attention.
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
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._planner = planner
        self._attention = attention
        self._reader = reader
        self._experts = experts
        self._graphs = graphs
        self._states = states

    def begin(self) -> None:
        """Before the first of many steps. Graphs of weights that have moved, on any rank, are forgotten by all."""
        if self._graphs is not None:
            self._graphs.forget_what_moved()

    def weights_changed(self) -> None:
        """Other adapters may be other modules: what was captured without them says nothing of them."""
        self._cache.forget_faults()
        if self._graphs is not None:
            self._graphs.forget()

    def clear_cache(self) -> None:
        """Nothing of what is cached will be read again, and something in it is not finite."""
        self._cache.clear()

    def run(self, step: Step, says: Says = Says.NOTHING) -> StepOutput:
        """What `step` samples and scores, the same on every rank. `says` travels with it."""
        return self._prefill(step, says) if step.chunks else self._decode(step.running, says)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks of this rank's home, (from, to)."""
        self._cache.copy_blocks(pairs)

    def _prefill(self, step: Step, says: Says) -> StepOutput:
        planned = self._planner.prefill(step.chunks)
        attention = self._attention.prefill(planned)
        linear = None if self._states is None else self._states.prefill(planned)
        with self._experts.watching(planned.told) as watched:
            logits = self._forward(planned.token_ids, planned.plan.positions, attention, planned.kept_rows, linear)
        scored = logits[len(planned.sampled_rows) :]
        num_top = max((c.prefill.requests[0].num_top for c in step.chunks if c.scored_positions), default=0)
        sampled, heard = self._reader.sample(
            logits[planned.drawn], planned.requests, step.samples, planned.places, says
        )
        scores, heard_again = self._reader.score(scored, planned.targets, planned.scored.places, num_top, says)
        experts = self._experts.agree(planned.told, watched, len(planned.token_ids))
        return StepOutput(sampled, scores, heard_again if heard is None else heard, experts)

    def _decode(self, running: Sequence[SampledRequest], says: Says) -> StepOutput:
        planned = self._planner.decode(running)
        tokens, plan = planned.token_ids, planned.plan
        linear = None if self._states is None else self._states.decode(planned)
        with self._experts.watching(planned.told) as watched:
            if plan is None:
                logits = self._forward([], [], self._attention.decode(planned), [], linear)
            elif self._graphs is not None:  # of models without experts
                logits = self._graphs.forward(plan, planned.rows, tokens)
            else:
                padding = [0] * (len(plan.own) - len(tokens))
                logits = self._forward(
                    tokens + padding, plan.positions, self._attention.decode(planned), range(len(tokens)), linear
                )
        sampled, heard = self._reader.sample(logits, planned.requests, running, planned.places, says)
        return StepOutput(sampled, heard=heard, experts=self._experts.agree(planned.told, watched, len(tokens)))

    def _forward(
        self, token_ids: Any, positions: Any, attention: AttentionStep, keep: Any, linear: LinearStep | None
    ) -> Tensor:
        """`[len(keep), vocab]` logits. Models crash on zero rows, so where there is none a dummy is computed."""
        has_tokens, has_keep = len(token_ids) > 0, len(keep) > 0
        logits = self._runner.forward(
            self._tensor(token_ids if has_tokens else [0]),
            self._tensor(positions if has_tokens else [0]),
            attention,
            self._tensor(keep if has_keep else [0]),
            linear,
        )
        return logits[: len(keep)]

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self._runner.device)
