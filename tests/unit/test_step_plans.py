"""Plans of steps, all ranks in one process: together they compute every token once, and agree on who computed what."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken, ScoredRequest, TokenScore
from cpinfer.engine.scheduler import Scheduler
from cpinfer.engine.step_plans import StepPlanner
from cpinfer.kv_cache.home import KVHome
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.shards import KVSharding

GRIDS = [RankGrid(), RankGrid(1, 2, 2), RankGrid(1, 4, 2), RankGrid(1, 2, 1), RankGrid(2, 2, 4)]
WINDOWS = (None, 6, None, 6)


def scheduler_of(grid, budget=40, num_blocks=200):
    sharding = KVSharding(grid.dcp_size, 2, 4)
    homes = [KVHome(num_blocks, sharding, enable_prefix_caching=True) for _ in range(grid.num_homes)]
    return Scheduler(homes, sharding, max_num_seqs=16, max_num_batched_tokens=budget)


def planners_of(grid, *, in_buckets=False, row_ranks=None):
    return [
        StepPlanner(
            grid,
            rank,
            KVSharding(grid.dcp_size, 2, 4),
            shard=grid.kv_shard(rank),
            row_ranks=row_ranks or grid.row_ranks,
            in_buckets=in_buckets,
            windows=WINDOWS,
            pairs_per_token=100,
            kv_layout=KVLayout(1, 8, 8),
            min_saved_keys=0,
        )
        for rank in range(grid.world_size)
    ]


def add_requests(scheduler, max_new_tokens=4):
    """Prompts of several lengths with two samples each, and given answers between them."""
    for index, length in enumerate((3, 21, 50, 1)):
        prompt = Prompt(index, str(index), tuple(range(100 * index, 100 * index + length)))
        for sample_index in range(2):
            scheduler.add(SampledRequest(prompt, sample_index, SamplingParams(), max_new_tokens))
        scheduler.add(ScoredRequest(prompt, tuple(range(900, 900 + length))))


def steps_of(grid):
    """Every step of a batch; tokens differ from request to request."""
    scheduler = scheduler_of(grid)
    add_requests(scheduler)
    drawn = iter(range(5000, 6000))
    while (step := scheduler.schedule()) is not None:
        yield step
        scores = [TokenScore(0.0, True) for chunk in step.chunks for _ in chunk.scored_positions]
        scheduler.commit(step, [SampledToken(next(drawn), 0.0, 0.0) for _ in step.samples], lambda r: False, scores)
        scheduler.take_blocks_to_copy(0)


def ranks_of_first_column(grid):
    """One rank for every pcp coordinate: tp ranks of it do the same."""
    return [grid.rank(0, pcp_rank, 0) for pcp_rank in range(grid.pcp_size)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_ranks_of_a_prefill_compute_every_token_of_it_once(grid):
    planners, num_steps = planners_of(grid), 0
    for step in (s for s in steps_of(grid) if s.chunks):
        planned = [planners[rank].prefill(step.chunks) for rank in ranks_of_first_column(grid)]
        expected = sorted(
            (token, place)
            for chunk in step.chunks
            for place, token in enumerate(chunk.prefill.token_ids[chunk.start : chunk.end], chunk.start)
        )
        got = sorted(at for p in planned for at in zip(p.token_ids, p.plan.positions.tolist(), strict=True))
        assert got == expected
        num_steps += 1
    assert num_steps > 2


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_sample_of_a_prefill_is_drawn_where_all_ranks_expect_it_from_the_last_token_of_its_prompt(grid):
    planners, num_drawn = planners_of(grid), 0
    for step in (s for s in steps_of(grid) if s.chunks):
        planned = [planner.prefill(step.chunks) for planner in planners]
        assert all(p.places == planned[0].places for p in planned) and len(planned[0].places) == len(step.samples)
        for request, (pcp_rank, record) in zip(step.samples, planned[0].places, strict=True):
            own = planned[grid.rank(0, pcp_rank, 0)]
            assert own.requests[record] is request
            row = own.kept_rows[own.drawn[record]]
            assert own.token_ids[row] == request.prompt.token_ids[-1]
            num_drawn += 1
    assert num_drawn == 8


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_target_is_asked_of_the_token_before_it(grid):
    planners, pairs = planners_of(grid), []
    for step in (s for s in steps_of(grid) if s.chunks):
        planned = [planner.prefill(step.chunks) for planner in planners]
        wanted = [place for chunk in step.chunks for place in chunk.scored_positions]
        assert all(p.scored.places == planned[0].scored.places for p in planned)
        for place, (pcp_rank, record) in zip(wanted, planned[0].scored.places, strict=True):
            own = planned[grid.rank(0, pcp_rank, 0)]
            row = own.kept_rows[len(own.sampled_rows) + record]
            assert own.plan.positions[row] == place
            pairs.append((own.token_ids[row], own.targets[record]))
    texts = [(*range(100 * i, 100 * i + n), *range(900, 900 + n)) for i, n in enumerate((3, 21, 50, 1))]
    expected = [pair for text in texts for pair in list(pairwise(text))[len(text) // 2 - 1 :]]
    assert sorted(pairs) == sorted(expected)


@pytest.mark.parametrize("in_buckets", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_running_request_is_computed_where_all_ranks_expect_it(grid, in_buckets):
    planners, num_steps = planners_of(grid, in_buckets=in_buckets), 0
    for step in (s for s in steps_of(grid) if s.running):
        planned = [planner.decode(step.running) for planner in planners]
        assert all(np.array_equal(p.places, planned[0].places) for p in planned)
        computed = [r for rank in ranks_of_first_column(grid) for r in planned[rank].requests]
        assert sorted(map(id, computed)) == sorted(map(id, step.running))
        for request, (pcp_rank, record) in zip(step.running, planned[0].places.tolist(), strict=True):
            own = planned[grid.rank(0, pcp_rank, 0)]
            assert own.requests[record] is request and own.token_ids[record] == request.last_token_id
            assert own.plan.positions[record] == request.next_position
        num_steps += 1
    assert num_steps > 1


@pytest.mark.parametrize("in_buckets, on_first_rank", [(False, 7), (True, 8)])
def test_steps_that_are_replayed_have_one_of_few_numbers_of_rows_on_every_rank(in_buckets, on_first_rank):
    grid = RankGrid(1, 2, 2)
    scheduler = scheduler_of(grid)
    for i in range(13):
        scheduler.add(SampledRequest(Prompt(i, str(i), (i,)), 0, SamplingParams(), 4))
    scheduler.commit(scheduler.schedule(), [SampledToken(i, 0.0, 0.0) for i in range(13)], lambda r: False)
    running = scheduler.schedule().running
    planned = [planner.decode(running) for planner in planners_of(grid, in_buckets=in_buckets)]
    assert [len(p.requests) for p in planned] == [on_first_rank, 13 - on_first_rank]
    assert [len(p.plan.own) for p in planned] == [on_first_rank] * 2


def test_a_home_without_requests_has_no_plan_and_a_plan_has_rows_for_every_window():
    grid = RankGrid(1, 2, 1)
    planners = planners_of(grid)
    scheduler = scheduler_of(grid)
    scheduler.add(SampledRequest(Prompt(0, "0", (1, 2, 3)), 0, SamplingParams(), 4))
    step = scheduler.schedule()
    scheduler.commit(step, [SampledToken(5, 0.0, 0.0)], lambda r: False)
    running = scheduler.schedule().running
    here, there = (planners[rank].decode(running) for rank in (running[0].home, 1 - running[0].home))
    assert there.plan is None and there.requests == [] and np.array_equal(there.places, here.places)
    assert list(here.rows) == [None, 6]


def decoded(planner, running):
    """What a planner says of a step, as plain values."""
    planned = planner.decode(running)

    def values(rows):
        return [getattr(rows, name).tolist() for name in ("kv_lo", "kv_hi", "block_indptr", "block_ids")]

    rows = {window: values(r) for window, r in planned.rows.items()}
    if planned.cut is not None:
        cut = planned.cut
        rows["cut"] = [values(cut.shared), values(cut.own), cut.own.places_of_tables.tolist(), cut.num_saved_keys]
    plan = planned.plan
    arrays = [] if plan is None else [plan.own, plan.positions, plan.gathered, plan.write_src, plan.write_slots]
    return planned.requests, planned.token_ids, planned.places.tolist(), [a.tolist() for a in arrays], rows


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("is_short_of_blocks", [False, True])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_plans_that_go_on_are_those_of_a_planner_that_saw_no_step_before(grid, is_short_of_blocks, is_ahead):
    num_blocks = 200 if not is_short_of_blocks else 28 if grid.dcp_size == 1 else 22
    scheduler, kept, num_steps = scheduler_of(grid, num_blocks=num_blocks), planners_of(grid), 0
    num_cut = num_ahead = 0
    add_requests(scheduler, max_new_tokens=30)
    while (step := scheduler.schedule()) is not None:
        for planner, fresh in zip(kept, planners_of(grid), strict=True):
            if not step.chunks:
                num_ahead += planner._ahead is not None
                planned = decoded(planner, step.running)
                assert planned == decoded(fresh, step.running)
                if is_ahead:
                    planner.plan_ahead()
                num_cut += "cut" in planned[-1]
        num_steps += not step.chunks
        if num_steps == 9:  # a prompt that comes later
            scheduler.add(SampledRequest(Prompt(9, "9", tuple(range(17))), 0, SamplingParams(), 12))
        scores = [TokenScore(0.0, True) for chunk in step.chunks for _ in chunk.scored_positions]
        scheduler.commit(step, [SampledToken(7, 0.0, 0.0)] * len(step.samples), lambda r: False, scores)
    assert num_steps >= 30
    assert bool(num_ahead) == is_ahead
    assert num_cut >= 20 or grid.num_homes > 1, "samples of a prompt are to have something in common"
    assert bool(scheduler.stats.num_preemptions) == is_short_of_blocks


def running_in(blocks, planner):
    """A request that runs in `blocks`, as a planner saw it a step ago."""
    request = SampledRequest(Prompt(0, "0", tuple(range(5))), 0, SamplingParams(), 9)
    request.blocks = blocks
    request.sampled.append(SampledToken(3, 0.0, 0.0))
    running = (request,)
    decoded(planner, running)
    request.sampled.append(SampledToken(4, 0.0, 0.0))
    return running


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("change", ["other blocks", "no step since", "two steps since", "another request"])
def test_a_plan_goes_on_only_where_the_same_run_a_token_further_in_the_same_blocks(change, is_ahead):
    grid = RankGrid()
    (planner,), (fresh,) = planners_of(grid), planners_of(grid)
    running = running_in([3, 4], planner)
    if is_ahead:
        planner.plan_ahead()
    (request,) = running
    if change == "other blocks":
        request.blocks = [6, 5]
    elif change == "no step since":
        request.sampled.pop()
    elif change == "two steps since":
        request.sampled.append(SampledToken(5, 0.0, 0.0))
    else:
        running = running_in(request.blocks, fresh)
    assert decoded(planner, running) == decoded(fresh, running)


def test_a_block_that_came_since_is_taken_up_and_one_that_is_missing_is_an_error():
    (planner,) = planners_of(RankGrid())
    running = running_in([3, 4], planner)
    running[0].sampled += [SampledToken(5, 0.0, 0.0)]
    decoded(planner, running)
    running[0].sampled += [SampledToken(6, 0.0, 0.0)]
    planner.plan_ahead()
    assert planner._ahead is None, "it cannot know the block"
    with pytest.raises(IndexError):
        planner.decode(running)
    running[0].blocks.append(9)
    assert decoded(planner, running)[-1][None][-1] == [3, 4, 9]


def test_plans_are_made_without_torch():
    program = "import sys, cpinfer.engine.step_plans; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
