"""What the interpreter does not know is an error that names the instruction, also where it would not have run."""

from __future__ import annotations

import numpy as np
import pytest

from interpreted_cuda import interpreter
from interpreted_cuda.build import compiler
from interpreted_cuda.interpreter import KernelFaultError
from interpreted_cuda.ptx_texts import kernel

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler, which builds the interpreter")

UNKNOWN = [
    "wgmma.fence.sync.aligned;",
    "dp4a.u32.u32 %r1, %r2, %r3, %r4;",
    "add.cc.u32 %r1, %r2, %r3;",
    "add.rz.f32 %f1, %f2, %f3;",
    "add.sat.s32 %r1, %r2, %r3;",
    "fma.rn.relu.f16 %h1, %h2, %h3, %h4;",
    "mul24.lo.u32 %r1, %r2, %r3;",
    "min.xorsign.abs.f32 %f1, %f2, %f3;",
    "prmt.b32.f4e %r1, %r2, %r3, %r4;",
    "cvt.rn.relu.bf16.f32 %h1, %f1;",
    "cvt.rp.f16.f32 %h1, %f1;",
    "cvt.rn.tf32.f32 %r1, %f1;",
    "cvt.rn.e4m3x2.f32 %h1, %f1, %f2;",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1, %f2}, {%r1, %r2}, {%r5, %r6}, {%f1, %f2};",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1, %r2}, {%r3, %r4}, {%r5, %r6}, {%r1, %r2};",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 16, [%r2];",
    "ld.shared::cluster.u32 %r1, [%r2];",
    "bar.arrive 0, 64;",
    "barrier.cluster.arrive;",
    "shfl.down.b32 %r1, %r2, 1, 31;",
    "atom.global.add.f16x2 %r1, [%rd1], %r2;",
    "atom.global.max.f32 %f1, [%rd1], %f2;",
    "tex.2d.v4.f32.s32 {%f1,%f2,%f3,%f4}, [t, {%r1, %r2}];",
    "call (r), function, (x);",
    "mov.u32 %r1, %clusterid.x;",
    "mov.u32 %r1, %nowhere;",
    "mov.u64 %rd1, nothing;",
    "ld.global.u32 %r1, [nothing];",
    "add.u32 %r1, %r2;",
    "@%p99 exit;",
    "bra nowhere;",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_not_known_is_an_error_with_its_text_even_where_it_would_not_run(text: str) -> None:
    source = kernel(f"mov.pred %p1, 0; @%p1 bra L_it; ret;\nL_it: {text}", ".u64 x")
    with pytest.raises(KernelFaultError) as caught:
        interpreter.run(source, np.zeros(4, np.uint32))
    what = str(caught.value)
    named = text.rstrip(";").split()[-1] if text.startswith("bra") else text.rstrip(";").removeprefix("@%p99 ")
    assert named in what or "no predicate %p99" in what, what
    assert "tried" in what


def test_a_text_that_is_no_module_is_an_error() -> None:
    with pytest.raises(KernelFaultError, match="surfref"):
        interpreter.run(".version 8.0\n.target sm_80\n.global .surfref s;\n" + kernel("ret;"), np.zeros(1))
    with pytest.raises(KernelFaultError, match="one kernel was wanted"):
        interpreter.run(".version 8.0\n.target sm_80\n", np.zeros(1))
    with pytest.raises(KernelFaultError, match="threads"):
        interpreter.run(kernel("ret;"), block=(2048, 1, 1))


def test_what_has_no_effect_on_memory_of_one_piece_is_passed_over() -> None:
    text = "membar.gl; fence.acq_rel.gpu; prefetch.global.L2 [%rd1]; nanosleep.u32 20; griddepcontrol.wait;"
    interpreter.run(kernel(text))
