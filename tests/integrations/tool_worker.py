"""Ranks of a job draw samples with tools, each at its own pace; rank 0 prints what all have found as one JSON line.

torchrun --nproc-per-node 2 tests/integrations/tool_worker.py FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tool_trainers import ASKED, CONFIG, GREEDY, drawn, make_trainer, photograph_of
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import GRPOTrainer

from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer_integrations import trl_phases
from cpinfer_integrations.deepspeed import init_distributed
from cpinfer_integrations.trl import with_cpinfer
from tool_models import chats, follow
from trainers import changes, everywhere

PCP, DCP = "prefill_context_parallel_size", "decode_context_parallel_size"
LAYOUTS: Mapping[str, Mapping[str, int]] = {
    "replicas": {PCP: 1},
    "pcp2_dcp1": {PCP: 2, DCP: 1},
    "pcp2_dcp2": {PCP: 2, DCP: 2},
}


def paced(tool_s: float) -> tuple[Callable[[str], str], list[str]]:
    """The tool, so slow on this rank, and whom it was asked about."""
    asked: list[str] = []

    def tool(name: str) -> str:
        """Whom to ask next.

        Args:
            name: whom to ask.
        """
        asked.append(name)
        time.sleep(tool_s)
        return follow(name)

    tool.__name__ = "follow"
    return tool, asked


def by_cpinfer(layout: str, tool_loop: str = "async") -> type[Any]:
    return with_cpinfer(GRPOTrainer, {**CONFIG, **LAYOUTS[layout], "rollout": {"tool_loop": tool_loop}})


def draw(folder: Path, trainer_class: type[Any], tool_s: float = 0.0, **options: Any) -> dict[str, Any]:
    """What this rank draws for prompts of its own, two samples each, and how often its tool was called."""
    tool, asked = paced(tool_s)
    trainer = make_trainer(trainer_class, folder, tools=[tool], **options)
    found = drawn(trainer, own_inputs())
    if hasattr(trainer, "rollouts"):
        trainer.rollouts.close()
    return {"completion_ids": found["completion_ids"], "tool_mask": found["tool_mask"], "num_calls": len(asked)}


def own_inputs(rank: int | None = None) -> list[dict[str, Any]]:
    first = 2 * (dist.get_rank() if rank is None else rank)
    return [{"prompt": chat} for chat in chats(ASKED[first : first + 2]) for _ in range(2)]


def in_layouts(folder: Path) -> dict[str, Any]:
    """Sampled and greedy ones in every layout, and the greedy ones of TRL's own loop."""
    tool_s = 0.03 * dist.get_rank()
    found: dict[str, Any] = {"trl": draw(folder, GRPOTrainer, **GREEDY)}
    for layout in LAYOUTS:
        found[f"greedy {layout}"] = draw(folder, by_cpinfer(layout), tool_s, **GREEDY)
        found[f"sampled {layout}"] = draw(folder, by_cpinfer(layout), tool_s, temperature=1.0)
    found["sampled lockstep"] = draw(folder, by_cpinfer("pcp2_dcp2", "lockstep"), tool_s, temperature=1.0)
    return found


def with_fault(folder: Path, fault: str) -> dict[str, Any]:
    """On one rank a tool ends its thread, or a user the process: all end with an error, their trainers as they were."""
    first = threading.Lock()  # taken once: a second interrupt would come in the midst of what is done next

    def tool(name: str) -> str:
        """Whom to ask next.

        Args:
            name: whom to ask.
        """
        if fault == "thread" and dist.get_rank() == 1:
            raise SystemExit("no more tools")
        if fault == "interrupt" and dist.get_rank() == 0 and first.acquire(blocking=False):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
        time.sleep(0.05)
        return follow(name)

    tool.__name__ = "follow"
    trainer = make_trainer(by_cpinfer("pcp2_dcp2"), folder, tools=[tool], **GREEDY)
    before, said = photograph_of(trainer), ""
    try:
        drawn(trainer, own_inputs())
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    changed = changes(before, photograph_of(trainer))
    trainer.rollouts.close()
    return {"said": said, "changed": changed}


def as_copies(folder: Path) -> dict[str, Any]:
    """Both ranks train on the same data: the first calls the tools for both."""
    lend = trl_phases.lend
    trl_phases.lend = lambda *args: replace(lend(*args), num_copies=2)
    tool, asked = paced(0.01)
    trainer = make_trainer(by_cpinfer("pcp2_dcp2"), folder, tools=[tool], **GREEDY)
    try:
        found = drawn(trainer, own_inputs(0))
    finally:
        trl_phases.lend = lend
    trainer.rollouts.close()
    return {"completion_ids": found["completion_ids"], "tool_mask": found["tool_mask"], "num_calls": len(asked)}


def trained(folder: Path, stage: int, gather: str = "full") -> dict[str, Any]:
    """Two steps under ZeRO: the mismatch of each phase, of which every generated token is a part."""
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        # torch's AdamW: DeepSpeed's own for CPU would have to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    config = {**CONFIG, **LAYOUTS["pcp2_dcp2"], "rollout": {"gather": gather}}
    tool, asked = paced(0.02 * dist.get_rank())
    trainer = make_trainer(
        with_cpinfer(GRPOTrainer, config),
        folder,
        tools=[tool],
        deepspeed=deepspeed,
        temperature=1.0,
        ddp_backend="gloo",
    )
    trainer.train()
    records = trainer.rollouts.records
    trainer.rollouts.close()
    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()  # else Transformers would shard the next model while it is made
    return {
        "max_abs": [record.mismatch and record.mismatch.max_abs for record in records],
        "num_compared": [record.mismatch and record.mismatch.num_tokens for record in records],
        "num_generated": [record.num_generated_tokens for record in records],
        "how": [record.cost and record.cost.how for record in records],
        "num_calls": len(asked),
    }


def main(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """For every scenario what every rank has found."""
    found = {
        "layouts": in_layouts(folder),
        "thread": with_fault(folder, "thread"),
        "interrupt": with_fault(folder, "interrupt"),
        "copies": as_copies(folder),
        "zero2": trained(folder, 2),
        "zero3 full": trained(folder, 3),
        "zero3 layerwise": trained(folder, 3, "layerwise"),
    }
    return {name: everywhere(outcome) for name, outcome in found.items()}


if __name__ == "__main__":
    launch = Launch.from_environ(os.environ)
    warnings.simplefilter("ignore")
    with default_group(launch):
        with redirect_stdout(sys.stderr):
            init_distributed()
            outcomes = main(Path(sys.argv[1]))
        if launch.rank == 0:
            print(json.dumps(outcomes), flush=True)
