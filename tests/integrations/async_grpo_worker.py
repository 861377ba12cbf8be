"""TRL's AsyncGRPO trainer, unmodified, against a server in its own process; prints what came of it as JSON.

    python tests/integrations/async_grpo_worker.py FOLDER PORT NUM_STEPS {default,shared}

FOLDER gets the model and all that TRL writes. The last argument says who sends weights: TRL's default, which has vLLM
open an NCCL group, or `SharedWeights`. Whoever runs it puts tests/stand_ins on the path: TRL wants vLLM and
FlashAttention-3 to be there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from cpinfer_integrations.trl_async import SharedWeights, answering
from tool_models import NAMES, chats, follow, tool_model, tool_tokenizer


def says_remember(completions: list[Any], **_: Any) -> list[float]:
    """Whether the last message is the word that is wanted."""
    return [float("Remember" in str(completion[-1].get("content"))) for completion in completions]


def main(folder: Path, port: int, num_steps: int, sender: str) -> None:
    torch.cuda.get_device_name = lambda device: "none"  # TRL asks for it to tell the share of peak FLOPs
    tokenizer = tool_tokenizer()
    tool_model(eagerness=1.0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    args = AsyncGRPOConfig(
        output_dir=str(folder / "out"),
        vllm_server_base_url=f"http://127.0.0.1:{port}",
        use_cpu=True,
        bf16=False,
        max_steps=num_steps,
        per_device_train_batch_size=16,
        num_generations=8,
        max_inflight_tasks=16,
        max_completion_length=64,
        max_tool_calling_iterations=3,
        token_budget=0,
        learning_rate=2e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = AsyncGRPOTrainer(
        str(folder / "model"),
        says_remember,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": chats(NAMES)}),
        tools=[follow],
        **({"weight_transfer": SharedWeights()} if sender == "shared" else {}),
    )
    with answering(trainer, {"kv_cache_gib": 0.05}):
        trainer.train()
    told = ("reward", "ratio", "kl", "sample/staleness_max", "rollout/vllm_retry_total", "loss", "tools/call_frequency")
    steps = [{key: logs.get(key) for key in told} for logs in trainer.state.log_history if "loss" in logs]
    found = {"steps": steps, "model_version": trainer.model_version}
    print(json.dumps({**found, "num_transfers": NCCLWeightTransferEngine.num_transfers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
