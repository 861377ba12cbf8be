"""GRPO by TRL, with rollouts by cpinfer: one argument of the trainer.

    python examples/grpo.py
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/grpo.py

A small model with random weights learns to answer with names of things. Over several processes the trainer's ranks
share every prompt, and TRL trains as it always does. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from cpinfer_integrations.trl import make_rollout_func

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "grpo-tiny"
PROMPTS = [json.loads(line)["prompt"] for line in (FOLDER.parent / "grpo-prompts.jsonl").read_text().splitlines()]
THINGS = {"boats", "apples", "keys", "maps", "drums", "lamps", "hats", "kites"}


def reward(completions: Sequence[str], **_: Any) -> list[float]:
    """The share of an answer's words that are things."""
    return [sum(word in THINGS for word in text.split()) / max(1, len(text.split())) for text in completions]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER)),
            processing_class=AutoTokenizer.from_pretrained(FOLDER),
            reward_funcs=[reward],
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=32,
                num_generations=8,
                max_completion_length=4,
                learning_rate=3e-3,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            rollout_func=make_rollout_func(
                {"prefill_context_parallel_size": PartialState().num_processes, "kv_cache_gib": 0.01}
            ),
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    if trainer.accelerator.is_main_process:
        found = {"rewards": [round(float(entry["reward"]), 4) for entry in logs]}
        print(json.dumps({**found, "max_mismatch": max(entry["rollout/mismatch_max_abs"] for entry in logs)}))
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
