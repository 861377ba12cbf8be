"""Lengths in tokens as people write them: `12000`, `12k`, `1m`. k is 1024 and m is 1024 k, as models are named."""

from __future__ import annotations

import argparse
import re

from cpinfer.errors import UserError, quoted

# Digits of other scripts, and superscripts, are digits to Python. More than twelve of them are no length.
_LENGTH = re.compile(r"([0-9]{1,12})([km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 2**10, "m": 2**20}


def parse_length(text: str) -> int:
    """Tokens. UserError for what is no whole number above 0, with or without k or m behind it.

    >>> parse_length("12000"), parse_length("12k"), parse_length("1M")
    (12000, 12288, 1048576)
    """
    found = _LENGTH.fullmatch(text)
    length = int(found[1]) * _UNITS[found[2].lower()] if found else 0
    if length < 1:
        raise UserError(
            f"unknown length {quoted(text)}; a whole number of tokens was wanted, such as 12000, 12k (k is 1024) or 1m."
        )
    return length


def length(text: str) -> int:
    """`parse_length` as argparse wants it, which names the flag."""
    try:
        return parse_length(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
