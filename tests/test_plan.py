import io
import typing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from teddy_ray.fingerprints import VERSIONS
from teddy_ray.plan import STAGES, Plan
from teddy_ray.pool_plan import DataFacts, Given
from teddy_ray.recipe import Augmentation, Control, Curriculum, LabelMembers, Part, Recipe, Role, Steps
from teddy_ray.recipe_file import load_recipe, parse_recipe
from teddy_ray.rows import ROWS
from teddy_ray.sources import open_source

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


# -- what changes a fingerprint ------------------------------------------------------------------------------------


def test_a_fingerprint_is_a_pure_function_of_recipe_and_data():
    assert stages(DIGITS.model_copy(deep=True), replace(FACTS)) == stages()
    assert list(stages()) == list(STAGES)
    assert len(set(stages().values())) == len(STAGES)


@pytest.mark.parametrize(
    "key", [key for key in RESULT if key not in (*DATA, "labels.members", "pool.base.well_trained")]
)
def test_every_result_field_changes_the_fingerprint_of_some_stage(key):
    base = change(FULL, "pool.generation", "post") if key.startswith("pool.post.") else FULL
    given = GIVEN if key.startswith("pool.base.") else None
    assert changed(change(base, key, another(get(base, key), LEAVES[key].annotation)), base=base, given=given)


@pytest.mark.parametrize("key", EXECUTION)
def test_no_execution_field_changes_any_fingerprint(key):
    recipe = change(DIGITS, key, another(get(DIGITS, key)))
    assert changed(recipe) == set()
    ours, theirs = Plan(recipe, FACTS), Plan(DIGITS, FACTS)
    assert list(ours.units()) == list(theirs.units())
    assert (ours.members, ours.students) == (theirs.members, theirs.students)


def test_the_execution_fields_are_those_that_scripts_count_on():
    assert {"name", "storage", "cluster.address", "cluster.wait_s"} < set(EXECUTION)
    for stage in STAGES:
        assert {f"{stage}.num_workers", f"{stage}.gpus_per_worker"} < set(EXECUTION)
    assert "synthesis.checkpoint_s" in EXECUTION


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("pool.threads", "pool"),
        ("pool.seeds", "pool"),
        ("pool.snapshots", "pool"),
        ("pool.augmentation.flip", "pool"),
        ("statistics.threads", "statistics"),
        ("statistics.view", "statistics"),
        ("synthesis.augmentation.crop_scale", "statistics"),
        ("seed", "statistics"),
        ("statistics.scope", "synthesis"),
        ("statistics.blend", "synthesis"),
        ("synthesis.threads", "synthesis"),
        ("synthesis.ce_weight", "synthesis"),
        ("synthesis.images_per_class", "synthesis"),
        ("synthesis.first_layer_factor", "synthesis"),
        ("synthesis.normalise_layers", "synthesis"),
        ("synthesis.tv_weight", "synthesis"),
        ("synthesis.l2_weight", "synthesis"),
        ("synthesis.start", "synthesis"),
        ("synthesis.mosaic.grid", "synthesis"),
        ("synthesis.mosaic.crop_scale", "synthesis"),
        ("synthesis.curriculum.share", "synthesis"),
        ("synthesis.curriculum.crop_scale", "synthesis"),
        ("synthesis.curriculum.image_size", "synthesis"),
        ("synthesis.precision", "synthesis"),
        ("synthesis.compile", "synthesis"),
        ("labels.threads", "labels"),
        ("labels.temperature", "labels"),
        ("labels.augmentation.flip", "labels"),
        ("labels.mode", "labels"),
        ("labels.top_k", "labels"),
        ("labels.averaged", "labels"),
        ("labels.ensemble", "labels"),
        ("labels.cutmix", "labels"),
        ("labels.kernels", "labels"),
        ("evaluation.longer_epochs", "evaluation"),
        ("evaluation.threads", "evaluation"),
        ("evaluation.epochs", "evaluation"),
        ("evaluation.controls", "evaluation"),
        ("evaluation.loss", "evaluation"),
        ("evaluation.steps.at", "evaluation"),
        ("evaluation.ema", "evaluation"),
    ],
)
def test_a_field_changes_its_own_stage_and_all_that_read_it_and_nothing_before(key, first):
    recipe = change(FULL, key, another(get(FULL, key), LEAVES[key].annotation))
    assert changed(recipe, base=FULL) == from_stage(first)


