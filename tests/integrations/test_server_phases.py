"""A server that outlives phases: what comes between two waits for the next; and what trainers of vLLM's ask of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served import Served, num_streamed, served, wait_until

import cpinfer
from cpinfer.models.loading import load_model, load_tokenizer
from cpinfer_integrations.lending import lend
from cpinfer_integrations.server import Server, serving
from cpinfer_integrations.server_config import ServerConfig

FOLDER = str(Path(__file__).parents[2] / "configs" / "recall-tiny")
KEYS: dict[str, Any] = {"dtype": "float32", "kv_cache_gib": 0.02, "block_size": 4}
ASKED: dict[str, Any] = {
    "prompt": [5, 6, 7, 8],
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 0,
    "return_token_ids": True,
}
GREEDY = cpinfer.SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)

pytestmark = pytest.mark.timeout(120)


class Job:
    """A model that is trained in turns with phases, and clients in threads of their own."""

    def __init__(self, pool: ThreadPoolExecutor, **limits: Any) -> None:
        self.model = load_model(FOLDER, torch.float32)
        self.lent = lend(self.model, KEYS)
        self.limits = ServerConfig(port=0, **limits)
        self.version = 0
        self._pool = pool

    def phase(self) -> Any:
        return cpinfer.rollout_phase(self.lent, KEYS, weights_version=self.version)

    @contextmanager
    def listening(self) -> Iterator[Server]:
        with self.phase() as engine:
            pass
        with serving(engine, config=self.limits) as server:
            self.url = server.url
            yield server

    def train(self) -> None:
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.mul_(1 + 0.5 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.version)))
        self.version += 1

    def ask(self, within_s: float = 60, **body: Any) -> Future[httpx.Response]:
        return self._pool.submit(httpx.post, f"{self.url}/v1/completions", json={**ASKED, **body}, timeout=within_s)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def arrived(server: Server, num_requests: int) -> Callable[[], bool]:
    assert server._http is not None
    return lambda: len(server._http.bridge._runs) == num_requests


def test_what_comes_between_phases_is_answered_by_the_weights_of_the_next(pool: ThreadPoolExecutor) -> None:
    job, answers, expected = Job(pool), [], []
    with job.listening() as server:
        for _ in range(3):
            answer = job.ask()
            wait_until(arrived(server, 1))
            assert not answer.done()
            with job.phase() as engine:
                expected.append(engine.generate([ASKED["prompt"]], GREEDY)[0])
                with server.answered_by(engine):
                    server.run_until(answer.done)
            answers.append(answer.result().json())
            job.train()
    logprobs = [answer["choices"][0]["logprobs"]["token_logprobs"] for answer in answers]
    for answer, found, result in zip(answers, logprobs, expected, strict=True):
        assert answer["choices"][0]["token_ids"] == list(result.token_ids)
        assert found == pytest.approx(result.logprobs, abs=1e-6)
    assert [answer["weights_version"] for answer in answers] == [0, 1, 2]
    assert abs(logprobs[0][0] - logprobs[1][0]) > 1e-3 < abs(logprobs[1][0] - logprobs[2][0])  # of other weights


def test_a_phase_ends_when_what_is_under_way_has_ended(pool: ThreadPoolExecutor) -> None:
    job = Job(pool)
    with job.listening() as server:
        first = job.ask(max_tokens=100)
        wait_until(arrived(server, 1))
        with job.phase() as engine, server.answered_by(engine):
            server.run_until(lambda: engine.load.num_running == 1)
        assert len(first.result(10).json()["choices"][0]["token_ids"]) == 100


def test_who_leaves_between_phases_makes_room(pool: ThreadPoolExecutor) -> None:
    job = Job(pool, max_open_requests=1)
    with job.listening() as server:
        with pytest.raises(httpx.ReadTimeout):
            job.ask(within_s=0.5).result()
        wait_until(arrived(server, 0))
        second = job.ask()
        wait_until(arrived(server, 1))
        assert job.ask().result().status_code == 429
        with job.phase() as engine, server.answered_by(engine):
            server.run_until(second.done)
        assert second.result().status_code == 200


def test_who_waits_too_long_for_a_phase_is_told(pool: ThreadPoolExecutor) -> None:
    job = Job(pool, max_request_s=0.1)
    with job.listening() as server:
        assert job.ask().result().status_code == 504
        wait_until(arrived(server, 0))


@pytest.mark.parametrize("in_phase", [True, False])
def test_when_the_job_fails_who_waits_is_told(pool: ThreadPoolExecutor, in_phase: bool) -> None:
    job, answers = Job(pool), []
    with pytest.raises(ZeroDivisionError), job.listening() as server:
        answers.append(job.ask())
        wait_until(arrived(server, 1))
        if in_phase:
            with job.phase() as engine, server.answered_by(engine):
                raise ZeroDivisionError
        raise ZeroDivisionError
    assert answers[0].result().status_code == 503
    assert "the server has ended with a ZeroDivisionError" in answers[0].result().text


def test_who_still_waits_when_the_server_ends_is_told(pool: ThreadPoolExecutor) -> None:
    job = Job(pool)
    with job.listening() as server:
        answer = job.ask()
        wait_until(arrived(server, 1))
    assert answer.result().status_code == 503 and "the server has ended" in answer.result().text


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    config = ServerConfig(model_name="tiny", max_pause_s=2.0)
    with served(load_model(FOLDER, torch.float32), load_tokenizer(FOLDER), config=config, **KEYS) as found:
        yield found


def test_a_trainer_of_vllm_is_told_what_it_looks_at(server: Served) -> None:
    told = httpx.get(f"{server.url}/server_info", params={"config_format": "json"}).json()["vllm_config"]
    assert told["model_config"] == {"dtype": "torch.float32", "max_model_len": server.engine.max_positions}
    assert told["lora_config"] is None and told["parallel_config"]["data_parallel_size"] == 1
    assert httpx.get(f"{server.url}/get_world_size").json() == {"world_size": 1}


def test_a_pause_keeps_requests_where_they_are(server: Served) -> None:
    def num_tokens() -> int:
        return server.engine.load.stats.num_generated_tokens

    body = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "stream": True, "return_token_ids": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        assert server.post("/pause?mode=keep").status_code == 200
        assert httpx.get(f"{server.url}/is_paused").json() == {"is_paused": True}
        before = num_tokens()
        assert not threading.Event().wait(0.3) and num_tokens() == before
        assert server.post("/resume").status_code == 200
        assert num_streamed([first, *lines]) == 200
    assert httpx.get(f"{server.url}/is_paused").json() == {"is_paused": False}
    assert num_tokens() > before


def test_a_pause_that_nobody_ends_ends_by_itself(server: Served) -> None:
    assert server.post("/pause").status_code == 200
    assert len(server.completion([5, 6, 7], max_tokens=3, ignore_eos=True)["choices"]) == 1


def test_weights_that_are_shared_are_updated_by_no_bytes(server: Served) -> None:
    bodies = {
        "/init_weight_transfer_engine": {"init_info": {"master_address": "127.0.0.1", "world_size": 2}},
        "/start_weight_update": {"is_checkpoint_format": True},
        "/update_weights": {"update_info": {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]}},
        "/finish_weight_update": {},
    }
    for path, body in bodies.items():
        answer = server.post(path, **body)
        assert (answer.status_code, answer.json()["num_bytes"]) == (200, 0), path


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/pause?mode=abort", {}, "mode: Input should be 'keep'"),
        ("/update_weights", {}, "update_info: Field required"),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}, "adapter 'a' was not loaded"),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}, "adapter 'a' was not"),
    ],
)
def test_what_is_not_done_is_refused(server: Served, path: str, body: dict[str, Any], said: str) -> None:
    answer = server.post(path, **body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]
