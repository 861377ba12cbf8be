"""DeepSpeed's AutoTP without a whole model: each rank reads what it keeps of weights that are still in files.

AutoTP cuts a model without values (on the meta device) as it cuts any other. The values come after it:

    load_partly     embeddings, norms, experts and buffers by Transformers' loader; linear layers without values
    AutoTP          its layers in the place of linear ones, of the shapes that this rank keeps
    here            each of these layers cuts its weight, in the file; all else is as it was loaded

What Transformers keeps in another dtype than the model's stays in it: AutoTP alone would round the frequencies of
rotary embeddings with the weights (seen in 0.19), and positions would be wrong from some hundreds on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, LmHeadLinearAllreduce, TensorParallel_Layer
from torch import Tensor, nn

from cpinfer.layout.capacity import StateLayout
from cpinfer.layout.weight_parts import stored_ranges
from cpinfer.models.linear_cuts import prepare_linear_attention
from cpinfer.models.loading import PartlyRead
from cpinfer.models.stored_tensors import Readable

# Layers that split a weight and move their part of it, and do nothing else with it. Others are given it whole.
_SPLITTING = (LinearLayer, LinearAllreduce, LmHeadLinearAllreduce)


@dataclass(frozen=True)
class Loaded:
    """A tensor in memory, as a `Readable`."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        """See `Readable`."""
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """See `Readable`."""
        return self.tensor[index]

    def copied(self, index: Any) -> Tensor:
        """See `Readable`."""
        return self.tensor[index].clone(memory_format=torch.contiguous_format)


@dataclass
class Uncut:
    """A weight, or part of one, as AutoTP's layers see it: they split it, and what they move is read, or copied.

    `dtype` is the one that the weight is loaded in, `head_dim` that of K and V, whose heads may count several times.
    `ranges` along `dim` are the part, None for all of it. `data` is where a layer leaves what it keeps.
    """

    tensor: Readable
    dtype: torch.dtype
    head_dim: int
    dim: int = 0
    ranges: Sequence[tuple[int, int]] | None = None
    data: Any = None
    is_meta: ClassVar[bool] = False
    device: ClassVar[torch.device] = torch.device("cpu")

    def split(self, sizes: Sequence[int], dim: int) -> list[Uncut]:
        """Parts of these sizes along a dim, copies of heads counted."""
        rep = sum(sizes) // self.tensor.get_shape()[dim]
        stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        cuts = [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        return [replace(self, dim=dim, ranges=stored_ranges(*cut, head_dim=self.head_dim, rep=rep)) for cut in cuts]

    def to(self, device: Any, copy: bool = False) -> Tensor:
        """Its values, read now, in memory of their own."""
        if self.ranges is None:
            return self.tensor.copied(...).to(device=device, dtype=self.dtype)
        parts = [self.tensor.copied((slice(None),) * self.dim + (slice(*part),)) for part in self.ranges]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)).to(device=device, dtype=self.dtype)


def with_split_projections(partly: PartlyRead, layout: StateLayout, tp_size: int) -> PartlyRead:
    """The model with the fused projections of linear attention split, as they are cut: those are read whole before."""
    unread = dict(partly.unread)
    for name in [name for name in unread if name.endswith("in_proj_qkv.weight")]:
        projection = partly.model.get_submodule(name.removesuffix(".weight"))
        weight, values = projection.weight, unread.pop(name)[...]
        projection.weight = nn.Parameter(values.to(weight.dtype), requires_grad=weight.requires_grad)
    prepare_linear_attention(partly.model, layout, tp_size)
    return PartlyRead(partly.model, unread)


def cut_as_read(partly: PartlyRead, dtype: torch.dtype, head_dim: int, cut: Callable[[Any], Any]) -> Any:
    """The engine that `cut` makes of a model, its weights this rank's parts of those that are loaded or in files.

    A model of another dtype than `dtype` is converted to it. `head_dim` is of K and V, whose heads `cut` may copy.
    """
    model = partly.model
    whole = _Whole(
        dict(partly.unread),
        dict(model.named_parameters(remove_duplicate=False)),
        dict(model.named_buffers(remove_duplicate=False)),
        head_dim,
        None if model.dtype == dtype else dtype,
    )
    _take_values(model)
    engine = cut(model)
    for path, module in engine.module.named_modules():
        _fill(module, f"{path}." if path else "", whole)
    return engine


@dataclass(frozen=True)
class _Whole:
    """A model's values before it is cut, by name. `dtype`: what they are converted to, None where they stay."""

    unread: dict[str, Readable]
    weights: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    head_dim: int
    dtype: torch.dtype | None
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)

    def to_cut(self, name: str) -> Uncut:
        """A weight that a layer may cut, in a file or loaded, which its cutting leaves as it is."""
        weight = self.weights.pop(name)
        values = self.unread.pop(name) if name in self.unread else Loaded(weight.detach())
        return Uncut(values, self.dtype or weight.dtype, self.head_dim)

    def as_loaded(self, name: str, device: torch.device) -> nn.Parameter:
        """A weight that nobody cuts; the same where it is in several places."""
        weight = self.weights.pop(name)
        if name in self.unread:
            value = self.unread.pop(name)[...].to(device=device, dtype=self.dtype or weight.dtype)
            return nn.Parameter(value, requires_grad=weight.requires_grad)
        _, moved = self.moved.setdefault(id(weight), (weight, _moved(weight, device, self.dtype)))
        return moved


def _moved(weight: nn.Parameter, device: torch.device, dtype: torch.dtype | None) -> nn.Parameter:
    value = weight.detach().to(device=device, dtype=dtype or weight.dtype)
    same = (value.device, value.dtype) == (weight.device, weight.dtype)
    return weight if same else nn.Parameter(value, requires_grad=weight.requires_grad)


def _take_values(model: nn.Module) -> None:
    """Put weights on the meta device; what is in several places stays the same in all of them."""
    empty: dict[int, nn.Parameter] = {}
    weights = list(model.parameters())  # alive until the end, so that no two have one id
    for weight in weights:
        empty[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
    for module in model.modules():
        for key, there in module._parameters.items():
            if there is not None:
                module._parameters[key] = empty[id(there)]


def _fill(module: nn.Module, prefix: str, whole: _Whole) -> None:
    """Give a module of a cut model its values."""
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = whole.buffers[prefix + key].to(buffer.device)
    weights = {key: weight for key, weight in module._parameters.items() if weight is not None}
    if not isinstance(module, TensorParallel_Layer):
        for key, weight in weights.items():
            module._parameters[key] = whole.as_loaded(prefix + key, weight.device)
        return
    uncut = {key: whole.to_cut(prefix + key) for key in weights}
    values: dict[str, Any] = dict(uncut)
    if type(module) not in _SPLITTING:
        values = {key: value.to("cpu") for key, value in uncut.items()}
    module._tp_partition([values.get("weight"), values.get("bias")])
    for key, weight in weights.items():
        # Where a layer keeps what it moves; nowhere, where it cuts nothing off.
        value = uncut[key].to(weight.device) if values[key].data is None else values[key].data
        if value.shape != weight.shape:
            raise RuntimeError(f"AutoTP has cut {prefix}{key} to {list(weight.shape)}, and then to {list(value.shape)}")
        module._parameters[key] = nn.Parameter(value, requires_grad=weight.requires_grad)
