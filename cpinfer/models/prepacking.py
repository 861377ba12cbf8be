"""Linear layers on CPU by copies of their weights in the order in which oneDNN multiplies.

A product of few rows is over when its weight has been read, several times as soon where the weight lies as the kernel
takes it: torch keeps weights as they are trained, and brings them into that order for every product, or does without.
Copies are made when an engine wakes, as far as memory is granted, and are gone when it sleeps or ends. In bfloat16 they
give the bits of the layer; in float32 oneDNN computes, where torch calls another library, which rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cpinfer.models.latent_attention import is_latent_attention
from cpinfer.refusals import refuse

# By which integers the bits of a weight are compared.
_DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
# Elements of a weight that are looked at along each dim, at least, where there are so many.
_NUM_SAMPLES = 8
# Rows that the order is chosen for. The same was chosen for any number of them from 1 to 256.
_NUM_ROWS = 16
_AUTOTP = {
    ("deepspeed.module_inject.layers", name) for name in ("LinearLayer", "LinearAllreduce", "LmHeadLinearAllreduce")
}


class PrepackedLinear:
    """What runs in the place of a linear layer's forward."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._copy: Tensor | None = None
        self._made_of: tuple[object, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Who copies a module inside the block gets one that runs by its own weight."""
        return type(self), (self._module,)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., N]` of `input [..., K]`."""
        module = self._module
        if self._copy is None or input.ndim > 3 or not input.is_contiguous():  # of others torch rounds before the bias
            return F.linear(input, module.weight, module.bias)
        return self._product(input, self._copy, module.bias)

    @staticmethod
    def _product(input: Tensor, copy: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, copy, bias, "none", [], "")
        return out

    @property
    def num_bytes(self) -> int:
        """Of a copy."""
        weight = self._module.weight
        return weight.numel() * weight.itemsize

    @property
    def is_stale(self) -> bool:
        """Whether there is no copy, or the weight has changed since it was made, or lies elsewhere.

        What is written through `.data`, by a fused optimiser or through a view of a trainer's flat buffer, torch does
        not count: it is seen where it changes an element of a sample.
        """
        return self._made_of != self._weight_now()

    def pack(self) -> None:
        """Copy the weight as it is now."""
        self.release()  # its memory is free for the new one
        self._copy = torch.ops.mkldnn._reorder_linear_weight(self._module.weight.detach(), _NUM_ROWS)
        self._made_of = self._weight_now()

    def release(self) -> None:
        """Free the copy; the layer runs by its own weight."""
        self._copy = self._made_of = None

    def _weight_now(self) -> tuple[object, ...]:
        weight = self._module.weight.detach()
        rows, columns = (max(1, size // _NUM_SAMPLES) for size in weight.shape)
        sample = weight[::rows, ::columns].view(_DTYPES[weight.dtype]).tolist()
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version, sample


class PrepackedShard(PrepackedLinear):
    """The same of a layer of DeepSpeed's AutoTP, which sums over ranks itself: its product alone is by the copy."""

    def forward(self, input: Tensor) -> Tensor:
        if self._copy is None:
            return self._run(input)
        with _Replaced(torch.matmul, partial(self._matmul, self._copy)):
            return self._run(input)

    def _run(self, input: Tensor) -> Tensor:
        out: Tensor = type(self._module).forward(self._module, input)
        return out

    def _matmul(self, copy: Tensor, input: Tensor, other: Tensor) -> Tensor:
        if other.data_ptr() != self._module.weight.data_ptr():
            return torch.matmul(input, other)
        return self._product(input, copy, None)


class _Replaced(TorchFunctionMode):
    """In its block, and in this thread, calls of one function of torch's are calls of another."""

    def __init__(self, function: Any, other: Any) -> None:
        super().__init__()
        self._function, self._other = function, other

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (self._other if func is self._function else func)(*args, **(kwargs or {}))


class PrepackedLinears:
    """Layers of a model, each with what runs in the place of its forward. None of them is packed at first."""

    def __init__(self, by_module: Mapping[nn.Module, PrepackedLinear] = MappingProxyType({})) -> None:
        self.by_module = by_module

    @property
    def num_bytes(self) -> int:
        """Of all copies."""
        return sum(linear.num_bytes for linear in self.by_module.values())

    def pack(self) -> None:
        """Copy all weights as they are now. Where that is cut short, no old copy is left."""
        self.release()
        for linear in self.by_module.values():
            linear.pack()

    def renew(self) -> None:
        """Copy those weights whose copies are stale, or missing."""
        for linear in self.by_module.values():
            if linear.is_stale:
                linear.pack()

    def release(self) -> None:
        """Free all copies."""
        for linear in self.by_module.values():
            linear.release()

    @contextmanager
    def released_after_errors(self) -> Iterator[None]:
        """A block behind which no copy is left if it fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise


def prepackable(model: nn.Module, granted_bytes: int) -> PrepackedLinears:
    """As many linear layers as so much memory suffices for, in the model's order.

    Of torch's own, and those of AutoTP, with plain weights, that are called and whose forward nobody has replaced.
    UnsupportedError for a device, or a build of torch, without oneDNN, and for bfloat16 on a processor for which that
    has no products in it.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise refuse("prepacked_device", f"device {device}")
    has_bfloat16 = any(weight.dtype == torch.bfloat16 for weight in model.parameters())
    if has_bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise refuse("prepacked_device", "bfloat16 on this processor")
    uncalled = {module.kv_b_proj for module in model.modules() if is_latent_attention(module)}
    chosen: dict[nn.Module, PrepackedLinear] = {}
    left = granted_bytes
    for module in model.modules():
        kind = None if module in uncalled else _kind(module)
        if kind is not None and (linear := kind(module)).num_bytes <= left:
            chosen[module] = linear
            left -= linear.num_bytes
    return PrepackedLinears(chosen)


def _kind(module: Any) -> type[PrepackedLinear] | None:
    kind = PrepackedLinear if type(module) is nn.Linear else PrepackedShard
    if kind is PrepackedShard and (type(module).__module__, type(module).__name__) not in _AUTOTP:
        return None
    weight = module._parameters.get("weight")
    is_plain = type(weight) is nn.Parameter and weight.dtype in _DTYPES and weight.numel() > 0
    return kind if is_plain and "forward" not in vars(module) else None
