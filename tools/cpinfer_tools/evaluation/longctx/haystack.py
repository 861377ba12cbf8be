"""Haystacks: text that grows unit by unit around what is hidden in it, until a prompt has an exact number of tokens.

A `Draft` is a prompt whose haystack can have any number of units; `fit` finds the number, and a cut last unit, for a
budget of tokens as the model's own tokenizer counts them:

    | template | unit | unit | NEEDLE | unit | unit | filler (a part of one more unit) | question |
    |<----------------------------------- budget tokens ------------------------------------->|
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cpinfer.errors import UserError
from cpinfer_tools.evaluation.longctx.recall_text import filler_sentence

# What RULER and the passkey task repeat (Mohtashami & Jaggi, "Landmark Attention", 2023).
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# How many tokens a prompt may be short of its budget, where the tokenizer cannot hit it.
SLACK_TOKENS = 4
_TRIES = 12


@dataclass(frozen=True)
class Draft:
    """A prompt that can grow.

    `render(n, filler)` is its text with `n` units of haystack, and `filler` where the next unit would go;
    `filler(n)` is text of that next unit (and on), of which any beginning will do. `references` are what an answer
    should hold, whatever the length.
    """

    render: Callable[[int, str], str]
    filler: Callable[[int], str]
    references: tuple[str, ...]


def fit(draft: Draft, tokenizer: Any, budget: int) -> tuple[str, tuple[int, ...]]:
    """The draft with as much haystack as makes it `budget` tokens, and those tokens.

    Exact where the tokenizer allows it, else at most `SLACK_TOKENS` short. UserError when the bare template is longer
    than the budget, or the tokenizer cannot come that close.
    """

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text)["input_ids"])

    text = draft.render(0, "")
    ids = tokens(text)
    bare = len(ids)
    if bare > budget:
        raise UserError(
            f"the template alone has {bare} tokens, {max(budget, 0)} are left for it. Make the length at least "
            f"{bare - budget} tokens greater"
        )
    num_units, too_many, per_unit = 0, None, 1.0
    guess = 8
    while len(ids) < budget and too_many != num_units + 1:
        trial = draft.render(guess, "")
        trial_ids = tokens(trial)
        per_unit = max(1.0, (len(trial_ids) - bare) / guess)
        if len(trial_ids) <= budget:
            num_units, text, ids = guess, trial, trial_ids
        else:
            too_many = guess
        guess = num_units + max(1, int((budget - len(ids)) / per_unit))
        if too_many is not None and guess >= too_many:
            guess = too_many - 1
    # Filler brings a separator with it: where a single token is missing, it takes the place of the last unit too.
    for kept in (num_units, num_units - 1):
        if len(ids) < budget and kept >= 0:
            text, ids = _filled(draft, kept, budget, tokens, (text, ids))
    if len(ids) < budget - SLACK_TOKENS:
        raise UserError(
            f"the tokenizer cannot hit {budget} tokens: it came to {len(ids)}, and at most {SLACK_TOKENS} fewer are "
            "allowed. Use another length"
        )
    return text, ids


def _filled(
    draft: Draft,
    num_units: int,
    budget: int,
    tokens: Callable[[str], tuple[int, ...]],
    best: tuple[str, tuple[int, ...]],
) -> tuple[str, tuple[int, ...]]:
    """The text with that beginning of the filler that makes it `budget` tokens; `best`, or better, where none does."""
    missing = budget - len(tokens(draft.render(num_units, "")))
    filler = draft.filler(num_units)
    for beginnings in (_by_piece(filler), _by_character(filler)):
        # Counted alone a beginning is cheap; at its place it may merge with its neighbours, which tries find out.
        counted = [(len(tokens(beginning)) - len(tokens("")), beginning) for beginning in beginnings]
        closest = sorted(counted, key=lambda found: (abs(found[0] - missing), len(found[1])))
        for _, beginning in closest[:_TRIES]:
            text = draft.render(num_units, beginning)
            ids = tokens(text)
            if len(best[1]) < len(ids) <= budget:
                best = (text, ids)
            if len(ids) == budget:
                return best
    return best


def _by_piece(text: str) -> Iterator[str]:
    """Beginnings of a text that end with a word or a sign."""
    for found in re.finditer(r"\s*(\w+|[^\w\s]|$)", text):
        yield text[: found.end()]


def _by_character(text: str) -> Iterator[str]:
    for end in range(1, min(len(text), 400) + 1):
        yield text[:end]


def hide(units: Sequence[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """Units with each needle at its depth, the share of the units before it; equal depths keep the needles' order.

    >>> hide(["a", "b", "c", "d"], [(0.5, "N"), (0.0, "M")])
    ['M', 'a', 'b', 'N', 'c', 'd']
    """
    hidden = list(units)
    deepest_last = sorted(needles, key=lambda found: found[0])
    for depth, needle in reversed(deepest_last):
        hidden.insert(round(depth * len(units)), needle)
    return hidden


class Growing:
    """Units made one after another by a random source: the first ones are the same however many are asked for."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make
        self._units: list[str] = []

    def first(self, n: int) -> list[str]:
        """The first `n` units."""
        while len(self._units) < n:
            self._units.append(self._make())
        return self._units[:n]


def noise() -> Growing:
    """RULER's noise: the same five sentences over and over."""
    return Growing(lambda: NOISE)


def synthetic_essay(rng: random.Random) -> Growing:
    """Plain sentences that mean nothing together, where RULER has Paul Graham's essays, which must be downloaded."""
    return Growing(lambda: filler_sentence(rng))
