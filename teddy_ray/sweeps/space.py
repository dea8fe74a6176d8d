"""The search space of a sweep: which settings its trials have, and whether they can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from teddy_ray.errors import InputError, Problem
from teddy_ray.recipe import Axis, Part, Recipe, Role, Sweep
from teddy_ray.recipe_file import closest_key, parse_recipe, part_within, set_key

Settings = Mapping[str, Any]
"""Dotted key of the recipe -> value."""

KINDS = ("grid", "choice", "uniform", "log_uniform")
RANGES = ("uniform", "log_uniform")

NOT_TO_SWEEP = {
    "data.source": "is the data itself",
    "data.test_source": "is read by the winner alone",
    "data.test_fraction": "changes the images that trials are measured on",
    "data.validation": "changes the images that trials are measured on",
    "data.classes": "changes the images that trials are measured on",
    "evaluation.controls": "is the winner's: a trial has those that its objectives need",
    "evaluation.longer_epochs": "is the winner's: sweep evaluation.epochs",
    "evaluation.full_data_epochs": "is the winner's: trials train on small sets alone",
}
"""Keys that trials cannot differ in, and why."""


def sweep_of(recipe: Recipe) -> Sweep:
    """The recipe's sweep. Raises InputError where it has none, or one that contradicts itself."""
    if recipe.sweep is None:
        remedy = "write sweep.space, such as {synthesis.ce_weight: {grid: [0.1, 0.3, 1.0]}}"
        raise InputError([Problem("sweep", None, remedy)])
    if problems := [*_axis_problems(recipe.sweep), *_contradictions(recipe), *_key_problems(recipe.sweep)]:
        raise InputError(problems)
    return recipe.sweep


