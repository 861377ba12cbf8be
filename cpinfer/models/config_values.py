"""Whether the values of a model's config can be those of a model: every number a number, none beyond all reason.

Config files are input: one zero or text in them would otherwise show as a traceback far away, or as a loop without end.
The bounds are far above any model's; what they keep out would hang or exhaust a machine before it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpinfer.errors import UserError

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
    "first_k_dense_replace": _Whole(1024, least=0),
    "n_group": _Whole(2**16),
    "topk_group": _Whole(2**16),
    "kv_lora_rank": _Whole(2**20),
    "q_lora_rank": _Whole(2**20),
    "qk_rope_head_dim": _Whole(2**14),
    "qk_nope_head_dim": _Whole(2**14),
    "v_head_dim": _Whole(2**14),
    "sliding_window": _Whole(_MAX_INT32),
    "max_window_layers": _Whole(_MAX_INT32, least=0),
    "num_labels": _Whole(2**16),  # Transformers makes a table with a row for each
}
# What GPT-BigCode calls the sizes that all others name alike.
OLD_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_values(config: Mapping[str, Any], *, whole: bool) -> None:
    """UserError for the first value that no model has. `whole`: nothing is left to a class's defaults."""
    for key, wanted in _NUMBERS.items():
        for name in (key, OLD_NAMES.get(key, key)):
            if name in config:
                check_number(config, name, wanted.least, wanted.most, optional=wanted.optional)
        if whole and not wanted.optional and key not in config and OLD_NAMES.get(key) not in config:
            raise UserError(f'the model\'s config.json has no "{key}"; a whole number was wanted.')
    check_token_ids(config, "eos_token_id")
    if not isinstance(config.get("multi_query", True), bool):
        raise _wrong(config, "multi_query", "true or false")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise _wrong(config, key, "an object")
    layer_types = config.get("layer_types")
    if layer_types is not None and not _all_texts(layer_types):
        raise _wrong(config, "layer_types", "a list of texts")


def check_relations(config: Mapping[str, Any]) -> None:
    """UserError when numbers of a whole config, each of them possible, cannot be together. Knows no old names."""
    num_heads, num_layers, hidden_size = (
        config[key] for key in ("num_attention_heads", "num_hidden_layers", "hidden_size")
    )
    if not config.get("head_dim") and hidden_size % num_heads:
        raise _wrong(config, "hidden_size", f"a multiple of num_attention_heads ({num_heads})")
    num_kv_heads = config.get("num_key_value_heads")
    if num_kv_heads and num_heads % num_kv_heads:
        raise _wrong(config, "num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    num_experts = next((config[key] for key in _EXPERT_COUNTS if config.get(key)), None)
    if num_experts and (config.get("num_experts_per_tok") or 1) > num_experts:
        raise _wrong(config, "num_experts_per_tok", f"at most the number of experts ({num_experts})")
    layer_types = config.get("layer_types")
    if layer_types and len(layer_types) != num_layers:
        raise UserError(
            f'the model\'s config.json has {len(layer_types)} "layer_types" for {num_layers} layers '
            '("num_hidden_layers"); one for each was wanted.'
        )
    if layer_types and "sliding_attention" in layer_types and not config.get("sliding_window"):
        raise _wrong(config, "sliding_window", 'a whole number, for "layer_types" has sliding_attention')


def check_number(config: Mapping[str, Any], name: str, least: int, most: int, *, optional: bool = False) -> None:
    """UserError when `config[name]`, absent being null, is no whole number in `[least, most]`."""
    value = config.get(name)
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _wrong(config, name, f"a whole number from {least} to {most}")


def check_token_ids(config: Mapping[str, Any], name: str, file: str = "config.json") -> None:
    """UserError when `config[name]` is neither null, nor a token id, nor a list of these."""
    value = config.get(name)
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= _MAX_INT32 for i in ids):
        raise _wrong(config, name, "a token id, a list of them, or null", file)


def _all_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def _wrong(config: Mapping[str, Any], name: str, wanted: str, file: str = "config.json") -> UserError:
    return UserError(f'the model\'s {file}: "{name}" is {_shown(config.get(name))}; {wanted} was wanted.')


def _shown(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
