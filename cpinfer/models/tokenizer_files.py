"""The files of a tokenizer: whether there are any, whether a tokenizer has such values, and whether it knows words.

Transformers makes a tokenizer of a folder that has lost its vocabulary, in silence: of one that knows its special
tokens alone. What was loaded is asked, for each family keeps its vocabulary in files of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpinfer.models.config_values import is_real, wrong_value

# What a tokenizer may be in, of whatever family; `chat_template*` is a template for one.
PATTERNS = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_Kind = tuple[str, Callable[[Any], bool]]


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the files in a folder that a tokenizer is made of; empty when there is none."""
    return sorted({path.name for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})


def check_tokenizer_values(values: Mapping[str, Any], file: str) -> None:
    """UserError for the first value of a tokenizer_config.json, or special_tokens_map.json, that no tokenizer has."""
    for name, value in values.items():
        is_token = name.endswith("_token") and not name.startswith("add_")
        wanted, is_right = _KINDS.get(name) or (_TOKEN if is_token else _ANY)
        if not is_right(value):
            raise wrong_value(values, name, wanted, file)


def knows_words(tokenizer: Any) -> bool:
    """Whether texts become tokens that are neither special nor added: two, for all that is unknown may become one."""
    others = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    found: set[int] = set()
    for token_id in tokenizer.get_vocab().values():
        if token_id not in others:
            text = tokenizer.decode([token_id])
            found.update(set(tokenizer.encode(text, add_special_tokens=False)) - others)
        if len(found) > 1:  # as a rule by the second word
            return True
    return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, Mapping) and _is_text(value.get("content")))


def _are_tokens(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_token, value.values()))
    return value is None or (isinstance(value, list) and all(_is_token(x) and x is not None for x in value))


def _is_template(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_text, value.values()))
    if isinstance(value, list):
        return all(isinstance(x, Mapping) and _is_text(x.get("name")) and _is_text(x.get("template")) for x in value)
    return value is None or isinstance(value, str)


def _are_added(value: Any) -> bool:
    return isinstance(value, Mapping) and all(str(k).isdecimal() and _is_token(v) for k, v in value.items())


_ANY: _Kind = ("anything", lambda value: True)
_TOKEN: _Kind = ("a token, as a text or an object, or null", _is_token)
_TOKENS: _Kind = ("a list of tokens, or an object of them,", _are_tokens)
_FLAG: _Kind = ("true or false", lambda value: isinstance(value, bool))
_FLAG_OR_NULL: _Kind = ("true, false or null", lambda value: value is None or isinstance(value, bool))
_SIDE: _Kind = ('"left" or "right"', lambda value: value in ("left", "right"))
# What Transformers reads of such a file, and takes as it is or complains of without a name.
_KINDS: dict[str, _Kind] = {
    "tokenizer_class": ("a text or null", lambda value: value is None or isinstance(value, str)),
    "model_max_length": ("a number or null", lambda value: value is None or is_real(value)),
    "chat_template": ("a template (a text, or several with their names), or null,", _is_template),
    "padding_side": _SIDE,
    "truncation_side": _SIDE,
    "split_special_tokens": _FLAG,
    "add_prefix_space": _FLAG_OR_NULL,
    "add_bos_token": _FLAG_OR_NULL,
    "add_eos_token": _FLAG_OR_NULL,
    "clean_up_tokenization_spaces": _FLAG_OR_NULL,
    "legacy": _FLAG_OR_NULL,
    "added_tokens_decoder": ("an object from ids to tokens", _are_added),
    "additional_special_tokens": _TOKENS,
    "extra_special_tokens": _TOKENS,
    "model_input_names": ("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "auto_map": ("an object or a list", lambda value: isinstance(value, (Mapping, list))),
    "init_inputs": ("a list", lambda value: isinstance(value, list)),
}
