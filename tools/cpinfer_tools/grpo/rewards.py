"""Rewards that a program can verify, and those of a user's own file. All are called as TRL calls a reward function."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpinfer.errors import UserError
from cpinfer_tools.evaluation.longctx.recall_text import DOES, NAMES, STOP, THINGS

# Completions are texts, or chats whose last message is the answer.
Completion = str | Sequence[Mapping[str, str]]
Reward = Callable[..., list[float]]

_SENTENCE = tuple(frozenset(words) for words in (NAMES, DOES, THINGS))


def sentence(completions: Sequence[Completion], **_: Any) -> list[float]:
    """How much of "NAME DOES THINGS;" each completion is: a quarter for each word in its place, and one for the end.

    >>> sentence([" Alice keeps boats;", " Alice boats keeps;", " keeps Alice", ""])
    [1.0, 0.5, 0.0, 0.0]
    """
    return [_sentence_score(c if isinstance(c, str) else c[-1]["content"]) for c in completions]


def _sentence_score(text: str) -> float:
    words = text.removesuffix(STOP).split()
    num_right = sum(word in known for word, known in zip(words, _SENTENCE, strict=False))
    ends_well = text.endswith(STOP) and len(words) == len(_SENTENCE)
    return (num_right + ends_well) / (len(_SENTENCE) + 1)


REWARDS: dict[str, Reward] = {"sentence": sentence}


def find_reward(name: str) -> Reward:
    """The reward a config names: one of `REWARDS`, or FUNCTION of "FILE.py:FUNCTION". UserError when there is none."""
    if name in REWARDS:
        return REWARDS[name]
    path, colon, function = name.rpartition(":")
    if not colon:
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)
        raise UserError(
            f'"training.reward" is {name!r}; the nearest known reward is "{near[0]}", '
            'and "FILE.py:FUNCTION" names one of your own.'
        )
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None or module_spec.loader is None or not Path(path).is_file():
        raise UserError(f'"training.reward": {path} is no Python file.')
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f'"training.reward": {path} fails when it is read: {type(error).__name__}: {error}.') from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f'"training.reward": {path} has no function "{function}".')
    return found  # type: ignore[no-any-return]
