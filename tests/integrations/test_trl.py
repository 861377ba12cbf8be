"""TRL's own GRPOTrainer on one process: what it asks for, what it gets, and what it would lose without a word."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, MixtralConfig, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import cpinfer
from cpinfer.config import JobConfig, RolloutConfig, SamplingParams, config_to_dict, parse_config
from cpinfer_integrations.trl import RolloutFunc, make_rollout_func, tokenize
from cpinfer_integrations.trl_settings import sampling_of
from tiny_models import TINY as TINY_SHAPE
from tiny_models import make_model

TINY = Path(__file__).parents[2] / "configs" / "grpo-tiny"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXTS = [" Recall: Alice", " Recall: Boris", " Recall: Carla", " Recall: Dora"]
CONFIG = parse_config({"dtype": "float32", "kv_cache_gib": 0.01, "sampling": {"seed": 3, "stop_token_ids": [99]}})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_trainer(
    tokenizer: Any,
    folder: Path,
    rollout_func: Any,
    *,
    changed: Mapping[str, Any] = MappingProxyType({}),
    config: Any = None,
    peft_config: Any = None,
    trainer_class: type[Any] = GRPOTrainer,
    **options: Any,
) -> GRPOTrainer:
    """Three steps of eight samples: two prompts, four samples each. `changed`: of the model's config, or another."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer: GRPOTrainer = trainer_class(
        model=make_model(config or AutoConfig.from_pretrained(TINY, **changed)),
        reward_funcs=[lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]],
        args=GRPOConfig(**{**arguments, **options}),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        eval_dataset=Dataset.from_dict({"prompt": TEXTS[:2]}),
        processing_class=tokenizer,
        rollout_func=rollout_func,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_every_optimiser_step_has_new_weights_and_every_token_the_training_forwards_logprob(
    tokenizer: Any, tmp_path: Path
) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts, temperature=0.7)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.lm_head.weight)
    assert [record.weights_version for record in rollouts.records] == [0, 1, 2]
    assert [record.num_samples for record in rollouts.records] == [8, 8, 8]
    for record in rollouts.records:
        assert record.mismatch is not None and record.mismatch.num_tokens == record.num_generated_tokens
        assert record.mismatch.max_abs <= 1e-4
    logged = [line for line in trainer.state.log_history if "reward" in line]
    assert [line["rollout/weights_version"] for line in logged] == [0, 1, 2]
    assert all(line["rollout/mismatch_max_abs"] <= 1e-4 for line in logged)
    assert trainer.model.training and trainer.model.config._attn_implementation != "cpinfer"
    rollouts.close()


