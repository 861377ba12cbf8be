"""The summary of a run: what came out, in plain units."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpinfer.engine.request import RolloutResult


@dataclass(frozen=True)
class SampleMetrics:
    """What the summary needs of one sample. `retrieved` is None where the input names no answer."""

    num_prompt_tokens: int
    num_generated_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    retrieved: bool | None

    @classmethod
    def of(cls, result: RolloutResult, answer: str | None) -> SampleMetrics:
        """An answer counts as retrieved when the text starts with it, white space at the ends aside."""
        retrieved = None if answer is None else (result.text or "").strip().startswith(answer.strip())
        return cls(len(result.prompt_token_ids), len(result.token_ids), result.ttft_s, result.tpot_s, retrieved)


def summarize(samples: Sequence[SampleMetrics], num_prompts: int, wall_s: float) -> dict[str, Any]:
    """Numbers of a run with units in their keys; null for what no sample tells."""
    num_generated = sum(s.num_generated_tokens for s in samples)
    judged = [s.retrieved for s in samples if s.retrieved is not None]
    return {
        "num_prompts": num_prompts,
        "num_samples": len(samples),
        "num_prompt_tokens": sum(s.num_prompt_tokens for s in samples),
        "num_generated_tokens": num_generated,
        "wall_s": wall_s,
        "tokens_per_s": num_generated / wall_s if wall_s > 0 else None,
        "ttft_s_p50": _median(s.ttft_s for s in samples if s.ttft_s is not None),
        "tpot_s_p50": _median(s.tpot_s for s in samples if s.tpot_s is not None),
        "num_answers": len(judged) if judged else None,
        "num_answers_retrieved": sum(judged) if judged else None,
    }


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as lines for people."""
    width = max(map(len, summary))
    return "\n".join(f"  {key:<{width}}  {_format(value)}" for key, value in summary.items())


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_format(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
