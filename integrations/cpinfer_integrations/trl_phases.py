"""Rollout phases of a TRL trainer: its model lent, samples drawn, and how far they lie from training measured.

What TRL does with the logprobs we return (seen in 1.16): they travel with the batch as `sampling_per_token_logps`, and
only the off-policy mask (`off_policy_mask_threshold`) reads them there. The importance-sampling correction
(`vllm_importance_sampling_correction`) belongs to `use_vllm=True` and ignores them without it; the policy ratio uses
the training forward's own logprobs. So how far the two lie apart is measured here and logged, as `rollout/mismatch_*`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import compress, pairwise
from typing import Any, TypeVar

import torch

from cpinfer.colocate.mismatch import Compared, Mismatch
from cpinfer.colocate.phase import Lent, PhaseReport, rollout_phase
from cpinfer.colocate.training_logprobs import eval_no_grad
from cpinfer.config import ConfigLike, JobConfig, SamplingParams, job_config
from cpinfer.engine.engine import Engine
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import UserError
from cpinfer.kv_cache.expert_record import Experts
from cpinfer.models.invariant_training import trains_invariantly
from cpinfer_integrations.job_ranks import all_gather_object
from cpinfer_integrations.lending import lend
from cpinfer_integrations.trl_settings import ends_unknown_to_trl, sampling_of

__all__ = ["PhaseRecord"]

T = TypeVar("T")
logger = logging.getLogger("cpinfer.trl")


@dataclass(frozen=True)
class PhaseRecord:
    """One rollout phase: counts and mismatch over all ranks of the job, times of this rank.

    Attributes:
        weights_version: the optimiser step.
        num_samples: of all ranks.
        num_generated_tokens: of all samples.
        mismatch: of rollout and training logprobs; None in phases where it is not measured.
        mode: "train" or "eval".
        num_truncated_prompts: prompts cut from the left to fit.
        phase_s: seconds from the trainer's call to the model's return.
        prepare_s: of them settings, lending, tokens.
        generate_s: of them the engine's, and those in which it waited for tools.
        mismatch_s: seconds to measure the mismatch, after the phase.
        cost: the other parts of `phase_s`.
        kept_mass_mean: over the tokens of all samples; None where no distribution was cut.
    """

    weights_version: int
    num_samples: int
    num_generated_tokens: int
    mismatch: Mismatch | None
    mode: str = "train"
    num_truncated_prompts: int = 0
    phase_s: float = 0.0
    prepare_s: float = 0.0
    generate_s: float = 0.0
    mismatch_s: float = 0.0
    cost: PhaseReport | None = None
    kept_mass_mean: float | None = None

    def metrics(self) -> dict[str, float]:
        """Numbers to log, by name."""
        cost = {} if self.cost is None else asdict(self.cost)
        cost.pop("how", None)  # not a number
        return {
            "weights_version": self.weights_version,
            "num_truncated_prompts": self.num_truncated_prompts,
            "phase_s": self.phase_s,
            "prepare_s": self.prepare_s,
            "generate_s": self.generate_s,
            "mismatch_s": self.mismatch_s,
            "tokens_per_s": self.num_generated_tokens / self.phase_s,
            **cost,
            **({} if self.mismatch is None else self.mismatch.as_dict()),
            **({} if self.kept_mass_mean is None else {"kept_mass_mean": self.kept_mass_mean}),
        }


@dataclass(frozen=True)
class Rollout:
    """One sample as a trainer gets it: `completion_ids` are what was generated and, between turns, what tools said.

    `tool_mask`: 1 for each generated token, 0 for others. Both kinds of logprobs, and what is known of kept
    sets, as a result has it, are of generated tokens alone; experts of all tokens that were run, from the first.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    tool_mask: list[int]
    logprobs: list[float]
    processed_logprobs: list[float]
    kept_mass: list[float] | None = None
    kept_token_ids: list[tuple[int, ...] | None] | None = None
    routed_experts: Experts | None = field(default=None, compare=False)

    @classmethod
    def of(cls, result: RolloutResult) -> Rollout:
        """Of a single turn."""
        return cls.of_turns([result], list(result.token_ids), [1] * len(result.token_ids))

    @classmethod
    def of_turns(cls, turns: Sequence[RolloutResult], completion_ids: list[int], tool_mask: list[int]) -> Rollout:
        """Of all turns of a sample."""
        masses, kept = [turn.kept_mass for turn in turns], [turn.kept_token_ids for turn in turns]
        return cls(
            list(turns[0].prompt_token_ids),
            completion_ids,
            tool_mask,
            [logprob for turn in turns for logprob in turn.logprobs],
            [logprob for turn in turns for logprob in turn.processed_logprobs],
            None if None in masses else [mass for turn in masses for mass in turn or ()],
            None if None in kept else [ids for turn in kept for ids in turn or ()],
            turns[-1].routed_experts,  # of the whole sequence up to there
        )

    def extra_fields(self) -> dict[str, Any]:
        """What reward functions may read of it beside tokens, by name: of what was asked for.

        What is known of kept sets is beside `completion_ids`, for tokens of tools a mass of 1 and no ids.
        """
        fields: dict[str, Any] = {"routed_experts": self.routed_experts}
        for name, of_tool in (("kept_mass", 1.0), ("kept_token_ids", None)):
            values = getattr(self, name)
            generated = iter(values or ())
            fields[name] = values and [next(generated) if is_own else of_tool for is_own in self.tool_mask]
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Phase:
    """What there is to draw samples with, one for each prompt of this rank; `name` sets their random numbers apart."""

    engine: Engine
    prompt_ids: list[list[int]]
    sampling: SamplingParams
    name: str
    lent: Lent

    def pooled(self) -> list[Rollout]:
        """A single turn for each prompt. Collective over the replica."""
        results = self.engine.generate_pooled(
            self.prompt_ids, self.sampling, name=self.name, num_copies=self.lent.num_copies
        )
        return [Rollout.of(result) for result in results]


