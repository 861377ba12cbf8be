"""Special tokens where they can run and are hardly meant: worth a word before somebody reads the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cpinfer.config import SamplingParams
from cpinfer.errors import quoted
from cpinfer.models.spec import ModelSpec


@dataclass(frozen=True)
class Suspicion:
    """`kind` tells it from others, `text` says what is and what to do."""

    kind: str
    text: str


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer and a model take for beginnings and ends of texts.

    Attributes:
        bos: the tokenizer's token that begins a text; None without one.
        eos: the tokenizer's token that ends a text, and how it is written; None without one.
        model_eos: the tokens at which answers of the model end.
    """

    bos: int | None
    eos: tuple[int, str] | None
    model_eos: tuple[int, ...]

    @classmethod
    def of(cls, spec: ModelSpec, tokenizer: Any | None) -> SpecialTokens:
        """Those of a model and its tokenizer, which may be None, or none of Transformers'."""
        bos, eos = (_token(tokenizer, f"{name}_token_id") for name in ("bos", "eos"))
        written = str(getattr(tokenizer, "eos_token", ""))
        return cls(bos, None if eos is None else (eos, written), spec.eos_token_ids)

    def in_prompt(self, index: int, token_ids: Sequence[int]) -> Iterator[Suspicion]:
        """Of a prompt that is a place of its call. One of a single token is a mere beginning, whatever it is called."""
        if len(token_ids) < 2:
            return
        if token_ids[0] == token_ids[1] == self.bos:
            yield Suspicion(
                "two_bos",
                f"prompt {index} begins with two begin-of-text tokens (id {self.bos}), which models are not made for: "
                "the tokenizer adds one to a text that has one. Leave it out of the text, or give token ids "
                "(add_special_tokens=False). Said once, there may be more.",
            )
        if token_ids[-1] in self.model_eos:
            yield Suspicion(
                "ends_in_eos",
                f"prompt {index} ends in an end-of-text token of the model (id {token_ids[-1]}), behind which it has "
                "nothing to say: does the tokenizer add one, or lacks a chat its generation prompt? Leave the token "
                "out. Said once, there may be more.",
            )

    def in_sampling(self, params: SamplingParams) -> Iterator[Suspicion]:
        """Of answers that are to end by themselves, but would not where the tokenizer says a text ends."""
        if self.eos is None or params.ignore_eos:
            return
        token, written = self.eos
        if token not in (*self.model_eos, *params.stop_token_ids) and written not in params.stop:
            yield Suspicion(
                "other_eos",
                f"answers do not end at the tokenizer's end-of-text token ({quoted(written)}, id {token}): the model's "
                f"eos_token_id is {_listed(self.model_eos)}. Put {token} into sampling.stop_token_ids, or into "
                "eos_token_id of the model's generation_config.",
            )


def _token(tokenizer: Any | None, name: str) -> int | None:
    token = getattr(tokenizer, name, None)
    return token if type(token) is int else None


def _listed(tokens: Sequence[int]) -> str:
    return ", ".join(map(str, tokens)) or "none"
