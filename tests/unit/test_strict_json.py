"""Strict JSON: what the standard library lets pass, and means something else than it says, is refused."""

import json

import pytest

from cpinfer.errors import UserError
from cpinfer.strict_json import NotJSONError, is_unicode, parse_json, read_text
from cpinfer_tools.run_config import load_run_config


@pytest.mark.parametrize(
    "text", ["null", "1", "-1.5e3", '"\\u00e9"', '{"a": [{"b": []}], "c": {}}', "[1e308]", " [ ] "]
)
def test_what_is_json_is_read_as_the_standard_library_reads_it(text):
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1,}', "not valid JSON"),
        ("NaN", "not valid JSON: NaN; a finite number was wanted"),
        ('{"a": {"b": [1, Infinity]}}', '"a.b[1]" is Infinity; a finite number was wanted'),
        ('[{"a": -Infinity}]', '"[0].a" is -Infinity'),
        ('{"a": 1e400}', '"a" is 1e400'),
        ('{"a": 1' + "0" * 500 + ".0}", '"a" is 1000'),
        ("9" * 5000, "not valid JSON"),
        ('{"' + "k" * 5000 + '": NaN}', "is NaN"),
        ('{"\\ud800": NaN}', r'"\ud800" is NaN'),
    ],
)
def test_what_is_no_json_says_so_and_where(text, words):
    with pytest.raises(NotJSONError) as caught:
        parse_json(text)
    assert words in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": 1, "b": 2, "a": 3}', 'the key "a" stands twice'),
        ('{"o": {"a": 1, "a": 1}}', 'the key "a" stands twice'),
        (f'{{"{"k" * 10**4}": 1, "{"k" * 10**4}": 1}}', "stands twice"),
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
    ],
)
def test_json_that_nobody_means_is_refused(text, words):
    with pytest.raises(UserError) as caught:
        parse_json(text)
    assert not isinstance(caught.value, NotJSONError)
    assert words in str(caught.value) and len(str(caught.value)) < 200


def test_halves_of_surrogate_pairs_are_no_unicode():
    assert is_unicode("é\U0001f600\0") and not is_unicode("a\ud83d")


def test_the_mark_before_a_text_is_none_of_it(tmp_path):
    (tmp_path / "run.json").write_bytes(b'\xef\xbb\xbf{"block_size": 8}')
    assert read_text(tmp_path / "run.json") == '{"block_size": 8}'
    assert load_run_config(tmp_path / "run.json").block_size == 8


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"block_size": 8, "block_size": 16}', 'the key "block_size" stands twice'),
        ('{"sampling": {"n": 1, "n": 2}}', 'the key "n" stands twice'),
        ('{"sampling": {"temperature": NaN}}', '"sampling.temperature" is NaN'),
        ("[" * 10**5, "nested too deeply"),
        ('{"model": "~nobody knows/x"}', '"~nobody knows/x" is no path'),
    ],
)
def test_a_config_is_read_strictly_and_its_file_is_named(tmp_path, text, words):
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_run_config(path)
    assert str(caught.value).startswith(f"config {path}: ") and words in str(caught.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ('sampling={"n": 1, "n": 2}', 'the key "n" stands twice'),
        ("sampling=" + "[" * 10**5, "nested too deeply"),
        ("kv_cache_gib=NaN", '"kv_cache_gib" is "NaN"; a number was wanted'),
        ("kv_cache_gib=1e400", '"kv_cache_gib" is "1e400"; a number was wanted'),
        ("sampling.n." + "a." * 10**5 + "b=1", '"sampling.n" is of type dict; a whole number was wanted'),
        ("x" * 10**5, "is not of the form a.b=value"),
        ("x" * 10**5 + "=1", "unknown key"),
        ("a..b=1", 'unknown key "a"'),
        ("sampling.logit_bias.²=1", '"sampling.logit_bias[0]" is'),
        ('input="\\u0000"', '"input" is "\\u0000"'),
    ],
    ids=lambda x: x[:30],
)
def test_an_override_is_read_strictly_too(tmp_path, override, words):
    path = tmp_path / "run.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_run_config(path, [override])
    assert words in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_a_name_that_is_too_long_for_a_folder_is_a_name(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": "m" * 300}), encoding="utf-8")
    assert load_run_config(path).model == "m" * 300
