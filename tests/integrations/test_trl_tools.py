"""TRL's trainers with tools, by cpinfer: what has to come out is what TRL's own loop makes with Transformers."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_trainers import ASKED, CALLING, CONFIG, GREEDY, by_cpinfer, check_same, drawn, make_trainer, photograph_of
from trl import GRPOTrainer, RLOOTrainer, SFTTrainer

import cpinfer
from covering import pairs
from cpinfer_integrations.trl import make_rollout_func, with_cpinfer
from cpinfer_integrations.trl_tools import awaited_within, within
from tool_models import NAMES, chats, follow
from trainers import changes

LOOPS = ("async", "lockstep")


def num_turns(sample: Sequence[Mapping[str, Any]]) -> int:
    return sum(message["role"] == "assistant" for message in sample)


@pytest.mark.parametrize("tool_loop", LOOPS)
def test_turns_and_tools_are_those_of_trls_own_loop(tmp_path: Path, tool_loop: str) -> None:
    trainer = make_trainer(by_cpinfer(tool_loop), tmp_path, **GREEDY)
    same = check_same(trainer, make_trainer(GRPOTrainer, tmp_path, **GREEDY))
    assert {num_turns(sample) for sample in same["completions"]} >= {2, 3, 4}, "samples go on unequally long"
    assert same["counted"]["tools/call_frequency"][0] > 1
    [record] = trainer.rollouts.records
    assert record.num_samples == len(ASKED) and record.num_generated_tokens == sum(map(sum, same["tool_mask"]))


@pytest.mark.parametrize(
    ("options", "tool_loop"),
    pairs(
        [
            *({"max_completion_length": length} for length in (1, 3, 4, 5, 53, 54, 55, 57, 58, 59, 60, 110, 166)),
            *({"max_tool_calling_iterations": num} for num in (0, 1, 2)),
        ],
        LOOPS,
    ),
)
def test_answers_end_where_trl_cuts_them_and_tools_that_say_too_much_are_dropped(
    tmp_path: Path, options: dict[str, int], tool_loop: str
) -> None:
    trainer = make_trainer(by_cpinfer(tool_loop), tmp_path, **GREEDY, **options)
    same = check_same(trainer, make_trainer(GRPOTrainer, tmp_path, **GREEDY, **options))
    if "max_completion_length" in options:
        assert max(map(len, same["completion_ids"])) <= options["max_completion_length"]


def test_a_sequence_that_meets_the_end_of_the_models_positions_ends_as_in_trl(tmp_path: Path) -> None:
    # The prompts take 646 of them.
    model = {"max_position_embeddings": 760}
    trainer = make_trainer(by_cpinfer(), tmp_path, model=model, **GREEDY)
    check_same(trainer, make_trainer(GRPOTrainer, tmp_path, model=model, **GREEDY))


def a_failing(name: str) -> str:
    """Whom to ask next.

    Args:
        name: whom to ask.
    """
    raise KeyError(f"no {name}")


def a_dict(name: str) -> Any:
    """Whom to ask next.

    Args:
        name: whom to ask.
    """
    return {"next": [name, None, 3]}


def nothing(name: str) -> None:
    """Whom to ask next.

    Args:
        name: whom to ask.
    """


def blocks(name: str) -> Any:
    """Whom to ask next.

    Args:
        name: whom to ask.
    """
    return [{"type": "text", "text": name}]


def two_arguments(name: str, other: str) -> str:
    """Whom to ask next.

    Args:
        name: whom to ask.
        other: whom else.
    """
    return name + other


def very_long(name: str) -> str:
    """Whom to ask next.

    Args:
        name: whom to ask.
    """
    return name * 500


async def awaited(name: str) -> str:
    """Whom to ask next.

    Args:
        name: whom to ask.
    """
    return follow(name)


async def awaited_failing(name: str) -> str:
    """Whom to ask next.

    Args:
        name: whom to ask.
    """
    raise KeyError(name)


@pytest.mark.parametrize(
    ("tool", "tool_loop"),
    pairs(
        [a_failing, a_dict, nothing, blocks, two_arguments, very_long, awaited, awaited_failing],
        LOOPS,
        lambda tool: str(tool.__name__),
    ),
)
def test_what_a_tool_says_or_raises_becomes_of_it_what_becomes_in_trl(
    tmp_path: Path, tool: Any, tool_loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "__name__", "follow")
    trainer = make_trainer(by_cpinfer(tool_loop), tmp_path, tools=[tool], **GREEDY)
    check_same(trainer, make_trainer(GRPOTrainer, tmp_path, tools=[tool], **GREEDY))


def test_a_tool_that_there_is_not_is_a_failure_as_in_trl(tmp_path: Path) -> None:
    def another(name: str) -> str:
        """Another.

        Args:
            name: whom to ask.
        """
        return name

    trainer = make_trainer(by_cpinfer(), tmp_path, tools=[another], **GREEDY)
    same = check_same(trainer, make_trainer(GRPOTrainer, tmp_path, tools=[another], **GREEDY))
    assert same["counted"]["tools/failure_frequency"] == [1.0]


class Walk:
    """An environment: it remembers who was asked."""

    step = 1

    def reset(self, **row: Any) -> str:
        self.asked: list[str] = []
        return f" from{row['start']}"

    def follow(self, name: str) -> str:
        """Whom to ask next.

        Args:
            name: whom to ask.
        """
        self.asked.append(name)
        return f"{follow(name)}, {len(self.asked) * self.step}"

    def get_reward(self) -> float:
        return float(len(self.asked))


class Leap(Walk):
    step = 2

    async def follow(self, name: str) -> str:  # type: ignore[override]
        """Whom to leap to.

        Args:
            name: whom to ask.
        """
        return super().follow(name)


@pytest.mark.parametrize("tool_loop", LOOPS)
@pytest.mark.parametrize("several", [False, True])
def test_every_sample_has_its_own_environment_as_in_trl(tmp_path: Path, several: bool, tool_loop: str) -> None:
    rows = {"start": list(NAMES[:3]) * 2, "environment": ["walk", "leap"] * 3}
    inputs = [
        {"prompt": chat, "start": start, "environment": environment}
        for chat, start, environment in zip(chats(ASKED), rows["start"], rows["environment"], strict=True)
    ]
    given = {"environment_factory": {"walk": Walk, "leap": Leap} if several else Walk}
    both = [
        make_trainer(trainer_class, tmp_path, tools=None, data=rows, given=given, **CALLING)
        for trainer_class in (by_cpinfer(tool_loop), GRPOTrainer)
    ]
    check_same(*both, inputs)
    asked = [[environment.asked for environment in trainer.environments] for trainer in both]
    assert asked[0] == asked[1] and any(map(len, asked[0]))


def test_sampled_tokens_are_the_same_with_and_without_a_barrier_between_turns(tmp_path: Path) -> None:
    samples = []
    for tool_loop in LOOPS:
        trainer = make_trainer(by_cpinfer(tool_loop), tmp_path, temperature=1.0)
        inputs = [{"prompt": chat} for chat in chats(ASKED) for _ in range(2)]
        ours = drawn(trainer, inputs)
        mismatch = trainer.rollouts.records[0].mismatch
        assert mismatch is not None and mismatch.max_abs <= 1e-4
        assert mismatch.num_tokens == sum(map(sum, ours["tool_mask"]))
        for mask, logprobs in zip(ours["tool_mask"], ours.pop("logprobs"), strict=True):
            assert all(is_own or logprob == 0 for is_own, logprob in zip(mask, logprobs, strict=True))
            assert sum(logprobs) < -0.1
        samples.append(ours)
    assert samples[0] == samples[1]
    pairs = zip(samples[0]["completion_ids"][::2], samples[0]["completion_ids"][1::2], strict=True)
    assert any(one != other for one, other in pairs), "two samples of a prompt draw different numbers"


def test_a_prompt_is_computed_once_and_of_later_turns_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats: list[Any] = []
    sleep = cpinfer.Engine.sleep
    monkeypatch.setattr(cpinfer.Engine, "sleep", lambda engine: stats.append(replace(engine.stats)) or sleep(engine))
    trainer = make_trainer(with_cpinfer(GRPOTrainer, {**CONFIG, "enable_prefix_caching": False}), tmp_path)
    ours = drawn(trainer, [{"prompt": chat} for chat in chats(ASKED) for _ in range(2)])
    num_prompt = sum(map(len, ours["prompt_ids"][::2]))
    num_of_tools = sum(mask.count(0) for mask in ours["tool_mask"])
    # The last token of a turn is computed when something comes behind it.
    num_later_turns = sum(num_turns(sample) - 1 for sample in ours["completions"])
    assert num_later_turns > len(ASKED)
    assert stats[0].num_computed_prefill_tokens == num_prompt + num_of_tools + num_later_turns


def test_training_with_tools_learns_and_measures_every_generated_token(tmp_path: Path) -> None:
    trainer = make_trainer(by_cpinfer(), tmp_path, temperature=1.0)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.lm_head.weight)
    assert [record.weights_version for record in trainer.rollouts.records] == [0, 1]
    logged = [line for line in trainer.state.log_history if "reward" in line]
    assert all(line["rollout/mismatch_max_abs"] <= 1e-4 and line["tools/call_frequency"] > 0 for line in logged)
    trainer.rollouts.close()


def test_a_sample_goes_on_while_another_waits_for_its_tool(tmp_path: Path) -> None:
    """The first to call waits until another has called twice: behind a barrier it would wait for ever."""
    calls: dict[int, int] = {}
    lock, others_went_on = threading.Lock(), threading.Event()

    class Slow(Walk):
        def follow(self, name: str) -> str:
            """Whom to ask next.

            Args:
                name: whom to ask.
            """
            with lock:
                is_first = not calls
                calls[id(self)] = calls.get(id(self), 0) + 1
                if calls[id(self)] == 2:
                    others_went_on.set()
            if is_first:
                assert others_went_on.wait(timeout=30)
            return super().follow(name)

    given = {"environment_factory": Slow}
    data = {"start": list(ASKED)}
    trainer = make_trainer(by_cpinfer(), tmp_path, tools=None, data=data, given=given, **CALLING)
    ours = drawn(trainer, [{"prompt": chat, "start": name} for chat, name in zip(chats(ASKED), ASKED, strict=True)])
    assert others_went_on.is_set() and ours["counted"]["tools/failure_frequency"] == [0.0]


def test_lockstep_calls_one_tool_at_a_time_in_trls_order(tmp_path: Path) -> None:
    orders = []
    for trainer_class in (by_cpinfer("lockstep"), GRPOTrainer):
        called: list[str] = []
        running = threading.Semaphore(1)

        def noted(name: str) -> str:
            """Whom to ask next.

            Args:
                name: whom to ask.
            """
            assert running.acquire(blocking=False)  # noqa: B023
            time.sleep(0.01)
            called.append(name)  # noqa: B023
            running.release()  # noqa: B023
            return follow(name)

        noted.__name__ = "follow"
        same = drawn(make_trainer(trainer_class, tmp_path, tools=[noted], **GREEDY))
        assert same["counted"]["tools/failure_frequency"] == [0.0]
        orders.append(called)
    assert orders[0] == orders[1] and len(orders[0]) > len(ASKED)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_that_hangs_has_failed_after_its_time(tmp_path: Path, is_async: bool) -> None:
    released = threading.Event()

    def hangs(name: str) -> str:
        """Whom to ask next.

        Args:
            name: whom to ask.
        """
        if "Boris" in name:
            released.wait()
        return follow(name)

    async def hangs_awaited(name: str) -> str:
        """Whom to ask next.

        Args:
            name: whom to ask.
        """
        if "Boris" in name:
            await asyncio.sleep(60)
        return follow(name)

    tool = hangs_awaited if is_async else hangs
    tool.__name__ = "follow"
    ours = drawn(make_trainer(by_cpinfer(tool_timeout_s=0.5), tmp_path, tools=[tool], **GREEDY))
    released.set()
    said = json.dumps(ours["completions"])
    assert "follow did not return within 0.5 s (rollout.tool_timeout_s)" in said and "Dora or Alice" in said
    assert 0 < ours["counted"]["tools/failure_frequency"][0] < 1


def test_a_tool_within_its_time_returns_and_raises_as_it_did() -> None:
    assert within(5, follow)(name="Alice") == "Boris knows"
    with pytest.raises(KeyError, match="no x"):
        within(5, a_failing)(name="x")
    assert asyncio.run(awaited_within(5, awaited)(name="Alice")) == "Boris knows"
    with pytest.raises(KeyError, match="x"):
        asyncio.run(awaited_within(5, awaited_failing)(name="x"))


@pytest.mark.parametrize("tool_loop", LOOPS)
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_tool_that_ends_its_thread_ends_the_run_with_its_name_and_leaves_the_trainer_as_it_was(
    tmp_path: Path, error: BaseException, tool_loop: str
) -> None:
    def dies(name: str) -> str:
        """Whom to ask next.

        Args:
            name: whom to ask.
        """
        if "Boris" in name:
            raise error
        return follow(name)

    dies.__name__ = "follow"
    trainer = make_trainer(by_cpinfer(tool_loop), tmp_path, tools=[dies], **GREEDY)
    before = photograph_of(trainer)
    with pytest.raises(RuntimeError, match=r"a tool of sample \d ended its thread with (SystemExit|KeyboardInterrupt)"):
        drawn(trainer)
    assert changes(before, photograph_of(trainer)) == []
    assert no_threads_left()


@pytest.mark.parametrize("tool_loop", LOOPS)
def test_an_interrupt_while_tools_run_leaves_the_trainer_bit_for_bit(tmp_path: Path, tool_loop: str) -> None:
    first = threading.Lock()

    def interrupted(name: str) -> str:
        """Whom to ask next.

        Args:
            name: whom to ask.
        """
        if first.acquire(blocking=False):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
        return follow(name)

    interrupted.__name__ = "follow"
    trainer = make_trainer(by_cpinfer(tool_loop), tmp_path, tools=[interrupted], **GREEDY)
    before = photograph_of(trainer)
    with pytest.raises(KeyboardInterrupt):
        drawn(trainer)
    assert changes(before, photograph_of(trainer)) == []
    assert no_threads_left()
    assert drawn(trainer)["completions"]  # and the next phase is none the worse


def no_threads_left() -> bool:
    """Whether those of samples have ended, at the latest in a moment."""
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("tools-") for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_template_that_fails_in_a_loop_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(trainer: Any, tool_messages: Any) -> Any:
        raise ValueError("no such suffix")

    monkeypatch.setattr(GRPOTrainer, "_get_tool_suffix_ids", fails)
    with pytest.raises(ValueError, match="no such suffix"):
        drawn(make_trainer(by_cpinfer(), tmp_path, **GREEDY))


def test_without_tools_the_samples_are_those_of_a_rollout_func(tmp_path: Path) -> None:
    trainer = make_trainer(with_cpinfer(GRPOTrainer, CONFIG), tmp_path, tools=None, max_completion_length=6)
    prompts = chats([*ASKED, *ASKED])
    ours = drawn(trainer, [{"prompt": chat} for chat in prompts])
    rollouts = make_rollout_func(CONFIG)
    plain = make_trainer(GRPOTrainer, tmp_path, tools=None, max_completion_length=6, given={"rollout_func": rollouts})
    assert rollouts(prompts, plain) == {key: ours[key] for key in ("prompt_ids", "completion_ids", "logprobs")}


def test_an_rloo_trainer_generates_with_cpinfer_what_it_would_with_transformers(tmp_path: Path) -> None:
    options = {"top_k": 1, "max_completion_length": 6}
    both = [make_trainer(c, tmp_path, **options) for c in (with_cpinfer(RLOOTrainer, CONFIG), RLOOTrainer)]
    prompts = chats(ASKED)
    ours, theirs = (trainer._generate(prompts) for trainer in both)
    assert ours == theirs
    trainer = make_trainer(with_cpinfer(RLOOTrainer, CONFIG), tmp_path, max_completion_length=6)
    trainer.train()
    assert [record.weights_version for record in trainer.rollouts.records] == [0, 1]
    assert all(record.mismatch.max_abs <= 1e-4 for record in trainer.rollouts.records)


@pytest.mark.parametrize(
    ("trainer_class", "tools"), [(GRPOTrainer, (follow,)), (GRPOTrainer, None), (RLOOTrainer, None)]
)
def test_reward_functions_learn_what_a_cut_kept_beside_every_token(
    tmp_path: Path, trainer_class: type[Any], tools: Any
) -> None:
    seen: list[Any] = []

    def reward(completion_ids: Any, kept_mass: Any, kept_token_ids: Any, **_: Any) -> list[float]:
        seen.extend(zip(completion_ids, kept_mass, kept_token_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    asked = with_cpinfer(trainer_class, {**CONFIG, "sampling": {"seed": 3, "kept_token_ids": True}})
    options = {"top_p": 0.6, "max_steps": 1, "max_completion_length": 120}
    trainer = make_trainer(asked, tmp_path, tools=tools, reward=reward, **options)
    trainer.train()
    assert len(seen) == 4
    of_tools = 0
    for tokens, masses, kept in seen:
        assert len(tokens) == len(masses) == len(kept)
        assert all(token in ids for token, ids in zip(tokens, kept, strict=True) if ids is not None)
        assert all(mass == 1 for mass, ids in zip(masses, kept, strict=True) if ids is None)
        of_tools += sum(ids is None for ids in kept)
    assert (of_tools > 0) == (tools is not None)
    assert trainer.rollouts.records[0].num_generated_tokens == sum(len(kept) for *_, kept in seen) - of_tools
    # Nobody asks for anything: nothing is handed over.
    plain = with_cpinfer(trainer_class, CONFIG)
    names: set[str] = set()

    def read(completion_ids: Any, **columns: Any) -> list[float]:
        names.update(columns)
        return [float(len(ids)) for ids in completion_ids]

    make_trainer(plain, tmp_path, tools=None, reward=read, max_steps=1, max_completion_length=6).train()
    assert names and names.isdisjoint({"kept_mass", "kept_token_ids", "routed_experts"})


def test_an_overlong_prompt_is_cut_for_trl_too_where_that_was_asked_for(tmp_path: Path) -> None:
    config = {**CONFIG, "rollout": {"overlong_prompts": "truncate_left"}}
    trainer = make_trainer(
        with_cpinfer(GRPOTrainer, config),
        tmp_path,
        tools=None,
        model={"max_position_embeddings": 64},
        max_completion_length=5,
    )
    ours = drawn(trainer, [{"prompt": chat} for chat in chats([" Alice" * 70, " Boris"])])
    assert len(ours["prompt_ids"][0]) == 59 and len(ours["prompt_ids"][1]) < 59
    assert trainer.rollouts.records[0].num_truncated_prompts == 1


@pytest.mark.parametrize(
    ("trainer_class", "given", "options", "words"),
    [
        (GRPOTrainer, {"rollout_func": make_rollout_func(CONFIG)}, {}, "a rollout_func was given"),
        (GRPOTrainer, {}, {"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=True"),
        (GRPOTrainer, {}, {"max_completion_length": None}, "max_completion_length=None"),
        (RLOOTrainer, {}, {"generation_kwargs": {"num_beams": 2}}, "generation_kwargs"),
    ],
)
def test_what_asks_for_another_generator_is_refused_by_name(
    tmp_path: Path, trainer_class: type[Any], given: Mapping[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(cpinfer.UserError, match=words):
        make_trainer(with_cpinfer(trainer_class, CONFIG), tmp_path, given=given, **options)._generate(chats(NAMES))


def test_other_classes_and_unknown_keys_are_refused_before_there_is_a_trainer() -> None:
    with pytest.raises(cpinfer.UserError, match="SFTTrainer: a GRPOTrainer or an RLOOTrainer was wanted"):
        with_cpinfer(SFTTrainer)
    with pytest.raises(cpinfer.UserError, match=r'"rollout.tool_loop" is "parallel"'):
        with_cpinfer(GRPOTrainer, {"rollout": {"tool_loop": "parallel"}})


def test_a_class_derived_from_trls_keeps_its_name_and_what_it_does(tmp_path: Path) -> None:
    class Own(GRPOTrainer):  # type: ignore[misc]
        def _get_tool_suffix_ids(self, tool_messages: Any) -> Any:
            self.has_run = True
            return super()._get_tool_suffix_ids(tool_messages)

    made = with_cpinfer(Own, CONFIG)
    assert made.__name__ == "Own" and issubclass(made, Own)
    drawn(make_trainer(made, tmp_path, **GREEDY))


def test_a_class_with_turns_or_loops_of_its_own_is_refused() -> None:
    class Turns(GRPOTrainer):
        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    class Loops(GRPOTrainer):
        def _tool_call_loop(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    class OfRLOO(RLOOTrainer):
        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    for trainer_class, name in (
        (Turns, "_generate_single_turn"),
        (Loops, "_tool_call_loop"),
        (OfRLOO, "_generate_sin"),
    ):
        with pytest.raises(cpinfer.UserError, match=f"{trainer_class.__name__} has a {name}"):
            with_cpinfer(trainer_class)
    with pytest.raises(cpinfer.UserError, match="of its own"):
        with_cpinfer(with_cpinfer(GRPOTrainer))


def test_more_prompts_than_a_generation_began_with_are_refused_by_number(tmp_path: Path) -> None:
    class Doubled(GRPOTrainer):
        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            ids, *rest = super()._tokenize_prompts(prompts)
            return (ids * 2, *rest)

    trainer = make_trainer(with_cpinfer(Doubled, CONFIG), tmp_path, **GREEDY)
    with pytest.raises(cpinfer.UserError, match="prompts were to be continued, _generate was given"):
        drawn(trainer)
