"""Per-class moments, their merges and their mixtures, against exact rational arithmetic."""

from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
import torch

from teddy_ray.kernels.build import compiler
from teddy_ray.moments import Moments, class_moments

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

COUNTS = (1, 9, 40, 0, 110)
"""Images per class: unequal, one class absent."""
POSITIONS = 6


def draw(mean, sigma, dtype, seed=0):
    """Activations (n 2 positions) around `mean`, each class shifted by a sigma, and labels in random order."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
    noise = random.standard_normal((len(labels), 2, POSITIONS)) + labels[:, None, None]
    return torch.from_numpy((mean + sigma * noise).astype(dtype)), torch.from_numpy(labels)


def moments_in_chunks(activation, labels, size, **options):
    chunks = zip(activation.split(size), labels.split(size), strict=True)
    return reduce(Moments.merge, [class_moments(*chunk, len(COUNTS), **options) for chunk in chunks])


def shares_of(classes):
    counts = torch.tensor([float(COUNTS[c]) if c in classes else 0.0 for c in range(len(COUNTS))], dtype=torch.float64)
    return counts / counts.sum()


def assert_moments_of(pooled, mu, var):
    """Compare with the exact moments of pooled activations (n channels positions): 1e-9 sigma, 1e-9 of the variance."""
    for channel in range(pooled.shape[1]):
        values = [Fraction(value) for value in pooled[:, channel].double().flatten().tolist()]
        exact_mu = sum(values) / len(values)
        exact_var = sum((value - exact_mu) ** 2 for value in values) / len(values)
        sigma = float(exact_var) ** 0.5
        # float64 holds no mean closer than to its own spacing, which is above 1e-9 sigma where mean / sigma > 1e7
        floor = float(np.spacing(abs(float(exact_mu)))) / sigma
        assert abs(float(Fraction(float(mu[channel])) - exact_mu)) <= (1e-9 + floor) * sigma
        assert abs(float(Fraction(float(var[channel])) / exact_var - 1)) <= 1e-9 + floor


SCALES = [
    (0.0, 1.0, "float64"),
    (0.0, 1e-8, "float32"),
    (3.0, 0.5, "float32"),
    (-1e3, 1e-3, "float64"),
    (1e5, 0.1, "float64"),
    (1e6, 0.1, "float64"),
    (1e6, 0.1, "float32"),
    (1e4, 1e-2, "float32"),
]


@pytest.mark.parametrize("chunk_size", [160, 64, 7])
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("classes", [(0, 1, 2, 4), (1, 4), (0,)], ids=str)
@pytest.mark.parametrize("kernels", [False, True])
def test_mixture_equals_moments_of_pooled_subset(kernels, scale, chunk_size, classes):
    if kernels and (scale[2] != "float32" or compiler() is None):
        pytest.skip("the kernel is for float32, and needs a C++ compiler")
    activation, labels = draw(*scale)
    mu, var = moments_in_chunks(activation, labels, chunk_size, kernels=kernels).mixture(shares_of(classes))
    assert mu.dtype == var.dtype == torch.float64
    assert_moments_of(activation[torch.isin(labels, torch.tensor(classes))], mu, var)


def test_classes_far_apart_leave_each_other_exact():
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.permutation(np.repeat(np.arange(3), 400)))
    noise = torch.from_numpy(0.1 * random.standard_normal((1200, 2, POSITIONS)))
    activation = 1e6 * (labels - 1)[:, None, None] + noise
    merged = class_moments(activation[:900], labels[:900], 3).merge(class_moments(activation[900:], labels[900:], 3))
    for label in range(3):
        alone = torch.eye(3, dtype=torch.float64)[label]
        assert_moments_of(activation[labels == label], *merged.mixture(alone))
    assert_moments_of(activation, *merged.mixture(torch.full((3,), 1 / 3, dtype=torch.float64)))


def test_mixture_weighs_classes_by_the_shares_asked_for():
    activation, labels = draw(2.0, 1.0, "float64")
    x = activation.numpy()
    one, two = x[labels == 1], x[labels == 2]
    mu, var = class_moments(activation, labels, 5).mixture(torch.tensor([0.0, 0.25, 0.75, 0.0, 0.0]))
    expected_mu = 0.25 * one.mean((0, 2)) + 0.75 * two.mean((0, 2))
    deviations = [((part - expected_mu[:, None]) ** 2).mean((0, 2)) for part in (one, two)]
    np.testing.assert_allclose(mu, expected_mu, rtol=1e-13)
    np.testing.assert_allclose(var, 0.25 * deviations[0] + 0.75 * deviations[1], rtol=1e-13)


def test_shares_that_sum_to_1_only_nearly_do_not_scale_a_large_mean():
    activation, labels = draw(1e6, 0.1, "float64")
    moments = class_moments(activation, labels, len(COUNTS))
    thirds = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]) / 3  # float32: their sum is 1 + 3e-8
    mu, _ = moments.mixture(thirds)
    expected = np.mean([activation[labels == c].sub(1e6).mean((0, 2)) for c in (1, 2, 4)], axis=0)
    np.testing.assert_allclose(mu - 1e6, expected, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 13, 80])
def test_merged_chunks_equal_one_pass_in_every_class(chunk_size):
    activation, labels = draw(50.0, 0.1, "float32")
    merged = moments_in_chunks(activation, labels, chunk_size)
    for label, num_images in enumerate(COUNTS):
        assert merged.count[label] == num_images
        if num_images:
            alone = torch.zeros(len(COUNTS), dtype=torch.float64)
            alone[label] = 1.0
            assert_moments_of(activation[labels == label], *merged.mixture(alone))


def test_merge_of_chunks_that_share_no_class():
    activation, labels = draw(1e5, 0.1, "float64")
    order = labels.argsort()
    merged = moments_in_chunks(activation[order], labels[order], 30)
    assert_moments_of(activation, *merged.mixture(shares_of((0, 1, 2, 4))))


def test_absent_class_has_zeros_and_cannot_be_mixed():
    moments = class_moments(*draw(5.0, 1.0, "float64"), len(COUNTS))
    assert moments.count[3] == 0
    assert not moments.mean[3].any()
    assert not moments.m2[3].any()
    with pytest.raises(ValueError, match=r"no activations of classes \[3\]"):
        moments.mixture(torch.full((5,), 0.2, dtype=torch.float64))


def test_constant_activations_have_no_variance():
    labels = torch.tensor([0, 1, 0, 1, 1])
    moments = class_moments(torch.full((5, 2, 3), 1e6 + 0.1), labels, 2)
    mu, var = moments.merge(moments).mixture(torch.tensor([0.5, 0.5]))
    assert torch.equal(mu, torch.full((2,), 1e6 + 0.1).double())
    assert torch.equal(var, torch.zeros(2, dtype=torch.float64))


def test_pooled_is_the_mixture_of_all_classes():
    activation, labels = draw(1e4, 1e-2, "float32")
    pooled = class_moments(activation, labels, len(COUNTS)).pooled()
    assert pooled.count.tolist() == [sum(COUNTS)]
    assert_moments_of(activation, *pooled.mixture(torch.ones(1)))


def test_rows_are_added_where_they_belong():
    activation, labels = draw(3.0, 1.0, "float64")
    total = Moments.zeros(len(COUNTS), 2)
    for chunk, own in zip(activation.split(50), labels.split(50), strict=True):
        present, rows = own.unique(return_inverse=True)
        total.add(present, class_moments(chunk, rows, len(present)))
    whole = moments_in_chunks(activation, labels, 50)
    for field in ("count", "mean", "m2"):
        assert torch.equal(getattr(total, field), getattr(whole, field))


def test_layers_of_different_sizes_stand_side_by_side():
    """An image has the same weight in every layer, however many positions that has."""
    small, labels = draw(3.0, 1.0, "float64")
    large = torch.from_numpy(np.random.default_rng(1).standard_normal((len(labels), 3, 50)))
    halves = [slice(None, 70), slice(70, None)]
    merged = reduce(
        Moments.merge,
        [Moments.beside([class_moments(layer[half], labels[half], 5) for layer in (small, large)]) for half in halves],
    )
    for layer, moments in zip((small, large), merged.split([2, 3]), strict=True):
        assert_moments_of(layer[labels == 4], *moments.mixture(shares_of((4,))))
        assert_moments_of(layer, *moments.mixture(shares_of((0, 1, 2, 4))))
