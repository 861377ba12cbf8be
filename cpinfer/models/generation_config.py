"""What a model's generation_config says of sampling, in the keys of `SamplingParams`; for who asks for it.

Only what it says counts: where it is silent Transformers has defaults of its own (a top_k of 50), which are not the
model's. What would choose other tokens and is unknown here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpinfer.errors import UserError, quoted

_SAME = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens")
_ONLY_SAMPLED = ("top_k", "top_p", "min_p")
# What changes which tokens are chosen, or how many answers there are, and the value that asks for nothing.
OTHER_KEYS: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "max_time": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "token_healing": False,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "diversity_penalty": 0.0,
    "watermarking_config": None,
}


def sampling_keys(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `SamplingParams` that a generation_config, as plain data, says.

    >>> sampling_keys({"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": 7})
    {'temperature': 0.6, 'top_k': 20}
    >>> sampling_keys({"do_sample": False, "top_k": 20, "repetition_penalty": 1.05})
    {'repetition_penalty': 1.05, 'temperature': 0.0}
    """
    for key, neutral in OTHER_KEYS.items():
        value = generation_config.get(key)
        if value not in (None, neutral, []):
            raise UserError(
                f'the model\'s generation_config has "{key}": {quoted(value)}, which cpinfer does not know. Leave '
                'generation_config at "ignore" and say the rest under sampling, or take the key out of the file.'
            )
    keys = {key: generation_config[key] for key in _SAME if generation_config.get(key) is not None}
    if generation_config.get("stop_strings"):
        keys["stop"] = generation_config["stop_strings"]
    if generation_config.get("do_sample") is False:
        keys = {key: value for key, value in keys.items() if key not in _ONLY_SAMPLED} | {"temperature": 0.0}
    return keys
