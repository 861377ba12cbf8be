"""DeepSpeed ZeRO-3: weights that every rank holds a part of, made whole for a phase in one of three ways.

    full        all at once
    layerwise   what is outside the decoder layers at once, a layer when a step comes to it, the next one on its way
    tp_shards   a layer at a time, of which each rank keeps its slice of tensor parallelism

DeepSpeed's hooks gather and release weights too, and write down in which order. They sleep during a phase, so that
training finds its trace, its handles and its parameters as they were: partitioned again, those that it keeps whole
(because they are small, say) left whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from cpinfer.colocate.weight_slices import sliced, sliced_projections
from cpinfer.comm.axis import AxisComm
from cpinfer.models.decoder_layers import decoder_layers
from cpinfer.models.hooks import hooks_disabled
from cpinfer.models.spec import ModelSpec
from cpinfer.models.wrappers import unwrapped
from cpinfer.packages import named

try:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

_OWNER = "deepspeed"


@contextmanager
def full(module: nn.Module) -> Iterator[None]:
    """All parameters are whole for the length of the block. Collective."""
    with hooks_disabled(module, _OWNER), whole(module.parameters()):
        yield


@contextmanager
def layerwise(module: nn.Module) -> Iterator[int]:
    """Every layer is whole while it runs. Yields the most bytes of weights there at once. Collective.

    So is each step inside the block, and all ranks must run the same ones.
    """
    layers = decoder_layers(unwrapped(module))
    inside = [_partitioned(layer.parameters()) for layer in layers]
    in_layers = {id(parameter) for parameters in inside for parameter in parameters}
    outside = [parameter for parameter in module.parameters() if id(parameter) not in in_layers]
    moving = [_Layer(parameters) for parameters in inside]
    with hooks_disabled(module, _OWNER), whole(outside), ExitStack() as stack:
        for index, (layer, its) in enumerate(zip(layers, moving, strict=True)):
            stack.callback(its.give_back)
            following = moving[(index + 1) % len(moving)]
            stack.callback(layer.register_forward_pre_hook(_bring(its, following)).remove)
            stack.callback(layer.register_forward_hook(_release(its)).remove)
        sizes = [its.num_bytes for its in moving]
        together = (
            max(a + b for a, b in zip(sizes, [*sizes[1:], sizes[0]], strict=True)) if len(sizes) > 1 else sizes[0]
        )
        yield together + sum(_whole_bytes(parameter) for parameter in outside)


@contextmanager
def tp_shards(module: nn.Module, spec: ModelSpec, tp: AxisComm) -> Iterator[None]:
    """Each rank has its slices of the projections, and all other parameters whole. Collective."""
    layers = sliced_projections(module, spec, tp.size, tp.index)
    in_slices = {id(x) for layer in layers for projection in layer for x in projection.linear.parameters(recurse=False)}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in in_slices]
    with hooks_disabled(module, _OWNER), whole(rest), sliced(layers, tp, whole):
        yield


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """The parameters are whole for the length of the block; those that were are left alone. Collective."""
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(_partitioned(parameters))
    return context


class _Layer:
    """The parameters of one decoder layer that come and go."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters: list[Any] = parameters
        self._coming: Any = None
        self._is_whole = False
        self.num_bytes = sum(map(_whole_bytes, parameters))

    def start(self) -> None:
        """Begin to gather, unless that was done."""
        if self._parameters and not self._is_whole and self._coming is None:
            self._coming = self._parameters[0].all_gather_coalesced(self._parameters)

    def finish(self) -> None:
        """Be whole."""
        self.start()
        if self._coming is not None:
            self._coming.wait()
            self._coming, self._is_whole = None, True

    def release(self) -> None:
        """Be sharded again. What is on its way is awaited first: the others send it already."""
        if self._coming is not None:
            self.finish()
        if self._is_whole:
            self._is_whole = False
            self._parameters[0].partition(param_list=self._parameters)

    def give_back(self) -> None:
        """Be sharded again, also where what is on its way never comes: whoever waited for it has said so."""
        try:
            self.release()
        except RuntimeError:
            self._coming = None
            for parameter in self._parameters:
                free_param(parameter)


def _bring(its: _Layer, following: _Layer) -> Any:
    def before_forward(*_: Any) -> None:
        its.finish()
        following.start()

    return before_forward


def _release(its: _Layer) -> Any:
    def after_forward(*_: Any) -> None:
        its.release()

    return after_forward


def _partitioned(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if getattr(p, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE]


def _whole_bytes(parameter: Any) -> int:
    count: int = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
    return count
