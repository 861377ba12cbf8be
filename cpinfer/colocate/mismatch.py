"""How far rollouts are from the model that trains on them: logprobs of the same tokens, from two computations.

    d = training logprob - rollout logprob, one for each sampled token

Both at the same temperature and of the same distribution; then every d is rounding, and an importance ratio exp(d) is 1
up to it. What is more than rounding makes on-policy training silently off-policy; truncated importance sampling (TIS)
corrects for that, here it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cpinfer.config import SamplingParams

# A token further off than this is counted by itself: a mean over many tokens hides a few that are far away.
FAR = 1e-3


@dataclass(frozen=True)
class Mismatch:
    """Differences d of logprobs over some tokens, in nats.

    Without tokens everything is 0. A NaN in any logprob makes mean, max and kl NaN, and counts as further than 1e-3.

    Attributes:
        num_tokens: tokens compared.
        mean_abs: mean of |d|.
        max_abs: the largest |d|.
        kl: estimates KL(rollout || training) per token from the rollout's samples as mean(exp(d) - 1 - d): unbiased and
            never negative ("k3" of Schulman, "Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html).
        share_above_1e_3: of tokens whose |d| is above 1e-3.
    """

    num_tokens: int = 0
    mean_abs: float = 0.0
    max_abs: float = 0.0
    kl: float = 0.0
    share_above_1e_3: float = 0.0

    @classmethod
    def of(cls, rollout: Sequence[Sequence[float]], training: Sequence[Sequence[float]]) -> Mismatch:
        """The mismatch of some samples.

        Args:
            rollout: for each sample a logprob per token, as the rollout has them.
            training: the same from the training forward.

        Returns:
            Over all tokens of all samples.

        Raises:
            ValueError: where the two differ in samples or in tokens.
        """
        lengths = [[len(sample) for sample in samples] for samples in (rollout, training)]
        if lengths[0] != lengths[1]:
            raise ValueError(f"rollout samples have {lengths[0]} logprobs, those of the training forward {lengths[1]}")
        if not sum(lengths[0]):
            return cls()
        d = _flat(training) - _flat(rollout)
        distance = np.abs(d)
        return cls(
            num_tokens=d.size,
            mean_abs=float(distance.mean()),
            max_abs=float(distance.max()),
            # expm1: of a d of 1e-7, exp(d) - 1 would keep no digit that the square of d needs.
            kl=float((np.expm1(d) - d).mean()),
            # Not `distance > FAR`, which no NaN is.
            share_above_1e_3=float(np.mean(~(distance <= FAR))),
        )

    @classmethod
    def merge(cls, parts: Iterable[Mismatch]) -> Mismatch:
        """The mismatch over all tokens of several.

        Args:
            parts: from whichever ranks or phases; some may be empty.

        Returns:
            One over all their tokens; zeros without any.
        """
        some = [part for part in parts if part.num_tokens]
        if not some:
            return cls()
        num_tokens = sum(part.num_tokens for part in some)
        weights = np.array([part.num_tokens / num_tokens for part in some])

        def mean(values: list[float]) -> float:
            return float(weights @ np.array(values))

        return cls(
            num_tokens=num_tokens,
            mean_abs=mean([part.mean_abs for part in some]),
            max_abs=float(np.max([part.max_abs for part in some])),  # Python's max() may pass a NaN over
            kl=mean([part.kl for part in some]),
            share_above_1e_3=mean([part.share_above_1e_3 for part in some]),
        )

    def as_dict(self, prefix: str = "mismatch_") -> dict[str, Any]:
        """Its figures, for a summary or a log.

        Args:
            prefix: what keys begin with.

        Returns:
            Plain data, one key for each attribute.
        """
        return {
            f"{prefix}num_tokens": self.num_tokens,
            f"{prefix}mean_abs": self.mean_abs,
            f"{prefix}max_abs": self.max_abs,
            f"{prefix}kl": self.kl,
            f"{prefix}share_above_1e_3": self.share_above_1e_3,
        }


@dataclass(frozen=True)
class Compared:
    """Which logprobs of a rollout the training forward can be asked about, at which temperature, and why these.

    `field` is that of a result, and of a line of the results file.
    """

    field: Literal["logprobs", "processed_logprobs"]
    temperature: float
    why: str

    @classmethod
    def of(cls, sampling: SamplingParams) -> Compared:
        """Processed ones, as before a cut, unless more than temperature shaped them: a forward knows nothing of it."""
        if sampling.greedy:
            return cls("logprobs", 1.0, "raw logprobs at temperature 1: greedy decoding leaves one token")
        if sampling.shaped_by:
            shapes = ", ".join(sampling.shaped_by)
            told = f"raw logprobs at temperature 1: {shapes} shaped the distribution that was sampled from"
            return cls("logprobs", 1.0, told)
        told = f"processed logprobs against the forward at temperature {sampling.temperature:g}"
        if sampling.cut_by:
            told += f", log of the kept mass added: {', '.join(sampling.cut_by)} cut the distribution"
        return cls("processed_logprobs", sampling.temperature, told)

    def logprobs_of(self, sample: Mapping[str, Any]) -> tuple[float, ...]:
        """Those of one sample, which is given by the fields of a result."""
        logprobs = sample[self.field]
        return tuple(logprobs) if self.field == "logprobs" else uncut_logprobs(logprobs, sample.get("kept_mass"))


def uncut_logprobs(processed_logprobs: Sequence[float], kept_mass: Sequence[float] | None) -> tuple[float, ...]:
    """Logprobs of sampled tokens before top_k, top_p and min_p cut: at the same temperature a training forward's.

    Args:
        processed_logprobs: of one sample, as its `RolloutResult` has them.
        kept_mass: the same.

    Returns:
        `processed_logprobs + log(kept_mass)`; the former where there was no cut.

    Raises:
        ValueError: where the two are not as long as each other.
    """
    if kept_mass is None:
        return tuple(processed_logprobs)
    if len(processed_logprobs) != len(kept_mass):
        raise ValueError(f"a sample has {len(processed_logprobs)} processed logprobs and {len(kept_mass)} kept masses")
    return tuple(p + math.log(mass) for p, mass in zip(processed_logprobs, kept_mass, strict=True))


def _flat(samples: Sequence[Sequence[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([np.asarray(sample, dtype=np.float64) for sample in samples])
