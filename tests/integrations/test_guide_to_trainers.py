"""The guide to adding a trainer: its code lends a model and gets it back bit for bit, on one rank and on two."""

from __future__ import annotations

import pytest

from launching import forked


@pytest.mark.timeout(200)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_trainer_of_the_guide_lends_its_weights_and_trains_on_bit_for_bit(num_ranks: int) -> None:
    run = forked(num_ranks, "tests/integrations/guide_trainer_worker.py", timeout_s=150)
    assert run.returncode == 0, run
    assert len(run.summary["ranks"]) == num_ranks
    for rank in run.summary["ranks"]:
        assert rank["phases"] == [True, True, True] and rank["goes_on_bit_for_bit"], run
        # The controls: one last bit is seen, and without the row the model is not known.
        assert rank["notices_a_last_bit"] and rank["without_a_row"] != "none", run
