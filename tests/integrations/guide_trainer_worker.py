"""The trainer of docs/extending/trainer.md, its code taken from there: trained on with phases, and without."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from cpinfer_integrations.lending import TRAINERS, TrainerRow, lend
from cpinfer_tools.verify import check_rollout
from documents import code_blocks, page
from tiny_models import FAMILIES, make_model, prompts_of

NUM_STEPS, NUM_NEW_TOKENS = 3, 8
PROMPTS = prompts_of((5, 23), vocab_size=128)


def shown() -> tuple[dict[str, Any], ModuleType, dict[str, TrainerRow]]:
    """What the page defines, its module as an integration, and the row in the table."""
    trainer, lending, rollouts, integration, row = code_blocks(page("extending/trainer.md"))
    names: dict[str, Any] = {}
    for block in (trainer, lending, rollouts):
        exec(block, names)
    module = ModuleType("dealt_out")
    exec(f"import cpinfer\n{integration}", module.__dict__)
    return names, module, eval(f"{{{row}}}", {"TrainerRow": TrainerRow})


NAMES, MODULE, ROW = shown()


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randint(0, 128, (1, 24), generator=generator)


def trained(*, with_phases: bool, disturbed: bool = False) -> dict[str, Any]:
    """Losses and this rank's slice of the weights at the end, and what phases between the steps came to."""
    trainer = NAMES["DealtOut"](make_model(FAMILIES["qwen2"]))
    parameters = list(trainer.module.parameters())
    losses, phases = [], []
    for step in range(NUM_STEPS):
        if with_phases:
            phases.append(phase(trainer, step))
            left = [x for x, before in zip(trainer.module.parameters(), parameters, strict=True) if x is not before]
            assert not left and all(x.numel() == 0 for x in parameters), "the same objects, and dealt out again"
        if disturbed:  # by the last bit of one value
            trainer.slice[0] = torch.nextafter(trainer.slice[0], trainer.slice[0] + 1)
        losses.append(trainer.train_step(batch(step)))
    return {"losses": losses, "slice": trainer.slice, "phases": phases}


def phase(trainer: Any, step: int) -> bool:
    """Whether a phase generates what the whole weights say, lent by the page's function and by its row in the table."""
    with trainer.whole():
        wanted = [check_rollout.generate_greedy(trainer.module, prompt, NUM_NEW_TOKENS) for prompt in PROMPTS]
    by_hand = NAMES["lend_dealt_out"](trainer)
    with (
        patch.dict(sys.modules, {"cpinfer_integrations.dealt_out": MODULE}),
        patch.dict(TRAINERS, ROW),  # type: ignore[arg-type]
    ):
        by_row = lend(trainer)
    found = [NAMES["rollouts"](lent, PROMPTS, step) for lent in (by_hand, by_row)]
    for lent in (by_hand, by_row):
        lent.topology.close()
    is_known = (by_hand.how, by_row.how) == ("dealt_out", "dealt_out")
    return is_known and all([list(ids) for ids in each] == wanted for each in found)


def without_a_row() -> str:
    """The error that a trainer gets which no row knows: nobody takes its weights for whole."""
    try:
        lend(NAMES["DealtOut"](make_model(FAMILIES["qwen2"])))
    except Exception as error:
        return type(error).__name__
    return "none"


def main() -> None:
    dist.init_process_group("gloo")
    alone, lent, disturbed = (
        trained(with_phases=False),
        trained(with_phases=True),
        trained(with_phases=False, disturbed=True),
    )

    def is_same(other: dict[str, Any]) -> bool:
        return alone["losses"] == other["losses"] and torch.equal(alone["slice"], other["slice"])

    own = {
        "phases": lent["phases"],
        "goes_on_bit_for_bit": is_same(lent),
        "notices_a_last_bit": not is_same(disturbed),
        "without_a_row": without_a_row(),
    }
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    if dist.get_rank() == 0:
        print(json.dumps({"ranks": told}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
