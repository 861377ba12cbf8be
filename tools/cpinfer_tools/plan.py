"""`cpinfer explain --plan`: which layouts of a machine fit a model and its work, and what they would take.

The model is read as tools read it, refusals included, and built on the meta device: no weights are read, and none need
be there. Seconds are predictions by `cpinfer.layout.cost_model`, from what data sheets say.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from cpinfer.config import KV_CACHE_DTYPES, LaunchConfig, load_as
from cpinfer.engine.attach import config_errors
from cpinfer.errors import UserError
from cpinfer.layout.advice import LayoutOption, legal_layouts
from cpinfer.layout.machines import FLOPS_SHARE, LAUNCH_S, LINK_SHARE, MACHINES, MEMORY_SHARE, Machine
from cpinfer.layout.planning import Plan, PlannedModel, Work, plan_layouts
from cpinfer.models.loading import known_sizes, load_spec
from cpinfer.models.spec import ModelSpec

_GIB = 2**30
# Flags that say a figure of a machine: its field, and what one of their unit is.
MACHINE_FLAGS: Mapping[str, tuple[str, float]] = {
    "gpu_gib": ("gpu_bytes", _GIB),
    "hbm_tb_s": ("memory_bandwidth", 1e12),
    "link_gb_s": ("link_bandwidth", 1e9),
    "network_gb_s": ("network_bandwidth", 1e9),
}
SHOWN = 12


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the plan and gives it as plain data. UserError where the model is refused, or every layout is."""
    config = load_as(LaunchConfig, args.config) if args.config else LaunchConfig()
    name = args.model or config.model
    if name is None:
        raise UserError("--plan needs a model. Pass --model FOLDER (its config.json is enough), or --config FILE.")
    machine, work = machine_of(args), work_of(args, config)
    spec = load_spec(name)
    longest = work.prompt_tokens + work.new_tokens
    if longest > spec.max_positions:
        spec = spec.with_max_model_len(longest)
    weights, sizes = known_sizes(name, getattr(torch, work.dtype))
    sizes = replace(sizes, cuts_states=config.tensor_parallel.cuts_states)
    model = PlannedModel(sizes, weights.layer_bytes, weights.other_bytes, spec.mlp_size)
    num_gpus = args.gpus or machine.gpus_per_host
    options, refused = _runnable(_options(args, spec, machine, num_gpus), spec, config)
    plans = plan_layouts(options, model, machine, work)
    print(_describe(plans, refused, name, spec, weights.num_parameters, machine, num_gpus, work))
    return {
        "valid": True,
        "errors": [],
        "machine": {field.name: getattr(machine, field.name) for field in fields(machine) if field.name != "sources"},
        "sources": dict(machine.sources),
        "num_gpus": num_gpus,
        "num_parameters": weights.num_parameters,
        "weights_bytes": weights.layer_bytes + weights.other_bytes,
        "work": asdict(work),
        "plans": [_plain(each) for each in plans],
        "refused": [{"reason": reason, "num_layouts": count} for reason, count in refused.items()],
    }


def machine_of(args: argparse.Namespace) -> Machine:
    """A preset, with the figures that flags say in the place of its own."""
    machine = MACHINES[args.machine or "h100"]
    given = {name: unit * getattr(args, flag) for flag, (name, unit) in MACHINE_FLAGS.items() if getattr(args, flag)}
    if args.tflops:  # of the dtype that is planned for
        given["flops_16"] = given["flops_32"] = 1e12 * args.tflops
    if args.gpus_per_host:
        given["gpus_per_host"] = args.gpus_per_host
    if not given:
        return machine
    return replace(machine, title=f"{machine.title}, {', '.join(given)} as given", **given)


def work_of(args: argparse.Namespace, config: LaunchConfig) -> Work:
    """What flags say of the work, then the config."""
    dtype = args.dtype or config.dtype
    block_size = args.block_size or config.block_size
    kept = KV_CACHE_DTYPES[str(args.kv_cache_dtype or config.kv_cache_dtype)]
    return Work(
        prompt_tokens=args.seq_len or 8192,
        new_tokens=args.new_tokens or 256,
        num_sequences=args.batch or 1,
        step_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        workspace_tokens=config.context_workspace_tokens,
        block_size=block_size,
        interleave=args.interleave or config.cp_kv_cache_interleave_size or block_size,
        dtype=dtype,
        cache_dtype=kept or dtype,
        wire_dtype=dtype if config.cp_wire_dtype == "auto" else config.cp_wire_dtype,
        kv_cache_gib=args.kv_cache_gib or config.kv_cache_gib,
        cuda_graphs=config.cuda_graphs,
    )


def _options(args: argparse.Namespace, spec: ModelSpec, machine: Machine, num_gpus: int) -> list[LayoutOption]:
    options = legal_layouts(
        num_gpus,
        spec.num_q_heads,
        spec.num_kv_heads,
        tp_size=args.tp,
        pcp_size=args.pcp,
        dcp_size=args.dcp,
        dp_size=args.dp,
        kv_head=spec.kv_layout(1),
        hidden_size=spec.hidden_size,
        ranks_per_host=machine.gpus_per_host,
    )
    if not options:
        raise UserError(
            f"{num_gpus} GPUs, {spec.num_q_heads} query heads over {spec.num_kv_heads} KV heads: no legal layout with "
            "these sizes uses them all. Use another number of GPUs, or other sizes."
        )
    return options


