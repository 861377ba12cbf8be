"""The scheduler, driven at will, over a cache that holds what its plans write: nobody may ever read another's KV.

The cache is simulated: a slot holds a number that stands for a token *and all tokens before it*, which is what KV is a
function of. Chunks, decode steps and copies write it where plans and schedulers say, on every shard of every home; what
a sequence reads through its block table must then be its own, at every position computed so far that a query sees.
Under a window those are the last few, and what nobody sees any more has been given back.

States of sequences are simulated alike: each step goes on from the number that stands for all tokens before it, which
must be where the sequence says that its state lies, or where that behind a prefix is kept.
"""

from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.engine.scheduler import Scheduler
from cpinfer.kv_cache.home import KVHome
from cpinfer.kv_cache.state_cache import StateCache
from cpinfer.kv_cache.state_pool import StatePool
from cpinfer.layout.decode import plan_decode
from cpinfer.layout.prefill import assign_prompts, plan_prefill, zigzag_split
from cpinfer.layout.shards import KVSharding

EMPTY = 0
VOCAB = 2  # Answers that differ little, so that they too are found again as prefixes.
# Prompts are made of two words, so that they begin alike, and are alike again behind beginnings that differ.
WORD_LENGTH = 5
WORDS = st.sampled_from([(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1)])
PROMPTS = st.lists(st.tuples(WORDS, st.integers(1, 18), st.integers(1, 4), st.integers(1, 9)), max_size=3)
TURNS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 6)), max_size=2)
PRIORITIES = st.sampled_from([0, 0, 0, 1, -2])


class SimulatedKV:
    """The caches of all shards of all homes, `[homes, shards, slots]`, and the numbers that stand for prefixes."""

    def __init__(self, num_homes, num_blocks, sharding, pcp_size):
        self.sharding, self.pcp_size = sharding, pcp_size
        self.slots = np.zeros((num_homes, sharding.num_shards, num_blocks * sharding.block_size), dtype=np.int64)
        self.states = {}  # by (home, slot)
        self._numbers = {}
        self.weights = 0

    def contents(self, token_ids):
        """What the KV of each token is: other tokens before it, or other weights, make another number."""
        return np.array(
            [
                self._numbers.setdefault((self.weights, *token_ids[: i + 1]), len(self._numbers) + 1)
                for i in range(len(token_ids))
            ],
            dtype=np.int64,
        )

    def read(self, home, blocks, length):
        """The KV of the first `length` positions of a block table."""
        positions, table = np.arange(length), np.asarray(blocks, dtype=np.int64)
        kv = np.full(length, EMPTY)
        for shard in range(self.sharding.num_shards):
            slots = self.sharding.slots(table, positions, shard)
            kv[slots >= 0] = self.slots[home, shard][slots[slots >= 0]]
        return kv

    def prefill(self, chunks):
        starts, lens = [c.start for c in chunks], [c.end - c.start for c in chunks]
        split = zigzag_split(lens, self.pcp_size, assigned=assign_prompts(lens, self.pcp_size, context_lens=starts))
        gathered = np.full(self.pcp_size * split.part_len, EMPTY)
        for piece in split.pieces:
            chunk, first = chunks[piece.prompt], piece.pcp_rank * split.part_len + piece.offset
            new = self.contents(chunk.prefill.token_ids)[chunk.start : chunk.end]
            gathered[first : first + piece.num_tokens] = new[piece.start : piece.end]
        for home, shards in enumerate(self.slots):
            leaders = [c.prefill.leaders.get(home) for c in chunks]
            tables = [None if leader is None else leader.blocks for leader in leaders]
            for shard, cache in enumerate(shards):
                plan = plan_prefill(split, tables, self.sharding, pcp_rank=0, shard=shard, context_lens=starts)
                cache[plan.write_slots] = gathered[plan.write_src]

    def decode(self, home, sequences):
        if not sequences:
            return
        new = [self.contents(s.all_token_ids)[-1] for s in sequences]
        positions, tables = [s.next_position for s in sequences], [s.blocks for s in sequences]
        for shard, cache in enumerate(self.slots[home]):
            plan = plan_decode(positions, tables, self.sharding, pcp_size=self.pcp_size, pcp_rank=0, shard=shard)
            for src, slot in zip(plan.write_src, plan.write_slots, strict=True):
                cache[slot] = new[plan.gathered[src]]

    def keep(self, chunk):
        """The state behind a chunk is kept for others, where that is wanted."""
        if chunk.state_place is not None:
            self.states[chunk.state_place] = self.contents(chunk.prefill.token_ids)[chunk.end - 1]

    def advance(self, sequences, token_ids, start, end, begin=None):
        """The states of `sequences`, alike, go on from token `start` to `end`: from the first, or that at `begin`."""
        contents = self.contents(token_ids)
        if sequences[0].state is None:
            assert all(s.state is None for s in sequences)
            return
        places = [(s.home, s.state) for s in sequences]
        found = self.states.get(begin or places[0])
        assert start == 0 or found == contents[start - 1], "the state of another sequence, or time"
        assert len(set(places)) == len(places)
        self.states |= dict.fromkeys(places, contents[end - 1])

    def copy_blocks(self, home, pairs):
        if pairs:
            src, dst = (
                (np.array(blocks)[:, None] * self.sharding.block_size + np.arange(self.sharding.block_size)).reshape(-1)
                for blocks in zip(*pairs, strict=True)
            )
            self.slots[home][:, dst] = self.slots[home][:, src]


