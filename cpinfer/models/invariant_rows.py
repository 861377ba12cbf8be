"""A model whose rows have the same bits whatever rows run beside them: the context in which its forward does so.

It changes no module. It stands between the model's code and torch, and puts its own functions in the place of torch's:
for products with weights, wherever they are called (projections, routers, experts, adapters, the head); on CPU for
functions of single numbers, which torch computes in vectors; on CUDA for sums over a dim, softmax and norms. (On CPU
torch takes a row of those by itself.) Top-k needs nothing. `check_row_invariance` shows for a model that nothing else
is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import linear as torch_linear
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from cpinfer.models.attachment import replaced
from cpinfer.ops.row_pointwise import pointwise_by_rows
from cpinfer.ops.row_reductions import (
    cumsum_by_rows,
    layer_norm_by_rows,
    log_softmax_by_rows,
    mean_by_rows,
    rms_norm_by_rows,
    softmax_by_rows,
    sum_by_rows,
    sums_by_rows,
)
from cpinfer.ops.row_sizes import each_by_rows, grouped_by_rows, linear_by_rows

_CHECKPOINT = "_gradient_checkpointing_func"  # of Transformers' layers


def invariant_rows() -> AbstractContextManager[Any]:
    """In its block, products with weights and functions of single numbers give a row the bits that it has alone.

    Of the calling thread; inside another such block it does nothing. The backward is the ordinary one, wherever it
    runs; of what it computes again of a forward takes care `invariant_checkpointing`.
    """
    is_on = any(isinstance(mode, _InvariantRows) for mode in _get_current_function_mode_stack())
    return nullcontext() if is_on else _InvariantRows()


@contextmanager
def invariant_checkpointing(model: Any) -> Iterator[None]:
    """What forwards of `model` in its block checkpoint has the same bits when a backward computes it again.

    torch takes a backward out of every block of the kind that `invariant_rows` is, so the function itself enters one.
    """
    with ExitStack() as stack:
        for module in model.modules():
            checkpoint = vars(module).get(_CHECKPOINT)
            if checkpoint is not None:
                stack.enter_context(replaced(module, _CHECKPOINT, partial(_checkpoint_invariantly, checkpoint)))
        yield


def _checkpoint_invariantly(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with invariant_rows():
            return function(*args, **kwargs)

    return checkpoint(run, *args, **kw)


class _InvariantRows(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        return replacement(func, *args, **(kwargs or {}))


def _linear(_: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear_by_rows(input, weight, bias)


def _matmul(func: Any, input: Tensor, other: Tensor, **kwargs: Any) -> Any:
    """Products of rows with a matrix, as some experts are written; others as they are.

    RoPE's, of one number each, are no sums: on CUDA they are not left to a library that may round its inputs.
    """
    out = kwargs.pop("out", None)
    if input.is_cuda and input.ndim > 1 and other.ndim > 1 and input.shape[-1] == 1 and out is None:
        return input * other
    if kwargs or input.ndim < 2 or other.ndim != 2:
        return func(input, other, **kwargs) if out is None else func(input, other, out=out, **kwargs)
    found = linear_by_rows(input, other.t())
    return found if out is None else out.copy_(found)


def _addmm(func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any) -> Any:
    """As Conv1D calls it, a linear layer whose weight is `[K, N]`."""
    return func(input, mat1, mat2, **kwargs) if kwargs else linear_by_rows(mat1, mat2.t(), input)


def _einsum(func: Any, equation: Any, *operands: Any) -> Any:
    """Products of each head's rows with its own matrix: `[T, H, K]` with `[H, K, N]` or `[H, N, K]`, to `[T, H, N]`."""
    inputs, _, output = equation.partition("->") if isinstance(equation, str) else ("", "", "")
    rows, _, weights = inputs.partition(",")
    if len(operands) != 2 or len(rows) != 3 or rows[:2] != output[:2] or rows[1] != weights[:1]:
        return func(equation, *operands)
    x, w = operands
    w = w if weights[1] == output[2] else w.transpose(1, 2)
    return each_by_rows(x, w)


