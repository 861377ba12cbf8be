"""What the homes of a scheduler know of the beginnings of requests: what is remembered, and what is computed now."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cpinfer.engine.request import Request
from cpinfer.engine.step import Chunk, Prefill
from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.prefix_cache import Key, extend_keys
from cpinfer.kv_cache.state_cache import StateCache
from cpinfer.layout.shards import KVSharding
from cpinfer.layout.states import StatePlace


@dataclass(frozen=True)
class KnownPrefixes:
    """Asked by `keys` of whole units. Of several homes the one that knows least decides, so that all begin alike.

    `states`: of a model with states, those behind prefixes, without which KV is of no use; None of others.
    """

    homes: Sequence[KVHome]
    sharding: KVSharding
    states: StateCache | None = None

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
        known = keys[: min(self.homes[index].prefixes.num_known(keys, request.experts) for index in homes)]
        return known if self.states is None else known[: self.states.num_known(known)]

    def num_tokens(self, keys: Sequence[Key]) -> int:
        return len(keys) * self.sharding.prefix_unit

    def are_worth_waiting_for(
        self, request: Request, keys: Sequence[Key], known: Sequence[Key], homes: Collection[int]
    ) -> bool:
        """Whether prefills under way compute at least half of what this request, `known` aside, would have to.

        To wait for less does not pay: until then a step is less full.
        """
        if request.experts is not None:  # whose prefills are told of theirs, nobody knows before they end
            return False
        if self.states is None:
            num_coming = min(self.homes[index].prefixes.num_coming(keys[len(known) :]) for index in homes)
        else:
            num_coming = self.states.num_coming(keys[: self._num_begun(keys, homes)]) - len(known)
        to_compute = request.num_tokens - self.num_tokens(known)
        return num_coming > 0 and 2 * num_coming * self.sharding.prefix_unit >= to_compute

    def state_start(self, known: Sequence[Key]) -> StatePlace | None:
        """Where the state behind `known` units is, if there are any and sequences have states."""
        return None if self.states is None or not known else self.states.use(known[-1])

    def state_ends(self, request: Request, known: Sequence[Key], homes: Collection[int]) -> Mapping[int, Key]:
        """Behind how many tokens of a request a state is to be kept, with the keys, where it begins behind `known`.

        Those that such a request will not compute again, and those that it has in common with others: what comes behind
        them differs, and whoever begins in this way too goes on from there.
        """
        keys = self.keys(request, request.first_logits_place)
        if self.states is None or len(keys) <= len(known):
            return {}
        ends = sorted({self._num_begun(keys, homes), len(keys)})
        return {n * self.sharding.prefix_unit: keys[n - 1] for n in ends if n > len(known)}

    def placed(self, chunk: Chunk, beside: Iterable[Prefill]) -> Chunk:
        """A chunk, with a place for the state behind it where that is to be kept, and one is free.

        Those that prefills `beside` begin with are not.
        """
        key = chunk.prefill.state_ends.get(chunk.end)
        if self.states is None or key is None or key in self.states:
            return chunk
        return replace(
            chunk, state_place=self.states.take({p.state_start for p in beside if p.state_start is not None})
        )

    def note(self, chunk: Chunk) -> None:
        """A chunk has been computed, its state is where it was to be."""
        chunk.prefill.state_start = None
        if self.states is not None and chunk.state_place is not None:
            self.states.insert(chunk.prefill.state_ends[chunk.end], chunk.state_place)

    def announce(self, prefill: Prefill) -> None:
        """A prefill is under way, in the homes of its leaders."""
        for index in prefill.leaders:
            self.homes[index].prefixes.announce(prefill.prefix_keys)
        if self.states is not None:
            self.states.announce(prefill.state_ends.values())

    def withdraw(self, prefill: Prefill, homes: Collection[int]) -> None:
        """A prefill is over in these homes."""
        for index in homes:
            self.homes[index].prefixes.withdraw(prefill.prefix_keys)
        if self.states is not None and len(homes) == len(prefill.leaders):
            self.states.withdraw(prefill.state_ends.values())

    def remember(self, prefill: Prefill) -> None:
        """A prompt that is sampled again or continued is worth remembering, as far as it is computed."""
        keys = prefill.prefix_keys[: prefill.num_computed_tokens // self.sharding.prefix_unit]
        for index, leader in prefill.leaders.items():
            self.homes[index].prefixes.insert(keys, leader.blocks, leader.experts)

    def _num_begun(self, keys: Sequence[Key], homes: Collection[int]) -> int:
        """How many of the first units all of `homes` remember, or compute now."""
        return min(self.homes[index].prefixes.num_begun(keys) for index in homes)
