"""What a request knows of the experts that its tokens went through."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Experts = NDArray[np.int16]


@dataclass(eq=False)
class ExpertRecord:
    """The experts of the first tokens of a sequence, as many as have been run: arrays `[tokens, layers, experts]`.

    Each token has those of the forward that ran it first. What a later one computes again changes nothing: the tokens
    behind it were drawn by the first.
    """

    parts: list[Experts] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, start: int, experts: Experts) -> None:
        """Those of tokens from `start` on, as far as they are not known. Samples of one prompt share its arrays."""
        assert start <= self.num_tokens, "what was cached before is known, or is run again"
        new = experts[self.num_tokens - start :]
        if len(new):
            self.parts.append(new)
            self.num_tokens += len(new)

    @staticmethod
    def are_alike(one: ExpertRecord | None, other: ExpertRecord | None) -> bool:
        """Whether both requests ask, and as many are known to one as to the other; or neither asks."""
        return (one and one.num_tokens) == (other and other.num_tokens)

    def copy(self) -> ExpertRecord:
        """The same, to be continued by itself."""
        return ExpertRecord(list(self.parts), self.num_tokens)

    def array(self) -> Experts:
        """`[tokens, layers, experts]`, read-only; empty where no token has been run."""
        array = np.concatenate(self.parts) if self.parts else np.empty((0, 0, 0), dtype=np.int16)
        array.flags.writeable = False
        return array
