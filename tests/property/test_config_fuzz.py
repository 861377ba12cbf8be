"""Whatever stands in a config, it is a config or a sentence: no traceback, no hang, no page of text.

Shipped configs are changed at a few keys to values that may be right, nearly right or wild; as data, as text with
characters lost, and by overrides. What comes through can be written down and read again as the same.
"""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wild
from cpinfer.config import KEYS_OF_TOOLS, JobConfig, SamplingParams, config_to_dict, load_config, parse_config
from cpinfer.errors import UserError
from cpinfer_tools.run_config import RunConfig, load_run_config, parse_run_config

CONFIGS = [json.loads(p.read_text("utf-8")) for p in sorted((Path(__file__).parents[2] / "configs").glob("*.json"))]
LONGEST_MESSAGE = 400
ONE_CHECK_MS = 5000
QUICK = settings(max_examples=200, deadline=ONE_CHECK_MS, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=5000)


def paths_of(cls, where=()):
    for f in dataclasses.fields(cls):
        yield (*where, f.name)
        if isinstance(f.default_factory, type):
            yield from paths_of(f.default_factory, (*where, f.name))


PATHS = sorted(paths_of(RunConfig))
PLAUSIBLE = st.one_of(
    st.integers(0, 70000),
    st.floats(0, 2),
    st.sampled_from(["float32", "auto", "fp8", "kv", "a2a", "on", "torch", "full", "offline", "transformers", "end"]),
    st.lists(st.integers(0, 9), max_size=3),
    st.lists(st.floats(0, 1), max_size=3),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.integers(0, 9).map(str), st.floats(-5, 5), max_size=3),
    st.booleans(),
    st.none(),
)
UNKNOWN = st.tuples(st.text(max_size=8)) | st.tuples(st.sampled_from(["sampling", "training", "wandb"]), wild.KEYS)
CHANGES = st.lists(
    st.tuples(st.one_of(st.sampled_from(PATHS), st.sampled_from(PATHS), UNKNOWN), PLAUSIBLE | wild.VALUES),
    min_size=1,
    max_size=3,
)


def changed(base, changes):
    data = copy.deepcopy(base)
    for path, value in changes:
        inner = data
        for name in path[:-1]:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner[path[-1]] = value
    return data


def assert_config_or_sentence(make, prefix=0, parse=parse_run_config):
    try:
        config = make()
    except UserError as error:
        assert 0 < len(str(error)) < LONGEST_MESSAGE + prefix
        str(error).encode()
        return None
    assert isinstance(config, RunConfig if parse is parse_run_config else JobConfig)
    written = json.dumps(config_to_dict(config), allow_nan=False)
    assert parse(json.loads(written)) == config
    return config


def check_data(base, changes):
    assert_config_or_sentence(lambda: parse_run_config(changed(base, changes)))
    of_a_job = {name: value for name, value in base.items() if name not in KEYS_OF_TOOLS}
    assert_config_or_sentence(lambda: parse_config(changed(of_a_job, changes)), parse=parse_config)


def check_text(folder, base, changes, damage, overrides):
    try:
        text = json.dumps(changed(base, changes))
    except (RecursionError, ValueError):
        return
    for place, replacement in damage:
        text = text[: place % len(text)] + replacement + text[place % len(text) + 1 :]
    path = folder / "run.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    run = assert_config_or_sentence(lambda: load_run_config(path, overrides), prefix=len(str(path)))
    job = assert_config_or_sentence(lambda: load_config(path), prefix=len(str(path)), parse=parse_config)
    if run is not None and not overrides:
        assert job is not None, "what a tool can read, a job can"


def check_python(cls, changes):
    """A section that is made in Python is made, or refused, as its JSON is; but for lists that are tuples."""
    try:
        made = cls(**changes)
    except UserError as error:
        assert 0 < len(str(error)) < LONGEST_MESSAGE
        return
    hash(made)
    assert dataclasses.replace(made) == made


DATA = (st.sampled_from(CONFIGS), CHANGES)
OVERRIDES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(PATHS).map(".".join), PLAUSIBLE.map(json.dumps) | st.sampled_from(wild.TEXTS)).map(
            "=".join
        ),
        st.text(max_size=8),
    ),
    max_size=2,
)
DAMAGE = st.lists(
    st.tuples(st.integers(0, 10**4), st.sampled_from(["", "{", '"', "\\", "[", ",", "9", "\ud800"])), max_size=2
)
TEXT = (*DATA, DAMAGE, OVERRIDES)
SAMPLING = st.dictionaries(
    st.sampled_from([f.name for f in dataclasses.fields(SamplingParams)]), PLAUSIBLE | wild.VALUES, max_size=3
)
PYTHON = (st.just(SamplingParams), SAMPLING)


@QUICK
@given(*DATA)
def test_data_is_a_config_or_a_sentence(base, changes):
    check_data(base, changes)


@QUICK
@given(*TEXT)
def test_a_file_is_a_config_or_a_sentence(tmp_path_factory, base, changes, damage, overrides):
    check_text(tmp_path_factory.getbasetemp(), base, changes, damage, overrides)


@QUICK
@given(*PYTHON)
def test_what_is_made_in_python_is_whole_or_a_sentence(cls, changes):
    check_python(cls, changes)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(*DATA)
def test_much_data_is_a_config_or_a_sentence(base, changes):
    check_data(base, changes)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(*TEXT)
def test_many_files_are_a_config_or_a_sentence(tmp_path_factory, base, changes, damage, overrides):
    check_text(tmp_path_factory.getbasetemp(), base, changes, damage, overrides)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(*PYTHON)
def test_much_that_is_made_in_python_is_whole_or_a_sentence(cls, changes):
    check_python(cls, changes)
