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

from cpinfer.engine.kv_home import KVHome
from cpinfer.engine.request import FinishReason, SampledToken, Sequence, TokenScore
from cpinfer.errors import EngineFaultError
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
    """What happened, counted: tokens that prefills computed (again after a preemption), and found cached."""

    num_preemptions: int = 0
    num_computed_prefill_tokens: int = 0
    num_cached_prefill_tokens: int = 0


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

    def __post_init__(self) -> None:
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
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        for prefill in self._prefilling:
            budget = self._add_chunk(prefill, budget, chunks)
        while budget > 0 and (admitted := self._admit()) is not None:
            self._prefilling.append(admitted)
            budget = self._add_chunk(admitted, budget, chunks)
        if chunks:
            return Step(tuple(chunks), ())
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
        self._running += started
        for sequence in started if step.chunks else step.running:
            sequence.sampled.append(token_of[id(sequence)])
            reason: FinishReason | None = "length" if len(sequence.sampled) >= sequence.max_new_tokens else None
            if stops(sequence):
                reason = "stop"
            if reason is not None:
                sequence.finish_reason = reason
                self._give_up_blocks(sequence)
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
            self.homes[sequence.home].pool.release(sequence.take_blocks())
        self._running, self._prefilling, self._waiting = [], [], deque()
        self.copies.clear()

    def check_integrity(self) -> None:
        """Every block is free, remembered, or held by an unfinished sequence. ValueError names a leak."""
        for index, home in enumerate(self.homes):
            home.check_integrity(b for s in self._holders() if s.home == index for b in s.held_blocks)

    def _holders(self) -> list[Sequence]:
        return [*(s for p in self._prefilling for s in p.leaders.values()), *self._running]

    def _add_chunk(self, prefill: Prefill, budget: int, chunks: list[Chunk]) -> int:
        """Append the next chunk of a prefill within `budget` tokens; returns what is left of it."""
        start = prefill.num_done
        end = min(start + budget, len(prefill.token_ids))
        if end < len(prefill.token_ids):
            # On a multiple of the unit every shard holds whole blocks, and all of them equally many.
            aligned = end // self.sharding.prefix_unit * self.sharding.prefix_unit
            end = aligned if aligned > start else end
        if prefill.scored is not None:  # logits are as wide as the vocabulary, so few tokens may have theirs at once
            rows = MAX_SCORED_PLACES - sum(len(chunk.scored_places) for chunk in chunks)
            end = min(end, max(start, prefill.first_scored) + rows)
        if end > start:
            chunks.append(Chunk(prefill, start, end))
        return budget - (end - start)

    def _admit(self) -> Prefill | None:
        """Start the first waiting sequence, with as many equal ones behind it as fit; None when it has to wait."""
        num_active = len(self._running) + sum(len(p.samples) for p in self._prefilling)
        places = self.max_num_seqs - num_active
        if not self._waiting or places <= 0:
            return None
        first = self._waiting[0]
        group = [first]
        if not first.sampled and not first.targets:
            for other in islice(self._waiting, 1, places):
                if other.prompt is not first.prompt or other.sampled or other.targets:
                    break
                group.append(other)
        self._deal_to_homes(group)
        token_ids = first.all_token_ids
        while not self._fits(token_ids, group):
            if len(group) == 1:
                return None
            group.pop()
        for _ in group:
            self._waiting.popleft()
        return self._start(token_ids, group)

    def _deal_to_homes(self, group: list[Sequence]) -> None:
        """Each sample to the home with the fewest active ones."""
        load = [0] * len(self.homes)
        for sequence in (s for p in self._prefilling for s in p.samples):
            load[sequence.home] += 1
        for sequence in self._running:
            load[sequence.home] += 1
        for sequence in group:
            sequence.home = load.index(min(load))
            load[sequence.home] += 1

    def _fits(self, token_ids: tuple[int, ...], group: list[Sequence]) -> bool:
        """Whether every home has the blocks of its leader, and of what the others cannot share with it.

        What the samples of prefills under way will take when they fork is spoken for. Remembered prefixes of this very
        prompt are not counted in: that they are here does not make them free.
        """
        whole = self.sharding.num_blocks(len(token_ids))
        for index, home in enumerate(self.homes):
            members = sum(s.home == index for s in group)
            promised = sum(self._num_fork_blocks(p.token_ids, p.samples, index) for p in self._prefilling)
            if members and not home.has(whole + self._num_fork_blocks(token_ids, group, index) + promised):
                return False
        return True

    def _num_fork_blocks(self, token_ids: tuple[int, ...], samples: ListLike[Sequence], home: int) -> int:
        """Blocks that samples of a prefill take in `home` when they fork: all but the leader their own mutable ones."""
        length = len(token_ids)
        mutable = self.sharding.num_blocks(length) - self.sharding.num_immutable_blocks(length)
        return max(0, sum(s.home == home for s in samples) - 1) * mutable

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
            home.pool.release(known[index][shortest:])
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
        self._prefilling.remove(prefill)
        length = len(prefill.token_ids)
        num_shared = self.sharding.num_immutable_blocks(length)
        started, put_back = [], []
        for index, leader in prefill.leaders.items():
            self.homes[index].prefixes.insert(prefill.token_ids, leader.blocks)
        for sequence in prefill.samples:
            home, leader = self.homes[sequence.home], prefill.leaders[sequence.home]
            own = leader.blocks[num_shared:]
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
                put_back.append(sequence)
        self._waiting.extendleft(reversed(put_back))
        return started

    def _finish_scored(self, prefill: Prefill) -> Sequence:
        self._prefilling.remove(prefill)
        [sequence] = prefill.samples
        sequence.finish_reason = "length"
        home = self.homes[sequence.home]
        home.prefixes.insert(prefill.token_ids, sequence.blocks)
        home.pool.release(sequence.take_blocks())
        return sequence

    def _extend_running(self) -> None:
        """A slot for the newest token of every running sequence; the youngest of a home make way when it has none."""
        for sequence in list(self._running):
            if not sequence.blocks:  # preempted by one before it
                continue
            home = self.homes[sequence.home]
            missing = self.sharding.num_blocks(sequence.next_position + 1) - len(sequence.blocks)
            if missing <= 0:
                continue
            while not home.has(missing):
                youngest = next(s for s in reversed(self._running) if s.home == sequence.home)
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                after = sequence.held_blocks[-1] if sequence.held_blocks else None
                sequence.blocks += home.take(missing, after=after)

    def _preempt(self, sequence: Sequence) -> None:
        self.stats.num_preemptions += 1
        self._running.remove(sequence)
        self._give_up_blocks(sequence)
        self._waiting.appendleft(sequence)

    def _give_up_blocks(self, sequence: Sequence) -> None:
        """Free a sequence's blocks; its whole units stay remembered as long as nobody needs the room."""
        home = self.homes[sequence.home]
        computed = sequence.all_token_ids[: sequence.next_position]
        home.prefixes.insert(computed, sequence.blocks)
        home.pool.release(sequence.take_blocks())

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
            self.homes[sequence.home].pool.release(sequence.drop_blocks(num_dead))
