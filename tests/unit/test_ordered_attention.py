"""Attention in one order: right, and of a query the same bits in any company and wherever its keys lie."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cpinfer.ops.ordered_attention as ordered_attention
from cpinfer.errors import UserError
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.shards import KVSharding
from cpinfer.ops.attention import dense_attention
from cpinfer.ops.cpu_kernels import compiling
from cpinfer.ops.ordered_attention import OrderedAttention, merge_ordered
from cpinfer.ops.states import State
from torch_threads import torch_threads

SCALE = 0.1
SHARDS, INTERLEAVE = 8, 4


def tensors(T: int, S: int, K: int, G: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q `[T, K * G, D]`, k `[S, K, D]`, v `[S, K, V]`."""
    draw = torch.Generator().manual_seed(1000 * T + S)
    shapes = [(T, K * G, D), (S, K, D), (S, K, V)]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def causal(num_queries: int, num_keys: int, window: int | None = None, slots: Any = None) -> AttentionRows:
    """One row over keys in order, or at `slots`."""
    table = range(num_keys) if slots is None else slots
    rows = AttentionRows.build([num_queries], [num_keys], [list(table)], block_size=1, causal=True)
    return rows if window is None else rows.within(window)


def attend(rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, shards: int = SHARDS, **more: Any) -> State:
    return OrderedAttention(rows, shards, INTERLEAVE).run(q, k, v, scale=SCALE, **more)


