"""The priors against loops over pixels."""

import numpy as np
import pytest
import torch

from teddy_ray.priors import prior

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

SHAPES = [(3, 2, 5, 4), (1, 1, 1, 6), (2, 3, 6, 1), (1, 1, 1, 1)]


def by_hand(images, tv_weight, l2_weight):
    n, channels, height, width = images.shape
    total = 0.0
    for image in range(n):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    pixel = images[image, c, i, j]
                    if i > 0:
                        total += tv_weight * abs(pixel - images[image, c, i - 1, j])
                    if j > 0:
                        total += tv_weight * abs(pixel - images[image, c, i, j - 1])
                    total += l2_weight * (pixel - 0.5) ** 2
    return total / n


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.5), (0.0, 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_priors_equal_a_sum_pixel_by_pixel(shape, weights):
    images = np.random.default_rng(0).random(shape)
    value = prior(torch.from_numpy(images), *weights)
    assert value.shape == ()
    np.testing.assert_allclose(float(value), by_hand(images, *weights), rtol=1e-13)


@pytest.mark.parametrize("grey", [0.0, 0.2, 0.5, 1.0])
def test_constant_images_have_no_variation_and_grey_ones_no_prior_at_all(grey):
    images = torch.full((2, 3, 4, 5), grey, dtype=torch.float64)
    assert float(prior(images, 7.0, 0.0)) == 0
    assert (float(prior(images, 7.0, 3.0)) == 0) == (grey == 0.5)


def test_gradient_equals_finite_differences():
    images = torch.rand(2, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: prior(x, 0.3, 0.7), images.requires_grad_())


def test_gradient_of_grey_images_is_zero_and_finite():
    # absolute differences have a corner at 0, where constant images lie
    images = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(prior(images, 1.0, 1.0), images)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_prior_of_an_image_does_not_depend_on_how_many_there_are():
    images = torch.rand(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, many = prior(images, 0.3, 0.7), prior(images.expand(6, 1, 4, 4), 0.3, 0.7)
    torch.testing.assert_close(many, one, rtol=1e-14, atol=0)
