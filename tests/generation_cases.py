"""Random cases of generation, for the fuzzer: a model, a layout, prompts with their options, turns of conversation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpinfer.config import SamplingParams
from cpinfer.layout.grid import RankGrid
from every_family import OFTEN
from small_tokenizers import KINDS, SPECIAL, VOCAB_SIZE, WIDE, tokenizer_of

GRIDS = [(1, 1)] * 6 + [(2, 2)] * 3 + [(2, 1), (3, 3), (3, 1), (4, 4), (4, 2)]
NUM_POSITIONS = 512
# What no stop string has: behind it, none can have begun in the prompt.
NEVER_IN_STOPS = "\n"


@dataclass(frozen=True)
class Case:
    """What is run, with nothing left to chance.

    `options[i]` are those of `prompts[i]` that are not the defaults of `SamplingParams`. `turns`: tokens that are put
    behind prompt and answer, for a next call on the same engine. `spare_blocks`: the pool holds the longest sequence,
    and so many KV blocks; None is plenty. `max_model_len`: the engine's, and where Transformers is told to end.
    `transformers_stops`: the reference stops by Transformers' own rule.
    """

    seed: int
    family: str
    tokenizer: str
    eos: tuple[int, ...]
    pcp_size: int
    dcp_size: int
    config: Mapping[str, Any]
    prompts: tuple[tuple[int, ...], ...]
    options: tuple[Mapping[str, Any], ...]
    turns: tuple[tuple[int, ...], ...] = ()
    spare_blocks: int | None = None
    max_model_len: int = NUM_POSITIONS
    masks_vocabulary: bool = False
    transformers_stops: bool = False

    @property
    def grid(self) -> RankGrid:
        """Its layout."""
        return RankGrid(pcp_size=self.pcp_size, dcp_size=self.dcp_size)

    @property
    def sampling(self) -> list[SamplingParams]:
        """The options of each prompt, whole."""
        return [SamplingParams(**options) for options in self.options]


def case_of(seed: int) -> Case:
    """The case of a seed: the same for ever, as long as nobody changes what follows."""
    r = random.Random(seed)
    pcp_size, dcp_size = r.choice(GRIDS)
    kind = r.choice(KINDS)
    transformers_stops = r.random() < 0.15
    prompts, max_model_len = _prompts(r)
    if transformers_stops:
        last = tokenizer_of(kind).convert_tokens_to_ids(_piece(kind, NEVER_IN_STOPS))
        prompts = tuple((*prompt, last) for prompt in prompts)
    shared = _options(r, kind, prompts[0], transformers_stops)
    alike = r.random() < 0.5
    options = tuple(shared if alike else _options(r, kind, prompt, transformers_stops) for prompt in prompts)
    num_turns = 0 if transformers_stops else r.choice((0, 0, 0, 1, 1, 2))
    turns = tuple(tuple(r.randrange(VOCAB_SIZE) for _ in range(r.choice((1, 2, 9)))) for _ in range(num_turns))
    return Case(
        seed,
        r.choice(OFTEN),
        kind,
        tuple(r.sample(range(VOCAB_SIZE), r.choice((0, 2, 8, 24)))),
        pcp_size,
        dcp_size,
        _config(r, dcp_size, max(map(len, prompts))),
        prompts,
        options,
        turns,
        spare_blocks=r.choice((None, None, 0, 1, 3)),
        max_model_len=max_model_len,
        masks_vocabulary=r.random() < 0.2,
        transformers_stops=transformers_stops,
    )


def _prompts(r: random.Random) -> tuple[tuple[tuple[int, ...], ...], int]:
    """One to nine prompts, some of one token, some that begin alike, some that are the same; and the most positions."""

    def some(length: int) -> tuple[int, ...]:
        return tuple(r.randrange(VOCAB_SIZE) for _ in range(length))

    how = r.random()
    if how < 0.15:
        return (some(r.choice((1, 5, 33, 70))),) * r.choice((2, 4, 8)), NUM_POSITIONS
    if how < 0.35:
        shared = some(r.choice((1, 16, 40, 64)))
        return (shared, *(shared + some(r.choice((1, 3, 20))) for _ in range(r.choice((1, 2, 4))))), NUM_POSITIONS
    if how < 0.43:  # with their answers they reach the limit
        most = r.choice((12, 50, 50, NUM_POSITIONS))
        return (some(most - r.randint(2, 10)), some(3)), most
    return tuple(some(r.choice((1, 1, 2, 3, 7, 20, 48, 90))) for _ in range(r.choice((1, 2, 3, 4)))), NUM_POSITIONS


def _options(r: random.Random, kind: str, prompt: Sequence[int], transformers_stops: bool) -> dict[str, Any]:
    def now_and_then(share: float) -> bool:
        return r.random() < share

    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": r.choice((1, 2, 4, 8, 12, 20))}
    if now_and_then(0.4):
        options |= {"temperature": r.choice((0.4, 0.7, 1.0, 1.3)), "seed": r.randrange(2**64)}
        options["n"] = r.choice((1, 1, 2, 3))
        for key, values in {
            "top_k": (-1, 1, 3, 40, 500),
            "top_p": (0.3, 0.9, 0.999),
            "min_p": (0.02, 0.3, 1.0),
        }.items():
            if now_and_then(0.35):
                options[key] = r.choice(values)
    elif now_and_then(0.1):
        options["n"] = 2
    if transformers_stops or now_and_then(0.55):
        stop = stop_of_transformers if transformers_stops else stop_of
        stops = [stop(r) for _ in range(r.choice((1, 1, 2, 4)))]
        if not transformers_stops and now_and_then(0.25):  # one that begins in the prompt
            stops.append(tokenizer_of(kind).decode(prompt)[-r.randint(1, 2) :].strip("\ufffd") + r.choice("abc "))
        options["stop"] = tuple(dict.fromkeys(stops))
    if now_and_then(0.3):
        options["stop_token_ids"] = tuple(r.sample(range(VOCAB_SIZE), r.choice((1, 4, 12))))
    if now_and_then(0.2):
        options["ignore_eos"] = True
    if now_and_then(0.35):
        least = r.choice((1, 1, 2, 3, options["max_new_tokens"]))
        options["min_new_tokens"] = min(least, options["max_new_tokens"])
        if transformers_stops:  # whose stop strings end answers before the minimum, too
            del options["min_new_tokens"]
    if now_and_then(0.3):
        options["repetition_penalty"] = r.choice((0.7, 1.1, 1.5, 4.0))
    if now_and_then(0.4):
        options["logit_bias"] = _bias(r, kind)
    if now_and_then(0.15):
        options["top_logprobs"] = r.choice((1, 4, 500))
    if now_and_then(0.12):
        options["prompt_logprobs"] = True
    if now_and_then(0.3):
        options["kept_token_ids"] = True
    return options


def stop_of(r: random.Random) -> str:
    """A stop string: plain, of many bytes, special, a piece of a special token, or two of these in one."""

    def part() -> str:
        how = r.random()
        if how < 0.9:
            return _whole_part(r)
        special = r.choice(SPECIAL)
        start = r.randrange(len(special))
        return special[start : r.randint(start + 1, len(special))]

    return part() + (part() if r.random() < 0.3 else "")


def stop_of_transformers(r: random.Random) -> str:
    """One that Transformers' `stop_strings` takes and means as we do.

    Some token has to end it, so it is of whole parts.
    """
    return _whole_part(r) + (_whole_part(r) if r.random() < 0.3 else "")


def _whole_part(r: random.Random) -> str:
    how = r.random()
    if how < 0.6:
        return "".join(r.choice("abc ") for _ in range(r.choice((1, 2, 2, 3, 3, 4))))
    return r.choice(WIDE if how < 0.8 else SPECIAL)


def _bias(r: random.Random, kind: str) -> tuple[tuple[int, float], ...]:
    """Against or for some tokens: a few that are likely then, of which an answer is made."""
    how = r.random()
    if how < 0.4:
        return tuple((token, r.choice((-100.0, -3.0, 2.5, 6.0))) for token in r.sample(range(VOCAB_SIZE), 10))
    tokenizer = tokenizer_of(kind)
    pieces = {token: tokenizer.decode([token]) for token in range(VOCAB_SIZE)}
    # Parts of characters are made whole only where there is nothing else to say.
    parts = [token for token, text in pieces.items() if "\ufffd" in text]
    letters = r.sample([token for token in pieces if token not in parts], 8)
    chosen = letters if how < 0.6 else parts if how < 0.75 else parts + letters[:3]
    return tuple((token, 40.0) for token in chosen)


def _config(r: random.Random, dcp_size: int, longest: int) -> dict[str, Any]:
    config: dict[str, Any] = {"block_size": r.choice((1, 2, 4, 5, 16))}
    if r.random() < 0.5:
        config["cp_kv_cache_interleave_size"] = r.choice((1, 3, 4, 16))
    if r.random() < 0.5:
        config["max_num_batched_tokens"] = max(r.choice((1, 7, 16, 33, 100)), longest // 10)  # else it takes seconds
    if r.random() < 0.3:
        config["max_num_seqs"] = r.choice((1, 2, 3))
    if r.random() < 0.2:
        config["enable_prefix_caching"] = False
    if r.random() < 0.3:
        config["context_exchange"] = r.choice(("queries", "kv"))
        config["context_workspace_tokens"] = r.choice((5, 40))
    if dcp_size > 1 and r.random() < 0.4:
        config["decode_exchange"] = r.choice(("ag_rs", "replicate_q"))
    if r.random() < 0.3:
        config["cascade_attention"] = r.choice(("on", "off"))
    return config


def _piece(kind: str, text: str) -> str:
    [token] = tokenizer_of(kind).tokenize("a" + text)[-1:]
    return token
