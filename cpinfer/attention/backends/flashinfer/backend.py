"""Attention by FlashInfer's paged kernels (arXiv:2501.01005): what runs on CUDA.

FlashInfer splits the work of a batch once, on the host (`plan`), and then runs it for every layer. Its plans want
heads, scale and cap beside the rows, which are a layer's; so a plan of ours is handed to FlashInfer when the first
layer runs, and every layer that agrees in them shares it. Models have one such *call*, or two where some layers expand
latents.

    rows --page_table--> indptr, pages --plan--> [wrapper of this call] --run, every layer--> out, lse (base 2) * ln 2

A wrapper holds one plan; planning it again makes the one before invalid. A step has several plans alive (new tokens,
context, one per window), so each takes a wrapper of its own from a pool, and gives it back when the step lets go of the
plan. The pool grows to what a step needs at most, each wrapper once.

Host arrays are staged in pinned memory that belongs to the wrapper, as FlashInfer's own staging does; an event guards
both, so that no plan overwrites what the copies of the last one still read. Within a step nothing waits: a wrapper is
planned once in it. All wrappers share one workspace, which is right as long as they run on one stream.

Kernels: paged prefill of many queries, and latent attention, in FlashAttention-3 style on Hopper; all else in
FlashAttention-2 style, decode on tensor cores where query heads share KV heads. Both return lse. Where those of
FlashAttention-3 for prefill cannot be compiled (`toolchain`), FlashAttention-2's take their place.
Other families (trtllm-gen, cudnn, ...) either do not or need more than a page table, and are never chosen.

Pages in fp8 are widened to the queries' dtype as they are read, so they weigh as what they say. The FlashAttention-3
family would want queries in fp8 as well, but for latents, whose kernels widen e4m3 to bfloat16 on Hopper.

Letters: T queries, H query heads, K KV heads, D head dim of keys, V of values.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionNeeds, FixedSize
from cpinfer.attention.backends.flashinfer import limits
from cpinfer.attention.backends.flashinfer.building import build_modules
from cpinfer.attention.backends.flashinfer.kernels import (
    Call,
    Chip,
    KernelModule,
    Kind,
    kernel_modules,
    kind_of,
    refused,
)
from cpinfer.attention.backends.flashinfer.page_table import PageTable, page_table
from cpinfer.attention.backends.flashinfer.toolchain import cuda_home, missing_for_fa3, missing_tools
from cpinfer.attention.backends.flashinfer.wrapper import Wrapper
from cpinfer.attention.backends.self_check import check_backend
from cpinfer.errors import BackendFaultError, UserError
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.states import State
from cpinfer.refusals import refuse

LN_2 = math.log(2)


def unfit(device: torch.device, needs: AttentionNeeds) -> UserError | None:
    """Why FlashInfer cannot do what is needed; None when it can."""
    if device.type != "cuda":
        return refuse("flashinfer_device", f'backend="flashinfer" on {device.type}')
    error = refused(needs, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    if error is not None:
        return error
    if importlib.util.find_spec("flashinfer") is None:
        return UserError(
            'backend="flashinfer" needs the package flashinfer-python. '
            'Run `pip install "cpinfer[flashinfer]"`, or set backend to "torch".'
        )
    return None


def device_bytes(device: torch.device, needs: AttentionNeeds) -> int:
    """Its workspace, its wrappers, and what plans that are replayed hold."""
    return limits.device_bytes(needs, num_sms_of(device))


def make(device: torch.device, needs: AttentionNeeds) -> FlashInferBackend:
    """The backend, when it has passed its check, which sizes of plans are nothing to."""
    check_flashinfer(device, replace(needs, replayed=()))
    return FlashInferBackend(device, needs)


@functools.cache
def check_flashinfer(device: torch.device, needs: AttentionNeeds) -> None:
    """BackendFaultError when FlashInfer is wrong in what is needed. Once per process: every phase makes an engine.

    All modules that will be asked for are compiled first, by one of the processes that share a cache of them.
    """
    missing = " and ".join(missing_tools(cuda_home()))
    if missing:
        warnings.warn(f"FlashInfer compiles its kernels when they are first used, and lacks {missing}", stacklevel=2)
    try:
        if not missing:
            _compile_missing(kernel_modules(needs, chip_of(device)))
        check_backend(FlashInferBackend(device, needs), needs, device)
    except BackendFaultError as error:
        if not missing:
            raise
        raise BackendFaultError(f"{error} To compile its kernels FlashInfer lacks {missing}.") from error


def _compile_missing(modules: Sequence[KernelModule]) -> None:
    logger = logging.getLogger(__name__)
    try:
        for built in build_modules(modules, lambda what: logger.warning("FlashInfer: %s", what), only_missing=True):
            if built.seconds:
                logger.warning("FlashInfer: compiled %s in %.0f s", built.module, built.seconds)
    except UserError as error:
        raise BackendFaultError(f'{error}\nUse backend "torch", or fix what it says.') from error
    except OSError as error:  # no room, no right to write, or a file system without locks
        logger.warning("FlashInfer: kernels are not compiled ahead, but when they are first used: %s", error)


class FlashInferBackend:
    """Plans for one device. Earlier plans stay valid, for as long as they are held. Not for several threads at once."""

    name = "flashinfer"
    min_saved_keys: int | None = None  # what a second launch and a merge cost beside keys has not been measured

    def __init__(self, device: torch.device, needs: AttentionNeeds, library: Any = None) -> None:
        self._device = device
        self._library = importlib.import_module("flashinfer") if library is None else library
        self._chip, self._num_sms, num_bytes = Chip(), 0, 1024
        if device.type == "cuda":
            _check_is_current(device)
            self._chip, self._num_sms = chip_of(device), num_sms_of(device)
            num_bytes = limits.workspace_bytes(needs, self._num_sms)
        self._workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._free: dict[Kind, list[Wrapper]] = {}

    def plan(self, rows: AttentionRows) -> FlashInferPlan:
        return FlashInferPlan(self, page_table(rows))

    def fixed_plan(self, size: FixedSize, *, single_tokens: bool) -> FlashInferPlan:
        return FlashInferPlan(self, None, size, single_tokens=single_tokens)

    def wrapper_for(self, plan: FlashInferPlan, table: PageTable, call: Call, fixed: FixedSize | None) -> Wrapper:
        """A wrapper of the right kind, `plan`'s until it is gone."""
        kind = kind_of(table, call, self._chip)
        given = (self._library, kind, call, self._workspace, self._num_sms)
        if fixed is not None:
            return Wrapper(*given, fixed)
        free = self._free.setdefault(kind, [])
        wrapper = free.pop() if free else Wrapper(*given)
        weakref.finalize(plan, free.append, wrapper).atexit = False
        return wrapper

    def on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


