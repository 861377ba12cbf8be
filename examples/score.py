"""Multiple choice: which continuation the model finds likeliest, the prompt computed once for all of them.

    python examples/score.py

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpinfer

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "recall-tiny"
PROMPT = "Remember: Basil carves lanterns; Remember: Omar wants hammers; Recall: Omar"
CHOICES = [" wants hammers;", " carves lanterns;", " wants lanterns;"]


def main() -> int:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    pairs = [(PROMPT, tokenizer.encode(choice, add_special_tokens=False)) for choice in CHOICES]
    with cpinfer.attach(model, tokenizer=tokenizer, kv_cache_gib=0.05) as engine:
        scores = engine.score(pairs)
    for choice, score in zip(CHOICES, scores, strict=True):
        is_greedy = ", which greedy decoding writes" if score.is_greedy else ""
        print(f"{choice:18} {score.logprob:8.3f}{is_greedy}", file=sys.stderr)
    best = max(range(len(CHOICES)), key=lambda i: scores[i].logprob)
    print(json.dumps({"best": CHOICES[best], "logprobs": [round(score.logprob, 4) for score in scores]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
