"""Loads, stores, copies and atomics: what they move, and that an address is checked before it is touched."""

from __future__ import annotations

import numpy as np
import pytest

from interpreted_cuda import interpreter
from interpreted_cuda.build import compiler
from interpreted_cuda.interpreter import KernelFaultError
from interpreted_cuda.ptx_texts import kernel, of_each_thread, stored

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler, which builds the interpreter")

EACH_ITS_OWN = "mad.wide.u32 %rd1, %r0, 16, %rd1; mad.wide.u32 %rd0, %r0, 16, %rd0;"


def test_vectors_and_small_types_are_loaded_and_stored_whole() -> None:
    data = np.random.default_rng(0).integers(-(2**31), 2**31, 128, dtype=np.int32)
    body = f"{EACH_ITS_OWN} ld.global.nc.L1::no_allocate.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1];"
    swapped = stored(f"{body} st.global.v4.u32 [%rd0], {{%r4, %r3, %r2, %r1}};", data, out=np.zeros_like(data))
    np.testing.assert_array_equal(swapped.reshape(-1, 4), data.reshape(-1, 4)[:, ::-1])
    body = f"{EACH_ITS_OWN} ld.global.s8 %r1, [%rd1+3]; ld.global.u16 %r2, [%rd1+4];"
    mixed = stored(f"{body} st.global.v2.u32 [%rd0], {{%r1, %r2}};", data, out=np.zeros_like(data)).reshape(-1, 4)
    np.testing.assert_array_equal(mixed[:, 0], data.view(np.int8)[3::16])
    np.testing.assert_array_equal(mixed[:, 1], data.view(np.uint16)[2::8])


def test_registers_are_taken_apart_and_put_together() -> None:
    a = np.arange(32, dtype=np.uint64) * 0x0123456789AB
    text = ".reg .b32 lo, hi; mov.b64 {lo, hi}, a; mov.b64 d, {hi, lo};"
    np.testing.assert_array_equal(of_each_thread(text, a, out=np.uint64), (a >> 32) | (a << 32))
    text = ".reg .b16 h0, h1, h2; mov.b64 {h0, h1, _, h2}, a; mov.b32 d, {h1, h2};"
    halves = a.view(np.uint16).reshape(-1, 4).astype(np.uint32)
    np.testing.assert_array_equal(of_each_thread(text, a, out=np.uint32), halves[:, 1] | (halves[:, 3] << 16))


def test_shared_memory_is_of_the_block_and_fresh_for_each() -> None:
    """Static and dynamic; threads read what their neighbours wrote; what nobody wrote is 0xff."""
    body = """
    .shared .align 4 .b8 here[256];
    mov.u32 %r9, here; mov.u32 %r1, %ctaid.x; mul.lo.u32 %r2, %r0, 4;
    add.u32 %r3, %r9, %r2;
    setp.eq.u32 %p1, %r1, 0;
    add.u32 %r4, %r0, 100;
    @%p1 st.shared.u32 [%r3], %r4;
    bar.sync 0;
    xor.b32 %r5, %r2, 4; add.u32 %r5, %r5, %r9;
    ld.shared.u32 %r6, [%r5];
    mov.u32 %r7, dynamic; add.u32 %r7, %r7, %r2;
    st.shared.u32 [%r7], %r6; cvta.to.shared.u64 %rd2, %rd2; ld.shared.u32 %r8, [%r7];
    mad.lo.u32 %r10, %r1, 64, %r0; mad.wide.u32 %rd1, %r10, 4, %rd0;
    st.global.u32 [%rd1], %r8;
    """
    out = stored(
        body,
        out=np.zeros(128, np.uint32),
        grid=(2, 1, 1),
        block=(64, 1, 1),
        shared=256,
        module=".extern .shared .align 16 .b8 dynamic[];",
    )
    np.testing.assert_array_equal(out[:64], 100 + (np.arange(64) ^ 1))
    assert (out[64:] == 0xFFFFFFFF).all()


def test_local_memory_is_of_the_thread_and_has_an_address_of_all_memory() -> None:
    body = """
    .local .align 16 .b8 own[32];
    mov.u64 %rd2, own; st.local.u32 [%rd2+8], %r0;
    cvta.local.u64 %rd3, %rd2; ld.u32 %r1, [%rd3+8];
    cvta.to.local.u64 %rd4, %rd3; ld.local.u32 %r2, [%rd4+8];
    add.u32 %r3, %r1, %r2; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.u32 [%rd0], %r3;
    """
    np.testing.assert_array_equal(stored(body, out=np.zeros(32, np.uint32)), 2 * np.arange(32))


