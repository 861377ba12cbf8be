"""Products whose rows have the same bits whatever rows stand beside them: cut into sizes that a trial found to agree.

A library chooses its kernel, and the order in which it adds, by the number of rows: `linear` of a row alone, of 16 and
of 300 may differ in the last bit. But of a few sizes some agree. A product of any number of rows is made of those:

    100 rows, sizes (8, 16, 32, 512)     32 | 32 | 32 | 4 + 4 of zeros
    500 rows                             500 + 12 of zeros

So it is on CPU. On CUDA kernels of fixed tiles need no trial (`row_kernels.py`).

Letters: M rows, N outputs, K inputs of a weight `[N, K]`, E weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

# DeepSpeed puts a function of its own in the place of the name in torch.nn.functional, for parameters that it gathers.
from torch._C._nn import linear as torch_linear
from torch.nn import functional as F

from cpinfer.ops.triton_modules import triton_module

CANDIDATES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# A trial of more multiplications takes too long, and a weight this large keeps a machine busy with fewer rows. Sizes up
# to SMALL are tried for every weight: for many none below agrees with any above.
MAX_MULTIPLICATIONS = 1 << 33
SMALL = 64
# Reading a weight takes about as long as so many rows of a product: what a further piece costs.
ROWS_PER_READ = 64
# The numbers of rows by which sizes are compared: a decode step of one, of a few, and steps of prompts.
_USUAL_ROWS = (1, 8, 64, 512, 2048)
_BASE_ROWS = 16
# Of weights of fewer outputs MKL has kernels on some processors whose sums depend on where in memory a row begins: they
# get further ones, of zeros.
MIN_OUTPUTS = 16
_COMPARED_OUTPUTS = 256  # of base rows, at least, in a trial
_PERIOD = 1_000_003  # of the random numbers in a weight: a prime, so that no two of its rows are equal


@dataclass(frozen=True)
class ProductKind:
    """What decides which kernel runs, beside the number of rows: a weight as it lies in memory, and the threads.

    `is_transposed`: its columns lie one after another, not its rows.
    """

    shape: tuple[int, int]
    is_transposed: bool
    dtype: torch.dtype
    device: torch.device
    num_threads: int

    @classmethod
    def of(cls, weight: Tensor) -> ProductKind:
        """The kind of products with `weight [N, K]`, whose rows or columns are contiguous, by the calling thread."""
        N, K = weight.shape
        return cls((N, K), not weight.is_contiguous(), weight.dtype, weight.device, torch.get_num_threads())


@cache
def row_sizes(kind: ProductKind) -> tuple[int, ...]:
    """Sizes, ascending, of products that give a row the same bits, wherever in them it stands and whatever beside it.

    Found by trial, once a process. The choice between several such classes is by a count of work, never by a clock:
    all ranks must choose alike. `(1,)` where no size agrees with itself.
    """
    classes = _classes(kind)
    return min(classes, key=_work) if classes else (1,)


@lru_cache(maxsize=1 << 16)
def pieces(num_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes, out of `sizes`, into which so many rows are cut with least work; the last may be larger than its rows.

    >>> pieces(100, (8, 16, 32, 512)), pieces(500, (8, 16, 32, 512)), pieces(0, (8,))
    ((32, 32, 32, 8), (512,), ())
    """
    if num_rows == 0:
        return ()
    fitting = [size for size in sizes if size <= num_rows]
    padded = next((size for size in sizes if size >= num_rows), None)
    if not fitting:
        return sizes[:1]
    whole, rest = divmod(num_rows, fitting[-1])
    cut = (fitting[-1],) * whole + pieces(rest, sizes)
    return cut if padded is None or _cost(cut) < _cost((padded,)) else (padded,)


