"""When an answer ends, and what of its text is shown; with a tokenizer whose words take many tokens."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.engine.stop_checker import StopChecker, shown_text
from small_tokenizers import tokenizer_of

EOS = 26


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "configs" / "recall-tiny")


def make_sequence(token_ids, **params):
    sequence = SampledRequest(Prompt(0, "p", (1,)), 0, SamplingParams(**params), 100)
    sequence.sampled = [SampledToken(t, 0.0, 0.0) for t in token_ids]
    return sequence


def stops_after(stop_checker, token_ids, **params):
    """The number of tokens after which an answer that would be `token_ids` ends; None when it does not."""
    for n in range(1, len(token_ids) + 1):
        if stop_checker.stops(make_sequence(token_ids[:n], **params)):
            return n
    return None


def test_an_eos_token_ends_an_answer():
    assert stops_after(StopChecker((EOS, 30), None), [5, 6, 30, 7]) == 3
    assert stops_after(StopChecker((EOS, 30), None), [5, EOS]) == 2
    assert stops_after(StopChecker((), None), [5, EOS]) is None


def test_ignore_eos_ignores_eos_and_nothing_else():
    stop_checker = StopChecker((EOS,), None)
    assert stops_after(stop_checker, [5, EOS, 6], ignore_eos=True) is None
    assert stops_after(stop_checker, [5, EOS, 6], ignore_eos=True, stop_token_ids=(6,)) == 3
    assert stops_after(stop_checker, [5, EOS, 6], ignore_eos=True, stop_token_ids=(EOS,)) == 2


def test_stop_token_ids_end_an_answer_beside_the_models_own():
    stop_checker = StopChecker((EOS,), None)
    assert stops_after(stop_checker, [5, 7, EOS], stop_token_ids=(7, 8)) == 2
    assert stops_after(stop_checker, [5, EOS, 7], stop_token_ids=(7, 8)) == 2


def test_only_the_newest_token_is_asked():
    assert not StopChecker((EOS,), None).stops(make_sequence([EOS, 5]))


@pytest.mark.parametrize("stop", ["valley", "alle", "y o", "ok", " v"])
def test_a_stop_string_is_seen_when_its_last_token_comes(tokenizer, stop):
    ids = tokenizer("the valley was quiet, all of it, ok then")["input_ids"]
    stop_checker = StopChecker((), tokenizer)
    n = stops_after(stop_checker, ids, stop=(stop,))
    text = tokenizer.decode(ids)
    if stop not in text:
        assert n is None
        return
    assert n is not None
    assert stop in tokenizer.decode(ids[:n]) and stop not in tokenizer.decode(ids[: n - 1])


def test_a_stop_string_may_span_many_tokens(tokenizer):
    ids = tokenizer("qqq xxxyyyzzz www")["input_ids"]
    stop = "xxxyyyzzz"
    n = stops_after(StopChecker((), tokenizer), ids, stop=(stop,))
    assert n is not None and len(tokenizer(stop)["input_ids"]) >= 5
    assert tokenizer.decode(ids[:n]).endswith(stop)


def test_a_stop_string_of_characters_with_many_bytes_is_seen(tokenizer):
    stop = "€漢字🙂"
    ids = tokenizer("." * 40 + stop + "...")["input_ids"]
    n = stops_after(StopChecker((), tokenizer), ids, stop=(stop,))
    assert n is not None and tokenizer.decode(ids[:n]).endswith(stop)


@pytest.mark.parametrize("before", ["", "旂", "旂" * 30])
def test_a_stop_string_is_seen_among_characters_that_are_all_spelled_in_bytes(before):
    """A decoder that falls back on bytes shows none of a run of them that begins within a character."""
    tokenizer = tokenizer_of("byte_fallback")
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in f"{before}旂é旂".encode()]
    n = stops_after(StopChecker((), tokenizer), ids, stop=("é",))
    assert n == len(ids) - 3
    assert shown_text(tokenizer, ids[:n], SamplingParams(stop=("é",))) == f"{before}旂"


def test_any_of_several_stop_strings_ends_the_answer(tokenizer):
    ids = tokenizer("one two three")["input_ids"]
    early = stops_after(StopChecker((), tokenizer), ids, stop=("three", "two"))
    assert early is not None and tokenizer.decode(ids[:early]) == "one two"


def test_without_its_stop_string_an_answer_goes_on(tokenizer):
    ids = tokenizer("one two three")["input_ids"]
    assert stops_after(StopChecker((EOS,), tokenizer), ids, stop=("four",)) is None


def test_text_is_cut_before_the_stop_string_that_ended_it_and_tokens_are_not(tokenizer):
    ids = tokenizer("one two three")["input_ids"]
    stop_checker = StopChecker((), tokenizer)
    sequence = make_sequence(ids, stop=("three", "two three"))
    assert stop_checker.text(sequence) == "one "
    assert sequence.token_ids == ids
    assert stop_checker.text(make_sequence(tokenizer("one")["input_ids"], stop=("one",))) == ""
    assert stop_checker.text(make_sequence(ids, stop=("four",))) == "one two three"


def test_text_leaves_special_tokens_out(tokenizer):
    ids = tokenizer("one two")["input_ids"]
    assert StopChecker((EOS,), tokenizer).text(make_sequence([*ids, EOS])) == "one two"


@pytest.mark.parametrize(
    ("stop", "num_tokens", "text"),
    [
        (";", 2, "a"),  # a special token alone
        ("a;", 2, ""),  # mixed
        (";b", 3, "a"),
        ("; ", None, None),
        ("ab", None, None),  # the text without special tokens has it, what was generated has not
        ("d;", 7, "ab c"),
        ("c", 5, "ab "),  # behind a special token
    ],
)
def test_stop_strings_are_looked_for_with_special_tokens_and_text_is_shown_without(tokenizer, stop, num_tokens, text):
    ids = tokenizer("a;b cd;")["input_ids"]
    assert ids.count(EOS) == 2
    assert stops_after(StopChecker((), tokenizer), ids, stop=(stop,)) == num_tokens
    if num_tokens is not None:
        assert StopChecker((), tokenizer).text(make_sequence(ids[:num_tokens], stop=(stop,))) == text


def test_a_piece_of_a_special_token_is_no_text():
    tokenizer = with_end_of_turn()
    ids = tokenizer("hello<|im_end|>")["input_ids"]
    for stop, text in {"<|im_end|>": "hello", "im_end": "hello", "|>": "hello", "o<|im": "hell"}.items():
        assert stops_after(StopChecker((), tokenizer), ids, stop=(stop,)) == len(ids)
        assert StopChecker((), tokenizer).text(make_sequence(ids, stop=(stop,))) == text


def test_text_within_characters_of_many_bytes_is_cut_between_them():
    tokenizer = with_end_of_turn()
    ids = tokenizer("🙂漢<|im_end|>字€")["input_ids"]
    n = stops_after(StopChecker((), tokenizer), ids, stop=("字",))
    assert StopChecker((), tokenizer).text(make_sequence(ids[:n], stop=("字",))) == "🙂漢"
    n = stops_after(StopChecker((), tokenizer), ids, stop=("漢",))
    assert StopChecker((), tokenizer).text(make_sequence(ids[:n], stop=("漢",))) == "🙂"


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer whose words begin with their space, and that drops the one at the beginning of a text (Llama 2's)."""
    words = ["</s>", "\u2581The", "\u2581cat", "s", "\u2581", ".", "<0xC3>", "<0xA9>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_a_stop_string_may_begin_with_the_space_that_decoding_drops(pieces):
    """By brute force: as if every word were spelled with its space, special tokens shown or not."""
    spelled = {i: pieces.convert_ids_to_tokens(i).replace("\u2581", " ") for i in range(6)}
    chance, num_stopped = random.Random(0), 0
    for _ in range(3000):
        ids = [chance.randrange(6) for _ in range(chance.randint(1, 6))]
        stop = chance.choice([" cat", "cat", " The", "e", " ", "  ", "s.", "</s>", ".</", "> T", "s "])
        text, before = ("".join(spelled[i] for i in some) for some in (ids, ids[:-1]))
        place = text.find(stop, max(0, len(before) - len(stop) + 1))
        stopped = StopChecker((), pieces).stops(make_sequence(ids, stop=(stop,)))
        assert stopped == (place >= 0), (ids, stop)
        shown = pieces.decode(ids, skip_special_tokens=True)
        if stopped:
            num_stopped += 1
            end, visible = 0, ""
            for i in ids:
                part = spelled[i][: max(0, place - end)]
                end += len(spelled[i])
                visible += "" if i == 0 else part
            whole = "".join(spelled[i] for i in ids if i)
            shown = visible.removeprefix(" ") if whole.startswith(" ") else visible
        assert StopChecker((), pieces).text(make_sequence(ids, stop=(stop,))) == shown, (ids, stop)
    assert num_stopped > 300


def test_tokens_without_text_within_a_stop_string_do_not_hide_it(tokenizer):
    """Ids of a vocabulary that is padded to a round number decode to nothing."""
    nothing = len(tokenizer) + 5
    assert tokenizer.decode([nothing]) == ""
    a, b = (tokenizer(text)["input_ids"] for text in ("x", "y"))
    ids = [*a * 30, *[nothing] * 40, *b]
    assert stops_after(StopChecker((), tokenizer), ids, stop=("xy",)) == len(ids)
    assert StopChecker((), tokenizer).text(make_sequence(ids, stop=("xy",))) == "x" * 29


def with_end_of_turn():
    """A tokenizer of bytes with a special token of many characters, whose parts are no tokens."""
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "configs" / "recall-tiny")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    return tokenizer


