"""Decode from graphs, as far as a CPU goes: padding, memory that stays where it is, and what happens without capture.

A stand-in for a graph launches again what was captured, on the memory that it was captured on. Whether CUDA can capture
a model's forward, only a GPU can tell.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import cpinfer
from cpinfer.attention.backends.flashinfer.backend import FlashInferBackend
from cpinfer.attention.backends.torch_backend import TorchBackend
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.attach import model_spec
from cpinfer.engine.decode_cuda_graphs import cuda_graphs_error
from cpinfer.errors import EngineFaultError
from cpinfer.layout.decode import assign_rows, cuda_graph_batch_size, plan_decode, writing_all
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.shards import KVSharding
from cpinfer.models.runner import attached
from cpinfer_tools.verify import check_rollout
from fake_flashinfer import fake_flashinfer
from tiny_models import FAMILIES, make_model, prompts_of

CPU = torch.device("cpu")
SHARDING = KVSharding(2, 4, 4)


def test_buckets_are_few_and_pad_by_half_at_most() -> None:
    sizes = [cuda_graph_batch_size(n) for n in range(1, 257)]
    assert all(n <= size <= max(n + 1, 1.5 * n) for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len(set(sizes)) <= 16


@pytest.mark.parametrize("rows_per_rank", [2, 3, 8])
def test_room_to_spare_is_padding_behind_all_rows(rows_per_rank: int) -> None:
    assert assign_rows(3, 2, rows_per_rank).tolist() == [0, 1, 2] + [-1] * (2 * rows_per_rank - 3)


def test_too_little_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="5 rows do not fit 2 on each of 2 ranks"):
        assign_rows(5, 2, 2)


@pytest.mark.parametrize("shard", [0, 1])
def test_every_row_is_written_and_those_of_others_to_the_spare_slot(shard: int) -> None:
    at = {"pcp_size": 2, "pcp_rank": 0, "shard": shard, "rows_per_rank": 4}
    plan = plan_decode([5, 9, 7], [[0], [1, 2], [3]], SHARDING, **at)
    all_written = writing_all(plan, 99)
    assert all_written.write_src.tolist() == list(range(8)) and len(all_written.write_slots) == 8
    own = dict(zip(plan.write_src.tolist(), plan.write_slots.tolist(), strict=True))
    assert 0 < len(own) < 4
    assert all_written.write_slots.tolist() == [own.get(row, 99) for row in range(8)]
    assert np.array_equal(all_written.rows.kv_hi, plan.rows.kv_hi)


# --- through the engine ---


class Graphs:
    """Stand-ins for graphs: what they were asked to capture and replay, on all ranks."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            run()

        return replay


