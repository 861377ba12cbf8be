"""TRL: rollouts of a `GRPOTrainer` on the trainer's own weights, processes and groups.

    trainer = GRPOTrainer(..., rollout_func=make_rollout_func(config))

TRL hands each process its own prompts, a prompt once for every sample it wants. In a phase the prompts of all lent
ranks become one batch, in which a group's prompt is prefilled once, and each rank takes its own samples home.

What TRL does with the logprobs we return (seen in 1.16): they travel with the batch as `sampling_per_token_logps`, and
only the off-policy mask (`off_policy_mask_threshold`) reads them there. The importance-sampling correction
(`vllm_importance_sampling_correction`) belongs to `use_vllm=True` and ignores them without it; the policy ratio uses
the training forward's own logprobs. So how far the two lie apart is measured here and logged, as `rollout/mismatch_*`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from trl.data_utils import is_conversational

from cpinfer.config import Config, SamplingParams
from cpinfer.engine.mismatch import Compared, Mismatch
from cpinfer.engine.phase import Lent, PhaseReport, rollout_phase
from cpinfer.engine.request import RolloutResult
from cpinfer_integrations.lending import lend


@dataclass(frozen=True)
class PhaseRecord:
    """One rollout phase: counts and mismatch over all ranks of the job, times of this rank.

    `phase_s` is from the trainer's call to the model's return, of which `generate_s` is the engine's and `cost` what
    lending took; measuring the mismatch comes after it.
    """

    weights_version: int
    num_samples: int
    num_generated_tokens: int
    mismatch: Mismatch | None
    phase_s: float = 0.0
    generate_s: float = 0.0
    mismatch_s: float = 0.0
    cost: PhaseReport | None = None

    def metrics(self) -> dict[str, float]:
        """Numbers to log, by name."""
        cost = {} if self.cost is None else asdict(self.cost)
        cost.pop("how", None)  # not a number
        return {
            "weights_version": self.weights_version,
            "phase_s": self.phase_s,
            "generate_s": self.generate_s,
            "tokens_per_s": self.num_generated_tokens / self.phase_s,
            **cost,
            **({} if self.mismatch is None else self.mismatch.as_dict()),
        }


def make_rollout_func(config: Config) -> RolloutFunc:
    """What to give a `GRPOTrainer` as `rollout_func`: generation by cpinfer, in the layout of `config`.

    The layout's pcp ranks are the trainer's data-parallel replicas, lent for the phase; `config.rollout` says how dealt
    out weights are gathered. Temperature, top_k, top_p, min_p, repetition_penalty and the answer's length are the
    trainer's; everything else of `config.sampling` holds as it stands.
    """
    return RolloutFunc(config)


class RolloutFunc:
    """A `rollout_func` that remembers what the trainer lent, and counts phases. Made by `make_rollout_func`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lent: Lent | None = None
        self._lender: Any = None
        self.records: list[PhaseRecord] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """`prompt_ids`, `completion_ids` and processed `logprobs` for this rank's prompts, in their order.

        UserError for a prompt that can never run, ValueError for what this path of TRL cannot serve. Collective over
        all ranks of the job.
        """
        start_s = time.perf_counter()
        _check_trainer(trainer)
        sampling = sampling_of(trainer, self._config.sampling)
        lent = self._lent_by(trainer)
        prompt_ids = tokenize(prompts, trainer)
        mode = "train" if trainer.model.training else "eval"
        version = int(trainer.state.global_step)
        # A name is a function of the training state, not of this process's life: a resumed run draws what an
        # undisturbed one would.
        num_before = sum(record.weights_version == version for record in self.records)
        costs: list[PhaseReport] = []
        with rollout_phase(
            lent,
            self._config,
            tokenizer=trainer.processing_class,
            weights_version=version,
            report=costs.append,
        ) as engine:
            generate_s = time.perf_counter()
            results = engine.generate_pooled(
                prompt_ids, sampling, name=f"{mode}/{version}/{num_before}", num_copies=lent.num_copies
            )
            generate_s = time.perf_counter() - generate_s
        phase_s = time.perf_counter() - start_s
        every = self._config.rollout.mismatch_every
        mismatch_s, measured = time.perf_counter(), None
        if every and len(self.records) % every == 0:
            measured = _mismatch(trainer, results, sampling)
        mismatch_s = time.perf_counter() - mismatch_s
        record = _over_all_ranks(version, results, measured, lent.num_copies)
        record = replace(record, phase_s=phase_s, generate_s=generate_s, mismatch_s=mismatch_s, cost=costs[0])
        self.records.append(record)
        for key, value in record.metrics().items():
            trainer._metrics[mode][f"rollout/{key}"].append(value)
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
        return self._lent


def sampling_of(trainer: Any, base: SamplingParams) -> SamplingParams:
    """The trainer's sampling parameters over the config's: its loss divides logits by its own temperature."""
    stops = {*base.stop_token_ids, *trainer.eos_token_ids}
    return replace(
        base,
        temperature=float(trainer.temperature),
        top_k=int(trainer.top_k or 0),
        top_p=float(trainer.top_p if trainer.top_p is not None else 1.0),
        min_p=float(trainer.min_p or 0.0),
        repetition_penalty=float(trainer.repetition_penalty or 1.0),
        max_new_tokens=int(trainer.max_completion_length),
        stop_token_ids=tuple(sorted(stops)),
        n=1,
    )


def tokenize(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Token ids of texts or chats; a chat goes through the template of the trainer's tokenizer."""
    if not prompts:
        return []
    tokenizer = trainer.processing_class
    if not is_conversational({"prompt": prompts[0]}):
        return list(tokenizer(text=list(prompts))["input_ids"])
    rendered = tokenizer.apply_chat_template(
        conversation=list(prompts),
        tools=trainer.tools or None,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )
    return list(rendered["input_ids"])


def _check_trainer(trainer: Any) -> None:
    """What TRL would drop without a word on this path, or do behind our back."""
    if trainer.use_vllm:
        raise ValueError("use_vllm is set: TRL would load a second engine beside cpinfer; set use_vllm=False")
    if trainer.args.generation_kwargs:
        raise ValueError(
            f"generation_kwargs={trainer.args.generation_kwargs!r} are for Transformers' generate; "
            "put what cpinfer knows of them under `sampling` of its config"
        )


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
    with torch.no_grad():
        logprobs, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            ids.to(device),
            mask.to(device),
            num_answer,
            batch_size=trainer.args.per_device_train_batch_size,
        )
    return [row[: len(r.token_ids)].tolist() for row, r in zip(logprobs.float().cpu(), results, strict=True)]


def _over_all_ranks(
    version: int, results: Sequence[RolloutResult], mismatch: Mismatch | None, num_copies: int
) -> PhaseRecord:
    """Counts and mismatch of the whole job; ranks that train on the same data count once. Collective."""
    own = (len(results), sum(len(r.token_ids) for r in results), mismatch)
    told = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        told = [own] * dist.get_world_size()
        dist.all_gather_object(told, own)
    counts, tokens, measured = zip(*told[::num_copies], strict=True)
    return PhaseRecord(
        weights_version=version,
        num_samples=sum(counts),
        num_generated_tokens=sum(tokens),
        mismatch=None if mismatch is None else Mismatch.merge(part for part in measured if part is not None),
    )
