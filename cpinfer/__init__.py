"""cpinfer: exact, context-parallel inference inside a training job.

    topology = topology_from(deepspeed_engine)
    with cpinfer.attach(deepspeed_engine.module, topology, tokenizer=tokenizer, max_num_seqs=64) as engine:
        results = engine.generate(prompts, cpinfer.SamplingParams(max_new_tokens=256))

The names below are loaded when they are first used: `cpinfer.layout` alone needs numpy and nothing else.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

import cpinfer.comm.parent  # noqa: F401  # asks now, before anything slow is imported
from cpinfer.version import __version__ as __version__

# A library says nothing until its user listens: see `cpinfer.logs`.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from cpinfer.colocate.mismatch import Mismatch, uncut_logprobs
    from cpinfer.colocate.phase import Lent, PhaseReport, rollout_phase
    from cpinfer.colocate.training_logprobs import training_logprobs
    from cpinfer.comm.topology import Topology
    from cpinfer.config import EngineConfig, JobConfig, SamplingParams, load_config, parse_config
    from cpinfer.engine.attach import attach
    from cpinfer.engine.engine import Engine
    from cpinfer.engine.open_requests import RequestOutput
    from cpinfer.engine.request import Prompt, RolloutResult, SampledToken, ScoreResult
    from cpinfer.engine.sessions import Session
    from cpinfer.errors import (
        BackendFaultError,
        EngineFaultError,
        ModelChangedError,
        NoTokenError,
        PeerLostError,
        RanksDifferError,
        RanksMissingError,
        StreamEndedError,
        UnsupportedError,
        UserError,
    )
    from cpinfer.layout.grid import RankGrid
    from cpinfer.models.invariant_training import invariant_training
    from cpinfer.models.kv_expansion import expand_kv_heads

_HOMES = {
    "BackendFaultError": "cpinfer.errors",
    "Engine": "cpinfer.engine.engine",
    "EngineConfig": "cpinfer.config",
    "EngineFaultError": "cpinfer.errors",
    "JobConfig": "cpinfer.config",
    "Lent": "cpinfer.colocate.phase",
    "Mismatch": "cpinfer.colocate.mismatch",
    "ModelChangedError": "cpinfer.errors",
    "NoTokenError": "cpinfer.errors",
    "PeerLostError": "cpinfer.errors",
    "PhaseReport": "cpinfer.colocate.phase",
    "Prompt": "cpinfer.engine.request",
    "RankGrid": "cpinfer.layout.grid",
    "RanksDifferError": "cpinfer.errors",
    "RanksMissingError": "cpinfer.errors",
    "RequestOutput": "cpinfer.engine.open_requests",
    "RolloutResult": "cpinfer.engine.request",
    "SampledToken": "cpinfer.engine.request",
    "SamplingParams": "cpinfer.config",
    "ScoreResult": "cpinfer.engine.request",
    "Session": "cpinfer.engine.sessions",
    "StreamEndedError": "cpinfer.errors",
    "Topology": "cpinfer.comm.topology",
    "UnsupportedError": "cpinfer.errors",
    "UserError": "cpinfer.errors",
    "attach": "cpinfer.engine.attach",
    "expand_kv_heads": "cpinfer.models.kv_expansion",
    "invariant_training": "cpinfer.models.invariant_training",
    "load_config": "cpinfer.config",
    "parse_config": "cpinfer.config",
    "rollout_phase": "cpinfer.colocate.phase",
    "training_logprobs": "cpinfer.colocate.training_logprobs",
    "uncut_logprobs": "cpinfer.colocate.mismatch",
}

__all__ = [
    "BackendFaultError",
    "Engine",
    "EngineConfig",
    "EngineFaultError",
    "JobConfig",
    "Lent",
    "Mismatch",
    "ModelChangedError",
    "NoTokenError",
    "PeerLostError",
    "PhaseReport",
    "Prompt",
    "RankGrid",
    "RanksDifferError",
    "RanksMissingError",
    "RequestOutput",
    "RolloutResult",
    "SampledToken",
    "SamplingParams",
    "ScoreResult",
    "Session",
    "StreamEndedError",
    "Topology",
    "UnsupportedError",
    "UserError",
    "attach",
    "expand_kv_heads",
    "invariant_training",
    "load_config",
    "parse_config",
    "rollout_phase",
    "training_logprobs",
    "uncut_logprobs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cpinfer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