def _runnable(
    options: Sequence[LayoutOption], spec: ModelSpec, config: LaunchConfig
) -> tuple[list[LayoutOption], Counter[str]]:
    """The options that tools would run, and why they would not run how many others. UserError where they run none."""
    runnable, refused = [], Counter[str]()
    for option in options:
        sizes = option.sizes
        wanted = replace(
            config,
            tensor_parallel=replace(config.tensor_parallel, tp_size=sizes.tp_size),
            prefill_context_parallel_size=sizes.pcp_size,
            decode_context_parallel_size=sizes.dcp_size,
            data_parallel_size=sizes.dp_size,
        )
        errors = config_errors(spec, wanted, sizes.dp_size)
        if errors:
            refused[" ".join(errors)] += 1
        else:
            runnable.append(option)
    if not runnable:
        raise UserError(" ".join(refused))
    return runnable, refused


def _plain(each: Plan) -> dict[str, Any]:
    sizes = each.option.sizes
    seconds = {} if each.prefill is None or each.decode is None else {"prefill": each.prefill, "decode": each.decode}
    return {
        "tp": sizes.tp_size,
        "pcp": sizes.pcp_size,
        "dcp": sizes.dcp_size,
        "dp": sizes.dp_size,
        "fits": each.unfit is None,
        "reason": each.reason if each.unfit is None else each.unfit,
        "tp_spans_hosts": each.option.tp_spans_hosts,
        "memory_bytes_per_rank": asdict(each.memory),
        "sequences_at_once": each.sequences_at_once,
        "prefill_s": each.prefill and each.prefill.seconds,
        "decode_ms": each.decode and each.decode.seconds * 1e3,
        "tokens_per_s": each.tokens_per_s,
        "wall_s": each.seconds,
        "parts": {
            name: {
                "products_s": step.products,
                "attention_s": step.attention,
                "links_s": dict(step.links_by_axis),
                "host_s": step.host,
            }
            for name, step in seconds.items()
        },
    }


def _describe(
    plans: Sequence[Plan],
    refused: Counter[str],
    name: str,
    spec: ModelSpec,
    num_parameters: int,
    machine: Machine,
    num_gpus: int,
    work: Work,
) -> str:
    fitting = [each for each in plans if each.unfit is None]
    lines = [
        f"{name}: {num_parameters / 1e9:,.1f} billion parameters in {work.dtype}, {spec.num_q_heads} query heads over "
        f"{spec.num_kv_heads} KV head(s){' (the latent)' if spec.latent else ''}, {spec.num_layers} layers",
        f"{num_gpus} GPUs, {machine.title}",
        f"{work.num_sequences} prompt(s) of {work.prompt_tokens:,} tokens, answers of {work.new_tokens:,}, steps of at "
        f"most {work.step_tokens:,}",
        "",
    ]
    if fitting:
        shown = "" if len(fitting) <= SHOWN else f" (these {SHOWN}; --json has all)"
        lines += [f"{len(fitting)} of {len(plans)} layouts fit; the quickest first{shown}:", ""]
        lines += [_table(fitting[:SHOWN]), "", COLUMNS, ""]
        lines += [f"{_sizes(each)}: {each.reason}" for each in fitting[:SHOWN]]
    else:
        lines.append("no layout fits. tp divides weights, dcp the KV of a sequence: larger ones may, or more GPUs.")
    unfit = [each for each in plans if each.unfit is not None]
    lines += ["", *(f"{_sizes(each)} {each.unfit}" for each in unfit[:3])] if unfit else []
    lines += [f"and {len(unfit) - 3} more that do not fit."] if len(unfit) > 3 else []
    lines += [f"{count} layout(s) are refused: {reason}" for reason, count in refused.items()]
    if work.prompt_tokens + work.new_tokens > spec.positions.made_for:
        lines.append(f"The model was made for {spec.positions.made_for:,} positions.")
    return "\n".join([*lines, "", ASSUMED] if fitting else lines)


COLUMNS = """\
GiB are of one GPU: its weights; activations, buffers and runtime (other); what is left for the KV pool, or is given.
at once: sequences of the batch that have room, on all GPUs. prefill s: of one prompt. decode ms: of one step of all
that run at once. tokens/s: generated, over the time of all prompts and answers."""
ASSUMED = f"""\
Predicted, not measured. Assumed: steps reach {FLOPS_SHARE:.0%} of the data sheet's FLOP/s, {MEMORY_SHARE:.0%} of its \
memory bandwidth and {LINK_SHARE:.0%} of its link
bandwidth; to launch the kernels of a layer takes {LAUNCH_S * 1e6:.0f} us, unless cuda_graphs replays them. The order \
of layouts depends
on these figures less than the seconds do."""


def _sizes(each: Plan) -> str:
    sizes = each.option.sizes
    return f"{sizes} dp={sizes.dp_size}"


def _table(plans: Sequence[Plan]) -> str:
    rows = []
    for each in plans:
        assert each.prefill is not None and each.decode is not None, "who fits is predicted"
        sizes, memory = each.option.sizes, each.memory
        rows.append(
            [
                *map(str, (sizes.tp_size, sizes.pcp_size, sizes.dcp_size, sizes.dp_size)),
                f"{memory.weights / _GIB:.1f}",
                f"{(memory.kept - memory.weights) / _GIB:.1f}",
                f"{memory.kv_pool / _GIB:.1f}",
                f"{each.sequences_at_once:,}",
                f"{each.prefill.seconds:.3g}",
                f"{each.decode.seconds * 1e3:.3g}",
                f"{each.tokens_per_s:,.0f}",
            ]
        )
    header = ["tp", "pcp", "dcp", "dp", "weights GiB", "other GiB", "KV GiB", "at once", "prefill s", "decode ms"]
    lines = [[*header, "tokens/s"], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in lines)
