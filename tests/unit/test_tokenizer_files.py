"""A tokenizer is loaded from whatever files Transformers takes; one without its vocabulary is an error, not garbage."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from broken_checkpoints import set_in_json
from cpinfer.errors import UserError
from cpinfer.models import loading
from cpinfer.models.loading import load_tokenizer
from cpinfer.models.tokenizer_files import knows_words
from tiny_models import FAMILIES

# Not as an attribute of the package, which is the function of this name as soon as somebody has asked for that.
CONVERTERS = importlib.import_module("transformers.convert_slow_tokenizer")

SHIPPED = Path(__file__).parents[2] / "configs" / "recall-tiny"
TEXT = "the cat sat on the mat; the hat sat on the cat"


def folder_of(path: Path, family: str = "qwen2") -> Path:
    """A folder with a family's config, and no tokenizer."""
    path.mkdir(exist_ok=True)
    FAMILIES[family].save_pretrained(path)
    return path


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "shipped", ignore=shutil.ignore_patterns("*.safetensors")))


def byte_pairs(folder: Path) -> None:
    """vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.model.save(str(folder))


def pieces(folder: Path) -> None:
    """tokenizer.model, as SentencePiece writes it."""
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type = 2  # byte pairs
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = True
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256]  # unknown, control, byte; all others normal
    letters = sorted(set(TEXT.replace(" ", "▁")) | {"▁"})
    words += ["▁t", "he", "at", "▁the", "▁s", "▁sat", *letters]
    for number, word in enumerate(words):
        kind = kinds[number] if number < len(kinds) else 1
        proto.pieces.add(piece=word, score=-float(number), type=kind)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def word_pieces(folder: Path) -> None:
    """vocab.txt, whose family says so in tokenizer_config.json."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", ";", "h", "##at"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")


FORMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "vocab_and_merges": ("qwen2", byte_pairs),
    "sentencepiece": ("llama", pieces),
    "word_pieces": ("llama", word_pieces),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_that_transformers_takes_is_loaded_as_it_loads_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, write = FORMS[name]
    # It wants the package sentencepiece, and reads the file without it.
    monkeypatch.setattr(CONVERTERS, "requires_backends", lambda who, backends: None)
    write(folder_of(tmp_path, family))
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None and type(ours) is type(theirs)
    ids = ours(TEXT)["input_ids"]
    assert ids == theirs(TEXT)["input_ids"] and len(set(ids)) > 5
    assert ours.decode(ids) == theirs.decode(ids)


def test_the_package_that_a_form_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces(folder_of(tmp_path, "llama"))
    monkeypatch.setattr(CONVERTERS, "requires_backends", requires_nothing_that_is_there)
    monkeypatch.setattr(loading, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"tokenizer\.model needs the package sentencepiece: run `pip install sentence"):
        load_tokenizer(str(tmp_path))


def requires_nothing_that_is_there(who: Any, backends: Any) -> None:
    raise ImportError(f"{backends} is not installed")


def test_a_folder_without_any_file_of_a_tokenizer_has_none(tmp_path: Path) -> None:
    folder_of(tmp_path)
    assert load_tokenizer(str(tmp_path)) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert load_tokenizer(str(tmp_path)) is None


# What is left where a vocabulary is lost.


