"""Views depend on (seed, set, image, view) alone, and are the same bits in every batch, thread and process."""

import dataclasses
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from teddy_ray.augment import apply_boxes, boxes_of_each
from teddy_ray.recipe import Augmentation
from teddy_ray.views import Mixes, ViewedImages, Views

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

IDS = [f"{label:05d}-{slot:05d}" for label in range(4) for slot in range(5)]
ROWS = np.arange(len(IDS))
VIEWS = Views(seed=3, set_key="a set", ids=IDS, augmentation=Augmentation())
MIXED = dataclasses.replace(VIEWS, cutmix=1.0)
CPU = torch.device("cpu")


def pixels(channels=3, size=12):
    return np.random.default_rng(0).integers(0, 256, (len(IDS), channels, size, size), dtype=np.uint8)


def same(x, y):
    return x.numpy().tobytes() == y.numpy().tobytes()


# -- what is drawn -------------------------------------------------------------------------------------------------


def test_boxes_of_an_image_follow_its_id_whichever_others_are_asked_for():
    together = VIEWS.boxes(ROWS, 2)
    for rows in ([3, 1], [7], list(range(19, 4, -1))):
        assert np.array_equal(VIEWS.boxes(np.array(rows), 2), together[rows])
    part = dataclasses.replace(VIEWS, ids=IDS[5:9])
    assert np.array_equal(part.boxes(np.arange(4), 2), together[5:9])


def test_boxes_are_apart_for_every_image_and_view():
    boxes = np.concatenate([VIEWS.boxes(ROWS, view) for view in range(6)])
    assert len(np.unique(boxes[:, :4], axis=0)) == len(IDS) * 6


@pytest.mark.parametrize("change", [{"seed": 4}, {"set_key": "another set"}], ids=str)
@pytest.mark.parametrize("drawn", ["boxes", "mixes"])
def test_another_seed_or_set_has_other_draws(change, drawn):
    def draws(views):
        return views.boxes(ROWS, 0) if drawn == "boxes" else views.mixes(ROWS, 0, 32).boxes

    ours, theirs = draws(MIXED), draws(dataclasses.replace(MIXED, **change))
    assert not (ours == theirs)[:, :4].all(1).any()


def test_draws_stay_the_same_whatever_was_drawn_before():
    before = VIEWS.boxes(ROWS, 1)
    np.random.seed(1)
    torch.manual_seed(1)
    VIEWS.boxes(ROWS, 0)
    assert np.array_equal(VIEWS.boxes(ROWS, 1), before)


def test_boxes_are_those_of_the_augmentation_to_a_65536th_of_the_image():
    drawn = boxes_of_each(VIEWS.augmentation, [("view", 3, "a set", image_id, 1) for image_id in IDS])
    boxes = VIEWS.boxes(ROWS, 1)
    assert np.abs(boxes - drawn).max() <= 2**-17
    assert np.array_equal(boxes * 2**16, np.round(boxes * 2**16))


def test_partners_are_other_images_of_the_whole_set_and_boxes_lie_inside():
    size = 24
    found = [MIXED.mixes(ROWS, view, size) for view in range(300)]
    partners = np.stack([mixes.partners for mixes in found])
    assert (partners != ROWS).all()
    assert all(set(column) == set(ROWS) - {row} for row, column in enumerate(partners.T))
    top, bottom, left, right = np.concatenate([mixes.boxes for mixes in found]).T
    assert ((top >= 0) & (top <= bottom) & (bottom <= size)).all()
    assert ((left >= 0) & (left <= right) & (right <= size)).all()
    shares = np.concatenate([mixes.shares(size) for mixes in found])
    assert (shares == (bottom - top) * (right - left) / size**2).all()
    # of boxes of area 1 - lambda, uniform, around uniform centres: what is left of them inside the image
    random = np.random.default_rng(0)
    half = np.sqrt(random.random(200_000)) / 2
    inside = [np.clip(c + half, 0, 1) - np.clip(c - half, 0, 1) for c in random.random((2, 200_000))]
    assert abs(shares.mean() - (inside[0] * inside[1]).mean()) < 0.02


