"""What ranks read off their logits, as threads: the owner's first tp rank decides, and all know it."""

import pytest
import torch

from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams
from cpinfer.engine.agreement import Says
from cpinfer.engine.logits_reader import LogitsReader, usable
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.errors import EngineFaultError, NoTokenError
from cpinfer.layout.grid import RankGrid

GRID = RankGrid(tp_size=2, pcp_size=2)
CPU = torch.device("cpu")
REQUESTS = [SampledRequest(Prompt(i, str(i), (1,)), 0, SamplingParams(temperature=0), 4) for i in range(3)]
# Request 0 and 2 on pcp rank 0, request 1 on pcp rank 1.
PLACES = [(0, 0), (1, 0), (0, 1)]
OWN = [[REQUESTS[0], REQUESTS[2]], [REQUESTS[1]]]
WANTED = {0: 4, 1: 6, 2: 1}


def logits_for(requests, tp_rank=0):
    """Rows whose likeliest token is the wanted one on the first tp rank, and another on the others."""
    logits = torch.zeros(len(requests), 8)
    for row, request in enumerate(requests):
        logits[row, (WANTED[request.prompt.index] + tp_rank) % 8] = 5.0
    return logits


def sampled_on(topology, broken_rank=None):
    coords = topology.coords
    own = OWN[coords.pcp_rank]
    logits = logits_for(own, coords.tp_rank)
    if topology.rank == broken_rank:
        logits[0, 3] = torch.nan
    return LogitsReader(topology, CPU, StopChecker((), None)).sample(logits, own, REQUESTS, PLACES, Says.NOTHING)[0]


def test_all_ranks_get_the_tokens_that_the_first_tp_rank_of_each_owner_chose():
    for tokens in run_ranks(GRID, sampled_on):
        assert [token.token_id for token in tokens] == [WANTED[i] for i in range(3)]


@pytest.mark.parametrize("broken_rank", range(4))
def test_logits_that_are_not_finite_on_any_rank_are_an_error_on_all(broken_rank):
    def body(topology):
        with pytest.raises(EngineFaultError, match=rf"rank\(s\) \[{broken_rank}\]"):
            sampled_on(topology, broken_rank)
        return True

    assert all(run_ranks(GRID, body))


def test_a_token_that_is_ruled_out_is_no_fault_and_a_row_without_any_is_one():
    nan, inf = torch.nan, torch.inf
    assert usable(torch.tensor([[-inf, 0.0, -1e30], [3.0, -inf, -inf]])) and usable(torch.zeros(0, 8))
    for row in ([0.0, nan], [0.0, inf], [-inf, -inf], [nan, inf], [-inf, nan]):
        assert not usable(torch.tensor([[0.0, 1.0], row]))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_request_that_is_left_without_a_token_is_named_on_every_rank(temperature):
    """The model rules out all but token 6, and its parameters that one for the first two tokens."""
    params = SamplingParams(temperature=temperature, min_new_tokens=2, stop_token_ids=(6,))

    def body(topology):
        last = SampledRequest(Prompt(2, "third", (1,)), 5, params, 4)
        samples = [*REQUESTS[:2], last]
        own = [[REQUESTS[0], last], [REQUESTS[1]]][topology.coords.pcp_rank]
        logits = torch.full((len(own), 8), -torch.inf)
        logits[:, 6] = 0.0
        reader = LogitsReader(topology, CPU, StopChecker((), None))
        with pytest.raises(NoTokenError, match='prompt "third", sample 5: no token is left to choose behind 0 '):
            reader.sample(logits, own, samples, PLACES, Says.NOTHING)[0]
        last.sampled = [SampledToken(1, 0.0, 0.0)] * 2  # may end now
        return [t.token_id for t in reader.sample(logits, own, samples, PLACES, Says.NOTHING)[0]]

    assert run_ranks(RankGrid(pcp_size=2), body) == [[6, 6, 6]] * 2


def test_all_ranks_get_the_scores_of_every_place():
    def body(topology):
        own = OWN[topology.coords.pcp_rank]
        targets = [WANTED[r.prompt.index] if r.prompt.index else 0 for r in own]
        reader = LogitsReader(topology, CPU, StopChecker((), None))
        return reader.score(logits_for(own), torch.tensor(targets), PLACES, 0, Says.NOTHING)[0]

    likely, unlikely = (float(torch.log_softmax(logits_for(REQUESTS[:1])[0], -1)[i]) for i in (WANTED[0], 0))
    for scores in run_ranks(GRID, body):
        assert [s.is_greedy for s in scores] == [False, True, True]
        assert [s.logprob for s in scores] == pytest.approx([unlikely, likely, likely])
