"""What a model wants of its checkpoint against what is there, by Transformers' own loading, on tensors without values.

A checkpoint's names are not a model's: Transformers renames, adds and drops prefixes, ties embeddings, and makes one
tensor of many experts'. So its own loader is asked, with tensors on the meta device: a second at most, and no weights.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from cpinfer.errors import UserError
from cpinfer.layout.step_traffic import ModelSizes
from cpinfer.models.checkpoint import Checkpoint, StoredTensor, first_line, named
from cpinfer.models.decoder_layers import decoder_layers
from cpinfer.models.model_sizes import model_sizes
from cpinfer.models.spec import ModelSpec
from cpinfer.models.stored_tensors import Unread

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Weights:
    """What is known of a model's weights before they load.

    `layer_bytes` are those of the matrices in decoder layers, which tensor parallelism divides, `other_bytes` those of
    all else, which it copies; both at the dtype that the model will have. `unexpected` are tensors of the checkpoint
    that the model has no place for.
    """

    num_parameters: int
    layer_bytes: int
    other_bytes: int
    unexpected: tuple[str, ...] = ()

    def bytes_per_rank(self, tp_size: int) -> int:
        """Bytes of weights that a rank keeps; an estimate, for every framework cuts a little differently."""
        return -(-self.layer_bytes // tp_size) + self.other_bytes


def expected_weights(config: Any, dtype: torch.dtype) -> Weights:
    """The weights of a config's model, by the config alone. UserError when no model can be built from it."""
    return _weights(_empty_model(config, dtype))


def expected_sizes(spec: ModelSpec, config: Any, dtype: torch.dtype) -> tuple[Weights, ModelSizes]:
    """The weights of a config's model, and what the cost of its steps depends on. UserError as `expected_weights`."""
    model = _empty_model(config, dtype)
    return _weights(model), model_sizes(spec, model)


@dataclass(frozen=True)
class Placed:
    """Where the tensors of a checkpoint go in its model.

    `weights` is what `check_weights` gives, `wanted` the names of the tensors that the model has a place for. `linear`
    has, by the names that parameters of linear layers have in the model, the tensors that they are, as they are:
    neither joined with others nor changed in any way, and in no other place too.
    """

    weights: Weights
    wanted: frozenset[str]
    linear: Mapping[str, str]


def check_weights(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> Weights:
    """The weights of a config's model, all found in a checkpoint. UserError names one that is missing or differs."""
    return place_weights(checkpoint, config, dtype).weights


def place_weights(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> Placed:
    """Where the weights of a config's model are in a checkpoint. UserError as `check_weights`."""
    floats = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.dtype in _DTYPES}
    _check_experts(checkpoint, floats)
    tensors = {name: Unread(tensor.shape) for name, tensor in floats.items()}
    try:
        with without_load_report():
            model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **_without_values(),
            )
    except Exception as error:  # as from its converters, where tensors of experts do not fit together
        _empty_model(config, dtype)  # says so where the config alone is at fault
        raise UserError(
            f"model {checkpoint.folder}: its tensors cannot be made into those of the model ({first_line(error)}). "
            "Its files or its config.json are another model's."
        ) from error
    others = sorted({tensor.dtype for tensor in checkpoint.tensors.values()} - _DTYPES.keys())
    hint = f" (tensors of {', '.join(others)} are no plain weights and do not count)" if others else ""
    check_loading_info(str(checkpoint.folder), model, info, hint)
    became = {name: tensor.became for name, tensor in tensors.items() if tensor.became is not None}
    weights = replace(_weights(model), unexpected=tuple(sorted(info["unexpected_keys"])))
    return Placed(weights, frozenset(became), _as_stored(model, became))


def _without_values() -> dict[str, Any]:
    """What `from_pretrained` is told so that it gives values to no weight.

    It asks for accelerate then. Without that, values are made up of those that are missing, which is an error here.
    """
    return {"device_map": "meta"} if find_spec("accelerate") else {}


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of a model's linear layers, by name."""
    return {
        f"{name}.{key}": weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for key, weight in module.named_parameters(recurse=False)
    }


