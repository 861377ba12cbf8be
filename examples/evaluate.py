"""Long-context evaluation inside an Accelerate job: the job's ranks share every prompt.

    python examples/evaluate.py
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/evaluate.py

Exact match of greedy answers, by the length of the prompt. `cpinfer eval` does this with tasks, seeds and resumption;
here it is a loop of one's own. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpinfer
from cpinfer_integrations.accelerate import topology_from

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "recall-tiny"
QUESTIONS = FOLDER.parent / "recall-tiny-prompts.jsonl"


def main() -> int:
    accelerator = Accelerator(cpu=True)
    topology = topology_from(accelerator)  # collective: the job's ranks, as prefill context parallelism
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()[:24]]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    greedy = cpinfer.SamplingParams(temperature=0, max_new_tokens=16)
    with cpinfer.attach(accelerator.prepare(model), topology, tokenizer=tokenizer, kv_cache_gib=0.05) as engine:
        results = engine.generate([line["prompt"] for line in lines], greedy)

    by_length: dict[str, list[bool]] = defaultdict(list)
    for line, result in zip(lines, results, strict=True):
        is_long = len(result.prompt_token_ids) > 512
        by_length["over 512" if is_long else "to 512"].append(result.text == line["answer"])
    accelerator.print(json.dumps({length: sum(found) / len(found) for length, found in sorted(by_length.items())}))
    topology.close()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