@pytest.mark.parametrize(
    ("dtype", "batch_size", "temperature"), [("float32", 8, 0.7), ("bfloat16", 4, 1.0), ("bfloat16", 8, 1.3)]
)
def test_deterministic_rollouts_have_every_bit_of_trls_own_forward(
    tokenizer: Any,
    tmp_path: Path,
    dtype: str,
    batch_size: int,
    temperature: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also with gradient checkpointing, which TRL has by default, and in batches that TRL pads on the left."""
    config = replace(CONFIG, dtype=dtype, deterministic=True)
    records = {}
    for is_invariant in (True, False):
        rollouts = make_rollout_func(config)
        options = {"temperature": temperature, "per_device_train_batch_size": batch_size}
        trainer = make_trainer(tokenizer, tmp_path, rollouts, gradient_checkpointing=True, **options)
        trainer.model.to(getattr(torch, dtype))
        before = trainer.model.lm_head.weight.detach().clone()
        caplog.clear()
        with cpinfer.invariant_training(trainer.model, config) if is_invariant else nullcontext():
            trainer.train()
        assert caplog.text.count("the forward that trains is not") == (not is_invariant), "said once, where it helps"
        assert not torch.equal(before, trainer.model.lm_head.weight)
        records[is_invariant] = rollouts.records
        rollouts.close()
    assert len(records[True]) == 3
    assert all(record.mismatch is not None and record.mismatch.max_abs == 0.0 for record in records[True])
    assert any(record.mismatch is not None and record.mismatch.max_abs > 0.0 for record in records[False])


def test_a_training_forward_of_other_weights_shows_as_mismatch(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the measure sees a hundredth of one matrix."""

    training_forward = GRPOTrainer._get_per_token_logps_and_entropies

    def of_other_weights(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # it trains, it does not measure
            return training_forward(trainer, model, *args, **kwargs)
        model.lm_head.weight *= 1.01
        found = training_forward(trainer, model, *args, **kwargs)
        model.lm_head.weight /= 1.01
        return found

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", of_other_weights)
    rollouts = make_rollout_func(CONFIG)
    make_trainer(tokenizer, tmp_path, rollouts, max_steps=1).train()
    mismatch = rollouts.records[0].mismatch
    assert mismatch is not None and mismatch.max_abs > 1e-3


def test_samples_come_back_in_the_order_of_the_prompts_with_what_they_were_drawn_from(
    tokenizer: Any, tmp_path: Path
) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts, temperature=0.5)
    asked = [TEXTS[1], TEXTS[0], TEXTS[1], TEXTS[2]]
    outputs = rollouts(asked, trainer)
    assert outputs["prompt_ids"] == tokenizer(text=asked)["input_ids"]
    assert outputs["completion_ids"][0] != outputs["completion_ids"][2]  # two samples of one prompt
    for prompt, completion, logprobs in zip(*outputs.values(), strict=True):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        of_training = torch.log_softmax(logits / 0.5, dim=-1)[range(len(completion)), completion]
        assert (of_training - torch.tensor(logprobs)).abs().max() <= 1e-4
    # The same step again draws others, another trainer's first phase the same.
    assert rollouts(asked, trainer)["completion_ids"] != outputs["completion_ids"]
    again = make_rollout_func(CONFIG)
    assert again(asked, trainer)["completion_ids"] == outputs["completion_ids"]


def test_chats_and_texts_become_the_tokens_that_trl_would_make_of_them(tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tokenizer, tmp_path, make_rollout_func(CONFIG))
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    for prompts in (TEXTS, chats):
        assert tokenize(prompts, trainer) == [list(ids) for ids in trainer._tokenize_prompts(prompts)[0]]
    assert tokenize(chats, trainer) != tokenize(TEXTS, trainer)
    assert tokenize([], trainer) == []


def test_the_trainers_parameters_win_over_the_configs(tokenizer: Any, tmp_path: Path) -> None:
    options = {"temperature": 0.6, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
    trainer = make_trainer(tokenizer, tmp_path, make_rollout_func(CONFIG), **options)
    sampling = sampling_of(trainer, CONFIG.sampling)
    stops = tuple(sorted({99, *trainer.eos_token_ids}))
    assert sampling == SamplingParams(**options, max_new_tokens=5, seed=3, stop_token_ids=stops)


@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"bf16": True, "cast_lm_head_to_fp32": True}, {"neftune_noise_alpha": 5.0}], ids=str
)
def test_rollouts_are_in_the_precision_of_the_training_forward_and_free_of_its_noise(
    tokenizer: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts, max_steps=1, **options)
    forward = trainer.model.lm_head.__dict__.get("forward")
    trainer.train()
    mismatch = rollouts.records[0].mismatch
    assert mismatch is not None and mismatch.max_abs <= 1e-4
    assert trainer.model.lm_head.__dict__.get("forward") is forward


