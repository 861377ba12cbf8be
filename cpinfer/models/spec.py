"""What the engine needs to know of a model, and whether it can run it: read from its config, before weights load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cpinfer.layout.capacity import KVLayout, StateLayout
from cpinfer.layout.heads import HeadPlacement
from cpinfer.models.config_values import (
    check_number,
    check_relations,
    check_token_ids,
    check_values,
    wrong_value,
)
from cpinfer.models.families import FAMILIES, STATE_SIZES, Family
from cpinfer.models.positions import Positions
from cpinfer.models.refused_models import refuse_unsupported, why_no_tp

# Attribute that `expand_kv_heads` leaves on a model's config: how many KV heads there were before copies were made.
NUM_KV_HEADS_BEFORE_EXPANSION = "cpinfer_num_key_value_heads"


@dataclass(frozen=True)
class LatentDims:
    """Sizes of multi-head latent attention: a token caches `kv_lora_rank + qk_rope_head_dim` values for all heads."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int

    @property
    def max_absorbed_queries(self) -> int | None:
        """Queries up to which attending to a latent as it is costs less than expanding it for them; None is always.

        Multiplications per head: `2 C + R` for each query, against `C (N + V)` once and `N + R + V` for each query.
        """
        expanded = self.qk_nope_head_dim + self.v_head_dim
        more_per_query = 2 * self.kv_lora_rank - expanded
        return self.kv_lora_rank * expanded // more_per_query if more_per_query > 0 else None