def trial_recipe(recipe: Recipe, settings: Settings, name: str) -> Recipe:
    """The recipe of a trial: with its settings, of one student and the controls that the objectives need.

    Raises InputError where the settings are wrong, or contradict each other.
    """
    assert recipe.sweep is not None
    tree = with_settings(recipe, settings).model_dump(mode="json")
    tree["name"], tree["sweep"] = name, None
    tree["evaluation"] |= {
        "students": tree["evaluation"]["students"][:1],
        "controls": ["random_soft"] if "improvement" in recipe.sweep.objectives else [],
        "longer_epochs": [],
    }
    return parse_recipe(tree)


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with other values of some keys. Raises InputError where one of them cannot be."""
    tree = recipe.model_dump(mode="json")
    for key, value in settings.items():
        set_key(tree, key, value)
    return parse_recipe(tree)


def kind_of(axis: Axis) -> str:
    """Which of the four an axis is."""
    return next(kind for kind in KINDS if getattr(axis, kind) is not None)


def values_of(axis: Axis) -> tuple[Any, ...]:
    """The values of a list, or the ends of a range."""
    values: tuple[Any, ...] = getattr(axis, kind_of(axis))
    return values


def enumerated(recipe: Recipe) -> list[Settings]:
    """What the trials of a grid, or of random draws, are set to, in order."""
    sweep = sweep_of(recipe)
    if sweep.sampler == "grid":
        lists = [values_of(axis) for axis in sweep.space.values()]
        return [dict(zip(sweep.space, values, strict=True)) for values in itertools.product(*lists)]
    import numpy as np

    domains = tune_domains(recipe)
    draws = []
    for number in range(sweep.trials or 0):
        # of its own for each trial: more of them later leave these as they are
        rng = np.random.default_rng([sweep.seed, number])
        drawn = {key: domain.sample(random_state=rng) for key, domain in domains.items()}
        draws.append(settings_of(recipe, drawn))
    return draws


def tune_domains(recipe: Recipe) -> dict[str, Any]:
    """The space as Ray Tune's domains. Of values that are lists themselves the position is drawn: no sampler takes
    such."""
    from ray import tune

    sweep, domains = sweep_of(recipe), dict[str, Any]()
    for key, axis in sweep.space.items():
        values = values_of(axis)
        if kind_of(axis) not in RANGES:
            domains[key] = tune.choice(range(len(values)) if _by_position(axis) else list(values))
            continue
        low, high = values
        log = kind_of(axis) == "log_uniform"
        if takes_fractions(recipe, key, low, high):
            domains[key] = (tune.loguniform if log else tune.uniform)(low, high)
        else:
            domains[key] = (tune.lograndint if log else tune.randint)(round(low), round(high) + 1)
    return domains


def settings_of(recipe: Recipe, drawn: Mapping[str, Any]) -> Settings:
    """What was drawn from `tune_domains`, as values of the keys."""
    settings: dict[str, Any] = {}
    for key, axis in sweep_of(recipe).space.items():
        value = drawn[key].item() if hasattr(drawn[key], "item") else drawn[key]  # numpy's are no plain values
        settings[key] = values_of(axis)[value] if _by_position(axis) else value
    return settings


def drawn_of(recipe: Recipe, settings: Settings) -> dict[str, Any] | None:
    """The reverse of `settings_of`; None where the space cannot draw these settings."""
    sweep, drawn = sweep_of(recipe), dict[str, Any]()
    if settings.keys() != sweep.space.keys():
        return None
    for key, axis in sweep.space.items():
        values = values_of(axis)
        if kind_of(axis) in RANGES:
            is_number = isinstance(settings[key], int | float) and not isinstance(settings[key], bool)
            if not is_number or not values[0] <= settings[key] <= values[1]:
                return None
            drawn[key] = settings[key]
        elif settings[key] in values:
            drawn[key] = values.index(settings[key]) if _by_position(axis) else settings[key]
        else:
            return None
    return drawn


def ends(recipe: Recipe) -> list[Settings]:
    """Settings in which every value of a list, and both ends of a range, stand once."""
    sweep = sweep_of(recipe)
    lists = {}
    for key, axis in sweep.space.items():
        values = values_of(axis)
        whole = kind_of(axis) in RANGES and not takes_fractions(recipe, key, *values)
        lists[key] = [round(value) for value in values] if whole else list(values)
    num = max(len(values) for values in lists.values())
    return [{key: values[i % len(values)] for key, values in lists.items()} for i in range(num)]


def _by_position(axis: Axis) -> bool:
    return kind_of(axis) not in RANGES and any(isinstance(value, list | dict) for value in values_of(axis))


def takes_fractions(recipe: Recipe, key: str, low: float, high: float) -> bool:
    """Whether a key takes other numbers than whole ones."""
    whole = round((low + high) / 2)
    between = whole + 0.5 if whole + 0.5 < high else (low + high) / 2
    try:
        with_settings(recipe, {key: between})
    except InputError:
        return False
    return True


def _axis_problems(sweep: Sweep) -> Iterator[Problem]:
    """Axes that are no list and no range, or empty ones."""
    for key, axis in sweep.space.items():
        place, found = f"sweep.space.{key}", axis.model_dump(mode="json", exclude_none=True)
        if len(found) != 1:
            yield Problem(place, found, f"name one of {', '.join(KINDS)}, such as {{grid: [1, 2]}}")
            continue
        kind = kind_of(axis)
        values = values_of(axis)
        if kind in RANGES:
            low, high = values
            if not low < high:
                yield Problem(f"{place}.{kind}", list(values), "is an empty range: write [low, high] with low < high")
            elif kind == "log_uniform" and low <= 0:
                yield Problem(f"{place}.{kind}", list(values), "should be above 0")
        elif any(value in values[:index] for index, value in enumerate(values)):
            yield Problem(f"{place}.{kind}", list(values), "should name each only once")
        if (sweep.sampler == "grid") != (kind == "grid"):
            remedy = (
                "should be grid with sweep.sampler grid; or set that to random or optuna, with sweep.trials"
                if sweep.sampler == "grid"
                else f"should be choice with sweep.sampler {sweep.sampler}"
            )
            yield Problem(f"{place}.{kind}", list(values), remedy)


def _contradictions(recipe: Recipe) -> Iterator[Problem]:
    sweep = recipe.sweep
    assert sweep is not None
    if sweep.sampler == "grid" and sweep.trials is not None:
        yield Problem("sweep.trials", sweep.trials, "leave it out with sweep.sampler grid, which has all its trials")
    if sweep.sampler != "grid" and sweep.trials is None:
        yield Problem("sweep.trials", None, f"say how many trials sweep.sampler {sweep.sampler} draws")
    if len(set(sweep.objectives)) < len(sweep.objectives):
        yield Problem("sweep.objectives", list(sweep.objectives), "should name each only once")
    if sweep.stopping is None:
        return
    if sweep.objectives != ("accuracy",):
        remedy = "should be [accuracy] with sweep.stopping: nothing else is measured along the way"
        yield Problem("sweep.objectives", list(sweep.objectives), remedy)
    if sweep.stopping.grace_epochs >= recipe.evaluation.epochs:
        remedy = f"should be below evaluation.epochs, {recipe.evaluation.epochs}"
        yield Problem("sweep.stopping.grace_epochs", sweep.stopping.grace_epochs, remedy)
    if "evaluation.epochs" in sweep.space:
        remedy = "leave it out, or sweep.stopping: trials are compared at the same epochs of equally long trainings"
        yield Problem("sweep.space", "evaluation.epochs", remedy)
    if isinstance(recipe.evaluation.learning_rate, tuple):
        remedy = "should be one rate with sweep.stopping: of several, each has a training of its own"
        yield Problem("evaluation.learning_rate", list(recipe.evaluation.learning_rate), remedy)


def _key_problems(sweep: Sweep) -> Iterator[Problem]:
    """Keys that no trial can differ in."""
    for key in sweep.space:
        place = f"sweep.space.{key}"
        if key in NOT_TO_SWEEP:
            yield Problem(place, key, f"{NOT_TO_SWEEP[key]}; leave it out")
        elif f"{key}.".startswith("pool.base."):
            yield Problem(place, key, "should be the same for all trials: sweep recipes of other bases one by one")
        elif key.split(".")[0] in ("name", "storage", "sweep") or _role(key) is Role.EXECUTION:
            yield Problem(place, key, "changes no result; leave it out")
        elif _role(key) is None:
            pieces = key.split(".")
            known = next(i for i in range(1, len(pieces) + 1) if _role(".".join(pieces[:i])) is None)
            yield Problem(place, key, closest_key(Recipe, pieces[:known]))


def _role(key: str) -> Role | None:
    """Whether a dotted key can change a result; None where there is no such key."""
    part: type[Part] | None = Recipe
    role: Role | None = None
    for piece in key.split("."):
        if part is None or piece not in part.model_fields:
            return None
        info = part.model_fields[piece]
        role = next((found for found in info.metadata if isinstance(found, Role)), None)
        if role is Role.EXECUTION:
            return role
        part = part_within(info.annotation)
    return role


def merged(problems: Iterable[Problem], num_trials: int) -> list[Problem]:
    """Problems of the trials, each once."""
    counts: dict[str, list[Problem]] = {}
    for problem in problems:
        counts.setdefault(str(problem), []).append(problem)
    found = []
    for same in counts.values():
        where = "" if len(same) == num_trials else f" (in {len(same)} of {num_trials} trials)"
        found.append(Problem(same[0].key, same[0].value, same[0].remedy + where))
    return found
