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
import inspect
import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionNeeds, FixedSize
from cpinfer.attention.backends.flashinfer.limits import has_latent_room, replayed_workspace_bytes, workspace_bytes
from cpinfer.attention.backends.flashinfer.page_table import PageTable, page_table
from cpinfer.attention.backends.flashinfer.toolchain import cuda_home, missing_for_fa3, missing_tools
from cpinfer.attention.backends.self_check import check_backend
from cpinfer.errors import BackendFaultError, UserError
from cpinfer.layout.rows import AttentionRows, Int32Array
from cpinfer.ops.states import State
from cpinfer.refusals import refuse

LN_2 = math.log(2)
# Head dims (keys, values) that kernels exist for; of latent layouts (latent and rotated key, latent).
HEAD_DIMS = frozenset({(64, 64), (128, 128), (256, 256), (192, 128)})
LATENT_DIMS = frozenset({(576, 512)})
# FlashAttention-3 style gives each head a tile of so many queries of a row, and splits no keys: with fewer queries most
# of a tile, or of the SMs, has nothing to do. FlashAttention-2 style fills tiles with the heads of a group.
FA3_TILE_QUERIES = 128


@dataclass(frozen=True)
class _Call:
    """What FlashInfer plans for beside the rows: layers that agree in it share a plan."""

    num_q_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    soft_cap: float | None
    is_latent: bool


@dataclass(frozen=True)
class _Kind:
    """Wrappers of one kind can stand in for each other."""

    name: Literal["prefill", "decode", "latent"]
    family: str
    tensor_cores: bool = False


