"""RULER's synthetic tasks, in its wording. Source of templates, parameters and token counts: NVIDIA/RULER,
`scripts/data/synthetic/{niah,variable_tracking,common_words_extraction,freq_words_extraction}.py`, `constants.py` and
`scripts/synthetic.yaml` (Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
2024). Where RULER downloads essays or word lists, what stands here is made from the word lists of this folder.

Prompts end with RULER's beginning of an answer, as it has them for base models.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Sequence
from itertools import count
from typing import Literal

from cpinfer_tools.evaluation.longctx.haystack import NOISE, Draft, Growing, hide, noise, synthetic_essay
from cpinfer_tools.evaluation.longctx.words import distinct_pairs, distinct_words

Haystack = Literal["noise", "synthetic", "needles"]
Kind = Literal["words", "numbers", "uuids"]
# RULER hides several needles at different ones of 40 depths.
DEPTHS = tuple(i / 39 for i in range(40))
# With fewer tens of coded words two of the four commonest are equally common, and the question has no answer.
LEAST_TENS = 6


def niah(
    rng: random.Random,
    depth: float | None,
    haystack: Haystack,
    key_kind: Kind = "words",
    value_kind: Kind = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Draft:
    """Needles in a haystack: each of `num_keys` keys has `num_values` values, `num_queries` keys are asked for.

    `depth` is where the needle lies when there is only one; the others lie at random ones of `DEPTHS`.
    """
    num_keys = max(num_keys, num_queries)
    keys = [_random(rng, key_kind) for _ in range(num_keys)]
    values = [[_random(rng, value_kind) for _ in range(num_values)] for _ in keys]
    needles = [_needle(key, value, value_kind) for key, each in zip(keys, values, strict=True) for value in each]
    depths = rng.sample(DEPTHS, len(needles))
    if depth is not None and len(needles) == 1:
        depths = [depth]
    units: Growing
    if haystack == "needles":
        units = Growing(lambda: _distractor(rng, key_kind, value_kind, keys))
    else:
        units = noise() if haystack == "noise" else synthetic_essay(rng)
    joint = " " if haystack == "synthetic" else "\n"
    asked = sorted(rng.sample(range(num_keys), num_queries))
    query = _enumerated([keys[i] for i in asked])
    one = num_queries * num_values == 1
    values_word = value_kind[:-1] if one else value_kind
    opening = f"{'A' if one else 'Some'} special magic {values_word} {'is' if one else 'are'} hidden within the "
    opening += f"following text. Make sure to memorize it. I will quiz you about the {values_word} afterwards."
    question = f"What {'is' if one else 'are all'} the special magic {values_word} for {query} mentioned in the "
    question += f"provided text? The special magic {values_word} for {query} mentioned in the provided text "
    question += "is" if one else "are"

    def render(n: int, filler: str) -> str:
        hidden = hide(units.first(n), list(zip(depths, needles, strict=True)))
        context = joint.join([*hidden, filler] if filler else hidden)
        return f"{opening}\n{context}\n{question}"

    references = tuple(value for i in asked for value in values[i])
    return Draft(render, lambda n: joint.join(units.first(n + 2)[n:]), references)


def variable_tracking(rng: random.Random, num_hops: int = 4) -> Draft:
    """One chain of assignments hidden in noise; all variables that have its value are asked for, after one example."""
    example_chain, example_value = _chain(rng, num_hops)
    example_depths = sorted(rng.random() for _ in example_chain)
    example_lines = hide(
        [NOISE] * 5, list(zip(example_depths, _assignments(example_chain, example_value), strict=True))
    )
    example = _tracking("\n".join(example_lines), example_value, num_hops + 1) + " ".join(example_chain)
    chain, value = _chain(rng, num_hops)
    needles = list(zip(sorted(rng.random() for _ in chain), _assignments(chain, value), strict=True))

    def render(n: int, filler: str) -> str:
        lines = hide([NOISE] * n, needles)
        context = "\n".join([*lines, filler] if filler else lines)
        return f"{example}\n\n{_tracking(context, value, num_hops + 1)}".rstrip()

    return Draft(render, lambda n: f"{NOISE}\n{NOISE}", tuple(chain))


def common_words(rng: random.Random, length: int, num_common: int = 10) -> Draft:
    """A numbered list of words in which ten stand far more often than the others, after one example."""
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    example_size = (40, 10, 3) if length >= 4096 else (20, 3, 1)
    example = _example_of_common_words(rng, *example_size, num_common)
    # A number, a full stop and a word are three tokens at least.
    words = distinct_words(rng, num_common + max(1, length // (3 * seldom)))
    common, others = words[:num_common], words[num_common:]
    order = rng.random()

    def render(n: int, filler: str) -> str:
        listed = _shuffled(common * often + others[:n] * seldom, f"{order} {n}")
        return f"{example}\n{_asking_for_common_words(_numbered(listed) + filler, num_common)}"

    def more(n: int) -> str:
        start = num_common * often + n * seldom + 1
        return "".join(f" {start + i}. {word}" for i, word in enumerate(others[n : n + 6 * seldom]))

    return Draft(render, more, tuple(common))


def frequent_words(rng: random.Random, length: int, alpha: float = 2.0) -> Draft:
    """Coded words that follow a Zipf law, of which the commonest are dots; the next three are asked for."""
    coded = ["..."]
    while len(coded) < max(length // 50, 16):
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        if word not in coded:
            coded.append(word)
    # Riemann's zeta: a thousand terms, and the integral of the rest.
    zeta = sum(k**-alpha for k in range(1, 1000)) + 999.5 ** (1 - alpha) / (alpha - 1)
    order = rng.random()

    def render(n: int, filler: str) -> str:
        # Ten more for each unit: the counts of single words change the length by jumps.
        counts = (int(10 * (LEAST_TENS + n) * k**-alpha / zeta) for k in count(1))
        words = [word for word, times in zip(coded, counts, strict=False) for _ in range(times)]
        text = " ".join(_shuffled(words, f"{order} {n}")) + filler
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {text}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text? Answer: According to the coded "
            "text above, the three most frequently appeared words are:"
        )

    return Draft(render, lambda n: " ..." * 64, tuple(coded[1:4]))


def passkey(rng: random.Random, depth: float | None) -> Draft:
    """A number hidden in noise. Source: Mohtashami & Jaggi, "Landmark Attention", 2023."""
    key = str(rng.randint(10000, 99999))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    where = rng.choice(DEPTHS) if depth is None else depth

    def render(n: int, filler: str) -> str:
        lines = hide([NOISE] * n, [(where, needle)])
        context = "\n".join([*lines, filler] if filler else lines)
        return (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz "
            f"you about the important information there.\n{context}\nWhat is the pass key? The pass key is"
        )

    return Draft(render, lambda n: f"{NOISE}\n{NOISE}", (key,))


def _needle(key: str, value: str, value_kind: Kind) -> str:
    return f"One of the special magic {value_kind} for {key} is: {value}."


def _distractor(rng: random.Random, key_kind: Kind, value_kind: Kind, keys: Sequence[str]) -> str:
    """A needle for another key than these."""
    key = keys[0]
    while key in keys:
        key = _random(rng, key_kind)
    return _needle(key, _random(rng, value_kind), value_kind)


def _random(rng: random.Random, kind: Kind) -> str:
    makers: dict[Kind, Callable[[], str]] = {
        "words": lambda: distinct_pairs(rng, 1)[0],
        "numbers": lambda: str(rng.randint(10**6, 10**7 - 1)),
        "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }
    return makers[kind]()


def _enumerated(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f", and {names[-1]}"


def _chain(rng: random.Random, num_hops: int) -> tuple[list[str], str]:
    names: list[str] = []
    while len(names) < num_hops + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    return names, str(rng.randint(10000, 99999))


def _assignments(names: Sequence[str], value: str) -> list[str]:
    sources = [value, *(f"VAR {name}" for name in names)]
    return [f"VAR {name} = {source} " for name, source in zip(names, sources, strict=False)]


def _tracking(context: str, value: str, num_names: int) -> str:
    return (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{num_names} variables are assgined the value {value}, they are: "  # RULER's spelling
    )


def _example_of_common_words(rng: random.Random, num_words: int, often: int, seldom: int, num_common: int) -> str:
    words = distinct_words(rng, num_words)
    common, others = words[:num_common], words[num_common:]
    listed = _shuffled(common * often + others * seldom, str(rng.random()))
    return f"{_asking_for_common_words(_numbered(listed), num_common)} {_numbered(common)}"


def _asking_for_common_words(context: str, num_common: int) -> str:
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{context}\nQuestion: What are the {num_common} most common words in the above list? "
        f"Answer: The top {num_common} words that appear most often in the list are:"
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _shuffled(words: Sequence[str], seed: str) -> list[str]:
    mixed = list(words)
    random.Random(seed).shuffle(mixed)
    return mixed
