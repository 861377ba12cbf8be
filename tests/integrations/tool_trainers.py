"""Trainers of TRL whose model calls tools, and what they draw: by cpinfer and by TRL's own generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from cpinfer_integrations.trl import with_cpinfer
from tool_models import NAMES, chats, follow, tool_model, tool_tokenizer
from trainers import photograph, torch_trainer

ASKED = (*NAMES, " Anna", " boats")
GREEDY: dict[str, Any] = {"top_k": 1}
# One that has no words instead of a call.
CALLING = {**GREEDY, "model": {"words": ()}, "max_tool_calling_iterations": 3}
CONFIG = {"dtype": "float32", "kv_cache_gib": 0.02}


def make_trainer(
    trainer_class: type[Any],
    folder: Path,
    *,
    tools: Sequence[Callable[..., Any]] | None = (follow,),
    model: Mapping[str, Any] = MappingProxyType({}),
    data: Mapping[str, Any] = MappingProxyType({}),
    reward: Any = lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
    given: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Any:
    """A trainer of the model that calls tools. `model`: of it; `data`: more columns; `given`: to the constructor."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 400,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    tokenizer = tool_tokenizer()
    is_rloo = issubclass(trainer_class, RLOOTrainer)
    trainer = trainer_class(
        model=tool_model(**model),
        reward_funcs=reward,
        args=(RLOOConfig if is_rloo else GRPOConfig)(**{**arguments, "beta": 0.0, **options}),
        train_dataset=Dataset.from_dict({"prompt": chats(ASKED), **data}),
        processing_class=tokenizer,
        **({} if is_rloo else {"tools": list(tools) if tools else None}),
        **given,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def by_cpinfer(tool_loop: str = "async", **rollout: Any) -> type[Any]:
    return with_cpinfer(GRPOTrainer, {**CONFIG, "rollout": {"tool_loop": tool_loop, **rollout}})


def drawn(trainer: Any, inputs: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """What TRL makes of one sample for each input, before it scores them; and what it counted."""
    found: list[Any] = []
    generate = trainer._generate
    trainer._generate = lambda prompts: found.append(generate(prompts)) or found[0]
    trainer._generate_and_score_completions([dict(x) for x in inputs or ({"prompt": chat} for chat in chats(ASKED))])
    del trainer._generate
    prompt_ids, completion_ids, tool_mask, completions, logprobs, _, images, tool_images = found[0]
    counted = {key: values for key, values in trainer._metrics["eval"].items() if "rollout/" not in key}
    return {
        "prompt_ids": [list(ids) for ids in prompt_ids],
        "completion_ids": completion_ids,
        "tool_mask": tool_mask,
        "completions": completions,
        "images": (images, tool_images),
        "counted": counted,
        "logprobs": logprobs,
    }


def check_same(trainer: Any, oracle: Any, inputs: Any = None) -> dict[str, Any]:
    """Greedy samples of both, equal in all that TRL goes on with. Its own generation has no logprobs to compare."""
    ours, theirs = drawn(trainer, inputs), drawn(oracle, inputs)
    for ids, logprobs in zip(ours["completion_ids"], ours.pop("logprobs"), strict=True):
        assert len(ids) == len(logprobs)
    assert theirs.pop("logprobs") is None
    assert ours == theirs
    return ours


def photograph_of(trainer: Any) -> dict[str, Any]:
    return photograph(torch_trainer(trainer.model, trainer.model))
