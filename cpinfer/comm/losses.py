"""What errors of collectives say: that another rank has ended, or that it did not come in time."""

from __future__ import annotations

from cpinfer.errors import PeerLostError

# Words of gloo and NCCL for "the other end is gone".
_PEER_LOSS_WORDS = (
    "closed by peer",
    "connection reset",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "ncclremoteerror",
)

# Words of gloo, of the store in which ranks meet, and of NCCL for "the other end is there and does not answer"; the
# last are gloo's of what begins when an earlier operation on the same connection has timed out.
_TIMEOUT_WORDS = (
    "timed out waiting",
    "wait timeout",
    "collective operation timeout",
    "socket timeout",
    "application timeout caused pair closure",
)


def is_peer_loss(error: BaseException) -> bool:
    """Whether `error` only echoes the end of another rank (a framework's own collectives raise what they like)."""
    if isinstance(error, PeerLostError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in words for word in _PEER_LOSS_WORDS)


def is_timeout(error: BaseException) -> bool:
    """Whether `error` says that another rank did not come to a collective in time."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in words for word in _TIMEOUT_WORDS)
