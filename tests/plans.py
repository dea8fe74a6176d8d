"""A recipe of the digits with its plan, and ways to change it, for tests of what follows from what."""

import typing
from pathlib import Path

from teddy_ray.plan import STAGES, Plan
from teddy_ray.pool_plan import DataFacts, Given
from teddy_ray.recipe import Curriculum, Part, Recipe, Role
from teddy_ray.recipe_file import load_recipe
from teddy_ray.rows import ROWS

DIGITS = load_recipe(Path(__file__).parents[1] / "pipelines/recipes/digits.yaml")
FACTS = DataFacts(
    classes=tuple("abcdefghij"), counts=(20,) * 10, num_test=30, train="train", validation="validation", test="test"
)


def leaves(part=Recipe, prefix=""):
    for name, info in part.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Part):
            yield from leaves(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


LEAVES = dict(leaves())
RESULT = [key for key, info in LEAVES.items() if Role.RESULT in info.metadata]
EXECUTION = [key for key, info in LEAVES.items() if Role.EXECUTION in info.metadata]
DATA = [key for key in RESULT if key.startswith("data.")]
MOSAIC = [key for key in RESULT if key.startswith("synthesis.mosaic.")]


def change(part, key, value):
    head, _, rest = key.partition(".")
    return part.model_copy(update={head: change(getattr(part, head), rest, value) if rest else value})


def get(part, key):
    for name in key.split("."):
        part = getattr(part, name)
    return part


def another(value, annotation=None):
    """A value unlike the given one: another choice where there is one."""
    choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
    if others := [choice for choice in choices if choice != value]:
        return others[0]
    match value:
        case bool():
            return not value
        case int():
            return value - 1 if value > 1 else value + 1
        case float():
            return value * 0.75 + 0.01
        case str():
            return f"{value}-other"
        case tuple():
            return (another(value[0]), *value[1:])
        case None:
            return "other"
    raise AssertionError(value)


FULL = change(
    change(change(DIGITS, "statistics.scope", "blend"), "synthesis.start", "mosaic"),
    "synthesis.curriculum",
    Curriculum(crop_scale=(0.9, 1.0), image_size=4),
)
FULL = change(change(FULL, "labels.mode", "top_k"), "evaluation.longer_epochs", (900,))
FULL = change(change(FULL, "evaluation.optimiser", "sgd"), "evaluation.schedule", "steps")
"""A recipe of which every result field is used, but for those of another generation."""

EVERY_CONTROL = change(DIGITS, "evaluation.controls", tuple(row for row in ROWS if row != "distilled"))

GIVEN = Given("hash of the weights", 0.6)
"""A base that is right on 60 %: 0.5 / 0.9 of the way from chance, 0.1, to perfect."""


def stages(recipe=DIGITS, facts=FACTS, given=None):
    return Plan(recipe, facts, given).stages()


def changed(recipe=DIGITS, facts=FACTS, base=DIGITS, given=None):
    """The stages whose fingerprints differ from those of `base` on the same data."""
    before, after = stages(base, given=given), stages(recipe, facts, given)
    return {stage for stage in STAGES if before[stage] != after[stage]}


def from_stage(first):
    return set(STAGES[STAGES.index(first) :])
