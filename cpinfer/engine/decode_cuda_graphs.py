"""Decode steps replayed from CUDA graphs: one graph for each number of rows, captured when a step first has it.

A decode step is thousands of small launches; captured, they are one. A graph repeats what was launched on the memory it
was launched on, so everything that differs between steps lies where it lay, and is overwritten before a replay:

    token ids, positions [R], slots [pcp * R], page tables    <- load, every step
    model forward, collectives included                       <- captured once, replayed
    logits [R, vocab]                                         -> one buffer for all graphs

Steps are padded to a few CUDA-graph batch sizes (`cuda_graph_batch_size`), which all ranks of a home know alike.
Padding rows have no keys, and what they write goes to a slot that nobody reads. Nothing that the others notice depends
on whether capturing succeeds: not how much is padded, nor how often a step runs before it is captured. So a rank whose
capture failed still meets the others in every collective: it runs the same steps, launch by launch.

Graphs read weights where they were. When those have moved, or are others, all ranks forget their graphs together.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend, FixedSize, FixedSizeBackend, ReplannedAttention
from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.attention.steps import DecodeStep, RowsByWindow
from cpinfer.comm.axis import AxisComm
from cpinfer.engine.agreement import smallest
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.decode import DecodePlan, cuda_graph_batch_size, writing_all
from cpinfer.layout.heads import GroupHeads
from cpinfer.layout.shards import KVSharding
from cpinfer.models.runner import ModelRunner
from cpinfer.ops.staging import Staging

# What captures: given a function that launches work, and gives None, one that launches it again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graphs_error(runner: ModelRunner, backend: AttentionBackend) -> str | None:
    """Why decode of this model cannot be captured, for a reason that all ranks share; None when it can."""
    if runner.device.type != "cuda":
        return f"the model is on {runner.device.type}"
    if not isinstance(backend, FixedSizeBackend):
        return f"the {backend.name} backend plans steps of any size anew; FlashInfer is wanted"
    if runner.weights_come_and_go:
        return "weights are gathered while the model runs"
    if runner.has_experts:
        return "padding rows would reach the model's experts"
    return None


def make_decode_graphs(
    runner: ModelRunner,
    replica: AxisComm,
    backend: AttentionBackend,
    cache: PagedKVCache,
    exchange: StateExchange,
    heads: GroupHeads,
    sharding: KVSharding,
    max_rows: int,
) -> DecodeCudaGraphs | None:
    """Graphs of one rank for steps of `max_rows` on it; None, with a warning that says why, where there can be none."""
    why_not = cuda_graphs_error(runner, backend)
    if why_not is not None or not isinstance(backend, FixedSizeBackend):
        warnings.warn(f"decode runs without CUDA graphs: {why_not}", stacklevel=2)
        return None
    return DecodeCudaGraphs(runner, replica, backend, cache, exchange, heads, sharding, cuda_graph_batch_size(max_rows))


class DecodeCudaGraphs:
    """The graphs of one rank, over one cache, for steps of at most `max_rows` on it."""

    def __init__(
        self,
        runner: ModelRunner,
        replica: AxisComm,
        backend: FixedSizeBackend,
        cache: PagedKVCache,
        exchange: StateExchange,
        heads: GroupHeads,
        sharding: KVSharding,
        max_rows: int,
        capture: Capture | None = None,
    ) -> None:
        self._runner = runner
        self._replica = replica
        self._backend = backend
        self._cache = cache
        self._exchange = exchange
        self._heads = heads
        self._capture: Capture | None = capture or capture_on_cuda()
        self._blocks_per_row = min(cache.num_blocks, sharding.num_blocks(runner.spec.max_positions))
        self._logits = torch.zeros(max_rows, runner.spec.vocab_size, device=runner.device)
        self._buckets: dict[int, _Bucket] = {}
        self._weights = runner.weight_places()

    def forget_what_moved(self) -> None:
        """Capture anew, on all ranks, when the weights of any rank lie elsewhere than when this was last asked."""
        before, self._weights = self._weights, self._runner.weight_places()
        if smallest(self._replica, -int(before != self._weights), self._runner.device) < 0:
            self.forget()

    def forget(self) -> None:
        """Capture anew what comes. All ranks must, or none: capturing begins with steps that have collectives."""
        self._buckets.clear()

    def forward(self, plan: DecodePlan, rows: RowsByWindow, token_ids: Sequence[int]) -> Tensor:
        """`[len(token_ids), vocab]` logits of this rank's real rows; collective as the step itself.

        The result lies in memory that the next call overwrites.
        """
        plan = writing_all(plan, self._cache.padding_slot)
        bucket = self._buckets.get(len(plan.own))
        if bucket is not None:
            bucket.load(plan, rows, token_ids)
        else:
            bucket = self._buckets[len(plan.own)] = self._new_bucket(plan, rows)
            bucket.load(plan, rows, token_ids)
            bucket.run()  # compiles kernels, makes plans and communicators: nothing of that can be captured
            bucket.replay = self._captured(bucket)
        (bucket.replay or bucket.run)()
        return bucket.logits[: len(token_ids)]

    def _captured(self, bucket: _Bucket) -> Callable[[], None] | None:
        if self._capture is None:
            return None
        try:
            replay = self._capture(bucket.run)
        except RuntimeError as error:
            self._capture = None
            warnings.warn(f"decode runs without CUDA graphs: capturing failed ({error})", stacklevel=2)
            return None
        logging.getLogger(__name__).info("captured a decode graph of %d row(s)", len(bucket.logits))
        return replay

    def _new_bucket(self, plan: DecodePlan, rows: RowsByWindow) -> _Bucket:
        num_rows = len(plan.gathered)
        planned = {
            window: self._backend.fixed_plan(
                FixedSize(num_rows, num_rows * (self._blocks_per_row if window is None else window)),
                single_tokens=window is not None,
            )
            for window in rows
        }
        step = DecodeStep(plan, planned, self._cache, self._exchange, self._heads)
        return _Bucket(self._runner, step, planned, self._logits[: len(plan.own)], num_rows, self._cache.staging)


class _Bucket:
    """The memory of all steps with as many rows, and the graph over it once there is one."""

    def __init__(
        self,
        runner: ModelRunner,
        step: DecodeStep,
        planned: Mapping[int | None, ReplannedAttention],
        logits: Tensor,
        num_gathered: int,
        staging: Staging,
    ) -> None:
        self._runner = runner
        self._step = step
        self._planned = planned
        self._staging = staging
        # Side by side, so that one copy brings them: ids, positions, gathered rows that are written, and slots.
        sizes = [len(logits), len(logits), num_gathered, num_gathered]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=runner.device)
        self._token_ids, self._positions, *writes = torch.split(self._numbers, sizes)
        step.write_by(*writes)
        self.logits = logits
        self.replay: Callable[[], None] | None = None

    def load(self, plan: DecodePlan, rows: RowsByWindow, token_ids: Sequence[int]) -> None:
        padded = [*token_ids, *[0] * (len(self._token_ids) - len(token_ids))]
        self._numbers.copy_(
            self._staging.put(np.concatenate([padded, plan.positions, plan.write_src, plan.write_slots]))
        )
        for window, planned in self._planned.items():
            planned.update(rows[window])

    def run(self) -> None:
        self.logits.copy_(self._runner.forward(self._token_ids, self._positions, self._step, None))


def capture_on_cuda() -> Capture:
    """Captures into CUDA graphs that share one pool of memory: only one of them runs at a time."""
    # A pool whose graphs are all gone cannot be captured into again (cuBLAS keeps its workspace in it).
    graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool = next((other.pool() for other in graphs), None)
        try:
            # Other threads (NCCL's watchdog, a progress bar) may go on with what they do.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                run()
        finally:
            torch.cuda.set_stream(stream)  # a capture that failed leaves its own behind
        graphs.add(graph)
        replay: Callable[[], None] = graph.replay
        return replay

    return capture
