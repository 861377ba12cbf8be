"""The way in: attach an engine to a model that a job already holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from cpinfer.attention.exchanges.registry import decode_exchange
from cpinfer.comm.topology import Topology
from cpinfer.config import (
    ConfigLike,
    EngineConfig,
    JobConfig,
    ParallelConfig,
    Provider,
    job_config,
    with_keys,
)
from cpinfer.engine.agreement import Prepared, begin_together
from cpinfer.engine.collectives import collectives_in_shared_memory
from cpinfer.engine.deterministic import check_deterministic, deterministic_errors, prepare_deterministic
from cpinfer.engine.engine import Engine
from cpinfer.engine.layout_choice import decode_layouts, is_open
from cpinfer.engine.needs import RankNeeds, own_pool
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.rules import LayoutSizes, layout_errors
from cpinfer.models.invariant_rows import invariant_rows
from cpinfer.models.refused_models import tensor_parallel_errors
from cpinfer.models.runner import ModelRunner, attached
from cpinfer.models.spec import ModelSpec
from cpinfer.models.weight_samples import config_identity, software_versions, weight_identity
from cpinfer.models.wrappers import refuse_all_but_models, unwrapped
from cpinfer.refusals import refuse


class AxisSizes(Protocol):
    """Who knows the sizes of a replica's axes: a rank grid, or a config."""

    @property
    def tp_size(self) -> int: ...
    @property
    def pcp_size(self) -> int: ...
    @property
    def dcp_size(self) -> int: ...


@contextmanager
def attach(
    model: Any,
    topology: Topology | None = None,
    config: ConfigLike = None,
    *,
    tokenizer: Any | None = None,
    **keys: Any,
) -> Iterator[Engine]:
    """An engine on `model`'s own weights, for the length of the block; then the model is as it was, bit for bit.

    Collective over the replica: two small gathers, the first of which compares config, model, a sample of the weights
    (`check_ranks`) and versions; on CPU two more. Errors come on every rank alike, with the model as it was.

    Args:
        model: a Hugging Face causal LM, or what a framework made of one (a DeepSpeed engine's `.module`, a PeftModel,
            whose active adapters are then in effect).
        topology: the ranks, and the layout, which it alone decides; default: one process.
        config: an `EngineConfig` or more than one (a `JobConfig`, a tool's), a dict of keys, the path of a file,
            or nothing. Of what a job or a run says only the engine's keys are read: sampling goes with each call.
        tokenizer: for prompts that are text, stop strings, and the text of results.
        keys: those of an `EngineConfig`, which win over `config`: `attach(model, topology, max_num_seqs=64)`.

    Yields:
        The engine, awake.

    Raises:
        UserError: when model, topology and config do not fit together, also where a config says sizes that are not the
            topology's, or a dtype that is not the weights'.
        UnsupportedError: for what the table of refusals names.
        RanksDifferError: when ranks do not bring the same.
        RanksMissingError: from what the engine does, when some ranks do not come to it.
    """
    if not isinstance(topology, Topology | None):
        raise UserError(
            f"attach was given a {type(topology).__name__} as its topology. Give a config as `config=`, or its keys as "
            "keywords: attach(model, max_num_seqs=64)."
        )
    topology = topology or Topology.single()
    with ExitStack() as stack:
        stack.enter_context(topology.watch.running())

        def prepare() -> Prepared[tuple[EngineConfig, ModelRunner, PoolSize]]:
            wanted = engine_config(config, keys)
            if tokenizer is not None and not callable(tokenizer):
                raise UserError(
                    f"the tokenizer is a {type(tokenizer).__name__}; one of Transformers was wanted, as "
                    "AutoTokenizer.from_pretrained gives it."
                )
            spec = model_spec(model).with_max_model_len(wanted.max_model_len)
            check_layout(spec, wanted, topology.grid)
            around = invariant_rows if wanted.deterministic else nullcontext
            tp_size, tp_rank = topology.grid.tp_size, topology.coords.tp_rank
            prepacked_bytes = int(wanted.prepacked_weights_gib * 2**30)
            runner = stack.enter_context(attached(model, spec, tp_size, tp_rank, around, prepacked_bytes))
            _check_dtype(wanted, runner)
            alike = prepare_deterministic(runner.device) if wanted.deterministic else {}
            pool = own_pool(runner, topology, wanted)
            return Prepared(
                (wanted, runner, pool),
                lambda: {
                    **what_runs(spec, topology.grid, wanted, tokenizer),
                    "model's config": config_identity(unwrapped(model)),
                    **alike,
                },
                lambda: weight_identity(unwrapped(model), full=wanted.check_ranks == "full"),
                number=pool.number,
            )

        with topology.watch.at("attaching an engine", builds=True):
            (wanted, runner, own), pools = begin_together(topology, _device_of(model), prepare)
            # What every rank can afford: memory, or the heads it stores, may differ, block ids may not.
            needs = RankNeeds.of(runner, topology, wanted, PoolSize.smallest(pools, own.sharding))
            attached_ranks = stack.enter_context(collectives_in_shared_memory(topology, wanted, runner))
            if wanted.deterministic:
                check_deterministic(runner, attached_ranks, wanted, needs)
            engine = Engine(runner, wanted, tokenizer, decode_layouts(attached_ranks, wanted, needs))
            stack.callback(engine.close)
            engine.wake()
        _tell(engine, runner, topology, wanted)
        if isinstance(wanted, ParallelConfig):
            stack.enter_context(topology.watch.waiting(wanted.collective_timeout_s))
        yield engine
        engine.close()
        engine.raise_if_left_alone()


