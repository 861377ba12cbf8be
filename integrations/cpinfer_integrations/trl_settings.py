"""What a trainer of TRL asks of rollouts, as sampling parameters of ours; what it asks in vain is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cpinfer.config import SamplingParams
from cpinfer.errors import UserError
from cpinfer.refusals import refuse

# Settings that TRL reads nowhere on the path of a `rollout_func`, and that ask for another generator.
_OF_VLLM = ("use_vllm", "vllm_structured_outputs_regex")
_OF_TRANSFORMERS = ("generation_kwargs", "cache_implementation", "use_transformers_continuous_batching")


def check_settings(trainer: Any, base: SamplingParams) -> None:
    """UserError for what TRL would drop without a word on this path, fail at later, or do behind our back."""
    if found := _set(trainer.args, _OF_VLLM):
        raise refuse("trl_vllm", found)
    if found := _set(trainer.args, _OF_TRANSFORMERS):
        raise refuse("trl_transformers_generation", found)
    if trainer._is_vlm:
        raise refuse("multimodal", f"a {type(trainer.processing_class).__name__}")
    if trainer.max_completion_length is None:
        raise UserError(
            "GRPOConfig(max_completion_length=None): the longest answer was wanted, in tokens. Give "
            "max_completion_length; an answer that meets the end of the model's positions ends there anyway."
        )
    if not trainer.temperature:
        raise UserError("GRPOConfig(temperature=0): TRL divides logits by it. Use a temperature above 0.")
    ends = ends_unknown_to_trl(trainer, base)
    if trainer.mask_truncated_completions and ends:
        raise refuse("trl_mask_truncated", f"GRPOConfig(mask_truncated_completions=True) with {ends}")


def refuse_tools(trainer: Any) -> None:
    """UnsupportedError for a trainer that asks for more than one turn."""
    if trainer.tools or trainer.environment_factories is not None:
        raise refuse("trl_tools", "a GRPOTrainer with tools or an environment_factory")


def _set(args: Any, settings: tuple[str, ...]) -> str:
    """Those of the settings that ask for something, as they were written."""
    asked = {name: getattr(args, name, None) for name in settings}
    written = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value)
    return written and f"GRPOConfig({written})"


def ends_unknown_to_trl(trainer: Any, base: SamplingParams) -> str:
    """Ends of answers that TRL takes for answers cut short, in words; an empty text when there are none.

    It looks at an answer's last token alone, and knows end-of-text tokens of model and tokenizer.
    """
    strings = f"sampling.stop={list(base.stop)}" if base.stop else ""
    unknown = sorted({*base.stop_token_ids} - {*trainer.eos_token_ids, trainer.processing_class.pad_token_id})
    tokens = f"sampling.stop_token_ids={unknown}" if unknown else ""
    return " and ".join(filter(None, (strings, tokens)))


def sampling_of(trainer: Any, base: SamplingParams) -> SamplingParams:
    """The trainer's sampling parameters over the config's: its loss divides logits by its own temperature."""
    eos = () if base.ignore_eos else trainer.eos_token_ids
    return replace(
        base,
        temperature=float(trainer.temperature),
        top_k=int(trainer.top_k or 0),
        top_p=float(trainer.top_p if trainer.top_p is not None else 1.0),
        min_p=float(trainer.min_p or 0.0),
        repetition_penalty=float(trainer.repetition_penalty or 1.0),
        max_new_tokens=int(trainer.max_completion_length),
        stop_token_ids=tuple(sorted({*base.stop_token_ids, *eos})),
        n=1,
    )
