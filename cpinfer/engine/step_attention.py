"""Makes of a planned step what its attention layers call: kernels planned, buffers made, exchanges chosen."""

from __future__ import annotations

from cpinfer.attention.backends.base import StepBackends
from cpinfer.attention.cascade import plan_cut
from cpinfer.attention.context import ContextAttention, KVContext, QueryContext, WindowContext
from cpinfer.attention.steps import DecodeStep, IdleStep, PrefillStep
from cpinfer.config import EngineConfig
from cpinfer.engine.exchanges import Exchanges
from cpinfer.engine.step_plans import DecodeInput, PrefillInput
from cpinfer.kv_cache.paged_kv_cache import PagedKVCache
from cpinfer.layout.context import (
    StepContext,
    choose_exchange,
    plan_kv_exchange,
    plan_query_exchange,
    plan_window_exchanges,
)
from cpinfer.layout.heads import GroupHeads
from cpinfer.layout.rows import AttentionRows
from cpinfer.models.spec import ModelSpec


class StepAttention:
    """The attention of steps on one rank, over one cache. What it decides, it decides from what all ranks know."""

    def __init__(
        self,
        spec: ModelSpec,
        config: EngineConfig,
        heads: GroupHeads,
        exchanges: Exchanges,
        backends: StepBackends,
        cache: PagedKVCache,
    ) -> None:
        self._spec = spec
        self._config = config
        self._heads = heads
        self._exchanges = exchanges
        self._backend, self._decode_backend = backends
        self._cache = cache
        # In a fixed order: every rank gathers for one window after the other.
        windows = sorted({w for w in spec.windows if w is not None})
        self._has_full_layers = spec.widest_window is None
        self._gathered: list[int | None] = [*windows]
        if config.deterministic:
            # A tile may hold keys of the context and new ones, so all that a query sees is laid out behind each other.
            self._gathered += [None] * self._has_full_layers

    def prefill(self, planned: PrefillInput) -> PrefillStep:
        """The attention of a prefill step, with what earlier steps cached of its prompts."""
        plan, step = planned.plan, planned.context
        rows: dict[int | None, AttentionRows] = {None: plan.rows} if self._has_full_layers else {}
        context, window_contexts = None, {}
        has_context = any(c.num_tokens for c in step.contexts)
        if has_context and self._has_full_layers and None not in self._gathered:
            context = self._full_context(step)
        for window in self._gathered:
            if not has_context:
                rows[window] = plan.rows if window is None else plan.rows.within(window)
                continue
            comm = self._exchanges.context_comm
            plans = plan_window_exchanges(step, comm.index, window, self._config.context_workspace_tokens)
            rows.pop(window, None)
            window_contexts[window] = WindowContext(plans, self._backend, self._cache, comm, self._heads)
        return PrefillStep(
            plan,
            rows,
            self._backend,
            self._cache,
            self._exchanges.prefill_comm,
            self._heads,
            context,
            window_contexts,
            absorbs=self._config.deterministic,
        )

    def _full_context(self, step: StepContext) -> ContextAttention:
        """Attention to all that is cached, by whatever moves fewer bytes, or computes less."""
        exchange, latent = self._config.context_exchange, self._spec.latent
        if exchange == "auto":
            exchange = choose_exchange(
                step,
                q_heads=self._heads.num_q_heads,
                kv=self._cache.layout,
                dtype_bytes=self._cache.dtype.itemsize,
                max_absorbed_queries=None if latent is None else latent.max_absorbed_queries,
            )
        comm = self._exchanges.context_comm
        if exchange == "queries":
            query_plan = plan_query_exchange(step, comm.index)
            return QueryContext(query_plan, self._backend, self._cache, self._exchanges.context, self._heads)
        workspace_tokens = self._config.context_workspace_tokens
        if latent is not None:  # expanded they are many times larger: no more at a time than new tokens are
            workspace_tokens = min(workspace_tokens, self._config.max_num_batched_tokens)
        kv_plan = plan_kv_exchange(step, comm.index, workspace_tokens)
        return KVContext(kv_plan, self._backend, self._cache, comm, self._heads)

    def decode(self, planned: DecodeInput) -> DecodeStep | IdleStep:
        """The attention of a decode step: of this home's rows, or of none."""
        if planned.plan is None:
            return IdleStep()
        kernels = {
            window: plan_cut(self._decode_backend, r, planned.cut if window is None else None)
            for window, r in planned.rows.items()
        }
        return DecodeStep(planned.plan, kernels, self._cache, self._exchanges.decode, self._heads)
