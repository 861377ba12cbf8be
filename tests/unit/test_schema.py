"""A schema holds JSON and callers in Python to the same: types, bounds, texts, and what numpy and torch hand over."""

import dataclasses

import numpy as np
import pytest
import torch

from cpinfer.config import RolloutConfig, SamplingParams, TensorParallel, config_to_dict
from cpinfer.errors import UserError
from cpinfer.schema import MAX_TEXT, Bounds
from cpinfer_integrations.wandb_config import WandbConfig
from cpinfer_tools.run_config import ComparisonConfig, EvaluationConfig, RunConfig, TrainingConfig, parse_run_config

SCHEMAS = (
    SamplingParams,
    TensorParallel,
    WandbConfig,
    EvaluationConfig,
    ComparisonConfig,
    RolloutConfig,
    TrainingConfig,
    RunConfig,
)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SamplingParams(max_new_tokens=2.5), '"max_new_tokens" is 2.5; a whole number was wanted'),
        (lambda: SamplingParams(max_new_tokens=2.0), '"max_new_tokens" is 2.0; a whole number was wanted'),
        (lambda: SamplingParams(n=True), '"n" is true; a whole number was wanted'),
        (lambda: SamplingParams(seed=None), '"seed" is null; a whole number was wanted'),
        (lambda: SamplingParams(temperature="hot"), '"temperature" is "hot"; a number was wanted'),
        (lambda: SamplingParams(temperature=float("nan")), '"temperature" is NaN; it must be'),
        (lambda: SamplingParams(top_p=np.float32("inf")), '"top_p" is Infinity; it must be'),
        (lambda: SamplingParams(stop_token_ids=[1.5]), '"stop_token_ids[0]" is 1.5; a whole number was wanted'),
        (lambda: SamplingParams(stop_token_ids=[3, -1]), '"stop_token_ids[1]" is -1; it must be at least 0'),
        (lambda: SamplingParams(stop_token_ids=5), '"stop_token_ids" is 5; a list'),
        (lambda: SamplingParams(stop=["a", None]), '"stop[1]" is null; a text was wanted'),
        (lambda: SamplingParams(stop=[b"a"]), '"stop[0]" is'),
        (lambda: SamplingParams(stop=("a", "")), '"stop" is ["a", ""]; it must be free of empty strings'),
        (lambda: SamplingParams(stop="\ud800"), '"stop[0]" is "\\ud800"; a text without NUL'),
        (lambda: SamplingParams(ignore_eos=1), '"ignore_eos" is 1; true or false was wanted'),
        (lambda: SamplingParams(logit_bias=[(1, 2.0), (1, 3.0)]), '"logit_bias" is'),
        (lambda: SamplingParams(logit_bias=[(1, 2.0, 3)]), '"logit_bias[0]" is [1, 2.0, 3]; a pair of'),
        (lambda: SamplingParams(logit_bias={-1: 0}), '"logit_bias[0]" is -1; it must be at least 0'),
        (lambda: SamplingParams(n=10**5000), '"n" is of type int; it must be'),
        (lambda: RunConfig(block_size=16.0), '"block_size" is 16.0; a whole number was wanted'),
        (lambda: RunConfig(model=3), '"model" is 3; a text was wanted'),
        (lambda: RunConfig(model="m" * 5000), f"of 5000 characters; at most {MAX_TEXT} were wanted"),
        (lambda: RunConfig(input="\0"), '"input" is "\\u0000"; a text without NUL'),
        (lambda: RunConfig(dtype="fp8"), '"dtype" is "fp8"; one of "float32"'),
        (lambda: RunConfig(sampling=None), '"sampling" is null; an object with keys temperature'),
        (lambda: RunConfig(sampling=TensorParallel()), '"sampling" is "TensorParallel'),
        (lambda: RunConfig(sampling={"n": 0}), '"sampling.n" is 0; it must be'),
        (lambda: RunConfig(kv_cache_gib=-1), '"kv_cache_gib" is -1; it must be above 0'),
        (lambda: TensorParallel("2"), '"tp_size" is "2"; a whole number was wanted'),
        (lambda: WandbConfig(mode="shared"), '"mode" is "shared"; one of "auto"'),
        (lambda: EvaluationConfig(lengths=[0]), '"lengths[0]" is 0; it must be'),
        (lambda: EvaluationConfig(lengths=[]), '"lengths" is []; it must be a list of one or more'),
        (lambda: EvaluationConfig(seeds=[1, 1]), '"seeds" is [1, 1]; it must be free of repetitions'),
        (lambda: ComparisonConfig(tolerance="small"), '"tolerance" is "small"; a number was wanted'),
        (lambda: RolloutConfig(gather="none"), '"gather" is "none"; one of "full"'),
        (lambda: TrainingConfig(zero_stage=True), '"zero_stage" is true; one of 0, 1, 2, 3 was wanted'),
        (lambda: TrainingConfig(zero_stage=1.0), '"zero_stage" is 1.0; one of 0, 1, 2, 3 was wanted'),
    ],
)
def test_what_is_made_in_python_is_checked_as_its_json_is(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_plainly_meant_is_taken_and_becomes_pythons_own():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        top_p=1,
        max_new_tokens=torch.tensor(7),
        stop="a",
        stop_token_ids=np.array([1, 2]),
        ignore_eos=np.bool_(True),
        logit_bias={np.int32(3): -1},
    )
    plain = SamplingParams(
        temperature=0.5,
        top_k=5,
        top_p=1.0,
        max_new_tokens=7,
        stop=("a",),
        stop_token_ids=(1, 2),
        ignore_eos=True,
        logit_bias=((3, -1.0),),
    )
    assert params == plain and hash(params) == hash(plain)
    for name, value in dataclasses.asdict(plain).items():
        assert type(getattr(params, name)) is type(value), name
    assert type(params.logit_bias[0][0]) is int and type(params.logit_bias[0][1]) is float
    assert SamplingParams(stop=["a", "b"]) == SamplingParams(stop=("a", "b"))
    assert type(SamplingParams(stop=np.str_("a")).stop[0]) is str


