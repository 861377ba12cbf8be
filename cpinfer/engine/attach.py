"""The way in: attach an engine to a model that a job already holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cpinfer.comm.topology import Topology
from cpinfer.config import Config
from cpinfer.engine.agreement import Prepared, begin_together
from cpinfer.engine.engine import Engine
from cpinfer.engine.needs import own_pool
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.rules import LayoutSizes, layout_errors
from cpinfer.logs import RankLogger
from cpinfer.models.families import FAMILIES
from cpinfer.models.runner import ModelRunner, attached
from cpinfer.models.spec import ModelSpec
from cpinfer.models.weight_samples import config_identity, software_versions, weight_identity
from cpinfer.models.wrappers import unwrapped
from cpinfer.refusals import refuse

# Keys that tools read, or that may name one thing differently on each host.
_NOT_THE_ENGINES = frozenset(
    ("model", "data_parallel_size", "sampling", "input", "output", "evaluation", "comparison", "training", "wandb")
)


@contextmanager
def attach(
    model: Any, topology: Topology | None = None, config: Config | None = None, *, tokenizer: Any | None = None
) -> Iterator[Engine]:
    """An engine on `model`'s own weights, for the length of the block; then the model is as it was, bit for bit.

    `model` is a Hugging Face causal LM, or what a framework made of one (a DeepSpeed engine's `.module`, a PeftModel,
    whose active adapters are then in effect). `topology` defaults to one process, `config` to the defaults at the
    model's dtype. Collective over the replica: two small gathers, the first of which compares config, model, a sample
    of the weights (`check_ranks`) and versions. UserError when model, topology and config do not fit together,
    RanksDifferError when ranks do not bring the same; on every rank alike, with the model as it was.
    """
    topology = topology or Topology.single()
    config = config or Config()
    with ExitStack() as stack:

        def prepare() -> Prepared[tuple[ModelRunner, PoolSize]]:
            spec = model_spec(model)
            check_layout(spec, config, topology.grid)
            runner = stack.enter_context(attached(model, spec, topology.grid.tp_size, topology.coords.tp_rank))
            pool = own_pool(runner, topology, config)
            return Prepared(
                (runner, pool),
                lambda: {**what_runs(spec, config, tokenizer), "model's config": config_identity(unwrapped(model))},
                lambda: weight_identity(unwrapped(model), full=config.check_ranks == "full"),
                number=pool.num_blocks,
            )

        (runner, own), num_blocks = begin_together(topology, _device_of(model), prepare)
        # What every rank can afford: memory, or the heads it stores, may differ, block ids may not.
        engine = Engine(runner, topology, config, tokenizer, PoolSize(min(num_blocks), own.sharding))
        stack.callback(engine.close)
        engine.wake()
        _tell(engine, runner, topology, config)
        yield engine
        engine.close()
        engine.raise_if_left_alone()


def _tell(engine: Engine, runner: ModelRunner, topology: Topology, config: Config) -> None:
    grid = topology.grid
    RankLogger(__name__, topology.rank, grid.world_size, speaks=topology.is_writer).shared(
        "attached to a %s model in %s on %s: tp=%d pcp=%d dcp=%d dp=%d; KV pool of %d tokens, %.2f GiB on this rank; "
        "context exchange %s, decode exchange %s",
        runner.spec.family, str(runner.dtype).removeprefix("torch."), runner.device, grid.tp_size, grid.pcp_size,
        grid.dcp_size, grid.dp_size, engine.kv_capacity_tokens, engine.kv_pool_bytes / 2**30,
        config.context_exchange, config.decode_exchange,
    )  # fmt: skip


def what_runs(spec: ModelSpec, config: Config, tokenizer: Any | None) -> Mapping[str, object]:
    """What ranks that attach together must have in common, the model they hold aside."""
    keys = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _NOT_THE_ENGINES}
    words = None if tokenizer is None else (type(tokenizer).__name__, len(tokenizer))
    return {"call": "attach", **keys, "model": spec, "tokenizer": words, "version": software_versions()}


def _device_of(model: Any) -> torch.device:
    """Where the ranks meet, also those whose model turns out to be none."""
    parameter = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    if parameter is not None:
        return torch.device(parameter.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_spec(model: Any) -> ModelSpec:
    """What a loaded model is. UserError when it is no Hugging Face model, or one that is refused."""
    model = unwrapped(model)
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        raise UserError(
            f"attach was given a {type(model).__name__}; a Hugging Face model was wanted. "
            "Of a framework's engine pass its .module."
        )
    generation = getattr(model, "generation_config", None)
    return ModelSpec.from_config(model.config.to_dict(), generation.to_dict() if generation is not None else None)


def check_layout(spec: ModelSpec, config: Config, grid: RankGrid) -> None:
    """UserError when the layout cannot run this model, or when config and topology name different layouts."""
    errors = config_errors(spec, config, grid.dp_size)
    if errors:
        raise UserError(" ".join(errors))
    if (config.tp_size, config.pcp_size, config.dcp_size) != (grid.tp_size, grid.pcp_size, grid.dcp_size):
        raise UserError(
            f"the config says {layout_sizes(spec, config)}, the topology tp={grid.tp_size} pcp={grid.pcp_size} "
            f"dcp={grid.dcp_size}. Give both the same sizes."
        )


def config_errors(spec: ModelSpec, config: Config, dp_size: int = 1) -> list[str]:
    """Sentences that say why a config cannot run this model; empty when it can."""
    sizes = layout_sizes(spec, config, dp_size)
    errors = layout_errors(sizes)
    if config.decode_exchange == "replicate_q" and sizes.dcp_size > sizes.pcp_size:
        errors.append(str(refuse("replicate_q", str(sizes))))
    if config.tp_size > 1:
        errors += _tensor_parallel_errors(spec, config)
    return errors


def _tensor_parallel_errors(spec: ModelSpec, config: Config) -> list[str]:
    """What the provider of tensor parallelism cannot do with a family."""
    found = f'model_type "{spec.family}" with tp={config.tp_size}'
    if spec.family == "gpt_bigcode" and spec.num_kv_heads > 1:
        return [str(refuse("fused_heads", found))]
    if config.tensor_parallel.provider == "autotp":
        return []
    why = FAMILIES[spec.family].refused.get("transformers_tp")
    if why is not None:
        return [str(refuse("transformers_tp", f"{found} ({why})"))]
    if spec.latent is None and config.tp_size > spec.num_kv_heads:
        return [str(refuse("transformers_tp_copies", f"{found} over {spec.num_kv_heads} KV heads"))]
    return []


def layout_sizes(spec: ModelSpec, config: Config, dp_size: int = 1) -> LayoutSizes:
    """The layout a config asks for, for this model."""
    return LayoutSizes(
        tp_size=config.tp_size,
        pcp_size=config.pcp_size,
        dcp_size=config.dcp_size,
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        dp_size=dp_size,
        interleave=config.interleave,
        block_size=config.block_size,
    )
