"""TRL: rollouts of its trainers on the trainer's own weights, processes and groups.

    trainer = GRPOTrainer(..., rollout_func=make_rollout_func({"prefill_context_parallel_size": 2}))
    trainer = with_cpinfer(GRPOTrainer, {"prefill_context_parallel_size": 2})(..., tools=[search])

TRL hands each process its own prompts, a prompt once for every sample it wants. In a phase the prompts of all lent
ranks become one batch, in which a group's prompt is prefilled once, and each rank takes its own samples home.

A `rollout_func` is asked for first turns alone, by a `GRPOTrainer` alone. All turns of GRPO and RLOO go through
`_generate_single_turn` (seen in 1.16): that is what `with_cpinfer` replaces. Where there are tools, its first call
draws whole samples, in one phase, and what TRL asks for afterwards is there already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

from cpinfer.config import ConfigLike
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import UserError
from cpinfer.packages import named
from cpinfer.refusals import refuse
from cpinfer_integrations.job_ranks import all_gather_object, on_all_ranks
from cpinfer_integrations.trl_phases import Phase, Rollout, RolloutPhases
from cpinfer_integrations.trl_phases import PhaseRecord as PhaseRecord
from cpinfer_integrations.trl_settings import check_settings, refuse_tools
from cpinfer_integrations.trl_tools import NextTurn, Tool, ToolLoops, awaited_within, within

try:
    from trl import GRPOTrainer, RLOOTrainer
    from trl.chat_template_utils import parse_response
    from trl.data_utils import is_conversational
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

__all__ = ["RolloutFunc", "make_rollout_func", "with_cpinfer"]


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
        self._phases = RolloutPhases(config)
        self.records = self._phases.records

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """One sample for each of this rank's prompts. Collective over all ranks of the job.

        Args:
            prompts: texts or chats, as TRL hands them over.
            trainer: the `GRPOTrainer`.

        Returns:
            `prompt_ids`, `completion_ids` and processed `logprobs`, in the order of the prompts. Where top_k, top_p or
            min_p cut, also `kept_mass`, and where the config asks for them `kept_token_ids` and `routed_experts`: TRL
            hands them to reward functions.

        Raises:
            UserError: for a prompt that can never run, and for what this path of TRL cannot serve.
        """
        refuse_tools(trainer)
        check_settings(trainer, self._phases.config.sampling)
        rollouts = self._phases.run(
            trainer, partial(on_all_ranks, partial(tokenize, prompts, trainer), "tokenize its prompts")
        )
        return {
            "prompt_ids": [r.prompt_ids for r in rollouts],
            "completion_ids": [r.completion_ids for r in rollouts],
            "logprobs": [r.processed_logprobs for r in rollouts],
            **_extra_fields(rollouts),
        }

    def close(self) -> None:
        """Destroy the process groups that were made for the lent ranks; the next phase would make new ones."""
        self._phases.close()


def with_cpinfer(trainer_class: type[Any], config: ConfigLike = None) -> type[Any]:
    """A `GRPOTrainer` or `RLOOTrainer` that generates with cpinfer: every turn, tools and environments included.

    As with `make_rollout_func`, and from the same `config`; without tools the samples are the same. With them all turns
    of all samples are one rollout phase, in which the KV of a sample stays from turn to turn. `rollout.tool_loop` says
    whether its tools run while other samples decode (the default), `rollout.tool_timeout_s` how long a call may take.
    Reward functions get the same fields; what they say of kept sets is beside `completion_ids`, in which a token that a
    tool said has a mass of 1 and no ids.

    Args:
        trainer_class: TRL's, or a class derived from it.
        config: as `make_rollout_func` takes it.

    Returns:
        A class derived from `trainer_class`, with the same constructor. Its instances keep a `PhaseRecord` of every
        phase in `rollouts.records`; `rollouts.close()` destroys the process groups that were made for the lent ranks.

    Raises:
        UserError: for another class, one that turns or tool loops of its own are written in, and for a config with
            unknown keys or values.
    """
    if issubclass(trainer_class, GRPOTrainer):
        base: type[Any] = _GRPOByCpinfer
    elif issubclass(trainer_class, RLOOTrainer):
        base = _RLOOByCpinfer
    else:
        raise UserError(
            f"{trainer_class.__name__}: a GRPOTrainer or an RLOOTrainer was wanted, or a class derived from one."
        )
    for name in ("_generate_single_turn", "_tool_call_loop"):
        if getattr(trainer_class, name, None) is not getattr(base.by_trl, name, None):
            raise UserError(
                f"{trainer_class.__name__} has a {name} of its own, which with_cpinfer would put another in the place "
                "of. Derive from what with_cpinfer makes instead, or leave it out."
            )
    RolloutPhases(config)  # a config with faults is told of here
    return type(trainer_class.__name__, (base, trainer_class), {"_config_of_rollouts": config})


# Stands before a class of TRL's among the bases of what `with_cpinfer` makes, so `super()` is that class.
_Trainer: Any = object


class _ByCpinfer(_Trainer):
    """What both trainers have in common."""

    _config_of_rollouts: ConfigLike = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollouts = RolloutPhases(self._config_of_rollouts)
        self._rollouts_of_phase: list[Rollout] = []

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return on_all_ranks(lambda: super(_ByCpinfer, self)._tokenize_prompts(prompts), "tokenize its prompts")

    def _phase(self, prompt_ids: list[list[int]], draw: Callable[[Phase], list[Rollout]]) -> list[Rollout]:
        check_settings(self, self.rollouts.config.sampling)
        self._rollouts_of_phase = rollouts = self.rollouts.run(self, lambda: prompt_ids, draw)
        prompt_ids[:] = [r.prompt_ids for r in rollouts]  # TRL goes on with this list, and some may have been cut
        return rollouts


class _RLOOByCpinfer(_ByCpinfer):
    by_trl = RLOOTrainer

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
        return [r.completion_ids for r in self._phase(prompt_ids, Phase.pooled)]

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *generated: Any) -> Any:
        # RLOO has no place for fields of a rollout, but hands all columns of its inputs to reward functions.
        fields = _extra_fields(self._rollouts_of_phase)
        columns = [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]
        if columns:
            inputs = [{**example, **more} for example, more in zip(inputs, columns, strict=True)]
        return super()._calculate_rewards(inputs, *generated)


class _LoopOutput(NamedTuple):
    """What TRL's `_tool_call_loop` returns for a batch."""

    tool_mask: list[list[int]]
    completions: list[list[dict[str, Any]]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    tool_call_count: int
    tool_failure_count: int
    tool_images: list[list[Any]]

    def __add__(self, other: Any) -> _LoopOutput:
        """Of both batches together."""
        return _LoopOutput(*(own + others for own, others in zip(self, other, strict=True)))


class _GRPOByCpinfer(_ByCpinfer):
    by_trl = GRPOTrainer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.rollout_func is not None:
            raise UserError(
                "a rollout_func was given to a trainer of with_cpinfer, which would leave all generation to it. Leave "
                "it out, or use TRL's own class."
            )
        self._prompts_of_phase: list[Any] = []
        # Of each sample of the phase its turns, and what the loop made of them.
        self._drawn: list[tuple[list[RolloutResult], _LoopOutput]] = []

    def _generate(self, prompts: list[Any]) -> Any:
        self._prompts_of_phase = prompts  # TRL hands them to its tool loop, but not to the first turn
        *generated, extra_fields, images, tool_images = super()._generate(prompts)
        return (*generated, {**extra_fields, **_extra_fields(self._rollouts_of_phase)}, images, tool_images)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        if not self.tools:
            rollouts = self._phase(prompt_ids, Phase.pooled)
            return [r.completion_ids for r in rollouts], [r.processed_logprobs for r in rollouts]
        if len(prompt_ids) != len(self._prompts_of_phase):
            raise UserError(
                f"{len(prompt_ids)} prompts were to be continued, _generate was given {len(self._prompts_of_phase)}; "
                "as many were wanted. Leave their number as it is, and let no tool generate by the trainer."
            )
        self._phase(prompt_ids, self._draw_with_tools)
        first = [turns[0] for turns, _ in self._drawn]
        return [list(turn.token_ids) for turn in first], [list(turn.processed_logprobs) for turn in first]

    def _tool_call_loop(self, *_: Any) -> _LoopOutput:
        """What the loops of all samples have come to, in the phase that drew their first turns."""
        drawn, self._drawn = self._drawn, []
        return reduce(add, (output for _, output in drawn))

    def _draw_with_tools(self, phase: Phase) -> list[Rollout]:
        """Every sample with all its turns. Ranks that train on the same data let the first of them call the tools."""
        rank, num_copies = phase.lent.topology.rank, phase.lent.num_copies
        if num_copies > 1 and self.environment_factories is not None:
            raise refuse("trl_environment_copies", f"{num_copies} ranks with the same data")
        loops = ToolLoops(
            phase.engine,
            phase.prompt_ids if rank % num_copies == 0 else [],
            phase.sampling,
            f"{phase.name}/{rank // num_copies}",
            self._loop_of_sample,
            in_order=self.rollouts.config.rollout.tool_loop == "lockstep",
        )
        loops.run()
        self._drawn = on_all_ranks(loops.results, "finish its samples")
        if num_copies > 1:
            self._drawn = all_gather_object(self._drawn)[rank - rank % num_copies]
        return [_rollout(turns, output) for turns, output in self._drawn]

    def _loop_of_sample(self, index: int, first: RolloutResult, next_turn: NextTurn) -> _LoopOutput:
        """TRL's own loop over a batch of one. Runs in a thread of the sample's."""

        def generate_single_turn(prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
            turn = next_turn(prompt_ids[0])
            return ([[]], [[]]) if turn is None else ([list(turn.token_ids)], [list(turn.processed_logprobs)])

        # The trainer as it would be with this sample alone: of what its loop reads, three attributes know the batch.
        alone: Any = copy.copy(self)
        alone._generate_single_turn = generate_single_turn
        alone._sync_tool_dicts = [self._in_time(self._sync_tool_dicts[index], within)]
        alone._async_tool_dicts = [self._in_time(self._async_tool_dicts[index], awaited_within)]
        tools = self.tools
        if self.environment_factories is not None:
            alone._batch_environments = self._batch_environments[index : index + 1]
            tools = self._env_tools[self._batch_environments[index]]
        prompt_ids, token_ids = list(first.prompt_token_ids), list(first.token_ids)
        return _LoopOutput(
            *super(_GRPOByCpinfer, alone)._tool_call_loop(
                [copy.deepcopy(self._prompts_of_phase[index])],
                [prompt_ids],
                [token_ids],
                [[parse_response(self._tokenizer, token_ids, prefix=prompt_ids, tools=tools)]],
                [list(first.processed_logprobs)],
                None,  # no images, and none of their fields
                {},
            )
        )

    def _in_time(self, tools: dict[str, Tool], bounded: Callable[[float, Tool], Tool]) -> dict[str, Tool]:
        timeout_s = self.rollouts.config.rollout.tool_timeout_s
        return tools if timeout_s is None else {name: bounded(timeout_s, tool) for name, tool in tools.items()}


def _extra_fields(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """What reward functions may read of samples beside their tokens, by name: all samples have the same fields."""
    rows = [rollout.extra_fields() for rollout in rollouts]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _rollout(turns: Sequence[RolloutResult], output: _LoopOutput) -> Rollout:
    """A sample of several turns. TRL has cut none of them: each was as long as it had room for."""
    [mask], _, [completion_ids], *_ = output
    return Rollout.of_turns(turns, completion_ids, mask)


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
