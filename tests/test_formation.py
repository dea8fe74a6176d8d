"""Images that hold several: made of real ones, enlarged for models, and seen part after part."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from teddy_ray.formation import enlarge, enlarge_all, shrink
from teddy_ray.views import ViewedImages, Views

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

CPU = torch.device("cpu")


def pixels(num, channels=3, size=12):
    return np.random.default_rng(num).integers(0, 256, (num, channels, size, size), dtype=np.uint8)


def parts_by_hand(image, formation):
    """(c h w) -> formation^2 of (c h/f w/f), row by row."""
    step = image.shape[-1] // formation
    return [
        image[:, row * step : (row + 1) * step, column * step : (column + 1) * step]
        for row in range(formation)
        for column in range(formation)
    ]


@pytest.mark.parametrize("formation", [2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_start_holds_the_means_of_the_squares_of_its_images(formation, channels):
    real = pixels(2 * formation**2, channels)
    starts = shrink(real, formation)
    assert starts.shape == (2, channels, 12, 12)
    held = [part for start in starts for part in parts_by_hand(start, formation)]
    for part, image in zip(held, real, strict=True):
        means = interpolate(torch.from_numpy(image)[None].double(), scale_factor=1 / formation, mode="area")[0]
        assert np.abs(part - means.numpy()).max() <= 0.5


@pytest.mark.parametrize("formation", [2, 3, 4])
def test_parts_are_enlarged_as_pytorch_does_it(formation):
    images = pixels(3)
    S = (torch.from_numpy(images).double() / 255).requires_grad_()
    small = torch.stack([part for image in S for part in parts_by_hand(image, formation)])
    right = interpolate(small, size=12, mode="bicubic", align_corners=False).clamp(0, 1)
    found = enlarge_all(S, formation)
    assert torch.allclose(found, right, atol=1e-12)
    weights = torch.from_numpy(pixels(len(right))).double()
    gradients = [torch.autograd.grad((x * weights).sum(), S)[0] for x in (found, right)]
    assert torch.allclose(*gradients, atol=1e-9)
    for part in range(formation**2):
        one = enlarge(torch.from_numpy(images).float(), formation, part)
        assert torch.allclose(one.double(), 255 * right[part :: formation**2], atol=1e-3)


def test_an_image_alone_is_itself():
    images = pixels(4)
    assert shrink(images, 1) is images
    S = torch.from_numpy(images).float()
    assert enlarge_all(S, 1) is S
    assert enlarge(S, 1, 0) is S


def test_views_take_the_parts_in_turn_and_mix_those_of_one_turn():
    images, ids = pixels(5), [f"image {index}" for index in range(5)]
    rows = np.arange(5)
    plain = ViewedImages(images, Views(seed=0, set_key="", ids=ids, augmentation=None, formation=2))
    mixed = ViewedImages(images, Views(seed=0, set_key="", ids=ids, augmentation=None, formation=2, cutmix=1.0))
    for view in range(9):
        whole = enlarge(torch.from_numpy(images).float(), 2, view % 4) / 255
        assert torch.allclose(plain.view(rows, view, CPU), whole)
        found, mixes = mixed.view(rows, view, CPU), mixed.mixes(rows, view)
        right = whole.clone()
        for row, (top, bottom, left, right_edge) in enumerate(mixes.boxes):
            right[row, :, top:bottom, left:right_edge] = whole[mixes.partners[row], :, top:bottom, left:right_edge]
        assert torch.allclose(found, right)
        assert torch.equal(found[[3, 1]], mixed.view(np.array([3, 1]), view, CPU))
