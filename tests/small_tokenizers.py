"""Tokenizers of 128 tokens for the tiny models, whose texts meet stop strings often: few letters, many special tokens.

A random model says any token as likely as another, so a vocabulary of pieces over three letters and a space holds every
short text many times over, in pieces that overlap it at either end. Of characters with many bytes there are whole ones
and parts.
"""

from __future__ import annotations

import functools
import itertools
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCAB_SIZE = 128
# No piece of text has a `<`, so what is special in a text can be told by looking.
SPECIAL = ("</s>", "<|end|>", "<|im_end|>", "<|im_start|>", "<|pad|>", "<a>", "<ab>", "<b c>", "<日>", "<>")
WIDE = ("é", "日", "本", "日本", "🙂", "a日", "éb", "🙂 c")
KINDS = ("byte_level", "byte_fallback")

_LETTERS = "abc "
# "d" to "f" are there for Transformers' stop_strings, which measure tokens by how "abcdef" is cut.
_TEXTS = [
    *("a", "b", "c", "d", "e", "f", " ", "\n", "cab a"),
    *("".join(letters) for letters in itertools.product(_LETTERS, repeat=2)),
    *("".join(letters) for letters in itertools.product(_LETTERS, repeat=3)),
    *("".join(letters) for letters in itertools.product("ab", repeat=4)),  # as many as there is room for
]
_BYTES = sorted({byte for text in WIDE for byte in text.encode() if byte >= 0x80})
# Parts of characters, some with what comes before or behind.
_PARTS = [b"\xe6\x97", b"a\xe6", b"\xa5b", b"\xf0\x9f", b"\x99\x82", b"\x9f\x99"]


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One of `KINDS`: bytes as GPT-2 writes them, or words behind "▁" and bytes as a last resort, as Llama 2 has them.

    It decodes as those do; what it encodes is cut into single letters.
    """
    pieces = _byte_level_pieces() if kind == "byte_level" else _byte_fallback_pieces()
    pieces = pieces[: VOCAB_SIZE - len(SPECIAL)]
    random.Random(0).shuffle(pieces)
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    assert len(vocabulary) == VOCAB_SIZE
    if kind == "byte_level":
        backend = Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        extra_special_tokens=list(SPECIAL[1:]),
        clean_up_tokenization_spaces=False,
    )


def _byte_level_pieces() -> list[str]:
    shown = bytes_to_unicode()
    pieces = [bytes([byte]) for byte in _BYTES] + _PARTS + [text.encode() for text in (*WIDE, *_TEXTS)]
    return ["".join(shown[byte] for byte in piece) for piece in pieces]


def _byte_fallback_pieces() -> list[str]:
    # Bytes are tokens of their own here, which no other piece holds.
    pieces = [f"<0x{byte:02X}>" for byte in _BYTES]
    return pieces + [text.replace(" ", "▁") for text in (*WIDE, *_TEXTS)]
