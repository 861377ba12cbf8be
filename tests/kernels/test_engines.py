"""Whole engines of tiny models on `cuda:0`, FlashInfer's and Triton's kernels interpreted, beside the torch backend."""

from __future__ import annotations

import copy
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import cpinfer
from cpinfer.attention.backends.flashinfer import backend as flashinfer_backend
from cpinfer.config import SamplingParams
from interpreted_cuda.modules import LAUNCHES
from interpreted_cuda.tensors import to_cuda, triton_on_host
from tiny_models import FAMILIES, make_model, prompts_of

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter was not chosen"),
]

# Of mean errors of logprobs, ours beside the torch backend's: both round to half precision, in another order.
MOST_ERRORS = 1.5
LENGTHS = (5, 40, 17, 130)
# What the kernels want of heads; the rest of each model stays as small as it is.
DIMS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 128, "num_attention_heads": 4},
    "gemma2": {"head_dim": 64, "num_attention_heads": 4},
    "gpt_oss": {"head_dim": 64, "num_attention_heads": 4},
    "deepseek_v3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
}


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with triton_on_host():
        yield


def model_of(family: str) -> Any:
    config = FAMILIES[family]
    # Anew, so that what is derived of dims is derived of these.
    values = {name: value for name, value in config.to_dict().items() if name not in ("head_dim", "qk_head_dim")}
    return make_model(type(config)(**{**values, **DIMS[family]})).eval()


@dataclass(frozen=True)
class Exact:
    """The same weights, computed with in float32, on the torch backend."""

    model: Any

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Sequence[float]]:
        """Logprobs of the second of each pair after the first."""
        config = {"dtype": "float32", "backend": "torch", "kv_cache_gib": 0.01}
        with torch.no_grad(), cpinfer.attach(self.model, config=config) as engine:
            return [result.logprobs for result in engine.score([(list(a), list(b)) for a, b in pairs])]

    def errors(self, results: Sequence[Any]) -> list[float]:
        """Of the logprobs of tokens that were generated, whichever they are."""
        exact = self.scores([(result.prompt_token_ids, result.token_ids) for result in results])
        found = [logprob for result in results for logprob in result.logprobs]
        wanted = [logprob for logprobs in exact for logprob in logprobs]
        return [abs(a - b) for a, b in zip(found, wanted, strict=True)]

    def parting(self, ours: Sequence[Any], theirs: Sequence[Any]) -> float:
        """How much likelier one token is than the other, at most, where two samples of a prompt part."""
        largest = 0.0
        for a, b in zip(ours, theirs, strict=True):
            pairs = zip(a.token_ids, b.token_ids, strict=True)
            first = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
            if first is not None:
                prefix = [*a.prompt_token_ids, *a.token_ids[:first]]
                (x,), (y,) = self.scores([(prefix, [a.token_ids[first]]), (prefix, [b.token_ids[first]])])
                largest = max(largest, abs(x - y))
        return largest


def generated(model: Any, **config: Any) -> list[Any]:
    base = {"dtype": "bfloat16", "kv_cache_gib": 0.01, "max_num_batched_tokens": 32, **config}
    prompts = prompts_of(LENGTHS, vocab_size=128)
    with torch.no_grad(), cpinfer.attach(model, config=base) as engine:
        return list(engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=6)))


def assert_as_good_as_torch(family: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    model = model_of(family).to(torch.bfloat16)
    exact = Exact(copy.deepcopy(model).float())
    want = generated(model, backend="torch", **theirs)
    to_cuda(model)
    LAUNCHES.clear()
    found = generated(model, backend="flashinfer", **ours)
    assert any("flashinfer" in line for line in LAUNCHES)
    rounding = exact.errors(want)
    assert statistics.mean(exact.errors(found)) <= MOST_ERRORS * statistics.mean(rounding)
    # Rounding may raise one of two tokens, and lower the other.
    assert exact.parting(found, want) <= 2 * max(rounding)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"kv_cache_dtype": "fp8_e4m3"}),
        ("llama", {"cascade_attention": "on", "block_size": 16}),
        ("gemma2", {}),
        ("gpt_oss", {}),
        ("deepseek_v3", {}),
    ],
    ids=str,
)
def test_tokens_and_logprobs_are_as_good_as_the_torch_backends(family: str, config: dict[str, Any]) -> None:
    assert_as_good_as_torch(family, config, config)


def test_decode_by_graphs_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is the same work launched again; what a real one keeps of FlashInfer's kernels is in test_replays.py."""
    captured: list[Callable[[], None]] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        captured.append(run)
        run()
        return run

    monkeypatch.setattr("cpinfer.engine.decode_cuda_graphs.capture_on_cuda", lambda: capture)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without CUDA graphs.*")
        assert_as_good_as_torch("llama", {"cuda_graphs": True}, {})
    assert captured


def test_an_lse_to_base_2_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_backend, "LN_2", 1.0)
    monkeypatch.setattr(flashinfer_backend, "check_flashinfer", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_as_good_as_torch("llama", {}, {})