# The rule of min_new_tokens: what ends an answer is none of the m tokens that it has at least (Transformers' `generate`
# holds back end-of-text tokens while fewer than m are there; vLLM looks for stop strings behind them).


def test_a_stop_token_ends_an_answer_behind_the_minimum_alone():
    stop_checker = StopChecker((EOS,), None)
    assert stops_after(stop_checker, [EOS] * 5, min_new_tokens=0) == 1
    assert stops_after(stop_checker, [EOS] * 5, min_new_tokens=1) == 2
    assert stops_after(stop_checker, [EOS] * 5, min_new_tokens=3) == 4


def test_a_stop_string_within_the_minimum_neither_ends_nor_cuts(tokenizer):
    ids = tokenizer("one two three")["input_ids"]
    stop_checker = StopChecker((), tokenizer)
    complete = stops_after(stop_checker, ids, stop=("two",))
    assert stops_after(stop_checker, ids, stop=("two",), min_new_tokens=complete - 1) == complete
    # With one token more it is complete too early, and stays what it is for all that comes behind it.
    assert stops_after(stop_checker, ids, stop=("two",), min_new_tokens=complete) is None
    sequence = make_sequence(ids, stop=("two",), min_new_tokens=complete)
    assert stop_checker.text(sequence) == "one two three"
    twice = tokenizer("one two three two")["input_ids"]
    assert stops_after(stop_checker, twice, stop=("two",), min_new_tokens=complete) == len(twice)
    sequence = make_sequence(twice, stop=("two",), min_new_tokens=complete)
    assert stop_checker.text(sequence) == "one two three "


def test_without_a_tokenizer_there_is_no_text():
    stop_checker = StopChecker((EOS,), None)
    assert stop_checker.text(make_sequence([5, EOS])) is None
    assert stop_checker.stops(make_sequence([5, EOS]))
