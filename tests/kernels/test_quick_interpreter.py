"""FlashInfer as the quick tests have it, beside its own kernels: the same answers, modules and sizes of workspaces.

`fake_flashinfer` is written from the documentation; what it says is only worth what these cases find.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import BF16, CACHED, E4M3, ROWS, Heads, backend_of, faults, inputs_of, on_device, rows_of

from cpinfer.attention.backends.base import AttentionNeeds, FixedSize, LayerKind
from cpinfer.attention.backends.flashinfer import wrapper
from cpinfer.attention.backends.flashinfer.backend import FlashInferBackend
from cpinfer.attention.backends.flashinfer.building import spec_of
from cpinfer.attention.backends.flashinfer.kernels import Chip, kernel_modules
from cpinfer.attention.backends.flashinfer.limits import replayed_int_bytes
from cpinfer.attention.backends.self_check import check_backend
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.states import State
from fake_flashinfer import fake_flashinfer
from interpreted_cuda.device import CARDS, pretend
from interpreted_cuda.modules import LOADED
from interpreted_cuda.tensors import CUDA

pytestmark = pytest.mark.timeout(900)

VERSION = version("flashinfer-python")
GQA = Heads(8, KVLayout(2, 128, 128))
HEADS = {
    "grouped": GQA,
    "each head its own": Heads(4, KVLayout(4, 128, 128)),
    "expanded": Heads(4, KVLayout(4, 192, 128)),
    "latents": Heads(16, KVLayout(1, 576, 512, v_is_prefix_of_k=True)),
    "eight bits": Heads(8, KVLayout(2, 128, 128), key_dtype=E4M3),
    "capped": Heads(8, KVLayout(2, 64, 64), soft_cap=20.0),
}


def cases() -> Iterator[Any]:
    """Each kind of rows with grouped heads, and each kind of heads with a few kinds of rows."""
    for name in ROWS:
        yield pytest.param(HEADS["grouped"], ROWS[name], id=f"grouped, {name}")
    for kind in ("each head its own", "expanded", "latents", "eight bits", "capped"):
        only_cached = kind in ("latents", "eight bits")
        for name in ("decode", "context, one row empty", "prefill"):
            if name in CACHED or not only_cached:
                yield pytest.param(HEADS[kind], ROWS[name], id=f"{kind}, {name}")
    for kind in ("grouped", "capped"):
        rows = ROWS["prefill, heads and tails"].within(16)
        yield pytest.param(HEADS[kind], rows, id=f"{kind}, heads and tails in a window")


def both(heads: Heads, rows: AttentionRows, **library: Any) -> tuple[State, State]:
    """By FlashInfer's kernels, and by the quick interpreter; what no row sees is no number, and 0."""
    rows = rows.over(heads.layout)
    inputs = inputs_of(rows, heads)
    given, at = on_device(inputs), {"scale": heads.scale, "soft_cap": heads.soft_cap}
    found = backend_of(heads).plan(rows).run(given.q, given.keys, given.values, **at)
    for x in (inputs.keys, inputs.values):
        x.copy_(x.float().nan_to_num(0.0).to(x.dtype))
    quick = FlashInferBackend(torch.device("cpu"), AttentionNeeds(heads.dtype, ()), fake_flashinfer(VERSION, **library))
    return found, quick.plan(rows).run(inputs.q, inputs.keys, inputs.values, **at)


@pytest.mark.parametrize(("heads", "rows"), list(cases()))
def test_the_quick_interpreter_gives_what_the_kernels_give(heads: Heads, rows: AttentionRows) -> None:
    found, (out, lse) = both(heads, rows)
    assert not faults(found, (out.double(), lse.double()), heads.dtype)


@pytest.mark.parametrize("library", [{"lse_base": math.e}, {"causal": "top-left"}], ids=str)
def test_a_wrong_one_is_told_from_the_kernels(library: dict[str, Any]) -> None:
    found, (out, lse) = both(GQA, ROWS["prefill, heads and tails"], **library)
    assert faults(found, (out.double(), lse.double()), BF16)


def test_what_is_compiled_ahead_is_what_flashinfer_loads_and_what_the_quick_one_names() -> None:
    layers = (LayerKind(has_cap=True), LayerKind(has_window=True, has_cap=True))
    gemma = AttentionNeeds(BF16, ((8, KVLayout(2, 64, 64)),), layers=layers)
    deepseek = AttentionNeeds(BF16, ((16, HEADS["latents"].layout), (4, HEADS["expanded"].layout)))
    for needs in (gemma, deepseek, AttentionNeeds(BF16, ((4, KVLayout(4, 128, 128)),))):
        ahead = {spec_of(module, print).name for module in kernel_modules(needs, Chip())}
        before = set(LOADED)
        check_backend(FlashInferBackend(CUDA, needs), needs, CUDA)
        loaded = {Path(path).stem for path in LOADED}
        assert ahead <= loaded and {Path(path).stem for path in set(LOADED) - before} <= ahead
        library = fake_flashinfer(VERSION)
        check_backend(FlashInferBackend(torch.device("cpu"), needs, library), needs, torch.device("cpu"))
        assert {spec_of(module, print).name for module in library.log.modules} == ahead


@pytest.fixture
def many_sms() -> Iterator[int]:
    """As many multiprocessors as the card has; then few again."""
    card = CARDS["a100"]
    pretend(card, num_sms=card.num_sms, runs=False)
    yield card.num_sms
    pretend(card)


def replay_plan(heads: Heads, num_rows: int) -> None:
    """FlashInfer ends plans that do not fit where they are written."""
    size, calls = FixedSize(num_rows, 16 * num_rows), ((heads.num_q_heads, heads.layout),)
    backend = FlashInferBackend(CUDA, AttentionNeeds(heads.dtype, calls, replayed=(size,)))
    plan = backend.fixed_plan(size, single_tokens=False)
    for kv_len in (1, 200):
        rows = rows_of([1] * num_rows, [kv_len] * num_rows, 16, causal=False)
        inputs = on_device(inputs_of(rows, heads))
        plan.update(rows)
        plan.run(inputs.q, inputs.keys, inputs.values, scale=1.0)


@pytest.mark.parametrize("num_rows", [1, 48, 256])
@pytest.mark.parametrize("kind", ["grouped", "each head its own", "expanded"])
def test_plans_that_are_replayed_fit_where_they_are_written(many_sms: int, kind: str, num_rows: int) -> None:
    replay_plan(HEADS[kind], num_rows)


def test_with_less_room_they_would_not(many_sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "replayed_int_bytes", lambda *shape: replayed_int_bytes(*shape) // 16)
    with pytest.raises(Exception, match=r"(?i)workspace"):
        replay_plan(GQA, 256)
