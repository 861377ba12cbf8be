"""The check that an attached model's logits depend on no other row of a step, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from cpinfer.attention.layer import AttentionLayer
from cpinfer.errors import UserError
from cpinfer.models.invariant_rows import invariant_rows
from cpinfer.models.runner import ModelRunner
from cpinfer.refusals import refuse

# A row alone, a few, an odd number, and more than most products take at once.
PIECES = (1, 3, 17, 76)
# On a GPU what is launched changes with more rows than that.
GPU_PIECES = (*PIECES, 1503)
# Learned positions may be few, and rows may share one.
POSITIONS = 32
# Sums of more ranks are made in an order that depends on where in a message a number stands.
MAX_TP_SIZE = 2


class RowWiseStep:
    """Stands in for attention: what a row gets is made of its own query and value alone, without rounding twice."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[T, H, V]`: each head the value of its KV head, times a number of its query between -1 and 1."""
        V = layer.v_dim(v)
        values = v.repeat(1, 1, -(-V // v.shape[-1]))[..., :V]
        return values.repeat_interleave(q.shape[1] // v.shape[1], dim=1) * q[..., :1].clamp(-1, 1)


def check_row_invariance(
    runner: ModelRunner,
    tp_size: int = 1,
    *,
    any_rank: Callable[[bool], bool] = bool,
    around: Callable[[], AbstractContextManager[Any]] = invariant_rows,
) -> None:
    """Run some rows at once, and in pieces of 1, 3 and more, and compare their logits bit for bit.

    Attention is left out of it. It takes two forwards of about 100 rows (on a GPU 1,600), and on CPU the trials of
    products that nobody has tried before.

    Args:
        runner: an attached model. All ranks of a tensor-parallel group check theirs together.
        tp_size: ranks of that group.
        any_rank: whether what it is given is true on a rank of the group; on all ranks the same.
        around: the context in which forwards run.
    Raises:
        UserError: rows differ, on every rank alike; each names the first of its modules that makes them differ.
        UnsupportedError: more than two tensor-parallel ranks.
    """
    if tp_size > MAX_TP_SIZE:
        raise refuse("deterministic_tp", f"tp_size {tp_size}")
    rows = _Rows.of(runner, around)
    whole = rows.logits(0, rows.count)
    bounds = list(pairwise([0, *accumulate(rows.pieces)]))
    differs = [any_rank(not torch.equal(rows.logits(*piece), whole[slice(*piece)])) for piece in bounds]
    if not any(differs):
        return
    # All ranks run these forwards, too, though rows may differ on one of them alone.
    first = _first_difference(runner, rows, *bounds[differs.index(True)])
    raise UserError(
        f"deterministic logits cannot be kept by this model: {first or 'something outside of its modules'} gives a row "
        "other bits when other rows run beside it. Take another implementation of it (of experts: "
        'experts_implementation="grouped_mm"), another dtype or another number of threads, or turn deterministic mode '
        "off."
    )


@dataclass(frozen=True)
class _Rows:
    """Tokens to run, by themselves or some together."""

    runner: ModelRunner
    around: Callable[[], AbstractContextManager[Any]]
    pieces: tuple[int, ...]
    token_ids: Tensor

    @classmethod
    def of(cls, runner: ModelRunner, around: Callable[[], AbstractContextManager[Any]]) -> _Rows:
        pieces = PIECES if runner.device.type == "cpu" else GPU_PIECES
        # Every so many tokens of the vocabulary: experts get some rows each.
        token_ids = torch.arange(sum(pieces), device=runner.device) * 7919 % runner.vocab_size
        return cls(runner, around, pieces, token_ids)

    @property
    def count(self) -> int:
        return len(self.token_ids)

    def logits(self, start: int, end: int) -> Tensor:
        """Those of rows [start, end), which run together."""
        kept = torch.arange(end - start, device=self.token_ids.device)
        positions = (kept + start) % POSITIONS
        with self.around():
            return self.runner.forward(self.token_ids[start:end], positions, RowWiseStep(end - start), kept)


def _first_difference(runner: ModelRunner, rows: _Rows, start: int, end: int) -> str | None:
    """The first module that makes other rows [start, end) of equal ones when all rows run, in words."""
    alone: dict[tuple[str, int], list[Tensor]] = {}
    found: list[str] = []

    def remember(call: tuple[str, int], module: Any, given: Any, returned: Any) -> None:
        alone[call] = [*_by_rows(given, end - start), *_by_rows(returned, end - start)]

    def compare(call: tuple[str, int], module: Any, given: Any, returned: Any) -> None:
        before, after = ([x[start:end] for x in _by_rows(value, rows.count)] for value in (given, returned))
        there = alone.get(call, [])
        if found or len(there) != len(before) + len(after):
            return
        if all(map(torch.equal, before, there)) and not all(map(torch.equal, after, there[len(before) :])):
            shapes = "".join(f", {key} {list(w.shape)}" for key, w in module._parameters.items() if w is not None)
            found.append(f"{call[0] or 'the model'} ({type(module).__name__}{shapes})")

    with _watched(runner, remember):
        rows.logits(start, end)
    with _watched(runner, compare):
        rows.logits(0, rows.count)
    return found[0] if found else None


@contextmanager
def _watched(runner: ModelRunner, see: Callable[[tuple[str, int], Any, Any, Any], None]) -> Iterator[None]:
    """In its block `see` is told of every call of a module when it ends: its name and number, arguments, result."""
    calls: Counter[str] = Counter()

    def hook(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls[name] += 1
        see((name, calls[name]), module, (args, *kwargs.values()), output)

    with ExitStack() as stack:
        for name, module in runner.named_modules():
            handle = module.register_forward_hook(partial(hook, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _by_rows(value: Any, count: int) -> Iterator[Tensor]:
    """The tensors in arguments or a result that have `count` rows, with those first."""
    if isinstance(value, Tensor):
        if value.ndim > 2 and value.shape[:2] == (1, count):
            yield value[0]
        elif value.ndim > 1 and len(value) == count:
            yield value
    elif isinstance(value, Mapping):
        yield from _by_rows(tuple(value.values()), count)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _by_rows(part, count)
