"""The search space of a sweep: what its trials are set to, and what is wrong with it."""

from typing import Any

import pytest
from conftest import TINY

from teddy_ray.errors import InputError
from teddy_ray.recipe import Recipe
from teddy_ray.recipe_file import dump_recipe, load_recipe, parse_recipe
from teddy_ray.sweeps.space import drawn_of, ends, enumerated, settings_of, sweep_of, trial_recipe, tune_domains

IPC, WEIGHT, STEPS = "synthesis.images_per_class", "synthesis.ce_weight", "synthesis.steps"


def swept(space: dict[str, Any], **sweep: Any) -> Recipe:
    return parse_recipe({**TINY, "sweep": {"space": space, **sweep}})


def problems(space: dict[str, Any], **sweep: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        enumerated(swept(space, **sweep))
    return [str(problem) for problem in caught.value.problems]


def test_a_grid_is_every_combination_the_last_key_fastest() -> None:
    settings = enumerated(swept({IPC: {"grid": [1, 5]}, WEIGHT: {"grid": [0.1, 1.0]}}))
    assert [tuple(each.values()) for each in settings] == [(1, 0.1), (1, 1.0), (5, 0.1), (5, 1.0)]
    assert all(list(each) == [IPC, WEIGHT] for each in settings)


def test_draws_are_of_their_number_alone_so_that_more_of_them_keep_the_first() -> None:
    space = {WEIGHT: {"log_uniform": [0.01, 10]}, IPC: {"choice": [1, 2, 4]}, STEPS: {"uniform": [10, 50]}}
    few, more = (enumerated(swept(space, sampler="random", trials=n, seed=3)) for n in (5, 40))
    assert more[:5] == few
    assert enumerated(swept(space, sampler="random", trials=5, seed=4)) != few
    assert {each[IPC] for each in more} == {1, 2, 4}
    assert all(type(each[STEPS]) is int and 10 <= each[STEPS] <= 50 for each in more)
    weights = [each[WEIGHT] for each in more]
    assert all(type(weight) is float and 0.01 <= weight <= 10 for weight in weights)
    assert 8 < sum(weight < 0.316 for weight in weights) < 32  # the middle of the logarithms


def test_the_ends_of_a_range_of_whole_numbers_are_drawn() -> None:
    settings = enumerated(swept({IPC: {"uniform": [1, 3]}}, sampler="random", trials=30))
    assert {each[IPC] for each in settings} == {1, 2, 3}


def test_what_is_drawn_and_what_it_means_are_each_other_s_reverse() -> None:
    recipe = swept(
        {"pool.snapshots": {"choice": [[1, 3], [2, 3]]}, WEIGHT: {"uniform": [0.1, 1]}}, sampler="optuna", trials=1
    )
    drawn = {key: domain.sample() for key, domain in tune_domains(recipe).items()}
    settings = settings_of(recipe, drawn)
    assert settings["pool.snapshots"] in ([1, 3], [2, 3])
    assert drawn_of(recipe, settings) == drawn
    assert drawn_of(recipe, {**settings, WEIGHT: 2.0}) is None
    assert drawn_of(recipe, {**settings, "pool.snapshots": [1, 2]}) is None
    assert drawn_of(recipe, {WEIGHT: 0.5}) is None


def test_ends_hold_every_value_once() -> None:
    recipe = swept({IPC: {"uniform": [1, 4]}, WEIGHT: {"choice": [0.1, 0.2, 0.3]}}, sampler="optuna", trials=1)
    assert ends(recipe) == [{IPC: 1, WEIGHT: 0.1}, {IPC: 4, WEIGHT: 0.2}, {IPC: 1, WEIGHT: 0.3}]


def test_a_trial_has_its_settings_one_student_and_no_controls_but_those_of_its_objectives() -> None:
    recipe = swept({IPC: {"grid": [1, 2]}}, objectives=["accuracy"])
    own = trial_recipe(recipe, {IPC: 2}, "one")
    assert (own.name, own.sweep, own.synthesis.images_per_class) == ("one", None, 2)
    assert (own.evaluation.controls, own.evaluation.longer_epochs) == ((), ())
    assert recipe.evaluation.controls
    better = swept({IPC: {"grid": [1, 2]}}, objectives=["improvement", "bytes"])
    assert trial_recipe(better, {IPC: 2}, "one").evaluation.controls == ("random_soft",)


def test_the_sweep_changes_nothing_of_the_run_itself(tmp_path: Any) -> None:
    """And a recipe with a sweep comes back from its file."""
    recipe = swept({IPC: {"grid": [1, 2]}}, stopping={"grace_epochs": 1})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("space", "sweep", "words"),
    [
        ({"synthesis.ce_wieght": {"grid": [1]}}, {}, ["sweep.space.synthesis.ce_wieght", "'ce_weight'"]),
        ({"synthesys.steps": {"grid": [1]}}, {}, ["sweep.space.synthesys.steps", "'synthesis'"]),
        ({"synthesis.num_workers": {"grid": [1, 2]}}, {}, ["changes no result"]),
        ({"storage": {"grid": ["a", "b"]}}, {}, ["changes no result"]),
        ({"pool.base.mean": {"grid": [0.4, 0.5]}}, {}, ["the same for all trials"]),
        ({"data.validation": {"grid": [0.1, 0.2]}}, {}, ["measured on"]),
        ({WEIGHT: {}}, {}, ["name one of grid, choice, uniform, log_uniform"]),
        ({WEIGHT: {"grid": [1], "choice": [2]}}, {}, ["name one of grid"]),
        ({WEIGHT: {"uniform": [1, 1]}}, {"sampler": "random", "trials": 2}, [f"{WEIGHT}.uniform", "empty range"]),
        ({WEIGHT: {"log_uniform": [0, 1]}}, {"sampler": "random", "trials": 2}, ["above 0"]),
        ({WEIGHT: {"grid": [1, 2, 1]}}, {}, ["only once"]),
        ({WEIGHT: {"choice": [1, 2]}}, {}, ["should be grid", "sweep.trials"]),
        ({WEIGHT: {"grid": [1, 2]}}, {"sampler": "optuna", "trials": 2}, ["should be choice"]),
        ({WEIGHT: {"choice": [1, 2]}}, {"sampler": "random"}, ["sweep.trials", "how many"]),
        ({WEIGHT: {"grid": [1, 2]}}, {"trials": 2}, ["sweep.trials", "leave it out"]),
        ({WEIGHT: {"grid": [1, 2]}}, {"objectives": ["accuracy", "accuracy"]}, ["sweep.objectives", "only once"]),
        ({WEIGHT: {"grid": [1, 2]}}, {"stopping": {"grace_epochs": 99}}, ["grace_epochs", "evaluation.epochs, 4"]),
        (
            {WEIGHT: {"grid": [1, 2]}},
            {"stopping": {"grace_epochs": 1}, "objectives": ["accuracy", "bytes"]},
            ["should be [accuracy]"],
        ),
        ({"evaluation.epochs": {"grid": [2, 4]}}, {"stopping": {"grace_epochs": 1}}, ["equally long"]),
    ],
)
def test_wrong_sweeps_are_named(space: dict[str, Any], sweep: dict[str, Any], words: list[str]) -> None:
    text = "\n".join(problems(space, **sweep))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"space": {}}, ["sweep.space"]),
        ({"space": {WEIGHT: {"grid": []}}}, ["grid", "at least 1 item"]),
        ({"space": {WEIGHT: [0.1, 1.0]}}, [f"sweep.space.{WEIGHT}", "mapping", "grid, choice, uniform, log_uniform"]),
        ({"space": {WEIGHT: {"choice": [1]}}, "sampler": "random", "trials": 0}, ["sweep.trials", "0"]),
        ({"space": {WEIGHT: {"grid": [1]}}, "objectives": ["speed"]}, ["sweep.objectives", "'accuracy'", "'seconds'"]),
    ],
)
def test_what_the_types_refuse(sweep: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe({**TINY, "sweep": sweep})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_recipe_without_a_sweep_is_told_how_to_write_one() -> None:
    with pytest.raises(InputError, match=r"sweep: found None; write sweep.space"):
        sweep_of(parse_recipe(TINY))