def _as_stored(model: Any, became: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """See `Placed.linear`: which tensors of a checkpoint became parameters, and nothing else became of them."""
    # A version counts what was done to a tensor in place.
    names = {_storage(tensor): name for name, tensor in became.items() if tensor._version == 0}
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    found = {}
    for key, weight in linear_weights(model).items():
        name = names.get(_storage(weight))
        if name is not None and uses[id(weight)] == 1:
            tensor = became[name]
            if (weight.shape, weight.stride(), weight.dtype) == (tensor.shape, tensor.stride(), tensor.dtype):
                found[key] = name
    return found


def _storage(tensor: torch.Tensor) -> int:
    """Of two tensors the same where they are views of the same memory, though it has no address (on meta)."""
    return StorageWeakRef(tensor.untyped_storage()).cdata


def check_loading_info(name: str, model: Any, info: Mapping[str, Any], hint: str = "") -> None:
    """UserError when Transformers has found a tensor missing or of another shape, and has made random weights of it."""
    missing = sorted(set(info["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", None) or ()))
    if missing:
        raise UserError(
            f"model {name}: {len(missing)} tensor(s) of the model are in none of its files: {named(missing)}{hint}. "
            "Its files or its config.json are another model's, or incomplete; weights are never made up."
        )
    for tensor, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"model {name}: {tensor} is {list(found)} in its files, and {list(wanted)} by its config.json. "
            "One of them is another model's."
        )


@contextmanager
def without_load_report() -> Iterator[None]:
    """Without Transformers' table of what it missed, on every rank: what matters of it is an error here."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A config's model on the meta device."""
    try:
        return _built(config, dtype)
    except Exception as error:  # a model's constructor raises what it likes at values that it did not expect
        raise UserError(
            f"no model can be built from the model's config.json ({type(error).__name__}: {first_line(error)}). "
            f"{_culprit(config, dtype) or 'A config that Transformers can load was wanted.'}"
        ) from error


def _built(config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def _culprit(config: Any, dtype: torch.dtype) -> str | None:
    """The value without which a model can be built of a config of which none can, in a sentence."""
    usual, found = type(config)().to_dict(), config.to_dict()
    for name in sorted(usual.keys() & found.keys()):
        if found[name] == usual[name]:
            continue
        try:
            _built(type(config)(**{**found, name: usual[name]}), dtype)
        except Exception:
            continue
        return f'With another "{name}" than {found[name]!r:.60} one can; Transformers\' own is {usual[name]!r:.60}.'
    return None


def _weights(model: Any) -> Weights:
    in_layers = {id(weight) for layer in decoder_layers(model) for weight in layer.parameters() if weight.ndim > 1}
    sizes = {True: 0, False: 0}
    weights = [*model.parameters(), *model.buffers()]
    for weight in weights:
        sizes[id(weight) in in_layers] += weight.numel() * weight.element_size()
    return Weights(sum(weight.numel() for weight in model.parameters()), sizes[True], sizes[False])


def _check_experts(checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor]) -> None:
    """UserError when experts of a layer are not numbered from 0 on, or not of one shape.

    They become one tensor in order of their numbers: a missing one would be made up for by the next, or be reported
    without its name.
    """
    experts: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if found := _EXPERT.search(name):
            experts[_EXPERT.sub("{}", name, count=1)][int(found[0])] = tensor.shape
    count: dict[str, int] = defaultdict(int)
    for pattern, shapes in experts.items():
        layer = pattern.partition("{}")[0]
        count[layer] = max(count[layer], len(shapes))
    for pattern, shapes in sorted(experts.items()):
        wanted = range(count[pattern.partition("{}")[0]])
        if lacking := [pattern.format(number) for number in wanted if number not in shapes]:
            raise UserError(
                f"model {checkpoint.folder}: {named(lacking)} is in none of its files; the others of its experts are."
            )
        usual, _ = Counter(shapes.values()).most_common(1)[0]
        for number, shape in sorted(shapes.items()):
            if shape != usual:
                raise UserError(
                    f"model {checkpoint.folder}: {pattern.format(number)} is {list(shape)}, that of the other experts "
                    f"{list(usual)}."
                )