def engine_config(given: ConfigLike, keys: Mapping[str, Any]) -> EngineConfig:
    """What a caller of `attach` says. UserError for what no engine reads, where it was written for this one."""
    if isinstance(given, Mapping) and "sampling" in given:
        raise UserError(
            'the config has "sampling", which an engine takes with each call. Give it to generate or stream.'
        )
    return with_keys(given if isinstance(given, EngineConfig) else job_config(given), keys)


def _tell(engine: Engine, runner: ModelRunner, topology: Topology, config: EngineConfig) -> None:
    grid = topology.grid
    topology.logger(__name__).shared(
        "attached to a %s model in %s on %s: tp=%d pcp=%d dcp=%d dp=%d; KV pool of %d tokens, %.2f GiB on this rank; "
        "context exchange %s, decode exchange %s",
        runner.spec.family, str(runner.dtype).removeprefix("torch."), runner.device, grid.tp_size, grid.pcp_size,
        grid.dcp_size, grid.dp_size, engine.kv_capacity_tokens, engine.kv_pool_bytes / 2**30,
        config.context_exchange, config.decode_exchange,
    )  # fmt: skip
    if config.prepacked_weights_gib:
        topology.logger(__name__).shared(
            "prepacked the weights of %d linear layers, %.2f GiB on this rank",
            len(runner.prepacked.by_module), runner.prepacked.num_bytes / 2**30,
        )  # fmt: skip
    made_for = runner.spec.positions.made_for
    if runner.spec.max_positions > made_for:
        topology.logger(__name__).shared_warning(
            "max_model_len is %d; the model was made for %d positions, and nobody knows what it writes beyond them",
            runner.spec.max_positions, made_for,
        )  # fmt: skip


def what_runs(spec: ModelSpec, grid: RankGrid, config: EngineConfig, tokenizer: Any | None) -> Mapping[str, object]:
    """What ranks that attach together must have in common, the model they hold aside."""
    keys = {field.name: getattr(config, field.name) for field in dataclasses.fields(EngineConfig)}
    num_words = len(tokenizer) if isinstance(tokenizer, Sized) else None
    words = None if tokenizer is None else (type(tokenizer).__name__, num_words)
    return {
        "call": "attach",
        **keys,
        "grid": grid,
        "dcp is open": is_open(config),
        "model": spec,
        "tokenizer": words,
        "version": software_versions(),
    }