@pytest.mark.parametrize("mode", ["fp16", "none"])
def test_how_many_classes_are_kept_does_not_matter_where_all_or_none_are(mode):
    base = change(DIGITS, "labels.mode", mode)
    assert changed(change(base, "labels.top_k", 3), base=base) == set()


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ({"epochs": (2, 6)}, [(0, 2), (0, 6), (1, 2), (1, 6)]),
        ({"seeds": (1,)}, [(1, 2), (1, 4), (1, 6), (1, 8), (1, 10)]),
        ({"seeds": (1,), "epochs": (4,)}, [(1, 4)]),
        ({"architectures": ("resnet18",)}, []),
        ({"ratios": (0.2,)}, []),
    ],
)
def test_members_that_label_are_those_of_every_list(choice, chosen):
    plan = Plan(change(DIGITS, "labels.members", LabelMembers(**choice)), FACTS)
    assert [(member.seed, member.epoch) for member in plan.label_members] == chosen
    assert changed(plan.recipe) == from_stage("labels")


def test_members_that_are_all_listed_are_all():
    everyone = LabelMembers(epochs=DIGITS.pool.snapshots, architectures=DIGITS.pool.architectures)
    assert changed(change(DIGITS, "labels.members", everyone)) == set()


@pytest.mark.parametrize("start", ["real", "noise"])
@pytest.mark.parametrize("key", MOSAIC)
def test_how_mosaics_are_made_does_not_matter_where_there_are_none(key, start):
    plain = change(DIGITS, "synthesis.start", start)
    assert changed(change(plain, key, another(get(plain, key))), base=plain) == set()


def test_the_share_of_a_curriculum_matters_only_where_there_is_one():
    assert changed(change(DIGITS, "synthesis.curriculum.share", 0.3)) == set()
    for field in ({"crop_scale": (0.9, 1.0)}, {"image_size": 4}):
        some, others = (
            change(DIGITS, "synthesis.curriculum", Curriculum(share=share, **field)) for share in (0.3, 0.5)
        )
        assert changed(some, base=others) == from_stage("synthesis")
        assert changed(some) == from_stage("synthesis")


def test_the_augmentation_of_synthesis_does_not_matter_to_statistics_of_plain_images():
    plain = change(DIGITS, "statistics.view", "plain")
    assert changed(change(plain, "synthesis.augmentation.flip", True), base=plain) == from_stage("synthesis")
    assert changed(change(plain, "seed", 5), base=plain) == from_stage("synthesis")


@pytest.mark.parametrize(("part", "first"), [("train", "pool"), ("validation", "pool"), ("test", "evaluation")])
def test_the_identity_of_the_data_changes_what_reads_it(part, first):
    assert changed(facts=replace(FACTS, **{part: "other"})) == from_stage(first)


@pytest.mark.parametrize("key", ["data.source", "data.test_source"])
def test_where_the_data_lies_changes_nothing(key):
    assert changed(change(DIGITS, key, "elsewhere")) == set()


def facts_of(recipe):
    source = open_source(recipe.data)
    counts = np.bincount(source.train.labels)
    parts = {name: getattr(source, name).identity for name in ("train", "validation", "test")}
    return DataFacts(source.classes, tuple(counts.tolist()), len(source.test), **parts)


@pytest.fixture(scope="module")
def two_of_each(tmp_path_factory):
    """A recipe for Parquet with two columns of images, of which one row is none, and two of labels."""

    def png(value):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), value).save(buffer, "PNG")
        return buffer.getvalue()

    path = tmp_path_factory.mktemp("data") / "train.parquet"
    columns = {
        "image": [png(row) if row != 7 else b"" for row in range(30)],
        "second_image": [png(255 - row) for row in range(30)],
        "label": ["a", "b"] * 15,
        "second_label": ["a", "b", "b"] * 10,
    }
    pq.write_table(pa.table(columns), path)
    data = {"source": str(path), "image_size": 8}
    return parse_recipe({"name": "two", "data": data, "synthesis": {"images_per_class": 2}})


OTHER_DATA = {
    "data.test_fraction": 0.4,
    "data.validation": 0.3,
    "data.image_size": 9,
    "data.channels": 1,
    "data.classes": ("b", "a"),
    "data.limit_per_class": 5,
    "data.on_bad_image": 0.1,
    "data.image_column": "second_image",
    "data.label_column": "second_label",
}


def test_the_data_fields_below_are_all_there_are():
    assert set(OTHER_DATA) == set(DATA) - {"data.source", "data.test_source"}


