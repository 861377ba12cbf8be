"""What a phase costs a job, and what is left of one that fails.

The model is large beside what a step needs. FSDP2 resizes storages in place, past any operator, so its memory is not
measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config

from cpinfer.colocate.phase import PhaseReport, rollout_phase
from cpinfer.config import JobConfig, SamplingParams
from cpinfer.kv_cache import paged_kv_cache
from cpinfer.models.local_weights import storage_bytes
from cpinfer_integrations.lending import lend
from live_memory import LiveMemory
from tiny_models import TINY, make_model, prompts_of
from trainers import Trainer, changes, deepspeed_trainer, photograph, torch_trainer

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
PROMPTS = prompts_of((3, 40, 17), vocab_size=128)
MODEL = Qwen2Config(**{**TINY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 512})


class StopHereError(Exception):
    """Comes out of the middle of a layer."""


def trainer_of(kind: str) -> Trainer:
    model = make_model(MODEL)
    if kind.startswith("zero"):
        return deepspeed_trainer(int(kind[4]), model)
    if kind == "ddp":
        return torch_trainer(DistributedDataParallel(model), model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return torch_trainer(model, model)


def phase(config: JobConfig, trainer: Trainer, inside: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """One phase, measured; `inside` runs in it before it generates."""
    reports: list[PhaseReport] = []
    lent = lend(trainer.trained, config)
    pointers = {name: local_pointer(x) for name, x in trainer.module.named_parameters()}
    # A pool whose every page is in use, and made where the count can see it.
    with patch.object(paged_kv_cache, "zeroed", eager_zeros), LiveMemory() as memory:
        with rollout_phase(lent, config, report=reports.append) as engine:
            kept = inside()
            memory.used.clear()
            engine.generate(PROMPTS, GREEDY)
            used = set(memory.used)
            in_phase = {name: local_pointer(x) for name, x in trainer.module.named_parameters()}
        del kept, engine
    lent.topology.close()
    # gloo's thread lets go of what it has gathered a moment after it has said so: on a busy machine, later.
    until = time.monotonic() + 5
    while memory.live_bytes >= 1024 and time.monotonic() < until:
        time.sleep(0.01)
    return {
        **asdict(reports[0]),
        "peak_bytes": memory.peak_bytes,
        "left_bytes": memory.live_bytes,
        "pointers_are_the_trainers": in_phase == pointers,
        "all_weights_are_used_where_they_are": set(in_phase.values()) <= used,
    }


def eager_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def local_pointer(x: torch.Tensor) -> int:
    return (x.to_local() if hasattr(x, "to_local") else x).untyped_storage().data_ptr()


@contextmanager
def failing(trainer: Trainer, error: type[BaseException]) -> Iterator[None]:
    """The third layer's attention raises when it is reached for the second time."""
    calls: list[int] = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    handle = trainer.module.model.layers[2].self_attn.register_forward_pre_hook(stop)
    yield
    handle.remove()


def after_fault(config: JobConfig, trainer: Trainer, error: type[BaseException]) -> dict[str, Any]:
    with failing(trainer, error):
        before, raised = photograph(trainer), False
        lent = lend(trainer.trained, config)
        try:
            with rollout_phase(lent, config) as engine:
                engine.generate(PROMPTS, GREEDY)
        except error:
            raised = True
        lent.topology.close()
        changed = changes(before, photograph(trainer))
    loss = trainer.micro_step()
    trainer.step()
    return {"error": error.__name__, "raised": raised, "changed": changed, "trains_on": loss == loss}


def run(kind: str, config: JobConfig) -> dict[str, Any]:
    """Costs and faults of one kind of job; kinds are those of lending_worker.py without `accelerate`."""
    torch.manual_seed(0)
    trainer = trainer_of(kind)
    for _ in range(2):
        trainer.micro_step()
        trainer.step()
    faults = [after_fault(config, trainer, error) for error in (StopHereError, KeyboardInterrupt)]
    if kind.startswith("fsdp2"):
        return {"kind": kind, "faults": faults}

    def second_copy() -> list[torch.Tensor]:
        return [x.detach().clone() for x in trainer.module.parameters()]

    whole = make_model(MODEL)
    return {
        "kind": kind,
        "phase": phase(config, trainer),
        "with_a_copy": phase(config, trainer, second_copy),
        "faults": faults,
        "model_bytes": storage_bytes(whole.parameters()),
        "layer_bytes": storage_bytes(whole.model.layers[0].parameters()),
    }
