"""Logs: silent until somebody listens, the rank in every record, everything put back."""

import io
import logging
import subprocess
import sys

import pytest

from cpinfer.logs import RankLogger, log_to


def logged(level, *, rank=1, world_size=2, speaks=True):
    stream = io.StringIO()
    with log_to(level, stream, rank, world_size):
        RankLogger("cpinfer.engine.attach", rank, world_size, speaks=speaks).shared("KV pool of %d tokens", 64)
        logging.getLogger("cpinfer.models.loading").info("loading %s", "a model")
    return [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]


def test_every_record_names_its_rank_once_where_there_are_several():
    assert logged("info") == [
        "INFO cpinfer.engine.attach: rank 1: KV pool of 64 tokens",
        "INFO cpinfer.models.loading: rank 1: loading a model",
    ]
    assert "rank" not in "".join(logged("info", rank=0, world_size=1))


def test_what_all_know_one_rank_says_and_the_others_at_debug():
    assert len(logged("info", speaks=False)) == 1 and len(logged("debug", speaks=False)) == 2
    assert logged("warning") == []


def test_a_handler_of_the_users_sees_the_rank_as_a_field_and_in_the_message(caplog):
    with caplog.at_level(logging.INFO, logger="cpinfer"):
        RankLogger("cpinfer.engine.attach", 3, 4).shared("x")
    [record] = caplog.records
    assert record.rank == 3 and record.world_size == 4 and record.getMessage() == "rank 3: x"


def test_a_logger_may_be_shown_while_others_stay_quiet():
    stream, shown = io.StringIO(), logging.getLogger("cpinfer.trl")
    with log_to("warning", stream, shown=["cpinfer.trl"]):
        shown.info("heard")
        shown.debug("too much")
        logging.getLogger("cpinfer.engine").info("not asked for")
    assert stream.getvalue().endswith("INFO cpinfer.trl: heard\n") and stream.getvalue().count("\n") == 1
    assert shown.level == logging.NOTSET


def test_what_was_set_is_put_back_also_after_an_error():
    logger, root = logging.getLogger("cpinfer"), logging.getLogger()
    before = (logger.level, list(logger.handlers), root.level, list(root.handlers))
    with pytest.raises(ZeroDivisionError), log_to("debug", io.StringIO()):
        assert logger.level == logging.DEBUG and (root.level, root.handlers) == before[2:]
        raise ZeroDivisionError
    assert (logger.level, logger.handlers, root.level, root.handlers) == before


def test_a_library_that_nobody_listens_to_says_nothing():
    """Python writes warnings of a logger without any handler to stderr; cpinfer has one that drops them."""
    program = "import logging, {}; logging.getLogger('{}.engine').warning('x')"

    def said(package):
        command = [sys.executable, "-c", program.format(package, package)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr

    assert said("cpinfer") == "" and said("json") == "x\n"
