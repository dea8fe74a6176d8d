"""What the training of the pool's models adds to the training loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import in_memory, train_on
from sklearn.datasets import load_digits

from teddy_ray.augment import apply_boxes, draw_boxes
from teddy_ray.models import Classifier
from teddy_ray.pixels import from_pixels
from teddy_ray.pool import EVALUATION_BATCH, Labelled, measure, recalibrated
from teddy_ray.randomness import generator
from teddy_ray.recipe import Augmentation, Pool

CPU = torch.device("cpu")
POOL = Pool(augmentation=Augmentation(flip=False))


@pytest.fixture(scope="module")
def digits() -> Labelled:
    bunch = load_digits()
    pixels = (bunch.images[:600, None] / 16 * 255).round().astype(np.uint8)
    return in_memory(pixels, bunch.target[:600].astype(np.int64))


@pytest.fixture(scope="module")
def trained(digits: Labelled) -> dict[int, Classifier]:
    (pixels,) = digits.read([np.arange(600)])
    return train_on(pixels, digits.labels, (2, 6))


def test_a_base_learns_and_comes_out_the_same_twice(digits: Labelled, trained: dict[int, Classifier]) -> None:
    (pixels,) = digits.read([np.arange(600)])
    assert list(trained) == [2, 6]
    assert measure(trained[6], digits, np.arange(600), CPU) > 0.8
    again, other = (train_on(pixels, digits.labels, (2, 6), seed=seed)[6].state_dict() for seed in (0, 1))
    first = trained[6].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.classifier.weight"], other["network.classifier.weight"])
    assert not torch.equal(first["network.classifier.weight"], trained[2].state_dict()["network.classifier.weight"])


def test_recalibration_takes_statistics_of_all_images_with_weights_as_they_are(
    digits: Labelled, trained: dict[int, Classifier]
) -> None:
    """Of the first layer they can be had by hand: means of batches, averaged."""
    model = trained[6]
    ours = recalibrated(model, digits, POOL, CPU)
    for (name, weights), (_, before) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(weights, before), name
    random = generator("recalibrate")
    random.integers(2**63)
    boxes = draw_boxes(POOL.augmentation, random, 600)
    parts = np.array_split(random.permutation(600), -(-600 // EVALUATION_BATCH))
    convolution, norm = model.network.features[0], ours.get_submodule("network.features.1")
    means, variances = [], []
    with torch.no_grad():
        for rows, pixels in zip(parts, digits.read(parts), strict=True):
            x = (apply_boxes(from_pixels(pixels, CPU), boxes[rows]) - 0.5) / 0.25
            activation = convolution(x).double()
            means.append(activation.mean((0, 2, 3)))
            variances.append(activation.var((0, 2, 3)))
    torch.testing.assert_close(norm.running_mean.double(), torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)
    assert (norm.running_mean - model.get_submodule("network.features.1").running_mean).abs().max() > 1e-4
