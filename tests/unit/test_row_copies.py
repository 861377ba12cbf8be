"""Rows are copied from where they are told to where they are told, and nothing else changes; in Triton as in torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from cpinfer.ops.row_copies import copy_rows
from triton_runs import output_of


def test_each_place_gets_the_row_it_is_told_and_no_other_changes() -> None:
    src, dst = torch.randn(5, 2, 3), torch.zeros(6, 2, 3)
    copy_rows([(src, dst)], torch.tensor([4, 0, 2]), torch.tensor([1, 5, 0]))
    assert torch.equal(dst[[1, 5, 0]], src[[4, 0, 2]])
    assert (dst[[2, 3, 4]] == 0).all()


@pytest.mark.parametrize("src_rows", [None, [1, 2]], ids=["all", "some"])
@pytest.mark.parametrize("dst_rows", [None, [3, 0]], ids=["front", "places"])
def test_without_places_it_is_the_first_rows(src_rows: list[int] | None, dst_rows: list[int] | None) -> None:
    src, dst = torch.randn(2 if src_rows is None else 4, 2, 3), torch.zeros(4, 2, 3)
    copy_rows([(src, dst)], *(None if rows is None else torch.tensor(rows) for rows in (src_rows, dst_rows)))
    assert torch.equal(dst[dst_rows or [0, 1]], src[src_rows or [0, 1]])


def test_two_copies_share_their_rows_and_go_into_columns_of_one_buffer() -> None:
    k, v, buffer = torch.randn(3, 2, 4), torch.randn(3, 2, 2), torch.zeros(5, 2, 6)
    copy_rows([(k, buffer[..., :4]), (v, buffer[..., 4:])], None, torch.tensor([4, 1, 0]))
    assert torch.equal(buffer[[4, 1, 0]], torch.cat([k, v], dim=-1))


def test_values_take_the_dtype_of_where_they_go() -> None:
    src, dst = torch.randn(3, 1, 4), torch.zeros(3, 1, 4, dtype=torch.bfloat16)
    copy_rows([(src, dst)], None, torch.arange(3))
    assert torch.equal(dst, src.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_rows_go_into_fp8_out_of_it_and_within_it(dtype: torch.dtype) -> None:
    src, rows = torch.randn(3, 1, 4), torch.tensor([2, 0])
    kept, moved, read = (torch.zeros(3, 1, 4, dtype=to) for to in (dtype, dtype, torch.float32))
    copy_rows([(src, kept)], None, torch.arange(3))
    copy_rows([(kept, moved)], rows, torch.tensor([1, 2]))
    copy_rows([(moved, read)], torch.tensor([1, 2]), None)
    assert torch.equal(kept.float(), src.to(dtype).float())
    assert torch.equal(read[:2], src[rows].to(dtype).float())


CASES = """
import json
import torch
from cpinfer.ops import copy_kernels, row_copies

generator = torch.Generator().manual_seed(0)
same = 0
for dtype in (torch.float32, torch.bfloat16, torch.uint8):
    for K, D, V in ((2, 8, 8), (3, 12, 5), (1, 16, None)):
        src = (100 * torch.rand(6, K, D + (V or 0), generator=generator)).to(dtype)
        heads_first = src.transpose(0, 1).contiguous().transpose(0, 1)
        for given in (src, heads_first):
            for src_rows in (None, torch.tensor([5, 0, 3])):
                for dst_rows in (None, torch.tensor([7, 2, 4])):
                    parts = [given[..., :D]] + ([given[..., D:]] if V else [])
                    if src_rows is None and dst_rows is not None:
                        parts = [part[:3] for part in parts]
                    ours, theirs = (
                        [torch.zeros(9, K + 1, part.shape[-1] + 2, dtype=dtype)[:, 1:, 1:-1] for part in parts]
                        for _ in range(2)
                    )
                    copy_kernels.copy_rows(list(zip(parts, ours)), src_rows, dst_rows)
                    row_copies.copy_rows(list(zip(parts, theirs)), src_rows, dst_rows)
                    same += all(torch.equal(a, b) and a.any() for a, b in zip(ours, theirs))
copy_kernels.copy_rows([(src, src)], torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
print(json.dumps(same))
"""

COMPILED = """
import json
from cpinfer.ops import copy_kernels as kernels
from triton_runs import compiled

pointers = dict.fromkeys(("src_a", "dst_a", "src_b", "dst_b"), "*bf16") | {"src_rows": "*i64", "dst_rows": "*i64"}
shape = {"BLOCK_K": 8, "BLOCK_D": 128}
for has in (True, False):
    constants = {"HAS_SECOND": has, "HAS_SRC_ROWS": has, "HAS_DST_ROWS": has, **shape}
    assert compiled(kernels._copy, pointers, constants, num_warps=4).asm["cubin"]
print(json.dumps(True))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_equals_its_definition_and_compiles_for_a_gpu(tmp_path: Path) -> None:
    assert output_of(CASES, TRITON_INTERPRET="1") == 3 * 3 * 2 * 4
    assert output_of(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) is True