@pytest.mark.parametrize(
    ("options", "is_measured"),
    [
        ({"temperature": 0.7}, True),
        ({"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.3}, True),
        ({"temperature": 0.7, "top_k": 5}, True),
        ({"temperature": 0.7, "top_p": 0.8, "min_p": 0.05}, True),
        ({"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3}, False),
    ],
)
def test_mismatch_is_measured_where_both_know_a_distribution_and_left_out_elsewhere(
    tokenizer: Any, tmp_path: Path, options: dict[str, float], is_measured: bool
) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts, **options)
    rollouts(["The", *TEXTS], trainer)  # prompts of several lengths
    mismatch = rollouts.records[0].mismatch
    assert (mismatch is not None) == is_measured
    assert mismatch is None or (mismatch.num_tokens > 0 and mismatch.max_abs <= 1e-4)


def test_a_kept_mass_that_is_none_is_seen_as_mismatch(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the mass of the cut distribution, 1, in the place of that of the whole one."""
    monkeypatch.setattr("cpinfer.engine.sampling._kept_mass", lambda uncut, logprobs: torch.ones(len(uncut)))
    rollouts = make_rollout_func(CONFIG)
    rollouts(TEXTS, make_trainer(tokenizer, tmp_path, rollouts, temperature=0.7, top_k=5))
    mismatch = rollouts.records[0].mismatch
    assert mismatch is not None and mismatch.max_abs > 0.1


def test_reward_functions_and_logs_learn_what_a_cut_kept(tokenizer: Any, tmp_path: Path) -> None:
    asked = {"dtype": "float32", "kv_cache_gib": 0.01, "sampling": {"seed": 3, "kept_token_ids": True}}
    rollouts = make_rollout_func(asked)
    trainer = make_trainer(tokenizer, tmp_path, rollouts, top_p=0.6, max_steps=1)
    seen: list[Any] = []

    def reward(completion_ids: Any, kept_mass: Any, kept_token_ids: Any, **_: Any) -> list[float]:
        seen.extend(zip(completion_ids, kept_mass, kept_token_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    trainer.reward_funcs[0] = reward
    trainer.train()
    assert len(seen) == 8
    for tokens, masses, kept in seen:
        assert len(tokens) == len(masses) == len(kept)
        assert all(token in ids for token, ids in zip(tokens, kept, strict=True))
    masses = [mass for _, each, _ in seen for mass in each]
    mean = rollouts.records[0].kept_mass_mean
    assert mean == pytest.approx(sum(masses) / len(masses)) and 0.6 <= mean < 1
    [logged] = [line for line in trainer.state.log_history if "reward" in line]
    assert logged["rollout/kept_mass_mean"] == pytest.approx(mean)
    # Without a cut there is none.
    plain = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, plain)
    assert set(plain(TEXTS, trainer)) == {"prompt_ids", "completion_ids", "logprobs"}
    assert plain.records[0].kept_mass_mean is None and "kept_mass_mean" not in plain.records[0].metrics()


def test_reward_functions_get_the_experts_of_the_policy_in_training(tokenizer: Any, tmp_path: Path) -> None:
    asked = {"dtype": "float32", "kv_cache_gib": 0.01, "sampling": {"seed": 3, "routed_experts": True}}
    config = MixtralConfig(**{**TINY_SHAPE, "vocab_size": len(tokenizer)}, num_local_experts=4)
    trainer = make_trainer(tokenizer, tmp_path, make_rollout_func(asked), max_steps=1, config=config)
    num_seen = []

    def reward(prompts: Any, completion_ids: Any, routed_experts: Any, **_: Any) -> list[float]:
        prompt_ids = tokenizer(text=prompts)["input_ids"]
        for before, answer, experts in zip(prompt_ids, completion_ids, routed_experts, strict=True):
            run = torch.tensor([[*before, *answer][:-1]])
            with torch.no_grad():
                logits = trainer.model(run, output_router_logits=True).router_logits
            chosen = torch.stack([layer.topk(2).indices for layer in logits], dim=1).numpy()
            assert experts.dtype == np.int16 and np.array_equal(experts, chosen)
            num_seen.append(len(chosen))
        return [float(len(ids)) for ids in completion_ids]

    trainer.reward_funcs[0] = reward
    trainer.train()
    assert num_seen == [3 + 5 - 1] * 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs={'num_beams': 2}"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=True"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex='a"),
        ({"max_completion_length": None}, "max_completion_length=None"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"mask_truncated_completions": True}, r"mask_truncated_completions=True.* with sampling.stop_token_ids=.99."),
    ],
)
def test_settings_that_trl_drops_on_this_path_are_refused_by_name(
    tokenizer: Any, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts, **options)
    with pytest.raises(cpinfer.UserError, match=words):
        rollouts(TEXTS, trainer)


@pytest.mark.parametrize(
    ("has", "value", "words"),
    [
        ("tools", [len], r"tools and environments.*with_cpinfer\(GRPOTrainer, config\)"),
        ("environment_factories", {None: object}, "tools and environments"),
        ("_is_vlm", True, "multimodal"),
        ("use_vllm", True, "use_vllm=True"),
    ],
)
def test_what_else_a_trainer_may_have_is_refused_before_anything_runs(
    tokenizer: Any, tmp_path: Path, has: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts)
    monkeypatch.setattr(trainer.args if hasattr(trainer.args, has) else trainer, has, value)
    with pytest.raises(cpinfer.UserError, match=words):
        rollouts(TEXTS, trainer)
    assert rollouts.records == []


def test_answers_that_trl_takes_for_cut_short_may_not_be_masked_and_others_may(tokenizer: Any, tmp_path: Path) -> None:
    options = {"mask_truncated_completions": True}
    by_text = make_rollout_func(parse_config({**config_to_dict(CONFIG), "sampling": {"stop": [";"]}}))
    with pytest.raises(cpinfer.UserError, match=r"sampling.stop=\[';'\]"):
        by_text(TEXTS, make_trainer(tokenizer, tmp_path, by_text, **options))
    eos = {"stop_token_ids": [tokenizer.eos_token_id]}
    known = make_rollout_func(parse_config({**config_to_dict(CONFIG), "sampling": eos}))
    make_trainer(tokenizer, tmp_path, known, **options, max_steps=1).train()
    assert len(known.records) == 1


def test_a_config_is_an_object_a_dict_a_path_or_nothing(tokenizer: Any, tmp_path: Path) -> None:
    said = {"dtype": "float32", "kv_cache_gib": 0.01, "sampling": {"seed": 3, "stop_token_ids": [99]}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**said, "training": {"num_steps": 5}, "input": "prompts.jsonl"}))
    rollouts = [make_rollout_func(config) for config in (CONFIG, said, path, str(path))]
    answers = [each(TEXTS, make_trainer(tokenizer, tmp_path, each))["completion_ids"] for each in rollouts]
    assert all(other == answers[0] for other in answers[1:])
    untold = make_rollout_func()
    trainer = make_trainer(tokenizer, tmp_path, untold)
    assert len(untold(TEXTS, trainer)["completion_ids"]) == len(TEXTS)
    make_rollout_func({"training": {"num_steps": 5}})  # of a run, as in a file
    with pytest.raises(cpinfer.UserError, match='unknown key "trainings"'):
        make_rollout_func({"trainings": {"num_steps": 5}})
    with pytest.raises(cpinfer.UserError, match=r'dtype "bfloat16", the model.s weights are float32'):
        make_rollout_func({"dtype": "bfloat16"})(TEXTS, trainer)


def test_what_is_lent_and_what_trl_will_count_as_clipped_is_said_once(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts)
    with caplog.at_level("INFO", logger="cpinfer"):
        rollouts(TEXTS, trainer)
        rollouts(TEXTS, trainer)
    said = [record.getMessage() for record in caplog.records]
    [told] = [line for line in said if line.startswith("rollouts in")]
    [warned] = [line for line in said if "stop_token_ids" in line]
    assert told == "rollouts in 1 replica(s) of tp=1 pcp=1 dcp=1, weights lent: in_place"
    assert "sampling.stop_token_ids=[99]" in warned and "completions/clipped_ratio" in warned


def test_ignore_eos_holds_in_a_trainer_too(tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tokenizer, tmp_path, make_rollout_func(CONFIG))
    assert set(trainer.eos_token_ids) <= set(sampling_of(trainer, SamplingParams()).stop_token_ids)
    assert sampling_of(trainer, SamplingParams(ignore_eos=True, stop_token_ids=(99,))).stop_token_ids == (99,)


def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers(tokenizer: Any, tmp_path: Path) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts)
    with pytest.raises(cpinfer.UserError, match=r"the prompt has \d+ tokens"):
        rollouts([" word" * 4000], trainer)
    assert trainer.model.config._attn_implementation != "cpinfer"


def test_of_an_overlong_prompt_the_last_tokens_stand_for_it_where_that_was_asked_for(
    tokenizer: Any, tmp_path: Path
) -> None:
    room = AutoConfig.from_pretrained(TINY).max_position_embeddings - 5
    data = config_to_dict(CONFIG)
    cutting = make_rollout_func(parse_config({**data, "rollout": {"overlong_prompts": "truncate_left"}}))
    trainer = make_trainer(tokenizer, tmp_path, cutting)
    long = " boats" * (room + 7) + TEXTS[0]
    outputs = cutting([long, TEXTS[1], long], trainer)
    whole = tokenizer(text=[long])["input_ids"][0]
    assert len(whole) > room
    assert outputs["prompt_ids"] == [whole[-room:], tokenizer(text=TEXTS[1])["input_ids"], whole[-room:]]
    assert all(len(ids) == 5 or ids[-1] in {99, *trainer.eos_token_ids} for ids in outputs["completion_ids"])
    assert cutting.records[0].num_truncated_prompts == 2
    assert trainer._metrics["eval"]["rollout/num_truncated_prompts"] == [2]
    trainer.max_completion_length = room + 5
    with pytest.raises(cpinfer.UserError, match="leaves no room for a prompt"):
        cutting([TEXTS[0]], trainer)


class Watched:
    """A rollout func, and what it gave, in order: mode, step and completions of each phase."""

    def __init__(self, config: JobConfig) -> None:
        self.rollouts = make_rollout_func(config)
        self.phases: list[tuple[str, int, list[list[int]]]] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        outputs = self.rollouts(prompts, trainer)
        mode = "train" if trainer.model.training else "eval"
        self.phases.append((mode, trainer.state.global_step, outputs["completion_ids"]))
        return outputs

    def of_mode(self, mode: str) -> list[tuple[str, int, list[list[int]]]]:
        return [phase for phase in self.phases if phase[0] == mode]


def trained(tokenizer: Any, folder: Path, resume: Any = None, config: JobConfig = CONFIG, **options: Any) -> Watched:
    watched = Watched(config)
    make_trainer(tokenizer, folder, watched, **options).train(resume_from_checkpoint=resume)
    return watched


def test_evaluation_and_a_resume_change_no_sample_of_training(tokenizer: Any, tmp_path: Path) -> None:
    alone = trained(tokenizer, tmp_path / "alone")
    assert len(alone.phases) == 3
    saved = {"save_strategy": "steps", "save_steps": 1}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, **saved}
    among = trained(tokenizer, tmp_path / "among", **evaluated)
    assert len(among.of_mode("eval")) == 3
    assert among.of_mode("train") == alone.phases
    checkpoint = str(tmp_path / "among" / "checkpoint-1")
    resumed = trained(tokenizer, tmp_path / "resumed", resume=checkpoint, **evaluated)
    assert resumed.of_mode("train") == alone.phases[1:]
    assert resumed.of_mode("eval") == among.of_mode("eval")[1:]


def test_samples_are_those_of_the_trainers_seed_and_of_the_configs(tokenizer: Any, tmp_path: Path) -> None:
    def sampled(seed: int, config: JobConfig = CONFIG) -> list[list[int]]:
        rollouts = make_rollout_func(config)
        found: list[list[int]] = rollouts(TEXTS, make_trainer(tokenizer, tmp_path, rollouts, seed=seed))[
            "completion_ids"
        ]
        return found

    first = sampled(1)
    assert sampled(1) == first
    assert sampled(2) != first
    assert sampled(1, replace(CONFIG, sampling=replace(CONFIG.sampling, seed=4))) != first


@pytest.mark.parametrize("dropout", ["attention", "lora"])
def test_measuring_the_mismatch_knows_no_dropout_and_changes_nothing_of_training(
    tokenizer: Any, tmp_path: Path, dropout: str
) -> None:
    changed = {"attention_dropout": 0.5} if dropout == "attention" else {}
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)

    def run(every: int) -> tuple[RolloutFunc, GRPOTrainer]:
        rollouts = make_rollout_func(replace(CONFIG, rollout=RolloutConfig(mismatch_every=every)))
        adapter = copy.deepcopy(lora) if dropout == "lora" else None
        trainer = make_trainer(tokenizer, tmp_path, rollouts, changed=changed, peft_config=adapter)
        random.seed(1)
        trainer.train()
        return rollouts, trainer

    rollouts, measured = run(1)
    assert [record.mismatch is not None for record in rollouts.records] == [True] * 3
    for record in rollouts.records:
        assert record.mismatch is not None and record.mismatch.num_tokens > 0 and record.mismatch.max_abs <= 1e-4
    states = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    assert all(module.training for module in measured.model.modules())
    rollouts, unmeasured = run(0)
    assert [record.mismatch for record in rollouts.records] == [None] * 3
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[2], random.getstate())
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (measured, unmeasured)]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    for one, other in zip(measured.model.parameters(), unmeasured.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_parts_of_a_phase_add_up_to_it(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of this thread's own time: on a busy machine it may be put off between the reading of two clocks.
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts)
    rollouts(TEXTS, trainer)
    logged = {key: values[-1] for key, values in trainer._metrics["eval"].items()}
    parts = ("prepare_s", "gather_s", "attach_s", "generate_s", "detach_s", "release_s")
    assert sum(logged[f"rollout/{part}"] for part in parts) == pytest.approx(logged["rollout/phase_s"], rel=0.01)
    assert min(logged[f"rollout/{part}"] for part in ("prepare_s", "attach_s", "generate_s", "detach_s")) > 0


def test_prompts_that_one_rank_cannot_tokenize_are_an_error_on_all(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tokenizer, tmp_path, make_rollout_func(CONFIG))
    told: list[Any] = []

    def with_another_rank(own: Any) -> list[Any]:
        told.append(own)
        return [own, "no such role"]

    monkeypatch.setattr("cpinfer_integrations.job_ranks.all_gather_object", with_another_rank)
    with pytest.raises(cpinfer.UserError, match="rank 1 could not tokenize its prompts: no such role"):
        make_rollout_func(CONFIG)(TEXTS[:2], trainer)
    trainer.chat_template = "{{ raise_exception('a role of my own') }}"
    with pytest.raises(Exception, match="a role of my own"):
        make_rollout_func(CONFIG)([[{"role": "user", "content": "x"}]], trainer)
    assert told == [None, "a role of my own"], "the other rank must be told, not left waiting"
