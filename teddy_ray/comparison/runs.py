"""The runs that a comparison comes to, each once however many cells it fills, and what each cell reads from which."""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from teddy_ray.comparison.file import IPC, STUDENTS, Comparison, Method, Table, flat
from teddy_ray.errors import InputError, Problem
from teddy_ray.recipe import Recipe
from teddy_ray.recipe_file import load_recipe, parse_recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """A cell of a table: the accuracy of one student in one row of the accuracies of several runs, one per seed."""

    row: str
    student: str
    runs: tuple[Recipe, ...]

    @property
    def images_per_class(self) -> int:
        return self.runs[0].synthesis.images_per_class

    def sources(self) -> Iterator[tuple[Recipe, str]]:
        """Each run with the key of this cell in the accuracies of its summary."""
        for run in self.runs:
            first = run.evaluation.students[0]
            yield run, self.row if self.student == first else f"{self.row}/{self.student}"


@dataclass(frozen=True)
class Layout:
    """All cells of a comparison, and the runs that fill them, in the order in which they run."""

    comparison: Comparison
    runs: tuple[Recipe, ...]
    cells: Mapping[tuple[int, int, int], Cell]
    """By table, row and column."""

    def of(self, table: int, row: int) -> list[Cell]:
        """The cells of a row of a table, from left to right."""
        return [
            cell for (t, r, _), cell in sorted(self.cells.items(), key=lambda item: item[0]) if (t, r) == (table, row)
        ]


@dataclass
class _Run:
    """A run in the making: students, controls and budgets are added by the cells that need them."""

    recipe: Recipe
    students: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    longer_epochs: list[int] = field(default_factory=list)


