"""Reinforcement learning without a trainer library: REINFORCE, with rollouts from the weights that are being trained.

    python examples/own_loop.py
    torchrun --nproc-per-node 2 examples/own_loop.py

A small model with random weights learns to answer with names of things. Each rank has prompts of its own; in a rollout
phase the ranks generate for all of them together, and training goes on with DDP. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cpinfer
from cpinfer_integrations.lending import lend

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "grpo-tiny"
PROMPTS = [json.loads(line)["prompt"] for line in (FOLDER.parent / "grpo-prompts.jsonl").read_text().splitlines()]
THINGS = {" boats", " apples", " keys", " maps", " drums", " lamps", " hats", " kites"}
NUM_SAMPLES = 32  # per rank and step
SAMPLING = cpinfer.SamplingParams(temperature=1.0, max_new_tokens=4, ignore_eos=True)


def train(num_steps: int) -> Iterator[tuple[float, float]]:
    """Mean reward of each step, and the largest difference of a logprob between rollout and training forward."""
    num_ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER))
    trained = DistributedDataParallel(model) if num_ranks > 1 else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    config = {"prefill_context_parallel_size": num_ranks, "kv_cache_gib": 0.01}
    lent = lend(trained, config)
    own_prompts = (PROMPTS * NUM_SAMPLES)[rank::num_ranks][:NUM_SAMPLES]
    for step in range(num_steps):
        with cpinfer.rollout_phase(lent, config, tokenizer=tokenizer, weights_version=step) as engine:
            samples = engine.generate_pooled(own_prompts, SAMPLING, name=f"step/{step}")
        rewards = torch.tensor([reward(tokenizer, sample) for sample in samples])

        logprobs = logprobs_of(trained, samples)
        loss = -((rewards - rewards.mean())[:, None] * logprobs).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rollout = torch.tensor([sample.processed_logprobs for sample in samples])
        yield rewards.mean().item(), (logprobs.detach() - rollout).abs().max().item()
    lent.topology.close()


def reward(tokenizer: object, sample: cpinfer.RolloutResult) -> float:
    """The share of the answer's tokens that are things."""
    return sum(tokenizer.decode(token) in THINGS for token in sample.token_ids) / len(sample.token_ids)  # type: ignore[attr-defined]


def logprobs_of(model: torch.nn.Module, samples: Sequence[cpinfer.RolloutResult]) -> torch.Tensor:
    """`[samples, tokens of an answer]`, with gradients. Prompts and answers of equal length need no padding."""
    ids = torch.tensor([[*sample.prompt_token_ids, *sample.token_ids] for sample in samples])
    num_tokens = len(samples[0].token_ids)
    logits = model(ids).logits[:, -num_tokens - 1 : -1]  # the token at position p is told by the logits at p - 1
    return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, -num_tokens:, None]).squeeze(-1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args(argv)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    steps = list(train(args.steps))
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps({"rewards": [round(r, 4) for r, _ in steps], "max_mismatch": max(m for _, m in steps)}))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
