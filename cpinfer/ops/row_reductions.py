"""Sums over a dim, and what is made of them, in an order that depends on nothing but how many numbers are summed.

On CPU torch sums a row by itself, and none of this is needed. On CUDA it shares rows out to threads and blocks by how
many rows there are, so there sums are a Triton kernel (`row_kernels.py`), and softmax and norms, which torch would sum
itself, are made of them: in float32, and rounded once. A largest number is the same in any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpinfer.ops.triton_modules import triton_module


def sums_by_rows(x: Tensor) -> bool:
    """Whether sums of x have to be those of this module, since torch's own would depend on the number of rows."""
    return _kernels_for(x) is not None


def sum_by_rows(x: Tensor, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """`x.sum(dim, keepdim, dtype=dtype)`, summed in float32."""
    total: Tensor = _Sum.apply(x, dim, keepdim)  # type: ignore[no-untyped-call]
    return total.to(dtype or x.dtype)


def mean_by_rows(x: Tensor, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """`x.mean(dim, keepdim, dtype=dtype)`, summed in float32."""
    total: Tensor = _Sum.apply(x, dim, keepdim)  # type: ignore[no-untyped-call]
    return (total / x.shape[dim]).to(dtype or x.dtype)


def softmax_by_rows(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`x.softmax(dim, dtype=dtype)`."""
    weights = torch.exp(_below_peak(x, dim))
    return (weights / sum_by_rows(weights, dim, keepdim=True)).to(dtype or x.dtype)


def log_softmax_by_rows(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`x.log_softmax(dim, dtype=dtype)`."""
    shifted = _below_peak(x, dim)
    return (shifted - torch.log(sum_by_rows(torch.exp(shifted), dim, keepdim=True))).to(dtype or x.dtype)


def cumsum_by_rows(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`x.cumsum(dim, dtype=dtype)`, summed in float32. Without gradients."""
    rows = x.detach().movedim(dim, -1)
    found: Tensor = _kernels_for(x).cumulative_sums(rows.reshape(-1, rows.shape[-1])).view(rows.shape)
    return found.movedim(-1, dim).to(dtype or x.dtype)


def layer_norm_by_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm(x, x.shape[-1:], weight, bias, eps)`."""
    wide = x.float()
    centered = wide - mean_by_rows(wide, -1, keepdim=True)
    out = centered * torch.rsqrt(mean_by_rows(centered * centered, -1, keepdim=True) + eps)
    out = out if weight is None else out * weight.float()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def rms_norm_by_rows(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    """`rms_norm(x, x.shape[-1:], weight, eps)`."""
    # torch's own is that of what it computes in, whatever its documentation says.
    wide, least = x.float(), torch.finfo(torch.float32).eps if eps is None else eps
    out = wide * torch.rsqrt(mean_by_rows(wide * wide, -1, keepdim=True) + least)
    return (out if weight is None else out * weight.float()).to(x.dtype)


def _below_peak(x: Tensor, dim: int) -> Tensor:
    wide = x.float()
    return wide - wide.detach().amax(dim, keepdim=True)


class _Sum(torch.autograd.Function):
    """In float32; each number's gradient is that of its sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, keepdim: bool) -> Tensor:
        ctx.given = x.shape, x.dtype, dim, keepdim
        rows = x.movedim(dim, -1)
        total: Tensor = _kernels_for(x).sums(rows.reshape(-1, rows.shape[-1])).view(rows.shape[:-1])
        return total.unsqueeze(dim) if keepdim else total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        shape, dtype, dim, keepdim = ctx.given
        grad = grads[0] if keepdim else grads[0].unsqueeze(dim)
        return grad.to(dtype).expand(shape), None, None


def _kernels_for(x: Tensor) -> Any:
    """The kernels, where x is on CUDA, of a dtype that they know, and Triton is installed; else None."""
    known = (torch.float32, torch.bfloat16, torch.float16)
    return triton_module("row_kernels") if x.is_cuda and x.dtype in known else None