def test_parameters_are_read_by_name_and_offset_and_variables_keep_what_they_were_given() -> None:
    body = """
    ld.param.u64 %rd0, [x]; ld.param.u32 %r1, [pair+4]; ld.param.v2.u16 {%h1, %h2}, [pair]; cvt.u32.u16 %r2, %h2;
    mov.u64 %rd1, numbers; ld.global.u32 %r3, [%rd1+4]; ld.const.u8 %r4, [bytes+2];
    st.global.v4.u32 [%rd0], {%r1, %r2, %r3, %r4};
    """
    module = ".global .align 4 .u32 numbers[2] = {7, 11};\n.const .align 1 .b8 bytes[4] = {1, 2, 3};"
    text = kernel(body, ".u64 x", ".align 4 .b8 pair[8]", module=module)
    out = np.zeros(4, np.uint32)
    interpreter.run(text, out, np.array([(5 << 16) | 3, 9], np.uint32).view(np.uint64)[0], block=(1, 1, 1))
    assert out.tolist() == [9, 5, 11, 3]


def test_asynchronous_copies_fill_up_with_zeros() -> None:
    data = np.arange(1, 129, dtype=np.uint32)
    body = f"""
    .shared .align 16 .b8 here[512];
    {EACH_ITS_OWN} mov.u32 %r1, here; mad.lo.u32 %r2, %r0, 16, %r1;
    and.b32 %r3, %r0, 1; setp.eq.u32 %p1, %r3, 0; selp.b32 %r4, 16, 8, %p1;
    cp.async.cg.shared.global.L2::128B [%r2], [%rd1], 16, %r4;
    cp.async.commit_group; cp.async.wait_group 0;
    ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r2]; st.global.v4.u32 [%rd0], {{%r5, %r6, %r7, %r8}};
    """
    want = data.reshape(-1, 4).copy()
    want[1::2, 2:] = 0
    np.testing.assert_array_equal(stored(body, data, out=np.zeros_like(data)).reshape(-1, 4), want)


def test_atomics_add_up_over_blocks_and_give_what_was_there() -> None:
    for text, start, want in (
        ("atom.global.add.u32 %r1, [%rd0], %r0;", 5, 5 + 2 * sum(range(32))),
        ("red.global.max.s32 [%rd0], %r0;", 3, 31),
        ("atom.global.min.s32 %r1, [%rd0], -4;", 3, -4),
        ("atom.global.or.b32 %r1, [%rd0], %r0;", 0, 31),
        ("atom.global.exch.b32 %r1, [%rd0], 12;", 0, 12),
        ("atom.global.inc.u32 %r1, [%rd0], 9;", 0, 64 % 10),
        ("atom.global.cas.b32 %r1, [%rd0], 64, 65;", 64, 65),
    ):
        out = stored(text, out=np.array([start, 0], np.int32), grid=(2, 1, 1))
        assert out[0] == want, text
    body = "atom.global.add.u32 %r1, [%rd0], 1; mad.wide.u32 %rd1, %r1, 4, %rd0; st.global.u32 [%rd1+4], %r0;"
    out = stored(body, out=np.zeros(33, np.uint32))
    assert out[0] == 32 and sorted(out[1:]) == list(range(32))
    added = stored("cvt.rn.f32.u32 %f1, %r0; atom.global.add.f32 %f2, [%rd0], %f1;", out=np.zeros(1, "f4"))
    assert added[0] == sum(range(32))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("mad.wide.u32 %rd0, %r0, 4, %rd0; ld.global.u32 %r1, [%rd0];", r"read of 4 bytes.*outside.*thread 16, at `ld"),
        ("st.global.u32 [%rd0+-4], %r0;", "write of 4 bytes.*outside"),
        ("ld.global.u32 %r1, [%rd0+2];", "misaligned read"),
        ("mov.u64 %rd1, 0; ld.u32 %r1, [%rd1];", "outside of the memory of the call"),
        # the last addresses there are, whose ends are address 0
        ("mov.s64 %rd1, -16; ld.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];", "read of 16 bytes.*outside"),
        ("mov.s64 %rd1, -1; st.global.u8 [%rd1], %r0;", "write of 1 bytes.*outside"),
        ("mov.u32 %r1, 64; st.shared.u32 [%r1], %r0;", "of 0 bytes of shared memory"),
        (".shared .align 4 .b8 s[8]; mov.u32 %r1, s; ld.shared.v2.u32 {%r2, %r3}, [%r1+4];", "at 4 of 8|misaligned"),
        (".local .align 4 .b8 own[4]; mov.u64 %rd1, own; ld.local.u32 %r1, [%rd1+4];", "of 4 bytes of local memory"),
    ],
)
def test_what_lies_outside_is_not_touched_and_the_thread_is_named(body: str, said: str) -> None:
    with pytest.raises(KernelFaultError, match=said) as caught:
        stored(body, out=np.zeros(16, np.uint32))
    assert "tried" in str(caught.value)
    # and memory that was given to one call is not the next one's
    stored("st.global.u32 [%rd0], %r0;", out=np.zeros(16, np.uint32))
