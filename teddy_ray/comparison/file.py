"""A comparison file: methods as rows, images per class or students as columns. Typed, frozen, all problems named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from teddy_ray.comparison.paper import load_paper
from teddy_ray.errors import InputError, Problem
from teddy_ray.recipe import Count, Name, Part, Seed
from teddy_ray.recipe_file import check_part, read_mapping
from teddy_ray.rows import ROWS

Title = Annotated[str, Field(min_length=1)]
Settings = dict[str, Any]

IPC, STUDENTS = "synthesis.images_per_class", "evaluation.students"
NOT_TO_SET = {
    "name": "leave it out: runs are named after the comparison",
    "seed": "leave it out: `seeds` of the comparison are the recipes' seeds",
    "storage": "leave it out: `storage` of the comparison, or --storage, is for all recipes",
    "evaluation.seeds": "leave it out: students and random draws have seeds of their own for each of `seeds`",
    "evaluation.controls": "leave it out: add rows whose `row` names the control",
    "evaluation.longer_epochs": "leave it out: add rows such as distilled@900",
}
"""Keys of recipes that a comparison gives itself."""


class Method(Part):
    """A row of every table: what is measured in the runs of a recipe."""

    title: Title
    """What the row is called."""
    recipe: str
    """The recipe, as a path from the comparison file's folder."""
    row: Annotated[str, Field(pattern=r"^[a-z_]+(@[0-9]+)?$")] = "distilled"
    """What of the recipe's accuracies: distilled, or a control such as random_soft; distilled@900: of students that
    are trained for 900 epochs."""
    set: Settings = Field(default={})
    """Keys of the recipe that differ for this row, such as `evaluation.epochs: 900`."""
    paper: str | None = None
    """The method of the paper whose figures belong beside this row, where both learn from labels of the same kind."""


class Columns(Part):
    """What a table's columns are: one of the two."""

    images_per_class: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """A column for each number of images per class; the student is the first of the recipe's."""
    students: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """A column for each student; the number of images per class is the recipe's."""


class PaperSetting(Part):
    """Where the paper has figures for the same setting."""

    dataset: str
    """The paper's name for the data."""


class Table(Part):
    """A table of all rows."""

    title: Title
    """What stands above the table."""
    columns: Columns
    """Its columns."""
    set: Settings = Field(default={})
    """Keys of all recipes that differ for this table; stronger than those of a row."""
    paper: PaperSetting | None = None
    """Show the paper's figures for that data set, wherever images per class and student are the same."""


class Comparison(Part):
    """A whole comparison."""

    name: Name
    """Results go to runs/<name>/, the runs themselves to runs/<name>-<recipe>-.../."""
    storage: str = "."
    """Where artifacts/ and runs/ lie, for all recipes."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of whole recipes: each has its own starts, synthesis, views and random draws. n counts these."""
    students_per_seed: Count = 1
    """Students, and random draws, for each of the seeds; a seed's accuracy is their mean."""
    set: Settings = Field(default={})
    """Keys of all recipes that differ from their files; rows, tables, --set and columns are stronger, in this order."""
    rows: Annotated[tuple[Method, ...], Field(min_length=1)]
    """The methods."""
    tables: Annotated[tuple[Table, ...], Field(min_length=1)]
    """The tables."""


def load_comparison(path: str | Path, overrides: Iterable[str] = (), storage: str | None = None) -> Comparison:
    """Read a comparison file. `overrides` are `a.b=value` for all recipes, which are read by `expand`.

    Raises InputError with every problem.
    """
    remedy = "write a mapping with name:, rows: and tables:"
    tree = read_mapping("COMPARISON", path, remedy)
    if storage is not None:
        tree["storage"] = storage
    comparison = check_part(Comparison, tree, "COMPARISON")
    if problems := [*_contradictions(comparison), *_set_twice(comparison, overrides)]:
        raise InputError(problems)
    return comparison


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by dotted key, however they are nested: a section that is named keeps its other keys."""
    keys: dict[str, Any] = {}
    for key, value in settings.items():
        keys |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return keys


def _contradictions(comparison: Comparison) -> Iterable[Problem]:
    paper = load_paper()
    for key, values in {"seeds": comparison.seeds, **_titles(comparison)}.items():
        if len(set(values)) < len(values):
            yield Problem(key, list(values), "should name each only once")
    for index, row in enumerate(comparison.rows):
        name, _, epochs = row.row.partition("@")
        if epochs and name in ROWS and ROWS[name].images is None:
            remedy = f"name {name} alone: it has a number of epochs of its own, evaluation.full_data_epochs"
            yield Problem(f"rows.{index}.row", row.row, remedy)
        if row.paper is not None and row.paper not in paper.methods:
            yield Problem(f"rows.{index}.paper", row.paper, f"should be one of {', '.join(paper.methods)}")
    for index, table in enumerate(comparison.tables):
        columns = table.columns
        if (columns.images_per_class is None) == (columns.students is None):
            found = {key: value for key, value in columns.model_dump(mode="json").items() if value is not None}
            yield Problem(f"tables.{index}.columns", found, "name either images_per_class or students")
        for key, values in columns.model_dump(mode="json").items():
            if values is not None and len(set(values)) < len(values):
                yield Problem(f"tables.{index}.columns.{key}", values, "should name each only once")
        if table.paper is not None and table.paper.dataset not in paper.datasets:
            remedy = f"should be one of {', '.join(paper.datasets)}"
            yield Problem(f"tables.{index}.paper.dataset", table.paper.dataset, remedy)


def _titles(comparison: Comparison) -> dict[str, tuple[Any, ...]]:
    return {
        "rows.title": tuple(row.title for row in comparison.rows),
        "tables.title": tuple(table.title for table in comparison.tables),
    }


def _set_twice(comparison: Comparison, overrides: Iterable[str]) -> Iterable[Problem]:
    """Keys that the comparison gives itself, or that a table's columns vary: columns are stronger than `set` and
    `rows`, which are for all tables."""
    given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    everywhere: dict[str, Mapping[str, Any]] = {"--set": given, "set": flat(comparison.set)}
    everywhere |= {f"rows.{index}.set": flat(row.set) for index, row in enumerate(comparison.rows)}
    by_table = {f"tables.{index}.set": flat(table.set) for index, table in enumerate(comparison.tables)}
    for place, settings in {**everywhere, **by_table}.items():
        for key in settings.keys() & NOT_TO_SET:
            yield Problem(_key(place, key), settings[key], NOT_TO_SET[key])
    for index, table in enumerate(comparison.tables):
        varied = IPC if table.columns.images_per_class is not None else STUDENTS
        own = f"tables.{index}.set"
        for place, settings in {"--set": given, own: by_table[own]}.items():
            if varied in settings:
                remedy = f"leave it out: it is what the columns of tables.{index} vary"
                yield Problem(_key(place, varied), settings[varied], remedy)


def _key(place: str, key: str) -> str:
    return f"{place} {key}" if place == "--set" else f"{place}.{key}"
