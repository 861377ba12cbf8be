"""Which of FlashInfer's kernels run a call, and which of its modules hold them: known before anything runs.

A module is what FlashInfer compiles at once, named by all that its kernels are made for. It holds both masks and every
number of heads, but one family, one pair of dtypes and head dims, windows or none, a soft cap or none.

    rows of the check at start --kind_of--> wrapper and family --module_of--> modules to compile

Everything that an engine asks for later is of a kind that its check asks for first, so these are all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.flashinfer.page_table import PageTable, page_table
from cpinfer.attention.backends.self_check import check_cases
from cpinfer.errors import UserError
from cpinfer.refusals import refuse

Family = Literal["fa2", "fa3"]

# Head dims (keys, values) that kernels exist for; of latent layouts (latent and rotated key, latent).
HEAD_DIMS = frozenset({(64, 64), (128, 128), (256, 256), (192, 128)})
LATENT_DIMS = frozenset({(576, 512)})
# The library takes no older GPU; before Ampere nothing multiplies in bfloat16.
MIN_CAPABILITY, MIN_BF16_CAPABILITY = (7, 5), (8, 0)
# FlashAttention-3 style gives each head a tile of so many queries of a row, and splits no keys: with fewer queries most
# of a tile, or of the SMs, has nothing to do. FlashAttention-2 style fills tiles with the heads of a group.
FA3_TILE_QUERIES = 128


class Chip(NamedTuple):
    """What kernels are chosen by. `has_fa3_prefill`: FlashAttention-3's kernels of prefill can be compiled."""

    capability: tuple[int, int] = MIN_BF16_CAPABILITY
    has_fa3_prefill: bool = False

    @property
    def is_hopper(self) -> bool:
        return self.capability[0] == 9


@dataclass(frozen=True)
class Call:
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


class Kind(NamedTuple):
    """Wrappers of one kind can stand in for each other."""

    name: Literal["prefill", "decode", "latent"]
    family: Family
    tensor_cores: bool = False


class KernelModule(NamedTuple):
    """One of FlashInfer's modules. Of latents `k_dim` counts the rotated key, `v_dim` is the latent."""

    name: Literal["batch_prefill", "batch_decode", "batch_mla"]
    family: Family
    dtype: torch.dtype
    kv_dtype: torch.dtype
    k_dim: int
    v_dim: int
    has_window: bool = False
    has_cap: bool = False

    def __str__(self) -> str:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((self.dtype, self.kv_dtype))]
        dims = dict.fromkeys((self.k_dim, self.v_dim))
        of = ["windows"] * self.has_window + ["a soft cap"] * self.has_cap
        return f"{self.name} {self.family} {' over '.join(dtypes)} of {'/'.join(map(str, dims))}" + (
            f" with {' and '.join(of)}" if of else ""
        )


def kind_of(table: PageTable, call: Call, chip: Chip) -> Kind:
    """What runs these rows in this call."""
    if call.is_latent:
        return Kind("latent", "fa3" if chip.is_hopper else "fa2")
    # Kernels for one query per row, and FlashAttention-3 over pages, exist for equal head dims alone.
    is_square = call.k_dim == call.v_dim
    if table.is_decode and is_square:
        return Kind("decode", "fa2", tensor_cores=call.num_q_heads > call.num_kv_heads)
    takes_fa3 = chip.is_hopper and chip.has_fa3_prefill and is_square and call.kv_dtype == call.dtype
    is_wide = table.num_queries > FA3_TILE_QUERIES * table.num_rows
    return Kind("prefill", "fa3" if takes_fa3 and is_wide else "fa2")


def module_of(kind: Kind, table: PageTable, call: Call) -> KernelModule:
    """Where the kernels are. Decode on tensor cores is a prefill of one query."""
    made_for = (call.dtype, call.kv_dtype, call.k_dim, call.v_dim)
    if kind.name == "latent":
        return KernelModule("batch_mla", kind.family, *made_for)
    name: Literal["batch_prefill", "batch_decode"] = "batch_prefill"
    if kind.name == "decode" and not kind.tensor_cores:
        name = "batch_decode"
    return KernelModule(name, kind.family, *made_for, table.window_left >= 0, bool(call.soft_cap))


def kernel_modules(needs: AttentionNeeds, chip: Chip) -> tuple[KernelModule, ...]:
    """All modules that a model of these needs asks for on such a GPU, each once, in a fixed order."""
    found: dict[KernelModule, None] = {}
    for case in check_cases(needs):
        table, layout = page_table(case.rows), case.layout
        heads_and_dims = (case.num_q_heads, layout.num_heads, layout.k_dim, layout.v_dim)
        call = Call(*heads_and_dims, needs.dtype, case.key_dtype, 1.0, case.soft_cap, layout.v_is_prefix_of_k)
        found[module_of(kind_of(table, call, chip), table, call)] = None
    return tuple(found)


def refused(needs: AttentionNeeds, capability: tuple[int, int], name: str) -> UserError | None:
    """What no kernel exists for on a GPU, `name`, of this compute capability; None when all do."""
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return refuse("flashinfer_dtype", f'backend="flashinfer" with {dtype_name(needs.dtype)}')
    if capability < (MIN_BF16_CAPABILITY if needs.dtype == torch.bfloat16 else MIN_CAPABILITY):
        return refuse("flashinfer_capability", f"{name}, compute capability {'.'.join(map(str, capability))}")
    for _, layout in needs.calls:
        known = LATENT_DIMS if layout.v_is_prefix_of_k else HEAD_DIMS
        if (layout.k_dim, layout.v_dim) not in known:
            return refuse("flashinfer_head_dim", f"keys of {layout.k_dim} and values of {layout.v_dim} per head")
        cached = needs.cache_dtype or needs.dtype
        if layout.v_is_prefix_of_k and cached != needs.dtype:
            has_kernel = (cached, needs.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
            if not has_kernel or capability[0] != 9:
                what = f"latents cached in {dtype_name(cached)} under {dtype_name(needs.dtype)}"
                return refuse("flashinfer_fp8_latents", f"{what} on {name}")
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
