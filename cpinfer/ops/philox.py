"""Random bits by counter: Philox 4x64-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).

It passes BigCrush. numpy has it for one counter after another; in C++ (`cpu_kernels/philox.cpp`) all rows of a step are
one call, with the same bits, where that can be compiled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cpinfer.ops.cpu_kernels.compiling import functions_of


def philox(places: NDArray[np.uint64], num: int) -> NDArray[np.uint64]:
    """`[N, num]` random bits. Number i of a row is word `i % 4` of the block at

        key      (places[0], 0)
        counter  (1 + i // 4, places[1], places[2], places[3])

    whatever `num` and the other rows of `places [N, 4]`, contiguous. Empty for N = 0.
    """
    kernels = functions_of("philox", cpinfer_philox="pnnp")
    if kernels is None:
        return by_numpy(places, num)
    bits = np.empty((len(places), num), dtype=np.uint64)
    kernels.cpinfer_philox(places.ctypes.data, len(places), num, bits.ctypes.data)
    return bits


def by_numpy(places: NDArray[np.uint64], num: int) -> NDArray[np.uint64]:
    """The same, row after row."""
    generator = np.random.Philox(key=0)
    state = generator.state  # one generator put to each place: making one takes six times as long
    counter, key = state["state"]["counter"], state["state"]["key"]
    bits = np.empty((len(places), num), dtype=np.uint64)
    for row, (first, *others) in zip(bits, places, strict=True):
        counter[0], counter[1:], key[0] = 0, others, first  # it counts up before it draws
        generator.state = state
        row[:] = generator.random_raw(num)
    return bits
