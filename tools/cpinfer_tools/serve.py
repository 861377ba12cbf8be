"""Answer HTTP clients of OpenAI's interface with a config's model, until the first rank gets a SIGTERM.

    cpinfer serve --config configs/single.json
    torchrun --nproc-per-node 2 -m cpinfer_tools serve --config configs/pcp2.json --port 8001
    curl 127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "hello"}'

The first rank of each replica listens, all compute. Where to listen, the limits and the model's name are keys of
`server`; an API key is taken from CPINFER_API_KEY. At the end open requests finish first; a second signal ends at once.
Exit codes as of all tools: bad config is found before any model is loaded (exit 2), any failure ends every rank (exit
1). The last line that rank 0 writes to stdout is the summary, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import cpinfer
from cpinfer.comm.bootstrap import Launch
from cpinfer.errors import UserError
from cpinfer.models.loading import load_tokenizer
from cpinfer_integrations.launching import launch_inference
from cpinfer_integrations.server import serving
from cpinfer_tools.job import (
    Job,
    Parser,
    add_run_flags,
    check_layout,
    describe_run,
    loading_weights,
    needed_spec,
    needed_weights,
    run_tool,
)
from cpinfer_tools.run_config import load_run_config

API_KEY = "CPINFER_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Serving(Job):
    """Clients to answer."""

    @property
    def what(self) -> str:
        return f"OpenAI's interface at {self.config.server.host}, port {self.config.server.port}"

    @property
    def counts(self) -> dict[str, int]:
        return {"port": self.config.server.port}


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="JSON or TOML; docs/reference/config.md has its keys"
    )
    parser.add_argument("--host", help="address to listen at; wins over the config")
    parser.add_argument("--port", type=int, help="likewise")
    add_run_flags(parser)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # launchers append it; ignored
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    return run_tool("serve", lambda launch: prepare(launch, parse_args(argv, prog)), serve)


def prepare(launch: Launch, args: argparse.Namespace) -> Serving:
    """Check everything that can be checked without the weights. UserError says what is wrong."""
    config = load_run_config(args.config, args.set)
    spec = needed_spec(config, args.config)
    assert config.model is not None, "needed_spec has refused that"
    tokenizer = load_tokenizer(config.model)
    flags: dict[str, Any] = {key: getattr(args, key) for key in ("host", "port") if getattr(args, key) is not None}
    name = config.server.model_name or config.model
    config = replace(config, server=replace(config.server, model_name=name, **flags))
    if config.server.max_pause_s >= config.collective_timeout_s:  # other ranks wait in a collective meanwhile
        raise UserError(
            f'"server.max_pause_s" is {config.server.max_pause_s:g}; less than "collective_timeout_s", '
            f"{config.collective_timeout_s:g}, was wanted. Change one of them."
        )
    grid = check_layout(launch, config, spec, args.config)
    return Serving(
        config=config,
        spec=spec,
        weights=needed_weights(config),
        grid=grid,
        tokenizer=tokenizer,
        meta=describe_run(config, grid, launch),
        dry_run=args.dry_run,
        log_level=args.log_level,
    )


def serve(launch: Launch, job: Serving) -> None:
    """Load, listen, answer, drain. Collective over all ranks."""
    with ExitStack() as stack:
        with loading_weights("serve", job, launch) as loaded:
            model, topology = launch_inference(job.config, job.grid, launch.device, loaded.on_read)
        stack.callback(topology.close)
        engine = stack.enter_context(cpinfer.attach(model, topology, job.config, tokenizer=job.tokenizer))
        ended = stack.enter_context(_ended_by_signal())
        api_key = os.environ.get(API_KEY) or None
        start_s = time.perf_counter()
        options: dict[str, Any] = {"sampling": job.config.sampling, "config": job.config.server}
        with serving(engine, api_key=api_key, **options, shares_weights=False) as server:
            if topology.is_writer:
                # In one piece: first ranks of replicas say it together.
                sys.stderr.write(f"serve: {server.url} answers as {job.config.server.model_name}\n")
            # The first rank of a replica says when it ends; launchers signal all ranks, and none may leave the others.
            server.run_until(ended.is_set if topology.is_writer else lambda: True)
        times = {"wall_s": round(time.perf_counter() - start_s, 3), "load_s": loaded.load_s}
        summary = {**times, **asdict(engine.load.stats), "url": server.url}
    if launch.rank == 0:
        print(json.dumps({**summary, "layout": job.meta["layout"]}), flush=True)


@contextmanager
def _ended_by_signal() -> Iterator[threading.Event]:
    """Set by the first SIGTERM or SIGINT in the block; the second does what it does outside of it."""
    ended = threading.Event()

    def end(number: int, _: Any) -> None:
        ended.set()
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
