import pytest

from cpinfer.engine.prompts import naming
from cpinfer.errors import UnsupportedError, UserError


@pytest.mark.parametrize("kind", [UserError, UnsupportedError])
def test_an_error_about_one_of_many_things_knows_which_and_what_is_wrong_with_it_alone(kind: type[UserError]) -> None:
    with pytest.raises(kind) as caught, naming("prompt", 3):
        raise kind("it is empty.")
    assert (str(caught.value), caught.value.place, caught.value.reason) == ("prompt 3: it is empty.", 3, "it is empty.")
    assert type(caught.value) is kind


def test_an_error_about_nothing_in_particular_has_no_place() -> None:
    error = UserError("no model is named.")
    assert (error.place, error.reason) == (None, "no model is named.")


def test_the_outermost_of_things_within_things_has_the_place() -> None:
    with pytest.raises(UserError) as caught, naming("task", 1), naming("prompt", 3):
        raise UserError("it is empty.")
    assert (str(caught.value), caught.value.place, caught.value.reason) == (
        "task 1: prompt 3: it is empty.",
        1,
        "prompt 3: it is empty.",
    )
