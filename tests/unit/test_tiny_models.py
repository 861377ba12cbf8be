"""The models of the parity tests can tell right attention from wrong: their text depends on single keys."""

from __future__ import annotations

import pytest

from cpinfer.models.families import FAMILIES as SUPPORTED
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of


def test_every_supported_family_has_a_model() -> None:
    assert list(FAMILIES) == list(SUPPORTED)
    assert all(config.model_type == family for family, config in FAMILIES.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_varies_and_changes_with_a_single_key(family: str) -> None:
    model = make_model(FAMILIES[family])
    [prompt] = prompts_of((64,), vocab_size=128)
    text = check_rollout.generate_greedy(model, prompt, 24)
    assert len(set(text)) >= 8
    other = [*prompt[:50], (prompt[50] + 1) % 128, *prompt[51:]]  # one that windows of 24 see
    assert check_rollout.generate_greedy(model, other, 24) != text
    change = check_rollout.score(model, other, text) - check_rollout.score(model, prompt, text)
    assert change.abs().max() > 0.1, "a thousand times the tolerance of the parity tests"
