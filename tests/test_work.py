"""How many operations the pieces of a plan take, against sums done by hand."""

from dataclasses import replace

import pytest
from plans import DIGITS, EVERY_CONTROL, FACTS, change

from teddy_ray.plan import STAGES, Plan
from teddy_ray.recipe import Curriculum
from teddy_ray.work import flops_of_stages, forward_flops, moment_bytes, phases

PASS = 2 * (64 * 9 * 32 + 16 * 9 * 32 * 32 + 4 * 9 * 32 * 32 + 32 * 10)
"""ConvNet-3 of width 32 on one channel of 8x8: three convolutions, halved in between, and ten classes."""


def jobs(recipe=DIGITS, what=None, facts=FACTS):
    (found,) = (phase.jobs for phase in phases(Plan(recipe, facts)) if phase.what == what)
    return found


def test_a_pass_is_two_operations_per_weight_and_place():
    assert forward_flops("convnet:width=32", 10, 1, 8) == PASS


def test_resnet18_at_224_pixels_takes_what_everybody_says():
    assert forward_flops("torchvision/resnet18", 1000, 3, 224) / 2 == pytest.approx(1.814e9, rel=1e-3)


def test_every_piece_of_the_digits():
    """200 training and 30 test images, 2 bases of 10 epochs, 10 members, 100 synthetic images, 200 steps, 100 views."""
    facts = replace(FACTS, num_validation=20)
    bases = jobs(what="bases", facts=facts)
    assert [job.flops for job in bases] == [PASS * (200 * 10 * 3 + 5 * 20)] * 2
    assert [job.passes for job in bases] == [10 * 4 * 3] * 2  # batches of 64
    assert [job.flops for job in jobs(what="chunks")] == [PASS * 200 * 10]
    assert [job.flops for job in jobs(what="units")] == [PASS * 50 * 200 * 2] * 2
    assert [job.passes for job in jobs(what="units")] == [400, 400]
    assert [job.flops for job in jobs(what="files")] == [PASS * 100 * 100 * 10]
    assert [job.flops for job in jobs(what="files of controls")] == [PASS * 100 * 100 * 10] * 4  # 3 draws, 1 start
    students = jobs(what="students")
    assert sorted({job.flops for job in students}) == [
        PASS * (30 * 200 * 3 + 30),
        PASS * (300 * 100 * 3 + 30),
    ]
    assert len(students) == 18
    assert jobs(what="fine-tunings") == ()


def test_pruned_copies_cost_what_is_left_of_them():
    post = change(DIGITS, "pool.generation", "post")
    ratios = [job.flops / PASS / (200 * 3) for job in jobs(post, "fine-tunings")]
    assert ratios == pytest.approx([1, 0.64, 0.36] * 2)
    assert [job.flops for job in jobs(post, "bases")] == [PASS * 200 * 10 * 3] * 2


def test_views_of_a_curriculum_cost_their_pixels():
    small = change(DIGITS, "synthesis.curriculum", Curriculum(share=0.5, image_size=4))
    assert jobs(small, "units")[0].flops == pytest.approx(jobs(what="units")[0].flops * (0.5 + 0.5 / 4))


def test_plain_controls_have_one_view_each():
    files = jobs(EVERY_CONTROL, "files of controls")
    assert sorted({job.flops / PASS / 1000 for job in files}) == [1, 100]


def test_without_stored_labels_the_students_ask_the_members():
    nothing = change(DIGITS, "labels.mode", "none")
    assert {job.flops for job in jobs(nothing, "files")} == {0}
    soft = jobs(nothing, "students")[0]
    assert soft.flops == PASS * (300 * 100 * (3 + 10) + 30)


def test_every_rate_of_a_search_is_trained():
    search = change(DIGITS, "evaluation.learning_rate", (1e-3, 2e-3))
    facts = replace(FACTS, num_validation=20)
    assert jobs(search, "students", facts)[0].flops == PASS * (2 * 300 * 100 * 3 + 30 + 2 * 20)


def test_buffers_are_measured_by_nobody():
    buffers = change(change(DIGITS, "statistics.scope", "global"), "statistics.source", "buffers")
    assert jobs(buffers, "chunks") == ()


def test_images_that_do_not_fit_into_memory_are_decoded_in_every_epoch():
    assert [job.decoded for job in jobs(what="bases")] == [200] * 2
    assert [job.decoded for job in jobs(change(DIGITS, "pool.keep_bytes", 0), "bases")] == [2000] * 2
    recalibrated = change(change(DIGITS, "pool.keep_bytes", 0), "pool.recalibrate", True)
    assert [job.decoded for job in jobs(recalibrated, "bases")] == [3000] * 2
    whole = change(change(DIGITS, "evaluation.keep_bytes", 0), "evaluation.controls", ("full_data",))
    assert [job.decoded for job in jobs(whole, "students")] == [30] * 3 + [30 + 30 * 200] * 3


def test_units_that_share_classes_bar_each_other():
    recipe = change(change(DIGITS, "synthesis.classes_per_unit", 4), "synthesis.slots_per_unit", 2)
    units = next(phase for phase in phases(Plan(recipe, FACTS)) if phase.what == "units")
    assert (len(units.jobs), units.num_parallel) == (15, 3)
    assert sum(job.flops for job in units.jobs) == PASS * 100 * 200 * 2


def test_the_work_of_a_stage_is_that_whose_seconds_are_measured():
    flops = flops_of_stages(Plan(DIGITS, FACTS))
    assert list(flops) == list(STAGES)
    assert flops["labels"] == PASS * 100 * 100 * 10  # without those of controls
    assert flops["evaluation"] == sum(job.flops for job in jobs(what="students"))


def test_moments_of_a_class_are_two_numbers_per_channel_and_member():
    assert moment_bytes(Plan(DIGITS, FACTS)) == 10 * (3 * 32) * 16
