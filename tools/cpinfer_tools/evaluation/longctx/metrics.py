"""What an answer is worth, in [0, 1].

`string_match_all` and `string_match_part` are RULER's (NVIDIA/RULER, `scripts/eval/synthetic/constants.py`), which are
case-insensitive; lm-eval's functions of the same names differ. The exact matches are gsm8k's, to the letter as lm-eval
has them (`tasks/gsm8k/gsm8k.yaml`), whims included: strict wants `#### x`, flexible takes the last number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

Metric = Callable[[str, Sequence[str]], float]


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that the prediction contains.

    >>> string_match_all("It is 17 and BLUE.", ["17", "blue", "red", "5"])
    0.5
    """
    said = _printable(prediction)
    return sum(reference.lower() in said for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 when the prediction contains any of the references.

    >>> string_match_part("it is red", ["blue", "red"])
    1.0
    """
    said = _printable(prediction)
    return float(any(reference.lower() in said for reference in references))


def exact_match_strict(prediction: str, references: Sequence[str]) -> float:
    """1 when the number behind the first `####` is that of a reference.

    >>> exact_match_strict("5 + 7 = 12 #### 12", ["12"]), exact_match_strict("It is 12.", ["12"])
    (1.0, 0.0)
    """
    return _same_number(strict_answer(prediction), references)


def exact_match_flexible(prediction: str, references: Sequence[str]) -> float:
    """1 when the last number of the prediction is that of a reference.

    >>> exact_match_flexible("First 5, then $1,200.", ["1200"])
    1.0
    """
    return _same_number(flexible_answer(prediction), references)


def strict_answer(text: str) -> str | None:
    """The number behind the first `####`, as it stands there; None without one."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1] if found else None


def flexible_answer(text: str) -> str | None:
    """The last number of a text, as it stands there; None without one. `..` counts as one, as it does for lm-eval."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1] if found else None


METRICS: Mapping[str, Metric] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "exact_match_strict": exact_match_strict,
    "exact_match_flexible": exact_match_flexible,
}


def _printable(prediction: str) -> str:
    """As RULER cleans an answer before it looks into it."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()


def _same_number(found: str | None, references: Sequence[str]) -> float:
    return float(found is not None and _plain(found) in {_plain(reference) for reference in references})


def _plain(number: str) -> str:
    """Without thousands separators, currency and one full stop behind it."""
    return re.sub(r"[,$]", "", number).removesuffix(".")
