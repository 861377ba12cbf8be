"""Reading models from a folder or by Hugging Face id: first the config, then what its files say, then the weights.

What a folder holds is input like any other: it is checked before it is used, and code in it is never run.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.hub import cached_file

from cpinfer.errors import UserError
from cpinfer.layout.step_traffic import ModelSizes
from cpinfer.models.checkpoint import fetched_folder, first_line, local_folder, named, read_checkpoint
from cpinfer.models.config_values import check_file_values, check_generation_values
from cpinfer.models.expected_weights import (
    Placed,
    Weights,
    check_loading_info,
    expected_sizes,
    expected_weights,
    linear_weights,
    place_weights,
    without_load_report,
)
from cpinfer.models.generation_config import sampling_keys
from cpinfer.models.quantization import QUANTIZATION_KEYS, Quantization, as_plain, plain_tensors, quantization
from cpinfer.models.refused_models import refuse_unsupported
from cpinfer.models.spec import ModelSpec
from cpinfer.models.stored_tensors import OnRead, Readable, ReadBytes, Unread, stored_tensors
from cpinfer.models.tokenizer_files import check_tokenizer_values, knows_words, tokenizer_files


def load_spec(model: str) -> ModelSpec:
    """What a model is, from its config files alone. UserError when there is none, or when it is refused."""
    return ModelSpec.from_config(_read_config(model)[0].to_dict(), _read_generation_config(model))


def model_sampling(model: str) -> dict[str, Any]:
    """What a model's generation_config.json says of sampling, as keys of `SamplingParams`. UserError as `load_spec`."""
    return sampling_keys(_read_generation_config(model) or {})


def load_tokenizer(model: str, **options: Any) -> Any | None:
    """The model's tokenizer, None when its folder has none. `options` as `AutoTokenizer.from_pretrained` has them.

    UserError when its files are broken, or are without a vocabulary.
    """
    folder = Path(model)
    files = tokenizer_files(folder) if folder.is_dir() else ["those of the hub"]
    if not files:
        return None
    try:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            check_tokenizer_values(_read_json(model, name) or {}, name)
        if _is_code(_read_json(model, "tokenizer_config.json") or {}):
            # Where Transformers has a tokenizer for the family it would take that one in silence.
            raise UserError(
                f"model {model}: its tokenizer is code of its own (auto_map in tokenizer_config.json), which is never "
                "run. Save it as a tokenizer of Transformers (a tokenizer.json)."
            )
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, **options)
        if knows_words(tokenizer):
            return tokenizer
        found = f"all that Transformers makes of them is a {type(tokenizer).__name__} without a single word"
    except UserError:
        raise
    except Exception as error:  # parsers of its files raise what they like
        found = first_line(error)
        if "tokenizer.model" in files and find_spec("sentencepiece") is None:  # another package is asked for then
            found = "tokenizer.model needs the package sentencepiece: run `pip install sentencepiece protobuf`"
    raise UserError(
        f"model {model}: its tokenizer could not be read from {', '.join(files)} ({found}). A whole tokenizer.json was "
        "wanted, or what its family has in its place (vocab.json with merges.txt, tokenizer.model). Copy it from where "
        "the model comes from; or, if no prompt or answer is to be a text, take these files away."
    )


def known_weights(model: str, dtype: torch.dtype, *, in_files: bool = True) -> Weights:
    """What is known of a model's weights before they load. UserError when its files are not those of its config.

    Files are looked at where they are on this machine already, never fetched, and by their headers; not `in_files`:
    not at all.
    """
    source = _source(model, dtype)
    if not in_files or source.folder is None:
        return expected_weights(source.config, dtype)
    return source.placed(source.folder).weights


def known_sizes(model: str, dtype: torch.dtype) -> tuple[Weights, ModelSizes]:
    """A model's weights, and what the cost of its steps depends on, by its config alone. UserError as `load_spec`."""
    return expected_sizes(load_spec(model), _read_config(model)[0], dtype)