def _device_of(model: Any) -> torch.device:
    """Where the ranks meet, also those whose model turns out to be none."""
    parameter = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    if parameter is not None:
        return torch.device(parameter.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_spec(model: Any) -> ModelSpec:
    """What a loaded model is. UserError when it is no Hugging Face model, or one that is refused."""
    refuse_all_but_models(model, "attach")
    model = unwrapped(model)
    generation = getattr(model, "generation_config", None)
    return ModelSpec.from_config(model.config.to_dict(), generation.to_dict() if generation is not None else None)


def check_layout(spec: ModelSpec, config: EngineConfig, grid: RankGrid) -> None:
    """UserError when the topology's layout cannot run this model, or is not the one that the config says."""
    provider: Provider = "autotp"
    if isinstance(config, ParallelConfig):
        _refuse_other_sizes(config, grid)
        provider = config.tensor_parallel.provider
    errors = _errors(spec, config, layout_sizes(spec, config, grid, grid.dp_size), provider)
    if errors:
        raise UserError(" ".join(errors))


def _refuse_other_sizes(config: ParallelConfig, grid: RankGrid) -> None:
    said = {
        "tp": (config.tensor_parallel.tp_size, grid.tp_size),
        "pcp": (config.prefill_context_parallel_size, grid.pcp_size),
        "dcp": (grid.pcp_size if is_open(config) else config.decode_context_parallel_size, grid.dcp_size),
        "dp": (config.data_parallel_size, grid.dp_size),
    }
    other = {axis: sizes for axis, sizes in said.items() if sizes[0] is not None and sizes[0] != sizes[1]}
    if other:
        raise UserError(
            f"the config says {' '.join(f'{axis}={size}' for axis, (size, _) in other.items())}, the topology "
            f"{' '.join(f'{axis}={size}' for axis, (_, size) in other.items())}. Leave sizes out of the config, "
            "which are the topology's, or make a topology of these."
        )


def _check_dtype(config: EngineConfig, runner: ModelRunner) -> None:
    """UserError where the config asks for a dtype that neither weights in use have nor, under autocast, attention."""
    found = [str(dtype).removeprefix("torch.") for dtype in (runner.weights_dtype, runner.dtype)]
    if config.dtype not in ("auto", *found):
        raise UserError(
            f'the config says dtype "{config.dtype}", the model\'s weights are {found[0]} in use. Leave dtype out '
            f'(or set it to "auto"), or give a model in {config.dtype}.'
        )


def config_errors(spec: ModelSpec, config: JobConfig, dp_size: int = 1) -> list[str]:
    """Sentences that say why a config's own layout cannot run this model; empty when it can."""
    return _errors(spec, config, layout_sizes(spec, config, config, dp_size), config.tensor_parallel.provider)


def _errors(spec: ModelSpec, config: EngineConfig, sizes: LayoutSizes, provider: Provider) -> list[str]:
    errors = layout_errors(sizes)
    error = decode_exchange(config.decode_exchange).layout_error(sizes)
    if error is not None:
        errors.append(str(error))
    errors += tensor_parallel_errors(spec.family, spec.num_kv_heads, spec.why_no_tp, sizes.tp_size, provider)
    if config.deterministic:
        errors += deterministic_errors(config, sizes)
    if spec.states is not None:
        errors += _state_errors(spec, config)
    return errors


def _state_errors(spec: ModelSpec, config: EngineConfig) -> list[str]:
    """What does not run yet of a model with states of sequences."""
    found, errors = f'model_type "{spec.family}"', []
    if config.deterministic:
        errors.append(str(refuse("state_deterministic", found)))
    if config.cuda_graphs:
        errors.append(str(refuse("state_cuda_graphs", found)))
    if config.decode_exchange == "replicate_q":
        errors.append(str(refuse("state_replicas", found)))
    return errors


def layout_sizes(spec: ModelSpec, config: EngineConfig, axes: AxisSizes, dp_size: int = 1) -> LayoutSizes:
    """The layout of an engine for this model, over axes of these sizes."""
    return LayoutSizes(
        tp_size=axes.tp_size,
        pcp_size=axes.pcp_size,
        dcp_size=axes.dcp_size,
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        dp_size=dp_size,
        interleave=config.interleave,
        block_size=config.block_size,
    )
