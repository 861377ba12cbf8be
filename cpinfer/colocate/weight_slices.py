"""Tensor parallelism for the length of a phase, for weights that a trainer has sharded and no framework slices.

    q, k, v; gate, up    rows of this rank's heads (a KV head on several ranks where tp exceeds them); part of the MLP:
                         a ColumnParallelLinear, as Megatron and vLLM call it
    o; down              columns of the same, partial sums added over the tp axis: a RowParallelLinear
    linear attention     the same of its projections, where its key heads divide over the ranks

Projections are put in the place of the trainer's modules, which come back as they were. All else stays whole on every
rank: embeddings, norms, latents and their projections down, routers and experts, the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpinfer.comm.axis import AxisComm
from cpinfer.models.adapters import refuse_adapters_under_tp
from cpinfer.models.decoder_layers import decoder_layers
from cpinfer.models.gated_delta_net import LinearHeads, is_gated_delta_net
from cpinfer.models.linear_cuts import SplitLinear
from cpinfer.models.local_weights import shape_in_use
from cpinfer.models.spec import ModelSpec
from cpinfer.refusals import refuse

_QUERIES = ("q_proj", "q_b_proj", "kv_b_proj")  # of one kind with the queries: a latent's K and V have a head for each
_KEYS = ("k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class SlicedProjection:
    """A projection, and the parts `[start, stop)` of its rows, or the one of its columns, that this rank keeps."""

    parent: nn.Module
    name: str
    parts: tuple[slice, ...]
    sums: bool

    @property
    def linear(self) -> nn.Linear:
        module = getattr(self.parent, self.name)
        assert isinstance(module, nn.Linear)
        return module

    def kept(self, tp: AxisComm) -> nn.Module:
        """The module that takes the projection's place; its weights, whole at this moment, are copied in part."""
        weight, bias = self.linear.weight, self.linear.bias
        if self.sums:
            return RowParallelLinear(_copy(weight[:, self.parts[0]]), None if bias is None else _copy(bias), tp)
        kept = [
            ColumnParallelLinear(_copy(weight[part]), None if bias is None else _copy(bias[part]))
            for part in self.parts
        ]
        return kept[0] if len(kept) == 1 else SplitLinear(kept)


class ColumnParallelLinear(nn.Module):
    """`[..., C]` to this rank's outputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(ColumnParallelLinear):
    """This rank's inputs to `[..., C]`, the same on all tp ranks. One all-reduce over tp."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tp: AxisComm) -> None:
        super().__init__(weight, bias)
        self._tp = tp

    def forward(self, x: Tensor) -> Tensor:
        total = self._tp.all_reduce(F.linear(x, self.weight))
        return total if self.bias is None else total + self.bias


def sliced_projections(model: Any, spec: ModelSpec, tp_size: int, tp_rank: int) -> list[list[SlicedProjection]]:
    """For each layer, what tensor parallelism slices of it. UnsupportedError where that cannot be done."""
    if tp_size > 1 and spec.why_no_tp is not None:
        raise refuse("family_tp", f'model_type "{spec.family}" with tp={tp_size} ({spec.why_no_tp})')
    refuse_adapters_under_tp(model)
    found = [list(_sliced_projections_of(layer, spec, tp_size, tp_rank)) for layer in decoder_layers(model)]
    for index, layer in enumerate(found):
        names = {projection.name for projection in layer}
        if index not in spec.linear_layers and not ("o_proj" in names and names & {"q_proj", "q_b_proj"}):
            raise refuse("lent_tp", f'model_type "{spec.family}", layer {index}')
    return found


def _sliced_projections_of(layer: nn.Module, spec: ModelSpec, tp_size: int, tp_rank: int) -> Iterator[SlicedProjection]:
    heads = spec.heads(tp_size)
    q_heads, kv_heads, mine = heads.q_heads(tp_rank), heads.kv_heads(tp_rank), range(tp_rank, tp_rank + 1)
    for parent in layer.modules():
        linears = {name: child for name, child in parent.named_children() if isinstance(child, nn.Linear)}
        if spec.states is not None and is_gated_delta_net(parent):
            if spec.states.divides(tp_size):  # else whole on every rank, which is right as well
                channels = LinearHeads.of(spec.states, tp_size, tp_rank).channels
                for name, linear in linears.items():
                    dim = int(name == "out_proj")
                    parts = channels if name == "in_proj_qkv" else _part(linear, dim, mine, tp_size)
                    yield SlicedProjection(parent, name, parts, dim == 1)
        elif "o_proj" in linears:
            for name in linears:
                if name in _QUERIES:
                    yield SlicedProjection(parent, name, _part(linears[name], 0, q_heads, heads.num_q_heads), False)
                elif name in _KEYS:
                    yield SlicedProjection(parent, name, _part(linears[name], 0, kv_heads, heads.num_kv_heads), False)
            yield SlicedProjection(parent, "o_proj", _part(linears["o_proj"], 1, q_heads, heads.num_q_heads), True)
        elif all(name in linears for name in _MLP):
            inner = shape_in_use(linears["down_proj"].weight)[1]
            if inner % tp_size == 0:  # else whole on every rank, which is right as well
                for name in _MLP:
                    dim = int(name == "down_proj")
                    yield SlicedProjection(parent, name, _part(linears[name], dim, mine, tp_size), dim == 1)


def _part(linear: nn.Linear, dim: int, mine: range, of: int) -> tuple[slice]:
    each = shape_in_use(linear.weight)[dim] // of
    return (slice(mine.start * each, mine.stop * each),)


def _copy(part: Tensor) -> Tensor:
    # Always a copy: a view would keep the whole weight in memory.
    return part.detach().clone(memory_format=torch.contiguous_format)


@contextmanager
def sliced(
    layers: Sequence[Sequence[SlicedProjection]],
    tp: AxisComm,
    whole: Callable[[list[nn.Parameter]], AbstractContextManager[Any]],
) -> Iterator[None]:
    """The model computes this rank's part of every cut for the length of the block.

    `whole(parameters)` makes the weights of one layer whole for the length of its own block. Collective over tp.
    """
    with ExitStack() as stack:
        for layer in layers:
            with whole([x for projection in layer for x in projection.linear.parameters(recurse=False)]):
                kept = [projection.kept(tp) for projection in layer]
            for projection, module in zip(layer, kept, strict=True):
                stack.callback(projection.parent._modules.__setitem__, projection.name, projection.linear)
                projection.parent._modules[projection.name] = module
        yield
