"""Which families tests run: all of the table, most of them where there is time.

Those in `OFTEN` differ in what attention and the engine see of a model; fast tests and fuzzers take them. A new row is
seen by the fast tests of a few invariants, by all others when slow tests run.
"""

from __future__ import annotations

import pytest

from cpinfer.models.families import FAMILIES

# The first rows of the table. Fuzzers draw from these: with one more, their seeds stand for other cases.
OFTEN = tuple(FAMILIES)[:12]
SELDOM = tuple(FAMILIES)[12:]
EVERY_FAMILY = [*OFTEN, *(pytest.param(family, marks=pytest.mark.slow) for family in SELDOM)]
WITH_STATES = frozenset(name for name, family in FAMILIES.items() if family.has_gated_delta)
WITHOUT_STATES = [*OFTEN, *(pytest.param(f, marks=pytest.mark.slow) for f in SELDOM if f not in WITH_STATES)]
WITHOUT_TP = frozenset(name for name, family in FAMILIES.items() if "autotp" in family.refused)
