"""Ranks of a job serve agents of their own; rank 0 prints what all have found as one JSON line.

torchrun --nproc-per-node 2 tests/integrations/server_worker.py agents | replicas | error | fault | dies
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpinfer
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import SamplingParams
from cpinfer.errors import EngineFaultError, UserError
from cpinfer.layout.grid import RankGrid
from cpinfer_integrations.server import Server, serving

FOLDER = Path(__file__).parents[2] / "configs" / "recall-tiny"
PROMPTS = [f"Alice sells bridges. Boris sells boats {i}. Alice sells" for i in range(6)]
CLIENT = "client"
LONG: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 20000, "ignore_eos": True, "stream": True}


def ask(url: str, prompt: str) -> list[int]:
    body = {"prompt": prompt, "max_tokens": 10, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def agents(server: Server, engine: cpinfer.Engine) -> Any:
    """Rank 1 asks more, and longer, than rank 0; then rank 0 alone."""
    own = PROMPTS if dist.get_rank() else PROMPTS[:2]

    def agent(url: str) -> list[list[int]]:
        time.sleep(0.1 * dist.get_rank())
        return [ask(url, prompt) for prompt in own]

    found = server.run(agent)
    alone = server.run(None if dist.get_rank() else lambda url: ask(url, PROMPTS[0]))
    expected = engine.generate(PROMPTS, SamplingParams(temperature=0, max_new_tokens=10))
    return {"found": found, "alone": alone, "expected": [r.token_ids for r in expected][: len(own)], "url": server.url}


def replicas(server: Server, _: cpinfer.Engine) -> Any:
    """Two replicas of one rank each, and so two servers."""
    return {"url": server.url, "found": server.run(lambda url: ask(url, PROMPTS[0]))}


def error(server: Server, _: cpinfer.Engine) -> Any:
    """Rank 1's agent fails, while rank 0's goes on."""

    def agent(url: str) -> Any:
        if dist.get_rank():
            raise ValueError("no answer was found")
        return [ask(url, prompt) for prompt in PROMPTS]

    try:
        server.run(agent)
    except (ValueError, UserError) as failed:
        return {"said": f"{type(failed).__name__}: {failed}"}
    return {"said": "nothing"}


def fault(server: Server, engine: cpinfer.Engine) -> Any:
    """A step fails on all ranks: the request is lost, the next is answered."""
    advance = engine._core.advance
    failures = [True]

    def failing(*args: Any) -> Any:
        heard = advance(*args)
        if failures and engine.load.num_running:
            failures.clear()
            with engine._core.all_or_cut():
                raise EngineFaultError("logits are not finite")
        return heard

    engine._core.advance = failing  # type: ignore[method-assign]

    def agent(url: str) -> list[int]:
        bodies = [LONG | {"stream": False}, {"prompt": PROMPTS[0], "max_tokens": 2}]
        return [httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code for body in bodies]

    return {"statuses": server.run(None if dist.get_rank() else agent)}


def dies(server: Server, _: cpinfer.Engine) -> Any:
    """Rank 1 is killed while clients of rank 0 listen to a stream and wait for a whole answer: both get an error."""
    whole: list[httpx.Response] = []

    def waiting() -> None:
        whole.append(httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": False}, timeout=60))

    def client() -> None:
        heard: list[str] = []
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
            other = threading.Thread(target=waiting, daemon=True)
            other.start()
            running = "cpinfer_requests_running 2.0"
            for line in answer.iter_lines():
                heard.append(line)
                if len(heard) == 5:
                    while running not in httpx.get(f"{server.url}/metrics").text:
                        time.sleep(0.01)
                    os.kill(int(others[1]), signal.SIGKILL)
        other.join(30)
        last = [line for line in heard if line][-1]
        told = {"last": last, "status": whole[0].status_code, "error": whole[0].json()["error"]}
        print(json.dumps(told), flush=True)

    others: list[Any] = [None, None]
    dist.all_gather_object(others, os.getpid())
    if dist.get_rank() == 0:
        threading.Thread(target=client, name=CLIENT, daemon=True).start()
    server.run_until(lambda: False)


CASES: dict[str, Callable[[Server, cpinfer.Engine], Any]] = {
    "agents": agents,
    "replicas": replicas,
    "error": error,
    "fault": fault,
    "dies": dies,
}


def main(case: str) -> None:
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)
        topology = cpinfer.Topology.from_world(
            RankGrid(dp_size=2) if case == "replicas" else RankGrid(pcp_size=2, dcp_size=2)
        )
        try:
            with (
                cpinfer.attach(model, topology, tokenizer=tokenizer, dtype="float32", kv_cache_gib=0.02) as engine,
                serving(engine, port=0) as server,
            ):
                found = CASES[case](server, engine)
        except RuntimeError:
            for thread in threading.enumerate():
                if thread.name == CLIENT:
                    thread.join(30)
            raise
        told: list[Any] = [None] * launch.world_size
        dist.all_gather_object(told, found)
    if launch.rank == 0:
        print(json.dumps({"ranks": told}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
