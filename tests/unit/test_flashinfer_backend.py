"""The FlashInfer backend through a literal interpreter of FlashInfer's wrappers: arguments, page tables, states."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionNeeds, FixedSize, LayerKind
from cpinfer.attention.backends.flashinfer.backend import FlashInferBackend, check_flashinfer, unfit
from cpinfer.attention.backends.flashinfer.kernels import FA3_TILE_QUERIES, Chip, refused
from cpinfer.attention.backends.flashinfer.limits import replayed_int_bytes, workspace_bytes
from cpinfer.attention.backends.flashinfer.wrapper import Wrapper
from cpinfer.attention.backends.registry import check_choice, make_backend
from cpinfer.attention.backends.self_check import check_backend
from cpinfer.attention.backends.torch_backend import TorchBackend
from cpinfer.errors import BackendFaultError, UnsupportedError, UserError
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from cpinfer.ops.attention import dense_attention
from cpinfer.ops.states import State
from fake_flashinfer import VERSIONS, checked_backend, fake_flashinfer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GQA = KVLayout(2, 8, 8)
LATENT = KVLayout(1, 12, 8, v_is_prefix_of_k=True)
EXPANDED = KVLayout(8, 12, 8)
# No model has them all.
NEEDS = AttentionNeeds(torch.float32, ((8, GQA), (8, LATENT), (8, EXPANDED)))
WITH_WINDOWS = (LayerKind(), LayerKind(has_window=True))
HOPPER = Chip((9, 0), has_fa3_prefill=True)
TOLERANCE = 1e-5
BLOCKS = {4: [[7, 8, 9, 2, 3], [], [4, 11], [0, 1]], 1: [list(range(40, 60)), [], [9, 3, 30, 31, 2, 0], list(range(9))]}


@pytest.fixture(params=VERSIONS)
def library(request: pytest.FixtureRequest) -> Any:
    return fake_flashinfer(request.param)


def backend_of(library: Any) -> FlashInferBackend:
    """Without needs there is nothing to check, so nothing has been made or planned."""
    return FlashInferBackend(CPU, AttentionNeeds(torch.float32, ()), library)


def store(layout: KVLayout, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of 48 slots, side by side, as gathered buffers have them."""
    both = torch.randn(48 * 2, layout.num_heads, layout.width, generator=torch.Generator().manual_seed(seed))
    if layout.v_is_prefix_of_k:
        return both, both[..., : layout.v_dim]
    return both[..., : layout.k_dim], both[..., layout.k_dim :]


def queries(rows: AttentionRows, layout: KVLayout, heads: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(heads, rows.num_queries, layout.k_dim, generator=generator).transpose(0, 1)


def oracle(rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float | None) -> State:
    outs, lses = [], []
    first = 0
    for row, q_len in enumerate(rows.q_lens.tolist()):
        slots = torch.from_numpy(rows.slots(row))
        part = q[first : first + q_len].double()
        at = {"scale": scale, "causal": rows.causal, "window": rows.window, "soft_cap": cap}
        out, lse = dense_attention(part, k[slots].double(), v[slots].double(), **at)
        outs.append(out)
        lses.append(lse)
        first += q_len
    return torch.cat(outs), torch.cat(lses)


def assert_equal(found: State, want: State) -> None:
    out, lse = found
    assert lse.dtype == torch.float32 and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=TOLERANCE)


def ragged(block_size: int, *, causal: bool) -> AttentionRows:
    return AttentionRows.build([3, 2, 5, 1], [18, 0, 6, 8], BLOCKS[block_size], block_size=block_size, causal=causal)