def load_model(model: str, dtype: torch.dtype, *, on_read: OnRead | None = None, **options: Any) -> Any:
    """The causal LM with its weights, in evaluation mode, on CPU. UserError when its files lack any of them.

    Weights in mxfp4 or fp8 are dequantized. Those that have `dtype` in their files are views of these, mapped: ranks of
    a host share their pages. `on_read` is told of bytes as they are read. `options` as
    `AutoModelForCausalLM.from_pretrained` has them, for who wants it sharded as it loads.
    """
    source = _source(model, dtype)
    by_name = is_deepspeed_zero3_enabled() or source.folder is None
    if by_name and source.quantized is None:
        return _loaded(source, partial(_by_name, model), options)
    with _readable(source):
        folder = fetched_folder(model)
    tensors = source.tensors(folder, ReadBytes(on_read))
    if is_deepspeed_zero3_enabled():  # which wants tensors, where other ways of loading ask for them one by one
        return _loaded(source, partial(_from_tensors, source, {name: x[...] for name, x in tensors.items()}), options)
    wanted = source.placed(folder).wanted
    return _loaded(source, partial(_from_tensors, source, {name: tensors[name] for name in wanted}), options)


@dataclass(frozen=True)
class PartlyRead:
    """A causal LM whose linear layers lie on the meta device, `unread`: parameters by name, each a tensor of a file."""

    model: Any
    unread: Mapping[str, Readable]


def load_partly(model: str, dtype: torch.dtype, *, on_read: OnRead | None = None) -> PartlyRead:
    """As `load_model`, but linear layers stay in the files, where a tensor there is their weight as it is."""
    source, log = _source(model, dtype), logging.getLogger(__name__)
    with _readable(source):
        folder = fetched_folder(model)
    placed, tensors = source.placed(folder), source.tensors(folder, ReadBytes(on_read))
    unread = {key: tensors[name] for key, name in placed.linear.items()}
    given: dict[str, Any] = {name: tensors[name] for name in placed.wanted}
    given |= {name: Unread(tensors[name].get_shape()) for name in placed.linear.values()}
    loaded = _loaded(source, partial(_from_tensors, source, given), {})
    if odd := {key for key, weight in loaded.named_parameters() if weight.is_meta} ^ unread.keys():
        raise RuntimeError(f"model {model}: Transformers has loaded {named(sorted(odd))} otherwise than it said before")
    if whole := [key for key in linear_weights(loaded) if key not in unread]:
        log.info("%s: not as they are in its files, and so read whole by every rank: %s", model, named(whole))
    return PartlyRead(loaded, unread)


def fresh_model(model: str, dtype: torch.dtype) -> Any:
    """The causal LM of a config with random weights."""
    return AutoModelForCausalLM.from_config(_read_config(model)[0], dtype=dtype, trust_remote_code=False)


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: its config, quantization left out of it, and the folder of its files, if it is here."""

    model: str
    dtype: torch.dtype
    config: Any
    quantized: Quantization | None
    folder: Path | None

    def check(self, folder: Path) -> None:
        """UserError when the weights in the folder are not those of its config, as far as can be seen."""
        if is_deepspeed_zero3_enabled():  # no model is made on the meta device then
            read_checkpoint(folder)
        else:
            self.placed(folder)

    def placed(self, folder: Path) -> Placed:
        """Where its weights are in the folder. UserError when they are not those of its config."""
        checkpoint = read_checkpoint(folder)
        plain = checkpoint if self.quantized is None else as_plain(checkpoint, self.quantized)
        return place_weights(plain, self.config, self.dtype)

    def tensors(self, folder: Path, read: ReadBytes) -> Mapping[str, Readable]:
        """Its tensors in the folder, those that are quantized dequantized as they are read."""
        checkpoint = read_checkpoint(folder)
        stored = stored_tensors(checkpoint, self.dtype, read)
        return stored if self.quantized is None else plain_tensors(checkpoint, self.quantized, self.dtype, stored)


def _source(model: str, dtype: torch.dtype) -> _Source:
    return _Source(model, dtype, *_read_config(model), local_folder(model))


def _loaded(source: _Source, load: Callable[..., tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    """What `load` makes of a model, all of it found. UserError where it is not."""
    told = "" if source.quantized is None else f", dequantized from {type(source.quantized).__name__.lower()}"
    log, start_s = logging.getLogger(__name__), time.perf_counter()
    log.info("loading %s in %s%s", source.model, str(source.dtype).removeprefix("torch."), told)
    with without_load_report(), _readable(source):
        loaded, info = load(
            config=source.config,
            dtype=source.dtype,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **options,
        )
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model {source.model}: it comes with an adapter; a whole model was wanted. Merge it into the model."
        )
    check_loading_info(source.model, loaded, info)
    if source.folder is None and (folder := local_folder(source.model)) is not None:
        source.check(folder)  # also what was loaded: codes would have been taken for numbers
    log.info("loaded %s in %.1f s", source.model, time.perf_counter() - start_s)
    return loaded.eval()


@contextmanager
def _readable(source: _Source) -> Iterator[None]:
    """A block that reads a model's files. UserError where they cannot be read, or have come and are another model's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if source.folder is None and (folder := local_folder(source.model)) is not None:  # by now
            source.check(folder)  # names the tensor
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"model {source.model}: its weights could not be read ({first_line(error)}).") from error
        raise