@pytest.mark.parametrize("key", OTHER_DATA)
def test_every_data_field_changes_the_fingerprint_of_some_stage(two_of_each, key):
    recipe = change(two_of_each, key, OTHER_DATA[key])
    assert stages(recipe, facts_of(recipe)) != stages(two_of_each, facts_of(two_of_each))


@pytest.mark.parametrize("kind", VERSIONS)
def test_a_new_version_of_an_algorithm_reuses_nothing_it_made(monkeypatch, kind):
    before = stages()
    monkeypatch.setitem(VERSIONS, kind, VERSIONS[kind] + 1)
    after = stages()
    first = {"training": "pool", "member": "pool", "unit": "synthesis", "shard": "labels"}
    first |= {"set": "evaluation", "student": "evaluation"}
    assert {stage for stage in STAGES if before[stage] != after[stage]} == from_stage(first.get(kind, kind))


# -- students and sets ---------------------------------------------------------------------------------------------


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


def test_validation_matters_to_students_whose_rate_is_searched_on_it():
    for rates, matters in ((2e-3, False), ((1e-3, 2e-3), True)):
        recipe = change(DIGITS, "evaluation.learning_rate", rates)
        ours, theirs = (Plan(recipe, replace(FACTS, validation=name)).students[-1] for name in ("validation", "other"))
        assert (ours.fingerprint != theirs.fingerprint) == matters


@pytest.mark.parametrize("key", ["labels.views", "labels.batch_size", "labels.kernels"])
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


# -- chunks and class ranges of the statistics ---------------------------------------------------------------------


def with_counts(*counts):
    return replace(FACTS, classes=tuple(f"class {label}" for label in range(len(counts))), counts=counts)


@pytest.mark.parametrize(
    ("num_images", "batch_size", "expected"),
    [
        (1293, 100, 1000),  # at least
        (90_000, 100, 1500),  # a 64th
        (1_281_167, 100, 20_100),
        (1_281_167, 64, 20_032),
        (10, 7, 1001),
    ],
)
def test_size_of_a_chunk_is_a_64th_of_the_data_in_whole_batches(num_images, batch_size, expected):
    plan = Plan(change(DIGITS, "statistics.batch_size", batch_size), with_counts(num_images - 5, 5))
    assert plan.chunk_size == expected
    rows = [row for chunk in plan.chunks() for row in chunk]
    assert rows == list(range(num_images))
    assert all(len(chunk) == expected for chunk in list(plan.chunks())[:-1])


def test_size_of_a_chunk_may_be_asked_for_and_counts_the_same_either_way():
    base = change(DIGITS, "statistics.batch_size", 100)
    facts = with_counts(90_000)
    assert Plan(change(base, "statistics.chunk_size", 33), facts).chunk_size == 33
    automatic, explicit = Plan(base, facts), Plan(change(base, "statistics.chunk_size", 1500), facts)
    assert automatic.statistics == explicit.statistics


