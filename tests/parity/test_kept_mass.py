"""What a cut of the distribution kept: the mass and the ids, in every layout, against Transformers' own logits."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_parity import grid_name
from thread_tp import on_ranks
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import cpinfer
import kept_mass as example
from cpinfer.config import SamplingParams
from cpinfer.engine.engine import Engine
from cpinfer.engine.request import RolloutResult
from cpinfer.layout.grid import RankGrid
from tiny_models import FAMILIES, make_model, prompts_of

GRIDS = [
    RankGrid(),
    RankGrid(pcp_size=2, dcp_size=2),
    RankGrid(pcp_size=2, dcp_size=1),
    RankGrid(tp_size=2),
    RankGrid(tp_size=2, pcp_size=2, dcp_size=4),
]
PROMPTS = prompts_of((5, 40, 17), vocab_size=128)
TOLERANCE = 1e-4
BASE = SamplingParams(temperature=0.8, max_new_tokens=6, n=2, seed=3, kept_token_ids=True)
CUTS: dict[str, tuple[dict[str, Any], Any]] = {
    "top_p": ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
    "top_k": ({"top_k": 5}, TopKLogitsWarper(5)),
    "min_p": ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
    "all": (
        {"top_p": 0.9, "top_k": 20, "min_p": 0.02},
        LogitsProcessorList([TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)]),
    ),
}
CONFIG: dict[str, Any] = {"kv_cache_gib": 2**-8, "block_size": 4}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(FAMILIES["qwen2"])


def generate(model: Any, grid: RankGrid, sampling: SamplingParams, **config: Any) -> list[RolloutResult]:
    """On every rank the same; those of the first."""
    first, *others = on_ranks(model, grid, lambda engine: engine.generate(PROMPTS, sampling), **CONFIG, **config)
    what = [(r.token_ids, r.kept_mass, r.kept_token_ids) for r in first]
    assert all([(r.token_ids, r.kept_mass, r.kept_token_ids) for r in other] == what for other in others)
    return first


@torch.no_grad()
def before_the_cut(model: Any, result: RolloutResult) -> torch.Tensor:
    """`[tokens, vocab]`: logprobs of the whole distribution, at the temperature."""
    ids = torch.tensor([[*result.prompt_token_ids, *result.token_ids]])
    logits = model(ids).logits[0, len(result.prompt_token_ids) - 1 : -1]
    return torch.log_softmax(logits / BASE.temperature, dim=-1)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_processed_logprob_and_kept_mass_give_the_logprob_before_the_cut(model: Any, grid: RankGrid, cut: str) -> None:
    words, warper = CUTS[cut]
    masses = []
    for result in generate(model, grid, replace(BASE, **words)):
        assert result.kept_mass is not None and result.kept_token_ids is not None
        uncut = before_the_cut(model, result)
        tokens = torch.tensor(result.token_ids)
        theirs = uncut.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        processed, mass = torch.tensor(result.processed_logprobs), torch.tensor(result.kept_mass)
        assert (processed + mass.log() - theirs).abs().max() <= TOLERANCE
        kept = warper(None, uncut) > -torch.inf
        assert [list(ids or ()) for ids in result.kept_token_ids] == [row.nonzero().flatten().tolist() for row in kept]
        assert (mass - torch.where(kept, uncut.exp(), 0).sum(dim=-1)).abs().max() <= TOLERANCE
        # The control: the mass of the cut distribution, which is 1, is no correction.
        assert (processed - theirs).abs().max() > 100 * TOLERANCE
        masses += result.kept_mass
    assert 0 < min(masses) < max(masses) <= 1


def test_a_preempted_request_keeps_what_its_tokens_were_told(model: Any) -> None:
    prompts, sampling = prompts_of([9] * 6, vocab_size=128), replace(BASE, top_p=0.8, max_new_tokens=12)

    def body(engine: Engine) -> tuple[list[RolloutResult], int]:
        return engine.generate(prompts, sampling), engine.stats.num_preemptions

    [(calm, never)] = on_ranks(model, RankGrid(), body, **CONFIG)
    [(tight, times)] = on_ranks(model, RankGrid(), body, **{**CONFIG, "kv_cache_gib": 2**-16})
    assert never == 0 < times
    for result, other in zip(calm, tight, strict=True):
        assert (result.token_ids, result.kept_token_ids) == (other.token_ids, other.kept_token_ids)
        assert result.kept_mass == pytest.approx(other.kept_mass, abs=TOLERANCE)


@pytest.mark.parametrize("grid", [RankGrid(), RankGrid(pcp_size=2, dcp_size=2)], ids=grid_name)
def test_streamed_tokens_carry_what_their_results_have(model: Any, grid: RankGrid) -> None:
    def body(engine: Engine) -> list[cpinfer.RequestOutput]:
        outputs: list[cpinfer.RequestOutput] = []
        is_first = engine.topology.rank == 0
        if is_first:
            engine.add(PROMPTS[1], replace(BASE, top_p=0.8, n=1))

        def has_all(new: list[cpinfer.RequestOutput]) -> bool:
            outputs.extend(new)
            return not is_first or any(output.result for output in outputs)

        engine.run_until(has_all)
        return outputs

    outputs = on_ranks(model, grid, body, **CONFIG)[0]
    tokens = [token for output in outputs for token in output.tokens]
    result = outputs[-1].result
    assert len(outputs) > 2 and result is not None
    assert tuple(token.kept_mass for token in tokens) == result.kept_mass
    assert tuple(token.kept_ids for token in tokens) == result.kept_token_ids


@pytest.mark.parametrize("grid", [RankGrid(), RankGrid(pcp_size=2, dcp_size=2)], ids=grid_name)
def test_without_a_cut_results_have_neither_and_requests_side_by_side_have_their_own(
    model: Any, grid: RankGrid
) -> None:
    plain = generate(model, grid, replace(BASE, kept_token_ids=False))
    assert all(r.kept_mass is None and r.kept_token_ids is None for r in plain)
    greedy = generate(model, grid, replace(BASE, temperature=0, n=1, top_p=0.5))
    assert all(r.kept_mass is None and r.kept_token_ids == tuple((t,) for t in r.token_ids) for r in greedy)
    each = [replace(BASE, kept_token_ids=False), replace(BASE, top_p=0.8), replace(BASE, top_k=4, kept_token_ids=False)]
    mixed = on_ranks(model, grid, lambda engine: engine.generate(PROMPTS, each), **CONFIG)[0]
    assert [r.kept_mass is not None for r in mixed] == [False] * 2 + [True] * 4
    assert [r.kept_token_ids is not None for r in mixed] == [False] * 2 + [True] * 2 + [False] * 2


def test_the_example_corrects_ratios_that_a_cut_puts_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main() == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["share_off_as_they_come"] > 0.3
    assert figures["share_off_by_kept_mass"] == figures["share_off_by_kept_set"] == 0
    assert figures["share_of_sets_reported"] == 1 and 0.8 <= figures["kept_mass_mean"] < 0.9


def test_the_guides_lines_give_a_ratio_of_one(model: Any) -> None:
    guide = Path(__file__).parents[2].joinpath("docs", "guides", "trl.md").read_text(encoding="utf-8")
    section = guide.split("## Where top_p, top_k or min_p cut\n")[1].split("\n## ")[0]
    [block] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    result = generate(model, RankGrid(), replace(BASE, temperature=1.0, top_p=0.7))[0]
    prompts, answers, token = [result.prompt_token_ids], [result.token_ids], result.token_ids[0]
    with torch.no_grad():
        logits = model(torch.tensor(prompts)).logits[0, -1]
    names = {**globals(), **locals()}
    lines_of_each = block.split("\n\n")
    assert len(lines_of_each) == 2
    for lines in lines_of_each:
        names.pop("log_ratio", None)
        exec(lines, names)
        assert abs(float(names["log_ratio"])) <= TOLERANCE
    # The control: without either the ratio is the kept mass.
    assert result.kept_mass is not None and result.kept_mass[0] < 0.9
    assert names["full"][0][0] - result.processed_logprobs[0] == pytest.approx(math.log(result.kept_mass[0]), abs=1e-4)
