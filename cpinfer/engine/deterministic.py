"""What the deterministic mode needs of a model, a layout and a machine, asked before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import torch

from cpinfer.attention.backends.ordered_check import ordered_fault
from cpinfer.comm.topology import Topology
from cpinfer.config import EngineConfig
from cpinfer.engine.needs import RankNeeds
from cpinfer.errors import UserError, quoted
from cpinfer.layout.rules import LayoutSizes
from cpinfer.models.row_invariance import MAX_TP_SIZE, check_row_invariance
from cpinfer.models.runner import ModelRunner
from cpinfer.ops.cpu_kernels.compiling import compiled
from cpinfer.ops.triton_modules import triton_module
from cpinfer.refusals import refuse

# Of GPUs that multiply in bfloat16: NVIDIA's Ampere and later ones.
MIN_CAPABILITY = (8, 0)
# What the mode decides itself may not be said otherwise.
KEPT: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "backend": ("auto", "cpu", "torch"),
        "context_exchange": ("auto", "kv"),
        "decode_exchange": ("a2a",),
        "cascade_attention": ("auto", "off"),
        "cp_wire_dtype": ("auto", "float32"),
        "cuda_graphs": (False,),
        "prepacked_weights_gib": (0,),
    }
)


def deterministic_errors(config: EngineConfig, sizes: LayoutSizes) -> list[str]:
    """Sentences that say why a layout cannot keep the promise; empty when it can."""
    errors = [
        f'"{key}" is {quoted(getattr(config, key))}; it must be {" or ".join(map(quoted, kept))} with "deterministic".'
        for key, kept in KEPT.items()
        if getattr(config, key) not in kept
    ]
    if sizes.tp_size > MAX_TP_SIZE:
        errors.append(str(refuse("deterministic_tp", f"tp={sizes.tp_size}")))
    if config.deterministic_kv_shards % sizes.dcp_size:
        errors.append(
            f"dcp={sizes.dcp_size} does not divide deterministic_kv_shards={config.deterministic_kv_shards}. "
            "Set it to a multiple of every dcp that is to give the same bits."
        )
    return errors


def prepare_deterministic(device: torch.device) -> Mapping[str, object]:
    """Compile the attention kernel, where nobody has. What has to be equal on all ranks for equal bits. Local.

    UserError where it cannot be compiled, or for a device that has no kernels. (Triton compiles its own in the checks.)
    """
    if device.type == "cuda":
        return _prepare_cuda(device)
    if device.type != "cpu":
        raise refuse("deterministic_device", f"device {device}")
    # A library is named by the processor that it was compiled for, too.
    kernel = Path(compiled("ordered_attention")._name).name
    return {"attention kernel": kernel, "threads": torch.get_num_threads()}


def _prepare_cuda(device: torch.device) -> Mapping[str, object]:
    if triton_module("ordered_kernels") is None:
        raise refuse("deterministic_triton", f"device {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise refuse("deterministic_capability", f"compute capability {'.'.join(map(str, capability))}")
    return {"attention kernel": f"Triton {version('triton')}", "GPU": torch.cuda.get_device_name(device)}


def check_deterministic(runner: ModelRunner, topology: Topology, config: EngineConfig, needs: RankNeeds) -> None:
    """UserError, on every rank, where a row of the model depends on others. Collective over the replica.

    On a GPU attention is checked, too: what its kernels do on CPU, tests have shown.
    """
    replica, device = topology.replica, runner.device

    def any_rank(is_so: bool) -> bool:
        return bool(replica.all_gather(torch.tensor([is_so], device=device)).any())

    # The runner's forwards are in the context of the mode already.
    check_row_invariance(runner, topology.grid.tp_size, any_rank=any_rank, around=nullcontext)
    if device.type == "cpu":
        return
    fault = ordered_fault(needs.attention, config.deterministic_kv_shards, config.interleave, device)
    if any_rank(fault is not None):
        raise UserError(
            f"deterministic attention cannot be kept on {device}: {fault or 'another rank says why'}. Turn "
            "deterministic mode off, or take another version of Triton."
        )
