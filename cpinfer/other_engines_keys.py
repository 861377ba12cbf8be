"""Keys and values of other engines' configs, which are no typing errors: refused by name, or passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpinfer.errors import UserError
from cpinfer.refusals import refuse

# With the row of the table of refusals that says why.
REFUSED_KEYS = {
    "speculative_config": "speculative_decoding",
    "speculative_model": "speculative_decoding",
    "num_speculative_tokens": "speculative_decoding",
    "pipeline_parallel": "pipeline_parallel",
    "pipeline_parallel_size": "pipeline_parallel",
    "limit_mm_per_prompt": "multimodal",
    "quantization": "quantized_weights",
}
# Values of keys that both know, likewise.
REFUSED_VALUES = {
    ("backend", value): "flashinfer_family" for value in ("trtllm", "trtllm-gen", "cudnn", "cutlass", "cute-dsl")
}
# What others call a key of ours, or keep at the top of their configs: the nearest by its letters would be another key.
NAMES_HERE = {
    **dict.fromkeys(("tp", "tp_size", "tensor_parallel_size"), "tensor_parallel.tp_size"),
    **dict.fromkeys(("cp_size", "context_parallel_size", "pcp", "pcp_size"), "prefill_context_parallel_size"),
    **dict.fromkeys(("dcp", "dcp_size"), "decode_context_parallel_size"),
    **dict.fromkeys(("dp", "dp_size"), "data_parallel_size"),
    **dict.fromkeys(("gpu_memory_utilization", "mem_fraction_static"), "kv_cache_gib"),
    **dict.fromkeys(("context_length", "max_seq_len"), "max_model_len"),
    "max_running_requests": "max_num_seqs",
    "chunked_prefill_size": "max_num_batched_tokens",
    "attention_backend": "backend",
    "page_size": "block_size",
    **dict.fromkeys(("max_tokens", "max_new_tokens"), "sampling.max_new_tokens"),
    **{name: f"sampling.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "n", "seed", "stop")},
}
# What asks for nothing may stand in a config that was written for another engine.
_ASKS_FOR_NOTHING = {"pipeline_parallel_size": (None, 1)}


def own_keys(data: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    """The data without other engines' keys. UnsupportedError where one of them, or a value, asks for something.

    UserError for a key that has another name here.
    """
    own = {}
    for name, value in data.items():
        if not where and name in NAMES_HERE:
            raise UserError(f'unknown key "{name}"; here it is "{NAMES_HERE[name]}".')
        if name in REFUSED_KEYS:
            if not any(type(value) is type(x) and value == x for x in _ASKS_FOR_NOTHING.get(name, (None, False, 0))):
                raise refuse(REFUSED_KEYS[name], f'key "{where}{name}"')
            continue
        if isinstance(value, str) and (f"{where}{name}", value) in REFUSED_VALUES:
            raise refuse(REFUSED_VALUES[f"{where}{name}", value], f'key "{where}{name}" is "{value}"')
        is_object = isinstance(value, Mapping) and not where  # a config is two levels deep
        own[name] = own_keys(value, f"{name}.") if is_object else value
    return own
