"""A conversation about a long document: a session keeps the KV between turns, so a turn costs what is new.

    python examples/long_context_chat.py
    torchrun --nproc-per-node 2 examples/long_context_chat.py

Under torchrun the ranks share the document's prefill and its KV. The session is rank 0's; the other ranks step with it.
The last line of stdout is one JSON object.
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
RECORDS = {"Basil": "carves lanterns", "Omar": "wants hammers", "Petra": "fixes mirrors", "Yara": "packs bells"}
FILLER = " The old river rested behind the quiet mill, and the captain wandered." * 40
GREEDY = cpinfer.SamplingParams(temperature=0, max_new_tokens=16)


def main() -> int:
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    topology = cpinfer.Topology.from_world(cpinfer.RankGrid(pcp_size=num_ranks, dcp_size=num_ranks))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with cpinfer.attach(model, topology, tokenizer=tokenizer, kv_cache_gib=0.05) as engine:
        turns = ask_all(engine, tokenizer, is_asking=topology.rank == 0)
    if topology.rank == 0:
        print(json.dumps({"turns": turns}))
    topology.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def ask_all(engine: cpinfer.Engine, tokenizer: object, is_asking: bool) -> list[dict[str, object]]:
    """The questions in turn, on the rank that asks; the others step until it has its answers."""
    document = "".join(f"{FILLER} Remember: {name} {does};" for name, does in RECORDS.items())
    session = engine.open_session(document) if is_asking else None
    questions = list(RECORDS) if is_asking else []
    turns: list[dict[str, object]] = []

    def all_answered(outputs: list[cpinfer.RequestOutput]) -> bool:
        for output in outputs:
            if output.result is not None:
                name = questions[len(turns)]
                turns.append({"name": name, "answer": output.result.text, "computed": num_computed(engine)})
        if session is not None and session.turn is None and len(turns) < len(questions):
            question = f" Recall: {questions[len(turns)]}"
            engine.add(tokenizer.encode(question, add_special_tokens=False), GREEDY, session=session)  # type: ignore[attr-defined]
        return len(turns) == len(questions)

    engine.run_until(all_answered)
    if session is not None:
        engine.close_session(session)
    return turns


def num_computed(engine: cpinfer.Engine) -> int:
    """Prompt tokens that have been computed so far, those found in the KV cache left out."""
    return engine.stats.num_computed_prefill_tokens


if __name__ == "__main__":
    sys.exit(main())
