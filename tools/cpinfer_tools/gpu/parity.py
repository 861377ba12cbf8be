"""Stage parity: kernels and layouts against attention as it is defined, on the same inputs.

- every kind of call (GQA, latents, expanded latents) on ragged rows, some without keys, some sharing keys: out and lse
  against float32, over keys in fp8 too, where such are attended to
- every legal layout of up to 8 ranks, played by threads, through prefill, context, decode and the exchanges
- packing and merging of states, and copies of rows, the Triton kernels against torch
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend, AttentionNeeds, LayerKind
from cpinfer.attention.backends.flashinfer.backend import FlashInferBackend, unfit
from cpinfer.attention.cascade import plan_cascade
from cpinfer.layout.advice import legal_layouts
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.attention import dense_attention
from cpinfer.ops.float8 import take_rows
from cpinfer.ops.row_copies import copy_rows
from cpinfer.ops.states import merge_packed, pack_by_place
from cpinfer_tools.gpu.attention_ranks import Case, Tampering, run_case
from cpinfer_tools.gpu.stage import Figure, Found, Setting

# Of ||out - ref|| / ||ref||, and of the largest error of lse. float32 is for the smoke run on CPU.
OUT_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
LSE_TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-4}
# Of the largest error of an output of size 1, through a whole layout.
LAYOUT_TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-5}
BLOCK_SIZE = 16
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# name, query heads, layout
Kernel = tuple[str, int, KVLayout]
KERNELS: tuple[Kernel, ...] = (
    ("GQA 32/8 d128", 32, KVLayout(8, 128, 128)),
    ("GQA 64/8 d128", 64, KVLayout(8, 128, 128)),
    ("MQA 8/1 d128", 8, KVLayout(1, 128, 128)),
    ("GQA 32/8 d64", 32, KVLayout(8, 64, 64)),
    ("MLA 128 heads, latents", 128, KVLayout(1, 576, 512, v_is_prefix_of_k=True)),
    ("MLA 16 heads, expanded", 16, KVLayout(16, 192, 128)),
)
# Heads that FlashInfer has kernels for.
CUDA_SMOKE_KERNELS: tuple[Kernel, ...] = (
    ("GQA 4/2 d64", 4, KVLayout(2, 64, 64)),
    ("MLA 4 heads, expanded", 4, KVLayout(4, 192, 128)),
    ("MLA 4 heads, latents", 4, KVLayout(1, 576, 512, v_is_prefix_of_k=True)),
)
SMOKE_KERNELS: tuple[Kernel, ...] = (
    ("GQA 4/2 d8", 4, KVLayout(2, 8, 8)),
    ("MLA 4 heads, latents", 4, KVLayout(1, 12, 8, v_is_prefix_of_k=True)),
    ("MLA 4 heads, expanded", 4, KVLayout(4, 12, 8)),
)


def run(setting: Setting) -> Found:
    """All of it; every figure is an error with the tolerance as its target."""
    figures = [*_kernel_errors(setting), *_layout_errors(setting)]
    if setting.is_cuda:
        figures += [*_merge_errors(setting.device), *_copy_errors(setting.device)]
    return Found(tuple(figures))


def needs(setting: Setting) -> Iterator[AttentionNeeds]:
    """What the kernels of this stage are made for; layouts spread 8 query heads over one KV head to 8."""
    yield from (each for _, _, _, each in _kernels(setting))
    for num_kv_heads in (2,) if setting.is_smoke else (1, 8):
        layout = KVLayout(num_kv_heads, *(_head_dim(setting),) * 2)
        yield AttentionNeeds(setting.dtype, ((8, layout),))


def _kernels(setting: Setting) -> Iterator[tuple[str, int, KVLayout, AttentionNeeds]]:
    """Each kind of kernel that is not refused by name, with what it is over."""
    smoke = CUDA_SMOKE_KERNELS if setting.is_cuda else SMOKE_KERNELS
    for name, num_q_heads, layout in smoke if setting.is_smoke else KERNELS:
        # Every dtype is minutes of compilation: of heads one kernel shows that all are right.
        has_all = name in (KERNELS[0][0], SMOKE_KERNELS[0][0])
        half = (torch.bfloat16, torch.float16) if has_all else (torch.bfloat16,)
        for dtype in half if setting.is_cuda else (torch.float32,):
            has_fp8 = not setting.is_cuda or layout.v_is_prefix_of_k or (has_all and dtype == torch.bfloat16)
            for key_dtype in (dtype, *(FP8 if has_fp8 else ())):
                kinds = (LayerKind(), LayerKind(has_window=not layout.v_is_prefix_of_k))
                each = AttentionNeeds(dtype, ((num_q_heads, layout),), key_dtype, tuple(dict.fromkeys(kinds)))
                if _is_asked(each, layout, setting):
                    over = "" if key_dtype == dtype else f" over {str(key_dtype).removeprefix('torch.')}"
                    yield f"{name} {str(dtype).removeprefix('torch.')}{over}", num_q_heads, layout, each


def _kernel_errors(setting: Setting) -> Iterator[Figure]:
    for kind, num_q_heads, layout, each in _kernels(setting):
        backend = setting.backend(each)
        outs, lses = [], []
        for rows, num_slots in _rows(setting.is_smoke):
            if rows.causal and (layout.v_is_prefix_of_k or each.cache_dtype != each.dtype):
                continue  # prefill expands latents, and has its keys before they are cached
            out_error, lse_error = _error(backend, rows, num_slots, num_q_heads, layout, each, setting.device)
            outs.append(out_error)
            lses.append(lse_error)
        yield Figure(f"{kind}: out, relative", _worst(outs), "", target=OUT_TOLERANCE[each.dtype])
        yield Figure(f"{kind}: lse", _worst(lses), "", target=LSE_TOLERANCE[each.dtype])


def _head_dim(setting: Setting) -> int:
    """Of the layouts."""
    return 64 if setting.is_cuda else 8


def _is_asked(needs: AttentionNeeds, layout: KVLayout, setting: Setting) -> bool:
    """Not over fp8 what is expanded, which is never cached, nor what is refused by name."""
    if needs.cache_dtype == needs.dtype:
        return True
    is_expanded = layout.k_dim != layout.v_dim and not layout.v_is_prefix_of_k
    return not is_expanded and (not setting.is_cuda or unfit(setting.device, needs) is None)


def _rows(is_smoke: bool) -> Iterator[tuple[AttentionRows, int]]:
    """Batches of rows, and the slots of the store that they read: scattered blocks, ragged lengths, empty rows."""
    scale = 1 if is_smoke else 16
    q_lens = [1, 5 * scale, 1, 8 * scale, 3]
    kv_lens = [scale, 5 * scale, 0, 33 * scale + 1, 20 * scale + 7]
    shape = np.random.default_rng(0)
    num_blocks = sum(-(-n // BLOCK_SIZE) for n in kv_lens) + 30 * scale
    order = shape.permutation(num_blocks)

    def rows(q: list[int], kv: list[int], *, causal: bool) -> AttentionRows:
        ends = np.cumsum([-(-n // BLOCK_SIZE) for n in kv])
        tables = [order[end - -(-n // BLOCK_SIZE) : end] for end, n in zip(ends, kv, strict=True)]
        return AttentionRows.build(q, kv, tables, block_size=BLOCK_SIZE, causal=causal)

    slots = num_blocks * BLOCK_SIZE
    yield rows(q_lens, kv_lens, causal=True), slots
    yield rows(q_lens, kv_lens, causal=True).within(7), slots
    yield rows(q_lens, kv_lens, causal=False), slots
    decode = rows([1] * 5, kv_lens, causal=False)
    yield decode, slots
    yield decode.above(decode.kv_hi - 9), slots
    # Several tiles of queries per row, for which there are kernels of their own.
    wide = rows([10 * scale + 1, 40 * scale], [10 * scale + 1, 33 * scale + 40 * scale], causal=True)
    yield wide, slots
    yield wide.within(6 * scale + 4), slots
    yield replace(wide, causal=False), slots
    # Rows that share four blocks of one table, and go on in the last blocks.
    tables = [[*order[:4].tolist(), block] for block in order[-3:].tolist()]
    lens = [5 * BLOCK_SIZE - i for i in range(3)]
    yield AttentionRows.build([1] * 3, lens, tables, block_size=BLOCK_SIZE, causal=False), slots


def _error(
    backend: AttentionBackend,
    rows: AttentionRows,
    num_slots: int,
    num_q_heads: int,
    layout: KVLayout,
    needs: AttentionNeeds,
    device: torch.device,
) -> tuple[float, float]:
    """Relative error of out, largest error of lse, against float32 on the same rounded inputs."""
    generator = torch.Generator().manual_seed(rows.num_queries)
    q = 3 * torch.randn(num_q_heads, rows.num_queries, layout.k_dim, generator=generator)
    q = q.to(device, needs.dtype).transpose(0, 1)
    store = torch.randn(num_slots, layout.num_heads, layout.width, generator=generator).to(device, needs.cache_dtype)
    keys, values = store[..., : layout.k_dim], store[..., -layout.v_dim :]
    if layout.v_is_prefix_of_k:
        values = keys[..., : layout.v_dim]
    rows = rows.over(layout)
    scale = layout.k_dim**-0.5
    plan = backend.plan(rows) if rows.causal else plan_cascade(backend, rows, min_saved_keys=0)
    out, lse = plan.run(q, keys, values, scale=scale)
    first, want_out, want_lse = 0, [], []
    for row, q_len in enumerate(rows.q_lens.tolist()):
        slots = torch.from_numpy(rows.slots(row)).to(device)
        part, k, v = (x.float() for x in (q[first : first + q_len], take_rows(keys, slots), take_rows(values, slots)))
        state = dense_attention(part, k, v, scale=scale, causal=rows.causal, window=rows.window)
        want_out.append(state[0])
        want_lse.append(state[1])
        first += q_len
    ref, ref_lse = torch.cat(want_out), torch.cat(want_lse)
    same = (lse == ref_lse) | (lse - ref_lse).isfinite()  # -inf where it is -inf
    lse_error = torch.where(lse == ref_lse, 0.0, (lse - ref_lse).abs()).max().item() if bool(same.all()) else math.nan
    return float((out.float() - ref).norm() / ref.norm()), lse_error


def _layout_errors(setting: Setting) -> Iterator[Figure]:
    """One figure per number of ranks: the worst of its layouts."""
    lengths = (1, 17, 64, 130) if setting.is_smoke else (1, 17, 64, 129, 300)
    head_dim = _head_dim(setting)
    unchecked = AttentionNeeds(setting.dtype, ())

    def backend(inner: AttentionBackend) -> AttentionBackend:
        return FlashInferBackend(setting.device, unchecked) if setting.is_cuda else inner

    for num_ranks in (1, 2) if setting.is_smoke else range(1, 9):
        errors = []
        for num_kv_heads in (2,) if setting.is_smoke else (1, 2, 8):
            for option in legal_layouts(num_ranks, 8, num_kv_heads, dp_size=1) if _divides(8, num_ranks) else ():
                for chunk in (None, 64):
                    case = Case(
                        option.grid,
                        8,
                        num_kv_heads,
                        lengths,
                        block_size=BLOCK_SIZE,
                        head_dim=head_dim,
                        chunk=chunk,
                        dtype=setting.dtype,
                        device=setting.device,
                    )
                    errors.append(run_case(case, Tampering(backend=backend)).max_error)
        if errors:
            name = f"{len(errors) // 2} layouts of {num_ranks} rank(s), whole and in chunks: out"
            yield Figure(name, _worst(errors), "", target=LAYOUT_TOLERANCE[setting.dtype])


def _divides(num_q_heads: int, num_ranks: int) -> bool:
    """Other numbers of ranks have layouts too, without tp; they differ from these in nothing that heads can show."""
    return num_q_heads % num_ranks == 0 or num_ranks in (3, 6)


def _copy_errors(device: torch.device) -> Iterator[Figure]:
    """Rows as a step packs and stores them and as blocks are copied, on the device and by torch on CPU: no bit differs.

    fp8 into and out of half precision is torch's on both; within fp8, as all else, it is the kernel.
    """
    generator = torch.Generator().manual_seed(0)
    permuted = torch.randperm(200, generator=generator)
    for num_heads, k_dim, v_dim in ((8, 128, 128), (1, 576, 0), (3, 64, 32)):
        heads_first = torch.randn(num_heads, 300, k_dim + v_dim, generator=generator).transpose(0, 1)
        different = 0
        for src_dtype, dst_dtype in (
            (torch.bfloat16,) * 2,
            (FP8[0],) * 2,
            (torch.bfloat16, FP8[0]),
            (FP8[1], torch.bfloat16),
        ):
            for src_rows, dst_rows in ((None, permuted), (permuted, None), (permuted, permuted + 100)):
                found = []
                for place in (torch.device("cpu"), device):
                    src = heads_first.to(place, src_dtype)[: 200 if src_rows is None else 300]
                    dst = torch.zeros(300, num_heads + 1, k_dim + v_dim, device=place).to(dst_dtype)[:, 1:]
                    dims = [d for d in (k_dim, v_dim) if d]
                    copies = list(zip(torch.split(src, dims, dim=-1), torch.split(dst, dims, dim=-1), strict=True))
                    copy_rows(copies, *(None if rows is None else rows.to(place) for rows in (src_rows, dst_rows)))
                    found.append(dst.cpu().contiguous().view(torch.uint8))
                different += int((found[0] != found[1]).sum())
        name = f"rows of {num_heads} heads of {k_dim} and {v_dim} copied: bytes that differ from torch's"
        yield Figure(name, different, "", target=0)


def _merge_errors(device: torch.device) -> Iterator[Figure]:
    """The kernels of states against torch, on CPU; packing must give the same bits."""
    generator = torch.Generator().manual_seed(0)
    for wire in (torch.bfloat16, torch.float32):
        different, errors = 0, []
        for pcp_size, columns in ((4, 1), (2, 2), (1, 8)):
            out = torch.randn(8, 16, 128, generator=generator)
            lse = 3 * torch.randn(8, 16, generator=generator)
            lse[0, :4] = -torch.inf
            want = pack_by_place(out, lse, wire, pcp_size, columns)
            got = pack_by_place(out.to(device), lse.to(device), wire, pcp_size, columns)
            different += int((got.cpu().view(torch.uint8) != want.view(torch.uint8)).sum())
            merged, ref = merge_packed(got, 128), merge_packed(want, 128)
            errors += [_difference(a.cpu(), b) for a, b in zip(merged, ref, strict=True)]
        kind = str(wire).removeprefix("torch.")
        yield Figure(f"states packed as {kind}: bytes that differ from torch's", different, "", target=0)
        yield Figure(f"states merged from {kind}: largest error", _worst(errors), "", target=1e-5)


def _difference(a: Tensor, b: Tensor) -> float:
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())


def _worst(errors: list[float]) -> float:
    """max() would pass over a NaN."""
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)
