"""Whether the values of a model's config can be those of a model: every number a number, none beyond all reason.

Config files are input: one zero or text in them would otherwise show as a traceback far away, or as a loop without end.
The bounds are far above any model's; what they keep out would hang or exhaust a machine before it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cpinfer.errors import UserError
from cpinfer.models.families import FAMILIES, Family

_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class _Whole:
    """A whole number in `[least, most]`, that may be absent or null where it is `optional`."""

    most: int
    least: int = 1
    optional: bool = True


_NUMBERS: dict[str, _Whole] = {
    "num_hidden_layers": _Whole(1024, optional=False),
    "num_attention_heads": _Whole(2**14, optional=False),
    "hidden_size": _Whole(2**20, optional=False),
    "vocab_size": _Whole(2**26, optional=False),
    "max_position_embeddings": _Whole(_MAX_INT32, optional=False),
    "num_key_value_heads": _Whole(2**14),
    "head_dim": _Whole(2**14),
    "intermediate_size": _Whole(2**22),
    "moe_intermediate_size": _Whole(2**22),
    "num_experts": _Whole(2**16),
    "num_local_experts": _Whole(2**16),
    "n_routed_experts": _Whole(2**16),
    "num_experts_per_tok": _Whole(2**16),
    "n_shared_experts": _Whole(2**16, least=0),
    "shared_expert_intermediate_size": _Whole(2**22),
    "first_k_dense_replace": _Whole(1024, least=0),
    "n_group": _Whole(2**16),
    "topk_group": _Whole(2**16),
    "kv_lora_rank": _Whole(2**20),
    "q_lora_rank": _Whole(2**20),
    "qk_rope_head_dim": _Whole(2**14),
    "qk_nope_head_dim": _Whole(2**14),
    "v_head_dim": _Whole(2**14),
    "rotary_dim": _Whole(2**14),
    "linear_num_key_heads": _Whole(2**14),
    "linear_num_value_heads": _Whole(2**14),
    "linear_key_head_dim": _Whole(2**14),
    "linear_value_head_dim": _Whole(2**14),
    "linear_conv_kernel_dim": _Whole(2**10),
    "original_max_position_embeddings": _Whole(_MAX_INT32),
    "sliding_window": _Whole(_MAX_INT32),
    "max_window_layers": _Whole(_MAX_INT32, least=0),
    "num_labels": _Whole(2**16),  # Transformers makes a table with a row for each
}
# What Transformers takes as it is; fields of one family it checks itself, and names them.
_FLAGS = (
    "is_encoder_decoder", "multi_query", "output_attentions", "output_hidden_states", "return_dict",
    "tie_word_embeddings", "use_cache",
)  # fmt: skip
# Numbers above 0 by which a model multiplies or divides, and what its norms add.
_FACTORS = (
    "attention_multiplier", "embedding_multiplier", "layer_norm_eps", "logit_scale", "logits_scaling",
    "residual_multiplier",
)  # fmt: skip
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_ROPE_SETS = ("full_attention", "sliding_attention")
# Numbers of RoPE: those that it cannot be without once they are named, those that may be null, those that may be 0.
_ROPE_NEEDED = (
    "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "partial_rotary_factor",
)  # fmt: skip
_ROPE_POSITIVE = ("attention_factor", "beta_fast", "beta_slow", "rope_local_base_freq")
_ROPE_ANY = ("mscale", "mscale_all_dim")
_ROPE_STRETCH = ("factor", "original_max_position_embeddings")  # whose product is a number of positions
_ROPE_OUTSIDE = ("rope_theta", "partial_rotary_factor", "rope_local_base_freq")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def is_real(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, whole or not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _all_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


# What is wanted, how it is told, of which fields of a generation_config.json: those of sampling, and those of which
# Transformers complains without a name.
_GENERATION: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("true or false", lambda value: isinstance(value, bool), ("do_sample", "use_cache")),
    ("a number", is_real, ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")),
    (
        "a whole number",
        _is_whole,
        (
            "top_k", "max_length", "min_length", "max_new_tokens", "min_new_tokens", "num_beams",
            "no_repeat_ngram_size", "bos_token_id", "pad_token_id",
        ),
    ),
    ("a text or a list of texts", lambda value: isinstance(value, str) or _all_texts(value), ("stop_strings",)),
    (
        "a list of token ids",
        lambda value: isinstance(value, list) and all(map(_is_whole, value)),
        ("suppress_tokens", "begin_suppress_tokens"),
    ),
    ("an object", lambda value: isinstance(value, Mapping), ("watermarking_config",)),
)  # fmt: skip


def check_values(config: Mapping[str, Any], *, whole: bool) -> None:
    """UserError for the first value that no model has. `whole`: nothing is left to a class's defaults."""
    family = _family(config)
    for key, wanted in _NUMBERS.items():
        found = [name for name in dict.fromkeys((key, family.size_names.get(key, key))) if name in config]
        for name in found:
            check_number(config, name, wanted.least, wanted.most, optional=wanted.optional)
        if whole and not wanted.optional and not found:
            raise UserError(f'the model\'s config.json has no "{key}"; a whole number was wanted.')
    check_token_ids(config, "eos_token_id")
    for key in _FLAGS:
        if not isinstance(config.get(key, True), bool) and (config[key] is not None or key == "multi_query"):
            raise wrong_value(config, key, "true or false")
    for key in _FACTORS:
        if key in config and not (is_real(config[key]) and config[key] > 0):
            raise wrong_value(config, key, "a number above 0")
    for rope in _rope_sets(config):
        _check_rope(rope, may_be_none=family.may_have_no_rope)
    layer_types = config.get("layer_types")
    if layer_types is not None and not _all_texts(layer_types):
        raise wrong_value(config, "layer_types", "a list of texts")


