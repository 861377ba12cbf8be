"""How many positions a model has, by its kind of RoPE; and what is asked beyond them."""

import pytest

from cpinfer.errors import UnsupportedError, UserError
from cpinfer.models.positions import Positions, rope_types

MOST = {"max_position_embeddings": 32768}
ORIGINAL = {"original_max_position_embeddings": 32768}


def of(rope=None, has_table=False, **config):
    return Positions.of({**MOST, "rope_parameters": rope, **config}, has_table=has_table)


def test_yarn_stretches_the_original_length_by_its_factor():
    """The recipe of Qwen2.5 and Qwen3: the factor is added, the maximum stays."""
    assert of({"rope_type": "yarn", "factor": 4.0, **ORIGINAL}) == Positions(131072)
    assert of({"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}) == Positions(163840)
    # As older files say it.
    assert of(rope_scaling={"type": "yarn", "factor": 4.0, **ORIGINAL}) == Positions(131072)


def test_a_maximum_that_has_the_factor_in_it_already_stays():
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    assert of(rope, max_position_embeddings=131072) == Positions(131072)
    assert of(rope, max_position_embeddings=200000) == Positions(200000)


def test_linear_counts_where_its_original_length_is_said():
    """Gemma 3's factor of 8 is in its 131,072 already, and no original length is in its file."""
    assert of({"rope_type": "linear", "factor": 8.0}) == Positions(32768)
    assert of({"rope_type": "linear", "factor": 4.0, **ORIGINAL}) == Positions(131072)


@pytest.mark.parametrize("kind", ["default", "llama3", None])
def test_other_kinds_have_the_maximum_and_may_go_on(kind):
    positions = of({"rope_type": kind, "factor": 8.0, "original_max_position_embeddings": 8192})
    assert positions == Positions(32768)
    assert positions.most(None) == 32768 and positions.most(100) == 100 and positions.most(10**6) == 10**6


def test_of_layers_that_differ_the_widest_counts():
    yarn = {"rope_type": "yarn", "factor": 2.0, **ORIGINAL}
    sets = {"full_attention": yarn, "sliding_attention": {"rope_type": "default"}, "other": None}
    assert of(sets) == Positions(65536)
    assert "default" in rope_types({"rope_parameters": sets})
    assert of({**sets, "sliding_attention": {"rope_type": "dynamic", "factor": 2.0}}) == Positions(32768, "dynamic")


def test_dynamic_ends_where_its_frequencies_begin_to_depend_on_the_length():
    positions = of({"rope_type": "dynamic", "factor": 4.0})
    assert positions.most(None) == positions.most(32768) == 32768
    with pytest.raises(UnsupportedError, match=r'max_model_len=32769 .* 32768 positions with rope_type "dynamic"'):
        positions.most(32769)


def test_a_table_ends_with_its_last_row():
    positions = of(has_table=True)
    assert positions.most(4096) == 4096
    with pytest.raises(UserError, match="max_model_len=40000 for a model of 32768 positions"):
        positions.most(40000)


@pytest.mark.parametrize("factor", [None, "4", [4.0]])
def test_a_factor_that_is_no_number_stretches_nothing(factor):
    assert of({"rope_type": "yarn", "factor": factor, **ORIGINAL}) == Positions(32768)
