"""What a server counts and measures, for Prometheus: a registry of its own for each server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cpinfer.engine.engine import Engine
from cpinfer.engine.request import RolloutResult

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """What happened to clients' requests, beside what the engine that answers them says of itself."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.num_prompt_tokens = Counter(
            "cpinfer_prompt_tokens", "Tokens of prompts that clients asked with", registry=self._registry
        )
        self._ttft_s = Histogram(
            "cpinfer_time_to_first_token_seconds",
            "From a request's arrival to the first token of each sample",
            buckets=_TTFT_S,
            registry=self._registry,
        )
        self._num_samples = Counter(
            "cpinfer_samples", "Samples that have ended", ["finish_reason"], registry=self._registry
        )
        self._tpot_s = Histogram(
            "cpinfer_time_per_output_token_seconds",
            "Mean time per token of a sample behind its first",
            buckets=_TPOT_S,
            registry=self._registry,
        )

    def ended(self, finish_reason: str, result: RolloutResult | None, taken_s: float) -> None:
        """Take note of a sample that has ended, `taken_s` after its request arrived; no `result` of one that failed."""
        self._num_samples.labels(finish_reason).inc()
        if result is None or result.ttft_s is None:
            return
        decode_s = 0.0
        if result.tpot_s is not None:
            decode_s = result.tpot_s * (len(result.token_ids) - 1)
            self._tpot_s.observe(result.tpot_s)
        self._ttft_s.observe(taken_s - decode_s)

    def text(self) -> bytes:
        """All of it, in the text format of Prometheus."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What the engine says when it is asked."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        load = engine.load
        gauges = {
            "requests_running": ("Samples that get a token in every step", load.num_running),
            "requests_waiting": ("Samples that are prefilled or wait", load.num_waiting),
            "kv_cache_usage_ratio": ("Share of KV blocks held by samples and cached prefixes", load.kv_usage),
            "weights_version": ("Of the weights that samples are drawn by", engine.weights_version),
        }
        for name, (said, value) in gauges.items():
            yield GaugeMetricFamily(f"cpinfer_{name}", said, value=value)
        counters = {
            "preemptions": ("Samples put back and computed again", load.stats.num_preemptions),
            "generation_tokens": ("Tokens sampled", load.stats.num_generated_tokens),
            "prefill_tokens": ("Tokens that prefills computed", load.stats.num_computed_prefill_tokens),
            "cached_prefill_tokens": ("Tokens of prompts found cached", load.stats.num_cached_prefill_tokens),
        }
        for name, (said, value) in counters.items():
            yield CounterMetricFamily(f"cpinfer_{name}", said, value=value)
