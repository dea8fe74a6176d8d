import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from plans import (
    DATA,
    DIGITS,
    EXECUTION,
    FACTS,
    FULL,
    GIVEN,
    LEAVES,
    MOSAIC,
    RESULT,
    another,
    change,
    changed,
    from_stage,
    get,
    stages,
)

from teddy_ray.fingerprints import VERSIONS
from teddy_ray.plan import STAGES, Plan
from teddy_ray.pool_plan import DataFacts
from teddy_ray.recipe import Curriculum, LabelMembers
from teddy_ray.recipe_file import parse_recipe
from teddy_ray.sources import open_source

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
        ("labels.precision", "labels"),
        ("evaluation.longer_epochs", "evaluation"),
        ("evaluation.threads", "evaluation"),
        ("evaluation.epochs", "evaluation"),
        ("evaluation.controls", "evaluation"),
        ("evaluation.loss", "evaluation"),
        ("evaluation.steps.at", "evaluation"),
        ("evaluation.ema", "evaluation"),
        ("evaluation.precision", "evaluation"),
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


def test_work_is_told_in_full():
    assert Plan(DIGITS, FACTS).work() == {
        "pool": f"{200 * 10 * 2:,} images x epochs x trainings",
        "statistics": f"{200 * 10:,} images x members",
        "synthesis": f"{100 * 200:,} images x steps x models per step",
        "labels": f"{100 * 100 * 10:,} images x views x members",
        "evaluation": f"{3 * (5 * 100 * 300 + 200 * 30):,} images x epochs x students; "
        f"labels of controls: {4 * 100 * 100 * 10:,} images x views x members",
    }


def test_work_of_controls_is_told_where_they_are_labelled():
    hard = change(DIGITS, "evaluation.controls", ("random_hard",))
    assert Plan(hard, FACTS).work()["evaluation"] == f"{3 * 2 * 100 * 300:,} images x epochs x students"
    plain = change(DIGITS, "evaluation.controls", ("distilled_plain",))
    assert (
        Plan(plain, FACTS).work()["evaluation"].endswith(f"; labels of controls: {100 * 10:,} images x views x members")
    )


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
