"""The families of models that run, and what does not run of each. A `model_type` without a row here is refused.

docs/reference/models.md's table is printed from this one (`make docs`); the code that refuses asks it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

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
_NO_PLAN = "Transformers has no plan for it"
NORM_OF_ALL_HEADS = "its queries and keys are normalised over all heads, of which a rank has some"
_LINEAR_HEADS = "its layers of linear attention are not cut by heads"
_HYBRID = "gated delta rule, in some layers gated GQA"
_FUSED_HEADS = "its queries, keys and values come from one projection, which its code cuts where all heads end"
# Families with layers whose state is no KV cache, and what these are. They are refused by name, since their configs do
# not always say so.
RECURRENT: Mapping[str, str] = MappingProxyType(
    {
        name: layers
        for layers, names in {
            "Mamba": (
                "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h",
                "zamba", "zamba2",
            ),
            "a short convolution": ("inkling_text", "inkling2_text", "inkling2_loop_text", "lfm2", "lfm2_moe", "lfm3"),
            "attention over convolved keys": ("zaya",),
            "lightning attention": ("minimax",),
            "another delta rule": ("bailing_hybrid", "glm5_next_text", "lara_mini", "qwen4_exp_text"),
            "compressed keys": ("deepseek_v4",),
            "a gated linear recurrence": ("recurrent_gemma",),
            "RWKV": ("rwkv",),
            "xLSTM": ("xlstm",),
        }.items()
        for name in names
    }
)  # fmt: skip
# Families that are another one under a name of their own, which Transformers does not know.
OTHER_NAMES: Mapping[str, str] = MappingProxyType({"kimi_k2": "deepseek_v3"})
# Sizes of layers that run the gated delta rule, in the order of `StateLayout`.
STATE_SIZES = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim",
)  # fmt: skip
# Kinds of layers in a config that have such a state.
RECURRENT_LAYERS = frozenset(("linear_attention", "mamba", "recurrent", "conv"))


@dataclass(frozen=True)
class Family:
    """What is particular about a family: all that other code asks of it. Most have the defaults.

    Attributes:
        title: the name people know it by.
        attention: how it attends, for that table.
        is_latent: multi-head latent attention; the config has the sizes of `LatentDims`.
        window_on_every_layer: a `sliding_window` in the config holds for all layers, not for those that `layer_types`
            names.
        has_fused_qkv: queries, keys and values come from one projection, `c_attn`. AutoTP keeps its K and V whole on
            every rank, but cuts the queries by the number of KV heads that it reads in the config.
        has_position_table: positions are learned, a row of a table each, and there are no more.
        has_soft_cap: its config may cap logits, by `attn_logit_softcapping`.
        window_in_mask_alone: its attention is told of no window, which Transformers puts into the mask.
        layers_drop_keywords: its layers do not hand keywords of a forward on to their attention.
        returns_router_scores: its blocks of experts return what their router found, beside their output.
        flag_of_norm_of_all_heads: what its config says true of where queries and keys are normalised by weights of all
            heads; tensor parallelism is refused then.
        has_gated_delta: layers that `layer_types` names linear_attention run the gated delta rule; the config has the
            sizes of `StateLayout`.
        has_query_gates: queries come with as wide gates from one projection, `q_proj`.
        may_have_no_rope: where the config's `rope_theta` is null, positions are not told at all.
        size_names: what its config calls sizes that others name alike.
        refused: features that do not run, with the reason.
        not_applicable: features that have no meaning for it, with the reason.
    """

    title: str
    attention: str
    is_latent: bool = False
    window_on_every_layer: bool = False
    has_fused_qkv: bool = False
    has_position_table: bool = False
    has_soft_cap: bool = False
    window_in_mask_alone: bool = False
    layers_drop_keywords: bool = False
    returns_router_scores: bool = False
    flag_of_norm_of_all_heads: str | None = None
    has_gated_delta: bool = False
    has_query_gates: bool = False
    may_have_no_rope: bool = False
    size_names: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[Feature, str] = field(default_factory=dict)
    not_applicable: Mapping[Feature, str] = field(default_factory=dict)

    def with_common_names(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config of the family in which sizes have the names that others give them as well."""
        return {**config, **{key: config[name] for key, name in self.size_names.items() if name in config}}


