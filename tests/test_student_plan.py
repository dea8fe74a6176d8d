"""The students of a plan: which there are, what each follows, and what they see."""

import typing
from dataclasses import replace

import pytest
from plans import DIGITS, EVERY_CONTROL, FACTS, LEAVES, another, change, changed, get

from teddy_ray.plan import Plan
from teddy_ray.recipe import Augmentation, Control, Steps
from teddy_ray.rows import ROWS


def students(recipe=DIGITS, facts=FACTS):
    return {(run.row, run.seed): run.fingerprint for run in Plan(recipe, facts).students}


def test_there_is_a_student_for_every_row_and_seed_each_with_its_own_fingerprint():
    assert set(students()) == {
        (row, seed) for row in ("distilled", *DIGITS.evaluation.controls) for seed in DIGITS.evaluation.seeds
    }
    assert len(set(students().values())) == len(students())


def test_equal_labels_stand_for_distilled_and_random_soft_alone():
    soft = {run.row: run.labelled is not None for run in Plan(DIGITS, FACTS).students}
    assert soft == {row: row in ("distilled", "random_soft", "start_soft") for row in soft}


SOFT = ["distilled", "random_soft", "start_soft"]
HARD = ["distilled_hard", "random_hard", "start_hard", "full_data"]
PLAIN = ["distilled_plain", "random_plain"]


@pytest.mark.parametrize(
    ("key", "value", "changed_rows"),
    [
        ("evaluation.batch_size", 7, [*SOFT, *HARD, *PLAIN]),
        ("evaluation.weight_decay", 0.5, [*SOFT, *HARD, *PLAIN]),
        ("evaluation.ce_weight", 0.5, [*SOFT, *PLAIN]),
        ("evaluation.loss", "logit_mse", [*SOFT, *PLAIN]),
        ("evaluation.momentum", 0.5, []),
        ("evaluation.steps", Steps(at=(0.1,)), []),
        ("evaluation.epochs", 299, [*SOFT, *HARD[:-1], *PLAIN]),
        ("evaluation.full_data_epochs", 29, ["full_data"]),
        ("labels.views", 99, SOFT),
        ("labels.averaged", True, SOFT),
        ("labels.temperature", 2.0, [*SOFT, *PLAIN]),
        ("labels.augmentation", Augmentation(flip=True), [*SOFT, *HARD]),
        ("labels.cutmix", 0.5, [*SOFT, *HARD]),
        ("labels.images_per_file", 7, [*SOFT, *PLAIN]),
        ("synthesis.steps", 7, ["distilled", "distilled_hard", "distilled_plain"]),
    ],
)
def test_a_field_changes_the_students_that_follow_it_and_no_others(key, value, changed_rows):
    def of_rows(recipe):
        return {run.row: run.fingerprint for run in Plan(recipe, FACTS).students if run.seed == 0}

    before, after = of_rows(EVERY_CONTROL), of_rows(change(EVERY_CONTROL, key, value))
    assert {row for row in before if before[row] != after[row]} == set(changed_rows)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_student_is_another_where_it_is_measured_on_other_images(split):
    facts = {part: replace(FACTS, **{part: "other"}) for part in ("validation", "test")}
    ours, *theirs = (Plan(DIGITS, one, split=split).students[-1].fingerprint for one in (FACTS, *facts.values()))
    assert [other != ours for other in theirs] == [True, split == "test"]


def test_trials_of_a_sweep_have_students_of_their_own():
    """Measured on the validation part alone: the test split is read by the winner."""
    tests, trials = (Plan(DIGITS, FACTS, split=split) for split in ("test", "validation"))
    assert not {run.fingerprint for run in tests.students} & {run.fingerprint for run in trials.students}
    assert tests.labels == trials.labels


@pytest.mark.parametrize("key", ["labels.views", "labels.batch_size", "labels.kernels", "labels.precision"])
def test_how_labels_are_made_does_not_matter_where_none_are(key):
    base = change(DIGITS, "labels.mode", "none")
    assert changed(change(base, key, another(get(base, key), LEAVES[key].annotation)), base=base) == set()


@pytest.mark.parametrize("key", ["seed", "labels.augmentation.flip", "evaluation.batch_size", "evaluation.threads"])
@pytest.mark.parametrize("row", ["distilled", "random_soft", "random_hard", "full_data"])
def test_every_student_changes_with(row, key):
    before, after = students(), students(change(DIGITS, key, another(get(DIGITS, key))))
    assert before[row, 1] != after[row, 1]


