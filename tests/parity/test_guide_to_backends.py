"""The guide to adding a backend adds one, and what it says of faults is what an engine says."""

from __future__ import annotations

import copy
import re
import sys
from types import ModuleType
from typing import Any

import pytest

import cpinfer
from cpinfer.attention.backends.registry import BACKENDS, BackendRow
from cpinfer.comm.threads import run_ranks
from cpinfer.errors import BackendFaultError, UserError
from cpinfer.layout.grid import RankGrid
from documents import code_blocks, page
from tiny_models import FAMILIES, make_model, prompts_of

GUIDE = page("extending/backend.md")
SOURCE, ROW = code_blocks(GUIDE)
MODULE = "cpinfer.attention.backends.plain_backend"
GREEDY = cpinfer.SamplingParams(temperature=0, max_new_tokens=6)
# GQA; windows and a soft cap, which call for all that a kernel may be asked; latents, whose values are part of keys.
RUN = ("llama", "gemma2", "deepseek_v2")


def add(monkeypatch: pytest.MonkeyPatch, source: str = SOURCE) -> None:
    """What the guide says to do: a file, and a row."""
    module = ModuleType(MODULE)
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, MODULE, module)
    [(name, row)] = eval(f"{{{ROW}}}", {"BackendRow": BackendRow}).items()
    monkeypatch.setitem(BACKENDS, name, row)  # type: ignore[arg-type]


def tokens(family: str, backend: str, grid: RankGrid, **keys: Any) -> list[tuple[int, ...]]:
    """Of two prompts, the longer in chunks."""
    model = make_model(FAMILIES[family])
    prompts = prompts_of((5, 45), vocab_size=128)

    def body(topology: cpinfer.Topology) -> list[tuple[int, ...]]:
        options = {"backend": backend, "kv_cache_gib": 0.01, "max_num_batched_tokens": 32, **keys}
        with cpinfer.attach(copy.deepcopy(model), topology, options) as engine:
            return [tuple(result.token_ids) for result in engine.generate(prompts, GREEDY)]

    return run_ranks(grid, body)[0]


@pytest.mark.parametrize("family", RUN)
def test_an_engine_on_the_backend_of_the_guide_gives_the_tokens_of_torchs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match='unknown backend "plain"'):
        tokens(family, "plain", RankGrid())
    add(monkeypatch)
    for grid in (RankGrid(), RankGrid(pcp_size=2, dcp_size=2)):
        assert tokens(family, "plain", grid) == tokens(family, "torch", grid)


def test_a_cache_in_fp8_is_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch)
    grid = RankGrid(pcp_size=2, dcp_size=2)
    assert tokens("llama", "plain", grid, kv_cache_dtype="fp8") == tokens("llama", "torch", grid, kv_cache_dtype="fp8")


# Of each row of the guide's table: the family in which it shows, and the line of the guide's code with the fault in it.
FAULTS = {
    "its lse is a logarithm to base 2": (
        "llama",
        "torch.exp(logits - lse[..., None]), v), lse",
        "torch.exp(logits - lse[..., None]), v), lse / 0.6931471805599453",
    ),
    "its causal mask is aligned to the first key, not to the last": (
        "llama",
        "torch.arange(S - T, S",
        "torch.arange(T",
    ),
    "its logits have no soft cap": ("gemma2", "if soft_cap is not None:", "if False:"),
    "a row without keys is not (0, -inf)": ("llama", "-torch.inf, device", "torch.nan, device"),
}


def test_the_guide_has_every_fault_that_is_tried() -> None:
    assert re.findall(r"^\| .* \| `([^`]*)` \|$", GUIDE, re.MULTILINE) == list(FAULTS)


@pytest.mark.parametrize("said", FAULTS)
def test_what_the_guide_says_of_a_fault_is_what_the_engine_says_at_start(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, right, wrong = FAULTS[said]
    assert SOURCE.count(right) == 1
    add(monkeypatch, SOURCE.replace(right, wrong))
    with pytest.raises(BackendFaultError, match=re.escape(said)):
        tokens(family, "plain", RankGrid())
