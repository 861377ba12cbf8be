"""The errors a user can meet. Each message says what is, what was wanted, and what to do."""

from __future__ import annotations


class UserError(ValueError):
    """Bad config or input, found before any model is loaded. Tools print its message without a traceback and exit 2."""


class UnsupportedError(UserError):
    """Something listed in the table of what is refused (`cpinfer.refusals`)."""


class PeerLostError(RuntimeError):
    """A collective failed because another rank ended. That rank's error is the cause; this one is only its echo."""


class BackendFaultError(RuntimeError):
    """An attention backend does not compute what it should, on a few tokens at start-up. Nothing was run with it."""


class EngineFaultError(RuntimeError):
    """A step produced something that cannot be right (NaN logits, leaked blocks). Raised on every rank alike."""


class RanksDifferError(RuntimeError):
    """Ranks of one replica did not make the same call. Raised on every rank alike, before anything ran."""


class StreamEndedError(RanksDifferError):
    """Some ranks stopped taking the results of a stream while others went on. Raised on every rank at the next step.

    `places` are those ranks, by their place in the replica.
    """

    def __init__(self, message: str, places: tuple[int, ...]) -> None:
        super().__init__(message)
        self.places = places


class OutputError(RuntimeError):
    """Results cannot be written, or are not all where they were written. The message says what is safe; exit 1."""


class ModelChangedError(RuntimeError):
    """A model became another one while an engine was attached to it (dtype, device, modules, mode). Nothing was run."""