@pytest.mark.parametrize("key", ["pool.batch_size", "labels.temperature", "labels.batch_size"])
@pytest.mark.parametrize("row", ["distilled", "random_soft"])
def test_every_student_of_soft_labels_changes_with(row, key):
    before, after = students(), students(change(DIGITS, key, another(get(DIGITS, key))))
    assert before[row, 1] != after[row, 1]


@pytest.mark.parametrize("row", ["random_soft", "random_hard", "full_data"])
def test_synthesis_does_not_touch_the_students_of_controls(row):
    before, after = students(), students(change(DIGITS, "synthesis.steps", 7))
    assert before[row, 1] == after[row, 1]
    assert before["distilled", 1] != after["distilled", 1]


def test_every_seed_draws_a_random_set_of_its_own_and_both_controls_share_it():
    runs = Plan(DIGITS, FACTS).students
    drawn = {(run.row, run.seed): run.images.fingerprint for run in runs if run.row.startswith("random")}
    for seed in DIGITS.evaluation.seeds:
        assert drawn["random_soft", seed] == drawn["random_hard", seed]
    assert len(set(drawn.values())) == len(DIGITS.evaluation.seeds)


def test_without_random_controls_no_random_set_is_drawn():
    plan = Plan(change(DIGITS, "evaluation.controls", ("full_data",)), FACTS)
    assert plan.labelled_controls == ()
    assert {run.row for run in plan.students} == {"distilled", "full_data"}


def test_controls_are_the_rows_of_the_table():
    assert set(typing.get_args(Control)) == set(ROWS) - {"distilled"}


def test_sets_that_are_labelled_beside_the_distilled_one_are_those_of_soft_controls():
    sets = Plan(EVERY_CONTROL, FACTS).labelled_controls
    draws = [f"random draw {seed}" for seed in DIGITS.evaluation.seeds]
    expected = ["starting images", "distilled, plain", *draws, *(f"{draw}, plain" for draw in draws)]
    assert sorted(labelled.name for labelled in sets) == sorted(expected)
    assert len({labelled.fingerprint for labelled in sets}) == len(sets)


def test_every_row_has_a_student_of_every_kind_seed_and_budget():
    recipe = change(change(EVERY_CONTROL, "evaluation.longer_epochs", (600, 900)), "evaluation.students", ("a", "b"))
    runs = Plan(recipe, FACTS).students
    small = [row for row in ROWS if row != "full_data"]
    expected = {
        (row, student, seed, epochs)
        for row in small
        for student in "ab"
        for seed in range(3)
        for epochs in (300, 600, 900)
    } | {("full_data", student, seed, 30) for student in "ab" for seed in range(3)}
    assert {(run.row, run.student, run.seed, run.epochs) for run in runs} == expected
    assert len({run.fingerprint for run in runs}) == len({run.name for run in runs}) == len(runs) == len(expected)
    assert {run.epochs for run in runs if run.longer} == {600, 900}


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("synthesis.steps", 7, True),
        ("synthesis.ce_weight", 7.0, True),
        ("synthesis.learning_rate", 7.0, True),
        ("synthesis.images_per_class", 7, False),
        ("seed", 7, False),
    ],
)
def test_starting_images_are_those_of_all_syntheses_that_start_from_them(key, value, same):
    before, after = (Plan(recipe, FACTS).image_set("start") for recipe in (DIGITS, change(DIGITS, key, value)))
    assert (before == after) is same


@pytest.mark.parametrize(
    ("start", "key", "value"),
    [
        ("mosaic", "pool.learning_rate", 7.0),
        ("mosaic", "synthesis.mosaic.candidates", 7),
        ("mosaic", "synthesis.augmentation.crop_ratio", (0.9, 1.0)),
        ("noise", "synthesis.classes_per_unit", 7),
        ("noise", "synthesis.slots_per_unit", 7),
    ],
)
def test_starting_images_follow_what_they_are_made_with(start, key, value):
    base = change(DIGITS, "synthesis.start", start)
    before, after = (Plan(recipe, FACTS).image_set("start") for recipe in (base, change(base, key, value)))
    assert before != after
    real = (Plan(recipe, FACTS).image_set("start") for recipe in (DIGITS, change(DIGITS, key, value)))
    assert len(set(real)) == 1


@pytest.mark.parametrize(
    ("labels", "epochs", "views"),
    [
        ({}, 300, 100),
        ({}, 30, 30),
        ({"averaged": True}, 300, 300),
        ({"mode": "none"}, 300, 300),
        ({"mode": "top_k"}, 300, 100),
    ],
)
def test_students_see_the_stored_views_or_one_for_each_epoch(labels, epochs, views):
    recipe = DIGITS
    for key, value in labels.items():
        recipe = change(recipe, f"labels.{key}", value)
    assert Plan(recipe, FACTS).num_views(epochs) == views