def check_file_values(config: Mapping[str, Any]) -> None:
    """UserError for the first value of a config.json that no model has; what is absent has its class's default."""
    check_values(config, whole=False)
    for key in _ACTIVATIONS:
        value = config.get(key)
        if value is not None and not (isinstance(value, str) and value in ACT2FN):
            raise wrong_value(config, key, "the name of an activation that Transformers has")
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and not (isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)):
            raise wrong_value(config, key, "the name of a dtype of torch")
    labels = config.get("id2label")
    if labels is not None and not (isinstance(labels, Mapping) and all(str(x).isdecimal() for x in labels)):
        raise wrong_value(config, "id2label", "an object from numbers to names")


def check_generation_values(config: Mapping[str, Any]) -> None:
    """UserError for the first value of a generation_config.json that none has; null is as good as absent."""
    for wanted, is_right, names in _GENERATION:
        for name in names:
            if config.get(name) is not None and not is_right(config[name]):
                raise wrong_value(config, name, wanted, "generation_config.json")


def check_relations(config: Mapping[str, Any]) -> None:
    """UserError when numbers of a whole config, each of them possible, cannot be together. Knows no old names."""
    num_heads, num_layers, hidden_size = (
        config[key] for key in ("num_attention_heads", "num_hidden_layers", "hidden_size")
    )
    if not config.get("head_dim") and hidden_size % num_heads:
        raise wrong_value(config, "hidden_size", f"a multiple of num_attention_heads ({num_heads})")
    num_kv_heads = config.get("num_key_value_heads")
    if num_kv_heads and num_heads % num_kv_heads:
        raise wrong_value(config, "num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    num_experts = next((config[key] for key in _EXPERT_COUNTS if config.get(key)), None)
    if num_experts and (config.get("num_experts_per_tok") or 1) > num_experts:
        raise wrong_value(config, "num_experts_per_tok", f"at most the number of experts ({num_experts})")
    layer_types = config.get("layer_types")
    if layer_types and len(layer_types) != num_layers:
        raise UserError(
            f'the model\'s config.json has {len(layer_types)} "layer_types" for {num_layers} layers '
            '("num_hidden_layers"); one for each was wanted.'
        )
    if layer_types and "sliding_attention" in layer_types and not config.get("sliding_window"):
        raise wrong_value(config, "sliding_window", 'a whole number, for "layer_types" has sliding_attention')


def _rope_sets(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a config says of RoPE: in keys of its own, and in one set or one for each kind of layer."""
    yield {key: config[key] for key in _ROPE_OUTSIDE if config.get(key) is not None}
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, Mapping | None):
            raise wrong_value(config, key, "an object")
        if rope:
            yield rope
            for kind in _ROPE_SETS:
                if not isinstance(rope.get(kind), Mapping | None):
                    raise wrong_value(rope, kind, f'an object, as the RoPE of such layers in "{key}",')
                yield rope.get(kind) or {}


def _family(config: Mapping[str, Any]) -> Family:
    """What is particular about a config's family; nothing of one that is not in the table."""
    name = config.get("model_type")
    return FAMILIES.get(name, Family("", "")) if isinstance(name, str) else Family("", "")


def _check_rope(rope: Mapping[str, Any], *, may_be_none: bool) -> None:
    kinds = sorted({"default", *ROPE_INIT_FUNCTIONS})
    for name in ("rope_type", "type"):
        if name in rope and not (isinstance(rope[name], str) and rope[name] in kinds):
            raise wrong_value(rope, name, f"a kind of RoPE ({', '.join(kinds)})")
    for name in (*_ROPE_NEEDED, *_ROPE_POSITIVE, *_ROPE_ANY):
        value = rope.get(name)
        if name not in rope or (value is None and (name not in _ROPE_NEEDED or may_be_none)):
            continue
        if not is_real(value) or (value <= 0 and name not in _ROPE_ANY):
            raise wrong_value(rope, name, "a number" if name in _ROPE_ANY else "a number above 0")
        if value > 1 and name == "partial_rotary_factor":
            raise wrong_value(rope, name, "a number up to 1")
        if value > _MAX_INT32 and name in _ROPE_STRETCH:
            raise wrong_value(rope, name, f"a number up to {_MAX_INT32}")


def check_number(config: Mapping[str, Any], name: str, least: int, most: int, *, optional: bool = False) -> None:
    """UserError when `config[name]`, absent being null, is no whole number in `[least, most]`."""
    value = config.get(name)
    if value is None and optional:
        return
    if not _is_whole(value) or not least <= value <= most:
        raise wrong_value(config, name, f"a whole number from {least} to {most}")


def check_token_ids(
    config: Mapping[str, Any], name: str, file: str = "config.json", vocab_size: int | None = None
) -> None:
    """UserError when `config[name]` is neither null, nor a token id (below `vocab_size`), nor a list of these."""
    value = config.get(name)
    ids: Sequence[Any] = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    if not all(_is_whole(i) and 0 <= i <= _MAX_INT32 for i in ids):
        raise wrong_value(config, name, "a token id, a list of them, or null", file)
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        raise wrong_value(config, name, f"ids below the model's vocab_size ({vocab_size}) alone", file)


def wrong_value(config: Mapping[str, Any], name: str, wanted: str, file: str = "config.json") -> UserError:
    """The error to raise for `config[name]`, which is not what was `wanted`."""
    return UserError(f'the model\'s {file}: "{name}" is {_shown(config.get(name))}; {wanted} was wanted.')


def _shown(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
