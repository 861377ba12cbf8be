"""One of FlashInfer's wrappers, what it works in and what its plans are staged in.

    float workspace   scratch of one launch: shared by all that run on one stream, of the size that the largest wants
    int workspace     where the plan itself lies until its last launch: of one wrapper alone
    pinned memory     what a plan is copied from while the host goes on: of one wrapper alone, as ours is

FlashInfer makes the last two of 8 MiB each. Plans that are replayed are many (one for each size, window and call) and
small, so they get as much as they can need; those of steps are few and of any size, and keep what they were made with.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpinfer.attention.backends.base import FixedSize
from cpinfer.attention.backends.flashinfer.kernels import Call, Kind
from cpinfer.attention.backends.flashinfer.limits import has_latent_room, replayed_int_bytes
from cpinfer.attention.backends.flashinfer.page_table import PageTable
from cpinfer.layout.rows import Int32Array


class Wrapper:
    """A wrapper of a kind, over a float workspace. `fixed`: for plans of this size, that `call` makes and replays."""

    def __init__(
        self, library: Any, kind: Kind, call: Call, workspace: Tensor, num_sms: int, fixed: FixedSize | None = None
    ) -> None:
        self._kind = kind
        self._staging = Staging(workspace.device)
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
            # From 0.7 on plans take one object, and say what run will return; runs take latents and rotated keys as
            # one tensor, as they lie in the store. How 0.6 is called is deprecated there.
            self._metadata = None
            if "metadata" in inspect.signature(self._wrapper.plan).parameters:
                self._metadata = library.mla.MLAPlanMetadata
        if fixed is not None and kind.name != "latent":  # whose wrapper takes no other
            heads = (call.num_q_heads, call.num_kv_heads, call.v_dim)
            room = torch.empty(
                replayed_int_bytes(*heads, fixed.num_rows, num_sms), dtype=torch.uint8, device=workspace.device
            )
            self._wrapper.reset_workspace_buffer(workspace, room)

    def plan(self, table: PageTable, call: Call) -> None:
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
            rows = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_len_arr": kv_lens}
            metadata = self._metadata
            self._wrapper.plan(
                **(rows if metadata is None else {"metadata": metadata.csr(**rows), "lse_mode": "base2"}),
                num_heads=call.num_q_heads,
                head_dim_ckv=call.v_dim,
                head_dim_kpe=call.k_dim - call.v_dim,
                page_size=table.page_size,
                causal=False,
                sm_scale=call.scale,
                **dtypes,
            )
        self._staging.release()

    def run(
        self, page_size: int, call: Call, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """Into `out [T, H, V]` and `lse [T, H]`, to base 2."""
        paged_keys, paged_values = (x.view(-1, page_size, *x.shape[1:]) for x in (keys, values))
        if self._kind.name != "latent":
            self._wrapper.run(q, (paged_keys, paged_values), out=out, lse=lse, return_lse=True)
            return
        latents = paged_keys[:, :, 0]  # whose first columns are the values
        if self._metadata is not None:
            inputs = {"query": q, "kv_cache": latents}
        else:
            inputs = {
                "q_nope": q[..., : call.v_dim],
                "q_pe": q[..., call.v_dim :],
                "ckv_cache": latents[..., : call.v_dim],
                "kpe_cache": latents[..., call.v_dim :],
            }
        scales = {} if call.kv_dtype == call.dtype else {"ckv_scale": 1.0, "kpe_scale": 1.0}
        self._wrapper.run(**inputs, **scales, out=out, lse=lse, return_lse=True)


class Staging:
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


def _check_latent(table: PageTable, call: Call) -> None:
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


def _graph_buffers(fixed: FixedSize, device: torch.device) -> list[Tensor]:
    """Where plans of a fixed size lie: `qo_indptr`, `kv_indptr`, `kv_indices`, and a length for each row."""
    sizes = (fixed.num_rows + 1, fixed.num_rows + 1, fixed.num_pages, fixed.num_rows)
    return [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]


def _named(buffers: list[Tensor] | None, *names: str) -> dict[str, Any]:
    """Arguments of a wrapper's constructor that fix its memory; none where it may move."""
    return {} if buffers is None else {"use_cuda_graph": True, **dict(zip(names, buffers, strict=False))}
