"""Which models, and which ways to cut them, are refused by what a config.json says. Without torch, to be quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpinfer.config import Provider
from cpinfer.errors import UserError
from cpinfer.models.families import FAMILIES, NORM_OF_ALL_HEADS, OTHER_NAMES, RECURRENT, RECURRENT_LAYERS
from cpinfer.models.positions import rope_types
from cpinfer.refusals import refuse

_MULTIMODAL_KEYS = ("vision_config", "audio_config", "vision_tower", "image_token_id", "audio_token_id")


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """UnsupportedError when a config, whole or as its file has it, names a model that cannot run here."""
    family = config.get("model_type")
    if not isinstance(family, str):
        raise UserError('the model\'s config.json has no "model_type"; a Hugging Face causal LM was wanted.')
    found = f'model_type "{family}"'
    layer_types = config.get("layer_types")
    layer_types = {x for x in layer_types if isinstance(x, str)} if isinstance(layer_types, (list, tuple)) else set()
    if any(config.get(key) is not None for key in _MULTIMODAL_KEYS):
        raise refuse("multimodal", found)
    runs = {"linear_attention"} if family in FAMILIES and FAMILIES[family].has_gated_delta else set()
    if family in RECURRENT:
        raise refuse("recurrent", f"{found} (with layers of {RECURRENT[family]})")
    if states := layer_types & RECURRENT_LAYERS - runs:
        raise refuse("recurrent", f"{found} with layers of {', '.join(sorted(states))}")
    if config.get("is_encoder_decoder") is True:
        raise refuse("encoder_decoder", found)
    if family in OTHER_NAMES:
        raise refuse("other_name", f'{found}, which is "{OTHER_NAMES[family]}",')
    if family not in FAMILIES and config.get("auto_map"):
        raise refuse("remote_code", found)
    if family not in FAMILIES:
        raise refuse("family", found)
    if config.get("use_bidirectional_attention"):
        raise refuse("bidirectional", found)
    if unknown := layer_types - {"full_attention", "sliding_attention"} - runs:
        raise refuse("layer_type", f"{found} with layers of {', '.join(sorted(unknown))}")
    # Ranks and steps see different longest positions, so they would rotate one sequence by different angles. (`dynamic`
    # does so beyond max_position_embeddings, where `Positions` ends.)
    if "longrope" in rope_types(config):
        raise refuse("length_dependent_rope", f'{found} with rope_type "longrope"')


def why_no_tp(family: str, *, norms_all_heads: bool) -> str | None:
    """Why tensor parallelism cannot cut a family's models, whoever does; None where that can be done.

    `norms_all_heads` as `ModelSpec` has it.
    """
    return NORM_OF_ALL_HEADS if norms_all_heads else FAMILIES[family].refused.get("autotp")


def tensor_parallel_errors(
    family: str, num_kv_heads: int, why_not: str | None, tp_size: int, provider: Provider
) -> list[str]:
    """Sentences that say why a model cannot be cut over tp ranks by `provider`; empty when it can.

    `why_not`: what `why_no_tp` says of it.
    """
    if tp_size <= 1:
        return []
    found, traits = f'model_type "{family}" with tp={tp_size}', FAMILIES[family]
    if traits.has_fused_qkv and num_kv_heads > 1:
        return [str(refuse("fused_heads", found))]
    if why_not is not None:
        return [str(refuse("family_tp", f"{found} ({why_not})"))]
    if provider == "autotp":
        return []
    of_plan = traits.refused.get("transformers_tp")
    if of_plan is not None:
        return [str(refuse("transformers_tp", f"{found} ({of_plan})"))]
    if not traits.is_latent and tp_size > num_kv_heads:
        return [str(refuse("transformers_tp_copies", f"{found} over {num_kv_heads} KV heads"))]
    return []
