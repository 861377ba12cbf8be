"""Who runs in the next step. Pure Python and replicated: every rank holds one and all decide alike.

For that to hold, nothing that differs between ranks may enter a decision: no clock, no local memory reading, no set
order, no randomised hash.

    waiting --admit--> prefilling --last chunk--> running --stop, length--> finished
       ^                                             |
       +------------- preempted: blocks freed -------+
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import astuple, dataclass, field
from itertools import islice

from cpinfer.engine.request import FinishReason, SampledToken, Sequence, TokenScore
from cpinfer.errors import EngineFaultError
from cpinfer.kv_cache.home import KVHome
from cpinfer.layout.shards import KVSharding

# Places of given answers that one step scores at most, so that logits stay small: 0.6 GB with 150k words.
MAX_SCORED_PLACES = 1024


@dataclass(eq=False)
class Prefill:
    """Tokens being computed for all `samples` that continue them: n samples of a prompt, or one that was preempted.

    In each home with samples one of them is the leader, which owns the blocks until the others fork off. `num_done`
    tokens have KV in the home of every leader. A given answer is computed with its prompt, by a single sample.
    """

    token_ids: tuple[int, ...]
    samples: tuple[Sequence, ...]
    leaders: dict[int, Sequence]
    num_done: int

    @property
    def scored(self) -> Sequence | None:
        """The sequence whose given answer this computes, if it is one."""
        return self.samples[0] if self.samples[0].targets else None

    @property
    def first_scored(self) -> int:
        """The place from which on tokens predict those of the answer: the last token of the prompt."""
        return len(self.samples[0].prompt.token_ids) - 1


@dataclass(frozen=True)
class Chunk:
    """Tokens `[start, end)` of a prefill, computed in one step. The last chunk of a prefill samples, if it is to."""

    prefill: Prefill
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.prefill.token_ids)

    @property
    def samples(self) -> tuple[Sequence, ...]:
        """The sequences that get a token by this chunk."""
        return self.prefill.samples if self.is_last and self.prefill.scored is None else ()

    @property
    def scored_places(self) -> range:
        """Places in the sequence whose logits score a token of a given answer."""
        if self.prefill.scored is None:
            return range(0)
        return range(max(self.start, self.prefill.first_scored), self.end)


@dataclass(frozen=True)
class Step:
    """One step of the model: either chunks of prefills, or one token of every running sequence."""

    chunks: tuple[Chunk, ...]
    running: tuple[Sequence, ...]

    @property
    def samples(self) -> tuple[Sequence, ...]:
        """The sequences that get a token, in the order in which `commit` wants them."""
        return tuple(s for chunk in self.chunks for s in chunk.samples) if self.chunks else self.running


@dataclass
class SchedulerStats:
    """What happened, counted: tokens that prefills computed (again after a preemption), found cached, and sampled."""

    num_preemptions: int = 0
    num_computed_prefill_tokens: int = 0
    num_cached_prefill_tokens: int = 0
    num_generated_tokens: int = 0


@dataclass
class HomeLoad:
    """What is under way in one home: the samples that are prefilled or run, and the blocks that forks will take."""

    num_active: int = 0
    num_promised: int = 0


@dataclass
class _Draft:
    """The chunks of a step so far, and how much more of it there may be."""

    num_tokens: int
    num_scored_places: int
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.num_tokens -= chunk.end - chunk.start
        self.num_scored_places -= len(chunk.scored_places)
        self.chunks.append(chunk)


def sum_stats(parts: ListLike[SchedulerStats]) -> SchedulerStats:
    """The counts of several schedulers together."""
    fields = [astuple(part) for part in parts]
    return SchedulerStats(*map(sum, zip(*fields, strict=True)))


@dataclass
class Scheduler:
    """Continuous batching over the homes' KV blocks, first come first served.

    Prompts go before decode steps, so that a batch fills up before it advances. When a running sequence needs a block
    and its home has none, the youngest there is put back in front of the queue and computed again later. `copies` are
    blocks to copy, per home, before the next step: what a forked sample may not share with its leader. `window`: how
    many of the last tokens any layer sees, None for all; blocks without such a token are given back as it moves on.
    """

    homes: ListLike[KVHome]
    sharding: KVSharding
    max_num_seqs: int
    max_num_batched_tokens: int
    window: int | None = None
    stats: SchedulerStats = field(default_factory=SchedulerStats)
    copies: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    _waiting: deque[Sequence] = field(default_factory=deque)
    _prefilling: list[Prefill] = field(default_factory=list)
    _running: list[Sequence] = field(default_factory=list)
    # Kept where it changes: to count it for every prompt that is admitted would cost by the square of their number.
    _load: list[HomeLoad] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._load = [HomeLoad() for _ in self.homes]
        # A decode step computes one token per sequence, so the token budget bounds the sequences too.
        self.max_num_seqs = min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + sum(len(p.samples) for p in self._prefilling) + len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. ValueError, with the numbers, when it could never run."""
        needed = self.sharding.num_blocks(sequence.max_cached_tokens)
        if needed > self.homes[0].pool.num_blocks:
            raise ValueError(
                f"prompt {sequence.prompt.id!r}: {len(sequence.prompt.token_ids)} tokens and {sequence.max_new_tokens} "
                f"new ones need {needed} KV blocks, the pool has {self.homes[0].pool.num_blocks}"
            )
        self._waiting.append(sequence)

    def schedule(self) -> Step | None:
        """The next step, None when all is done. The blocks it writes to are taken here."""
        draft = _Draft(self.max_num_batched_tokens, MAX_SCORED_PLACES)
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
        sampled: ListLike[SampledToken],
        stops: Callable[[Sequence], bool],
        scores: ListLike[TokenScore] = (),
    ) -> list[Sequence]:
        """Take note of a step that ran. Returns the finished sequences.

        `sampled` are the tokens of `step.samples`, `scores` those of its chunks' `scored_places`, one after another.
        """
        token_of = dict(zip(map(id, step.samples), sampled, strict=True))
        next_scores = iter(scores)
        started: list[Sequence] = []
        finished: list[Sequence] = []
        for chunk in step.chunks:
            chunk.prefill.num_done = chunk.end
            self.stats.num_computed_prefill_tokens += chunk.end - chunk.start
            if self.window is not None:
                self._drop_dead_of_leaders(chunk.prefill)
            if chunk.prefill.scored is not None:
                chunk.prefill.scored.scores += islice(next_scores, len(chunk.scored_places))
                if chunk.is_last:
                    finished.append(self._finish_scored(chunk.prefill))
            elif chunk.is_last:
                started += self._fork(chunk.prefill)
        if step.chunks:
            self._prefilling = [p for p in self._prefilling if p.num_done < len(p.token_ids)]
        self._running += started
        for sequence in started if step.chunks else step.running:
            sequence.sampled.append(token_of[id(sequence)])
            self.stats.num_generated_tokens += 1
            reason: FinishReason | None = "length" if len(sequence.sampled) >= sequence.max_new_tokens else None
            if stops(sequence):
                reason = "stop"
            if reason is not None:
                sequence.finish_reason = reason
                self._leave(sequence)
                finished.append(sequence)
            elif self.window is not None:
                self._drop_dead(sequence, sequence.next_position)
        if finished:
            self._running = [s for s in self._running if s.finish_reason is None]
        return finished

    def take_copies(self, home: int) -> list[tuple[int, int]]:
        """Blocks to copy in `home` before the next step, (from, to); forgotten by this call."""
        copies = self.copies.pop(home, [])
        self.copies.clear()
        return copies

    def abort_all(self) -> None:
        """Forget every unfinished sequence and free its blocks."""
        for sequence in self._holders():
            self.homes[sequence.home].release(sequence.take_blocks())
        self._running, self._prefilling, self._waiting = [], [], deque()
        self._load = [HomeLoad() for _ in self.homes]
        self.copies.clear()

    def check_integrity(self) -> None:
        """Every block is free, remembered, or held by an unfinished sequence. ValueError names a leak."""
        for index, home in enumerate(self.homes):
            home.check_integrity(b for s in self._holders() if s.home == index for b in s.held_blocks)
        counted = self._counted_load()
        if counted != self._load:
            raise ValueError(f"scheduler is inconsistent: it knows of {self._load}, under way are {counted}")

    def _counted_load(self) -> list[HomeLoad]:
        """What `_load` must be."""
        load = [HomeLoad() for _ in self.homes]
        for sequence in (*(s for p in self._prefilling for s in p.samples), *self._running):
            load[sequence.home].num_active += 1
        for prefill in self._prefilling:
            mutable = self._num_mutable_blocks(len(prefill.token_ids))
            for index in prefill.leaders:
                num_forks = sum(s.home == index for s in prefill.samples) - 1
                load[index].num_promised += num_forks * mutable
        return load

    def _holders(self) -> list[Sequence]:
        return [*(s for p in self._prefilling for s in p.leaders.values()), *self._running]

    def _add_chunk(self, prefill: Prefill, draft: _Draft) -> None:
        """Add the next chunk of a prefill to the step, as far as it has room for it."""
        start = prefill.num_done
        end = min(start + draft.num_tokens, len(prefill.token_ids))
        if end < len(prefill.token_ids):
            # On a multiple of the unit every shard holds whole blocks, and all of them equally many.
            aligned = end // self.sharding.prefix_unit * self.sharding.prefix_unit
            end = aligned if aligned > start else end
        if prefill.scored is not None:  # logits are as wide as the vocabulary, so few tokens may have theirs at once
            end = min(end, max(start, prefill.first_scored) + draft.num_scored_places)
        if end > start:
            draft.add(Chunk(prefill, start, end))

    def _admit(self) -> Prefill | None:
        """Start the first waiting sequence, with as many equal ones behind it as fit; None when it has to wait."""
        places = self.max_num_seqs - sum(load.num_active for load in self._load)
        if not self._waiting or places <= 0:
            return None
        first = self._waiting[0]
        group = [first]
        if not first.sampled and not first.targets:
            for other in islice(self._waiting, 1, places):
                if other.prompt is not first.prompt or other.sampled or other.targets:
                    break
                group.append(other)
        token_ids = first.all_token_ids
        members = self._deal_to_homes(group)
        while not self._fits(len(token_ids), members):
            if len(group) == 1:
                return None
            members[group.pop().home] -= 1
        for _ in group:
            self._waiting.popleft()
        for load, num_samples in zip(self._load, members, strict=True):
            load.num_active += num_samples
            load.num_promised += max(0, num_samples - 1) * self._num_mutable_blocks(len(token_ids))
        return self._start(token_ids, group)

    def _deal_to_homes(self, group: list[Sequence]) -> list[int]:
        """Each sample to the home with the fewest active ones. Returns how many each home got."""
        before = [load.num_active for load in self._load]
        after = list(before)
        for sequence in group:
            sequence.home = after.index(min(after))
            after[sequence.home] += 1
        return [now - then for now, then in zip(after, before, strict=True)]

    def _fits(self, length: int, members: list[int]) -> bool:
        """Whether every home has the blocks of its leader, and of what its other `members` cannot share with it.

        What the samples of prefills under way will take when they fork is spoken for. Remembered prefixes of this very
        prompt are not counted in: that they are here does not make them free.
        """
        whole, mutable = self.sharding.num_blocks(length), self._num_mutable_blocks(length)
        return all(
            home.has(whole + (num_samples - 1) * mutable + load.num_promised)
            for home, load, num_samples in zip(self.homes, self._load, members, strict=True)
            if num_samples
        )

    def _num_mutable_blocks(self, length: int) -> int:
        """Blocks of a sequence of `length` tokens that samples cannot share when they fork: each takes its own."""
        return self.sharding.num_blocks(length) - self.sharding.num_immutable_blocks(length)

    def _start(self, token_ids: tuple[int, ...], group: list[Sequence]) -> Prefill:
        """Find what is remembered of the tokens, and take blocks for the rest."""
        leaders: dict[int, Sequence] = {}
        for sequence in group:
            leaders.setdefault(sequence.home, sequence)
        # What predicts a token is computed, for its logits; and every home starts where the poorest does.
        needed = len(group[0].prompt.token_ids) - 1 if group[0].targets else len(token_ids) - 1
        known = {h: self.homes[h].prefixes.match(token_ids, needed) for h in leaders}
        shortest = min(map(len, known.values()))
        total = self.sharding.num_blocks(len(token_ids))
        for index, leader in leaders.items():
            home = self.homes[index]
            home.release(known[index][shortest:])
            blocks = known[index][:shortest]
            room = self.sharding.num_blocks(leader.max_cached_tokens) - shortest
            leader.blocks = blocks + home.take(total - shortest, room=room)
        num_done = self.homes[group[0].home].prefixes.tokens_of(known[group[0].home][:shortest])
        self.stats.num_cached_prefill_tokens += num_done
        return Prefill(token_ids, tuple(group), leaders, num_done)

    def _fork(self, prefill: Prefill) -> list[Sequence]:
        """End a prefill: samples share their leader's blocks, but for those that they will write to.

        A sample for which there is no block left goes back to the queue; the others are returned.
        """
        length = len(prefill.token_ids)
        num_shared = self.sharding.num_immutable_blocks(length)
        started, put_back = [], []
        for index, leader in prefill.leaders.items():
            self.homes[index].prefixes.insert(prefill.token_ids, leader.blocks)
        for sequence in prefill.samples:
            home, leader = self.homes[sequence.home], prefill.leaders[sequence.home]
            own = leader.blocks[num_shared:]
            if sequence is not leader:
                self._load[sequence.home].num_promised -= len(own)
            if sequence is leader:
                started.append(sequence)
            elif home.has(len(own)):
                home.pool.share(leader.blocks[leader.num_dropped : num_shared])
                room = self.sharding.num_blocks(sequence.max_cached_tokens) - num_shared
                copied = home.take(len(own), room=room)
                sequence.blocks = leader.blocks[:num_shared] + copied
                sequence.num_dropped = leader.num_dropped
                if own:
                    self.copies.setdefault(sequence.home, []).extend(zip(own, copied, strict=True))
                started.append(sequence)
            else:
                self._load[sequence.home].num_active -= 1
                put_back.append(sequence)
        self._waiting.extendleft(reversed(put_back))
        return started

    def _finish_scored(self, prefill: Prefill) -> Sequence:
        [sequence] = prefill.samples
        sequence.finish_reason = "length"
        self._load[sequence.home].num_active -= 1
        home = self.homes[sequence.home]
        home.prefixes.insert(prefill.token_ids, sequence.blocks)
        home.release(sequence.take_blocks())
        return sequence

    def _extend_running(self) -> None:
        """A slot for the newest token of every running sequence; the youngest of a home make way when it has none."""
        youngest_last: dict[int, list[Sequence]] = {}
        for sequence in self._running:
            if not sequence.blocks:  # preempted by one before it
                continue
            home = self.homes[sequence.home]
            missing = self.sharding.num_blocks(sequence.next_position + 1) - len(sequence.blocks)
            if missing <= 0:
                continue
            while not home.has(missing):
                if sequence.home not in youngest_last:
                    youngest_last[sequence.home] = [s for s in self._running if s.home == sequence.home]
                youngest = youngest_last[sequence.home].pop()
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                after = sequence.held_blocks[-1] if sequence.held_blocks else None
                sequence.blocks += home.take(missing, after=after)
        if youngest_last:
            self._running = [s for s in self._running if s.blocks]

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue, without blocks: who calls takes it out of those that run."""
        self.stats.num_preemptions += 1
        self._leave(sequence)
        self._waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Free a sequence's blocks; its whole units stay remembered as long as nobody needs the room."""
        self._load[sequence.home].num_active -= 1
        home = self.homes[sequence.home]
        computed = sequence.all_token_ids[: sequence.next_position]
        home.prefixes.insert(computed, sequence.blocks)
        home.release(sequence.take_blocks())

    def _drop_dead_of_leaders(self, prefill: Prefill) -> None:
        for index, leader in prefill.leaders.items():
            # A prompt that is sampled again or continued is worth remembering; answers are not hashed block by block.
            self.homes[index].prefixes.insert(prefill.token_ids[: prefill.num_done], leader.blocks)
            self._drop_dead(leader, prefill.num_done)

    def _drop_dead(self, sequence: Sequence, num_cached: int) -> None:
        """Give back the blocks of a sequence that no later query sees, when `num_cached` tokens have KV."""
        assert self.window is not None
        num_dead = self.sharding.num_dead_blocks(num_cached, self.window)
        if num_dead > sequence.num_dropped:
            self.homes[sequence.home].release(sequence.drop_blocks(num_dead))
