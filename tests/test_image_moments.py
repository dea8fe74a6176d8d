"""Moments of each image in float64, by PyTorch and by the kernel, against extended precision."""

import numpy as np
import pytest
import torch

from teddy_ray import moments
from teddy_ray.kernels import moments as kernel
from teddy_ray.kernels.build import compiler

torch.set_num_threads(1)

WAYS = [
    pytest.param(moments.image_moments, id="torch"),
    pytest.param(
        kernel.image_moments,
        id="kernel",
        marks=pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler"),
    ),
]


def draw(n, c, p, mean, sigma, seed=0):
    """float32 activations (n c p) as a channels-last layer gives them."""
    noise = torch.randn(n, p, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + sigma * noise).float().transpose(1, 2)


def exact(activation):
    x = activation.double().numpy().astype(np.longdouble)
    mean = x.mean(2)
    return mean, ((x - mean[:, :, None]) ** 2).mean(2)


def assert_exact(way, x):
    mean, var = way(x)
    assert mean.dtype == var.dtype == torch.float64
    exact_mean, exact_var = exact(x)
    # float64 holds no mean closer than to its own spacing
    assert (np.abs(mean.numpy() - exact_mean) <= 1e-9 * np.sqrt(exact_var) + np.spacing(mean.numpy())).all()
    np.testing.assert_allclose(var, exact_var.astype(np.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(3, 32, 64), (2, 33, 49), (1, 1, 2), (2, 70, 1024), (5, 7, 9)], ids=str)
@pytest.mark.parametrize("scale", [(0.0, 1.0), (1e4, 1e-2), (-3e5, 1.0), (0.0, 1e-15), (1e-3, 1e10)], ids=str)
def test_moments_of_an_image_are_exact(way, shape, scale):
    assert_exact(way, draw(*shape, *scale))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outlier", [1e7, -1e30])
def test_a_first_position_far_from_all_others_costs_no_digits(way, outlier):
    """It is what the sums are taken around."""
    x = draw(2, 40, 4096, 5.0, 1e-3)
    x[:, :, 0] = outlier
    assert_exact(way, x)


@pytest.mark.parametrize("way", WAYS)
def test_one_position_has_no_variance(way):
    x = draw(4, 37, 1, 3.0, 1.0)
    mean, var = way(x)
    assert torch.equal(mean, x[:, :, 0].double())
    assert not var.any()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_stays_so_in_its_own_channel(way):
    x = draw(2, 40, 16, 0.0, 1.0)
    x[1, 3, 5], x[0, 35, 0] = torch.nan, torch.inf
    mean, var = way(x)
    bad = torch.zeros(2, 40, dtype=torch.bool)
    bad[1, 3] = bad[0, 35] = True
    assert torch.equal(~(mean + var).isfinite(), bad)


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_threads_and_layout_do_not_change_the_kernels_bits():
    x = draw(13, 45, 50, 2.0, 1.0)
    one = kernel.image_moments(x)
    try:
        torch.set_num_threads(3)
        three = kernel.image_moments(x.contiguous())
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, three))