def refuse_to_capture(run: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def on_fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Engines run FlashInfer's interpreter, and capture with what is given."""

    def use(capture: Any) -> None:
        monkeypatch.setattr(
            "cpinfer.engine.needs.make_backend",
            lambda name, device, needs: FlashInferBackend(device, needs, fake_flashinfer()),
        )
        monkeypatch.setattr("cpinfer.engine.decode_cuda_graphs.cuda_graphs_error", lambda runner, backend: None)
        monkeypatch.setattr("cpinfer.engine.decode_cuda_graphs.capture_on_cuda", lambda: capture)

    return use


def generate(family: str, grid: RankGrid, lens: tuple[int, ...], **config: Any) -> tuple[Any, Any]:
    model = make_model(FAMILIES[family])
    parsed = parse_config(
        {
            "dtype": "float32",
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
            "cp_kv_cache_interleave_size": 3,
            "block_size": 4,
            "kv_cache_gib": 2**-9,
            **config,
        }
    )
    # Answers of different lengths: rows become fewer, so buckets change.
    sampling = [SamplingParams(temperature=0, max_new_tokens=3 + i) for i in range(len(lens))]

    def body(topology: cpinfer.Topology) -> Any:
        with cpinfer.attach(copy.deepcopy(model), topology, parsed) as engine:
            return engine.generate(prompts_of(lens, vocab_size=128), sampling)

    return model, run_ranks(grid, body)


def assert_right(model: Any, ranks: Any, kv_dtype: torch.dtype | None = None) -> None:
    for result in ranks[0]:
        greedy = check_rollout.generate_greedy(model, result.prompt_token_ids, len(result.token_ids), kv_dtype)
        assert list(result.token_ids) == greedy
        expected = check_rollout.score(model, result.prompt_token_ids, result.token_ids, kv_dtype)
        assert (expected - torch.tensor(result.logprobs)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("family", "grid", "config"),
    [
        ("llama", RankGrid(), {}),
        ("qwen2", RankGrid(pcp_size=2, dcp_size=2), {}),
        ("qwen2", RankGrid(pcp_size=2, dcp_size=2), {"decode_exchange": "replicate_q"}),
        ("gemma2", RankGrid(pcp_size=2, dcp_size=2), {}),
        ("qwen2", RankGrid(pcp_size=2, dcp_size=1), {}),
        ("qwen2", RankGrid(pcp_size=2, dcp_size=2), {"kv_cache_dtype": "fp8_e4m3"}),
    ],
    ids=str,
)
def test_replayed_decode_equals_transformers(
    on_fake_cuda: Callable[[Any], None], family: str, grid: RankGrid, config: dict[str, Any]
) -> None:
    graphs = Graphs()
    on_fake_cuda(graphs.capture)
    kv_dtype = torch.float8_e4m3fn if config.get("kv_cache_dtype") else None
    assert_right(*generate(family, grid, (5, 33, 17, 2, 9), cuda_graphs=True, **config), kv_dtype)
    sizes_seen = 2 if grid.pcp_size > 1 else 4
    assert graphs.num_captured >= sizes_seen and graphs.num_replayed > graphs.num_captured


def test_a_rank_that_cannot_capture_meets_the_others_and_says_so_once(
    on_fake_cuda: Callable[[Any], None],
) -> None:
    on_fake_cuda(refuse_to_capture)
    with pytest.warns(UserWarning, match="capturing failed .operation not permitted") as caught:
        assert_right(*generate("llama", RankGrid(), (5, 17, 9), cuda_graphs=True))
    assert len([w for w in caught if "CUDA graphs" in str(w.message)]) == 1


def test_a_rank_that_cannot_capture_beside_one_that_can_is_no_hang(
    on_fake_cuda: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that ran a step a different number of times would meet in the wrong collectives, or never."""
    graphs = Graphs()
    on_fake_cuda(None)
    captures = iter([refuse_to_capture, graphs.capture])
    monkeypatch.setattr("cpinfer.engine.decode_cuda_graphs.capture_on_cuda", lambda: next(captures))
    with pytest.warns(UserWarning, match="capturing failed"):
        assert_right(*generate("qwen2", RankGrid(pcp_size=2, dcp_size=2), (5, 33, 17, 2, 9), cuda_graphs=True))
    assert graphs.num_captured >= 2


def test_a_layer_that_passes_the_engine_by_is_seen_before_a_graph_is_captured(
    on_fake_cuda: Callable[[Any], None],
) -> None:
    graphs = Graphs()
    on_fake_cuda(graphs.capture)
    model = make_model(FAMILIES["llama"])
    attention = model.model.layers[1].self_attn
    inner = attention.forward

    def forward(hidden_states: torch.Tensor, **given: Any) -> Any:
        if hidden_states.shape[1] > 2:  # a prompt
            return inner(hidden_states, **given)
        return hidden_states, None

    attention.forward = forward
    config = parse_config({"dtype": "float32", "kv_cache_gib": 2**-9, "cuda_graphs": True})
    with cpinfer.attach(model, config=config) as engine, pytest.raises(EngineFaultError, match="in 1 of its 2 layers"):
        engine.generate(prompts_of((5, 17), vocab_size=128), SamplingParams(temperature=0, max_new_tokens=4))
    assert graphs.num_captured == 0


@pytest.mark.parametrize("change", ["moved", "said"])
def test_graphs_of_weights_that_are_no_more_are_forgotten_by_all_ranks(
    on_fake_cuda: Callable[[Any], None], change: str
) -> None:
    graphs = Graphs()
    on_fake_cuda(graphs.capture)
    model, other = make_model(FAMILIES["qwen2"]), make_model(FAMILIES["qwen2"])
    with torch.no_grad():
        other.lm_head.weight.neg_()
    config = parse_config(
        {"dtype": "float32", "prefill_context_parallel_size": 2, "kv_cache_gib": 2**-9, "cuda_graphs": True}
    )
    prompts, sampling = prompts_of((5, 17, 9), vocab_size=128), SamplingParams(temperature=0, max_new_tokens=4)
    captured: list[int] = []

    def body(topology: cpinfer.Topology) -> Any:
        own = copy.deepcopy(model)
        with cpinfer.attach(own, topology, config) as engine:
            engine.generate(prompts, sampling)
            engine.generate(prompts, sampling)
            captured.append(graphs.num_captured)
            if change == "said":
                with torch.no_grad():
                    own.lm_head.weight.copy_(other.lm_head.weight)
            elif topology.rank == 0:  # on one rank alone they lie elsewhere
                own.lm_head.weight.data = other.lm_head.weight.data.clone()
            else:
                own.lm_head.weight.data.copy_(other.lm_head.weight)
            if change == "said":
                engine.weights_changed()
            return engine.generate([[*p, 1] for p in prompts], sampling)

    ranks = run_ranks(RankGrid(pcp_size=2, dcp_size=2), body)
    assert graphs.num_captured == 2 * max(captured) > 0
    for result in ranks[0]:
        expected = check_rollout.score(other, result.prompt_token_ids, result.token_ids)
        assert (expected - torch.tensor(result.logprobs)).abs().max() <= 1e-4


def test_by_default_nothing_is_captured(on_fake_cuda: Callable[[Any], None]) -> None:
    on_fake_cuda(refuse_to_capture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate("llama", RankGrid(), (5, 9))


def test_where_graphs_are_impossible_it_is_said_and_decode_goes_on() -> None:
    with pytest.warns(UserWarning, match="decode runs without CUDA graphs: the model is on cpu"):
        assert_right(*generate("llama", RankGrid(), (5, 9), cuda_graphs=True))


@pytest.mark.parametrize(
    ("family", "backend", "why"),
    [
        ("llama", TorchBackend(CPU), "the torch backend plans steps of any size anew"),
        ("mixtral", None, "padding rows would reach the model's experts"),
        ("llama", None, None),
    ],
)
def test_what_keeps_a_model_from_graphs_is_known_before_any_step(family: str, backend: Any, why: str | None) -> None:
    from cpinfer.attention.backends.base import AttentionNeeds

    model = make_model(FAMILIES[family])
    with attached(model, model_spec(model), 1) as runner:
        runner.device = torch.device("cuda")  # nothing is run
        backend = backend or FlashInferBackend(CPU, AttentionNeeds(torch.float32, ()), fake_flashinfer())
        found = cuda_graphs_error(runner, backend)
        weight = model.lm_head.weight
        whole, weight.data, weight.ds_id = weight.data, torch.empty(0), 0  # as ZeRO-3 leaves it
        dealt_out = cuda_graphs_error(runner, backend)
        weight.data = whole  # brought for the length of a phase
        assert cuda_graphs_error(runner, backend) == found
    assert found is None if why is None else found is not None and why in found
    assert dealt_out is not None and ("gathered while the model runs" in dealt_out or dealt_out == found)
