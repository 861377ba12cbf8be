"""Functions of single numbers that give a number the same bits wherever in a tensor it stands.

torch computes a stretch of numbers some vectors at a time and what is left over one by one, by another `exp`. What is
left over depends on how many numbers there are, and on where threads share them out. So rows are padded:

    3 rows of 50, stretches of 64     [64 | 64 | 22 one by one]
    as they are padded here           [50 + 14 | 50 + 14 | 50 + 14]

So it is on CPU. On a GPU each number has a thread that runs the same code whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Numbers in the widest vector, of half precision: none has numbers of two rows, which some functions would show.
VECTOR = 32
# Numbers that torch's loops take at once.
STRETCH = 2 * VECTOR
# As many numbers torch gives to a thread at least (at::internal::GRAIN_SIZE).
GRAIN = 32768


def pointwise_by_rows(function: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`function(x, *args, **kwargs)`, which is of every number by itself, for x `[..., D]`; contiguous."""
    out: Tensor
    if x.device.type != "cpu" or x.ndim == 0 or x.numel() == 0:
        out = function(x, *args, **kwargs)
        return out
    D = x.shape[-1]
    rows = x.numel() // D
    width = -(-D // VECTOR) * VECTOR
    height = _height(rows, width, torch.get_num_threads())
    if (height, width) == (rows, D):
        out = function(x.contiguous(), *args, **kwargs)
        return out
    # Ones: no function here has a pole there.
    padded = F.pad(x.reshape(rows, D), (0, width - D, 0, height - rows), value=1.0)
    out = function(padded, *args, **kwargs)
    return out[:rows, :D].contiguous().view(x.shape)


def _height(rows: int, width: int, num_threads: int) -> int:
    """So many rows, or a few more, that every thread has whole stretches."""
    while rows * width % (STRETCH * min(num_threads, -(-rows * width // GRAIN))):
        rows += 1
    return rows
