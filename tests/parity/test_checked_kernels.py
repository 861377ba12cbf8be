"""What the check at start asks FlashInfer for is all that an engine asks it for later, and what is compiled ahead.

Modules are those that the literal interpreter of FlashInfer says it would have compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine_parity import generate

import cpinfer
from cpinfer.attention.backends.base import AttentionNeeds, LayerKind
from cpinfer.attention.backends.flashinfer.kernels import Chip, KernelModule, kernel_modules
from cpinfer.config import SamplingParams
from cpinfer.layout.grid import RankGrid
from fake_flashinfer import VERSIONS, checked_backend, fake_flashinfer
from tiny_models import FAMILIES, make_model, prompts_of

AMPERE, HOPPER = Chip(), Chip((9, 0), has_fa3_prefill=True)
# In chunks: of many queries, which kernels of FlashAttention-3 take, and of few.
MANY, FEW = (600,), (5, 17, 40)


class Asked:
    """Engines made in its time take FlashInfer as for a chip; the modules of each check, and of what came later."""

    def __init__(self, chip: Chip) -> None:
        self.needs: list[AttentionNeeds] = []
        self.checked: set[KernelModule] = set()
        self._libraries: list[Any] = []
        self._chip = chip

    def made(self, name: str, device: torch.device, needs: AttentionNeeds) -> Any:
        library = fake_flashinfer(VERSIONS[len(self._libraries) % 2])
        backend = checked_backend(device, needs, library, self._chip)
        self.needs.append(needs)
        self.checked |= library.log.modules
        library.log.modules.clear()
        self._libraries.append(library)
        return backend

    @property
    def later(self) -> set[KernelModule]:
        return set().union(*(library.log.modules for library in self._libraries))

    @property
    def ahead(self) -> set[KernelModule]:
        return {module for needs in self.needs for module in kernel_modules(needs, self._chip)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Chip], Asked]:
    def take(chip: Chip) -> Asked:
        found = Asked(chip)
        monkeypatch.setattr("cpinfer.engine.needs.make_backend", found.made)
        return found

    return take


def run(family: str, grid: RankGrid, changes: dict[str, Any], **config: Any) -> None:
    model_config = copy.deepcopy(FAMILIES[family])
    for name, value in {"max_position_embeddings": 1024, **changes}.items():
        setattr(model_config, name, value)
    model = make_model(model_config)
    # Samples of one prompt, so that rows share a prefix.
    sampling = SamplingParams(temperature=0, max_new_tokens=2, n=2)
    for lengths, chunk in ((MANY, 300), (FEW, 32)):
        keys = {"max_num_batched_tokens": chunk, "cascade_attention": "on", "block_size": 16, **config}
        generate(model, grid, prompts_of(lengths, vocab_size=128), sampling, **keys)


@pytest.mark.parametrize(
    ("family", "grid", "changes", "config", "chip"),
    [
        ("llama", RankGrid(), {}, {}, HOPPER),
        ("gemma2", RankGrid(), {}, {}, HOPPER),
        ("gpt_oss", RankGrid(), {}, {}, AMPERE),
        ("deepseek_v3", RankGrid(), {}, {"context_exchange": "kv"}, AMPERE),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", RankGrid(), {}, {"kv_cache_dtype": "fp8_e4m3"}, HOPPER),
                ("llama", RankGrid(pcp_size=2, dcp_size=2), {"num_key_value_heads": 8}, {}, AMPERE),
                ("mistral", RankGrid(), {}, {}, HOPPER),
                ("gemma2", RankGrid(pcp_size=2, dcp_size=2), {}, {"context_exchange": "kv"}, AMPERE),
                ("gpt_oss", RankGrid(), {}, {}, HOPPER),
                ("deepseek_v3", RankGrid(), {}, {"context_exchange": "queries"}, HOPPER),
            )
        ),
    ],
    ids=str,
)
def test_nothing_is_asked_for_later_that_was_not_checked_at_start(
    asked: Callable[[Chip], Asked],
    family: str,
    grid: RankGrid,
    changes: dict[str, Any],
    config: dict[str, Any],
    chip: Chip,
) -> None:
    found = asked(chip)
    run(family, grid, changes, **config)
    assert found.checked == found.ahead
    assert found.later <= found.checked
    # Nor is anything compiled for nothing: each of it would have been minutes.
    assert found.checked <= found.later


def test_without_caps_in_the_needs_gemmas_modules_would_be_new_later(
    asked: Callable[[Chip], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpinfer.engine.needs.LayerKind", lambda has_window, has_cap: LayerKind(has_window))
    found = asked(AMPERE)
    run("gemma2", RankGrid(), {})
    assert {module.has_cap for module in found.later - found.checked} == {True}


@pytest.mark.parametrize(("cap", "has_cap"), [(50.0, True), (None, False)])
def test_whether_logits_are_capped_is_read_from_the_config(
    asked: Callable[[Chip], Asked], cap: float | None, has_cap: bool
) -> None:
    config = copy.deepcopy(FAMILIES["gemma2"])
    config.attn_logit_softcapping = cap
    found = asked(AMPERE)
    with cpinfer.attach(make_model(config)):
        assert {module.has_cap for module in found.checked} == {has_cap}
