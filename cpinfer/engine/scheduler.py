"""Who runs in the next step: continuous batching, with chunked prefill and preemption by recompute.

Pure Python and replicated: every rank holds one and all decide alike.

For that to hold, nothing that differs between ranks may enter a decision: no clock, no local memory reading, no set
order, no randomised hash.

    waiting --admit--> prefilling --last chunk--> running --stop, length--> finished
       ^                                             |         |
       +------------- preempted: blocks freed -------+         kept: its KV stays, for one that continues it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, takewhile

from cpinfer.engine.home_load import HomeLoad, assign_to_homes, counted_load
from cpinfer.engine.kept_requests import KeptRequests
from cpinfer.engine.known_prefixes import KnownPrefixes
from cpinfer.engine.request import FinishReason, Request, SampledRequest, SampledToken, TokenScore
from cpinfer.engine.scheduler_stats import SchedulerStats
from cpinfer.engine.step import Prefill, Step, StepDraft
from cpinfer.engine.waiting_queue import WaitingQueue
from cpinfer.errors import EngineFaultError
from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.prefix_cache import Key
from cpinfer.kv_cache.state_cache import StateCache
from cpinfer.layout.shards import KVSharding
from cpinfer.layout.states import StatePlace

# Places of given answers that one step scores at most, so that logits stay small: 0.6 GB with 150k words.
MAX_SCORED_POSITIONS = 1024


@dataclass
class Scheduler:
    """Continuous batching over the homes' KV blocks, first come first served.

    Prompts go before decode steps, so that a batch fills up before it advances. When a running request needs a block
    and its home has none, those that are kept there give way, the longest unused first; then of those that run the
    youngest of the highest `priority` is put back in front of the queue and computed again later.
    `blocks_to_copy` are copied, per home, before the next step: what a forked sample may not share with its leader.
    `window`: how many of the last tokens any layer sees, None for all; blocks without such a token are given back as
    it moves on. `max_kept_tokens`: how many a home keeps at most of requests that have ended, None for any number.
    `states`: those behind prefixes, of a model with states that remembers any.
    """

    homes: Sequence[KVHome]
    sharding: KVSharding
    max_num_seqs: int
    max_num_batched_tokens: int
    window: int | None = None
    max_kept_tokens: int | None = None
    states: StateCache | None = None
    stats: SchedulerStats = field(default_factory=SchedulerStats)
    blocks_to_copy: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    _waiting: WaitingQueue = field(default_factory=WaitingQueue)
    _prefilling: list[Prefill] = field(default_factory=list)
    _running: list[SampledRequest] = field(default_factory=list)
    # Kept where it changes: to count it for every prompt that is admitted would cost by the square of their number.
    _load: list[HomeLoad] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._load = [HomeLoad() for _ in self.homes]
        self._prefixes = KnownPrefixes(self.homes, self.sharding, self.states)
        self._kept = KeptRequests(len(self.homes), self.max_kept_tokens)
        self._num_tokens_in = cache(self.sharding.num_tokens_in)  # asked of every request in every step
        # A decode step computes one token per request, so the token budget bounds the requests too.
        self.max_num_seqs = min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + sum(len(p.requests) for p in self._prefilling) + len(self._running)

    @property
    def waiting(self) -> Sequence[Request]:
        """Those that have not begun, in the order in which they are to."""
        return tuple(self._waiting)

    @property
    def keeps_any(self) -> bool:
        """Whether KV of requests that have ended is kept for others."""
        return any(True for _ in self._kept)

    @property
    def running(self) -> Sequence[SampledRequest]:
        """Those that get a token in every step."""
        return self._running

    def add(self, request: Request) -> None:
        """Queue a request. ValueError, with the numbers, when it could never run."""
        needed, length = self.sharding.num_blocks(request.max_cached_tokens), len(request.prompt.token_ids)
        if needed > self.homes[0].pool.num_blocks:
            raise ValueError(
                f"prompt {request.prompt.id!r}: {length} tokens and {request.max_length - length} "
                f"new ones need {needed} KV blocks, the pool has {self.homes[0].pool.num_blocks}"
            )
        self._waiting.append(request)

    def schedule(self) -> Step | None:
        """The next step, None when all is done. The blocks it writes to are taken here."""
        draft = StepDraft(self.max_num_batched_tokens, MAX_SCORED_POSITIONS, self.sharding.prefix_unit)
        for prefill in self._prefilling:
            self._add_chunk(prefill, draft)
        while draft.num_tokens > 0 and (admitted := self._admit()) is not None:
            self._prefilling.append(admitted)
            self._add_chunk(admitted, draft)
        if draft.chunks:
            return Step(tuple(draft.chunks), ())
        self._extend_running()
        if self._running:
            return Step((), tuple(self._running))
        if self._waiting:  # nothing holds a block, so the first of them must fit: `add` has checked that
            raise EngineFaultError(f"{len(self._waiting)} requests wait and none can run: KV blocks have leaked")
        return None

    def commit(
        self,
        step: Step,
        sampled: Sequence[SampledToken],
        stops: Callable[[SampledRequest], bool],
        scores: Sequence[TokenScore] = (),
    ) -> list[Request]:
        """Take note of a step that ran. Returns the finished requests.

        `sampled` are the tokens of `step.samples`, `scores` those of its chunks' `scored_positions`, one after another.
        """
        next_scores = iter(scores)
        started: list[SampledRequest] = []
        finished: list[Request] = []
        for chunk in step.chunks:
            chunk.prefill.num_computed_tokens = chunk.end
            self.stats.num_computed_prefill_tokens += chunk.end - chunk.start
            self._prefixes.note(chunk)
            if self.window is not None:
                self._drop_dead_of_leaders(chunk.prefill)
            elif self._waiting and not chunk.is_last:  # somebody may wait for what they have in common
                self._prefixes.remember(chunk.prefill)
            found = list(islice(next_scores, len(chunk.scored_positions)))
            for request in chunk.prefill.requests:  # samples of one prompt share its scores
                request.scores += found
            if chunk.is_last:
                self._prefixes.remember(chunk.prefill)
                started += self._fork(chunk.prefill)
                finished += self._end_scored(chunk.prefill)
        if step.chunks:
            self._prefilling = [p for p in self._prefilling if p.num_computed_tokens < len(p.token_ids)]
            for ended in (chunk.prefill for chunk in step.chunks if chunk.is_last):
                self._prefixes.withdraw(ended, ended.leaders)
        self._running += started
        drawn: Iterable[tuple[SampledRequest, SampledToken]] = zip(step.samples, sampled, strict=True)
        if step.chunks:  # of which some may have been put back
            token_of = dict(drawn)
            drawn = [(request, token_of[request]) for request in started]
        for request, token in drawn:
            request.sampled.append(token)
            self.stats.num_generated_tokens += 1
            reason: FinishReason | None = "length" if len(request.sampled) >= request.max_new_tokens else None
            if stops(request):
                reason = "stop"
            if reason is not None:
                request.finish_reason = reason
                if request.keeps_kv:
                    self._keep(request)
                else:
                    self._leave(request)
                finished.append(request)
            elif self.window is not None:
                self._drop_dead(request, request.next_position)
        if finished:
            self._running = [s for s in self._running if s.finish_reason is None]
        return finished

    def take_blocks_to_copy(self, home: int) -> list[tuple[int, int]]:
        """Blocks to copy in `home` before the next step, (from, to); forgotten by this call."""
        blocks_to_copy = self.blocks_to_copy.pop(home, [])
        self.blocks_to_copy.clear()
        return blocks_to_copy

    def abort(self, requests: Iterable[Request]) -> None:
        """Forget unfinished requests and free their blocks; what is computed stays remembered while there is room."""
        leaving = set()
        for request in requests:
            if not self._waiting.remove(request):
                leaving.add(id(request))
            elif request.continues is not None:
                self.let_go(request.continues)
                request.continues = None
        if not leaving:
            return
        for prefill in self._prefilling:
            if not leaving.isdisjoint(map(id, prefill.requests)):
                self._leave_prefill(prefill, leaving)
        self._prefilling = [p for p in self._prefilling if p.requests]
        for request in self._running:
            if id(request) in leaving:
                self._leave(request)
        self._running = [r for r in self._running if id(r) not in leaving]

    def let_go(self, request: SampledRequest) -> None:
        """Nobody continues a request that has ended: free its blocks, if they are kept."""
        if request in self._kept:
            self._put_back(request)

    def _leave_prefill(self, prefill: Prefill, leaving: Set[int]) -> None:
        """Take requests out of a prefill under way; where a leader leaves, another one gets its blocks."""
        if prefill.num_computed_tokens:
            self._prefixes.remember(prefill)
        mutable = self.sharding.num_mutable_blocks(len(prefill.token_ids))
        for index, leader in list(prefill.leaders.items()):
            here = [r for r in prefill.requests if r.home == index]
            staying = [r for r in here if id(r) not in leaving]
            for request in here:
                if id(request) in leaving:
                    self.homes[index].release((), request.take_state())
            load = self._load[index]
            load.num_active -= len(here) - len(staying)
            load.num_reserved_blocks -= (len(here) - max(1, len(staying))) * mutable
            if not staying:
                self._prefixes.withdraw(prefill, [index])
                self.homes[index].release(leader.take_blocks())
                del prefill.leaders[index]
            elif id(leader) in leaving:
                heir = staying[0]
                heir.blocks, heir.num_dropped = leader.blocks, leader.num_dropped
                leader.blocks, leader.num_dropped = [], 0
                prefill.leaders[index] = heir
        prefill.requests = tuple(r for r in prefill.requests if id(r) not in leaving)

    def emptied(self) -> Scheduler:
        """The same without a request or a cached prefix; it goes on counting. This one is as it was."""
        return Scheduler(
            [home.emptied() for home in self.homes],
            self.sharding,
            self.max_num_seqs,
            self.max_num_batched_tokens,
            window=self.window,
            max_kept_tokens=self.max_kept_tokens,
            states=None if self.states is None else self.states.emptied(),
            stats=self.stats,
        )

    def restarted(self, version: int | None, into: Scheduler | None = None) -> Scheduler:
        """`emptied`, with all unfinished requests waiting to be computed anew, those that were under way in front.

        Their tokens stay, sampled by weights of `version`, None: by those of now. They have no blocks afterwards, so
        that this scheduler is not to be used again. `into`: another one without requests, of any homes.
        """
        anew = self.emptied() if into is None else into
        requests = [*self._running, *(r for p in self._prefilling for r in p.requests), *self._waiting]
        for request in (*requests, *self._kept):
            request.take_blocks()
            request.take_state()
            request.prefix_keys = []  # of other units, in other homes
        for request in requests:
            request.restart(version)
            anew._waiting.append(request)
        return anew

    def check_integrity(self) -> None:
        """Every block is free, remembered, or held by an unfinished request. ValueError names a leak."""
        for index, home in enumerate(self.homes):
            announced = Counter(key for p in self._prefilling if index in p.leaders for key in p.prefix_keys)
            holders = [r for r in self._holders() if r.home == index]
            blocks, states = (b for r in holders for b in r.held_blocks), (r.state for r in holders if r.state)
            home.check_integrity(blocks, announced, states)
        if self.states is not None:
            self.states.check_integrity(Counter(key for p in self._prefilling for key in p.state_ends.values()))
        counted = counted_load(len(self.homes), self.sharding, self._prefilling, self._running)
        if counted != self._load:
            raise ValueError(f"scheduler is inconsistent: it knows of {self._load}, under way are {counted}")

    def _holders(self) -> list[Request]:
        """Who holds blocks or a state. Of a prefill under way those who will fork have no block yet."""
        return [*(r for p in self._prefilling for r in p.requests), *self._running, *self._kept]

    def _add_chunk(self, prefill: Prefill, draft: StepDraft) -> None:
        """Add the next chunk of a prefill to the step, as far as it has room for it."""
        chunk = draft.next_of(prefill)
        if chunk is not None:
            draft.add(self._prefixes.placed(chunk, self._prefilling))

    def _admit(self) -> Prefill | None:
        """Start the first waiting request, with as many equal ones behind it as fit; None when it has to wait."""
        places = self.max_num_seqs - sum(load.num_active for load in self._load)
        if not self._waiting or places <= 0:
            return None
        waiting = iter(self._waiting)
        first = next(waiting)
        if first.continues is not None and first.continues in self._kept:
            return self._continue(first, first.continues)
        group = [first, *takewhile(first.shares_prefill_with, islice(waiting, places - 1))]
        # Whose logits are read is computed.
        keys = self._prefixes.keys(first, first.first_logits_place)
        members = assign_to_homes(group, self._load)
        known = self._prefixes.remembered(first, keys, _places(members))
        if self._prefixes.are_worth_waiting_for(first, keys, known, _places(members)):
            return None
        while not self._make_room_for(first, known, members):
            if len(group) == 1:
                return None
            members[group.pop().home] -= 1
            known = self._prefixes.remembered(first, keys, _places(members))  # of fewer homes
        for request in group:
            self._waiting.remove(request)
            request.continues = None  # its KV is not kept; what is remembered of it is found like any prefix
        for load, num_samples in zip(self._load, members, strict=True):
            load.num_active += num_samples
            load.num_reserved_blocks += max(0, num_samples - 1) * self.sharding.num_mutable_blocks(first.num_tokens)
        return self._start(keys, group)

    def _make_room_for(self, request: Request, known: Sequence[Key], members: Sequence[int]) -> bool:
        """Whether every home has the blocks of its leader, and of what its other `members` cannot share with it.

        What the samples of prefills under way will take when they fork is spoken for. Prefixes of this very prompt that
        are `known` need no room, and give none. States have a place of their own for each sample.
        """
        homes, mutable = _places(members), self.sharding.num_mutable_blocks(request.num_tokens)
        new = self.sharding.num_blocks(request.num_tokens)
        new -= self.sharding.num_blocks(self._prefixes.num_tokens(known))
        taken = [(members[index] - 1) * mutable + self._load[index].num_reserved_blocks for index in homes]
        return all(
            self._make_room(index, new + others, known, members[index])
            for index, others in zip(homes, taken, strict=True)
        )

    def _make_room(self, index: int, num_blocks: int, beside: Sequence[Key] = (), num_states: int = 0) -> bool:
        """Whether a home has so many blocks and states; kept requests are given up for it where that may be enough."""
        home, kept = self.homes[index], self._kept
        if home.has(num_blocks, beside, num_states):
            return True
        if not home.has(num_blocks - kept.num_blocks[index], beside, num_states - kept.num_requests(index)):
            return False
        while (oldest := kept.oldest(index)) is not None:
            self._put_back(oldest)
            if home.has(num_blocks, beside, num_states):
                return True
        return False

    def _start(self, keys: Sequence[Key], group: list[Request]) -> Prefill:
        """Find what is remembered of the tokens, and take blocks for the rest."""
        leaders: dict[int, Request] = {}
        for request in group:
            leaders.setdefault(request.home, request)
            request.state = self.homes[request.home].take_state()
        known = self._prefixes.remembered(group[0], keys, leaders)
        total = self.sharding.num_blocks(group[0].num_tokens)
        for index, leader in leaders.items():
            blocks = self.homes[index].prefixes.match(known)
            room = self.sharding.num_blocks(leader.max_cached_tokens) - len(blocks)
            leader.blocks = blocks + self.homes[index].take(total - len(blocks), room=room)
        for request in group:
            self.homes[request.home].prefixes.recall(known, request.experts)
        states = self._prefixes.state_start(known), self._prefixes.state_ends(group[0], known, leaders)
        return self._prefill(group, leaders, self._prefixes.num_tokens(known), *states)

    def _prefill(
        self,
        group: Sequence[Request],
        leaders: dict[int, Request],
        num_cached: int,
        state_start: StatePlace | None = None,
        state_ends: Mapping[int, Key] | None = None,
    ) -> Prefill:
        """A prefill that is under way, of whose tokens so many are cached."""
        self.stats.num_cached_prefill_tokens += num_cached
        keys = self._prefixes.keys(group[0], group[0].num_tokens)
        tokens = group[0].all_token_ids
        prefill = Prefill(tokens, tuple(group), leaders, num_cached, keys, state_start, state_ends or {})
        self._prefixes.announce(prefill)
        return prefill

    def _continue(self, request: Request, before: SampledRequest) -> Prefill | None:
        """Start a request on the blocks of the one that it continues; None when it has to wait."""
        load = self._load[before.home]
        missing = self.sharding.num_blocks(request.num_tokens) - len(before.blocks)
        self._kept.remove(before)  # not to make room for itself
        if not self._make_room(before.home, missing + load.num_reserved_blocks):
            self._kept.add(before)
            return None
        self._waiting.remove(request)
        request.home, request.num_dropped, request.continues = before.home, before.num_dropped, None
        request.blocks = before.blocks + self.homes[before.home].take(missing, after=before.last_block)
        before.blocks, before.num_dropped = [], 0
        request.state = before.take_state()
        load.num_active += 1
        return self._prefill([request], {request.home: request}, before.next_position)

    def _fork(self, prefill: Prefill) -> list[SampledRequest]:
        """End a prefill: samples share their leader's blocks, but for those that they will write to.

        A sample for which there is no block left goes back to the queue; the others are returned.
        """
        length = len(prefill.token_ids)
        num_shared = self.sharding.num_immutable_blocks(length)
        started, put_back = [], []
        for request in prefill.samples:
            home, leader = self.homes[request.home], prefill.leaders[request.home]
            own = leader.blocks[num_shared:]
            if request is not leader:
                self._load[request.home].num_reserved_blocks -= len(own)
            if request is leader:
                started.append(request)
            elif self._make_room(request.home, len(own)):
                home.pool.share(leader.blocks[leader.num_dropped : num_shared])
                room = self.sharding.num_blocks(request.max_cached_tokens) - num_shared
                copied = home.take(len(own), room=room)
                request.blocks = leader.blocks[:num_shared] + copied
                request.prefix_keys = list(leader.prefix_keys)
                request.num_dropped = leader.num_dropped
                if own:
                    self.blocks_to_copy.setdefault(request.home, []).extend(zip(own, copied, strict=True))
                started.append(request)
            else:
                self._load[request.home].num_active -= 1
                home.release((), request.take_state())
                put_back.append(request)
        self._waiting.put_back(put_back)
        return started

    def _end_scored(self, prefill: Prefill) -> tuple[Request, ...]:
        """A prefill that is all a request is for ends it, too."""
        for request in prefill.scored:
            self._load[request.home].num_active -= 1
            self.homes[request.home].release(request.take_blocks(), request.take_state())
        return prefill.scored

    def _extend_running(self) -> None:
        """A slot for the newest token of every running request; others of its home make way when it has none."""
        youngest_last: dict[int, list[SampledRequest]] = {}
        for request in self._running:
            if request.next_position < self._num_tokens_in(len(request.blocks)) or not request.blocks:
                continue  # it has a slot, or was preempted by one before it
            home = self.homes[request.home]
            missing = self.sharding.num_blocks(request.next_position + 1) - len(request.blocks)
            while not self._make_room(request.home, missing):
                if request.home not in youngest_last:
                    here = [s for s in self._running if s.home == request.home]
                    youngest_last[request.home] = sorted(here, key=lambda s: s.priority)
                youngest = youngest_last[request.home].pop()
                self._preempt(youngest)
                if youngest is request:
                    break
            else:
                request.blocks += home.take(missing, after=request.last_block)
        if youngest_last:
            self._running = [s for s in self._running if s.blocks]

    def _preempt(self, request: SampledRequest) -> None:
        """Back to the front of the queue, without blocks: who calls takes it out of those that run."""
        self.stats.num_preemptions += 1
        self._leave(request)
        self._waiting.put_back([request])

    def _leave(self, request: SampledRequest) -> None:
        """Free a request's blocks; its whole units stay remembered as long as nobody needs the room."""
        self._load[request.home].num_active -= 1
        self._give_up(request)

    def _keep(self, request: SampledRequest) -> None:
        """Leave the KV of a request that has ended in its home; of what is too much there the longest unused goes."""
        self._load[request.home].num_active -= 1
        if self.window is not None:
            self._drop_dead(request, request.next_position)
        self._kept.add(request)
        while self._kept.are_too_many(request.home) and (oldest := self._kept.oldest(request.home)) is not None:
            self._put_back(oldest)

    def _put_back(self, kept: SampledRequest) -> None:
        """Keep a request no longer: it becomes a prefix that is remembered as long as nobody needs the room."""
        self._kept.remove(kept)
        self._give_up(kept)

    def _give_up(self, request: SampledRequest) -> None:
        keys = self._prefixes.keys(request, request.next_position)
        self.homes[request.home].prefixes.insert(keys, request.blocks, request.experts)
        self.homes[request.home].release(request.take_blocks(), request.take_state())

    def _drop_dead_of_leaders(self, prefill: Prefill) -> None:
        self._prefixes.remember(prefill)  # answers are not hashed block by block
        for leader in prefill.leaders.values():
            self._drop_dead(leader, prefill.num_computed_tokens)

    def _drop_dead(self, request: Request, num_cached: int) -> None:
        """Give back the blocks of a request that no later query sees, when `num_cached` tokens have KV."""
        assert self.window is not None
        num_dead = self.sharding.num_dead_blocks(num_cached, self.window)
        if num_dead > request.num_dropped:
            self.homes[request.home].release(request.drop_blocks(num_dead))


def _places(members: Sequence[int]) -> list[int]:
    """Homes that got any."""
    return [index for index, num in enumerate(members) if num]
