"""What is under way in the homes of a scheduler, kept as it changes, and counted anew to check that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpinfer.engine.request import Request
from cpinfer.engine.step import Prefill
from cpinfer.layout.shards import KVSharding


@dataclass
class HomeLoad:
    """What is under way in one home: the samples that are prefilled or run, and the blocks that forks will take."""

    num_active: int = 0
    num_reserved_blocks: int = 0


def counted_load(
    num_homes: int, sharding: KVSharding, prefilling: Sequence[Prefill], running: Sequence[Request]
) -> list[HomeLoad]:
    """What the load of each home must be, from all that is under way."""
    load = [HomeLoad() for _ in range(num_homes)]
    for request in (*(r for p in prefilling for r in p.requests), *running):
        load[request.home].num_active += 1
    for prefill in prefilling:
        mutable = sharding.num_mutable_blocks(len(prefill.token_ids))
        for index in prefill.leaders:
            num_forks = sum(r.home == index for r in prefill.requests) - 1
            load[index].num_reserved_blocks += num_forks * mutable
    return load


def assign_to_homes(group: Sequence[Request], load: Sequence[HomeLoad]) -> list[int]:
    """Each sample to the home with the fewest active ones, or of what it continues. How many each home got."""
    before = [home.num_active for home in load]
    after = list(before)
    for request in group:
        # Of what it continues, which may have been one of more homes than there are now.
        before_it = request.continues
        request.home = after.index(min(after)) if before_it is None else before_it.home % len(after)
        after[request.home] += 1
    return [now - then for now, then in zip(after, before, strict=True)]
