"""Tasks in the form that the shipped recall models know (configs/recall-tiny): synthetic, and made for these models.

... FILLER Remember: Basil carves lanterns; FILLER Recall: Basil        -> " carves lanterns;"
"""

from __future__ import annotations

import random

from cpinfer_tools.evaluation.longctx.haystack import Draft, hide, synthetic_essay
from cpinfer_tools.evaluation.longctx.recall_text import DOES, EXCERPT, NAMES, STOP, THINGS


def recall(rng: random.Random, depth: float | None, num_records: int) -> Draft:
    """`num_records` records over filler, one of them asked for: it lies at `depth`, the others anywhere.

    No name or word is in two records: induction over one token could not tell them apart.
    """
    records = list(zip(*(rng.sample(column, num_records) for column in (NAMES, DOES, THINGS)), strict=True))
    depths = [rng.random() if depth is None else depth, *(rng.random() for _ in records[1:])]
    needles = [(at, "Remember: {} {} {}{}".format(*record, STOP)) for at, record in zip(depths, records, strict=True)]
    units = synthetic_essay(rng)
    subject, does, thing = records[0]

    def render(n: int, filler: str) -> str:
        parts = hide(units.first(n), needles)
        return " ".join([EXCERPT + filler, *parts, f"Recall: {subject}"])

    return Draft(render, lambda n: "".join(f" {unit}" for unit in units.first(n + 2)[n:]), (f"{does} {thing}",))
