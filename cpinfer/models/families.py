"""The families of models that run, and what does not run of each. A `model_type` without a row here is refused.

The README's table is printed from this one (`make docs`); the code that refuses asks it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Feature = Literal["pcp_dcp", "autotp", "copied_heads", "mixed_heads", "transformers_tp"]

# What a family may be able to do beside running on one rank, in the words of the table's head.
FEATURES: dict[Feature, str] = {
    "pcp_dcp": "pcp and dcp, homes, chunks, prefixes",
    "autotp": "tp by AutoTP",
    "copied_heads": "tp above KV heads",
    "mixed_heads": "mixed KV heads",
    "transformers_tp": "tp by Transformers",
}

_ONE_KV_HEAD = "one KV head: there is nothing to mix"
_WHOLE_ATTENTION = "Transformers' plan for it leaves attention whole on every rank"


# Families with layers whose state is no KV cache. They are refused by name, since their configs do not always say so.
# fmt: off
RECURRENT = frozenset((
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "mamba", "mamba2",
    "minimax", "nemotron_h", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
))
# fmt: on
# Kinds of layers in a config that have such a state.
RECURRENT_LAYERS = frozenset(("linear_attention", "mamba", "recurrent", "conv"))


@dataclass(frozen=True)
class Family:
    """What is particular about a family: all that other code asks of it. Most have the defaults.

    Attributes:
        title: the name people know it by.
        attention: how it attends, for the README's table.
        is_latent: multi-head latent attention; the config has the sizes of `LatentDims`.
        window_on_every_layer: a `sliding_window` in the config holds for all layers, not for those that `layer_types`
            names.
        has_fused_qkv: queries, keys and values come from one projection, `c_attn`. AutoTP keeps its K and V whole on
            every rank, but cuts the queries by the number of KV heads that it reads in the config.
        has_position_table: positions are learned, a row of a table each, and there are no more.
        refused: features that do not run, with the reason.
        not_applicable: features that have no meaning for it, with the reason.
    """

    title: str
    attention: str
    is_latent: bool = False
    window_on_every_layer: bool = False
    has_fused_qkv: bool = False
    has_position_table: bool = False
    refused: Mapping[Feature, str] = field(default_factory=dict)
    not_applicable: Mapping[Feature, str] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "GQA"),
    "qwen2": Family("Qwen2", "GQA, windows where layers have them"),
    "qwen3": Family("Qwen3", "GQA, windows where layers have them"),
    "mistral": Family("Mistral", "GQA, a window on every layer", window_on_every_layer=True),
    "mixtral": Family("Mixtral", "GQA, experts", window_on_every_layer=True),
    "qwen3_moe": Family("Qwen3-MoE", "GQA, experts", window_on_every_layer=True),
    "gemma2": Family("Gemma 2", "GQA, alternating windows, soft cap"),
    "gemma3_text": Family("Gemma 3 (text)", "GQA, alternating windows"),
    "gpt_oss": Family(
        "gpt-oss", "GQA, alternating windows, sinks, experts", refused={"transformers_tp": _WHOLE_ATTENTION}
    ),
    "deepseek_v2": Family("DeepSeek-V2", "MLA, experts", is_latent=True, not_applicable={"mixed_heads": _ONE_KV_HEAD}),
    "deepseek_v3": Family(
        "DeepSeek-V3",
        "MLA, experts",
        is_latent=True,
        refused={"transformers_tp": _WHOLE_ATTENTION},
        not_applicable={"mixed_heads": _ONE_KV_HEAD},
    ),
    "gpt_bigcode": Family(
        "GPT-BigCode (StarCoder)",
        "MQA",
        has_fused_qkv=True,
        has_position_table=True,
        refused={"transformers_tp": "Transformers has no plan for it"},
        not_applicable={"mixed_heads": _ONE_KV_HEAD},
    ),
}


def family_table() -> str:
    """Families against features, as a Markdown table with notes."""
    notes: list[str] = []

    def mark(reason: str) -> str:
        if reason not in notes:
            notes.append(reason)
        return f"[{notes.index(reason) + 1}]"

    def cell(family: Family, feature: Feature) -> str:
        if feature in family.refused:
            return f"refused {mark(family.refused[feature])}"
        if feature in family.not_applicable:
            return f"- {mark(family.not_applicable[feature])}"
        return "works"

    rows = [
        f"| {family.title} (`{name}`) | {family.attention} | "
        + " | ".join(cell(family, feature) for feature in FEATURES)
        + " |"
        for name, family in FAMILIES.items()
    ]
    head = ["| family | attention | " + " | ".join(FEATURES.values()) + " |", "|---|---" + "|---" * len(FEATURES) + "|"]
    return "\n".join([*head, *rows, "", *(f"[{i}] {note}.  " for i, note in enumerate(notes, start=1))])