def only(*names: str) -> Callable[[Path], None]:
    def keep(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in ("config.json", *names):
                path.unlink()

    return keep


def without_words(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"] |= {"vocab": {}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")


def truncated(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text[:-300], encoding="utf-8")


def files(**contents: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        only()(folder)
        for name, content in contents.items():
            (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")

    return write


LOST: dict[str, Callable[[Path], None]] = {
    "the_config_alone": only("tokenizer_config.json"),
    "the_special_tokens_alone": files(special_tokens_map__json='{"eos_token": ";"}'),
    "the_added_tokens_alone": files(added_tokens__json='{"<x>": 5}'),
    "no_words": without_words,
    "truncated": truncated,
    "an_empty_vocabulary": files(vocab__json="{}", merges__txt="#version: 0.2\n"),
    "an_empty_object": files(tokenizer__json="{}"),
    "an_empty_file": files(tokenizer__json=""),
    "merges_without_a_vocabulary": files(merges__txt="#version: 0.2\na b\n"),
    "a_vocabulary_of_another_family": files(vocab__txt="[UNK]\nthe\ncat\n"),
    "an_empty_model": files(tokenizer__model=""),
}


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("name", LOST)
def test_a_tokenizer_without_its_vocabulary_is_refused_with_the_files_that_are_there(
    name: str, family: str, shipped: Path
) -> None:
    FAMILIES[family].save_pretrained(shipped)
    LOST[name](shipped)
    left = sorted(
        path.name for path in shipped.iterdir() if path.name.startswith(("tok", "vocab", "mer", "spec", "add"))
    )
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(shipped))
    said = str(caught.value)
    assert said.startswith(f"model {shipped}: its tokenizer could not be read from {', '.join(left)} (")
    assert "A whole tokenizer.json was wanted" in said and "take these files away" in said and "\n" not in said


def test_transformers_itself_makes_garbage_of_such_a_folder(shipped: Path) -> None:
    """What the tests above keep out."""
    only("tokenizer_config.json")(shipped)
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    assert tokenizer("key apple;")["input_ids"] == [tokenizer.eos_token_id]


def of_words(*words: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))


@pytest.mark.parametrize("words", [("[UNK]", "apple", "pear"), ("<0x00>", "b", "c"), ("a", "b")])
def test_a_tokenizer_of_a_few_words_is_a_tokenizer(words: tuple[str, ...]) -> None:
    assert knows_words(PreTrainedTokenizerFast(tokenizer_object=of_words(*words), unk_token="[UNK]"))
    assert not knows_words(PreTrainedTokenizerFast(tokenizer_object=of_words("[UNK]"), unk_token="[UNK]"))


def test_a_tokenizer_that_needs_no_files_is_a_tokenizer() -> None:
    assert knows_words(ByT5Tokenizer())


# Values of the wrong kind.

WRONG: dict[str, list[Any]] = {
    "tokenizer_class": [3, ["Qwen2Tokenizer"]],
    "model_max_length": ["32768", [1], True],
    "chat_template": [3, True, ["a"], {"a": 1}, [{"name": "a"}]],
    "padding_side": ["up", None, 3],
    "truncation_side": ["up", 3],
    "split_special_tokens": ["false", None, 0],
    "add_prefix_space": ["false", 1],
    "add_bos_token": ["false", 1],
    "add_eos_token": ["false", [1]],
    "clean_up_tokenization_spaces": ["false", 0],
    "eos_token": [3, ["</s>"], {"a": 1}],
    "any_other_token": [3, True],
    "added_tokens_decoder": [None, "x", {"a": "b"}, {"3": 4}],
    "additional_special_tokens": ["<a>", [3], {"a": 3}],
    "extra_special_tokens": ["<a>", [None], 3],
    "model_input_names": ["input_ids", [3], None],
    "auto_map": ["x", None, 3],
    "init_inputs": ["x", None],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_the_wrong_kind_is_refused_by_its_name(key: str, shipped: Path) -> None:
    path = shipped / "tokenizer_config.json"
    before = path.read_text(encoding="utf-8")
    for value in WRONG[key]:
        path.write_text(before, encoding="utf-8")
        set_in_json(path, **{key: value})
        with pytest.raises(UserError, match=f'^the model\'s tokenizer_config.json: "{key}" is .* was wanted.$'):
            load_tokenizer(str(shipped))
    path.write_text(before, encoding="utf-8")
    assert load_tokenizer(str(shipped)) is not None


def test_values_of_the_kinds_that_people_have_are_not(shipped: Path) -> None:
    added = {"0": {"content": "<pad>", "special": True, "normalized": False}}
    set_in_json(
        shipped / "tokenizer_config.json",
        model_max_length=1000000000000000019884624838656,
        eos_token={"__type": "AddedToken", "content": ";", "special": True},
        bos_token=None,
        add_bos_token=False,
        add_prefix_space=None,
        chat_template=[{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}],
        additional_special_tokens=["<pad>", {"__type": "AddedToken", "content": "<pad>"}],
        added_tokens_decoder=added,
        auto_map={"AutoTokenizer": ["own.Own", None]},
        unknown_key={"whatever": 3},
    )
    assert load_tokenizer(str(shipped)).eos_token == ";"


@pytest.mark.parametrize("content", ['{"eos_token": 3}', '{"additional_special_tokens": "<a>"}'])
def test_so_is_one_in_the_map_of_special_tokens(content: str, shipped: Path) -> None:
    (shipped / "special_tokens_map.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"^the model's special_tokens_map\.json: "):
        load_tokenizer(str(shipped))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "", "[" * 10**5])
def test_a_file_that_is_no_object_is_an_error_in_a_sentence(name: str, content: str, shipped: Path) -> None:
    (shipped / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="its tokenizer could not be read from"):
        load_tokenizer(str(shipped))
