"""Training jobs lend their model for a phase and train on; rank 0 prints what came of it as one JSON line.

torchrun --nproc-per-node 2 tests/integrations/lending_worker.py KIND ...

A kind is `zero0` to `zero2`, `zero3:GATHER`, `ddp`, `fsdp2:GATHER`, `accelerate-ddp`, `accelerate-fsdp2:GATHER`; with
`+bf16` at its end the job has Accelerate's mixed precision, with `+autotp` DeepSpeed's AutoTP over 2 ranks; with
`FAMILY/` at its beginning it trains another family than qwen2. Each is run with and without phases: before training,
and in the middle of accumulating gradients. Mixed precision is compared with the training forward instead. "costs KIND"
is what lending_costs.py finds of a job, and "refusals", "families" and "shapes" what lending_refusals.py,
lending_families.py and lending_shapes.py do.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest.mock import patch

import lending_costs
import lending_families
import lending_refusals
import lending_shapes
import torch
import torch.distributed as dist
from lending_costs import GREEDY, PROMPTS
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cpinfer.colocate.phase import PhaseReport, rollout_phase
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import JobConfig, parse_config
from cpinfer.engine import step_plans
from cpinfer.engine.attach import model_spec
from cpinfer_integrations.deepspeed import init_distributed
from cpinfer_integrations.lending import lend
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model
from trainers import Trainer, accelerate_trainer, changes, deepspeed_trainer, everywhere, photograph, torch_trainer


def family_of(kind: str) -> str:
    return kind.partition("/")[0] if "/" in kind else "qwen2"


def trainer_of(kind: str) -> Trainer:
    model = make_model(FAMILIES[family_of(kind)])
    return replace(_trainer_of(kind.rpartition("/")[2], model), family=family_of(kind))


def _trainer_of(kind: str, model: Any) -> Trainer:
    if kind.startswith("zero"):
        return deepspeed_trainer(int(kind[4]), model, autotp=2 if kind.endswith("+autotp") else 1)
    if kind.startswith("accelerate"):
        return accelerate_trainer(re.split("[-:+]", kind)[1], "bf16" if kind.endswith("+bf16") else "no", model)
    if kind == "ddp":
        return torch_trainer(DistributedDataParallel(model), model)
    assert kind.startswith("fsdp2"), kind
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return torch_trainer(model, model)


def config_of(kind: str) -> JobConfig:
    gather = kind.partition("+")[0].partition(":")[2] or "full"
    world_size = dist.get_world_size()
    tp_size = 2 if gather == "tp_shards" or kind.endswith("+autotp") else 1
    return parse_config(
        {
            "dtype": "auto" if kind.endswith("+bf16") else "float32",
            "kv_cache_gib": 0.001,
            "tensor_parallel": {"tp_size": tp_size},
            "prefill_context_parallel_size": world_size // tp_size,
            "rollout": {"gather": gather},
        }
    )


def train(kind: str, phase: Callable[[Trainer], None]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of 6 micro steps (3 steps), a phase before the first, and one after the third."""
    trainer = trainer_of(kind)
    # Ranks of one tp group train on the same tokens, others on others.
    torch.manual_seed(7 + dist.get_rank() // (2 if kind.endswith("+autotp") else 1))
    losses = []
    phase(trainer)
    for micro_step in range(6):
        losses.append(trainer.micro_step())
        if micro_step == 2:  # gradients of half a step are there
            phase(trainer)
        trainer.step()
    return losses, trainer.weights()


@dataclass(frozen=True)
class Plain:
    """A job without phases: its weights where others have one, its losses, and what comes out."""

    at_phases: list[dict[str, torch.Tensor]]
    losses: list[float]
    weights: dict[str, torch.Tensor]


def dealt_of(kind: str) -> Any:
    """How prompts are dealt to ranks: as ever, or all split, so that states of pieces have to be joined."""
    has_states = model_spec(make_model(FAMILIES[family_of(kind)])).states is not None
    return (lambda lens, *_: [None] * len(lens)) if has_states else step_plans.assign_prompts


def run_plain(kind: str) -> Plain:
    at_phases: list[dict[str, torch.Tensor]] = []
    losses, weights = train(kind, lambda trainer: at_phases.append(trainer.weights()))
    return Plain(at_phases, losses, weights)


def run(kind: str, plain: Plain) -> dict[str, Any]:
    config = config_of(kind)
    phases: list[dict[str, Any]] = []
    whole = make_model(FAMILIES[family_of(kind)])

    def phase(trainer: Trainer) -> None:
        reports: list[PhaseReport] = []
        before = photograph(trainer)
        lent = lend(trainer.trained, config)
        with rollout_phase(lent, config, report=reports.append) as engine:
            results = engine.generate(PROMPTS, GREEDY)
        lent.topology.close()
        changed = changes(before, photograph(trainer))
        whole.load_state_dict(plain.at_phases[len(phases)], strict=False)  # buffers are no weights
        worst = max(
            (check_rollout.score(whole, r.prompt_token_ids, r.token_ids) - torch.tensor(r.logprobs)).abs().max().item()
            for r in results
        )
        same = [list(r.token_ids) == check_rollout.generate_greedy(whole, r.prompt_token_ids, 8) for r in results]
        phases.append({"same_tokens": same, "worst": worst, "changed": changed, "report": asdict(reports[0])})

    losses, final = train(kind, phase)
    return {
        "kind": kind,
        "phases": phases,
        "same_losses": losses == plain.losses,
        "same_weights": all(torch.equal(final[name], weight) for name, weight in plain.weights.items()),
    }


def run_mixed(kind: str) -> dict[str, Any]:
    config, trainer = config_of(kind), trainer_of(kind)
    for _ in range(4):
        trainer.micro_step()
        trainer.step()
    before, lent = photograph(trainer), lend(trainer.trained, config)
    with rollout_phase(lent, config) as engine:
        results = engine.generate(PROMPTS, GREEDY)
    lent.topology.close()
    changed = changes(before, photograph(trainer))
    trainer.trained.eval()
    differences = []
    for r in results:
        ids = torch.tensor([[*r.prompt_token_ids, *r.token_ids]])
        with torch.no_grad():
            logits = trainer.trained(input_ids=ids, use_cache=False).logits[0].float()
        first = len(r.prompt_token_ids) - 1
        found = logits[first:-1].log_softmax(-1).gather(1, ids[0, first + 1 :, None])[:, 0]
        differences.append((found - torch.tensor(r.logprobs)).abs())
    return {"kind": kind, "changed": changed, "mean_abs": torch.cat(differences).mean().item()}


def main(kinds: Sequence[str]) -> list[list[dict[str, Any]]]:
    """For every kind what every rank has found."""
    plain: dict[str, Plain] = {}  # how weights are gathered in a phase makes no difference to a job without one
    outcomes = []
    for kind in kinds:
        job = re.sub(r":\w+", "", kind)
        if kind.startswith("costs "):
            outcome = lending_costs.run(kind.removeprefix("costs "), config_of(kind.removeprefix("costs ")))
        elif kind == "families":
            outcome = lending_families.run(config_of)
        elif kind == "refusals":
            outcome = lending_refusals.run()
        elif kind == "shapes":
            outcome = lending_shapes.run()
        else:
            with patch.object(step_plans, "assign_prompts", dealt_of(kind)):
                if kind.endswith("+bf16"):
                    outcome = run_mixed(kind)
                else:
                    if job not in plain:
                        plain[job] = run_plain(kind)
                    outcome = run(kind, plain[job])
        outcomes.append(everywhere(outcome))
    return outcomes


if __name__ == "__main__":
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        with redirect_stdout(sys.stderr):
            init_distributed()
            outcomes = main(sys.argv[1:])
        if launch.rank == 0:
            print(json.dumps({"outcomes": outcomes}), flush=True)
