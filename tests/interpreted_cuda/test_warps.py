"""Branches, barriers, and what the lanes of a warp do together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from interpreted_cuda.build import compiler
from interpreted_cuda.interpreter import KernelFaultError
from interpreted_cuda.ptx_texts import of_each_thread, stored

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler, which builds the interpreter")

LANES = np.arange(32, dtype=np.uint32)


def test_lanes_that_part_meet_again_behind_the_branch() -> None:
    """A loop that each leaves after another number of rounds, a choice, and a shuffle that wants all of them."""
    text = """
    .reg .b32 n; mov.u32 n, 0;
    L_again: setp.ge.u32 p, n, a; @p bra L_out; add.u32 n, n, 1; add.u32 d, d, n; bra L_again;
    L_out: and.b32 n, a, 1; setp.eq.u32 p, n, 0; @p bra L_even; mul.lo.u32 d, d, 2; bra.uni L_end;
    L_even: add.u32 d, d, 1000;
    L_end: shfl.sync.bfly.b32 d, d, 1, 31, -1;
    """
    sums = LANES * (LANES + 1) // 2
    want = np.where(LANES % 2 == 0, sums + 1000, sums * 2)
    np.testing.assert_array_equal(of_each_thread(text, LANES, out=np.uint32), want[LANES ^ 1])


def test_jumps_through_a_table() -> None:
    text = """
    and.b32 d, a, 3; ts: .branchtargets L_0, L_1, L_2, L_2;
    brx.idx d, ts;
    L_0: mov.u32 d, 10; bra L_end; L_1: mov.u32 d, 11; bra L_end; L_2: add.u32 d, a, 50;
    L_end:
    """
    want = np.where(LANES % 4 == 0, 10, np.where(LANES % 4 == 1, 11, LANES + 50))
    np.testing.assert_array_equal(of_each_thread(text, LANES, out=np.uint32), want)


def test_lanes_that_have_ended_are_not_waited_for() -> None:
    text = "setp.gt.u32 p, a, 20; @p exit; activemask.b32 d; vote.sync.ballot.b32 d, p, -1;"
    assert (of_each_thread(text, LANES, out=np.uint32) == 0).all()
    text = "setp.gt.u32 p, a, 20; @p exit; activemask.b32 d;"
    np.testing.assert_array_equal(of_each_thread(text, LANES, out=np.uint32), np.where(LANES > 20, 0, 2**21 - 1))


def test_shuffles_stay_in_their_segments() -> None:
    a = LANES * 7
    for text, source in (
        ("shfl.sync.bfly.b32 d|p, a, 16, 31, -1;", LANES ^ 16),
        ("shfl.sync.up.b32 d|p, a, 3, 0, -1;", np.where(LANES < 3, LANES, LANES - 3)),
        ("shfl.sync.down.b32 d|p, a, 5, 31, -1;", np.where(LANES > 26, LANES, LANES + 5)),
        ("shfl.sync.idx.b32 d|p, a, 2, 0x181f, -1;", LANES // 8 * 8 + 2),
        ("shfl.sync.down.b32 d|p, a, 2, 0x1c1f, -1;", np.where(LANES % 4 > 1, LANES, LANES + 2)),
    ):
        np.testing.assert_array_equal(of_each_thread(text, a, out=np.uint32), a[source], err_msg=text)
    text = "shfl.sync.down.b32 d|p, a, 5, 31, -1; selp.u32 d, 1, 0, p;"
    np.testing.assert_array_equal(of_each_thread(text, a, out=np.uint32), LANES <= 26)


def test_votes_and_reductions() -> None:
    a = (LANES * 37 + 11) % 64
    bits = int(sum(1 << int(lane) for lane in LANES[a > 30]))
    for text, want in (
        ("setp.gt.u32 p, a, 30; vote.sync.ballot.b32 d, p, -1;", bits),
        ("setp.gt.u32 p, a, 30; vote.sync.ballot.b32 d, !p, -1;", 2**32 - 1 - bits),
        ("setp.gt.u32 p, a, 30; vote.sync.any.pred q, p, -1; selp.u32 d, 1, 0, q;", 1),
        ("setp.gt.u32 p, a, 30; vote.sync.all.pred q, p, -1; selp.u32 d, 1, 0, q;", 0),
        ("setp.lt.u32 p, a, 99; vote.sync.uni.pred q, p, -1; selp.u32 d, 1, 0, q;", 1),
        ("redux.sync.add.u32 d, a, -1;", a.sum()),
        ("redux.sync.min.s32 d, a, -1;", a.min()),
        ("redux.sync.or.b32 d, a, -1;", np.bitwise_or.reduce(a)),
    ):
        assert set(of_each_thread(text, a, out=np.uint32).tolist()) == {int(want)}, text


def test_blocks_and_threads_are_numbered_in_three_dimensions() -> None:
    body = """
    mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ntid.x; mov.u32 %r4, %ntid.y;
    mad.lo.u32 %r5, %r2, %r4, %r1; mad.lo.u32 %r5, %r5, %r3, %r0;
    mov.u32 %r6, %ctaid.z; mov.u32 %r7, %nctaid.y; mov.u32 %r8, %ctaid.y; mad.lo.u32 %r6, %r6, %r7, %r8;
    mov.u32 %r7, %nctaid.x; mov.u32 %r8, %ctaid.x; mad.lo.u32 %r6, %r6, %r7, %r8;
    mad.lo.u32 %r9, %r6, 60, %r5; mad.wide.u32 %rd0, %r9, 4, %rd0; st.global.u32 [%rd0], %r9;
    """
    out = stored(body, out=np.zeros(60 * 24, np.uint32), grid=(2, 3, 4), block=(3, 4, 5))
    np.testing.assert_array_equal(out, np.arange(60 * 24))


def test_named_barriers_open_for_as_many_as_they_say() -> None:
    """Of three warps two meet at barrier 1, and the third passes by."""
    body = """
    .shared .align 4 .b8 s[4]; mov.u32 %r1, s; shr.u32 %r2, %r0, 5;
    setp.eq.u32 %p1, %r2, 2; @%p1 bra L_end;
    setp.eq.u32 %p2, %r0, 63; @%p2 st.shared.u32 [%r1], 77;
    bar.sync 1, 64;
    ld.shared.u32 %r3, [%r1]; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.u32 [%rd0], %r3;
    L_end:
    """
    out = stored(body, out=np.zeros(96, np.uint32), block=(96, 1, 1))
    assert (out[:64] == 77).all() and (out[64:] == 0).all()


def test_a_cooperative_grid_waits_for_all_its_blocks() -> None:
    """Block 1 writes what block 0 spins for."""
    body = """
    mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; @%p1 bra L_write;
    L_spin: ld.acquire.gpu.global.u32 %r2, [%rd0]; setp.eq.u32 %p2, %r2, 0; @%p2 bra L_spin;
    st.global.u32 [%rd0+4], 5; bra L_end;
    L_write: st.release.gpu.global.u32 [%rd0], 3;
    L_end:
    """
    out = stored(body, out=np.zeros(2, np.uint32), grid=(2, 1, 1), cooperative=True)
    assert out.tolist() == [3, 5]


# --- matrices


def halves_of(matrix: torch.Tensor) -> NDArray[np.uint16]:
    return matrix.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_dealt_to_lanes_and_put_back(count: int, transposed: bool) -> None:
    matrices = np.random.default_rng(0).integers(0, 2**16, (count, 8, 8)).astype(np.uint16)
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    trans = ".trans" if transposed else ""
    body = f"""
    .shared .align 16 .b8 s[512]; .shared .align 16 .b8 t[512]; mov.u32 %r1, s; mov.u32 %r9, t;
    mul.lo.u32 %r2, %r0, 16; cvt.u64.u32 %rd3, %r2; add.s64 %rd4, %rd1, %rd3;
    setp.lt.u32 %p1, %r0, {8 * count};
    @%p1 ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd4];
    add.u32 %r3, %r1, %r2; add.u32 %r8, %r9, %r2;
    @%p1 st.shared.v4.u32 [%r3], {{%r4, %r5, %r6, %r7}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r3];
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r8], {{{registers}}};
    bar.sync 0;
    add.s64 %rd5, %rd0, %rd3;
    @%p1 ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r8];
    @%p1 st.global.v4.u32 [%rd5], {{%r4, %r5, %r6, %r7}};
    mad.wide.u32 %rd6, %r0, 4, %rd2; st.global.u32 [%rd6], %r20;
    """
    dealt = np.zeros(32, np.uint32)
    back = stored(body, matrices, dealt, out=np.zeros_like(matrices))
    np.testing.assert_array_equal(back, matrices)
    first = (matrices[0].T if transposed else matrices[0]).astype(np.uint32)
    lane = np.arange(32)
    want = first[lane // 4, 2 * (lane % 4)] | (first[lane // 4, 2 * (lane % 4) + 1] << 16)
    np.testing.assert_array_equal(dealt, want)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("k", [8, 16])
def test_products_of_matrices_are_exact_up_to_the_order_of_sums(k: int, kind: str) -> None:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randn(n, k, generator=generator).to(dtype) for n in (16, 8))  # b by columns
    c = torch.randn(16, 8, generator=generator)
    num_a, num_b = k // 4, k // 8
    # Pairs of neighbours in k: row lane / 4, and which pair the lane has.
    body = "mov.u32 %r1, %laneid; shr.u32 %r2, %r1, 2; and.b32 %r3, %r1, 3;\n"
    for r in range(num_a):
        body += f"add.u32 %r4, %r2, {r % 2 * 8}; mad.lo.u32 %r4, %r4, {k // 2}, %r3; add.u32 %r4, %r4, {r // 2 * 4};"
        body += f"mad.wide.u32 %rd5, %r4, 4, %rd1; ld.global.u32 %r{10 + r}, [%rd5];\n"
    for r in range(num_b):
        body += f"mad.lo.u32 %r4, %r2, {k // 2}, %r3; add.u32 %r4, %r4, {4 * r};"
        body += f"mad.wide.u32 %rd5, %r4, 4, %rd2; ld.global.u32 %r{20 + r}, [%rd5];\n"
    body += "mad.lo.u32 %r4, %r2, 4, %r3; mad.wide.u32 %rd6, %r4, 8, %rd3; mad.wide.u32 %rd7, %r4, 8, %rd0;\n"
    body += "ld.global.v2.f32 {%f1, %f2}, [%rd6]; ld.global.v2.f32 {%f3, %f4}, [%rd6+256];\n"
    a_registers = ", ".join(f"%r{10 + r}" for r in range(num_a))
    b_registers = ", ".join(f"%r{20 + r}" for r in range(num_b))
    body += f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%f1, %f2, %f3, %f4}}, {{{a_registers}}}, "
    body += f"{{{b_registers}}}, {{%f1, %f2, %f3, %f4}};\n"
    body += "st.global.v2.f32 [%rd7], {%f1, %f2}; st.global.v2.f32 [%rd7+256], {%f3, %f4};"
    found = stored(body, halves_of(a), halves_of(b), c.numpy(), out=np.zeros((16, 8), "f4"))
    want = c.double() + a.double() @ b.double().T
    torch.testing.assert_close(torch.from_numpy(found).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("setp.lt.u32 %p1, %r0, 16; @%p1 bra L; bar.sync 0; L: bar.sync 1; bar.sync 0;", "threads that never come"),
        ("bar.sync 0, 64;", "threads that never come; .*at `bar.sync 0, 64`"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 bra L; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; L: bar.sync 0;", "never come"),
        ("setp.eq.u32 %p1, %r0, 5; @%p1 trap;", "it trapped; .*thread 5"),
        (
            "setp.lt.u32 %p1, %r0, 16; @%p1 exit; mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
            "{%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r3}, {%f1, %f2, %f3, %f4};",
            "not all lanes of the warp",
        ),
    ],
)
def test_threads_that_would_wait_for_ever_end_the_kernel_by_name(body: str, said: str) -> None:
    with pytest.raises(KernelFaultError, match=said):
        stored(body, out=np.zeros(1, np.uint32))
