"""Reading models from a folder or by Hugging Face id: first the config, then what its files say, then the weights.

What a folder holds is input like any other: it is checked before it is used, and code in it is never run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from cpinfer.errors import UserError
from cpinfer.models.checkpoint import first_line, local_folder, read_checkpoint
from cpinfer.models.config_values import check_values
from cpinfer.models.expected_weights import (
    Weights,
    check_loading_info,
    check_weights,
    expected_weights,
    without_load_report,
)
from cpinfer.models.generation_config import sampling_keys
from cpinfer.models.spec import ModelSpec, refuse_unsupported


def load_spec(model: str) -> ModelSpec:
    """What a model is, from its config files alone. UserError when there is none, or when it is refused."""
    return ModelSpec.from_config(_read_config(model).to_dict(), _read_generation_config(model))


def model_sampling(model: str) -> dict[str, Any]:
    """What a model's generation_config.json says of sampling, as keys of `SamplingParams`. UserError as `load_spec`."""
    return sampling_keys(_read_generation_config(model) or {})


def load_tokenizer(model: str, **options: Any) -> Any | None:
    """The model's tokenizer, None when its folder has none. `options` as `AutoTokenizer.from_pretrained` has them."""
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None
    try:
        config = get_tokenizer_config(model)
        if not _is_code(config):
            return AutoTokenizer.from_pretrained(model, trust_remote_code=False, **options)
    except Exception as error:  # parsers of its files raise what they like
        raise UserError(f"model {model}: its tokenizer could not be read ({first_line(error)}).") from error
    # Where Transformers has a tokenizer for the family it would take that one in silence.
    raise UserError(
        f"model {model}: its tokenizer is code of its own (auto_map in tokenizer_config.json), which is never run. "
        "Save it as a tokenizer of Transformers (a tokenizer.json)."
    )


def known_weights(model: str, dtype: torch.dtype, *, in_files: bool = True) -> Weights:
    """What is known of a model's weights before they load. UserError when its files are not those of its config.

    Files are looked at where they are on this machine already, never fetched, and by their headers; not `in_files`:
    not at all.
    """
    config = _read_config(model)
    folder = local_folder(model) if in_files else None
    return expected_weights(config, dtype) if folder is None else check_weights(read_checkpoint(folder), config, dtype)


def load_model(model: str, dtype: torch.dtype, **options: Any) -> Any:
    """The causal LM with its weights, in evaluation mode, on CPU. UserError when its files lack any of them.

    `options` as `AutoModelForCausalLM.from_pretrained` has them, for who wants it sharded as it loads.
    """
    config = _read_config(model)
    if (folder := local_folder(model)) is not None:
        read_checkpoint(folder)
    log, start_s = logging.getLogger(__name__), time.perf_counter()
    log.info("loading %s in %s", model, str(dtype).removeprefix("torch."))
    try:
        with without_load_report():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                model,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        if (folder := local_folder(model)) is not None:  # by now at the latest; this check names the tensor
            check_weights(read_checkpoint(folder), config, dtype)
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"model {model}: its weights could not be read ({first_line(error)}).") from error
        raise
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise UserError(f"model {model}: it comes with an adapter; a whole model was wanted. Merge it into the model.")
    check_loading_info(model, loaded, info)
    log.info("loaded %s in %.1f s", model, time.perf_counter() - start_s)
    return loaded.eval()


def fresh_model(model: str, dtype: torch.dtype) -> Any:
    """The causal LM of a config with random weights."""
    return AutoModelForCausalLM.from_config(_read_config(model), dtype=dtype, trust_remote_code=False)


def _read_config(model: str) -> Any:
    """A model's config as an object of its own class, every value looked at before that class sees it."""
    try:
        values, _ = PretrainedConfig.get_config_dict(model)
    except Exception as error:  # no file, no JSON, no object: whatever is wrong with it has a type of its own
        raise _no_config(model, error) from error
    if not isinstance(values, dict) or not values:
        raise _no_config(model, FileNotFoundError("it has no config.json, or one without an object in it"))
    refuse_unsupported(values)
    check_values(values, whole=False)
    if values.get("transformers_weights") is not None:
        raise UserError(
            f'model {model}: its config.json names its weights ("transformers_weights"); model.safetensors was wanted. '
            "Rename the file and remove the key."
        )
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # its class computes with values that it has not checked
        raise _no_config(model, error) from error
    # Attention is the engine's; what a file asks for here may be missing, or be fetched from the hub as code.
    config._attn_implementation = None
    return config


def _read_generation_config(model: str) -> dict[str, Any] | None:
    """What a model's generation_config.json says, None where it has none."""
    if Path(model).is_dir() and not (Path(model) / "generation_config.json").exists():
        return None
    try:
        return GenerationConfig.from_pretrained(model).to_dict()
    except OSError as error:
        if Path(model).is_dir():
            raise _no_generation_config(model, error) from error
        return None  # the hub has none
    except Exception as error:
        raise _no_generation_config(model, error) from error


def _is_code(tokenizer_config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer_config.json names a class of its folder, and none of Transformers'."""
    auto_map = tokenizer_config.get("auto_map")
    own = auto_map.get("AutoTokenizer") if isinstance(auto_map, Mapping) else auto_map
    return bool(own) and not hasattr(transformers, str(tokenizer_config.get("tokenizer_class")))


def _no_config(model: str, error: Exception) -> UserError:
    return UserError(
        f"model {model}: no config could be read ({first_line(error)}). "
        "Give a folder with a config.json, or the id of a model on the Hugging Face hub."
    )


def _no_generation_config(model: str, error: Exception) -> UserError:
    return UserError(f"model {model}: its generation_config.json could not be read ({first_line(error)}).")
