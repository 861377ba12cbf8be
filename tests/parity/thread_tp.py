"""Tensor parallelism for ranks as threads: attention is cut as DeepSpeed's AutoTP cuts it, all else stays whole.

    q, k, v of all heads -- rows of this rank --> own heads -> attention -> o_proj, columns of own heads -> partial sums
      -> all_gather over the replica (a topology has no tp axis) -> those of this rank's tp group are added

Linear attention is cut in the same way, by the rows of each `nn.Linear`; its convolution and its decays stay whole.

MLPs and experts, the larger part of AutoTP, have no say in what cpinfer does.

Letters: T tokens of this rank, C hidden dims.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import parse_config
from cpinfer.layout.grid import RankGrid
from cpinfer.models.kv_expansion import expand_kv_heads
from prompt_splits import short_prompts_split

T = TypeVar("T")

# Latents, their projections down, norms of heads and sinks stay whole on every rank, as under AutoTP.
PROJECTIONS_TO_HEADS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj")
PROJECTIONS_FROM_HEADS = ("o_proj", "c_proj", "out_proj")


def on_ranks(
    model: Any, grid: RankGrid, body: Callable[[cpinfer.Engine], T], *, split: bool = True, **config: Any
) -> list[T]:
    """What `body(engine)` returns on every rank of `grid`, in rank order; each has its shard of a copy of `model`.

    Where there are pcp ranks some prompt is split over them, if it is not to be without a `split`.
    """
    parsed = parse_config(
        {
            "dtype": "float32",
            "tensor_parallel": {"tp_size": grid.tp_size},
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
            **config,
        }
    )

    def run(topology: cpinfer.Topology) -> T:
        with cpinfer.attach(shard_attention(model, topology), topology, parsed) as engine:
            return body(engine)

    if not split:
        return run_ranks(grid, run)
    with short_prompts_split() as num_split:
        found = run_ranks(grid, run)
    assert any(num_split) or grid.pcp_size == 1, "every prompt was dealt to a rank whole"
    return found


def shard_attention(model: Any, topology: cpinfer.Topology) -> Any:
    """A copy of `model` that computes this rank's heads; K and V heads are copied first where tp exceeds them."""
    model = copy.deepcopy(model)
    tp_size, tp_rank = topology.grid.tp_size, topology.coords.tp_rank
    if tp_size == 1:
        return model
    expand_kv_heads(model, tp_size)
    for attention in [module for module in model.modules() if _is_attention(module)]:
        for name, linear in list(attention.named_children()):
            if name in PROJECTIONS_TO_HEADS:
                keep = _even_part(range(linear.out_features), tp_size, tp_rank)
                setattr(attention, name, _rows_of(linear, keep))
            elif name == "c_attn":  # fused: queries of all heads, then the one K and V, which every rank keeps
                keep = _even_part(range(attention.embed_dim), tp_size, tp_rank)
                setattr(attention, name, _rows_of(linear, [*keep, *range(attention.embed_dim, linear.out_features)]))
            elif name in PROJECTIONS_FROM_HEADS and isinstance(linear, nn.Linear):
                setattr(attention, name, RowParallelLinear(linear, topology))
            elif name.startswith("in_proj"):
                _cut_rows(attention, name, tp_size, tp_rank)
    return model


def _cut_rows(parent: nn.Module, name: str, tp_size: int, tp_rank: int) -> None:
    child = parent.get_submodule(name)
    if isinstance(child, nn.Linear):
        setattr(parent, name, _rows_of(child, _even_part(range(child.out_features), tp_size, tp_rank)))
    for inner, _ in list(child.named_children()):
        _cut_rows(child, inner, tp_size, tp_rank)


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are dealt over the tp ranks. `[1, T, own inputs]` to `[1, T, C]`, the same on all."""

    def __init__(self, linear: nn.Linear, topology: cpinfer.Topology) -> None:
        super().__init__()
        keep = _even_part(range(linear.in_features), topology.grid.tp_size, topology.coords.tp_rank)
        self.weight = nn.Parameter(linear.weight[:, keep], requires_grad=False)
        self.bias = linear.bias
        self._topology = topology

    def forward(self, x: Tensor) -> Tensor:
        total = self._sum_over_tp(F.linear(x, self.weight))
        return total if self.bias is None else total + self.bias

    def _sum_over_tp(self, part: Tensor) -> Tensor:
        grid, replica = self._topology.grid, self._topology.replica
        num_tokens = part.shape[1]
        # Ranks of one tp group have the same tokens, those of the others not even as many.
        longest = int(replica.all_gather(torch.tensor(num_tokens)).max()) if grid.pcp_size > 1 else num_tokens
        parts = replica.all_gather(F.pad(part, (0, 0, 0, longest - num_tokens)))
        # The replica is in rank order, tp fastest.
        own = parts.view(grid.pcp_size, grid.tp_size, *parts.shape[1:])[self._topology.coords.pcp_rank]
        return own.sum(dim=0)[:, :num_tokens]


def _is_attention(module: Any) -> bool:
    # GPT-BigCode's MLP has a c_proj too.
    return hasattr(module, "o_proj") or hasattr(module, "c_attn") or hasattr(module, "conv1d")


def _even_part(of: Sequence[int], size: int, rank: int) -> Sequence[int]:
    length, rest = divmod(len(of), size)
    assert rest == 0, f"{len(of)} rows or columns do not divide over tp={size}"
    return of[rank * length : (rank + 1) * length]


def _rows_of(linear: nn.Linear, keep: Sequence[int]) -> nn.Linear:
    cut = nn.Linear(linear.in_features, len(keep), bias=linear.bias is not None, device="meta")
    cut.weight = nn.Parameter(linear.weight[list(keep)], requires_grad=False)
    if linear.bias is not None:
        cut.bias = nn.Parameter(linear.bias[list(keep)], requires_grad=False)
    return cut