class RolloutPhases:
    """The phases of one trainer: what it lent, the number of a phase within its step, and a record of each."""

    def __init__(self, config: ConfigLike = None) -> None:
        self.config: JobConfig = job_config(config)
        self.records: list[PhaseRecord] = []
        self._lent: Lent | None = None
        self._lender: Any = None
        # Of each mode the step of its newest phase, and that phase's number within the step.
        self._newest: dict[str, tuple[int, int]] = {}

    def run(
        self,
        trainer: Any,
        tokenized: Callable[[], list[list[int]]],
        draw: Callable[[Phase], list[Rollout]] = Phase.pooled,
    ) -> list[Rollout]:
        """One phase: what `draw` makes of this rank's prompts. Collective over all ranks of the job."""
        laps = [time.perf_counter()]
        sampling = sampling_of(trainer, self.config.sampling)
        lent = self._lent_by(trainer)
        prompt_ids = tokenized()
        mode, step = "train" if trainer.model.training else "eval", int(trainer.state.global_step)
        name = self._name_of_phase(trainer, mode, step)
        costs: list[PhaseReport] = []
        laps.append(time.perf_counter())
        with (
            _lm_head_as_in_training(trainer),
            rollout_phase(
                lent, self.config, tokenizer=trainer.processing_class, weights_version=step, report=costs.append
            ) as engine,
        ):
            start_s, num_truncated = time.perf_counter(), 0
            if self.config.rollout.overlong_prompts == "truncate_left":
                prompt_ids, num_truncated = _truncated(prompt_ids, engine, sampling)
            rollouts = draw(Phase(engine, prompt_ids, sampling, name, lent))
            generate_s = time.perf_counter() - start_s
        laps.append(time.perf_counter())
        measured = _mismatch(trainer, rollouts, sampling) if self._is_to_measure(mode) else None
        laps.append(time.perf_counter())
        prepare_s, lent_s, mismatch_s = (end - start for start, end in pairwise(laps))
        own = PhaseRecord(
            weights_version=step,
            num_samples=len(rollouts),
            num_generated_tokens=sum(sum(r.tool_mask) for r in rollouts),
            mismatch=measured,
            kept_mass_mean=_mean_kept_mass(rollouts) if sampling.cut_by else None,
            mode=mode,
            num_truncated_prompts=num_truncated,
            phase_s=prepare_s + lent_s,
            prepare_s=prepare_s,
            generate_s=generate_s,
            mismatch_s=mismatch_s,
            cost=costs[0],
        )
        self._record(_over_all_ranks(own, lent.num_copies), trainer)
        if trainer.is_world_process_zero():
            _tell_times(self.records)
        return rollouts

    def close(self) -> None:
        """Destroy the process groups that were made for the lent ranks; the next phase would make new ones."""
        if self._lent is not None:
            self._lent.topology.close()
            self._lent = None

    def _lent_by(self, trainer: Any) -> Lent:
        """What the trainer lends; again when it has wrapped its model anew, as it does when training starts."""
        if self._lent is None or self._lender is not trainer.model_wrapped:
            self.close()
            self._lender = trainer.model_wrapped
            self._lent = lend(trainer.model_wrapped, self.config)
            self._newest.clear()
            if trainer.is_world_process_zero():
                self._tell(self._lent, trainer)
        return self._lent

    def _tell(self, lent: Lent, trainer: Any) -> None:
        grid = lent.topology.grid
        logger.info(
            "rollouts in %d replica(s) of tp=%d pcp=%d dcp=%d, weights lent: %s",
            grid.dp_size, grid.tp_size, grid.pcp_size, grid.dcp_size, lent.how,
        )  # fmt: skip
        if ends := ends_unknown_to_trl(trainer, self.config.sampling):
            logger.warning(
                "TRL counts answers that end by %s as clipped (completions/clipped_ratio); their tokens and rewards "
                "are those of any other",
                ends,
            )
        if self.config.deterministic and not trains_invariantly(trainer.model):
            logger.warning(
                'rollouts are "deterministic", the forward that trains is not: their logprobs will differ by rounding. '
                "For equal bits call trainer.train() inside `with cpinfer.invariant_training(trainer.model, config):`"
            )

    def _name_of_phase(self, trainer: Any, mode: str, step: int) -> str:
        """A function of the training's state, not of this process's life: a resumed run draws what it would have."""
        newest, number = self._newest.get(mode, (step, -1))
        number = number + 1 if newest == step else 0
        self._newest[mode] = (step, number)
        return f"{trainer.args.seed}/{mode}/{step}/{number}"

    def _is_to_measure(self, mode: str) -> bool:
        every = self.config.rollout.mismatch_every
        return every > 0 and sum(record.mode == mode for record in self.records) % every == 0

    def _record(self, record: PhaseRecord, trainer: Any) -> None:
        self.records.append(record)
        for key, value in record.metrics().items():
            trainer._metrics[record.mode][f"rollout/{key}"].append(value)


