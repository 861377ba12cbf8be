"""lm-eval as a client: its models for OpenAI's interface score as those that hold the weights, its own and ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from lm_eval_offline import offline as offline
from served import Served, served

import cpinfer_integrations.lm_eval  # noqa: F401  # registers `cpinfer`
from cpinfer.models.loading import load_model, load_tokenizer
from cpinfer_integrations.server_config import ServerConfig

INCLUDE = "tests/integrations/lm_eval_tasks"
MODEL = "configs/recall-tiny"
# Models of lm-eval that hold the weights.
HOLDERS: dict[str, dict[str, Any]] = {
    "hf": {"pretrained": MODEL, "dtype": "float32", "device": "cpu"},
    "cpinfer": {"config": "configs/single.json"},
}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    config = ServerConfig(model_name="tiny")
    keys: dict[str, Any] = {"dtype": "float32", "kv_cache_gib": 0.05}
    with served(load_model(MODEL, torch.float32), load_tokenizer(MODEL), config=config, **keys) as found:
        yield found


def scores(model: str, tasks: list[str], args: dict[str, Any], **options: Any) -> dict[str, dict[str, float]]:
    manager = TaskManager(include_path=INCLUDE)
    found = lm_eval.simple_evaluate(model, args, tasks, task_manager=manager, bootstrap_iters=0, **options)
    assert found is not None
    return {task: {k: v for k, v in found["results"][task].items() if isinstance(v, float)} for task in tasks}


@pytest.mark.slow
def test_local_completions_has_the_scores_of_models_that_hold_the_weights(server: Served) -> None:
    tasks = ["recall_choice", "recall_generate", "recall_perplexity"]
    url = f"{server.url}/v1/completions"
    length = {"max_length": 256}
    by_http = scores(
        "local-completions",
        tasks,
        {"model": "tiny", "base_url": url, "tokenizer": MODEL, "num_concurrent": 8, **length},
    )
    assert by_http["recall_choice"]["acc,none"] > 0.5
    for model, args in HOLDERS.items():
        held = scores(model, tasks, {**args, **length})
        for task in tasks:
            assert by_http[task] == pytest.approx(held[task], rel=1e-4), (model, task)


@pytest.mark.slow
def test_local_chat_completions_has_the_scores_of_chats_with_the_weights(server: Served) -> None:
    url = f"{server.url}/v1/chat/completions"
    by_http = scores(
        "local-chat-completions", ["recall_generate"], {"model": "tiny", "base_url": url}, apply_chat_template=True
    )
    assert by_http["recall_generate"]["exact_match,none"] > 0.5
    for model, args in HOLDERS.items():
        assert scores(model, ["recall_generate"], args, apply_chat_template=True) == by_http, model
