"""What S starts from: noise, and mosaics of patches that models have chosen between."""

import numpy as np
import pytest
import torch
from torch import nn

from teddy_ray.augment import apply_boxes, draw_boxes
from teddy_ray.models import build, freeze
from teddy_ray.randomness import generator
from teddy_ray.recipe import Augmentation, Mosaic
from teddy_ray.starts import mosaic_start, noise_start

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

CPU = torch.device("cpu")
SIZE = 12
FLIPPED = Augmentation(crop_scale=(0.01, 0.02), crop_ratio=(0.5, 2.0), flip=True)
"""Its crops are never those of a mosaic: `Mosaic.crop_scale` takes their place."""


# -- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_is_grey_and_follows_its_key(channels):
    noise = noise_start(50, channels, 16, (0, "unit A"))
    assert noise.dtype == np.uint8
    assert noise.shape == (50, channels, 16, 16)
    inside = noise[(noise > 0) & (noise < 255)]
    assert abs(inside.mean() - 127.5) < 2
    assert abs(np.quantile(noise, 0.8413) - 255 * 0.75) < 3  # one standard deviation above the mean
    assert [(noise == end).mean() for end in (0, 255)] == pytest.approx([0.0228] * 2, abs=0.005)  # what lies beyond
    assert np.array_equal(noise, noise_start(50, channels, 16, (0, "unit A")))
    for key in [(1, "unit A"), (0, "unit B")]:
        assert not np.array_equal(noise, noise_start(50, channels, 16, key))


# -- mosaics -------------------------------------------------------------------------------------------------------


class Likes(nn.Module):
    """A model for which the first class is the likelier, the brighter an image is; the second, the darker."""

    def __init__(self, channel=0):
        super().__init__()
        self.channel = channel

    def forward(self, x):
        brightness = x[:, self.channel].mean((1, 2)) - 0.5
        return 4 * torch.stack([brightness, -brightness], 1)


def plain(values, channels=1):
    """One image of a constant colour per value; values: (n,) or (n channels)."""
    colours = np.asarray(values, dtype=np.uint8).reshape(len(values), -1, 1, 1)
    return np.broadcast_to(colours, (len(values), channels, SIZE, SIZE)).copy()


def keys(*slots):
    return [(0, "a class", slot) for slot in slots]


def mosaics(real, label=0, models=None, part=None, slots=(0,), augmentation=FLIPPED):
    models = [Likes()] if models is None else models
    return mosaic_start(real, label, models, part or Mosaic(), augmentation, keys=keys(*slots), device=CPU)