def _grouped_mm(func: Any, rows: Tensor, weights: Tensor, offs: Tensor | None = None, **kwargs: Any) -> Any:
    """Rows `[M, K]`, sorted by expert, with weights `[E, K, N]`; those of expert e end before `offs[e]`."""
    others = [value for value in kwargs.values() if value is not None]
    if others or offs is None or rows.ndim != 2 or weights.ndim != 3:
        return func(rows, weights, offs=offs, **kwargs)
    return grouped_by_rows(rows, weights.transpose(1, 2), offs)


def _pointwise(func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not input.is_floating_point() or kwargs.get("inplace") or "out" in kwargs:
        return func(input, *args, **kwargs)
    return pointwise_by_rows(func, input, *args, **kwargs)


def _rsqrt(func: Any, input: Tensor, **kwargs: Any) -> Any:
    """In float32 a vector of roots is rounded as one of them is; in half precision one is rounded twice."""
    return func(input, **kwargs) if input.dtype == torch.float32 else _pointwise(func, input, **kwargs)


def _pow(func: Any, input: Any, exponent: Any, **kwargs: Any) -> Any:
    """Whole powers are products."""
    if isinstance(exponent, float) and exponent != int(exponent) and isinstance(input, Tensor):
        return _pointwise(func, input, exponent, **kwargs)
    return func(input, exponent, **kwargs)


def _summed(by_rows: Callable[..., Tensor], func: Any, input: Tensor, dim: Any = None, *args: Any, **kw: Any) -> Any:
    """What sums over one dim; torch's own of all numbers at once, or of integers."""
    kwargs = dict(kw)
    kwargs.pop("_stacklevel", None)  # of torch.nn.functional's softmax, for a warning
    dims = (dim,) if isinstance(dim, int) else dim
    if not sums_by_rows(input) or not isinstance(dims, (tuple, list)) or len(dims) != 1 or "out" in kwargs:
        return func(input, *(() if dim is None else (dim,)), *args, **kw)
    return by_rows(input, dims[0], *args, **kwargs)


def _layer_norm(
    func: Any, input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *args: Any
) -> Any:
    if not sums_by_rows(input) or len(shape) != 1:
        return func(input, shape, weight, bias, eps, *args)
    return layer_norm_by_rows(input, weight, bias, eps)


def _rms_norm(func: Any, input: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if not sums_by_rows(input) or len(shape) != 1:
        return func(input, shape, weight, eps)
    return rms_norm_by_rows(input, weight, eps)


_POINTWISE = ("sigmoid", "tanh", "exp", "exp2", "expm1", "log", "log1p", "erf", "sin", "cos")
_ACTIVATIONS = (F.silu, F.gelu, F.sigmoid, F.tanh, F.softplus, F.logsigmoid, F.mish, F.elu, F.selu, F.celu)
_SUMS: Mapping[Callable[..., Tensor], tuple[Any, ...]] = {
    sum_by_rows: (torch.sum, Tensor.sum),
    mean_by_rows: (torch.mean, Tensor.mean),
    softmax_by_rows: (torch.softmax, Tensor.softmax, F.softmax),
    log_softmax_by_rows: (torch.log_softmax, Tensor.log_softmax, F.log_softmax),
    cumsum_by_rows: (torch.cumsum, Tensor.cumsum),
}
_REPLACEMENTS: Mapping[Any, Callable[..., Any]] = {
    torch_linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    torch._grouped_mm: _grouped_mm,
    torch.einsum: _einsum,
    **dict.fromkeys(_ACTIVATIONS, _pointwise),
    **{getattr(home, name): _pointwise for home in (torch, Tensor) for name in _POINTWISE},
    **dict.fromkeys((torch.rsqrt, Tensor.rsqrt), _rsqrt),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _pow),
    **{function: partial(_summed, by_rows) for by_rows, functions in _SUMS.items() for function in functions},
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm),
}
