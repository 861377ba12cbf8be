"""What the engine needs to know of a model, and whether it can run it: read from its config, before weights load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpinfer.errors import UserError
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.heads import HeadPlacement
from cpinfer.refusals import refuse

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Attribute that `expand_kv_heads` leaves on a model's config: how many KV heads there were before copies were made.
NUM_KV_HEADS_BEFORE_EXPANSION = "cpinfer_num_key_value_heads"

# fmt: off
_RECURRENT_FAMILIES = frozenset((
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "mamba", "mamba2",
    "minimax", "nemotron_h", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
))
# fmt: on
_MULTIMODAL_KEYS = ("vision_config", "audio_config", "vision_tower", "image_token_id", "audio_token_id")
_FULL_ATTENTION = "full_attention"


@dataclass(frozen=True)
class ModelSpec:
    """Shape and limits of a causal LM.

    `num_kv_heads` counts the model's own heads, not the copies made for tensor parallelism. `max_positions` bounds
    prompt and answer together.
    """

    family: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelSpec:
        """Read a Hugging Face config (as plain data). UnsupportedError for a model that cannot run here."""
        _refuse_unsupported(config)
        num_q_heads = config["num_attention_heads"]
        num_kv_heads = config.get(NUM_KV_HEADS_BEFORE_EXPANSION) or config.get("num_key_value_heads") or num_q_heads
        eos = (generation_config or {}).get("eos_token_id")
        eos = config.get("eos_token_id") if eos is None else eos
        return cls(
            family=config["model_type"],
            num_layers=config["num_hidden_layers"],
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_q_heads,
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )

    def heads(self, tp_size: int) -> HeadPlacement:
        return HeadPlacement(self.num_q_heads, self.num_kv_heads, tp_size)

    def kv_layout(self, tp_size: int) -> KVLayout:
        """What one rank caches per token and layer."""
        return KVLayout(self.heads(tp_size).kv_heads_per_rank, self.head_dim, self.head_dim)

    @property
    def pairs_per_token(self) -> int:
        """Query-key pairs that cost as much as one token's linear layers: parameters of a layer / (2 * H * D)."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_q_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return max(1, (attention + mlp) // (2 * self.num_q_heads * self.head_dim))


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    family = config.get("model_type")
    if family is None:
        raise UserError('the model\'s config.json has no "model_type"; a Hugging Face causal LM was wanted.')
    found = f'model_type "{family}"'
    layer_types = set(config.get("layer_types") or ())
    if any(config.get(key) is not None for key in _MULTIMODAL_KEYS):
        raise refuse("multimodal", found)
    if family in _RECURRENT_FAMILIES or layer_types & {"linear_attention", "mamba", "recurrent", "conv"}:
        raise refuse("recurrent", found)
    if config.get("is_encoder_decoder"):
        raise refuse("encoder_decoder", found)
    if config.get("quantization_config") is not None:
        raise refuse("quantized_weights", found)
    if family not in SUPPORTED_FAMILIES:
        raise refuse("family", found)
    # Mistral windows every layer when it has a window; the Qwens list per layer which ones do.
    windowed = bool(layer_types - {_FULL_ATTENTION}) if layer_types else config.get("sliding_window") is not None
    if windowed or (family == "mistral" and config.get("sliding_window") is not None):
        raise refuse("sliding_window", found)
    # Ranks and steps see different longest positions, so they would rotate one sequence by different angles. (`dynamic`
    # changes beyond max_positions alone, where no prompt can come.)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "longrope":
        raise refuse("length_dependent_rope", f'{found} with rope_type "longrope"')
