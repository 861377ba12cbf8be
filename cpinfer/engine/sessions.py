"""A session: a sequence that grows by turns, whose KV stays on the engine between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Session:
    """Given and generated tokens in turn. `Engine.open_session` makes one, which is its rank's alone.

    Attributes:
        id: names it; its turns are named `id/0`, `id/1`, ...
        token_ids: the opening prompt, then of each turn that has ended what was given and what was generated.
        num_turns: turns that have ended, aborted ones included.
        is_closed: whether it has been closed.
        turn: the id of the request that is under way, if any.
    """

    id: str
    token_ids: tuple[int, ...]
    num_turns: int = 0
    is_closed: bool = False
    turn: str | None = None