def same(a: State, b: State) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize(("shards", "interleave"), [(8, 4), (8, 16), (1, 1), (4, 3), (64, 1)])
@pytest.mark.parametrize(
    ("shape", "window", "soft_cap"),
    [
        ((7, 7, 2, 4, 64, 64), None, None),
        ((100, 300, 1, 8, 128, 128), None, None),
        ((33, 333, 2, 1, 16, 16), 20, None),
        ((64, 64, 1, 3, 24, 40), None, 2.0),
        ((300, 700, 2, 2, 96, 80), 100, 5.0),
        ((5, 200, 1, 16, 576, 512), None, None),
        ((1, 1, 1, 1, 8, 8), None, None),
    ],
)
def test_it_is_attention(shape: Any, window: int | None, soft_cap: float | None, shards: int, interleave: int) -> None:
    T, S, _, _, D, _ = shape
    q, k, v = tensors(*shape)
    planned = OrderedAttention(causal(T, S, window), shards, interleave)
    out, lse = planned.run(q, k, v, scale=D**-0.5, soft_cap=soft_cap)
    expected, expected_lse = dense_attention(
        q.double(), k.double(), v.double(), scale=D**-0.5, causal=True, window=window, soft_cap=soft_cap
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_keys_are_read_as_they_are_stored(dtype: torch.dtype) -> None:
    q, k, v = tensors(20, 90, 2, 3, 32, 32)
    found = attend(causal(20, 90), q, k.to(dtype), v.to(dtype))
    assert same(found, attend(causal(20, 90), q, k.to(dtype).float(), v.to(dtype).float()))


def test_a_query_has_the_same_bits_alone_and_in_any_company() -> None:
    q, k, v = tensors(700, 700, 2, 4, 64, 64)
    whole = attend(causal(700, 700), q, k, v)
    for first, last in [(0, 1), (0, 100), (99, 131), (255, 256), (300, 700), (699, 700)]:
        part = attend(causal(last - first, last), q[first:last], k, v)
        assert same(part, (whole[0][first:last], whole[1][first:last])), (first, last)
    # As decode has it: single queries of several sequences, whose keys are all that there are.
    at = [3, 40, 333, 650, 0]
    rows = AttentionRows.build(
        [1] * 5, [p + 1 for p in at], [list(range(p + 1)) for p in at], block_size=1, causal=False
    )
    assert same(attend(rows, q[at], k, v), (whole[0][at], whole[1][at]))


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("window", [None, 5])
def test_faults_of_keys_reach_the_queries_that_see_them_alone(window: int | None, group: int) -> None:
    q, k, v = tensors(70, 70, 2, group, 32, 32)
    out, lse = attend(causal(70, 70, window), q, k, v)
    sound_k, at = k.clone(), 50
    k[at], v[at] = torch.nan, torch.inf
    faulty_out, faulty_lse = attend(causal(70, 70, window), q, k, v)
    sees = torch.arange(70) >= at if window is None else (torch.arange(70) >= at) & (torch.arange(70) < at + window)
    assert same((faulty_out[~sees], faulty_lse[~sees]), (out[~sees], lse[~sees]))
    assert faulty_out[sees].isnan().all() and faulty_lse[sees].isnan().all()
    only_values = attend(causal(70, 70, window), q, sound_k, v)
    assert same((only_values[0][~sees], only_values[1]), (out[~sees], lse))
    assert not torch.isfinite(only_values[0][sees]).any()


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_a_window_leaves_the_same_bits_wherever_the_table_begins(window: int) -> None:
    q, k, v = tensors(300, 300, 1, 2, 32, 32)
    whole = attend(causal(300, 300, window), q, k, v)
    for first, last in [(0, 1), (70, 200), (299, 300)]:
        rows = causal(last - first, last, window)
        assert first < window or rows.places_of_tables[0] == first - window + 1, "keys that nobody sees are not there"
        assert same(attend(rows, q[first:last], k, v), (whole[0][first:last], whole[1][first:last]))


def test_where_keys_lie_changes_nothing() -> None:
    q, k, v = tensors(50, 200, 2, 2, 40, 24)
    expected = attend(causal(50, 200), q, k, v)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:200]
    far_k, far_v = torch.full((300, 2, 40), torch.nan), torch.full((300, 2, 24), torch.nan)
    far_k[order], far_v[order] = k, v
    assert same(attend(causal(50, 200, slots=order.tolist()), q, far_k, far_v), expected)
    # Heads before slots, keys and values in one buffer, pages of seven.
    both = torch.cat([k, v], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
    assert same(attend(causal(50, 200), q, both[..., :40], both[..., 40:]), expected)
    paged_k, paged_v = torch.full((30 * 7, 2, 40), torch.nan), torch.full((30 * 7, 2, 24), torch.nan)
    pages = np.random.default_rng(0).permutation(30)[:29]
    slots = (pages[:, None] * 7 + np.arange(7)).ravel()[:200]
    paged_k[slots], paged_v[slots] = k, v
    rows = AttentionRows.build([50], [200], [pages.tolist()], block_size=7, causal=True)
    assert same(attend(rows, q, paged_k, paged_v), expected)


@pytest.mark.parametrize("dcp_size", [1, 2, 4, 8])
def test_shards_hold_virtual_shards_whose_states_are_those_of_the_whole(dcp_size: int) -> None:
    q, k, v = tensors(1, 333, 2, 4, 64, 64)
    expected = attend(causal(1, 333), q, k, v)
    sharding = KVSharding(dcp_size, INTERLEAVE, block_size=1)
    states = []
    for shard in range(dcp_size):
        held = sharding.positions(333, shard)
        rows = AttentionRows.build([1], [len(held)], [list(range(len(held)))], block_size=1, causal=False)
        planned = OrderedAttention(rows, SHARDS // dcp_size, INTERLEAVE)
        states.append(planned.states(q, k[held], v[held], scale=SCALE))
    in_order = [(shard, i) for i in range(SHARDS // dcp_size) for shard in range(dcp_size)]
    outs = torch.stack([states[shard][0][:, :, i] for shard, i in in_order])
    lses = torch.stack([states[shard][1][:, :, i] for shard, i in in_order])
    assert same(merge_ordered(outs, lses), expected)
    assert not same(merge_ordered(outs.flip(0), lses.flip(0)), expected), "the order of merging shows"


def test_threads_change_nothing() -> None:
    q, k, v = tensors(200, 500, 4, 2, 32, 32)
    found = []
    for num_threads in (1, 2, 3):
        with torch_threads(num_threads):
            found.append(attend(causal(200, 500), q, k, v))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_rows_without_keys_are_the_state_of_none_and_faults_come_through() -> None:
    q, k, v = tensors(3, 10, 1, 2, 16, 16)
    rows = AttentionRows.build([1, 1, 1], [0, 10, 1], [[], list(range(10)), [0]], block_size=1, causal=False)
    out, lse = attend(rows, q, k, v)
    assert not out[0].any() and (lse[0] == -torch.inf).all() and torch.isfinite(lse[1:]).all()
    k[5, 0, 3] = torch.nan
    out, lse = attend(rows, q, k, v)
    assert out[1].isnan().all() and lse[1].isnan().all() and torch.isfinite(out[2]).all()
    assert merge_ordered(torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf))[1].tolist() == [-torch.inf] * 3


def test_large_logits_neither_overflow_nor_vanish() -> None:
    q, k, v = tensors(40, 200, 1, 1, 16, 16)
    found = attend(causal(40, 200), 200 * q, k, v)
    expected = dense_attention(200 * q.double(), k.double(), v.double(), scale=SCALE, causal=True)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=1e-3)
    assert torch.isfinite(found[1]).all()


@pytest.fixture
def change_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A pattern and what stands for it from now on in the kernel that runs."""

    def change(pattern: str, other: str) -> None:
        folder = Path(compiling.__file__).parent
        source = (folder / "ordered_attention.cpp").read_text()
        source = source.replace('#include "lanes.h"', (folder / "lanes.h").read_text())
        changed, num = re.subn(pattern, other, source)
        assert num and changed != source
        file, library = tmp_path / "other.cpp", tmp_path / "other.so"
        file.write_text(changed)
        subprocess.run(["c++", *compiling.FLAGS, str(file), "-o", str(library)], check=True, timeout=100)
        monkeypatch.setattr(ordered_attention, "compiled", lambda _: ctypes.CDLL(str(library)))

    return change


@pytest.mark.parametrize("registers", ["LANES = 4, HELD = 2", "LANES = 8, HELD = 2"])
def test_processors_of_other_registers_have_the_same_bits(registers: str, change_source: Any) -> None:
    rows = AttentionRows.build([200, 1], [500, 70], [[*range(500)], [*range(70)]], block_size=1, causal=True).within(
        300
    )
    q, k, v = tensors(201, 500, 2, 3, 40, 72, torch.bfloat16)
    expected = attend(rows, q, k, v, soft_cap=3.0)
    change_source(r"LANES = \d+, HELD = \d+", registers)
    assert same(attend(rows, q, k, v, soft_cap=3.0), expected)
    # Few queries may be multiplied where keys lie, many by keys laid out; compilers fuse what they like.
    for num_heads in (1, 2, 3, 4, 5):
        q, k, v = tensors(300, 300, 1, num_heads, 64, 64)
        alone, in_company = attend(causal(1, 300), q[-1:], k, v), attend(causal(300, 300), q, k, v)
        assert all(torch.equal(one[0], many[-1]) for one, many in zip(alone, in_company, strict=True)), num_heads


def test_a_tile_of_another_width_is_other_bits(change_source: Any) -> None:
    """So the tests above can fail."""
    q, k, v = tensors(200, 500, 1, 2, 64, 64)
    expected = attend(causal(200, 500), q, k, v, shards=1)
    change_source("TILE = 64", "TILE = 128")
    found = attend(causal(200, 500), q, k, v, shards=1)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert not torch.equal(found[0], expected[0])


class TestCompiling:
    """Kernels are compiled once, by whoever comes first, and what is wrong is said."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        compiling.compiled.cache_clear()
        yield tmp_path / "cpinfer_kernels"
        compiling.compiled.cache_clear()

    def test_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiling.compiled("ordered_attention")
        (made,) = folder.glob("*.so")
        before = made.stat().st_mtime_ns
        compiling.compiled.cache_clear()
        compiling.compiled("ordered_attention")
        assert [made] == list(folder.glob("*.so")) and made.stat().st_mtime_ns == before
        compiling.compiled.cache_clear()
        monkeypatch.setattr(compiling, "FLAGS", (*compiling.FLAGS, "-g0"))
        compiling.compiled("ordered_attention")
        assert len(list(folder.glob("*.so"))) == 2, "other flags are another library"

    def test_of_many_at_once_one_compiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compile_it, made = compiling._compile, []

        def slowly(*given: Any) -> None:
            made.append(given)
            time.sleep(0.5)
            compile_it(*given)

        monkeypatch.setattr(compiling, "_compile", slowly)
        threads = [Thread(target=compiling.compiled.__wrapped__, args=("ordered_attention",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=100)
        assert len(made) == 1

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(UserError, match=r"no C\+\+ compiler was found .* Install g\+\+"):
            compiling.compiled("ordered_attention")

    def test_a_compiler_that_does_not_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "c++").write_text("no program")
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match=r"c\+\+ does not run: .*Exec format error.* take it out of PATH"):
            compiling.compiled("ordered_attention")

    def test_a_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setattr(compiling, "FLAGS", (*compiling.FLAGS, "-fno-such-flag"))
        with pytest.raises(UserError, match=r"(?s)ordered_attention.cpp could not be compiled: .*no-such-flag"):
            compiling.compiled("ordered_attention")
        assert list(folder.glob("*.so")) == []

    def test_a_folder_that_cannot_be(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
        with pytest.raises(UserError, match="TORCH_HOME"):
            compiling.compiled("ordered_attention")

    def test_a_folder_that_may_not_be_looked_into(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def may_not(path: Path) -> bool:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "exists", may_not)
        monkeypatch.setattr(compiling, "_processor", lambda: "any")
        with pytest.raises(UserError, match=r"Permission denied: .*TORCH_HOME"):
            compiling.compiled("ordered_attention")

    def test_a_library_that_cannot_be_loaded(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        monkeypatch.setattr(compiling, "_compile", lambda _compiler, _source, library: library.write_bytes(b""))
        with pytest.raises(UserError, match=r"not loaded from there: .*TORCH_HOME"):
            compiling.compiled("ordered_attention")

    def test_a_user_without_a_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it is where nobody knows of a home
        with pytest.raises(UserError, match=r"has no home.* TORCH_HOME"):
            compiling.compiled("ordered_attention")

    def test_every_process_names_a_library_alike(self) -> None:
        told = "from cpinfer.ops.cpu_kernels import compiling; print(compiling._processor())"
        found = set()
        for seed in range(3):  # of the order in which a process goes through a set
            env = {**os.environ, "PYTHONHASHSEED": str(seed)}
            found.add(subprocess.run([sys.executable, "-c", told], env=env, capture_output=True, check=True).stdout)
        assert len(found) == 1
