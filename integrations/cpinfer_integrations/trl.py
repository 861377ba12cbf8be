"""TRL: rollouts of a `GRPOTrainer` on the trainer's own weights, processes and groups.

    trainer = GRPOTrainer(..., rollout_func=make_rollout_func({"prefill_context_parallel_size": 2}))

TRL hands each process its own prompts, a prompt once for every sample it wants. In a phase the prompts of all lent
ranks become one batch, in which a group's prompt is prefilled once, and each rank takes its own samples home.

What TRL does with the logprobs we return (seen in 1.16): they travel with the batch as `sampling_per_token_logps`, and
only the off-policy mask (`off_policy_mask_threshold`) reads them there. The importance-sampling correction
(`vllm_importance_sampling_correction`) belongs to `use_vllm=True` and ignores them without it; the policy ratio uses
the training forward's own logprobs. So how far the two lie apart is measured here and logged, as `rollout/mismatch_*`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cpinfer.colocate.mismatch import Compared, Mismatch
from cpinfer.colocate.phase import Lent, PhaseReport, rollout_phase
from cpinfer.colocate.training_logprobs import eval_no_grad
from cpinfer.config import ConfigLike, SamplingParams, job_config
from cpinfer.engine.engine import Engine
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import UserError
from cpinfer.packages import named
from cpinfer_integrations.lending import lend
from cpinfer_integrations.trl_settings import check_settings, ends_unknown_to_trl, sampling_of

try:
    from trl.data_utils import is_conversational
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

__all__ = ["PhaseRecord", "RolloutFunc", "make_rollout_func"]

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
        generate_s: of them the engine's.
        mismatch_s: seconds to measure the mismatch, after the phase.
        cost: the other parts of `phase_s`.
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
        }


def make_rollout_func(config: ConfigLike = None) -> RolloutFunc:
    """What to give a `GRPOTrainer` as `rollout_func`: generation by cpinfer, in the layout of `config`.

    Colocated rollouts: the layout's pcp ranks are the trainer's data-parallel replicas, lent for the phase.
    Temperature, top_k, top_p, min_p, repetition_penalty and the answer's length are the trainer's; everything else of
    `config.sampling` holds as it stands. Samples are a function of the trainer's seed and `config.sampling.seed`, of
    training or evaluation, of the optimiser step, and of the phase's number within it.

    Args:
        config: the layout, the sampling, and under `rollout` how weights are gathered that the trainer has sharded: a
            `JobConfig`, a dict of its keys, the path of a JSON file (which may be a run's), or nothing, which leaves
            every data-parallel rank to generate for itself.

    Returns:
        The callable, which keeps a `PhaseRecord` of every phase in `records`.
    """
    return RolloutFunc(config)


class RolloutFunc:
    """A `rollout_func` that remembers what the trainer lent, and records phases. Made by `make_rollout_func`."""

    def __init__(self, config: ConfigLike = None) -> None:
        self._config = job_config(config)
        self._lent: Lent | None = None
        self._lender: Any = None
        # Of each mode the step of its newest phase, and that phase's number within the step.
        self._newest: dict[str, tuple[int, int]] = {}
        self.records: list[PhaseRecord] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """One sample for each of this rank's prompts. Collective over all ranks of the job.

        Args:
            prompts: texts or chats, as TRL hands them over.
            trainer: the `GRPOTrainer`.

        Returns:
            `prompt_ids`, `completion_ids` and processed `logprobs`, in the order of the prompts.

        Raises:
            UserError: for a prompt that can never run, and for what this path of TRL cannot serve.
        """
        laps = [time.perf_counter()]
        check_settings(trainer, self._config.sampling)
        sampling = sampling_of(trainer, self._config.sampling)
        lent = self._lent_by(trainer)
        prompt_ids = _tokenized_by_all(prompts, trainer)
        mode, step = "train" if trainer.model.training else "eval", int(trainer.state.global_step)
        name = self._name_of_phase(trainer, mode, step)
        costs: list[PhaseReport] = []
        laps.append(time.perf_counter())
        with (
            _lm_head_as_in_training(trainer),
            rollout_phase(
                lent, self._config, tokenizer=trainer.processing_class, weights_version=step, report=costs.append
            ) as engine,
        ):
            start_s, num_truncated = time.perf_counter(), 0
            if self._config.rollout.overlong_prompts == "truncate_left":
                prompt_ids, num_truncated = _truncated(prompt_ids, engine, sampling)
            results = engine.generate_pooled(prompt_ids, sampling, name=name, num_copies=lent.num_copies)
            generate_s = time.perf_counter() - start_s
        laps.append(time.perf_counter())
        measured = _mismatch(trainer, results, sampling) if self._is_to_measure(mode) else None
        laps.append(time.perf_counter())
        prepare_s, lent_s, mismatch_s = (end - start for start, end in pairwise(laps))
        own = PhaseRecord(
            weights_version=step,
            num_samples=len(results),
            num_generated_tokens=sum(len(r.token_ids) for r in results),
            mismatch=measured,
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
        return {
            "prompt_ids": [list(r.prompt_token_ids) for r in results],
            "completion_ids": [list(r.token_ids) for r in results],
            "logprobs": [list(r.processed_logprobs) for r in results],
        }

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
            self._lent = lend(trainer.model_wrapped, self._config)
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
        if ends := ends_unknown_to_trl(trainer, self._config.sampling):
            logger.warning(
                "TRL counts answers that end by %s as clipped (completions/clipped_ratio); their tokens and rewards "
                "are those of any other",
                ends,
            )

    def _name_of_phase(self, trainer: Any, mode: str, step: int) -> str:
        """A function of the training's state, not of this process's life: a resumed run draws what it would have."""
        newest, number = self._newest.get(mode, (step, -1))
        number = number + 1 if newest == step else 0
        self._newest[mode] = (step, number)
        return f"{trainer.args.seed}/{mode}/{step}/{number}"

    def _is_to_measure(self, mode: str) -> bool:
        every = self._config.rollout.mismatch_every
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


def _tokenized_by_all(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """This rank's prompts as token ids. What cannot be tokenized on one rank is an error on all. Collective."""
    token_ids: list[list[int]] = []
    own_error: Exception | None = None
    try:
        token_ids = tokenize(prompts, trainer)
    except Exception as error:  # templates are programs of the model's author and raise what they like
        own_error = error
    gathered = _all_gather_object(None if own_error is None else str(own_error) or type(own_error).__name__)
    if own_error is not None:
        raise own_error
    for rank, complaint in enumerate(gathered):
        if complaint is not None:
            raise UserError(f"rank {rank} could not tokenize its prompts: {complaint}")
    return token_ids


def tokenize(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Token ids of texts or chats; a chat goes through the template of the trainer's tokenizer."""
    if not prompts:
        return []
    tokenizer = trainer.processing_class
    if not is_conversational({"prompt": prompts[0]}):
        return list(tokenizer(text=list(prompts))["input_ids"])
    rendered = tokenizer.apply_chat_template(
        conversation=list(prompts),
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )
    return list(rendered["input_ids"])


def _truncated(prompts: Sequence[list[int]], engine: Engine, sampling: SamplingParams) -> tuple[list[list[int]], int]:
    """Prompts with their last tokens in place of those that leave no room for a whole answer, and how many those are.

    Replicas may have pools of different sizes, yet share a group: the smallest counts. Collective over the job.
    """
    longest = min(_all_gather_object(engine.longest_prompt(sampling)))
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
    if not trainer.args.cast_lm_head_to_fp32:
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


def _mismatch(trainer: Any, results: Sequence[RolloutResult], sampling: SamplingParams) -> Mismatch | None:
    """This rank's rollout logprobs against the training forward's, None where the two know no common distribution.

    TRL's forward scales by the trainer's temperature and knows of nothing else that shaped a distribution.
    """
    compared = Compared.of(sampling)
    if compared.temperature != sampling.temperature:
        return None
    return Mismatch.of([getattr(r, compared.field) for r in results], _training_logprobs(trainer, results))


def _training_logprobs(trainer: Any, results: Sequence[RolloutResult]) -> list[list[float]]:
    """What the trainer's own forward says of every sampled token, in the batches that it will train on.

    It has to be that very forward: TRL's reads the weights of `lm_head` without calling it, and ZeRO-3, which writes
    down in which order modules run, does not survive a forward of another order between two steps.
    """
    num_prompt = max(len(r.prompt_token_ids) for r in results)
    num_answer = max(len(r.token_ids) for r in results)
    shape = (len(results), num_prompt + num_answer)
    ids = torch.full(shape, trainer.processing_class.pad_token_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, r in enumerate(results):
        tokens = torch.tensor([*r.prompt_token_ids, *r.token_ids])
        start = num_prompt - len(r.prompt_token_ids)  # prompts end, and answers begin, at one place
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
    return [row[: len(r.token_ids)].tolist() for row, r in zip(logprobs.float().cpu(), results, strict=True)]


def _over_all_ranks(own: PhaseRecord, num_copies: int) -> PhaseRecord:
    """Counts and mismatch of the whole job; ranks that train on the same data count once. Collective."""
    gathered = _all_gather_object(replace(own, cost=None))[::num_copies]
    measured = [record.mismatch for record in gathered if record.mismatch is not None]
    return replace(
        own,
        num_samples=sum(record.num_samples for record in gathered),
        num_generated_tokens=sum(record.num_generated_tokens for record in gathered),
        num_truncated_prompts=sum(record.num_truncated_prompts for record in gathered),
        mismatch=Mismatch.merge(measured) if measured else None,
    )


def _all_gather_object(own: T) -> list[T]:
    """What each rank of the job says. Collective."""
    gathered = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = [own] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
    return gathered
