import argparse
import doctest

import pytest

from cpinfer.errors import UserError
from cpinfer_tools import lengths
from cpinfer_tools.lengths import length, parse_length


def test_examples_hold():
    found = doctest.testmod(lengths)
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    "text, tokens",
    [("12000", 12000), ("12k", 12288), ("128K", 131072), ("17k", 17408), ("1m", 2**20), ("2M", 2**21), ("1", 1)],
)
def test_any_number_of_tokens_may_be_said_in_k_or_m(text, tokens):
    assert parse_length(text) == tokens == length(text)


@pytest.mark.parametrize("text", ["", "k", "0", "0k", "-1", "1.5k", "12kb", "12 k", "²", "٤", "²k", "9" * 5000])
def test_what_is_no_length_is_refused_with_examples(text):
    with pytest.raises(UserError, match=r"unknown length .* such as 12000, 12k \(k is 1024\) or 1m"):
        parse_length(text)


def test_argparse_names_the_flag_of_a_bad_length(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq-len", type=length)
    assert parser.parse_args(["--seq-len", "12k"]).seq_len == 12288
    with pytest.raises(SystemExit):
        parser.parse_args(["--seq-len", "12q"])
    assert '--seq-len: unknown length "12q"' in capsys.readouterr().err
