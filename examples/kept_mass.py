"""Importance ratios where top_p cuts what rollouts are drawn from: as they come, by the kept mass, by the kept set.

    python examples/kept_mass.py

No step was taken, so every ratio should be 1. "Where top_p, top_k or min_p cut" in docs/guides/trl.md goes through this
file. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpinfer

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "recall-tiny"
PROMPTS = FOLDER.parent / "recall-tiny-prompts.jsonl"
SAMPLING = cpinfer.SamplingParams(
    temperature=1.0, top_p=0.8, n=8, max_new_tokens=48, ignore_eos=True, kept_token_ids=True
)


def main() -> int:
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:4]
    texts = [" ".join(json.loads(line)["prompt"].split()[:100]) for line in lines]  # stories, to be told on
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with cpinfer.attach(model, cpinfer.Topology.single(), {"dtype": "float32"}, tokenizer=tokenizer) as engine:
        results = engine.generate(texts, SAMPLING)
    full, replayed = training(model, results), [by_kept_set(model, result) for result in results]
    rollout = [result.processed_logprobs for result in results]
    uncut = [cpinfer.uncut_logprobs(result.processed_logprobs, result.kept_mass) for result in results]
    figures = {
        "num_tokens": sum(map(len, rollout)),
        "kept_mass_mean": sum(sum(r.kept_mass or ()) for r in results) / sum(map(len, rollout)),
        "share_off_as_they_come": share_off(full, rollout),
        "share_off_by_kept_mass": share_off(full, uncut),
        "share_off_by_kept_set": share_off(replayed, rollout),
        "share_of_sets_reported": share_reported(results),
    }
    for name, value in figures.items():
        print(f"{name:24} {value:,.4g}", file=sys.stderr)
    print(json.dumps(figures))
    return 0


def training(model: Any, results: Sequence[cpinfer.RolloutResult]) -> list[list[float]]:
    """What a trainer's forward says of the tokens: the whole distribution, at the temperature of the rollout."""
    prompts, answers = [r.prompt_token_ids for r in results], [r.token_ids for r in results]
    temperature = SAMPLING.temperature
    return cpinfer.training_logprobs(model, prompts, answers, temperature=temperature, batch_size=8, pad_token_id=0)


@torch.no_grad()
def by_kept_set(model: Any, result: cpinfer.RolloutResult) -> list[float]:
    """The same forward's logits, each place's renormalised over the tokens that the rollout had kept there.

    NaN where the set was too large to be reported: such a token is left out of the loss, or takes the kept mass.
    """
    ids = torch.tensor([[*result.prompt_token_ids, *result.token_ids]])
    logits = model(ids).logits[0, len(result.prompt_token_ids) - 1 : -1].float() / SAMPLING.temperature
    return [
        math.nan if kept is None else float(row[token] - row[list(kept)].logsumexp(dim=-1))
        for row, token, kept in zip(logits, result.token_ids, result.kept_token_ids or (), strict=True)
    ]


def share_off(training: Sequence[Sequence[float]], rollout: Sequence[Sequence[float]]) -> float:
    """Of all tokens that have a ratio, those whose ratio is outside [0.9, 1.1]."""
    found = [
        math.exp(ours - theirs)
        for sample, other in zip(training, rollout, strict=True)
        for ours, theirs in zip(sample, other, strict=True)
        if not math.isnan(ours)
    ]
    return sum(abs(ratio - 1) > 0.1 for ratio in found) / len(found)


def share_reported(results: Sequence[cpinfer.RolloutResult]) -> float:
    """Of all tokens, those whose kept set came along."""
    kept = [ids for result in results for ids in result.kept_token_ids or ()]
    return sum(ids is not None for ids in kept) / len(kept)


if __name__ == "__main__":
    sys.exit(main())
