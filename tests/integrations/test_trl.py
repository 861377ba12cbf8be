"""TRL's own GRPOTrainer on one process: what it asks for, what it gets, and what it would lose without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import cpinfer
from cpinfer.config import SamplingParams, parse_config
from cpinfer_integrations.trl import RolloutFunc, make_rollout_func, sampling_of, tokenize
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


def make_trainer(tokenizer: Any, folder: Path, rollout_func: RolloutFunc, **options: Any) -> GRPOTrainer:
    """Three steps of eight samples: two prompts, four samples each."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer = GRPOTrainer(
        model=make_model(AutoConfig.from_pretrained(TINY)),
        reward_funcs=[lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids]],
        args=GRPOConfig(**{**arguments, **options}),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
        rollout_func=rollout_func,
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
    ("options", "is_measured"),
    [
        ({"temperature": 0.7}, True),
        ({"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.3}, True),
        ({"temperature": 0.7, "top_k": 5}, False),
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


def test_generation_kwargs_are_refused_and_not_dropped(tokenizer: Any, tmp_path: Path) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts, generation_kwargs={"num_beams": 2})
    with pytest.raises(ValueError, match="num_beams"):
        rollouts(TEXTS, trainer)


def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers(tokenizer: Any, tmp_path: Path) -> None:
    rollouts = make_rollout_func(CONFIG)
    trainer = make_trainer(tokenizer, tmp_path, rollouts)
    with pytest.raises(cpinfer.UserError, match=r"the prompt has \d+ tokens"):
        rollouts([" word" * 4000], trainer)
    assert trainer.model.config._attn_implementation != "cpinfer"