class SchedulerKeepsSequencesApart(RuleBasedStateMachine):
    """Groups and turns of sessions come, are chunked, forked, preempted, stopped and aborted, in tiny pools."""

    @initialize(
        num_homes=st.integers(1, 2),
        num_blocks=st.integers(5, 16),
        sharding=st.builds(KVSharding, st.integers(1, 3), st.sampled_from([1, 2, 3, 4]), st.integers(1, 3)),
        max_num_seqs=st.integers(1, 8),
        budget=st.integers(1, 24) | st.just(100),
        prefixes=st.sampled_from([True, True, False]),
        pcp_size=st.integers(1, 3),
        window=st.none() | st.integers(1, 12),
        max_kept_tokens=st.none() | st.integers(0, 40),
        states=st.none() | st.none() | st.tuples(st.integers(1, 3), st.integers(1, 4)),
        num_cached_states=st.integers(0, 3),
    )
    def start(self, **words):
        self.begin(**words)

    def begin(
        self,
        num_homes,
        num_blocks,
        sharding,
        max_num_seqs,
        budget,
        prefixes,
        pcp_size,
        window,
        max_kept_tokens,
        states,
        num_cached_states,
    ):
        self.window = window
        self.sharding, self.budget, self.max_num_seqs = sharding, budget, max_num_seqs
        self.homes = [
            KVHome(
                num_blocks,
                sharding,
                enable_prefix_caching=prefixes and (not states or num_cached_states > 0),
                states=StatePool(*states) if states else None,
            )
            for _ in range(num_homes)
        ]
        cache = StateCache(pcp_size, num_cached_states, 4) if states and num_cached_states else None
        self.scheduler = Scheduler(self.homes, sharding, max_num_seqs, budget, window, max_kept_tokens, cache)
        self.kv = SimulatedKV(num_homes, num_blocks, sharding, pcp_size)
        self.submitted, self.finished, self.tokens_of = [], [], {}
        self.sessions = []  # the last turn of each
        self.num_prompts = 0
        self.is_intact = True  # no step has failed

    # What is inside: a scheduler has no public view of it, and needs none.

    @property
    def waiting(self):
        return list(self.scheduler._waiting)

    @property
    def prefilling(self):
        return list(self.scheduler._prefilling)

    @property
    def running(self):
        return list(self.scheduler._running)

    @property
    def kept(self):
        return list(self.scheduler._kept)

    def holders(self, home):
        """(sequence, how many of its tokens have KV): all that hold blocks of a home."""
        for prefill in self.prefilling:
            if home in prefill.leaders:
                yield prefill.leaders[home], prefill.token_ids, prefill.num_computed_tokens
        for sequence in self.running:
            if sequence.home == home:
                yield sequence, sequence.all_token_ids, sequence.next_position
        for sequence in self.kept:
            if sequence.home == home:
                yield sequence, sequence.all_token_ids, sequence.next_position

    def add(self, token_ids, n, max_new_tokens, priority, **session):
        prompt = Prompt(self.num_prompts, f"p{self.num_prompts}", token_ids)
        self.num_prompts += 1
        fits = self.sharding.num_blocks(len(prompt.token_ids) + max_new_tokens - 1) <= self.homes[0].pool.num_blocks
        for sample_index in range(n):
            sequence = SampledRequest(
                prompt, sample_index, SamplingParams(), max_new_tokens, priority=priority, **session
            )
            try:
                self.scheduler.add(sequence)
            except ValueError:
                assert not fits
            else:
                assert fits
                self.submitted.append(sequence)

    def sample(self, sequence):
        """Like the engine's: a function of prompt, sample and place, so what is drawn again is the same."""
        number = hash((sequence.prompt.index, sequence.sample_index, len(sequence.sampled)))  # of ints: the same always
        return SampledToken(number % VOCAB, -1.0, -1.0)

    @rule(
        prompts=PROMPTS,
        turns=TURNS,
        n=st.integers(0, 6),
        stop_after=st.integers(1, 20),
        are_kept=st.booleans(),
        priority=PRIORITIES,
    )
    def serve(self, prompts, turns, n, stop_after, are_kept, priority):
        """Groups of samples of prompts: a few words, or a conversation that goes on. And then a few steps."""
        for words, length, num_samples, max_new_tokens in prompts:
            tokens = [10 * word + i for word in words for i in range(WORD_LENGTH)]
            self.add(tuple(tokens[:length]), num_samples, max_new_tokens, priority, keeps_kv=are_kept)
        for back, more, max_new_tokens in turns if self.finished else ():
            old = self.finished[-1 - back % len(self.finished)]
            self.add(old.all_token_ids + tuple(range(500, 500 + more)), 1, max_new_tokens, priority)
        self.run_steps(n, stop_after)

    @precondition(lambda self: self.sessions)
    @rule(turns=TURNS, n=st.integers(0, 3), stop_after=st.integers(1, 20), priority=PRIORITIES)
    def take_turns(self, turns, n, stop_after, priority):
        """Sessions go on where they ended."""
        for back, more, max_new_tokens in turns:
            old = self.sessions[-1 - back % len(self.sessions)]
            tokens = old.all_token_ids + tuple(range(500, 500 + more))
            if self.sharding.num_blocks(len(tokens) + max_new_tokens - 1) <= self.homes[0].pool.num_blocks:
                self.sessions.remove(old)
                self.add(tokens, 1, max_new_tokens, priority, keeps_kv=True, continues=old)
            if not self.sessions:
                break
        self.run_steps(n, stop_after)

    def run_steps(self, n, stop_after):
        for _ in range(n):
            self.is_intact = False
            step = self.scheduler.schedule()
            if step is None:
                assert self.scheduler.num_unfinished == 0
                self.is_intact = True
                return
            self.check_step(step)
            self.run_model(step)
            sampled = [self.sample(s) for s in step.samples]
            finished = self.scheduler.commit(step, sampled, lambda s: len(s.sampled) >= stop_after)
            self.check_copies()
            for home, pairs in dict(self.scheduler.blocks_to_copy).items():
                self.kv.copy_blocks(home, pairs)
            self.scheduler.take_blocks_to_copy(0)
            assert self.scheduler.blocks_to_copy == {}
            self.check_finished(finished, stop_after)
            self.check_everything()
            self.is_intact = True

    def check_step(self, step):
        assert bool(step.chunks) != bool(step.running)
        num_tokens = sum(c.end - c.start for c in step.chunks) + len(step.running)
        assert 1 <= num_tokens <= self.budget
        assert len(step.samples) <= self.max_num_seqs
        assert len({id(c.prefill) for c in step.chunks}) == len(step.chunks)
        kept = [c.state_place for c in step.chunks if c.state_place is not None]
        read = {p.state_start for p in self.prefilling}
        assert len(set(kept)) == len(kept) and read.isdisjoint(kept), "read by some, written by others"
        for chunk in step.chunks:
            assert chunk.start == chunk.prefill.num_computed_tokens < chunk.end <= len(chunk.prefill.token_ids)
            for leader in chunk.prefill.leaders.values():
                assert self.sharding.num_blocks(chunk.end) <= len(leader.blocks)
        for sequence in step.running:
            assert self.sharding.num_blocks(sequence.next_position + 1) <= len(sequence.blocks)
        assert step.running == tuple(self.running) or step.chunks
        self.check_everything()  # between schedule and commit, too: a failing step ends here

    def run_model(self, step):
        if step.chunks:
            self.kv.prefill(step.chunks)
        for home in range(len(self.homes)):
            here = [s for s in step.running if s.home == home]
            self.kv.decode(home, here)
            for sequence in here:
                self.check_seen(home, sequence, sequence.all_token_ids, first_query=sequence.next_position)
                self.kv.advance([sequence], sequence.all_token_ids, sequence.next_position, sequence.next_position + 1)
        for chunk in step.chunks:
            prefill = chunk.prefill
            self.kv.advance(prefill.requests, prefill.token_ids, chunk.start, chunk.end, prefill.state_start)
            for home, leader in chunk.prefill.leaders.items():
                self.check_seen(home, leader, chunk.prefill.token_ids[: chunk.end], first_query=chunk.start)
        for chunk in step.chunks:
            self.kv.keep(chunk)

    def check_seen(self, home, sequence, token_ids, first_query):
        """All that queries from `first_query` on see of computed tokens is the sequence's own."""
        first = 0 if self.window is None else max(0, first_query - self.window + 1)
        seen = self.kv.read(home, sequence.blocks, len(token_ids))[first:]
        assert seen.tolist() == self.kv.contents(token_ids)[first:].tolist(), "KV of another sequence"

    def check_copies(self):
        for home, pairs in self.scheduler.blocks_to_copy.items():
            pool, sources, targets = self.homes[home].pool, {a for a, _ in pairs}, [b for _, b in pairs]
            assert len(set(targets)) == len(targets)
            assert sources.isdisjoint(targets)
            assert all(pool.refs(block) <= 1 for block in targets), "a shared block would be overwritten"

    def check_finished(self, finished, stop_after):
        for sequence in finished:
            assert (sequence.blocks == [] and sequence.state is None) or (sequence.keeps_kv and sequence in self.kept)
            if sequence.keeps_kv:
                self.sessions.append(sequence)
            reached = len(sequence.sampled) >= stop_after
            assert sequence.finish_reason == ("stop" if reached else "length")
            assert reached or len(sequence.sampled) == sequence.max_new_tokens
        self.finished += finished

    @invariant()
    def check_everything(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        self.check_places()
        for home in range(len(self.homes)):
            self.check_contents(home)
            self.check_writers(home)

    def check_places(self):
        """Every sample is in exactly one place, with a token for every one it was given."""
        samples = [s for prefill in self.prefilling for s in prefill.samples]
        everywhere = Counter(map(id, (*self.waiting, *samples, *self.running, *self.finished)))
        assert everywhere == Counter(map(id, self.submitted))
        assert len(samples) + len(self.running) <= self.max_num_seqs
        assert self.scheduler.num_unfinished == len(self.submitted) - len(self.finished)
        assert all(s.blocks == [] and s.state is None for s in self.waiting)
        limit = self.scheduler.max_kept_tokens
        for home in range(len(self.homes)):
            assert limit is None or sum(s.next_position for s in self.kept if s.home == home) <= limit
        continued = [s.continues for s in self.waiting if s.continues is not None]
        assert all(s in self.sessions or s in continued for s in self.kept), "nobody would ever continue it"
        order = [s.priority for s in self.waiting]
        assert order == sorted(order)
        for sequence in self.submitted:
            known = self.tokens_of.setdefault(sequence, [])
            assert sequence.token_ids[: len(known)] == known, "a token was lost or changed"
            known[:] = sequence.token_ids

    def check_contents(self, home):
        for sequence, token_ids, num_computed in self.holders(home):
            assert self.sharding.num_blocks(num_computed) <= len(sequence.blocks)
            self.check_seen(home, sequence, token_ids[:num_computed], first_query=num_computed)
            dead = 0 if self.window is None else self.sharding.num_dead_blocks(num_computed, self.window)
            # A prefix that was found is given back with the first chunk behind it.
            assert sequence.num_dropped == dead or (sequence.num_dropped == 0 and sequence not in self.running)
            assert all((block < 0) == (i < sequence.num_dropped) for i, block in enumerate(sequence.blocks))

    def check_writers(self, home):
        """A block that its holder may still write to has no other holder."""
        pool = self.homes[home].pool
        for sequence, _, num_computed in self.holders(home):
            for block in sequence.blocks[self.sharding.num_immutable_blocks(num_computed) :]:
                assert pool.refs(block) == 1

    @rule(num_blocks=st.integers(0, 12))
    def evict(self, num_blocks):
        for home in self.homes:
            before, evictable = home.pool.num_free, next(n for n in count() if not home.prefixes.can_evict(n + 1))
            home.prefixes.evict(num_blocks)
            assert home.pool.num_free >= min(num_blocks, before + evictable)

    @rule(share=st.sampled_from([1, 2, 3]), first=st.integers(0, 2), within_a_step=st.booleans())
    def abort(self, share, first, within_a_step):
        """Streams that are left, also behind a step that was not committed: all requests, or every second or third.

        What the blocks of that step hold must not be remembered, and who stays writes it again.
        """
        self.is_intact = False
        step = self.scheduler.schedule() if within_a_step else None
        if step is not None:
            self.spoil(step)
            if self.homes[0].states is not None:
                self.restart(None)
        unfinished = [s for s in self.submitted if s.finish_reason is None]
        leaving = unfinished[first % share :: share]
        self.scheduler.abort(leaving)
        assert all(s.blocks == [] for s in leaving)
        self.submitted = [s for s in self.submitted if s not in leaving]
        assert share > 1 or self.scheduler.schedule() is None
        self.is_intact = True

    def spoil(self, step):
        """What a step that was not committed may have written: anything, behind what was computed before it."""
        writers = [
            (home, leader.blocks, chunk.start, chunk.end)
            for chunk in step.chunks
            for home, leader in chunk.prefill.leaders.items()
        ] + [(s.home, s.blocks, s.next_position, s.next_position + 1) for s in step.running]
        for home, blocks, start, end in writers:
            positions, table = np.arange(start, end), np.asarray(blocks, dtype=np.int64)
            for shard in range(self.sharding.num_shards):
                slots = self.sharding.slots(table, positions, shard)
                self.kv.slots[home, shard][slots[slots >= 0]] = EMPTY
        for sequence in (*step.running, *(r for c in step.chunks for r in c.prefill.requests)):
            self.kv.states[sequence.home, sequence.state] = EMPTY
        self.kv.states |= {chunk.state_place: EMPTY for chunk in step.chunks}

    @precondition(lambda self: self.sessions)
    @rule(back=st.integers(0, 5))
    def close_session(self, back):
        last = self.sessions.pop(-1 - back % len(self.sessions))
        self.scheduler.let_go(last)
        assert last.blocks == []

    @rule()
    def change_weights(self):
        """KV of old weights must not be found again, whoever is under way."""
        self.kv.weights += 1
        unfinished = [s for s in self.submitted if s.finish_reason is None]
        self.restart(self.kv.weights - 1)
        assert not self.kept and sorted(map(id, self.waiting)) == sorted(map(id, unfinished))
        assert all(home.pool.num_free == home.pool.num_blocks for home in self.homes)
        for sequence in unfinished:
            assert sum(n for _, n in sequence.earlier_weights) == len(sequence.sampled)

    def restart(self, version):
        self.scheduler = self.scheduler.restarted(version)
        self.homes = self.scheduler.homes

    def teardown(self):
        """Everything drains: nobody waits for ever."""
        if not getattr(self, "is_intact", False):
            return
        longest = sum(len(s.all_token_ids) + s.max_new_tokens for s in self.submitted)
        for _ in range(1000 + 20 * longest):
            if self.scheduler.num_unfinished == 0:
                break
            self.run_steps(1, 10**6)
        assert self.scheduler.schedule() is None and len(self.finished) == len(self.submitted)
        for last in self.sessions:
            self.scheduler.let_go(last)
        assert not self.kept
        for home in self.homes:
            home.prefixes.evict(home.pool.num_blocks)
            assert home.pool.num_free == home.pool.num_blocks
            assert home.states is None or home.states.num_free == home.states.num_ranks * home.states.num_slots


class SchedulerFindsTheStateBehindAPrefix(SchedulerKeepsSequencesApart):
    """The same where all sequences have states, and short units, so that prefixes are often found."""

    @initialize(
        num_homes=st.integers(1, 2),
        num_blocks=st.integers(16, 40),
        num_shards=st.integers(1, 2),
        budget=st.integers(3, 24) | st.just(100),
        pcp_size=st.integers(1, 2),
        states=st.tuples(st.integers(1, 2), st.integers(2, 4)),
        num_cached_states=st.integers(1, 3),
    )
    def start(self, num_homes, num_blocks, num_shards, budget, pcp_size, states, num_cached_states):
        sharding, num_seqs = KVSharding(num_shards, 1, 2), 8
        self.begin(
            num_homes, num_blocks, sharding, num_seqs, budget, True, pcp_size, None, None, states, num_cached_states
        )


TestSchedulerFindsTheStateBehindAPrefix = SchedulerFindsTheStateBehindAPrefix.TestCase
TestSchedulerFindsTheStateBehindAPrefix.settings = settings(
    max_examples=60, stateful_step_count=15, deadline=None, derandomize=True
)
TestSchedulerKeepsSequencesApart = SchedulerKeepsSequencesApart.TestCase
TestSchedulerKeepsSequencesApart.settings = settings(
    max_examples=120, stateful_step_count=25, deadline=None, derandomize=True
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_more_programs_keep_sequences_apart():
    long = settings(max_examples=2000, stateful_step_count=25, deadline=None, derandomize=True)
    run_state_machine_as_test(SchedulerKeepsSequencesApart, settings=long)
