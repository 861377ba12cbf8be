"""Texts that grow by tokens: their pieces are the whole text, and nothing is told that a stop string may cut off."""

from __future__ import annotations

import random

import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.stop_checker import shown_text, stop_begins_at
from cpinfer_integrations.server_text import ServerTokenizer
from small_tokenizers import KINDS, VOCAB_SIZE, tokenizer_of


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_stream_are_the_whole_text(kind: str) -> None:
    tokenizer, draw = tokenizer_of(kind), random.Random(kind)
    server_tokenizer = ServerTokenizer(tokenizer)
    num_stopped = num_early = 0
    for _ in range(300):
        stop = tuple({"".join(draw.choices("abc日 <>", k=draw.randrange(1, 4))) for _ in range(draw.randrange(3))})
        params = SamplingParams(stop=stop)
        stream = server_tokenizer.stream(stop)
        ids: list[int] = []
        told = ""
        for _ in range(draw.randrange(1, 40)):
            ids.append(draw.randrange(VOCAB_SIZE))
            if stop_begins_at(tokenizer, ids, params) is not None:
                num_stopped += 1
                break
            told += stream.feed(ids[-1:])
        num_early += bool(told)
        whole = shown_text(tokenizer, ids, params)
        assert whole.startswith(told)
        assert told + stream.end(whole) == whole
    assert num_stopped > 50 and num_early > 100
