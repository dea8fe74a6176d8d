"""A comparison file: what is refused, which runs it comes to, and what each cell reads from which."""

from pathlib import Path

import pytest
import yaml
from conftest import TINY

from teddy_ray.comparison.file import load_comparison
from teddy_ray.comparison.runs import expand
from teddy_ray.errors import InputError

COMPARISONS = Path(__file__).parents[1] / "pipelines/comparisons"
SMALL = {
    "name": "small",
    "seeds": [0, 1],
    "rows": [
        {"title": "prior", "recipe": "recipes/one.yaml"},
        {"title": "random", "recipe": "recipes/one.yaml", "row": "random_soft"},
        {"title": "other", "recipe": "recipes/two.yaml"},
    ],
    "tables": [
        {"title": "by IPC", "columns": {"images_per_class": [1, 4]}},
        {
            "title": "by student",
            "columns": {"students": ["convnet:width=8", "resnet18:width=2"]},
            "set": {"synthesis.images_per_class": 4},
        },
    ],
}


@pytest.fixture
def comparison(tmp_path):
    """Writes a comparison file with two recipes, and gives its path."""
    (tmp_path / "recipes").mkdir()
    for name in ("one", "two"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump({**TINY, "name": name}))

    def write(**changes):
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump({**SMALL, **changes}))
        return path

    return write


def lay_out(path, *overrides, storage=None, **values):
    return expand(load_comparison(path, overrides, storage), path, overrides, values)


def problems(path, *overrides):
    with pytest.raises(InputError) as caught:
        lay_out(path, *overrides)
    return [str(problem) for problem in caught.value.problems]


