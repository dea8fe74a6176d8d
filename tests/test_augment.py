"""The operator A against a bilinear resampling written pixel by pixel."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from teddy_ray.augment import apply_boxes, boxes_of, boxes_of_each, draw_boxes, views_of_step
from teddy_ray.randomness import generator, uniforms
from teddy_ray.recipe import Augmentation, Curriculum, Synthesis

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


# -- views of another size -----------------------------------------------------------------------------------------


def averaged(image, box, size):
    """One channel (h w) through one box to (size size): every pixel weighs by its distance, in new pixels if larger."""
    height, width = image.shape
    top, left, box_height, box_width, mirrored = box
    reach_y, reach_x = max(box_height * height / size, 1.0), max(box_width * width / size, 1.0)
    view = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            column = size - 1 - j if mirrored else j
            y = (top + (i + 0.5) / size * box_height) * height - 0.5
            x = (left + (column + 0.5) / size * box_width) * width - 0.5
            y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
            total = weights = 0.0
            for a in range(height):
                for b in range(width):
                    weight = max(1 - abs(y - a) / reach_y, 0.0) * max(1 - abs(x - b) / reach_x, 0.0)
                    total, weights = total + weight * image[a, b], weights + weight
            view[i, j] = total / weights
    return view


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 12])
@pytest.mark.parametrize("shape", [(8, 8), (5, 7)])
def test_views_of_another_size_equal_a_mean_pixel_by_pixel(shape, size):
    images = torch.from_numpy(np.random.default_rng(0).random((4, 2, *shape)))
    boxes = draw_boxes(Augmentation(crop_scale=(0.1, 1.0)), generator("test", 3), 4)
    assert 0 < boxes[:, 4].sum() < 4
    expected = [
        [averaged(channel, box, size) for channel in image] for image, box in zip(images.numpy(), boxes, strict=True)
    ]
    np.testing.assert_allclose(apply_boxes(images, boxes, size), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [3, 4, 5, 14, 20, 28, 40])
def test_full_box_to_another_size_is_the_usual_resizing(size):
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 28, 28)))
    usual = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(apply_boxes(images, np.tile(FULL, (2, 1)), size), usual, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (32, 32)])
def test_views_of_the_old_size_keep_the_bytes_of_plain_bilinear_resampling(shape):
    # pools, statistics and labels that are on storage were made with it
    boxes = draw_boxes(Augmentation(crop_scale=(0.02, 1.0)), generator("test"), 500)
    images = torch.rand(500, 1, *shape, generator=torch.Generator().manual_seed(0))

    def matrices(start, extent, size):
        position = (start[:, None] + (np.arange(size) + 0.5) / size * extent[:, None]) * size - 0.5
        distance = np.abs(position.clip(0, size - 1)[:, :, None] - np.arange(size))
        return torch.from_numpy(np.maximum(1 - distance, 0)).float()[:, None]

    rows, columns = (matrices(boxes[:, axis], boxes[:, axis + 2], shape[axis]) for axis in (0, 1))
    columns = torch.where(torch.from_numpy(boxes[:, 4] > 0)[:, None, None, None], columns.flip(2), columns)
    assert torch.equal(apply_boxes(images, boxes), rows @ images @ columns.mT)


@pytest.mark.parametrize("size", [None, 1, 2, 5, 8, 11, 16])
def test_constant_images_stay_constant(size):
    boxes = draw_boxes(Augmentation(crop_scale=(0.05, 1.0)), generator("test"), 200)
    images = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None, None, None].expand(200, 1, 11, 11)
    views = apply_boxes(images, boxes, size)
    assert views.shape == (200, 1, size or 11, size or 11)
    torch.testing.assert_close(views, images[..., :1, :1].expand(views.shape), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [2, 3, 4, 6, 9])
def test_fine_checkerboard_becomes_grey_in_a_small_view(size):
    # odd ratios put every new pixel right onto an old one: interpolation alone would show black or white
    rows, columns = np.indices((18, 18))
    board = torch.from_numpy((rows + columns) % 2.0)[None, None]
    view = apply_boxes(board, np.array([FULL]), size)
    assert (view - 0.5).abs().max() < 0.02
    assert (apply_boxes(board, np.array([FULL])) - board).abs().max() < 1e-14


def test_gradient_flows_to_every_pixel_of_a_small_view():
    images = torch.rand(2, 1, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = np.array([FULL, [*FULL[:4], 1.0]])
    assert torch.autograd.gradcheck(lambda x: apply_boxes(x, boxes, 3), images.requires_grad_())
    (gradient,) = torch.autograd.grad(apply_boxes(images, boxes, 3).sum(), images)
    assert gradient.min() > 0


# -- curriculum ----------------------------------------------------------------------------------------------------

FINAL = Augmentation(crop_scale=(0.5, 1.0), crop_ratio=(0.8, 1.25), flip=False)


def views(steps=200, **curriculum):
    part = Synthesis(steps=steps, augmentation=FINAL, curriculum=Curriculum(**curriculum))
    return [views_of_step(part, step) for step in range(steps)]


def test_without_a_curriculum_every_view_is_of_the_last_kind():
    assert views() == [(FINAL, None)] * 200
    assert views(share=0.9) == [(FINAL, None)] * 200


def test_crop_scale_begins_at_the_curriculums_and_moves_in_a_straight_line():
    drawn = views(share=0.5, crop_scale=(0.9, 0.95))
    scales = np.array([augmentation.crop_scale for augmentation, _ in drawn])
    assert tuple(scales[0]) == (0.9, 0.95)
    done = np.minimum(np.arange(200) / 100, 1)[:, None]
    np.testing.assert_allclose(scales, (1 - done) * [0.9, 0.95] + done * [0.5, 1.0], rtol=1e-14)
    assert drawn[100:] == [(FINAL, None)] * 100
    for augmentation, size in drawn[:100]:
        assert augmentation.model_copy(update={"crop_scale": FINAL.crop_scale}) == FINAL
        assert size is None


@pytest.mark.parametrize(("share", "first_whole"), [(0.25, 50), (0.5, 100), (0.303, 61), (0.999, 200)])
def test_views_are_small_up_to_the_share_and_of_full_size_from_there(share, first_whole):
    drawn = views(share=share, image_size=4)
    assert drawn[:first_whole] == [(FINAL, 4)] * first_whole
    assert drawn[first_whole:] == [(FINAL, None)] * (200 - first_whole)


def test_every_step_of_a_curriculum_can_be_drawn():
    for augmentation, _ in views(steps=30, share=0.7, crop_scale=(0.08, 0.1)):
        boxes = draw_boxes(augmentation, generator("test"), 300)
        area = boxes[:, 2] * boxes[:, 3]
        low, high = augmentation.crop_scale
        assert low - 1e-12 <= area.min() < area.max() <= high + 1e-12


# -- boxes ---------------------------------------------------------------------------------------------------------


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


def test_uniforms_follow_their_own_key_and_are_uniform():
    keys = [("view", 0, f"image {row}") for row in range(4000)]
    drawn = uniforms(keys, 5)
    assert drawn.shape == (4000, 5)
    assert np.array_equal(uniforms(keys[7:9], 5), drawn[7:9])
    assert not np.isclose(uniforms([("view", 1, "image 0")], 5), drawn[:1]).any()
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts = np.stack([np.histogram(column, 10, (0, 1))[0] for column in drawn.T])
    assert (abs(counts - 400) < 5 * 400**0.5).all()
    assert abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.07
    assert np.array_equal(boxes_of(Augmentation(), drawn[:3]), boxes_of(Augmentation(), drawn)[:3])


def test_the_view_of_an_image_follows_from_its_key_alone():
    keys = [("statistics", 0, f"image {row}") for row in range(57)]
    whole = boxes_of_each(Augmentation(), keys)
    assert len({row.tobytes() for row in whole}) == 57
    some = [50, 3, 17]
    assert np.array_equal(boxes_of_each(Augmentation(), [keys[row] for row in some]), whole[some])
    other = boxes_of_each(Augmentation(), [("statistics", 1, image_id) for _, _, image_id in keys])
    assert not np.isclose(other[:, :4], whole[:, :4]).all(1).any()
