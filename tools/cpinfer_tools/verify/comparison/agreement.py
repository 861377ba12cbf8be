"""How far a layout's answers are from the reference's: what accuracy tables cannot show.

Two answers are compared up to the first position where their tokens differ; behind it they are answers to different
texts. A *near-tie* is a difference that rounding explains. Of greedy tokens: both layouts found their token the
likeliest, so within the tolerance both are equally likely, and neither can have more than half of the probability.

>>> from dataclasses import replace
>>> a = Sample(SampleKey("t", 8, None, 0, 0), "m", 1.0, (5, 6, 7), (-0.1, -0.9, -0.2), 8, {})
>>> b = replace(a, token_ids=(5, 9, 7), logprobs=(-0.1, -0.9, -3.0))
>>> first_difference(a, b), is_greedy_near_tie(a, b, 1, tolerance=1e-4)
(1, True)

Sampled tokens are drawn by two races (`engine.sampling`), and differ where one of them is nearly a tie. Where logprobs
differ by d, a race has another winner with probability E|d_i - d_j| / 2, i and j drawn by it: both together at most
with the tolerance, so that share of differences is let pass.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cpinfer_tools.verify.comparison.samples import Pass, Run, Sample, SampleKey

Kind = Literal["tokens", "logprob", "prompt", "missing"]


@dataclass(frozen=True)
class Disagreement:
    """One place where a layout is not the reference, and no rounding explains it. `position` counts new tokens."""

    layout: str
    passed: Pass
    key: SampleKey
    position: int | None
    kind: Kind
    detail: str

    def __str__(self) -> str:
        at = "" if self.position is None else f", position {self.position}"
        return f"{self.layout} ({self.passed}): {self.key}{at}: {self.detail}"

    def plain(self) -> dict[str, Any]:
        """The same as plain data, the key's parts among the others."""
        data = asdict(self)
        return {**{k: v for k, v in data.items() if k not in ("key", "passed")}, "pass": self.passed} | (
            self.key._asdict()
        )


@dataclass(frozen=True)
class Agreement:
    """One layout beside the reference, one pass. None where no sample tells.

    `first_difference_*` are over the samples whose tokens differ. `*_abs_logprob_difference` are over
    `num_positions`, those of the common prefixes.
    """

    layout: str
    passed: Pass
    num_samples: int
    num_identical: int
    num_near_ties: int
    first_difference_median: float | None
    first_difference_min: int | None
    num_positions: int
    mean_abs_logprob_difference: float | None
    max_abs_logprob_difference: float | None
    disagreements: tuple[Disagreement, ...]

    @property
    def share_identical(self) -> float | None:
        return self.num_identical / self.num_samples if self.num_samples else None

    def plain(self) -> dict[str, Any]:
        """The numbers as plain data; of the disagreements how many."""
        data = {k: v for k, v in asdict(self).items() if k not in ("passed", "disagreements")}
        return data | {
            "pass": self.passed,
            "share_identical": self.share_identical,
            "num_disagreements": len(self.disagreements),
        }


