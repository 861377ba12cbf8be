"""What the homes of a scheduler know of the beginnings of requests: what is remembered, and what is computed now."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from cpinfer.engine.request import Request
from cpinfer.engine.step import Prefill
from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.prefix_cache import Key, extend_keys
from cpinfer.layout.shards import KVSharding


@dataclass(frozen=True)
class KnownPrefixes:
    """Asked by `keys` of whole units. Of several homes the one that knows least decides, so that all begin alike."""

    homes: Sequence[KVHome]
    sharding: KVSharding

    def keys(self, request: Request, num_tokens: int) -> Sequence[Key]:
        """Of the whole units in the first tokens of a request; none where nothing is remembered."""
        if not self.homes[0].prefixes.is_enabled:
            return ()
        unit = self.sharding.prefix_unit
        if len(request.prefix_keys) < num_tokens // unit:
            extend_keys(request.prefix_keys, request.all_token_ids, unit)
        return request.prefix_keys[: num_tokens // unit]

    def remembered(self, request: Request, keys: Sequence[Key], homes: Collection[int]) -> Sequence[Key]:
        """The first of a request's `keys`, as far as all of `homes` remember all that it wants of their units."""
        return keys[: min(self.homes[index].prefixes.num_known(keys, request.experts) for index in homes)]

    def num_tokens(self, keys: Sequence[Key]) -> int:
        return len(keys) * self.sharding.prefix_unit

    def are_worth_waiting_for(self, request: Request, keys: Sequence[Key], homes: Collection[int]) -> bool:
        """Whether prefills under way compute at least half of what this request would have to.

        To wait for less does not pay: until then a step is less full.
        """
        if request.experts is not None:  # whose prefills are told of theirs, nobody knows before they end
            return False
        known = self.remembered(request, keys, homes)
        num_coming = min(self.homes[index].prefixes.num_coming(keys[len(known) :]) for index in homes)
        to_compute = request.num_tokens - self.num_tokens(known)
        return num_coming > 0 and 2 * num_coming * self.sharding.prefix_unit >= to_compute

    def announce(self, prefill: Prefill) -> None:
        """A prefill is under way, in the homes of its leaders."""
        for index in prefill.leaders:
            self.homes[index].prefixes.announce(prefill.prefix_keys)

    def withdraw(self, prefill: Prefill, homes: Iterable[int]) -> None:
        """A prefill is over in these homes."""
        for index in homes:
            self.homes[index].prefixes.withdraw(prefill.prefix_keys)

    def remember(self, prefill: Prefill) -> None:
        """A prompt that is sampled again or continued is worth remembering, as far as it is computed."""
        keys = prefill.prefix_keys[: prefill.num_computed_tokens // self.sharding.prefix_unit]
        for index, leader in prefill.leaders.items():
            self.homes[index].prefixes.insert(keys, leader.blocks, leader.experts)
