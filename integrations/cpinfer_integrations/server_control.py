"""What trainers ask of a vLLM server beside tokens: what it is, that it pauses, and to take new weights.

TRL's AsyncGRPO is such a client. Where the weights are the trainer's own there is nothing to send: the calls that would
do so are answered, with 0 bytes. Names and shapes are vLLM's, which has these routes with `VLLM_SERVER_DEV_MODE=1`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from cpinfer_integrations.server_bridge import Bridge
from cpinfer_integrations.server_errors import ApiError, AsciiJSONResponse
from cpinfer_integrations.server_schemas import body_of, query_of

logger = logging.getLogger(__name__)

# How often a client that wants a pause looks whether the step that was under way has ended.
_LOOK_S = 0.001


class Pause:
    """Keeps the thread that steps between two steps while a client wants that.

    Requests stay where they are. The other ranks wait in the exchange of the next step, which is why no pause is longer
    than `max_s`.
    """

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._may_step = threading.Event()
        self._may_step.set()
        self._is_stepping = False

    @property
    def is_wanted(self) -> bool:
        return not self._may_step.is_set()

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Around steps, between which `wait` is called. On the thread that steps."""
        self._is_stepping = True
        try:
            yield
        finally:
            self._is_stepping = False

    def wait(self) -> None:
        """Wait until no client wants a pause. On the thread that steps."""
        if self.is_wanted:
            self._is_stepping = False
            if not self._may_step.wait(self._max_s):
                logger.warning("a pause has ended by itself after %s s (max_pause_s)", self._max_s)
                self._may_step.set()
            self._is_stepping = True

    async def begin(self) -> None:
        """Want a pause, and come back when no step is under way."""
        self._may_step.clear()
        while self._is_stepping and self.is_wanted:
            await asyncio.sleep(_LOOK_S)

    def end(self) -> None:
        """Want no pause any more."""
        self._may_step.set()


class _Told(BaseModel):
    """vLLM's own fields may be more than those that are looked at."""

    model_config = ConfigDict(strict=True, extra="ignore")


class InfoQuery(_Told):
    """The query of `/server_info`."""

    config_format: Literal["json"] = "json"


class PauseQuery(_Told):
    """The query of `/pause`."""

    mode: Literal["keep"] = "keep"


class WeightUpdate(_Told):
    """The body of `/update_weights`."""

    update_info: dict[str, Any]


class TransferInit(_Told):
    """The body of `/init_weight_transfer_engine`."""

    init_info: dict[str, Any]


class AdapterName(_Told):
    """The body of `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=1024)]


@dataclass(eq=False)
class Control:
    """The routes, over the engine that answers."""

    bridge: Bridge
    pause: Pause
    shares_weights: bool

    @property
    def routes(self) -> Sequence[tuple[str, str, Callable[[Request], Awaitable[Response]]]]:
        """Method, path, and what answers there."""
        return (
            ("GET", "/server_info", self.server_info),
            ("GET", "/get_world_size", self.world_size),
            ("POST", "/pause", self.pause_steps),
            ("POST", "/resume", self.resume_steps),
            ("GET", "/is_paused", self.is_paused),
            ("POST", "/init_weight_transfer_engine", self.init_transfer),
            ("POST", "/start_weight_update", self.mark_update),
            ("POST", "/update_weights", self.update_weights),
            ("POST", "/finish_weight_update", self.mark_update),
            ("POST", "/v1/load_lora_adapter", self.refuse_adapter),
            ("POST", "/v1/unload_lora_adapter", self.refuse_adapter),
        )

    async def server_info(self, request: Request) -> Response:
        """What of vLLM's config a client of it looks at, and cpinfer's layout."""
        query_of(request, InfoQuery)
        engine = self.bridge.engine
        grid = engine.topology.grid
        parallel = {
            "tensor_parallel_size": grid.tp_size,
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,  # each replica has a server of its own
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
        }
        model = {"dtype": str(engine.weights_dtype), "max_model_len": engine.max_positions}
        config = {"model_config": model, "parallel_config": parallel, "lora_config": None}
        return AsciiJSONResponse({"vllm_config": config, "shares_weights": self.shares_weights})

    async def world_size(self, _: Request) -> Response:
        """How many ranks compute the answers."""
        return AsciiJSONResponse({"world_size": len(self.bridge.engine.topology.replica_ranks)})

    async def pause_steps(self, request: Request) -> Response:
        """Keep all requests where they are, until `/resume`."""
        query_of(request, PauseQuery)
        await self.pause.begin()
        return AsciiJSONResponse({"status": "paused"})

    async def resume_steps(self, _: Request) -> Response:
        """Go on."""
        self.pause.end()
        return AsciiJSONResponse({"status": "resumed"})

    async def is_paused(self, _: Request) -> Response:
        """Whether a client wants a pause."""
        return AsciiJSONResponse({"is_paused": self.pause.is_wanted})

    async def init_transfer(self, request: Request) -> Response:
        """Agree to a transfer of 0 bytes."""
        await body_of(request, TransferInit)
        return self._nothing_sent()

    async def mark_update(self, _: Request) -> Response:
        """Begin it, or end it."""
        return self._nothing_sent()

    async def update_weights(self, request: Request) -> Response:
        """Take 0 bytes."""
        await body_of(request, WeightUpdate)
        return self._nothing_sent()

    async def refuse_adapter(self, request: Request) -> NoReturn:
        """Say that none is loaded or unloaded: those that the trainer's model has active are in effect, by its name."""
        asked = await body_of(request, AdapterName)
        raise ApiError(
            400,
            f"adapter {asked.lora_name[:200]!r} was not loaded or unloaded: this server takes none over the network. "
            "The adapters that are active in the model it runs are in effect, under the model's own name.",
            param="lora_name",
            code="lora_unsupported",
        )

    def _nothing_sent(self) -> Response:
        if not self.shares_weights:
            raise ApiError(
                501,
                "this server holds weights of its own and takes none over the network; a server inside the job that "
                "trains was wanted, which answers by the trainer's own weights "
                "(cpinfer_integrations.server.serving in a rollout phase).",
                kind="server_error",
                code="weight_transfer_unsupported",
            )
        return AsciiJSONResponse(
            {"num_bytes": 0, "weights_version": self.bridge.engine.weights_version, "shares_weights": True}
        )