def _tell_times(records: Sequence[PhaseRecord]) -> None:
    """Where the newest phase's time went: of the first for all to see, of later ones for who asks."""
    newest, cost = records[-1], records[-1].cost
    assert cost is not None, "a phase that ended has told its cost"
    logger.log(
        logging.INFO if len(records) == 1 else logging.DEBUG,
        "rollout phase %d: %.3f s = prepare %.3f + gather %.3f + attach %.3f + generate %.3f + detach %.3f + release "
        "%.3f; then mismatch %.3f s; %d tokens, weights %.2g GB, KV pool %.2g GB on this rank",
        len(records), newest.phase_s, newest.prepare_s, cost.gather_s, cost.attach_s, newest.generate_s, cost.detach_s,
        cost.release_s, newest.mismatch_s, newest.num_generated_tokens, cost.weights_bytes / 1e9,
        cost.kv_pool_bytes / 1e9,
    )  # fmt: skip


def _truncated(prompts: Sequence[list[int]], engine: Engine, sampling: SamplingParams) -> tuple[list[list[int]], int]:
    """Prompts with their last tokens in place of those that leave no room for a whole answer, and how many those are.

    Replicas may have pools of different sizes, yet share a group: the smallest counts. Collective over the job.
    """
    longest = min(all_gather_object(engine.longest_prompt(sampling)))
    if longest < 1:
        raise UserError(
            f"max_completion_length={sampling.max_new_tokens} leaves no room for a prompt: the model has "
            f"{engine.max_positions} positions, the KV pool holds {engine.kv_capacity_tokens} tokens. Ask for shorter "
            "answers, or raise kv_cache_gib."
        )
    return [ids[-longest:] for ids in prompts], sum(len(ids) > longest for ids in prompts)


