"""Moments of a stream of batches under several members, against float64 on the same activations."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from teddy_ray.frozen import frozen_copy
from teddy_ray.kernels.build import compiler
from teddy_ray.models import build, freeze
from teddy_ray.moments import Moments
from teddy_ray.statistics import Layout, Measurer

torch.set_num_threads(1)

CPU = torch.device("cpu")
SIZES = (7, 7, 7, 2)
KERNELS = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")),
]


def with_buffers(model, seed):
    """Random BatchNorm buffers; the first convolution's bias puts the mean of what follows far above its sigma."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=random)
            module.running_var = torch.rand(module.num_features, generator=random) + 0.5
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        if convolution.bias is not None:
            convolution.weight *= 1e-2
            convolution.bias.fill_(1e4)
    return freeze(model)


@pytest.fixture(scope="module")
def models():
    """Members of different layers and layers of different sizes."""
    names = ["convnet:width=16,depth=2", "convnet:width=32,depth=2,norm=group", "resnet18:width=8"]
    built = [build(name, num_classes=5, channels=3, image_size=8, seed=0) for name in names]
    return [with_buffers(model, seed) for seed, model in enumerate(built)]


@pytest.fixture(scope="module")
def batches():
    """Images of five classes in random order, of which one does not occur."""
    random = torch.Generator().manual_seed(3)
    y = torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (sum(SIZES),), generator=random)]
    x = torch.rand(sum(SIZES), 3, 8, 8, generator=random) + y[:, None, None, None] * 0.1
    return list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def tapped(model, batches, kernels):
    """By layer the inputs of all norms, (n channels positions), by hooks of its own."""
    model = frozen_copy(model, kernels=kernels)
    taken = {}

    def hook(name):
        return lambda module, inputs: taken.setdefault(name, []).append(inputs[0].flatten(2).double().numpy())

    for name, module in model.named_modules():
        if "Norm" in type(module).__name__:
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    return {name: np.concatenate(parts).astype(np.longdouble) for name, parts in taken.items()}


@pytest.mark.parametrize("kernels", KERNELS)
def test_moments_equal_a_direct_computation_on_the_same_activations(kernels, models, batches):
    moments, layout = Measurer(models, CPU, kernels=kernels).measure(iter(batches), 5)
    labels = torch.cat([y for _, y in batches]).numpy()
    assert moments.count.tolist() == np.bincount(labels, minlength=5).tolist()
    largest = 0.0
    for model, by_layer in zip(models, layout.by_layer(moments), strict=True):
        activations = tapped(model, batches, kernels)
        assert set(by_layer) == set(activations)
        for layer, own in by_layer.items():
            for label in (0, 1, 2, 4):
                x = activations[layer][labels == label].transpose(1, 0, 2).reshape(own.mean.shape[1], -1)
                mean, sigma = x.mean(1), x.std(1)
                floor = np.spacing(np.abs(mean).astype(np.float64))  # of float64 itself
                assert (np.abs(own.mean[label].numpy() - mean) <= 1e-9 * sigma + floor).all()
                np.testing.assert_allclose(own.m2[label] / own.count[label], (sigma**2).astype(float), rtol=1e-9)
                largest = max(largest, float((np.abs(mean) / sigma).max()))
    assert largest > 1e5  # mean >> sigma did occur
    assert not moments.mean[3].any()
    assert not moments.m2[3].any()


def test_same_batches_give_the_same_bits(models, batches):
    one, two = (Measurer(models, CPU, kernels=False).measure(iter(batches), 5)[0] for _ in range(2))
    assert all(torch.equal(getattr(one, field), getattr(two, field)) for field in ("count", "mean", "m2"))


def test_batches_are_taken_one_at_a_time(models, batches):
    """Nothing is read ahead or kept: memory does not grow with the data."""
    alive = []

    def stream():
        for x, y in batches:
            own = x.clone()
            alive.append(weakref.ref(own))
            assert sum(ref() is not None for ref in alive[:-1]) <= 1
            yield own, y
            del own

    Measurer(models[:1], CPU, kernels=False).measure(stream(), 5)
    assert len(alive) == len(SIZES)


def test_layout_names_the_owner_of_each_channel():
    layout = Layout((((("a", 2), ("b", 3))), (("a", 1),)))
    assert layout.num_channels == 6
    assert [layout.owner(channel) for channel in range(6)] == [(0, "a")] * 2 + [(0, "b")] * 3 + [(1, "a")]
    with pytest.raises(IndexError):
        layout.owner(6)
    numbers = torch.arange(6.0, dtype=torch.float64)[None]
    first, second = layout.by_layer(Moments(torch.ones(1), numbers, numbers))
    assert {name: own.mean[0].tolist() for name, own in first.items()} == {"a": [0, 1], "b": [2, 3, 4]}
    assert second["a"].m2[0].tolist() == [5]
    assert Layout.from_json([[["a", 2], ["b", 3]], [["a", 1]]]) == layout
