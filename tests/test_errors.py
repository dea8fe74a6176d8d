import pickle

import pytest

from teddy_ray.errors import InputError, Problem, StageError


def test_a_problem_reads_as_key_value_and_remedy():
    assert str(Problem("data.channels", "2", "should be 1 or 3")) == "data.channels: found '2'; should be 1 or 3"


def test_an_input_error_lists_every_problem_on_a_line_of_its_own():
    problems = [Problem("a.b", 1, "do this"), Problem("c", None, "do that")]
    assert str(InputError(iter(problems))) == "a.b: found 1; do this\nc: found None; do that"


def test_an_input_error_without_a_problem_is_refused():
    with pytest.raises(AssertionError):
        InputError([])


def test_a_stage_error_names_stage_item_and_reason():
    assert str(StageError("synthesis", "classes 0-4", "loss is nan")) == "synthesis: classes 0-4: loss is nan"


def test_an_input_error_survives_pickle_with_its_problems():
    error = InputError([Problem("a", [1, 2], "remedy"), Problem("b", {"x": None}, "other")])
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is InputError
    assert copy.problems == error.problems
    assert str(copy) == str(error)


def test_a_stage_error_survives_pickle_with_its_parts():
    copy = pickle.loads(pickle.dumps(StageError("pool", "convnet/seed0", "reason")))
    assert type(copy) is StageError
    assert (copy.stage, copy.item, copy.reason) == ("pool", "convnet/seed0", "reason")