def test_one_text_stands_for_a_list_of_it_in_json_too():
    config = parse_run_config({"sampling": {"stop": "a"}, "evaluation": {"tasks": "vt"}})
    assert (config.sampling.stop, config.evaluation.tasks) == (("a",), ("vt",))


def test_a_section_may_be_plain_data():
    assert RunConfig(sampling={"n": 2}, wandb={"name": "x"}) == parse_run_config(
        {"sampling": {"n": 2}, "wandb": {"name": "x"}}
    )


@pytest.mark.parametrize("cls", SCHEMAS, ids=lambda cls: cls.__name__)
def test_a_schema_that_is_right_is_taken_as_it_is(cls):
    """No field of it is made anew, so a copy costs no more than a look."""
    made = cls()
    again = dataclasses.replace(made)
    assert again == made
    assert all(getattr(again, f.name) is getattr(made, f.name) for f in dataclasses.fields(cls))


def numbers_of(cls, where=()):
    """(path, bounds) of every number of a schema with one range."""
    for f in dataclasses.fields(cls):
        if isinstance(f.default_factory, type):
            yield from numbers_of(f.default_factory, (*where, f.name))
        elif isinstance(f.metadata["within"], Bounds):
            yield (*where, f.name), f.metadata["within"], isinstance(f.default, tuple)


NUMBERS = list(numbers_of(RunConfig))


def put(path, value):
    for name in reversed(path):
        value = {name: value}
    return value


@pytest.mark.parametrize("path, bounds, is_list", NUMBERS, ids=lambda x: ".".join(x) if isinstance(x, tuple) else "")
def test_every_number_has_two_ends_and_is_refused_behind_them(path, bounds, is_list):
    low = np.nextafter(bounds.low, 1) if bounds.above_low else bounds.low
    step = 1 if isinstance(bounds.high, int) else bounds.high
    # A least answer is held to the longest, too.
    beside = {"max_new_tokens": 2**30} if path[-1] == "min_new_tokens" else {}
    for good in (float(low) if bounds.above_low else low, bounds.high):
        data = put(path, [good] if is_list else good)
        data.get("sampling", {}).update(beside)
        parse_run_config(data)
    for bad in (-1e-9 if bounds.above_low else bounds.low - 1, bounds.high + step, 10**31, 10**400, -(10**400)):
        with pytest.raises(UserError, match=f"{path[-1]}") as caught:
            parse_run_config(put(path, [bad] if is_list else bad))
        assert len(str(caught.value)) < 400


def test_no_number_is_without_bounds():
    """What is unbounded hangs, or ends in MemoryError, long after anyone looks for it in the config."""

    def is_number(hint):
        return ("int" in hint or "float" in hint) and "Literal" not in hint

    def free(cls):
        for f in dataclasses.fields(cls):
            if isinstance(f.default_factory, type):
                yield from free(f.default_factory)
            elif f.metadata["within"] is None and is_number(str(f.type)):
                yield f.name

    assert list(free(RunConfig)) == []


@pytest.mark.parametrize("token", ["²", "٣", "01", "+1", "-1", " 1", "1.0", "", "9" * 30, "9" * 5000])
def test_a_token_id_in_json_is_written_as_json_writes_numbers(token):
    with pytest.raises(UserError, match=r"sampling\.logit_bias"):
        parse_run_config({"sampling": {"logit_bias": {token: 1}}})


def test_a_nul_is_no_path_but_may_end_an_answer():
    assert SamplingParams(stop="\0").stop == ("\0",)
    with pytest.raises(UserError, match="NUL"):
        RunConfig(model="a\0b")


def test_a_value_that_no_message_can_show_whole_is_cut():
    deep: list = []
    for _ in range(10**5):
        deep = [deep]
    cycle: dict = {}
    cycle["a"] = cycle
    for value in (deep, cycle, "x" * 10**6, [0] * 10**6, 10**5000, {(1, 2): 3}):
        with pytest.raises(UserError) as caught:
            parse_run_config({"kv_cache_gib": value})
        assert len(str(caught.value)) < 200
    with pytest.raises(UserError):
        parse_run_config({"sampling": cycle})


def test_the_way_to_json_and_back_keeps_what_python_gave():
    config = RunConfig(sampling=SamplingParams(stop="a", logit_bias={5: -1e20}), evaluation={"depths": (0, 1)})
    assert parse_run_config(config_to_dict(config)) == config
