"""The operator A against a bilinear resampling written pixel by pixel."""

import numpy as np
import pytest
import torch

from teddy_ray.augment import apply_boxes, draw_boxes
from teddy_ray.randomness import generator
from teddy_ray.recipe import Augmentation

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

FULL = [0.0, 0.0, 1.0, 1.0, 0.0]


def resampled(image, box):
    """One channel (h w) through one box."""
    height, width = image.shape
    top, left, box_height, box_width, mirrored = box
    view = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            column = width - 1 - j if mirrored else j
            y = (top + (i + 0.5) / height * box_height) * height - 0.5
            x = (left + (column + 0.5) / width * box_width) * width - 0.5
            y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            v, u = y - y0, x - x0
            above = (1 - u) * image[y0, x0] + u * image[y0, x1]
            below = (1 - u) * image[y1, x0] + u * image[y1, x1]
            view[i, j] = (1 - v) * above + v * below
    return view


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_views_equal_bilinear_resampling_pixel_by_pixel(size):
    images = torch.from_numpy(np.random.default_rng(0).random((6, 2, *size)))
    boxes = draw_boxes(Augmentation(crop_scale=(0.1, 1.0)), generator("test"), 6)
    assert 0 < boxes[:, 4].sum() < 6
    expected = [
        [resampled(channel, box) for channel in image] for image, box in zip(images.numpy(), boxes, strict=True)
    ]
    np.testing.assert_allclose(apply_boxes(images, boxes), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_box_is_the_identity(dtype):
    images = torch.rand(3, 1, 9, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    views = apply_boxes(images, np.tile(FULL, (3, 1)))
    assert views.dtype == dtype
    torch.testing.assert_close(views, images, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


def test_mirrored_full_box_flips_left_to_right():
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    views = apply_boxes(images, np.array([FULL, [*FULL[:4], 1.0]]))
    torch.testing.assert_close(views, torch.stack([images[0], images[1].flip(-1)]), rtol=0, atol=1e-14)


def test_gradient_flows_to_the_pixels():
    images = torch.rand(2, 1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = np.array([[0.1, 0.2, 0.6, 0.7, 0.0], [0.0, 0.3, 0.9, 0.5, 1.0]])
    assert torch.autograd.gradcheck(lambda x: apply_boxes(x, boxes), images.requires_grad_())


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [
        ((0.5, 1.0), (0.75, 4 / 3)),
        ((0.08, 0.3), (0.5, 2.0)),
        ((0.9, 1.0), (0.75, 4 / 3)),
        ((0.5, 0.8), (1.2, 1.25)),
    ],
)
def test_boxes_keep_to_the_image_and_the_ranges(scale, ratio):
    boxes = draw_boxes(Augmentation(crop_scale=scale, crop_ratio=ratio), generator("test"), 2000)
    top, left, height, width, _ = boxes.T
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-12
    area = height * width
    assert scale[0] - 1e-12 <= area.min() < area.max() <= scale[1] + 1e-12
    assert ratio[0] - 1e-12 <= (width / height).min() < (width / height).max() <= ratio[1] + 1e-12


def test_boxes_spread_over_the_ranges():
    boxes = draw_boxes(Augmentation(crop_scale=(0.2, 0.4), crop_ratio=(0.5, 2.0)), generator("test"), 2000)
    top, left, height, width, mirrored = boxes.T
    np.testing.assert_allclose(np.quantile(height * width, [0.0, 0.5, 1.0]), [0.2, 0.3, 0.4], atol=0.01)
    np.testing.assert_allclose(np.quantile(np.log2(width / height), [0.0, 0.5, 1.0]), [-1, 0, 1], atol=0.1)
    np.testing.assert_allclose(np.quantile(top / (1 - height), [0.0, 0.5, 1.0]), [0, 0.5, 1], atol=0.05)
    np.testing.assert_allclose(np.quantile(left / (1 - width), [0.0, 0.5, 1.0]), [0, 0.5, 1], atol=0.05)
    assert 0.45 < mirrored.mean() < 0.55
    assert set(mirrored) == {0.0, 1.0}


def test_no_box_is_mirrored_without_flip():
    assert not draw_boxes(Augmentation(flip=False), generator("test"), 200)[:, 4].any()


def test_longer_draw_starts_with_the_shorter():
    augmentation = Augmentation()
    short, long = (draw_boxes(augmentation, generator("test"), num) for num in (3, 50))
    assert np.array_equal(long[:3], short)


def test_draws_follow_their_key_alone():
    draws = [draw_boxes(Augmentation(), generator(*key), 5) for key in [("a", 1), ("a", 2), ("b", 1), ("a", 1)]]
    assert np.array_equal(draws[0], draws[3])
    assert not np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert not np.array_equal(generator("a", "1").random(5), generator("a", 1).random(5))
    assert not np.array_equal(generator("ab", "c").random(5), generator("a", "bc").random(5))