ROWS = {
    "causal prefill": ragged(4, causal=True),
    "causal prefill in pages of one token": ragged(1, causal=True),
    "prefill in a window": ragged(4, causal=True).within(3),
    "prefill in a window, pages of one token": ragged(1, causal=True).within(7),
    "context": ragged(4, causal=False),
    "decode": AttentionRows.build([1] * 4, [18, 0, 6, 8], BLOCKS[4], block_size=4, causal=False),
    "decode in a window": AttentionRows.build([1] * 4, [18, 0, 6, 8], BLOCKS[4], block_size=4, causal=False).above(
        np.array([13, 0, 3, 8])
    ),
    "only empty rows": AttentionRows.build([1, 2], [0, 0], [[], []], block_size=4, causal=False),
    "no rows": AttentionRows.build([], [], [], block_size=4, causal=True),
}


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("layout", [GQA, EXPANDED], ids=["gqa", "expanded latents"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_states_equal_dense_attention(library: Any, rows: AttentionRows, layout: KVLayout, cap: float | None) -> None:
    if rows.num_rows == 0:
        q, (k, v) = queries(rows, layout), store(layout)
        out, lse = backend_of(library).plan(rows).run(q, k, v, scale=0.3)
        assert out.shape == (0, 8, layout.v_dim) and lse.shape == (0, 8)
        return
    q, (k, v) = queries(rows, layout), store(layout)
    found = backend_of(library).plan(rows.over(layout)).run(q, k, v, scale=0.3, soft_cap=cap)
    assert_equal(found, oracle(rows, q, k, v, 0.3, cap))


@pytest.mark.parametrize("name", [name for name, rows in ROWS.items() if not rows.causal])
def test_states_over_latents_equal_dense_attention(library: Any, name: str) -> None:
    rows = ROWS[name]
    if rows.num_rows:
        q, (k, v) = queries(rows, LATENT), store(LATENT)
        found = backend_of(library).plan(rows.over(LATENT)).run(q, k, v, scale=0.3)
        assert_equal(found, oracle(rows, q, k, v, 0.3, None))


def test_the_quick_interpreter_sees_latents_handed_to_0_7_as_0_6_took_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer only warns of it."""
    plan = Wrapper.plan

    def as_before(self: Any, *given: Any) -> None:
        self._metadata = None
        plan(self, *given)

    monkeypatch.setattr(Wrapper, "plan", as_before)
    rows, (k, v) = ROWS["decode"].over(LATENT), store(LATENT)
    for version in VERSIONS:
        with nullcontext() if version.startswith("0.6.") else pytest.raises(AssertionError, match="metadata"):
            backend_of(fake_flashinfer(version)).plan(rows).run(queries(rows, LATENT), k, v, scale=0.3)


@pytest.mark.parametrize("heads", [2, 8])
def test_decode_takes_tensor_cores_where_queries_share_kv_heads(library: Any, heads: int) -> None:
    rows = ROWS["decode"]
    q, (k, v) = queries(rows, GQA, heads), store(GQA)
    backend_of(library).plan(rows).run(q, k, v, scale=0.3)
    (made,) = library.log.made
    assert made["name"] == "decode" and made["use_tensor_cores"] == (heads == 8) and made["backend"] == "fa2"


@pytest.mark.parametrize(
    ("name", "layout", "kind"),
    [
        ("decode", GQA, "decode"),
        ("decode", EXPANDED, "prefill"),  # decode wrappers want equal head dims
        ("decode", LATENT, "latent"),
        ("context", GQA, "prefill"),
        ("causal prefill", GQA, "prefill"),
        ("context", LATENT, "latent"),
    ],
)
def test_each_kind_of_call_goes_to_its_wrapper(library: Any, name: str, layout: KVLayout, kind: str) -> None:
    q, (k, v) = queries(ROWS[name], layout), store(layout)
    backend_of(library).plan(ROWS[name].over(layout)).run(q, k, v, scale=0.3)
    assert [made["name"] for made in library.log.made] == [kind]
    assert [name for name, _ in library.log.plans] == [kind]


@pytest.mark.parametrize(
    ("q_len", "layout", "family"),
    [(200, GQA, "fa3"), (128, GQA, "fa2"), (200, EXPANDED, "fa2"), (200, LATENT, "fa3"), (2, LATENT, "fa3")],
    ids=str,
)
def test_on_hopper_many_queries_over_equal_head_dims_take_its_own_kernels(
    library: Any, q_len: int, layout: KVLayout, family: str
) -> None:
    """The library has none for keys and values of different dims, and says so only when it runs."""
    backend = backend_of(library)
    backend._chip = HOPPER
    rows = AttentionRows.build([q_len], [18], BLOCKS[4][:1], block_size=4, causal=False)
    q, (k, v) = queries(rows, layout), store(layout)
    assert_equal(backend.plan(rows.over(layout)).run(q, k, v, scale=0.3), oracle(rows, q, k, v, 0.3, None))
    assert library.log.made[0]["backend"] == family


def test_without_kernels_of_flashattention_3_prefill_takes_those_of_2_and_latents_their_own(library: Any) -> None:
    backend = backend_of(library)
    backend._chip = HOPPER._replace(has_fa3_prefill=False)
    rows = AttentionRows.build([200], [18], BLOCKS[4][:1], block_size=4, causal=False)
    for layout in (GQA, LATENT):
        q, (k, v) = queries(rows, layout), store(layout)
        backend.plan(rows.over(layout)).run(q, k, v, scale=0.3)
    assert [made["backend"] for made in library.log.made] == ["fa2", "fa3"]


def test_keys_and_values_of_unequal_strides_are_refused(library: Any) -> None:
    """A library may have other kernels for them, which it would compile in the middle of a step."""
    rows = ROWS["decode"]
    q, (k, v) = queries(rows, GQA), store(GQA)
    with pytest.raises(ValueError, match=r"unequal strides: \(32, 16, 1\) and \(16, 8, 1\)"):
        backend_of(library).plan(rows).run(q, k, v.contiguous(), scale=0.3)
    latent, _ = store(LATENT)
    rows = rows.over(LATENT)
    values = latent[..., :8]
    backend_of(library).plan(rows).run(queries(rows, LATENT), latent, values, scale=0.3)


def test_plans_that_are_replayed_share_a_workspace_and_have_little_room_of_their_own_for_what_they_say(
    library: Any,
) -> None:
    """Wrappers come with 8 MiB each, and there is one for each size, window and call."""
    sizes = (FixedSize(2, 24), FixedSize(8, 24))
    backend = FlashInferBackend(CPU, AttentionNeeds(torch.float32, ((8, GQA),), replayed=sizes), library)
    backend._num_sms = 4
    k, v = store(GQA)
    for size in sizes:
        plan = backend.fixed_plan(size, single_tokens=False)
        rows = AttentionRows.build([1] * size[0], [3] * size[0], [[7]] * size[0], block_size=4, causal=False)
        plan.update(rows)
        plan.run(queries(rows, GQA), k, v, scale=0.3)
    assert all(made["float_workspace_buffer"] is backend._workspace for made in library.log.made)
    assert library.log.int_bytes == [replayed_int_bytes(8, 2, 8, size.num_rows, num_sms=4) for size in sizes]
    assert max(library.log.int_bytes) < 2**12


def test_the_workspace_is_as_large_as_the_most_rows_that_are_replayed_want() -> None:
    """Splitting keys, they want room for every row, and one that is grown later cannot be captured."""
    needs = AttentionNeeds(torch.bfloat16, ((64, KVLayout(8, 128, 128)),))
    few, many = (replace(needs, replayed=(FixedSize(n, 1),)) for n in (128, 256))
    assert workspace_bytes(needs, 132) == workspace_bytes(few, 132) < workspace_bytes(many, 132) < 2**28


def test_all_layers_share_one_plan_and_one_place_for_results(library: Any) -> None:
    rows = ROWS["causal prefill"]
    plan = backend_of(library).plan(rows)
    q = queries(rows, GQA)
    places = set()
    for layer in range(4):
        k, v = store(GQA, seed=layer)
        out, lse = plan.run(q, k, v, scale=0.3)
        assert_equal((out, lse), oracle(rows, q, k, v, 0.3, None))
        places.add((out.data_ptr(), lse.data_ptr()))
    assert len(library.log.plans) == 1 and len(places) == 1


def test_layers_that_differ_in_scale_or_cap_have_plans_of_their_own(library: Any) -> None:
    rows = ROWS["causal prefill"]
    plan = backend_of(library).plan(rows)
    q, (k, v) = queries(rows, GQA), store(GQA)
    for scale, cap in ((0.3, None), (0.2, None), (0.3, 5.0), (0.3, None)):
        found = plan.run(q, k, v, scale=scale, soft_cap=cap)
        assert_equal(found, oracle(rows, q, k, v, scale, cap))
    assert len(library.log.plans) == 3


def test_plans_that_are_held_stay_valid_and_those_let_go_give_their_wrapper_back(library: Any) -> None:
    backend = backend_of(library)
    names = ("causal prefill", "prefill in a window", "context")
    layouts = {name: (ROWS[name], queries(ROWS[name], GQA)) for name in names}
    k, v = store(GQA)
    for _ in range(3):
        plans = {name: backend.plan(rows) for name, (rows, _) in layouts.items()}
        for _ in range(2):  # layers take turns
            for name, (rows, q) in layouts.items():
                assert_equal(plans[name].run(q, k, v, scale=0.3), oracle(rows, q, k, v, 0.3, None))
        del plans
    assert len(library.log.made) == 3
    assert len(library.log.plans) == 9


def test_a_wrong_number_of_queries_is_an_error(library: Any) -> None:
    plan = backend_of(library).plan(ROWS["context"])
    k, v = store(GQA)
    with pytest.raises(ValueError, match="3 queries were given to a plan of 11"):
        plan.run(torch.zeros(3, 8, 8), k, v, scale=1.0)


@pytest.mark.parametrize(
    ("name", "cap", "why"),
    [
        ("causal prefill", None, "not causal here"),
        ("prefill in a window", None, "neither windows nor soft caps"),
        ("decode", 5.0, "neither windows nor soft caps"),
    ],
)
def test_latents_are_refused_what_their_kernels_do_wrong_or_not_at_all(name: str, cap: float | None, why: str) -> None:
    q, (k, v) = queries(ROWS[name], LATENT), store(LATENT)
    with pytest.raises(ValueError, match=why):
        backend_of(fake_flashinfer()).plan(ROWS[name].over(LATENT)).run(q, k, v, scale=0.3, soft_cap=cap)


def test_more_latent_queries_than_a_plan_has_room_for_are_refused() -> None:
    """The library would write beyond its arrays. 128 heads: a token is a tile."""
    rows = AttentionRows.build([16200], [1], [[0]], block_size=1, causal=False)
    k, v = store(LATENT)
    with pytest.raises(ValueError, match=r"16200 queries of 128 heads .* Lower max_num_batched_tokens"):
        backend_of(fake_flashinfer()).plan(rows.over(LATENT)).run(torch.zeros(16200, 128, 12), k, v, scale=0.3)


def test_a_nan_comes_through_but_not_into_rows_without_keys(library: Any) -> None:
    rows = ROWS["decode"]
    k, v = store(GQA)
    v[0] = math.nan  # in the first page, which rows without keys are told to read, and which the last row sees
    k[40:] = math.nan  # nobody sees these
    out, lse = backend_of(library).plan(rows).run(queries(rows, GQA), k, v, scale=0.3)
    assert out[:1].isfinite().all() and out[3].isnan().any()
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("layout", [GQA, LATENT], ids=["gqa", "latents"])
def test_a_plan_of_fixed_size_takes_other_rows_in_the_same_memory(library: Any, layout: KVLayout) -> None:
    backend = backend_of(library)
    plan = backend.fixed_plan(FixedSize(4, 24), single_tokens=False)
    k, v = store(layout)
    places = set()
    for kv_lens in ([18, 0, 6, 8], [1, 0, 0, 5], [0, 0, 7, 2], [0, 0, 0, 0]):
        rows = AttentionRows.build([1] * 4, kv_lens, BLOCKS[4], block_size=4, causal=False)
        q = queries(rows, layout)
        plan.update(rows.over(layout))
        out, lse = plan.run(q, k, v, scale=0.3)
        assert_equal((out, lse), oracle(rows, q, k, v, 0.3, None))
        places.add(out.data_ptr())
    assert len(library.log.made) == 1 and len(places) == 1
    assert library.log.made[0]["use_cuda_graph"]
    too_many = AttentionRows.build([1] * 5, [4] * 5, [[1]] * 5, block_size=4, causal=False)
    with pytest.raises(ValueError, match="do not fit"):
        plan.update(too_many)
    with pytest.raises(ValueError, match="fixed size"):
        backend.plan(ROWS["decode"]).update(ROWS["decode"])


def test_windows_of_a_fixed_plan_are_pages_of_one_token(library: Any) -> None:
    plan = backend_of(library).fixed_plan(FixedSize(4, 20), single_tokens=True)
    k, v = store(GQA)
    for kv_lo in ([13, 0, 3, 8], [16, 0, 2, 4]):
        rows = ROWS["decode"].above(np.array(kv_lo))
        q = queries(rows, GQA)
        plan.update(rows)
        assert_equal(plan.run(q, k, v, scale=0.3), oracle(rows, q, k, v, 0.3, None))


# --- fp8 pages ---

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def rounded_store(layout: KVLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A store in fp8, as the cache has it."""
    k, v = store(layout)
    keys = k.to(dtype)
    return (keys, keys[..., : layout.v_dim]) if layout.v_is_prefix_of_k else (keys, v.to(dtype))


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("name", ["context", "decode", "decode in a window", "only empty rows"])
def test_states_over_fp8_pages_equal_dense_attention_over_the_numbers_in_them(
    library: Any, name: str, dtype: torch.dtype
) -> None:
    rows = ROWS[name]
    q, (k, v) = queries(rows, GQA), rounded_store(GQA, dtype)
    found = backend_of(library).plan(rows).run(q, k, v, scale=0.3, soft_cap=5.0)
    assert_equal(found, oracle(rows, q, k.float(), v.float(), 0.3, 5.0))


def test_states_over_fp8_latents_equal_dense_attention_over_the_numbers_in_them(library: Any) -> None:
    for rows in (ROWS["context"], ROWS["decode"]):
        q, (k, v) = queries(rows, LATENT), rounded_store(LATENT, torch.float8_e4m3fn)
        assert_equal(
            backend_of(library).plan(rows.over(LATENT)).run(q, k, v, scale=0.3),
            oracle(rows, q, k.float(), v.float(), 0.3, None),
        )


@pytest.mark.parametrize(
    ("layout", "key_dtype", "family"),
    [
        (GQA, torch.float8_e4m3fn, "fa2"),
        (GQA, torch.float8_e5m2, "fa2"),
        (GQA, torch.float32, "fa3"),
        (LATENT, torch.float8_e4m3fn, "fa3"),
    ],
    ids=str,
)
def test_on_hopper_fp8_pages_of_heads_take_the_older_family(
    library: Any, layout: KVLayout, key_dtype: torch.dtype, family: str
) -> None:
    backend = backend_of(library)
    backend._chip = HOPPER
    rows = AttentionRows.build([FA3_TILE_QUERIES + 1], [18], [BLOCKS[4][0]], block_size=4, causal=False)
    k, v = rounded_store(layout, key_dtype)
    backend.plan(rows.over(layout)).run(queries(rows, layout), k, v, scale=0.3)
    [made], [(_, plan)] = library.log.made, library.log.plans
    assert made["backend"] == family and plan["kv_data_type"] == key_dtype and plan["q_data_type"] == torch.float32


def test_new_and_cached_keys_of_one_plan_are_calls_of_their_own(library: Any) -> None:
    rows = ROWS["context"]
    plan = backend_of(library).plan(rows)
    q, exact, rounded = queries(rows, GQA), store(GQA), rounded_store(GQA, torch.float8_e4m3fn)
    for k, v in (exact, rounded, exact):
        assert_equal(plan.run(q, k, v, scale=0.3), oracle(rows, q, k.float(), v.float(), 0.3, None))
    assert len(library.log.plans) == 2


# --- the self-check: what others have shipped wrong is refused at start ---


@pytest.mark.parametrize("needs", [NEEDS, replace(NEEDS, dtype=torch.bfloat16), replace(NEEDS, dtype=torch.float16)])
def test_a_right_library_passes_in_every_dtype(library: Any, needs: AttentionNeeds) -> None:
    checked_backend(CPU, needs, library)
    assert {name for name, _ in library.log.plans} == {"prefill", "decode", "latent"}


@pytest.mark.parametrize(
    ("layout", "dtype"), [(GQA, torch.float8_e4m3fn), (GQA, torch.float8_e5m2), (LATENT, torch.float8_e4m3fn)], ids=str
)
def test_the_check_asks_for_every_dtype_that_keys_come_in(library: Any, layout: KVLayout, dtype: torch.dtype) -> None:
    calls = ((8, layout), (8, EXPANDED)) if layout == LATENT else ((8, layout),)
    layers = (LayerKind(),) if layout == LATENT else WITH_WINDOWS
    checked_backend(CPU, AttentionNeeds(torch.bfloat16, calls, dtype, layers), library)
    asked = {(kind, plan["kv_data_type"]) for kind, plan in library.log.plans}
    new = {(kind, torch.bfloat16) for kind in (["prefill"] if layout == LATENT else ["prefill", "decode"])}
    assert asked == new | {(kind, dtype) for kind in (["latent"] if layout == LATENT else ["prefill", "decode"])}


def test_the_check_asks_for_windows_and_caps_where_layers_have_them(library: Any) -> None:
    layers = (LayerKind(), LayerKind(has_window=True, has_cap=True))
    checked_backend(CPU, AttentionNeeds(torch.bfloat16, ((8, GQA),), layers=layers), library)
    asked = {(m.has_window, m.has_cap) for m in library.log.modules}
    # Decode in a window is over the keys that are left.
    assert asked == {(False, False), (True, True), (False, True)}


def test_a_library_that_forgets_the_cap_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_flashinfer()
    plan = library.BatchPrefillWithPagedKVCacheWrapper.plan

    def forgets(*args: Any, **kwargs: Any) -> None:
        plan(*args, **{**kwargs, "logits_soft_cap": None})

    needs = AttentionNeeds(torch.bfloat16, ((8, GQA),), layers=(LayerKind(has_cap=True),))
    checked_backend(CPU, needs, library)
    monkeypatch.setattr(library.BatchPrefillWithPagedKVCacheWrapper, "plan", forgets)
    with pytest.raises(BackendFaultError, match=r"\(context under a soft cap, .* its logits have no soft cap"):
        checked_backend(CPU, needs, library)


@pytest.mark.parametrize("layout", [GQA, LATENT], ids=["gqa", "latents"])
def test_an_lse_in_natural_log_is_refused_at_start(layout: KVLayout) -> None:
    needs = AttentionNeeds(torch.bfloat16, ((8, layout),))
    with pytest.raises(BackendFaultError, match="lse is a logarithm to base e, where 2 was expected") as caught:
        checked_backend(CPU, needs, fake_flashinfer(lse_base=math.e))
    assert 'Use backend "torch"' in str(caught.value)


@pytest.mark.parametrize("layout", [GQA, EXPANDED], ids=["gqa", "expanded latents"])
def test_a_causal_mask_aligned_to_the_first_key_is_refused_at_start(layout: KVLayout) -> None:
    needs = AttentionNeeds(torch.bfloat16, ((8, layout),))
    with pytest.raises(BackendFaultError, match="causal mask is aligned to the first key, not to the last"):
        checked_backend(CPU, needs, fake_flashinfer(causal="top-left"))


def test_any_other_mistake_is_refused_with_its_size() -> None:
    with pytest.raises(BackendFaultError, match=r"out differs by .* and lse by"):
        checked_backend(CPU, NEEDS, fake_flashinfer(lse_base=3.0))


def test_a_library_that_raises_is_refused_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_flashinfer()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("nvcc not found")

    monkeypatch.setattr(library.BatchPrefillWithPagedKVCacheWrapper, "plan", fail)
    with pytest.raises(BackendFaultError, match="it raised RuntimeError: nvcc not found"):
        checked_backend(CPU, NEEDS, library)


def test_the_check_does_not_pass_a_backend_of_ours_in_base_2() -> None:
    class Base2:
        name = "wrong"

        def plan(self, rows: AttentionRows) -> Any:
            planned = TorchBackend(CPU).plan(rows)

            class Planned:
                def run(self, *args: Any, **kwargs: Any) -> State:
                    out, lse = planned.run(*args, **kwargs)
                    return out, lse / math.log(2)

            return Planned()

    check_backend(TorchBackend(CPU), NEEDS, CPU)
    with pytest.raises(BackendFaultError, match="logarithm to base 2"):
        check_backend(Base2(), NEEDS, CPU)


# --- who gets it ---


@pytest.fixture
def some_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


HALF = AttentionNeeds(torch.bfloat16, ((32, KVLayout(8, 128, 128)),))


def test_on_cpu_it_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r'flashinfer" on cpu: .* Set backend to "torch", or "auto"'):
        make_backend("flashinfer", CPU, HALF)
    assert make_backend("auto", CPU, HALF).name == "torch"


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (replace(HALF, dtype=torch.float32), "with float32"),
        (AttentionNeeds(torch.float16, ((8, KVLayout(2, 80, 80)),)), "keys of 80 and values of 80"),
        (AttentionNeeds(torch.float16, ((8, KVLayout(1, 320, 256, True)),)), "keys of 320 and values of 256"),
    ],
)
def test_what_no_kernel_exists_for_is_refused_by_name(some_gpu: None, needs: AttentionNeeds, words: str) -> None:
    error = unfit(CUDA, needs)
    assert isinstance(error, UnsupportedError) and words in str(error) and "Set backend" in str(error)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "capability", "is_refused"),
    [
        (torch.bfloat16, torch.float8_e4m3fn, (9, 0), False),
        (torch.bfloat16, torch.float8_e4m3fn, (8, 0), True),
        (torch.bfloat16, torch.float8_e4m3fn, (10, 0), True),
        (torch.bfloat16, torch.float8_e5m2, (9, 0), True),
        (torch.float16, torch.float8_e4m3fn, (9, 0), True),
        (torch.float16, torch.float16, (8, 0), False),
    ],
    ids=str,
)
def test_latents_in_fp8_are_refused_where_no_kernel_widens_them(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    capability: tuple[int, int],
    is_refused: bool,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    latents = ((128, KVLayout(1, 576, 512, v_is_prefix_of_k=True)), (16, KVLayout(16, 192, 128)))
    needs = AttentionNeeds(dtype, latents, cache_dtype=cache_dtype)
    error = unfit(CUDA, needs)
    assert (error is not None) == is_refused
    if is_refused:
        assert isinstance(error, UnsupportedError) and "latents cached in float8" in str(error)
        with pytest.raises(UnsupportedError, match="Hopper"):
            check_choice("flashinfer", CUDA, needs)
        with pytest.warns(UserWarning, match="torch, which is slower on CUDA: latents cached in"):
            assert make_backend("auto", CUDA, needs).name == "torch"
    # Heads have kernels everywhere.
    assert unfit(CUDA, replace(HALF, dtype=dtype, cache_dtype=cache_dtype)) is None


@pytest.mark.parametrize(
    ("dtype", "capability", "is_refused"),
    [
        (torch.bfloat16, (7, 5), True),
        (torch.float16, (7, 5), False),
        (torch.float16, (7, 0), True),
        (torch.bfloat16, (10, 0), False),
    ],
    ids=str,
)
def test_gpus_that_are_too_old_are_refused_by_name(
    dtype: torch.dtype, capability: tuple[int, int], is_refused: bool
) -> None:
    error = refused(replace(HALF, dtype=dtype), capability, "Old GPU")
    assert (error is not None) == is_refused
    assert error is None or "Old GPU, compute capability 7." in str(error)


def test_known_shapes_want_the_package_alone(some_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = (128, KVLayout(1, 576, 512, v_is_prefix_of_k=True))
    for calls in (HALF.calls, (latent, (16, KVLayout(16, 192, 128))), ((8, KVLayout(1, 64, 64)),)):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        error = unfit(CUDA, AttentionNeeds(torch.bfloat16, calls))
        assert error is not None and not isinstance(error, UnsupportedError) and "cpinfer[flashinfer]" in str(error)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        assert unfit(CUDA, AttentionNeeds(torch.bfloat16, calls)) is None


def test_on_cuda_auto_takes_it_where_it_can_and_says_why_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device is needed to choose: the backends themselves are stand-ins."""
    module = "cpinfer.attention.backends.flashinfer.backend"
    monkeypatch.setattr(f"{module}.FlashInferBackend", lambda device, needs: ("flashinfer", device.type))
    monkeypatch.setattr(f"{module}.unfit", lambda device, needs: None)
    monkeypatch.setattr(f"{module}.check_flashinfer", lambda device, needs: None)
    assert make_backend("auto", CUDA, HALF) == make_backend("flashinfer", CUDA, HALF) == ("flashinfer", "cuda")
    assert make_backend("torch", CUDA, HALF).name == "torch"
    monkeypatch.setattr(f"{module}.unfit", lambda device, needs: UserError("it is not there."))
    with pytest.warns(UserWarning, match="torch, which is slower on CUDA: it is not there"):
        assert make_backend("auto", CUDA, HALF).name == "torch"
    with pytest.raises(UserError, match="it is not there"):
        make_backend("flashinfer", CUDA, HALF)


def test_what_is_needed_is_checked_once_per_process_and_anything_else_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "cpinfer.attention.backends.flashinfer.backend"
    checks: list[AttentionNeeds] = []
    monkeypatch.setattr(f"{module}.FlashInferBackend", lambda device, needs: ("flashinfer", device.type))
    monkeypatch.setattr(f"{module}.unfit", lambda device, needs: None)
    monkeypatch.setattr(f"{module}.check_backend", lambda backend, needs, device: checks.append(needs))
    check_flashinfer.cache_clear()
    other = replace(HALF, dtype=torch.float16)
    for needs in (HALF, HALF, other, HALF):
        make_backend("flashinfer", CUDA, needs)
    assert checks == [HALF, other]

    def fail(*_: Any) -> None:
        checks.append(HALF)
        raise BackendFaultError("wrong")

    check_flashinfer.cache_clear()
    monkeypatch.setattr(f"{module}.check_backend", fail)
    for _ in range(2):  # what failed is never taken for checked
        with pytest.raises(BackendFaultError, match="wrong"):
            make_backend("flashinfer", CUDA, HALF)
    assert len(checks) == 4
    check_flashinfer.cache_clear()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match='unknown backend "warp"'):
        check_choice("warp", CPU, HALF)
