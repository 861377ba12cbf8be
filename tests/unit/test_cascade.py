"""A cascade gives what the rows left whole give, in fewer kernel calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cpinfer.attention.backends import cpu_backend
from cpinfer.attention.backends.base import AttentionBackend, AttentionNeeds
from cpinfer.attention.backends.cpu_backend import CpuBackend
from cpinfer.attention.backends.flashinfer.backend import FlashInferBackend
from cpinfer.attention.backends.torch_backend import MIN_SAVED_KEYS, TorchBackend
from cpinfer.attention.cascade import CascadePlan, plan_cascade
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shared_prefix import share_prefix
from fake_flashinfer import fake_flashinfer

CPU = torch.device("cpu")
TABLES = [[5, 1, 0], [5, 1, 9, 2], [5, 1, 4], [8, 3], [7, 6, 10], [7, 6, 11]]
KV_LENS = [10, 15, 8, 7, 12, 9]
TOLERANCE = 1e-5  # logits are of size 10, of which float32 has 1e-6


def rows_of(kv_lens: list[int]) -> AttentionRows:
    return AttentionRows.build([1] * len(kv_lens), kv_lens, TABLES, block_size=4, causal=False)


def inputs(H: int, K: int, D: int, latent: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(len(TABLES), H, D, generator=generator)
    keys = torch.randn(48, K, D, generator=generator)
    return q, keys, keys[..., : D - 4] if latent else torch.randn(48, K, D, generator=generator)


def backends() -> list[Any]:
    flashinfer = FlashInferBackend(CPU, AttentionNeeds(torch.float32, ()), fake_flashinfer())
    ours = [TorchBackend(CPU), CpuBackend(None)]
    return [pytest.param(backend, id=backend.name) for backend in (*ours, flashinfer)]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("heads", [(6, 2, 8), (4, 4, 8)], ids=str)
def test_a_cascade_equals_rows_left_whole(
    backend: AttentionBackend, soft_cap: float | None, heads: tuple[int, int, int]
) -> None:
    q, keys, values = inputs(*heads)
    rows = rows_of(KV_LENS)
    cascade = plan_cascade(backend, rows, 0)
    assert isinstance(cascade, CascadePlan)
    out, lse = cascade.run(q, keys, values, scale=0.3, soft_cap=soft_cap)
    want_out, want_lse = backend.plan(rows).run(q, keys, values, scale=0.3, soft_cap=soft_cap)
    assert (out - want_out).abs().max() <= TOLERANCE and (lse - want_lse).abs().max() <= TOLERANCE


@pytest.mark.parametrize("backend", backends())
def test_latents_are_shared_alike(backend: AttentionBackend) -> None:
    q, keys, values = inputs(4, 1, 12, latent=True)
    rows = replace(rows_of(KV_LENS), v_is_prefix_of_k=True)
    out, lse = plan_cascade(backend, rows, 0).run(q, keys, values, scale=0.3)
    want_out, want_lse = backend.plan(rows).run(q, keys, values, scale=0.3)
    assert (out - want_out).abs().max() <= TOLERANCE and (lse - want_lse).abs().max() <= TOLERANCE


def test_rows_without_other_keys_and_without_any_are_right_too() -> None:
    q, keys, values = inputs(4, 2, 8)
    backend, rows = TorchBackend(CPU), rows_of([8, 9, 8, 0, 8, 8])
    out, lse = plan_cascade(backend, rows, 0).run(q, keys, values, scale=0.3)
    want_out, want_lse = backend.plan(rows).run(q, keys, values, scale=0.3)
    assert (out[3] == 0).all() and (lse[3] == -torch.inf).all()
    real = [0, 1, 2, 4, 5]
    assert (out[real] - want_out[real]).abs().max() <= TOLERANCE and (
        lse[real] - want_lse[real]
    ).abs().max() <= TOLERANCE


def test_keys_seen_twice_would_be_noticed() -> None:
    """The control: rows that keep what they share, too."""
    q, keys, values = inputs(4, 2, 8)
    backend, rows = TorchBackend(CPU), rows_of(KV_LENS)
    cut = share_prefix(rows)
    assert cut is not None
    wrong = CascadePlan(backend.plan(cut.shared), backend.plan(rows))
    want = backend.plan(rows).run(q, keys, values, scale=0.3)
    assert (wrong.run(q, keys, values, scale=0.3)[1] - want[1]).abs().max() > 1e-2


def test_it_is_for_prefixes_that_save_enough() -> None:
    rows = rows_of(KV_LENS)
    cut = share_prefix(rows)
    assert cut is not None and cut.num_saved_keys == 24  # 4 keys per query
    for at_least, expected in ((None, False), (0, True), (4, True), (5, False)):
        assert isinstance(plan_cascade(TorchBackend(CPU), rows, at_least), CascadePlan) == expected


def test_by_itself_it_is_done_only_where_it_has_been_measured() -> None:
    assert TorchBackend(CPU).min_saved_keys == MIN_SAVED_KEYS
    assert CpuBackend(None).min_saved_keys == cpu_backend.MIN_SAVED_KEYS
    assert TorchBackend(torch.device("cuda")).min_saved_keys is None
    assert FlashInferBackend(CPU, AttentionNeeds(torch.float32, ()), fake_flashinfer()).min_saved_keys is None


def test_the_shared_keys_are_read_by_one_row_of_the_library() -> None:
    library = fake_flashinfer()
    backend = FlashInferBackend(CPU, AttentionNeeds(torch.float32, ()), library)
    plan_cascade(backend, rows_of(KV_LENS), 0).run(*inputs(6, 2, 8), scale=0.3)
    (shared_kind, shared), (own_kind, own) = library.log.plans
    assert (shared_kind, own_kind) == ("prefill", "decode")
    assert shared["qo_indptr"].tolist() == [0, 3, 4, 6] and not shared["causal"]
    assert len(own["indptr"]) == len(TABLES) + 1