def unfit(device: torch.device, needs: AttentionNeeds) -> UserError | None:
    """Why FlashInfer cannot do what is needed; None when it can."""
    if device.type != "cuda":
        return refuse("flashinfer_device", f'backend="flashinfer" on {device.type}')
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return refuse("flashinfer_dtype", f'backend="flashinfer" with {_name(needs.dtype)}')
    for _, layout in needs.calls:
        known = LATENT_DIMS if layout.v_is_prefix_of_k else HEAD_DIMS
        if (layout.k_dim, layout.v_dim) not in known:
            return refuse("flashinfer_head_dim", f"keys of {layout.k_dim} and values of {layout.v_dim} per head")
        cached = needs.cache_dtype or needs.dtype
        if layout.v_is_prefix_of_k and cached != needs.dtype:
            has_kernel = (cached, needs.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
            if not has_kernel or torch.cuda.get_device_capability(device)[0] != 9:
                what = f"latents cached in {_name(cached)} under {_name(needs.dtype)}"
                return refuse("flashinfer_fp8_latents", f"{what} on {torch.cuda.get_device_name(device)}")
    if importlib.util.find_spec("flashinfer") is None:
        return UserError(
            'backend="flashinfer" needs the package flashinfer-python. '
            'Run `pip install "cpinfer[flashinfer]"`, or set backend to "torch".'
        )
    return None


def make(device: torch.device, needs: AttentionNeeds) -> FlashInferBackend:
    """The backend, when it has passed its check."""
    check_flashinfer(device, needs)
    return FlashInferBackend(device, needs)


@functools.cache
def check_flashinfer(device: torch.device, needs: AttentionNeeds) -> None:
    """BackendFaultError when FlashInfer is wrong in what is needed. Once per process: every phase makes an engine."""
    missing = " and ".join(missing_tools(cuda_home()))
    if missing:
        warnings.warn(f"FlashInfer compiles its kernels when they are first used, and lacks {missing}", stacklevel=2)
    try:
        check_backend(FlashInferBackend(device, needs), needs, device)
    except BackendFaultError as error:
        if not missing:
            raise
        raise BackendFaultError(f"{error} To compile its kernels FlashInfer lacks {missing}.") from error


class FlashInferBackend:
    """Plans for one device. Earlier plans stay valid, for as long as they are held. Not for several threads at once."""

    name = "flashinfer"
    min_saved_keys: int | None = None  # what a second launch and a merge cost beside keys has not been measured

    def __init__(self, device: torch.device, needs: AttentionNeeds, library: Any = None) -> None:
        self._device = device
        self._library = importlib.import_module("flashinfer") if library is None else library
        self._is_hopper, self._lacks_fa3, self._num_sms = False, False, 0
        if device.type == "cuda":
            _check_is_current(device)
            properties = torch.cuda.get_device_properties(device)
            self._is_hopper, self._num_sms = properties.major == 9, properties.multi_processor_count
            self._lacks_fa3 = self._is_hopper and _lacks_fa3()
        self._workspace = self._new_workspace(workspace_bytes(needs, self._num_sms) if self._num_sms else 1024)
        self._free: dict[_Kind, list[_Wrapper]] = {}

    def plan(self, rows: AttentionRows) -> FlashInferPlan:
        return FlashInferPlan(self, page_table(rows))

    def fixed_plan(self, size: FixedSize, *, single_tokens: bool) -> FlashInferPlan:
        return FlashInferPlan(self, None, size, single_tokens=single_tokens)

    def wrapper_for(self, plan: FlashInferPlan, table: PageTable, call: _Call, fixed: FixedSize | None) -> _Wrapper:
        """A wrapper of the right kind, `plan`'s until it is gone."""
        kind = self._kind(table, call)
        if fixed is not None:
            return _Wrapper(self._library, kind, self._workspace_for(kind, call, fixed), fixed)
        free = self._free.setdefault(kind, [])
        wrapper = free.pop() if free else _Wrapper(self._library, kind, self._workspace)
        weakref.finalize(plan, free.append, wrapper).atexit = False
        return wrapper

    def on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _workspace_for(self, kind: _Kind, call: _Call, fixed: FixedSize) -> Tensor:
        """Graphs keep what they were captured with, so a plan of many rows brings memory of its own."""
        if kind.name == "latent" or not kind.tensor_cores or not self._num_sms:
            return self._workspace
        shape = (call.num_q_heads, call.num_kv_heads, call.v_dim, fixed.num_rows)
        needed = replayed_workspace_bytes(*shape, num_sms=self._num_sms)
        return self._workspace if needed <= len(self._workspace) else self._new_workspace(needed)

    def _new_workspace(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def _kind(self, table: PageTable, call: _Call) -> _Kind:
        if call.is_latent:
            return _Kind("latent", "fa3" if self._is_hopper else "fa2")
        # Kernels for one query per row, and FlashAttention-3 over pages, exist for equal head dims alone.
        is_square = call.k_dim == call.v_dim
        if table.is_decode and is_square:
            return _Kind("decode", "fa2", tensor_cores=call.num_q_heads > call.num_kv_heads)
        takes_fa3 = self._is_hopper and not self._lacks_fa3 and is_square and call.kv_dtype == call.dtype
        is_wide = table.num_queries > FA3_TILE_QUERIES * table.num_rows
        return _Kind("prefill", "fa3" if takes_fa3 and is_wide else "fa2")


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
        self._wrappers: dict[_Call, _Wrapper] = {}
        self._results: dict[_Call, State] = {}
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

    def _room(self, call: _Call, q: Tensor) -> State:
        if call not in self._results:
            T, H = len(q), call.num_q_heads
            out = q.new_zeros(T, H, call.v_dim)
            self._results[call] = out, torch.full((T, H), -torch.inf, dtype=torch.float32, device=q.device)
        return self._results[call]


class _Wrapper:
    """One of FlashInfer's wrappers, with the memory its plans are staged in."""

    def __init__(self, library: Any, kind: _Kind, workspace: Tensor, fixed: FixedSize | None = None) -> None:
        self._kind = kind
        self._staging = _Staging(workspace.device)
        buffers = None if fixed is None else _graph_buffers(fixed, workspace.device)
        if kind.name == "prefill":
            self._wrapper = library.BatchPrefillWithPagedKVCacheWrapper(
                workspace,
                kv_layout="NHD",
                backend=kind.family,
                **_named(buffers, "qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf")
                | _named(buffers and buffers[3:], "paged_kv_last_page_len_buf"),
            )
        elif kind.name == "decode":
            names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
            self._wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
                workspace,
                kv_layout="NHD",
                use_tensor_cores=kind.tensor_cores,
                backend=kind.family,
                **_named(buffers and buffers[1:], *names),
            )
        else:
            self._wrapper = library.BatchMLAPagedAttentionWrapper(
                workspace,
                backend=kind.family,
                **_named(buffers, "qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"),
            )

    def plan(self, table: PageTable, call: _Call) -> None:
        """Hand the rows to FlashInfer. Pages go to the device here; the rest it reads on the host first."""
        arrays = (table.kv_indices, table.kv_indptr, table.qo_indptr, table.last_page_len, table.kv_lens)
        staged, kv_indptr, qo_indptr, last_page_len, kv_lens = self._staging.hold(arrays)
        kv_indices = staged.to(self._staging.device, non_blocking=True)
        dtypes = {"q_data_type": call.dtype, "kv_data_type": call.kv_dtype}
        if self._kind.name == "prefill":
            self._wrapper.plan(
                qo_indptr,
                kv_indptr,
                kv_indices,
                last_page_len,
                call.num_q_heads,
                call.num_kv_heads,
                call.k_dim,
                table.page_size,
                head_dim_vo=call.v_dim,
                causal=table.causal,
                sm_scale=call.scale,
                window_left=table.window_left,
                logits_soft_cap=call.soft_cap,
                **dtypes,
            )
        elif self._kind.name == "decode":
            self._wrapper.plan(
                kv_indptr,
                kv_indices,
                last_page_len,
                call.num_q_heads,
                call.num_kv_heads,
                call.k_dim,
                table.page_size,
                sm_scale=call.scale,
                logits_soft_cap=call.soft_cap,
                **dtypes,
            )
        else:
            _check_latent(table, call)
            # From 0.7 on a plan says what run will return.
            lse_mode = "lse_mode" in inspect.signature(self._wrapper.plan).parameters
            self._wrapper.plan(
                qo_indptr=qo_indptr,
                kv_indptr=kv_indptr,
                kv_indices=kv_indices,
                kv_len_arr=kv_lens,
                num_heads=call.num_q_heads,
                head_dim_ckv=call.v_dim,
                head_dim_kpe=call.k_dim - call.v_dim,
                page_size=table.page_size,
                causal=False,
                sm_scale=call.scale,
                **dtypes,
                **({"lse_mode": "base2"} if lse_mode else {}),
            )
        self._staging.release()

    def run(
        self, page_size: int, call: _Call, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """Into `out [T, H, V]` and `lse [T, H]`, to base 2."""
        paged_keys, paged_values = (x.view(-1, page_size, *x.shape[1:]) for x in (keys, values))
        if self._kind.name != "latent":
            self._wrapper.run(q, (paged_keys, paged_values), out=out, lse=lse, return_lse=True)
            return
        scales = {} if call.kv_dtype == call.dtype else {"ckv_scale": 1.0, "kpe_scale": 1.0}
        self._wrapper.run(
            q_nope=q[..., : call.v_dim],
            q_pe=q[..., call.v_dim :],
            ckv_cache=paged_values[:, :, 0],
            kpe_cache=paged_keys[:, :, 0, call.v_dim :],
            out=out,
            lse=lse,
            return_lse=True,
            **scales,
        )


class _Staging:
    """Pinned memory for the arrays of one plan at a time: they may be copied to the device while the host goes on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._room = torch.empty(0, dtype=torch.int32)
        self._copied: Any = None

    def hold(self, arrays: Sequence[Int32Array]) -> list[Tensor]:
        """The arrays, in this memory, until `release` and the next call. Waits for the copies of the last ones."""
        if self._copied is not None:
            self._copied.synchronize()
        ends = np.cumsum([len(array) for array in arrays]).tolist()
        if ends[-1] > len(self._room):
            self._room = torch.empty(2 * ends[-1], dtype=torch.int32, pin_memory=self._is_cuda)
        parts = [self._room[end - len(array) : end] for end, array in zip(ends, arrays, strict=True)]
        for part, array in zip(parts, arrays, strict=True):
            part.numpy()[:] = array
        return parts

    def release(self) -> None:
        """All copies that were asked for are on the stream by now."""
        if self._is_cuda:
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()


def _lacks_fa3() -> bool:
    """Whether FlashAttention-3's prefill kernels cannot be compiled: then FlashAttention-2's run, and that is said."""
    missing = missing_for_fa3(cuda_home())
    if missing is not None:
        warnings.warn(
            "prefill runs on FlashAttention-2, which is slower on Hopper: to compile its kernels of FlashAttention-3 "
            f"FlashInfer lacks {missing}",
            stacklevel=2,
        )
    return missing is not None


def _check_is_current(device: torch.device) -> None:
    """Kernels run on the current device, whatever their tensors are on."""
    current = torch.cuda.current_device()
    if device.index not in (None, current):
        raise UserError(
            f"the model is on {device}, and the current device is cuda:{current}. "
            f"Call torch.cuda.set_device({device.index}) first, as launchers' local ranks do."
        )


def _check_latent(table: PageTable, call: _Call) -> None:
    """Latents are attended to in decode and as context, where no mask is needed: prefill expands them."""
    if call.soft_cap is not None or table.window_left >= 0:
        raise ValueError("FlashInfer's latent attention has neither windows nor soft caps")
    if not has_latent_room(table.qo_indptr, call.num_q_heads):
        raise ValueError(
            f"{table.num_queries} queries of {call.num_q_heads} heads are more than a plan of FlashInfer's latent "
            "attention has room for. Lower max_num_batched_tokens."
        )
    # Its causal kernels leave out a key where tiles of queries and keys end together, for some numbers of heads:
    # 0.7.2 refuses such plans (`_validate_fa_causal_tile_bound`), 0.6.18 runs them.
    if table.causal and not table.is_decode:
        raise ValueError("latent attention of several queries per row is not causal here")


def _call_of(table: PageTable, q: Tensor, keys: Tensor, values: Tensor, scale: float, soft_cap: float | None) -> _Call:
    heads_and_dims = (q.shape[1], keys.shape[1], keys.shape[2], values.shape[2])
    return _Call(*heads_and_dims, q.dtype, keys.dtype, scale, soft_cap, table.v_is_prefix_of_k)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _graph_buffers(fixed: FixedSize, device: torch.device) -> list[Tensor]:
    """Where plans of a fixed size lie: `qo_indptr`, `kv_indptr`, `kv_indices`, and a length for each row."""
    sizes = (fixed.num_rows + 1, fixed.num_rows + 1, fixed.num_pages, fixed.num_rows)
    return [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]


def _named(buffers: list[Tensor] | None, *names: str) -> dict[str, Any]:
    """Arguments of a wrapper's constructor that fix its memory; none where it may move."""
    return {} if buffers is None else {"use_cuda_graph": True, **dict(zip(names, buffers, strict=False))}
