"""What a config says of the HTTP server; a module of its own, for who reads a config need not have Starlette."""

from __future__ import annotations

from dataclasses import dataclass

from cpinfer.schema import Bounds, Checked
from cpinfer.schema import key as _key

__all__ = ["ServerConfig"]

_SECONDS = Bounds(0, 10**7, above_low=True)


@dataclass(frozen=True)
class ServerConfig(Checked):
    """Where a server listens, and how much it takes from its clients."""

    host: str = _key("address to listen at; 0.0.0.0 lets other machines in", "127.0.0.1")
    port: int = _key(
        "0 is any that is free; each further replica (dp) listens at the next one", 8000, within=Bounds(0, 2**16 - 1)
    )
    model_name: str | None = _key("what clients call the model; default: `model`", None)
    max_open_requests: int = _key(
        "samples that clients may have under way together; more are told to come again (429)",
        256,
        within=Bounds(1, 2**20),
    )
    max_n: int = _key("samples of one request", 128, within=Bounds(1, 2**16))
    max_prompt_tokens: int | None = _key(
        "longest prompt, in tokens; default: what leaves room for an answer", None, within=Bounds(1, 2**30)
    )
    max_body_mib: float = _key("largest body of a request", 16.0, within=Bounds(0, 2**12, above_low=True))
    max_arrival_s: float = _key("seconds that a request may take to arrive, headers and body", 30.0, within=_SECONDS)
    max_request_s: float = _key("seconds after which a request that has arrived is aborted", 3600.0, within=_SECONDS)
    stream_interval_s: float = _key(
        "seconds that a token of a stream may wait for those of the next steps, to travel in one event: 20 events a "
        "second are fluent text, and cost less than one for each token; 0 waits for none",
        0.05,
        within=Bounds(0, 10),
    )
    max_pause_s: float = _key(
        "seconds after which a pause that a client wanted ends by itself; less than collective_timeout_s",
        240.0,
        within=_SECONDS,
    )
    max_drain_s: float = _key(
        "seconds that open requests have to end when the server does; below 30, after which torchrun, DeepSpeed's "
        "launcher and Kubernetes kill what they have told to end",
        20.0,
        within=_SECONDS,
    )