def test_the_share_of_mixed_views_is_that_of_the_recipe():
    views = dataclasses.replace(VIEWS, cutmix=0.3)
    whole = np.concatenate([MIXED.mixes(ROWS, view, 32).boxes for view in range(200)])
    some = np.concatenate([views.mixes(ROWS, view, 32).boxes for view in range(200)])
    mixed = (some != 0).any(1)
    assert abs(mixed.mean() - 0.3) < 0.03
    assert np.array_equal(some[mixed], whole[mixed])


@pytest.mark.parametrize(
    "views", [VIEWS, dataclasses.replace(MIXED, ids=IDS[:1])], ids=["none asked for", "no partner"]
)
def test_nothing_is_mixed_where_nothing_can_be(views):
    assert views.mixes(np.array([0]), 0, 32) is None


# -- what is seen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_is_the_bilinear_crop_of_the_augmentation(channels):
    images = pixels(channels=channels)
    seen = ViewedImages(images, VIEWS).view(ROWS, 4, CPU)
    expected = apply_boxes(torch.from_numpy(images).double() / 255, VIEWS.boxes(ROWS, 4))
    assert seen.dtype == torch.float32
    assert (seen - expected).abs().max() < 1e-6
    mirrored = VIEWS.boxes(ROWS, 4)[:, 4]
    assert 0 < mirrored.sum() < len(ROWS)


def test_without_augmentation_the_images_are_seen_as_they_are():
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    plain = Views(seed=0, set_key="", ids=["one"], augmentation=None)
    seen = ViewedImages(images, plain).view(np.array([0]), 0, CPU)
    assert np.array_equal((seen * 255).round().numpy().astype(np.uint8), images)
    assert seen.min() == 0
    assert seen.max() == 1


def test_a_mixed_view_is_the_image_with_a_box_of_its_partners_view():
    images = pixels()
    viewed, plain = ViewedImages(images, MIXED), ViewedImages(images, VIEWS)
    seen, alone, mixes = viewed.view(ROWS, 2, CPU), plain.view(ROWS, 2, CPU), viewed.mixes(ROWS, 2)
    for row in ROWS:
        top, bottom, left, right = mixes.boxes[row]
        expected = alone[row].clone()
        expected[:, top:bottom, left:right] = alone[mixes.partners[row]][:, top:bottom, left:right]
        assert same(seen[row], expected)


@pytest.mark.parametrize("views", [VIEWS, dataclasses.replace(VIEWS, cutmix=0.1), MIXED], ids=lambda v: f"{v.cutmix}")
@pytest.mark.parametrize("size", [8, 31, 64])
def test_a_view_is_the_same_bits_in_every_batch_and_order_and_with_any_threads(views, size):
    viewed = ViewedImages(pixels(size=size), views)
    together = viewed.view(ROWS, 1, CPU)
    for rows in ([0], [7, 3], [*range(19, -1, -1)], [2] * 9):
        assert same(viewed.view(np.array(rows), 1, CPU), together[rows])
    torch.set_num_threads(4)
    try:
        assert same(viewed.view(ROWS, 1, CPU), together)
    finally:
        torch.set_num_threads(1)


OTHER_PROCESSORS = {
    "this one": {},
    "of fewer instructions": {
        "ATEN_CPU_CAPABILITY": "default",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL",
    },
}


@pytest.mark.parametrize("processor", OTHER_PROCESSORS)
def test_a_view_is_the_same_bits_in_another_process(processor):
    viewed = ViewedImages(pixels(), MIXED)
    code = """
import hashlib, sys
sys.path.insert(0, "tests")
from test_views import CPU, MIXED, ROWS, ViewedImages, pixels
x = ViewedImages(pixels(), MIXED).view(ROWS[::-1].copy(), 5, CPU).flip(0).contiguous()
print(hashlib.sha256(x.numpy().tobytes()).hexdigest())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **OTHER_PROCESSORS[processor]},
    )
    assert done.stdout.strip() == hashlib.sha256(viewed.view(ROWS, 5, CPU).numpy().tobytes()).hexdigest()


def test_views_may_be_counted_by_numbers_of_numpy():
    assert np.array_equal(VIEWS.boxes(ROWS, np.int64(3)), VIEWS.boxes(ROWS, 3))


def test_shares_of_empty_boxes_are_nothing():
    mixes = Mixes(np.array([1, 0]), np.array([[0, 0, 0, 0], [2, 6, 0, 8]]))
    assert mixes.shares(8).tolist() == [0.0, 0.5]
