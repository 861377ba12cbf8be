"""TRL's AsyncGRPO, its rollouts by the weights that it trains: no vLLM server, no second copy, no transfer.

    args = AsyncGRPOConfig(..., vllm_server_base_url="http://127.0.0.1:8000")
    trainer = AsyncGRPOTrainer("my/model", ..., args=args, weight_transfer=SharedWeights())
    with answering(trainer):
        trainer.train()

The trainer, its rollout worker and the worker's HTTP client are TRL's own (seen in 1.16). The worker asks over HTTP,
from a process of its own, all the time; it is answered whenever the trainer waits for samples, in a rollout phase on
the trainer's own weights. While the trainer computes, requests wait. So generation and training take turns on the
device, and no answer is of two models.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from cpinfer.colocate.phase import rollout_phase
from cpinfer.config import ConfigLike, job_config
from cpinfer.engine.engine import Engine
from cpinfer.errors import UserError
from cpinfer.packages import named
from cpinfer_integrations.lending import lend
from cpinfer_integrations.server import Server, serving
from cpinfer_integrations.server_config import ServerConfig

try:
    from transformers import TrainerCallback
    from trl.trainer.utils import get_config_model_id
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

__all__ = ["SharedWeights", "answering"]


class SharedWeights:
    """What to give an `AsyncGRPOTrainer` as `weight_transfer`: there is nothing to send, so nothing is.

    TRL's default opens an NCCL group with a vLLM server, which is not there.
    """

    def init_weight_transfer(self) -> None:
        """Nothing is set up."""

    def pause(self) -> None:
        """No step runs while the trainer does anything."""

    def send_weights(self, iterator: Iterator[Any]) -> None:
        """Send 0 bytes.

        Args:
            iterator: names and weights. It is not looked at, which would gather those that are sharded.
        """

    def resume(self) -> None:
        """Steps run when the trainer waits."""

    def destroy(self) -> None:
        """Nothing was set up."""


@contextmanager
def answering(trainer: Any, config: ConfigLike = None, *, server: ServerConfig | None = None) -> Iterator[Server]:
    """In the block, answer the trainer's rollout worker whenever the trainer waits for samples.

    It listens where `vllm_server_base_url` of the trainer's arguments says. A phase begins when the queue of samples is
    empty, and ends when it no longer is and the requests under way have ended; `weights_version` of its answers is the
    trainer's `model_version`.

    Args:
        trainer: an `AsyncGRPOTrainer`, one process.
        config: dtype, memory and all else of the engine: a `JobConfig`, a dict of its keys, or the path of a JSON file.
        server: limits. The model's name is the trainer's.

    Yields:
        The server.

    Raises:
        UserError: where the job has several processes: TRL's others wait in a collective while the first one waits for
            samples, and cannot compute. Also when nothing can listen there, or the config does not fit.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"the job has {dist.get_world_size()} processes; 1 was wanted: while the first one waits for samples, "
            "TRL's others wait in a collective, and none can step. Train by GRPOTrainer with "
            "cpinfer_integrations.trl.with_cpinfer, which takes many."
        )
    config = job_config(config)
    url = urlsplit(trainer.args.vllm_server_base_url)
    limits = server or ServerConfig()
    limits = replace(limits, model_name=limits.model_name or get_config_model_id(trainer.model.config))
    lent = lend(trainer.model, config)

    def phase() -> AbstractContextManager[Engine]:
        """A rollout phase by the policy that the trainer has now."""
        version, tokenizer = trainer.model_version, trainer.processing_class
        return rollout_phase(lent, config, tokenizer=tokenizer, weights_version=version)

    with phase() as engine:
        pass  # its sizes are those of all that follow
    with serving(engine, url.hostname, url.port or 80, sampling=config.sampling, config=limits) as listens:
        samples = trainer.rollout_queue
        trainer.rollout_queue = _Samples(samples, phase, listens)
        ends = _EndOfTraining(trainer.rollout_queue, trainer.rollout_worker)
        trainer.add_callback(ends)
        try:
            yield listens
        finally:
            trainer.remove_callback(ends)
            trainer.rollout_queue = samples


class _Samples:
    """The queue of samples as the trainer sees it: who waits for one answers the worker meanwhile."""

    def __init__(self, samples: Any, phase: Callable[[], AbstractContextManager[Engine]], server: Server) -> None:
        self._samples = samples
        self._phase = phase
        self._server = server

    def qsize(self) -> int:
        """How many are there, about."""
        return int(self._samples.qsize())

    def get(self, timeout: float) -> Any:
        """A sample. `queue.Empty` when `timeout` seconds have brought none."""
        try:
            return self._samples.get_nowait()
        except queue.Empty:
            pass
        until_s = time.monotonic() + timeout
        self.answer_until(lambda: not self._samples.empty() or time.monotonic() > until_s)
        return self._samples.get_nowait()

    def clear(self) -> None:
        """Throw away what is there."""
        with suppress(queue.Empty):
            while True:
                self._samples.get_nowait()

    def answer_until(self, is_done: Callable[[], bool]) -> None:
        """Answer the worker, and who else asks, in a phase that ends behind `is_done`."""
        with self._phase() as engine, self._server.answered_by(engine):
            self._server.run_until(is_done)


class _EndOfTraining(TrainerCallback):
    """Ends the worker while it is answered and its samples are taken: it waits for both before it ends by itself."""

    def __init__(self, samples: _Samples, worker: Any) -> None:
        self._samples = samples
        self._worker = worker

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        ends = threading.Thread(target=self._worker.stop, name="end of the worker")
        ends.start()

        def has_ended() -> bool:
            self._samples.clear()
            return not ends.is_alive()

        self._samples.answer_until(has_ended)