def _no_tp(reason: str) -> Mapping[Feature, str]:
    """For a family that no tensor parallelism can cut."""
    return dict.fromkeys(("autotp", "copied_heads", "mixed_heads", "transformers_tp"), reason)


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "GQA"),
    "qwen2": Family("Qwen2", "GQA, windows where layers have them"),
    "qwen3": Family("Qwen3", "GQA, windows where layers have them"),
    "mistral": Family("Mistral", "GQA, a window on every layer", window_on_every_layer=True),
    "mixtral": Family("Mixtral", "GQA, experts", window_on_every_layer=True),
    "qwen3_moe": Family("Qwen3-MoE", "GQA, experts", window_on_every_layer=True),
    "gemma2": Family("Gemma 2", "GQA, alternating windows, soft cap", has_soft_cap=True),
    "gemma3_text": Family("Gemma 3 (text)", "GQA, alternating windows"),
    "gpt_oss": Family(
        "gpt-oss",
        "GQA, alternating windows, sinks, experts",
        returns_router_scores=True,
        refused={"transformers_tp": _WHOLE_ATTENTION},
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
        size_names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "max_position_embeddings": "n_positions",
        },
        refused={"transformers_tp": _NO_PLAN},
        not_applicable={"mixed_heads": _ONE_KV_HEAD},
    ),
    "apertus": Family("Apertus", "GQA"),
    "arcee": Family("Arcee", "GQA"),
    "cohere": Family("Cohere (Command R)", "GQA", flag_of_norm_of_all_heads="use_qk_norm"),
    "cohere2": Family("Cohere 2 (Command R7B, A)", "GQA, alternating windows"),
    "ernie4_5": Family("ERNIE 4.5", "GQA"),
    "exaone4": Family("EXAONE 4", "GQA, alternating windows"),
    "gemma": Family("Gemma", "GQA"),
    "glm4": Family("GLM-4", "GQA"),
    "glm4_moe": Family("GLM-4-MoE (GLM-4.5)", "GQA, experts"),
    "granite": Family("Granite", "GQA"),
    "granitemoe": Family("Granite-MoE", "GQA, experts", refused={"transformers_tp": _WHOLE_ATTENTION}),
    "helium": Family("Helium", "GQA"),
    "minimax_m2": Family("MiniMax-M2", "GQA, experts", refused=_no_tp(NORM_OF_ALL_HEADS)),
    "nemotron": Family("Nemotron", "GQA", layers_drop_keywords=True),
    "olmo2": Family("OLMo 2", "GQA", refused=_no_tp(NORM_OF_ALL_HEADS)),
    "olmo3": Family("OLMo 3", "GQA, alternating windows", refused=_no_tp(NORM_OF_ALL_HEADS)),
    "olmoe": Family("OLMoE", "GQA, experts", refused=_no_tp(NORM_OF_ALL_HEADS)),
    "phi3": Family(
        "Phi-3, Phi-4",
        "GQA, a window where its config has one",
        window_on_every_layer=True,
        refused=_no_tp(_FUSED_HEADS),
    ),
    "phimoe": Family(
        "Phi-MoE",
        "GQA, a window where its config has one, experts",
        window_on_every_layer=True,
        window_in_mask_alone=True,
        refused=_no_tp(
            "AutoTP cuts the router of its experts, Transformers' plan leaves attention whole on every rank"
        ),
    ),
    "seed_oss": Family("Seed-OSS", "GQA"),
    "smollm3": Family("SmolLM3", "GQA, windows where layers have them"),
    "stablelm": Family(
        "StableLM",
        "GQA",
        layers_drop_keywords=True,
        flag_of_norm_of_all_heads="qk_layernorm",
        refused={"transformers_tp": _NO_PLAN},
    ),
    "starcoder2": Family("StarCoder2", "GQA, a window where its config has one", window_on_every_layer=True),
    "qwen3_next": Family(
        "Qwen3-Next",
        f"{_HYBRID}, experts",
        has_gated_delta=True,
        has_query_gates=True,
    ),
    "qwen3_5_text": Family("Qwen3.5 (text)", _HYBRID, has_gated_delta=True, has_query_gates=True),
    "qwen3_5_moe_text": Family(
        "Qwen3.5-MoE (text)",
        f"{_HYBRID}, experts",
        has_gated_delta=True,
        has_query_gates=True,
    ),
    "olmo_hybrid": Family(
        "OLMo Hybrid",
        "gated delta rule, in some layers GQA",
        has_gated_delta=True,
        may_have_no_rope=True,
        refused=_no_tp(NORM_OF_ALL_HEADS),
    ),
    "kimi_linear": Family(
        "Kimi Linear",
        "delta rule with a gate for each channel, in some layers MLA, experts",
        is_latent=True,
        has_gated_delta=True,
        size_names={
            "max_position_embeddings": "model_max_length",
            "num_experts_per_tok": "num_experts_per_token",
            "n_shared_experts": "num_shared_experts",
            "n_group": "num_expert_group",
            "linear_num_key_heads": "linear_num_heads",
            "linear_num_value_heads": "linear_num_heads",
            "linear_key_head_dim": "linear_head_dim",
            "linear_value_head_dim": "linear_head_dim",
        },
        refused=dict.fromkeys(("autotp", "copied_heads", "transformers_tp"), _LINEAR_HEADS),
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
