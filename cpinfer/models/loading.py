"""Reading models from a folder or by Hugging Face id: first the config alone, later the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cpinfer.errors import UserError
from cpinfer.models.spec import ModelSpec


def load_spec(model: str) -> ModelSpec:
    """What a model is, from its config files alone. UserError when there is none, or when it is refused."""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model {model}: no config could be read ({_first_line(error)}). "
            "Give a folder with a config.json, or the id of a model on the Hugging Face hub."
        ) from error
    try:
        generation = GenerationConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError):
        generation = None
    return ModelSpec.from_config(config.to_dict(), generation)


def load_tokenizer(model: str, **options: Any) -> Any | None:
    """The model's tokenizer, None when its folder has none. `options` as `AutoTokenizer.from_pretrained` has them."""
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"model {model}: its tokenizer could not be read ({_first_line(error)}).") from error


def load_model(model: str, dtype: torch.dtype) -> Any:
    """The causal LM with its weights, in evaluation mode, on CPU."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
