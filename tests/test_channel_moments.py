"""The kernel of means and variances against float64."""

import pytest
import torch

from teddy_ray.kernels.build import compiler
from teddy_ray.kernels.moments import _channel_moments, channel_moments

torch.set_num_threads(1)

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


def activation(n=7, c=5, p=300, mean=3.0, seed=0):
    """As a channels-last one lies: (n c p), channels innermost."""
    return mean + torch.randn(n, p, c, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)


@pytest.mark.parametrize("shape", [(7, 5, 300), (1, 1, 1), (2, 64, 256), (3, 33, 1), (600, 16, 9)])
@pytest.mark.parametrize(("mean", "off"), [(0.0, 0.0), (3.0, 1.0), (1000.0, 2.0)])
def test_values_are_those_of_float64(shape, mean, off):
    x = activation(*shape, mean=mean)
    mu, var = channel_moments(x, torch.full((shape[1],), mean + off))
    exact = x.double()
    # in units of sigma, which is 1
    torch.testing.assert_close(mu.double(), exact.mean((0, 2)), rtol=1e-7, atol=2e-6)
    torch.testing.assert_close(var.double(), exact.var((0, 2), correction=0), rtol=1e-5, atol=3e-6)


def test_gradient_is_that_of_float64():
    x, near = activation().requires_grad_(), torch.zeros(5)
    weights = torch.arange(1.0, 6.0), torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0])

    def loss(mu, var):
        return (weights[0].to(mu) * mu).sum() + (weights[1].to(mu) * var.square()).sum()

    (gradient,) = torch.autograd.grad(loss(*channel_moments(x, near)), x)
    exact = x.detach().double().requires_grad_()
    var, mu = torch.var_mean(exact, (0, 2), correction=0)
    (reference,) = torch.autograd.grad(loss(mu, var), exact)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-8)


def test_layout_and_threads_do_not_matter():
    x, near = activation(20, 16, 400), torch.ones(16)
    mu, var = channel_moments(x, near)
    assert all(map(torch.equal, channel_moments(x.contiguous(), near), (mu, var)))
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, channel_moments(x, near), (mu, var)))
    finally:
        torch.set_num_threads(1)


def test_constant_has_no_variance():
    mu, var = channel_moments(torch.full((3, 4, 50), 0.1), torch.zeros(4))
    torch.testing.assert_close(mu, torch.full((4,), 0.1))
    assert (var >= 0).all()
    assert var.max() < 1e-9


def test_operator_keeps_torchs_rules():
    torch.library.opcheck(_channel_moments, (activation(2, 8, 9).requires_grad_(), torch.zeros(8)))