def places(images, grid):
    """(n c h w) -> (n grid grid c height width), cut by hand."""
    step = SIZE // grid
    return np.array(
        [
            [[image[:, i * step : (i + 1) * step, j * step : (j + 1) * step] for j in range(grid)] for i in range(grid)]
            for image in images
        ]
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("grid", [2, 3, 4, 6])
def test_every_place_shows_the_likeliest_of_its_own_candidates(grid, candidates, channels):
    num = 3
    values = generator("values").integers(0, 256, (num, grid, grid, candidates))
    real = plain(values.reshape(-1), channels)
    part = Mosaic(grid=grid, candidates=candidates)
    for label, likeliest in enumerate((values.max(3), values.min(3))):
        images = mosaics(real, label, part=part, slots=range(num))
        assert images.dtype == np.uint8
        assert images.shape == (num, channels, SIZE, SIZE)
        expected = np.broadcast_to(likeliest[..., None, None, None], (*likeliest.shape, channels, *[SIZE // grid] * 2))
        assert np.array_equal(places(images, grid), expected)


def test_the_mean_cross_entropy_of_all_models_decides():
    # of three candidates, each model alone would take another than both together
    red, green = Likes(channel=0), Likes(channel=1)
    candidates = np.array([[250, 20], [20, 250], [140, 140]])
    real = plain(np.tile(np.insert(candidates, 2, 0, axis=1), (4, 1)), channels=3)
    part = Mosaic(grid=2, candidates=3)
    for models, taken in [([red], 0), ([green], 1), ([red, green], 2), ([green, red, green, red], 2)]:
        images = mosaics(real, models=models, part=part)
        assert np.array_equal(images[0, :2, 0, 0], candidates[taken])
        assert np.array_equal(images, np.broadcast_to(images[:, :, :1, :1], images.shape))


def test_the_cross_entropy_decides_not_the_logit():
    # surer of everything is not surer of the class: the brighter candidate raises the other class's logit more
    class Loud(nn.Module):
        def forward(self, x):
            brightness = x.mean((1, 2, 3))
            return torch.stack([brightness, 2 * brightness], 1)

    images = mosaics(plain([200, 50] * 4), models=[Loud()], part=Mosaic(candidates=2))
    assert (images == 50).all()


def textured(num, channels=1):
    return generator("textured").integers(0, 256, (num, channels, SIZE, SIZE), dtype=np.uint8)


@pytest.mark.parametrize("grid", [2, 3])
def test_patches_are_the_boxes_of_their_key_cut_from_their_own_images(grid):
    part = Mosaic(grid=grid, candidates=3, crop_scale=(0.3, 0.6))
    num = grid**2 * part.candidates
    real = textured(2 * num)
    model = Likes()
    crops = FLIPPED.model_copy(update={"crop_scale": part.crop_scale})
    for image, (key, rows) in zip(
        mosaics(real, models=[model], part=part, slots=(4, 9)),
        zip(keys(4, 9), np.split(real, 2), strict=True),
        strict=True,
    ):
        boxes = draw_boxes(crops, generator("mosaic", *key), num)
        assert 0 < boxes[:, 4].sum() < num
        x = torch.from_numpy(rows).float() / 255
        brightness = model(apply_boxes(x, boxes))[:, 0].reshape(-1, part.candidates)
        small = apply_boxes(x, boxes, SIZE // grid).unflatten(0, (grid, grid, part.candidates))
        for i, j in np.ndindex(grid, grid):
            expected = (small[i, j, brightness[grid * i + j].argmax()] * 255).round().numpy()
            assert np.array_equal(places(image[None], grid)[0, i, j], expected)


def test_a_whole_image_without_a_crop_shows_it_made_small():
    whole = Augmentation(crop_ratio=(1.0, 1.0), flip=False)
    real = textured(4)
    (image,) = mosaics(real, part=Mosaic(candidates=1, crop_scale=(1.0, 1.0)), augmentation=whole)
    small = nn.functional.interpolate(torch.from_numpy(real) / 255, (6, 6), mode="bilinear", antialias=True)
    expected = (small * 255).numpy().reshape(2, 2, 1, 6, 6)
    np.testing.assert_allclose(places(image[None], 2)[0], expected, rtol=0, atol=0.51)


@pytest.fixture(scope="module")
def convnets():
    names = ("convnet:width=8,depth=2", "convnet:width=8,depth=2,norm=group")
    return [freeze(build(name, num_classes=3, channels=1, image_size=SIZE)) for name in names]


def test_mosaics_follow_their_keys_alone(convnets):
    real = np.concatenate([textured(20)] * 2)
    first, second = mosaics(real, 1, convnets, slots=(0, 1))
    torch.manual_seed(99)
    again, same_key = mosaics(real, 1, convnets, slots=(0, 0))
    assert np.array_equal(again, first)
    assert np.array_equal(same_key, first)
    assert not np.array_equal(second, first)


@pytest.mark.parametrize("slots", [(2,), (2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_a_mosaic_does_not_depend_on_the_slots_made_with_it(slots, convnets):
    real = textured(5 * 20).reshape(5, 20, 1, SIZE, SIZE)
    everything = mosaics(real.reshape(-1, 1, SIZE, SIZE), 1, convnets, slots=range(5))
    some = mosaics(real[list(slots)].reshape(-1, 1, SIZE, SIZE), 1, convnets, slots=slots)
    assert np.array_equal(some, everything[list(slots)])


def test_making_mosaics_leaves_models_and_real_images_alone(convnets):
    real = textured(20)
    before = [real.copy(), *(value.clone() for model in convnets for value in model.state_dict().values())]
    mosaics(real, 1, convnets)
    after = [real, *(value for model in convnets for value in model.state_dict().values())]
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