@contextmanager
def _lm_head_as_in_training(trainer: Any) -> Iterator[None]:
    """With `cast_lm_head_to_fp32` TRL's training forward leaves autocast for the head; so do rollouts in the block."""
    if not getattr(trainer.args, "cast_lm_head_to_fp32", False):  # of GRPOConfig alone
        yield
        return
    head = trainer.model.get_output_embeddings()
    in_float32, device_type = head.forward, head.weight.device.type

    def without_autocast(hidden_states: torch.Tensor) -> Any:
        with torch.autocast(device_type, enabled=False):
            return in_float32(hidden_states)

    head.forward = without_autocast
    try:
        yield
    finally:
        head.forward = in_float32


def _mismatch(trainer: Any, rollouts: Sequence[Rollout], sampling: SamplingParams) -> Mismatch | None:
    """This rank's rollout logprobs against the training forward's, None where the two know no common distribution.

    TRL's forward scales by the trainer's temperature and knows of nothing else that shaped a distribution. What cut one
    is undone by the kept mass.
    """
    compared = Compared.of(sampling)
    if compared.temperature != sampling.temperature:
        return None
    return Mismatch.of([compared.logprobs_of(vars(r)) for r in rollouts], _training_logprobs(trainer, rollouts))


def _training_logprobs(trainer: Any, rollouts: Sequence[Rollout]) -> list[list[float]]:
    """What the trainer's own forward says of every generated token, in the batches that it will train on.

    It has to be that very forward: TRL's reads the weights of `lm_head` without calling it, and ZeRO-3, which writes
    down in which order modules run, does not survive a forward of another order between two steps.
    """
    num_prompt = max(len(r.prompt_ids) for r in rollouts)
    num_answer = max(len(r.completion_ids) for r in rollouts)
    shape = (len(rollouts), num_prompt + num_answer)
    ids = torch.full(shape, trainer.processing_class.pad_token_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, r in enumerate(rollouts):
        tokens = torch.tensor([*r.prompt_ids, *r.completion_ids])
        start = num_prompt - len(r.prompt_ids)  # prompts end, and answers begin, at one place
        ids[row, start : start + len(tokens)] = tokens
        mask[row, start : start + len(tokens)] = 1
    device = trainer.accelerator.device
    with eval_no_grad(trainer.model):
        logprobs, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            ids.to(device),
            mask.to(device),
            num_answer,
            batch_size=trainer.args.per_device_train_batch_size,
        )
    return [list(compress(row, r.tool_mask)) for row, r in zip(logprobs.float().tolist(), rollouts, strict=True)]


def _mean_kept_mass(rollouts: Sequence[Rollout]) -> float:
    masses = [mass for r in rollouts for mass in r.kept_mass or ()]
    return sum(masses) / len(masses) if masses else 1.0


def _over_all_ranks(own: PhaseRecord, num_copies: int) -> PhaseRecord:
    """Counts and mismatch of the whole job; ranks that train on the same data count once. Collective."""
    gathered = all_gather_object(replace(own, cost=None))[::num_copies]
    measured = [record.mismatch for record in gathered if record.mismatch is not None]
    num_tokens = sum(record.num_generated_tokens for record in gathered)
    sums = [r.kept_mass_mean * r.num_generated_tokens for r in gathered if r.kept_mass_mean is not None]
    return replace(
        own,
        num_samples=sum(record.num_samples for record in gathered),
        num_generated_tokens=num_tokens,
        kept_mass_mean=sum(sums) / num_tokens if sums and num_tokens else None,
        num_truncated_prompts=sum(record.num_truncated_prompts for record in gathered),
        mismatch=Mismatch.merge(measured) if measured else None,
    )