def linear_by_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., N]`: `linear(x, weight, bias)` in which the bits of a row depend on that row alone.

    x `[..., K]`, any number of rows, 0 included. The bias is added to the rounded product: kernels that add it before
    they round agree for no two numbers of rows in bfloat16. Gradients are those of `linear`, by whole products.
    """
    if not x.numel() or not weight.numel():  # no row, or nothing to add up: a shard may be empty
        return torch_linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    if _wants_gradients(rows, weight):
        out: Tensor = _ProductByRows.apply(rows, weight)  # type: ignore[no-untyped-call]
    else:
        out = _product(rows, weight)
    out = out.view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


def each_by_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """`[M, E, N]`: rows `[M, E, K]`, for each e by its own weight of `weights [E, N, K]`, in the bits of each alone."""
    kernels = _kernels_for(rows, weights)
    if kernels is None or rows.dtype != weights.dtype or _wants_gradients(rows, weights):
        return torch.stack([linear_by_rows(rows[:, e], weights[e]) for e in range(len(weights))], dim=1)
    out: Tensor = kernels.products(rows, weights)
    return out


def grouped_by_rows(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`[M, N]`: rows `[M, K]`, those before `ends[e]` and past e - 1's by weight e of `[E, N, K]`.

    Each in the bits that it has alone. Rows behind the last end get zeros.
    """
    kernels = _kernels_for(rows, weights)
    if kernels is not None and not _wants_gradients(rows, weights):
        out: Tensor = kernels.grouped_products(rows, weights, ends)
        return out
    told = ends.tolist()
    bounds = zip([0, *told], told, range(len(told)), strict=False)
    parts = [linear_by_rows(rows[start:end], weights[e]) for start, end, e in bounds if end > start]
    return torch.cat([*parts, rows.new_zeros(len(rows) - told[-1], weights.shape[1])])


class _ProductByRows(torch.autograd.Function):
    """Saves rows and weight as they were given, not the pieces, and has the ordinary backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows = grads[0] @ weight if ctx.needs_input_grad[0] else None
        of_weight = grads[0].t() @ rows if ctx.needs_input_grad[1] else None
        return of_rows, of_weight


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """`[M, N]` of rows `[M, K]`, which are laid out in one way: a kernel may be chosen by strides, too."""
    kernels = _kernels_for(rows, weight)
    if kernels is not None:
        product: Tensor = kernels.product(rows, weight)
        return product
    rows, M, N = rows.contiguous(), len(rows), len(weight)
    if N < MIN_OUTPUTS:
        return _product(rows, F.pad(weight, (0, 0, 0, MIN_OUTPUTS - N)))[:, :N].contiguous()
    if not weight.t().is_contiguous():
        weight = weight.contiguous()
    cut = pieces(M, row_sizes(ProductKind.of(weight)))
    if len(cut) == 1:
        return torch_linear(_padded(rows, cut[0]), weight)[:M]
    out = rows.new_empty(M, N)
    start = 0
    for size in cut:
        part = out[start : start + size]
        part.copy_(torch_linear(_padded(rows[start : start + size], size), weight)[: len(part)])
        start += size
    return out


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _kernels_for(*tensors: Tensor) -> Any:
    """The kernels, where these tensors are on CUDA, of dtypes that they know, and Triton is installed; else None."""
    known = (torch.float32, torch.bfloat16, torch.float16)
    return triton_module("row_kernels") if all(x.is_cuda and x.dtype in known for x in tensors) else None


def _padded(rows: Tensor, size: int) -> Tensor:
    return rows if len(rows) == size else F.pad(rows, (0, 0, 0, size - len(rows)))


def _cost(cut: tuple[int, ...]) -> int:
    return sum(cut) + ROWS_PER_READ * len(cut)


def _work(sizes: tuple[int, ...]) -> float:
    """Work for the usual numbers of rows, each as a multiple of what one call would be."""
    return sum(_cost(pieces(M, sizes)) / _cost((M,)) for M in _USUAL_ROWS)


@torch.no_grad()
def _classes(kind: ProductKind) -> list[tuple[int, ...]]:
    """The candidates, but those whose rows depend on their place, as classes that agree bit for bit."""
    N, K = kind.shape
    with torch.autocast(kind.device.type, enabled=False):
        weight = _random(N, K, kind)
        weight = weight.t().contiguous().t() if kind.is_transposed else weight
        rounds = -(-_COMPARED_OUTPUTS // (_BASE_ROWS * N))
        bases = [_random(_BASE_ROWS, K, kind, seed, sign=-1) for seed in range(1, 1 + rounds)]
        classes: list[tuple[Tensor, list[int]]] = []
        for size in CANDIDATES:
            if size > SMALL and size * N * K > MAX_MULTIPLICATIONS:
                break
            found = [_outputs(base, weight, size) for base in bases]
            if any(out is None for out in found):
                continue
            outputs = torch.cat([out for out in found if out is not None])
            for reference, members in classes:
                if torch.equal(reference, outputs):
                    members.append(size)
                    break
            else:
                classes.append((outputs, [size]))
    return [tuple(members) for _, members in classes]


def _outputs(base: Tensor, weight: Tensor, size: int) -> Tensor | None:
    """`[16, N]` of the rows of `base` by products of `size` rows, None where they depend on more than their row.

    Rows stand at many places, beside many others and beside zeros, and begin where vectors do in memory or elsewhere.
    """
    order = (torch.arange(max(size, _BASE_ROWS)) + torch.arange(max(size, _BASE_ROWS)) // _BASE_ROWS) % _BASE_ROWS
    order = order.to(base.device)
    first: Tensor | None = None
    for shift in (0, 1) if size <= SMALL else (1,):
        rows = _shifted(base[order], shift)
        out = torch.cat([torch_linear(rows[i : i + size], weight) for i in range(0, len(rows), size)])
        first = out[:_BASE_ROWS] if first is None else first
        if not torch.equal(out, first[order]):
            return None
    if size <= SMALL:
        alone = torch_linear(_padded(base[-1:], size), weight)[:1]
        if first is None or not torch.equal(alone, first[-1:]):
            return None
    return first


def _shifted(rows: Tensor, by: int) -> Tensor:
    """The same rows, so many numbers behind where memory is aligned."""
    return rows.new_empty(rows.numel() + by)[by:].view(rows.shape).copy_(rows)


def _random(num_rows: int, num_columns: int, kind: ProductKind, seed: int = 0, sign: int = 1) -> Tensor:
    """Random rows, the last half of each the first from its end, times `sign`.

    A product of two with other signs is 0 but for what rounding left, which is what an order of adding changes.
    Products of other numbers would be rounded to the same bits in half precision, all but one in thousands.
    """
    half = num_columns // 2
    generator = torch.Generator().manual_seed(seed)
    count = min(num_rows * half, _PERIOD)
    spread = torch.randint(-3, 4, (count,), generator=generator)
    numbers = torch.ldexp(torch.randn(count, generator=generator), spread).to(kind.device, kind.dtype)
    rows = torch.zeros(num_rows, num_columns, device=kind.device, dtype=kind.dtype)
    if half:
        rows[:, :half] = numbers.repeat(-(-num_rows * half // count))[: num_rows * half].view(num_rows, half)
        rows[:, num_columns - half :] = sign * rows[:, :half].flip(1)
    return rows