class FlashInferPlan:
    """Rows of one step, planned by FlashInfer when the first layer of each call runs them.

    Layers of a call have results of one shape, so they share one place for them.
    """

    def __init__(
        self,
        backend: FlashInferBackend,
        table: PageTable | None,
        fixed: FixedSize | None = None,
        *,
        single_tokens: bool = False,
    ) -> None:
        self._backend = backend
        self._table = table
        self._fixed = fixed
        self._single_tokens = single_tokens
        self._wrappers: dict[Call, Wrapper] = {}
        self._results: dict[Call, State] = {}
        self._empty: Tensor | None = None
        if table is not None and table.empty.any():
            self._empty = backend.on_device(table.empty)

    def update(self, rows: AttentionRows) -> None:
        """Other rows, in the memory of those before; for plans of a fixed size, outside of any capture."""
        if self._fixed is None:
            raise ValueError("only a plan of a fixed size can be given other rows")
        self._table = table = page_table(rows, single_tokens=self._single_tokens)
        if table.num_rows != self._fixed.num_rows or len(table.kv_indices) > self._fixed.num_pages:
            raise ValueError(f"{table.num_rows} rows of {len(table.kv_indices)} pages do not fit {self._fixed}")
        # Which rows are empty changes from step to step, and what is captured reads it from here.
        empty = self._backend.on_device(table.empty)
        self._empty = empty if self._empty is None else self._empty.copy_(empty)
        for call, wrapper in self._wrappers.items():
            wrapper.plan(table, call)

    def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None) -> State:
        table = self._table
        if table is None or len(q) != table.num_queries:
            raise ValueError(f"{len(q)} queries were given to a plan of {table and table.num_queries}")
        if not table.v_is_prefix_of_k and keys.stride() != values.stride():
            # 0.7 has other kernels for them, which it would compile here, in the middle of a step.
            raise ValueError(f"keys and values of unequal strides: {keys.stride()} and {values.stride()}")
        call = _call_of(table, q, keys, values, scale, soft_cap)
        out, lse = self._room(call, q)
        if table.num_rows == 0:
            return out, lse
        wrapper = self._wrappers.get(call)
        if wrapper is None:
            wrapper = self._backend.wrapper_for(self, table, call, self._fixed)
            wrapper.plan(table, call)
            self._wrappers[call] = wrapper
        wrapper.run(table.page_size, call, q, keys, values, out, lse)
        lse.mul_(LN_2)  # FlashInfer's lse are logarithms to base 2
        if self._empty is not None:
            out.masked_fill_(self._empty[:, None, None], 0.0)
            lse.masked_fill_(self._empty[:, None], -torch.inf)
        return out, lse

    def _room(self, call: Call, q: Tensor) -> State:
        if call not in self._results:
            T, H = len(q), call.num_q_heads
            out = q.new_zeros(T, H, call.v_dim)
            self._results[call] = out, torch.full((T, H), -torch.inf, dtype=torch.float32, device=q.device)
        return self._results[call]


def chip_of(device: torch.device) -> Chip:
    """What kernels are chosen by on a device. Where FlashAttention-3's cannot be compiled, that is said."""
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return Chip(capability)
    missing = missing_for_fa3(cuda_home())
    if missing is not None:
        warnings.warn(
            "prefill runs on FlashAttention-2, which is slower on Hopper: to compile its kernels of FlashAttention-3 "
            f"FlashInfer lacks {missing}",
            stacklevel=2,
        )
    return Chip(capability, has_fa3_prefill=missing is None)


def num_sms_of(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _check_is_current(device: torch.device) -> None:
    """Kernels run on the current device, whatever their tensors are on."""
    current = torch.cuda.current_device()
    if device.index not in (None, current):
        raise UserError(
            f"the model is on {device}, and the current device is cuda:{current}. "
            f"Call torch.cuda.set_device({device.index}) first, as launchers' local ranks do."
        )


def _call_of(table: PageTable, q: Tensor, keys: Tensor, values: Tensor, scale: float, soft_cap: float | None) -> Call:
    heads_and_dims = (q.shape[1], keys.shape[1], keys.shape[2], values.shape[2])
    return Call(*heads_and_dims, q.dtype, keys.dtype, scale, soft_cap, table.v_is_prefix_of_k)
