"""An agent that knows OpenAI's interface and nothing else, against the weights of a job, over HTTP.

    python examples/agent_server.py
    torchrun --nproc-per-node 2 examples/agent_server.py

The job lends its model to a rollout phase and serves it. The agent asks what a person does, and reads another page of
notes, its tool, as long as the answer's logprobs say that the model guesses. Under torchrun two ranks compute every
answer, and the first has the agent. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import openai
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpinfer
from cpinfer_integrations.lending import lend
from cpinfer_integrations.server import serving

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "recall-tiny"
PAGES = (
    "Remember: Basil carves lanterns; The old river rested.",
    "On day 4 the captain wandered. Remember: Omar wants hammers;",
    "Remember: Yara packs bells; Remember: Petra fixes mirrors;",
)
SURE = 0.9  # the least probability of every token of an answer that the agent believes
WEIGHTS_VERSION = 3


def main() -> int:
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    num_ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)  # or what a trainer holds
    config = {"prefill_context_parallel_size": num_ranks, "kv_cache_gib": 0.05}
    lent = lend(model, config)
    with (
        cpinfer.rollout_phase(lent, config, tokenizer=tokenizer, weights_version=WEIGHTS_VERSION) as engine,
        serving(engine, port=0) as server,
    ):
        # The agent has a thread of its own; this one steps, on every rank, until the agent returns.
        found = server.run(partial(solve_all, names=("Omar", "Petra", "Basil")) if rank == 0 else None)
        num_cached = engine.stats.num_cached_prefill_tokens
    if rank == 0:
        assert found is not None
        print(json.dumps({**found, "cached_tokens": num_cached}))
    lent.topology.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def solve_all(url: str, names: tuple[str, ...]) -> dict[str, Any]:
    """What the agent finds out: it is given an address, as it would be of any server."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    episodes = [solve(client, name) for name in names]
    return {key: [episode[key] for episode in episodes] for key in ("answer", "pages_read", "weights_version")}


def solve(client: openai.OpenAI, name: str) -> dict[str, Any]:
    """Ask, and read another page where the answer is a guess."""
    notes: list[str] = []
    while True:
        answer: dict[str, Any] = client.completions.create(
            model="policy",
            prompt=" ".join([*notes, f"Recall: {name}"]),
            temperature=0,
            max_tokens=8,
            logprobs=0,
            extra_body={"return_token_ids": True},  # what training wants: no text is tokenized again
        ).to_dict()
        choice = answer["choices"][0]
        least = min(choice["logprobs"]["token_logprobs"])
        if least > torch.tensor(SURE).log() or len(notes) == len(PAGES):
            return {"answer": choice["text"], "pages_read": len(notes), "weights_version": answer["weights_version"]}
        notes.append(read_page(len(notes)))


def read_page(number: int) -> str:
    """The agent's tool."""
    return PAGES[number]


if __name__ == "__main__":
    sys.exit(main())
