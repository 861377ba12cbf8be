"""cpinfer: exact, context-parallel inference inside a training job.

    topology = topology_from(deepspeed_engine)
    with cpinfer.attach(deepspeed_engine.module, topology, config, tokenizer=tokenizer) as engine:
        results = engine.generate(prompts, cpinfer.SamplingParams(max_new_tokens=256))

The names below are loaded when they are first used: `cpinfer.layout` alone needs numpy and nothing else.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

import cpinfer.comm.parent  # noqa: F401  # asks now, before anything slow is imported

# A library says nothing until its user listens: see `cpinfer.logs`.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from cpinfer.comm.topology import Topology
    from cpinfer.config import Config, SamplingParams, load_config, parse_config
    from cpinfer.engine.attach import attach
    from cpinfer.engine.engine import Engine
    from cpinfer.engine.request import RolloutResult, ScoreResult
    from cpinfer.errors import UserError
    from cpinfer.layout.grid import RankGrid
    from cpinfer.models.kv_expansion import expand_kv_heads

_HOMES = {
    "Config": "cpinfer.config",
    "Engine": "cpinfer.engine.engine",
    "RankGrid": "cpinfer.layout.grid",
    "RolloutResult": "cpinfer.engine.request",
    "SamplingParams": "cpinfer.config",
    "ScoreResult": "cpinfer.engine.request",
    "Topology": "cpinfer.comm.topology",
    "UserError": "cpinfer.errors",
    "attach": "cpinfer.engine.attach",
    "expand_kv_heads": "cpinfer.models.kv_expansion",
    "load_config": "cpinfer.config",
    "parse_config": "cpinfer.config",
}

__all__ = [
    "Config",
    "Engine",
    "RankGrid",
    "RolloutResult",
    "SamplingParams",
    "ScoreResult",
    "Topology",
    "UserError",
    "attach",
    "expand_kv_heads",
    "load_config",
    "parse_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cpinfer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