def agree(reference: Run, other: Run, tolerance: float) -> Agreement:
    """`other` beside `reference`, sample by sample. Samples that only one of them has are disagreements."""
    assert reference.passed == other.passed, "a greedy answer has no sampled counterpart"
    theirs = other.by_key
    pairs = [(sample, theirs[sample.key]) for sample in reference.samples if sample.key in theirs]
    ends = [first_difference(a, b) for a, b in pairs]
    differences = [logprob_differences(a, b, end) for (a, b), end in zip(pairs, ends, strict=True)]
    found = list(_unpaired(reference, other))
    unlike: list[Disagreement] = []  # tokens that differ for no reason that one sample could show
    num_near_ties = 0
    for (a, b), end, steps in zip(pairs, ends, differences, strict=True):
        at = (other.layout, other.passed, a.key)
        if a.prompt_num_tokens != b.prompt_num_tokens:
            detail = f"its prompt has {b.prompt_num_tokens} tokens, the reference's {a.prompt_num_tokens}"
            found.append(Disagreement(*at, None, "prompt", detail))
            continue
        # Not `>`: a NaN is beyond every tolerance.
        beyond = [i for i, step in enumerate(steps) if not step <= tolerance]
        if beyond:
            i = beyond[0]
            detail = f"logprob {b.logprobs[i]:.6g}, the reference's {a.logprobs[i]:.6g}"
            found.append(Disagreement(*at, i, "logprob", f"{detail}: {steps[i]:.3g} apart"))
        if end is not None:
            different = Disagreement(*at, end, "tokens", f"{_token(b, end)}, the reference's {_token(a, end)}")
            if other.passed == "sampled":
                unlike.append(different)
            elif not is_greedy_near_tie(a, b, end, tolerance):
                found.append(different)
            else:
                num_near_ties += 1
    num_positions = sum(map(len, differences))
    if len(unlike) > math.ceil(tolerance * num_positions):
        found += unlike
    else:
        num_near_ties += len(unlike)
    steps = [step for part in differences for step in part]
    firsts = [end for end in ends if end is not None]
    return Agreement(
        layout=other.layout,
        passed=other.passed,
        num_samples=len(pairs),
        num_identical=len(pairs) - len(firsts),
        num_near_ties=num_near_ties,
        first_difference_median=statistics.median(firsts) if firsts else None,
        first_difference_min=min(firsts, default=None),
        num_positions=num_positions,
        mean_abs_logprob_difference=statistics.fmean(steps) if steps else None,
        max_abs_logprob_difference=_largest(steps),
        disagreements=tuple(found),
    )


def first_difference(a: Sample, b: Sample) -> int | None:
    """The first position where the tokens differ, or where one answer has ended; None when they are the same."""
    for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)):
        if x != y:
            return i
    shorter, longer = sorted((len(a.token_ids), len(b.token_ids)))
    return None if shorter == longer else shorter


def logprob_differences(a: Sample, b: Sample, end: int | None) -> list[float]:
    """Absolute differences at the positions before `end`. NaN on both sides differs too."""
    pairs = zip(a.logprobs[:end], b.logprobs[:end], strict=end is None)
    return [0.0 if x == y else abs(x - y) for x, y in pairs]


def is_greedy_near_tie(a: Sample, b: Sample, position: int, tolerance: float) -> bool:
    """Whether rounding explains that greedy answers part here (head of this module). An answer that ends does not.

    Without a tolerance nothing was rounded, and nothing explains it.
    """
    if tolerance == 0 or position >= min(len(a.token_ids), len(b.token_ids)):
        return False
    x, y = a.logprobs[position], b.logprobs[position]
    return abs(x - y) <= tolerance and max(x, y) <= math.log(0.5) + tolerance


def all_logprob_differences(reference: Run, other: Run) -> list[float]:
    """Every difference on common prefixes, in the order of the samples: what the agreement plot shows."""
    theirs = other.by_key
    return [
        step
        for a in reference.samples
        if (b := theirs.get(a.key)) is not None
        for step in logprob_differences(a, b, first_difference(a, b))
    ]


def _unpaired(reference: Run, other: Run) -> Iterator[Disagreement]:
    ours, theirs = reference.by_key, other.by_key
    for key in ours:
        if key not in theirs:
            yield Disagreement(other.layout, other.passed, key, None, "missing", "it lacks this sample")
    for key in theirs:
        if key not in ours:
            yield Disagreement(other.layout, other.passed, key, None, "missing", "the reference lacks this sample")


def _token(sample: Sample, position: int) -> str:
    if position >= len(sample.token_ids):
        return "the end"
    return f"token {sample.token_ids[position]} (logprob {sample.logprobs[position]:.6g})"


def _largest(steps: Sequence[float]) -> float | None:
    """The largest value, NaN when there is one: `max` would lose it."""
    return math.nan if any(map(math.isnan, steps)) else max(steps, default=None)
