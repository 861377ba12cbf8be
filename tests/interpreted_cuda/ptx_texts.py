"""Small kernels by hand: the frame of a text of PTX, and one instruction for each thread over arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from interpreted_cuda import interpreter

NUM_THREADS = 32


def kernel(body: str, *parameters: str, module: str = "") -> str:
    """A kernel with these parameters (".u64 x") and registers of every kind: p, h (16 bits), r, f, rd, fd (64)."""
    given = ", ".join(f".param {parameter}" for parameter in parameters)
    registers = " ".join(
        f".reg .{kind} %{name}<40>;"
        for name, kind in (("p", "pred"), ("h", "b16"), ("r", "b32"), ("f", "f32"), ("rd", "b64"), ("fd", "f64"))
    )
    head = ".version 8.5\n.target sm_80\n.address_size 64\n"
    return f"{head}{module}\n.visible .entry tried({given})\n{{\n{registers}\n{body}\nret;\n}}\n"


def of_each_thread(instruction: str, *inputs: NDArray[Any], out: DTypeLike) -> NDArray[Any]:
    """What an instruction makes of the elements of each thread: `d` of `a`, `b`, `c` and `e`, which are registers.

    As many threads as elements. `p` and `q` are predicates to use in between.
    """
    sizes = [array.dtype.itemsize for array in inputs]
    result = np.zeros(len(inputs[0]), dtype=out)
    size = result.dtype.itemsize
    lines = [f".reg .b{max(16, 8 * size)} d;", ".reg .pred p, q;", "mov.u32 %r0, %tid.x;", "ld.param.u64 %rd0, [x0];"]
    lines.append(f"mad.wide.u32 %rd0, %r0, {size}, %rd0;")
    for i, (name, width) in enumerate(zip("abce", sizes, strict=False), start=1):
        lines.append(f".reg .b{max(16, 8 * width)} {name};")
        lines.append(f"ld.param.u64 %rd{i}, [x{i}]; mad.wide.u32 %rd{i}, %r0, {width}, %rd{i};")
        lines.append(f"ld.global.b{8 * width} {name}, [%rd{i}];")
    lines += [f"mov.b{max(16, 8 * size)} d, 0;", instruction, f"st.global.b{8 * size} [%rd0], d;"]
    text = kernel("\n".join(lines), *(f".u64 x{i}" for i in range(len(inputs) + 1)))
    interpreter.run(text, result, *inputs, block=(len(result), 1, 1))
    return result


def stored(body: str, *inputs: NDArray[Any], out: NDArray[Any], **launch: Any) -> NDArray[Any]:
    """`out` after a kernel that has its address in %rd0, those of the inputs in %rd1, ..., and %tid.x in %r0."""
    parameters = [f".u64 x{i}" for i in range(len(inputs) + 1)]
    loads = "\n".join(f"ld.param.u64 %rd{i}, [x{i}];" for i in range(len(parameters)))
    module = launch.pop("module", "")
    interpreter.run(
        kernel(f"mov.u32 %r0, %tid.x;\n{loads}\n{body}", *parameters, module=module), out, *inputs, **launch
    )
    return out