def _by_name(model: str, **options: Any) -> tuple[Any, Any]:
    """By Transformers alone, which finds a model's files, or fetches them."""
    return AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False, use_safetensors=True, **options)


def _from_tensors(source: _Source, tensors: Mapping[str, Any], **options: Any) -> tuple[Any, Any]:
    """As `from_pretrained` by a model's name, of these tensors."""
    generation = _read_generation_config(source.model)
    loaded, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)].from_pretrained(
        None,
        state_dict=tensors,
        generation_config=None if generation is None else GenerationConfig.from_dict(generation),
        **options,
    )
    loaded.name_or_path = loaded.config.name_or_path = source.model
    return loaded, info


def _read_config(model: str) -> tuple[Any, Quantization | None]:
    """A model's config as an object of its own class, every value looked at before that class sees it.

    It says nothing of quantization: that is how the files have the weights, and comes beside it.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(model)
    except Exception as error:  # no file, no JSON, no object: whatever is wrong with it has a type of its own
        raise _no_config(model, error) from error
    if not isinstance(values, dict) or not values:
        raise _no_config(model, FileNotFoundError("it has no config.json, or one without an object in it"))
    refuse_unsupported(values)
    check_file_values(values)
    quantized = quantization(values)
    if values.get("transformers_weights") is not None:
        raise UserError(
            f'model {model}: its config.json names its weights ("transformers_weights"); model.safetensors was wanted. '
            "Rename the file and remove the key."
        )
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # its class computes with values that it has not checked
        raise UserError(
            f"model {model}: its config.json cannot be used ({first_line(error)}). Correct it there, or take the file "
            "from where the model comes from."
        ) from error
    # Outputs that nobody reads, and which Transformers' own attention would be chosen for.
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    # Attention is the engine's, and experts run in any way; what a file asks for may be missing, or be fetched as code.
    config._attn_implementation = config._experts_implementation = None
    for name in QUANTIZATION_KEYS:
        if hasattr(config, name):
            delattr(config, name)
    return config, quantized


def _read_generation_config(model: str) -> dict[str, Any] | None:
    """What a model's generation_config.json says, None where it has none."""
    try:
        values = _read_json(model, "generation_config.json")
        if values is None:
            return None
        check_generation_values(values)
        return GenerationConfig.from_pretrained(model).to_dict()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model {model}: its generation_config.json could not be read ({first_line(error)}). Correct it, or take "
            "the file away."
        ) from error


def _read_json(model: str, name: str) -> dict[str, Any] | None:
    """A file of a model, None where it has no such file. ValueError when it holds no object."""
    path = cached_file(
        model,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values


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
