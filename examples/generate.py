"""Generation with a model of one's own, in one process or over several ranks that share each prompt.

    python examples/generate.py
    torchrun --nproc-per-node 2 examples/generate.py

Two ranks compute each prompt together (prefill context parallelism), and each holds half of its KV (decode context
parallelism). The answers are those of one process. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpinfer

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "recall-tiny"
PROMPTS = [
    "Remember: Basil carves lanterns; Remember: Omar wants hammers; Recall: Omar",
    "The old mill. Remember: Petra fixes mirrors; On day 4 the river rested. Remember: Yara packs bells; Recall: Petra",
]


def main() -> int:
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    topology = cpinfer.Topology.from_world(cpinfer.RankGrid(pcp_size=num_ranks, dcp_size=num_ranks))

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    greedy = cpinfer.SamplingParams(temperature=0, max_new_tokens=16)
    with cpinfer.attach(model, topology, tokenizer=tokenizer, kv_cache_gib=0.05) as engine:
        # Every rank makes the same calls, and has all results.
        answers = [result.text for result in engine.generate(PROMPTS, greedy)]
        # Samples as they finish: four of the first prompt, whose KV they share.
        sampled = cpinfer.SamplingParams(temperature=1.0, n=4, seed=7, max_new_tokens=8)
        samples = {result.sample_index: result.token_ids for result in engine.stream(PROMPTS[0], sampled)}
    # The model is the job's again, bit for bit as it was.
    if topology.rank == 0:
        print(json.dumps({"answers": answers, "samples": [samples[i] for i in sorted(samples)]}))
    topology.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
