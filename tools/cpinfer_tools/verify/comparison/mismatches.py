"""Rollouts beside the training forward: which logprobs are comparable, how far they are apart, and what is too far."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpinfer.colocate.mismatch import Compared, Mismatch
from cpinfer.errors import UserError
from cpinfer_tools.verify.comparison.tables import markdown

Logprobs = Sequence[Sequence[float]]

# The forward of the model in one piece, as DDP, ZeRO and FSDP call it.
WHOLE = "whole"
# By dtype: the figure that is judged, and the most it may be. Half precision rounds every token, float32 none that far.
LIMITS = {"float32": ("max_abs", 1e-4), "bfloat16": ("mean_abs", 1e-3), "float16": ("mean_abs", 1e-3)}
# Where every bit is to agree.
EXACT = ("max_abs", 0.0)


@dataclass(frozen=True)
class Sampled:
    """Samples and the logprobs that whoever sampled them gives their tokens, in order of prompt and sample."""

    prompt_indices: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    logprobs: Logprobs

    @classmethod
    def read(cls, output: Path, compared: Compared) -> Sampled:
        """What a rollout wrote. UserError for what is no rollout."""
        try:
            lines = [json.loads(line) for line in output.read_bytes().splitlines()]
            lines.sort(key=lambda line: (line["prompt_index"], line["sample_index"]))
            return cls(
                tuple(line["prompt_index"] for line in lines),
                tuple(tuple(line["prompt_token_ids"]) for line in lines),
                tuple(tuple(line["token_ids"]) for line in lines),
                tuple(compared.logprobs_of(line) for line in lines),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{output} holds no rollouts that can be read ({error!r}).") from error


@dataclass(frozen=True)
class FarToken:
    """The token whose two logprobs are furthest apart, and where it stands."""

    prompt_index: int
    position: int
    token_id: int
    rollout_logprob: float
    training_logprob: float


@dataclass(frozen=True)
class Row:
    """Samples of a layout, or of a peer, against a forward; `is_judged` where the limit is the layout's to keep."""

    name: str
    forward: str
    num_samples: int
    mismatch: Mismatch
    furthest: FarToken
    figure: str
    limit: float
    is_judged: bool

    @classmethod
    def of(
        cls,
        name: str,
        forward: str,
        sampled: Sampled,
        training: Logprobs,
        dtype: str,
        *,
        is_judged: bool,
        is_exact: bool = False,
    ) -> Row:
        """`training`: the logprobs that `forward` gives the samples' tokens. `is_exact`: they are to be those bits."""
        figure, limit = EXACT if is_exact else LIMITS[dtype]
        mismatch = Mismatch.of(sampled.logprobs, training)
        furthest = _furthest(sampled, training)
        return cls(name, forward, len(sampled.prompts), mismatch, furthest, figure, limit, is_judged)

    @property
    def is_within(self) -> bool:
        # A NaN is not.
        return bool(getattr(self.mismatch, self.figure) <= self.limit)

    @property
    def ok(self) -> bool:
        return self.is_within or not self.is_judged

    def plain(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: null for both."""
        data = {
            "name": self.name,
            "forward": self.forward,
            "num_samples": self.num_samples,
            **self.mismatch.as_dict(),
            "limited": f"mismatch_{self.figure}",
            "limit": self.limit,
            "is_within": self.is_within,
            "is_judged": self.is_judged,
            "furthest": _finite(asdict(self.furthest)),
        }
        return _finite(data)


def rows_table(rows: Sequence[Row]) -> str:
    """As Markdown, the limit beside each."""
    header = [
        "logprobs of",
        "against the forward",
        "samples",
        "tokens",
        "mean abs",
        "max abs",
        "KL",
        "share above 1e-3",
        "limit",
        "within",
    ]
    body = [
        [
            row.name,
            row.forward,
            f"{row.num_samples:,}",
            f"{row.mismatch.num_tokens:,}",
            f"{row.mismatch.mean_abs:.2g}",
            f"{row.mismatch.max_abs:.2g}",
            f"{row.mismatch.kl:.2g}",
            f"{row.mismatch.share_above_1e_3:.2%}",
            f"{row.figure.removesuffix('_abs')} ≤ {row.limit:g}",
            ("yes" if row.is_within else "no") + ("" if row.is_judged else " (not judged)"),
        ]
        for row in rows
    ]
    return markdown(header, body, num_left=2, right_until=8)


def verdict(rows: Sequence[Row]) -> str:
    """One sentence."""
    over = [row for row in rows if not row.ok]
    if not over:
        worst: dict[tuple[str, float], float] = {}
        for row in rows:
            if row.is_judged:
                kind = row.figure, row.limit
                worst[kind] = max(worst.get(kind, 0.0), getattr(row.mismatch, row.figure))
        told = (
            f"the largest {figure.removesuffix('_abs')} is {value:.2g}, {limit:g} is allowed"
            for (figure, limit), value in worst.items()
        )
        return f"Every layout is within the limit: {'; '.join(told)}."
    far, at = over[0], over[0].furthest
    names = ", ".join(dict.fromkeys(row.name for row in over))
    return (
        f"OVER THE LIMIT: {names}. Furthest in {far.name}: prompt {at.prompt_index}, "
        f"token {at.token_id} at position {at.position}: {at.rollout_logprob:.6g} when it was sampled, "
        f"{at.training_logprob:.6g} in the training forward."
    )


def _furthest(sampled: Sampled, training: Logprobs) -> FarToken:
    places = [
        FarToken(index, len(prompt) + i, token, ours, theirs)
        for index, prompt, tokens, each, other in zip(
            sampled.prompt_indices, sampled.prompts, sampled.completions, sampled.logprobs, training, strict=True
        )
        for i, (token, ours, theirs) in enumerate(zip(tokens, each, other, strict=True))
    ]

    def distance(at: FarToken) -> float:
        apart = abs(at.rollout_logprob - at.training_logprob)
        return math.inf if math.isnan(apart) else apart

    return max(places, key=distance)


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
