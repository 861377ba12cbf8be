"""DeepSpeed's own interface of rollouts (`deepspeed.runtime.rollout`), served on the weights of the engine that trains.

    rollout_engine = CpinferRolloutEngine(engine, tokenizer, {"prefill_context_parallel_size": 2})
    batch = rollout_engine.generate(RolloutRequest(prompt_ids, prompt_mask), SamplingConfig(max_new_tokens=64))

    a row of a batch     0 0 p p p r r r 0      prompts padded on the left as they came, answers on the right
    attention_mask       0 0 1 1 1 1 1 1 0
    response_start_idx             ^            the width of the prompts, the same for all rows

DeepSpeed's factory `build_rollout` knows one name (seen in 0.19.8), so the object itself is what a loop is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from cpinfer.colocate.phase import Lent, PhaseReport, rollout_phase
from cpinfer.config import ConfigLike, SamplingParams, job_config
from cpinfer.engine.engine import Engine
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import UserError
from cpinfer.packages import named
from cpinfer.refusals import refuse
from cpinfer_integrations.job_ranks import on_all_ranks
from cpinfer_integrations.lending import lend

try:
    from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

__all__ = ["CpinferRolloutBatch", "CpinferRolloutEngine"]


@dataclass
class CpinferRolloutBatch(RolloutBatch):
    """A `RolloutBatch` that also says how likely its answers were.

    Attributes:
        logprobs: `[B, T]` as `input_ids`, float32: of each token of an answer, natural log, in the model's own
            distribution; 0 at prompts and padding. `logprobs[:, 1:]` lies beside `ResponseTokenBatch.target_ids`.
        processed_logprobs: the same in the distribution that was sampled from; 0 under greedy decoding.
        kept_mass: beside them the mass that top_k, top_p and min_p kept; 1 where nothing was cut, prompts and padding
            included.
        weights_version: the step that `sync_weights` was told of last.
        routed_experts: `[B, T, layers with experts, experts of a token]` int16, beside `input_ids`: what each token
            went through; -1 at padding, and at the last token of an answer, which was drawn and not run. None unless
            `sampling.routed_experts` asks for them, and on a rank without prompts.
    """

    logprobs: torch.Tensor
    processed_logprobs: torch.Tensor
    kept_mass: torch.Tensor
    weights_version: int
    routed_experts: torch.Tensor | None = None


class CpinferRolloutEngine(RolloutEngine):
    """DeepSpeed's `RolloutEngine` on the weights, processes and groups of a training engine, which it borrows.

    Each `generate` is a rollout phase, unless it stands in a block of `phase()`. Between phases the training engine is
    bit for bit as it was. What is lent is found once and kept; `close` gives its process groups back.

    Args:
        engine: of `deepspeed.initialize`, or anything else that `cpinfer_integrations.lending.lend` takes.
        tokenizer: its pad token (or else its end-of-text token) pads answers, its end-of-text token ends them.
        config: the layout, the sampling, and under `rollout` how weights are gathered that the trainer has sharded: a
            `JobConfig`, a dict of its keys, the path of a JSON file, or nothing, which leaves every data-parallel rank
            to generate for itself. Of `sampling` everything holds that DeepSpeed's `SamplingConfig` does not say.

    Raises:
        UserError: for a tokenizer with neither token.
    """

    name = "cpinfer"

    def __init__(self, engine: Any, tokenizer: Any, config: ConfigLike = None) -> None:
        pads = [t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None]
        if not pads:
            raise UserError(
                f"the {type(tokenizer).__name__} has neither a pad token nor an end-of-text token; one of them was "
                "wanted, to pad answers with. Set its pad_token."
            )
        self._trained = engine
        self._tokenizer = tokenizer
        self._pad_token_id = int(pads[0])
        self._config = job_config(config)
        self._lent: Lent | None = None
        self._inference: Engine | None = None
        self._weights_version = 0
        self._num_batches = 0  # since the weights have this version
        self.last_report: PhaseReport | None = None

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> CpinferRolloutBatch:
        """Samples of this rank's prompts. Collective over all ranks of the job, which may bring different prompts.

        The prompts of all ranks of a replica are one batch, in which each distinct prompt is prefilled once. An answer
        ends at the model's own end-of-text tokens and at the tokenizer's, with the token that ended it. Samples are a
        function of `config.sampling.seed`, of the step that `sync_weights` was told, and of the call's number since.

        Args:
            request: prompts, padded on the left; none are allowed. What the mask leaves out is not looked at.
            sampling: DeepSpeed's; `temperature <= 0` is greedy, `top_k <= 0` keeps all tokens.

        Returns:
            `n_samples_per_prompt` rows for each prompt, side by side, on the device of the prompts. It is as wide as
            the prompts and this rank's longest answer.

        Raises:
            UserError: for a request that can never run; on every rank of the job, whichever brought it.
            UnsupportedError: for what the table of refusals names.
        """
        if self._inference is None:
            with self.phase():
                return self.generate(request, sampling)
        prompts, params = on_all_ranks(lambda: (_prompts_of(request), self._params_of(sampling)), "ask for rollouts")
        assert self._lent is not None, "a phase is open"
        name = f"{self._weights_version}/{self._num_batches}"
        self._num_batches += 1
        results = self._inference.generate_pooled(
            [prompt for prompt in prompts for _ in range(sampling.n_samples_per_prompt)],
            params,
            name=name,
            num_copies=self._lent.num_copies,
        )
        return self._batch(request, sampling.n_samples_per_prompt, results)

    @contextmanager
    def phase(self) -> Iterator[Self]:
        """Several calls of `generate` as one phase: weights that are gathered are there until the block ends.

        Collective over all ranks of the job. No optimiser may step inside. What it cost is then in `last_report`.

        Yields:
            This rollout engine.

        Raises:
            RuntimeError: when a phase is open already; other errors as `cpinfer.rollout_phase`.
        """
        if self._inference is not None:
            raise RuntimeError("a phase of this rollout engine is open already; generate in it, or leave it first")
        self._lent = self._lent or lend(self._trained, self._config)
        with rollout_phase(
            self._lent,
            self._config,
            tokenizer=self._tokenizer,
            weights_version=self._weights_version,
            report=lambda report: setattr(self, "last_report", report),
        ) as self._inference:
            try:
                yield self
            finally:
                self._inference = None

    def sync_weights(self, step: int) -> None:
        """Take note of the optimiser's step, by which batches are named. No weight moves: they are the trainer's own.

        Args:
            step: the newest step; the same on every rank.
        """
        if step != self._weights_version:
            self._weights_version, self._num_batches = step, 0
        if self._inference is not None:
            self._inference.weights_version = step

    def shutdown(self) -> None:
        """What DeepSpeed calls `close`."""
        self.close()

    def close(self) -> None:
        """Destroy the process groups that were made for the lent ranks; the next phase would make new ones."""
        if self._lent is not None:
            self._lent.topology.close()
            self._lent = None

    def _params_of(self, sampling: SamplingConfig) -> SamplingParams:
        if sampling.continuous_batch_size is not None:
            found = f"SamplingConfig(continuous_batch_size={sampling.continuous_batch_size})"
            raise refuse("deepspeed_continuous_batch_size", found)
        if sampling.n_samples_per_prompt < 1:
            raise UserError(f"n_samples_per_prompt is {sampling.n_samples_per_prompt}; at least 1 was wanted.")
        base = self._config.sampling
        eos = () if base.ignore_eos or self._tokenizer.eos_token_id is None else (self._tokenizer.eos_token_id,)
        return replace(
            base,
            temperature=max(float(sampling.temperature), 0.0),
            top_k=max(int(sampling.top_k), 0),
            top_p=float(sampling.top_p),
            max_new_tokens=sampling.max_new_tokens,
            stop_token_ids=tuple(sorted({*base.stop_token_ids, *eos})),
            n=1,
        )

    def _batch(
        self, request: RolloutRequest, num_samples: int, results: Sequence[RolloutResult]
    ) -> CpinferRolloutBatch:
        prompts = request.prompt_ids.repeat_interleave(num_samples, dim=0)
        mask = request.prompt_attention_mask.repeat_interleave(num_samples, dim=0).long()

        def beside_prompts(prompt: torch.Tensor, answers: Sequence[Sequence[float]], padding: float) -> torch.Tensor:
            if not answers:
                return prompt
            rows = [torch.tensor(answer, dtype=prompt.dtype) for answer in answers]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
            return torch.cat([prompt, padded.to(prompt.device)], dim=1)

        nothing = torch.zeros(prompts.shape, device=prompts.device)
        input_ids = beside_prompts(prompts, [r.token_ids for r in results], self._pad_token_id)
        return CpinferRolloutBatch(
            input_ids=input_ids,
            attention_mask=beside_prompts(mask, [[1] * len(r.token_ids) for r in results], 0),
            response_start_idx=torch.full((len(results),), prompts.shape[1], device=prompts.device),
            logprobs=beside_prompts(nothing, [r.logprobs for r in results], 0),
            processed_logprobs=beside_prompts(nothing, [r.processed_logprobs for r in results], 0),
            kept_mass=beside_prompts(nothing + 1, [r.kept_mass or [1.0] * len(r.token_ids) for r in results], 1),
            weights_version=self._weights_version,
            routed_experts=_experts_beside(input_ids, prompts.shape[1], results),
        )


def _experts_beside(input_ids: torch.Tensor, width: int, results: Sequence[RolloutResult]) -> torch.Tensor | None:
    """What each token of a batch went through, whose answers begin at `width`; None where nobody asked."""
    of_rows = [r.routed_experts for r in results if r.routed_experts is not None]
    if not of_rows:
        return None
    experts = torch.full((*input_ids.shape, *of_rows[0].shape[1:]), -1, dtype=torch.int16)
    for row, result, run in zip(experts, results, of_rows, strict=True):
        start = width - len(result.prompt_token_ids)
        row[start : start + len(run)] = torch.tensor(run)
    return experts.to(input_ids.device)


def _prompts_of(request: RolloutRequest) -> list[list[int]]:
    """The tokens of each prompt. UserError unless it is what DeepSpeed's interface says: padded on the left alone."""
    ids, mask = request.prompt_ids.cpu(), request.prompt_attention_mask.cpu().long()
    ones_at_the_end = mask.sum(dim=1, keepdim=True) > mask.shape[1] - 1 - torch.arange(mask.shape[1])
    for row in (mask != ones_at_the_end).any(dim=1).nonzero().flatten().tolist():
        raise UserError(
            f"the attention mask of prompt {row} is not zeros and then ones, as DeepSpeed's interface wants it. Pad "
            "prompts on the left, with 0 in the mask there."
        )
    for row in (mask.sum(dim=1) == 0).nonzero().flatten().tolist():
        raise UserError(f"prompt {row} has no token under its attention mask; at least one was wanted.")
    return [tokens[is_real.bool()].tolist() for tokens, is_real in zip(ids, mask, strict=True)]
