"""Random numbers by counter: each is a pure function of what it is for.

There is no state to save or to move, so a request may change rank, be batched with anything, or be computed again, and
its text stays what it was. They are made on the host, and so the same whatever the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpinfer.engine.request import SampledRequest


def exponentials(requests: Sequence[SampledRequest], num: int) -> NDArray[np.float64]:
    """Random numbers `[N, num]` for the requests' next tokens, exponentially distributed with mean 1, finite, above 0.

    Number i of a row is a function of (seed, prompt id, sample, token index, i), whatever `num` and the other rows:

        key      (seed, 0)
        counter  (1 + i // 4, token index, sample, hash of the prompt id)      four numbers at each count

    by Philox 4x64-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), which passes BigCrush.
    """
    generator = np.random.Philox(key=0)
    state = generator.state  # one generator put to each place: making one takes six times as long
    counter, key = state["state"]["counter"], state["state"]["key"]
    bits = np.empty((len(requests), num), dtype=np.uint64)
    for row, request in zip(bits, requests, strict=True):
        # Number by number: numpy would turn a list with large numbers into floats, and ids would share numbers.
        counter[0], counter[1] = 0, len(request.sampled)
        counter[2], counter[3] = request.sample_index, request.prompt.random_key
        key[0] = request.params.seed
        generator.state = state
        row[:] = generator.random_raw(num)
    return exponentials_of(bits)


def exponentials_of(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """What 64 random bits stand for: -log u, with u in the middle of one of 2^52 parts of (0, 1), so never 0 or 1."""
    found: NDArray[np.float64] = -np.log(((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)
    return found