def expand(
    comparison: Comparison, path: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Layout:
    """Read the recipes of a comparison file and lay out its runs.

    overrides, values: for all recipes, as `load_recipe` takes them. Raises InputError with every problem: once where
    all recipes have it, and otherwise with the recipe's path.
    """
    runs: dict[str, _Run] = {}
    wanted: dict[tuple[int, int, int], list[tuple[str, str, str]]] = {}  # cell -> row, student and run, per seed
    problems: dict[str, list[Problem]] = {}
    for t, table in enumerate(comparison.tables):
        for r, method in enumerate(comparison.rows):
            file = recipe_path(path, method)
            found = problems.setdefault(file, [])
            for c, column in enumerate(columns_of(table)):
                try:
                    recipe = _load(comparison, r, table, column, file, overrides, values or {})
                    student = recipe.evaluation.students[0] if table.columns.students is None else str(column)
                except InputError as error:
                    found += error.problems
                    continue
                for seed in comparison.seeds:
                    seeded = _with_seed(recipe, seed, comparison.students_per_seed)
                    run = runs.setdefault(_identity(seeded), _Run(seeded))
                    _add(run.students, student)
                    _add(run.controls, *recipe.evaluation.controls)
                    _add(run.longer_epochs, *recipe.evaluation.longer_epochs)
                    wanted.setdefault((t, r, c), []).append((method.row, student, _identity(seeded)))
    if any(problems.values()):
        raise InputError(merge_problems(problems))
    finished = _name(comparison, runs)
    layout = Layout(
        comparison,
        tuple(finished.values()),
        {
            place: Cell(seeds[0][0], seeds[0][1], tuple(finished[identity] for *_, identity in seeds))
            for place, seeds in wanted.items()
        },
    )
    if unequal := list(_unequal(layout)):
        raise InputError(unequal)
    return layout


def _unequal(layout: Layout) -> Iterator[Problem]:
    """Tables whose rows differ in what the columns do not vary: the student, or the number of images per class."""
    for t, table in enumerate(layout.comparison.tables):
        cells = [layout.of(t, r)[0] for r in range(len(layout.comparison.rows))]
        key, what = (STUDENTS, "student") if table.columns.students is None else (IPC, "number of images per class")
        values = [cell.student if key == STUDENTS else cell.images_per_class for cell in cells]
        if len(set(values)) > 1:
            by_row = {method.title: value for method, value in zip(layout.comparison.rows, values, strict=True)}
            yield Problem(f"tables.{t}", by_row, f"rows should have the same {what}: set {key} in tables.{t}.set")


def columns_of(table: Table) -> tuple[int | str, ...]:
    """What the columns vary, from left to right."""
    return table.columns.images_per_class or table.columns.students or ()


def recipe_path(path: str | Path, method: Method) -> str:
    """A row's recipe file, of which the comparison file at `path` knows the way from itself."""
    return os.path.normpath(Path(path).parent / method.recipe)


def merge_problems(problems: Mapping[str, Sequence[Problem]]) -> Iterable[Problem]:
    """Problems by where they were found: each once. One that is found everywhere needs no place."""
    places: dict[str, list[tuple[str, Problem]]] = {}
    for place, found in problems.items():
        for problem in found:
            if (place, problem) not in places.setdefault(str(problem), []):
                places[str(problem)].append((place, problem))
    for same in places.values():
        everywhere = len(same) == len(problems) and len(problems) > 1
        for place, problem in same[:1] if everywhere else same:
            known = everywhere or place in (problem.key, problem.value) or problem.key.startswith("rows.")
            yield problem if known else Problem(f"{place}: {problem.key}", problem.value, problem.remedy)


def _load(
    comparison: Comparison,
    row: int,
    table: Table,
    column: int | str,
    file: str,
    overrides: Sequence[str],
    values: Mapping[str, Any],
) -> Recipe:
    method = comparison.rows[row]
    settings: dict[str, Any] = {}
    for part in (comparison.set, method.set, table.set):
        settings |= flat(part)
    # as overrides, before those of the command line: YAML takes all that JSON can say
    given = [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in settings.items()]
    control, _, epochs = method.row.partition("@")
    varied = IPC if table.columns.students is None else STUDENTS
    try:
        return load_recipe(
            file,
            [*given, *overrides],
            {
                **values,
                "storage": comparison.storage,
                "evaluation.controls": [] if control == "distilled" else [control],
                "evaluation.longer_epochs": [int(epochs)] if epochs else [],
                varied: column if varied == IPC else [column],
            },
        )
    except InputError as error:
        raise InputError(_about_row(problem, row, method) for problem in error.problems) from None


def _about_row(problem: Problem, row: int, method: Method) -> Problem:
    """What the recipe says of its controls is here about `row`, which names one of them."""
    if problem.key == "RECIPE":
        return Problem(f"rows.{row}.recipe", problem.value, problem.remedy)
    if problem.key.startswith("evaluation.controls"):
        return Problem(f"rows.{row}.row", method.row, f"{problem.remedy}, or 'distilled'")
    if problem.key.startswith("evaluation.longer_epochs"):
        return Problem(f"rows.{row}.row", method.row, f"epochs: {problem.remedy}")
    return problem


def _with_seed(recipe: Recipe, seed: int, num_students: int) -> Recipe:
    students = tuple(range(seed * num_students, (seed + 1) * num_students))
    evaluation = recipe.evaluation.model_copy(update={"seeds": students})
    return recipe.model_copy(update={"seed": seed, "evaluation": evaluation})


def _identity(recipe: Recipe) -> str:
    """Equal where one run can serve: all of the recipe but what cells add to it."""
    tree = recipe.model_dump(mode="json")
    for key in ("students", "controls", "longer_epochs"):
        del tree["evaluation"][key]
    return json.dumps(tree, sort_keys=True)


def _add(names: list[T], *more: T) -> None:
    names += [name for name in more if name not in names]


def _name(comparison: Comparison, runs: Mapping[str, _Run]) -> dict[str, Recipe]:
    """The recipes as they run, by identity: named so that a person knows which is which, and no two the same."""
    finished: dict[str, Recipe] = {}
    names: set[str] = set()
    for identity, run in runs.items():
        tree = run.recipe.model_dump(mode="json")
        tree["evaluation"] |= {
            "students": run.students,
            "controls": run.controls,
            "longer_epochs": sorted(run.longer_epochs),
        }
        name = f"{comparison.name}-{tree['name']}-ipc{tree['synthesis']['images_per_class']}"
        seed = f"-seed{tree['seed']}"
        if name + seed in names:
            name += f"-{_digest(identity)}"
        names.add(name + seed)
        finished[identity] = parse_recipe({**tree, "name": name + seed})
    return finished


def _digest(identity: str) -> str:
    """Of what makes the results, without the seed."""
    tree = json.loads(identity)
    for key in ("name", "seed", "storage", "cluster"):
        del tree[key]
    del tree["evaluation"]["seeds"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:6]