@pytest.mark.parametrize("num_classes", [1, 9, 10, 11, 1000])
def test_class_ranges_cover_every_class_once(num_classes):
    ranges = Plan(DIGITS, with_counts(*[3] * num_classes)).class_ranges()
    assert [label for part in ranges for label in part.classes] == list(range(num_classes))
    assert len({part.fingerprint for part in ranges}) == len(ranges) == -(-num_classes // 10)


def test_class_ranges_follow_the_statistics():
    other = Plan(change(DIGITS, "statistics.view", "plain"), FACTS).class_ranges()
    assert not {part.fingerprint for part in other} & {part.fingerprint for part in Plan(DIGITS, FACTS).class_ranges()}


# -- units ---------------------------------------------------------------------------------------------------------


def synthesis(images_per_class, classes_per_unit, slots_per_unit):
    recipe = DIGITS
    for key, value in locals().copy().items():
        if key != "recipe":
            recipe = change(recipe, f"synthesis.{key}", value)
    return Plan(recipe, FACTS)


@pytest.mark.parametrize("blocks", [(10, 10, 10), (10, 5, 10), (7, 3, 2), (1, 1, 1), (4, 20, 50), (5, 4, 3)])
def test_units_cover_every_class_and_slot_exactly_once(blocks):
    plan = synthesis(*blocks)
    units = list(plan.units())
    covered = [(label, slot) for unit in units for label in unit.classes for slot in unit.slots]
    assert sorted(covered) == [(label, slot) for label in range(10) for slot in range(blocks[0])]
    assert len(units) == plan.num_units == len({unit.fingerprint for unit in units}) == len({u.name for u in units})
    assert sum(unit.num_images for unit in units) == plan.num_images == 10 * blocks[0]


def test_neighbouring_units_share_no_class():
    units = list(synthesis(6, 4, 2).units())
    assert len(units) == 9
    assert not any(set(a.classes) & set(b.classes) for a, b in pairwise(units))


@pytest.mark.parametrize(("small", "large", "slots"), [(10, 50, 10), (10, 20, 5), (4, 10, 2), (1, 50, 1), (10, 25, 10)])
def test_a_larger_ipc_keeps_the_units_of_a_smaller_one(small, large, slots):
    few, many = list(synthesis(small, 5, slots).units()), list(synthesis(large, 5, slots).units())
    assert set(few) < set(many)
    assert synthesis(small, 5, slots).synthesis != synthesis(large, 5, slots).synthesis


def test_a_block_cut_short_by_the_ipc_is_another_unit():
    few, many = list(synthesis(3, 5, 2).units()), list(synthesis(4, 5, 2).units())
    assert {unit.slots for unit in set(few) & set(many)} == {range(0, 2)}


@pytest.mark.parametrize(
    "key",
    [
        *["seed", "synthesis.steps", "statistics.scope", "pool.batch_size", "synthesis.precision", "synthesis.compile"],
        *["synthesis.mosaic.candidates", "synthesis.curriculum.share", "synthesis.tv_weight"],
    ],
)
def test_whatever_changes_the_bytes_of_units_changes_every_one(key):
    other = change(FULL, key, another(get(FULL, key), LEAVES[key].annotation))
    ours, theirs = ({unit.fingerprint for unit in Plan(recipe, FACTS).units()} for recipe in (FULL, other))
    assert not ours & theirs


# -- rows and files ------------------------------------------------------------------------------------------------


def test_rows_are_ordered_by_class_then_slot_with_unique_ids():
    plan = synthesis(3, 5, 2)
    rows = range(plan.num_images)
    assert plan.image_labels(rows) == sorted(list(range(10)) * 3)
    assert len(set(plan.image_ids)) == 30
    assert plan.image_ids[4:6] == ("00001-00001", "00001-00002")


@pytest.mark.parametrize("per_file", [1, 7, 100, 1000])
def test_the_files_of_a_set_hold_every_row_once(per_file):
    plan = Plan(change(DIGITS, "labels.images_per_file", per_file), FACTS)
    shards = plan.shards(plan.labelled(plan.distilled))
    assert [row for shard in shards for row in shard.rows] == list(range(100))
    assert len({shard.fingerprint for shard in shards}) == len(shards) == -(-100 // per_file)


def test_work_is_counted_in_full():
    work = {stage: amount for stage, (amount, _) in Plan(DIGITS, FACTS).work().items()}
    assert work == {
        "pool": 200 * 10 * 2,
        "statistics": 200 * 10,
        "synthesis": 100 * 200,
        "labels": 100 * 100 * 10,
        "evaluation": 3 * (5 * 100 * 300 + 200 * 30),
    }


@pytest.mark.parametrize(
    ("labels", "num_classes", "each"),
    [
        ({}, 10, 100 * 10 * 2),
        ({"averaged": True}, 10, 10 * 2),
        ({"mode": "none"}, 10, 0),
        ({"mode": "top_k", "top_k": 3}, 10, 100 * 3 * (2 + 1)),
        ({"mode": "top_k", "top_k": 3}, 256, 100 * 3 * (2 + 1)),
        ({"mode": "top_k", "top_k": 3, "averaged": True}, 257, 3 * (2 + 2)),
    ],
)
def test_bytes_of_labels_are_known_beforehand(labels, num_classes, each):
    recipe = DIGITS
    for key, value in labels.items():
        recipe = change(recipe, f"labels.{key}", value)
    assert Plan(recipe, with_counts(*[20] * num_classes)).label_bytes == 10 * num_classes * each


def test_weight_of_a_blend_does_not_matter_where_nothing_is_blended():
    assert changed(change(DIGITS, "statistics.blend", 0.3)) == set()


def test_buffers_do_not_depend_on_how_moments_would_have_been_taken():
    base = change(change(DIGITS, "statistics.scope", "global"), "statistics.source", "buffers")
    assert changed(base) >= from_stage("statistics")
    for key, value in {"statistics.view": "plain", "statistics.chunk_size": 7, "statistics.threads": 3}.items():
        assert changed(change(base, key, value), base=base) == set()
    assert changed(change(base, "synthesis.augmentation.flip", True), base=base) == from_stage("synthesis")
