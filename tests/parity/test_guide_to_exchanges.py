"""The guide to adding an exchange adds one: states come back right, and engines answer as with others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cpinfer
from cpinfer.attention.exchanges.base import StateExchange
from cpinfer.attention.exchanges.registry import EXCHANGES
from cpinfer.comm.axis import CountingComm, Traffic
from cpinfer.comm.threads import run_ranks
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.ops.states import State, merge_states
from documents import code_blocks, page
from tiny_models import FAMILIES, make_model, prompts_of

GUIDE = page("extending/exchange.md")
SOURCE, ROW = code_blocks(GUIDE)
PCP2_DCP2, TP2_PCP2_DCP4 = RankGrid(1, 2, 2), RankGrid(2, 2, 4)
R, H, D = 3, 2, 4


def row_of(source: str = SOURCE) -> dict[str, type[StateExchange]]:
    names: dict[str, Any] = {}
    exec(source, names)
    found: dict[str, type[StateExchange]] = eval(f"{{{ROW}}}", names)
    return found


def returned(grid: RankGrid, exchange: type[StateExchange]) -> list[tuple[State, State, Traffic]]:
    """Of every rank: its rows and heads as they came back, as they should be (float64), and what travelled.

    Row 0 has no keys on shard 1, and none has keys of row 1.
    """
    S, columns = grid.dcp_size, grid.dcp_size // grid.pcp_size
    g = torch.Generator().manual_seed(0)
    out = torch.randn(S, grid.pcp_size * R, columns * H, D, generator=g)
    lse = 5 * torch.randn(S, grid.pcp_size * R, columns * H, generator=g)
    for shards, row in (slice(1, 2), 0), (slice(None), 1):
        out[shards, row], lse[shards, row] = 0.0, -torch.inf

    def body(topology: cpinfer.Topology) -> tuple[State, State, Traffic]:
        comm = CountingComm(topology.dcp)
        column, pcp_rank = divmod(comm.index, grid.pcp_size)
        rows, heads = slice(pcp_rank * R, (pcp_rank + 1) * R), slice(column * H, (column + 1) * H)
        made = exchange(comm, pcp_size=grid.pcp_size, wire_dtype=torch.float32)
        got = made.return_partials((out[comm.index], lse[comm.index]))
        shards = [(out[s, rows, heads].double(), lse[s, rows, heads].double()) for s in range(S)]
        return got, merge_states(shards), comm.traffic

    return run_ranks(grid, body)


def is_right(got: State, want: State) -> bool:
    same = [torch.allclose(x.double(), y, rtol=0, atol=1e-5) for x, y in zip(got, want, strict=True)]
    return all(same) and not got[0].isnan().any()


@pytest.mark.parametrize("grid", [PCP2_DCP2, TP2_PCP2_DCP4], ids=str)
def test_states_come_back_merged_by_the_exchange_of_the_guide(grid: RankGrid) -> None:
    [exchange] = row_of().values()
    results = returned(grid, exchange)
    for got, want, traffic in results:
        assert got[0].shape == (R, H, D) and is_right(got, want)
        assert (traffic.num_all_gather, traffic.num_collectives) == (1, 1)
    # As the guide's table says: so many times what the all-to-all receives.
    by_a2a = returned(grid, EXCHANGES["a2a"])
    assert results[0][2].received_bytes == grid.dcp_size * by_a2a[0][2].received_bytes


@pytest.mark.parametrize("place", ["-1 - self._comm.index", "0"])
def test_rows_of_another_place_are_noticed(place: str) -> None:
    right = "everything[:, self._comm.index]"
    assert right in SOURCE
    [exchange] = row_of(SOURCE.replace(right, f"everything[:, {place}]")).values()
    assert not all(is_right(got, want) for got, want, _ in returned(PCP2_DCP2, exchange))


def test_an_engine_answers_with_it_as_with_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(FAMILIES["llama"])

    def tokens(name: str) -> list[tuple[int, ...]]:
        def body(topology: cpinfer.Topology) -> list[tuple[int, ...]]:
            keys = {"decode_exchange": name, "kv_cache_gib": 0.01}
            with cpinfer.attach(copy.deepcopy(model), topology, keys) as engine:
                greedy = cpinfer.SamplingParams(temperature=0, max_new_tokens=6)
                return [tuple(r.token_ids) for r in engine.generate(prompts_of((9, 40), vocab_size=128), greedy)]

        return run_ranks(PCP2_DCP2, body)[0]

    with pytest.raises(UserError, match='unknown decode_exchange "gather"'):
        tokens("gather")
    for name, exchange in row_of().items():
        monkeypatch.setitem(EXCHANGES, name, exchange)  # type: ignore[arg-type]
    assert tokens("gather") == tokens("a2a")
