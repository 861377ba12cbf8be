"""Numbers of one byte: how they are rounded to, and how rows of them are moved.

torch moves float8 in some operations and not in others, which differ between devices and versions (on CPU `index_copy_`
does not). Bytes move in all, and a view costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounded_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to the nearest numbers that `dtype` has, in x's own dtype; another tensor.

    What is too large becomes the largest: not every version of torch does so (e4m3 has no infinity, and overflow was
    NaN). What is not finite becomes NaN, for it is a fault and has to stay one.

    >>> x = torch.tensor([0.3, -17.0, 1e6, torch.inf])
    >>> rounded_through(x, torch.float8_e4m3fn).tolist()
    [0.3125, -16.0, 448.0, nan]
    """
    largest = torch.finfo(dtype).max
    faults = x - x  # 0, or NaN
    return x.clamp(-largest, largest).add_(faults).to(dtype).to(x.dtype)


def take_rows(store: Tensor, index: Tensor) -> Tensor:
    """`[*index.shape, ...]`: rows of a store of any dtype, copied."""
    rows = movable(store).index_select(0, index.flatten()).view(store.dtype)
    return rows.view(*index.shape, *store.shape[1:])


def put_rows(store: Tensor, index: Tensor, rows: Tensor) -> None:
    """Cast `rows [N, ...]` to the dtype of a store, and put them at `index [N]`, which are distinct."""
    movable(store).index_copy_(0, index, movable(rows.to(store.dtype)))


def movable(x: Tensor) -> Tensor:
    """x, or the bytes of what has one byte, in the same memory."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