def names(layout):
    return [run.name for run in layout.runs]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_every_problem_of_the_file_is_named_by_its_dotted_key(comparison):
    path = comparison(seeds=[], rows=[{"titel": "a", "recipe": 1}], tables=[{"title": "", "columns": {"ipc": [1]}}])
    found = problems(path)
    assert "seeds: found []; should have at least 1 item" in found
    assert "rows.0.titel: found 'a'; unknown key; did you mean 'title'? valid here: title, recipe, row, set, paper" in (
        found
    )
    assert "rows.0.title: found None; this key is required" in found
    assert "rows.0.recipe: found 1; should be a valid string" in found
    assert "tables.0.title: found ''; should have at least 1 character" in found
    assert "tables.0.columns.ipc: found [1]; unknown key; valid here: images_per_class, students" in found


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seeds": [1, 1]}, "seeds: found [1, 1]; should name each only once"),
        (
            {"rows": [{"title": "a", "recipe": "recipes/one.yaml", "paper": "teddy"}]},
            "rows.0.paper: found 'teddy'; should be one of teddy_prior, teddy_post, sre2l, random_hard, dc, dsa, dm, "
            "idm, mtt, ftd, tesla",
        ),
        (
            {"tables": [{"title": "a", "columns": {}}]},
            "tables.0.columns: found {}; name either images_per_class or students",
        ),
        (
            {"tables": [{"title": "a", "columns": {"images_per_class": [1, 1]}}]},
            "tables.0.columns.images_per_class: found [1, 1]; should name each only once",
        ),
        (
            {"tables": [{"title": "a", "columns": {"images_per_class": [1]}, "paper": {"dataset": "digits"}}]},
            "tables.0.paper.dataset: found 'digits'; should be one of imagenet1k, tiny_imagenet, cifar10, cifar100",
        ),
        (
            {"set": {"evaluation": {"seeds": [0]}}},
            "set.evaluation.seeds: found [0]; leave it out: students and random draws have seeds of their own for each "
            "of `seeds`",
        ),
        (
            {"tables": [{"title": "a", "columns": {"students": ["x"]}, "set": {"evaluation.students": ["y"]}}]},
            "tables.0.set.evaluation.students: found ['y']; leave it out: it is what the columns of tables.0 vary",
        ),
        (
            {"rows": [{"title": "a", "recipe": "recipes/none.yaml"}]},
            "rows.0.recipe: found '{folder}/recipes/none.yaml'; name a readable YAML file",
        ),
        (
            {"rows": [{"title": "a", "recipe": "recipes/one.yaml", "row": "random_softt"}]},
            "rows.0.row: found 'random_softt'; should be 'random_soft', 'random_hard'",
        ),
        (
            {"rows": [{"title": "a", "recipe": "recipes/one.yaml", "row": "distilled@0"}]},
            "rows.0.row: found 'distilled@0'; epochs: should be greater than or equal to 1",
        ),
        (
            {"rows": [{"title": "a", "recipe": "recipes/one.yaml", "row": "full_data@900"}]},
            "rows.0.row: found 'full_data@900'; name full_data alone: it has a number of epochs of its own, "
            "evaluation.full_data_epochs",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_contradiction_is_named_with_its_remedy(comparison, tmp_path, changes, problem):
    found = problems(comparison(**changes))
    assert len(found) == 1
    assert found[0].startswith(problem.replace("{folder}", str(tmp_path)))


def test_rows_that_differ_in_what_a_table_does_not_vary_are_refused(comparison):
    other = {"evaluation.students": ["convnet:width=16"], "synthesis.images_per_class": 2}
    rows = [*SMALL["rows"][:2], {**SMALL["rows"][2], "set": other}]
    tables = [SMALL["tables"][0], {**SMALL["tables"][1], "set": {}}]
    assert problems(comparison(rows=rows, tables=tables)) == [
        "tables.0: found {'prior': 'convnet:width=8', 'random': 'convnet:width=8', 'other': 'convnet:width=16'}; "
        "rows should have the same student: set evaluation.students in tables.0.set",
        "tables.1: found {'prior': 4, 'random': 4, 'other': 2}; rows should have the same number of images per class: "
        "set synthesis.images_per_class in tables.1.set",
    ]


def test_an_override_that_the_comparison_gives_itself_is_refused(comparison):
    assert problems(comparison(), "seed=3", "synthesis.images_per_class=2") == [
        "--set seed: found '3'; leave it out: `seeds` of the comparison are the recipes' seeds",
        "--set synthesis.images_per_class: found '2'; leave it out: it is what the columns of tables.0 vary",
    ]


def test_a_problem_of_all_recipes_is_told_once_and_one_of_a_single_recipe_with_its_path(comparison, tmp_path):
    assert problems(comparison(), "synthesis.steps=0") == [
        "synthesis.steps: found 0; should be greater than or equal to 1"
    ]
    two = tmp_path / "recipes" / "two.yaml"
    two.write_text(yaml.safe_dump({**TINY, "name": "two", "labels": {"views": 0}}))
    assert problems(comparison()) == [f"{two}: labels.views: found 0; should be greater than or equal to 1"]


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "none.yaml"
    assert problems(path)[0].startswith(f"COMPARISON: found '{path}'; name a readable YAML file")
    path.write_text("[1]")
    assert problems(path) == [f"COMPARISON: found '{path}'; write a mapping with name:, rows: and tables:"]


# -- runs ------------------------------------------------------------------------------------------------------------


def test_rows_and_tables_share_runs(comparison):
    layout = lay_out(comparison())
    assert names(layout) == [
        f"small-{recipe}-ipc{ipc}-seed{seed}" for recipe in ("one", "two") for ipc in (1, 4) for seed in (0, 1)
    ]
    students = {run.name: run.evaluation.students for run in layout.runs}
    assert students["small-one-ipc1-seed0"] == ("convnet:width=8",)
    assert students["small-one-ipc4-seed0"] == ("convnet:width=8", "resnet18:width=2")
    controls = {run.name: run.evaluation.controls for run in layout.runs}
    assert controls["small-one-ipc4-seed1"] == ("random_soft",)
    assert controls["small-two-ipc4-seed1"] == ()


def test_each_seed_is_one_of_the_whole_recipe_with_its_own_draws(comparison):
    runs = {run.name: run for run in lay_out(comparison(seeds=[3, 5])).runs}
    assert runs["small-one-ipc1-seed5"].seed == 5
    assert runs["small-one-ipc1-seed5"].evaluation.seeds == (5,)
    several = {run.name: run for run in lay_out(comparison(seeds=[3, 5], students_per_seed=2)).runs}
    assert several["small-one-ipc1-seed3"].evaluation.seeds == (6, 7)
    assert several["small-one-ipc1-seed5"].evaluation.seeds == (10, 11)


def test_cells_know_where_their_accuracies_stand(comparison):
    layout = lay_out(comparison())
    by_student = layout.of(1, 1)
    assert [next(cell.sources())[1] for cell in by_student] == ["random_soft", "random_soft/resnet18:width=2"]
    assert [run.seed for run in by_student[0].runs] == [0, 1]
    assert [cell.images_per_class for cell in layout.of(0, 0)] == [1, 4]


def test_rows_of_longer_budgets_are_of_the_same_run(comparison):
    budgets = ["distilled", "distilled@9", "random_soft@9", "distilled@7"]
    rows = [{"title": row, "recipe": "recipes/one.yaml", "row": row} for row in budgets]
    layout = lay_out(comparison(rows=rows, tables=SMALL["tables"][:1], seeds=[0]))
    assert len(layout.runs) == 2
    assert {run.evaluation.longer_epochs for run in layout.runs} == {(7, 9)}
    assert {run.evaluation.controls for run in layout.runs} == {("random_soft",)}
    assert next(layout.of(0, 2)[0].sources())[1] == "random_soft@9"


def test_rows_that_differ_in_a_key_are_runs_of_their_own_with_names_that_say_so(comparison):
    rows = [
        {"title": "plain", "recipe": "recipes/one.yaml"},
        {"title": "no CE", "recipe": "recipes/one.yaml", "set": {"synthesis": {"ce_weight": 0.0}}},
    ]
    tables = [{"title": "t", "columns": {"images_per_class": [1]}}]
    layout = lay_out(comparison(rows=rows, tables=tables))
    assert len(set(names(layout))) == 4
    assert names(layout)[:2] == ["small-one-ipc1-seed0", "small-one-ipc1-seed1"]
    suffix = names(layout)[2].removeprefix("small-one-ipc1-").removesuffix("-seed0")
    assert len(suffix) == 6
    assert names(layout)[3] == f"small-one-ipc1-{suffix}-seed1"
    assert [run.synthesis.ce_weight for run in layout.runs] == [1.0, 1.0, 0.0, 0.0]


def test_the_stronger_setting_counts(comparison):
    tables = [{"title": "t", "columns": {"images_per_class": [1]}, "set": {"labels.views": 5, "pool.batch_size": 9}}]
    rows = [{"title": "a", "recipe": "recipes/one.yaml", "set": {"labels.views": 4, "evaluation.epochs": 3}}]
    every = {"labels.views": 3, "evaluation.epochs": 2, "synthesis.learning_rate": 1e-05}
    path = comparison(set=every, rows=rows, tables=tables)
    recipe = lay_out(path, "pool.batch_size=11", storage="elsewhere", **{"cluster.address": "auto"}).runs[0]
    assert (recipe.labels.views, recipe.evaluation.epochs, recipe.synthesis.learning_rate) == (5, 3, 1e-5)
    assert recipe.pool.batch_size == 11
    assert (recipe.storage, recipe.cluster.address) == ("elsewhere", "auto")
    assert recipe.evaluation.learning_rate == 2e-3  # sections keep their other keys


def test_a_table_of_images_per_class_has_the_first_student_of_the_recipe(comparison):
    tables = [{"title": "t", "columns": {"images_per_class": [1]}, "set": {"evaluation.students": ["a", "b"]}}]
    layout = lay_out(comparison(tables=tables))
    assert {run.evaluation.students for run in layout.runs} == {("a",)}


def test_the_comparison_of_the_digits_fills_three_tables():
    layout = lay_out(COMPARISONS / "digits.yaml")
    assert len(layout.runs) == 27
    assert len(layout.cells) == 8 * (2 + 4 + 1)
    assert {cell.runs[0].evaluation.epochs for (t, _, _), cell in layout.cells.items() if t == 2} == {900}
    assert all(len(cell.runs) == 3 for cell in layout.cells.values())
    rows = [row.row for row in layout.comparison.rows]
    assert rows.count("distilled") == rows.count("random_soft") == 3
    assert rows.count("random_hard") == rows.count("start_soft") == 1


@pytest.mark.parametrize("path", sorted(COMPARISONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_comparisons_that_come_along_lay_out_and_let_every_row_differ(path):
    layout = lay_out(path)
    rows = range(len(layout.comparison.rows))
    for table in range(len(layout.comparison.tables)):
        filled = [[(cell.row, [run.name for run in cell.runs]) for cell in layout.of(table, row)] for row in rows]
        assert all(filled[row] not in filled[:row] for row in rows)