@dataclass(frozen=True)
class ModelSpec:
    """Shape and limits of a causal LM.

    `num_kv_heads` counts the model's own heads, not the copies made for tensor parallelism; a latent counts as one.
    `head_dim` is that of queries and keys. `mlp_size` is the width of the MLP that a token passes, all its experts
    together. `windows`: for each layer how many of the last tokens a query sees, its own included, None for all.
    `latent` is None where K and V are cached as they are. `max_positions` bounds prompt and answer together,
    `positions` says how many there could be. `experts_per_token`: those that a router chooses; None without a mixture.
    `norms_all_heads`: weights for all heads normalise queries and keys. `has_soft_cap`: logits of attention are capped.
    `linear_layers` are those of linear attention, which cache no K and V but keep `states` of sequences; None where
    there are no such layers.
    """

    family: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    mlp_size: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    windows: tuple[int | None, ...]
    positions: Positions
    latent: LatentDims | None = None
    experts_per_token: int | None = None
    norms_all_heads: bool = False
    has_soft_cap: bool = False
    linear_layers: tuple[int, ...] = ()
    states: StateLayout | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelSpec:
        """Read a Hugging Face config (as plain data).

        UnsupportedError for a model that cannot run here, UserError for values that no model has.
        """
        refuse_unsupported(config)
        check_values(config, whole=True)
        config = FAMILIES[config["model_type"]].with_common_names(config)
        latent = _latent_dims(config)
        check_relations(config)
        linear_layers = _linear_layers(config)
        num_q_heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // num_q_heads
        positions = Positions.of(config, has_table=FAMILIES[config["model_type"]].has_position_table)
        generation_config = generation_config or {}
        check_token_ids(generation_config, "eos_token_id", "generation_config.json", config["vocab_size"])
        eos = generation_config.get("eos_token_id")
        if eos is None:
            check_token_ids(config, "eos_token_id", vocab_size=config["vocab_size"])
            eos = config.get("eos_token_id")
        return cls(
            family=config["model_type"],
            num_layers=config["num_hidden_layers"],
            num_q_heads=num_q_heads,
            num_kv_heads=1 if latent else _num_kv_heads(config, num_q_heads),
            head_dim=latent.qk_nope_head_dim + latent.qk_rope_head_dim if latent else head_dim,
            hidden_size=config["hidden_size"],
            mlp_size=_mlp_size(config),
            vocab_size=config["vocab_size"],
            max_positions=positions.made_for,
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            windows=_windows(config),
            positions=positions,
            latent=latent,
            experts_per_token=config.get("num_experts_per_tok"),
            norms_all_heads=bool(config.get(FAMILIES[config["model_type"]].flag_of_norm_of_all_heads or "")),
            has_soft_cap=_has_soft_cap(config),
            linear_layers=linear_layers,
            states=_states(config, len(linear_layers)) if linear_layers else None,
        )

    def with_max_model_len(self, max_model_len: int | None) -> ModelSpec:
        """With so many positions, None for as many as it was made for. UserError where it cannot have them."""
        return replace(self, max_positions=self.positions.most(max_model_len))

    @property
    def traits(self) -> Family:
        """What is particular about its family."""
        return FAMILIES[self.family]

    @property
    def why_no_tp(self) -> str | None:
        """Why tensor parallelism cannot cut it, whoever does; None where that can be done."""
        return why_no_tp(self.family, norms_all_heads=self.norms_all_heads)

    @property
    def num_kv_layers(self) -> int:
        """Layers that cache K and V."""
        return self.num_layers - len(self.linear_layers)

    def heads(self, tp_size: int) -> HeadPlacement:
        return HeadPlacement(self.num_q_heads, self.num_kv_heads, tp_size)

    def kv_layout(self, num_heads: int) -> KVLayout:
        """What a rank that stores `num_heads` KV heads caches per token and layer."""
        if self.latent is None:
            return KVLayout(num_heads, self.head_dim, self.head_dim)
        rank = self.latent.kv_lora_rank
        return KVLayout(num_heads, rank + self.latent.qk_rope_head_dim, rank, v_is_prefix_of_k=True)

    @property
    def widest_window(self) -> int | None:
        """Tokens, the newest included, that some layer sees; None when one sees all."""
        return None if None in self.windows else max(w for w in self.windows if w is not None)

    @property
    def pairs_per_token(self) -> int:
        """Query-key pairs that cost as much as one token's linear layers: parameters of a layer / (2 * H * D).

        Of all layers, those without attention to keys included, for each layer with it.
        """
        attention = self.hidden_size * self.head_dim * 2 * (self.num_q_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.mlp_size
        per_layer = (attention + mlp) // (2 * self.num_q_heads * self.head_dim)
        return max(1, per_layer * self.num_layers // self.num_kv_layers)


def _num_kv_heads(config: Mapping[str, Any], num_q_heads: int) -> int:
    if "multi_query" in config:
        return 1 if config["multi_query"] else num_q_heads
    return config.get(NUM_KV_HEADS_BEFORE_EXPANSION) or config.get("num_key_value_heads") or num_q_heads


def _latent_dims(config: Mapping[str, Any]) -> LatentDims | None:
    if not FAMILIES[config["model_type"]].is_latent:
        return None
    for name in LatentDims.__dataclass_fields__:
        check_number(config, name, 1, 2**20)
    return LatentDims(**{name: config[name] for name in LatentDims.__dataclass_fields__})


def _mlp_size(config: Mapping[str, Any]) -> int:
    experts = config.get("num_experts_per_tok")
    if experts is None:
        return config.get("intermediate_size") or 4 * config["hidden_size"]
    one = config.get("moe_intermediate_size")
    if one is None:
        check_number(config, "intermediate_size", 1, 2**22)
        one = config["intermediate_size"]
    size: int = one * (experts + (config.get("n_shared_experts") or 0))
    return size + (config.get("shared_expert_intermediate_size") or 0)


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """For each layer its window."""
    window, num_layers = config.get("sliding_window"), config["num_hidden_layers"]
    if FAMILIES[config["model_type"]].window_on_every_layer:
        return (window,) * num_layers
    layer_types = config.get("layer_types") or ["full_attention"] * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _has_soft_cap(config: Mapping[str, Any]) -> bool:
    return FAMILIES[config["model_type"]].has_soft_cap and config.get("attn_logit_softcapping") is not None


def _linear_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers of linear attention. UserError where there are no others, which alone have a KV cache."""
    if not FAMILIES[config["model_type"]].has_gated_delta:
        return ()
    layer_types = config.get("layer_types") or ()
    linear = tuple(i for i, kind in enumerate(layer_types) if kind == "linear_attention")
    if linear and len(linear) == len(layer_types):
        raise wrong_value(config, "layer_types", "one with at least one full_attention")
    return linear


def _states(config: Mapping[str, Any], num_layers: int) -> StateLayout:
    for name in STATE_SIZES:
        check_number(config, name, 1, 2**14)
    num_k_heads, num_v_heads, k_dim, v_dim, width = (config[name] for name in STATE_SIZES)
    if num_v_heads % num_k_heads:
        raise wrong_value(config, "linear_num_value_heads", f"a multiple of linear_num_key_heads ({num_k_heads})")
    return StateLayout(num_layers, num_k_heads, num_v_heads, k_dim, v_dim, width)
