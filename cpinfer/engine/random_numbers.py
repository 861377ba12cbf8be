"""Random numbers by counter: each is a pure function of what it is for.

There is no state to save or to move, so a request may change rank, be batched with anything, or be computed again, and
its text stays what it was. They are made on the host, and so the same whatever the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpinfer.engine.request import SampledRequest
from cpinfer.ops.philox import philox


def exponentials(requests: Sequence[SampledRequest], num: int) -> NDArray[np.float64]:
    """Random numbers `[N, num]` for the requests' next tokens, exponentially distributed with mean 1, finite, above 0.

    Number i of a row is a function of (seed, prompt id, sample, token index, i), whatever `num` and the other rows:

        key      (seed, 0)
        counter  (1 + i // 4, token index, sample, hash of the prompt id)      four numbers at each count

    by `ops/philox.py`.
    """
    places = [(r.params.seed, len(r.sampled), r.sample_index, r.prompt.random_key) for r in requests]
    # Of a dtype that is named: numpy would make floats of large numbers, and ids would share numbers.
    return exponentials_of(philox(np.array(places, dtype=np.uint64).reshape(-1, 4), num))


def exponentials_of(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """What 64 random bits stand for: -log u, with u in the middle of one of 2^52 parts of (0, 1), so never 0 or 1."""
    found: NDArray[np.float64] = -np.log(((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)
    return found
