"""Where statistics are taken."""

import importlib

import pytest
import torch
from torch import nn
from torchvision.models import convnext
from torchvision.ops import FrozenBatchNorm2d

from teddy_ray.models import build, freeze
from teddy_ray.taps import CHANNEL_AXIS, Taps, channel_axis

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other


def tapped(model, x):
    with Taps(model) as taps:
        model(x)
        return taps.layers, taps.take()


def test_convnet_is_tapped_at_the_inputs_of_its_norms():
    model = freeze(build("convnet:width=4,depth=2", num_classes=3, channels=1, image_size=8))
    x = torch.rand(5, 1, 8, 8)
    layers, activations = tapped(model, x)
    assert layers == ("network.features.1", "network.features.5")
    features = model.network.features
    first = features[0]((x - 0.5) / 0.25)
    second = features[4](features[3](features[2](features[1](first))))
    torch.testing.assert_close(activations[0], first.reshape(5, 4, 64))
    torch.testing.assert_close(activations[1], second.reshape(5, 4, 16))


def test_convnet_without_norms_is_tapped_at_the_outputs_of_its_convolutions():
    model = freeze(build("convnet:width=4,depth=2,norm=none", num_classes=3, channels=1, image_size=8))
    x = torch.rand(5, 1, 8, 8)
    layers, activations = tapped(model, x)
    assert layers == ("network.features.0", "network.features.4")
    torch.testing.assert_close(activations[0], model.network.features[0]((x - 0.5) / 0.25).reshape(5, 4, 64))


def test_every_norm_of_a_resnet_is_tapped_shortcuts_included():
    model = freeze(build("resnet18:width=2", num_classes=3, channels=3, image_size=8))
    layers, activations = tapped(model, torch.rand(2, 3, 8, 8))
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert list(layers) == norms
    assert len(norms) == 20
    for name, activation in zip(norms, activations, strict=True):
        assert activation.shape[:2] == (2, model.get_submodule(name).num_features)


@pytest.mark.parametrize(
    ("norm", "shape", "channels_first"),
    [
        (nn.BatchNorm1d(3), (5, 3), (5, 3, 1)),
        (nn.BatchNorm1d(3), (5, 3, 4), (5, 3, 4)),
        (nn.BatchNorm3d(3), (5, 3, 2, 4, 2), (5, 3, 16)),
        (nn.GroupNorm(1, 3), (5, 3, 2, 4), (5, 3, 8)),
        (nn.InstanceNorm2d(3), (5, 3, 2, 4), (5, 3, 8)),
        (nn.LayerNorm(3), (5, 2, 4, 3), (5, 3, 8)),
        (nn.LayerNorm(3), (5, 3), (5, 3, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_each_kind_of_norm_gives_channels_and_positions(norm, shape, channels_first):
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    _, (activation,) = tapped(nn.Sequential(norm).eval(), x)
    assert activation.shape == channels_first
    axis = x.ndim - 1 if isinstance(norm, nn.LayerNorm) else 1
    for channel in range(3):
        assert torch.equal(activation[:, channel], x.select(axis, channel).reshape(5, -1))


def test_output_of_a_convolution_is_kept_from_activations_in_place():
    convolution = nn.Conv2d(1, 2, 3)
    x = torch.rand(4, 1, 6, 6)
    _, (activation,) = tapped(nn.Sequential(convolution, nn.ReLU(inplace=True)).requires_grad_(False), x)
    torch.testing.assert_close(activation, convolution(x).flatten(2))


def test_gradient_reaches_the_images():
    model = freeze(build("convnet:width=4,depth=1", num_classes=3, channels=1, image_size=4))
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    _, (activation,) = tapped(model, x)
    activation.square().sum().backward()
    assert x.grad.abs().min() > 0


def test_layer_that_runs_twice_is_refused_by_name():
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, nn.ReLU(), norm).eval()
    with Taps(model), pytest.raises(ValueError, match="'0' of Sequential runs twice"):
        model(torch.rand(2, 1, 3, 3))


class Unused(nn.Module):
    """A model with a head that does not run."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

    def forward(self, x):
        return self.norm(x)


class Folded(Unused):
    """A model that has some of the positions among the rows."""

    def forward(self, x):
        return self.head(self.norm(x).reshape(-1, 1, 1, 3))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Unused(), "layers of Unused did not run in a forward pass: head"),
        (Folded(), "layers of Folded mix images with positions in their rows: head"),
    ],
    ids=["unused", "folded"],
)
def test_layer_whose_rows_are_not_the_images_is_refused_by_name(model, told):
    with Taps(model.eval()) as taps:
        model(torch.rand(2, 1, 3, 3))
        with pytest.raises(ValueError, match=told):
            taps.take()


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (type("Own", (nn.BatchNorm2d,), {})(3), 1),
        (nn.SyncBatchNorm(3), 1),
        (FrozenBatchNorm2d(3), 1),
        (type("Own", (nn.GroupNorm,), {})(1, 3), 1),
        (nn.RMSNorm(3), -1),
        (type("Own", (nn.LayerNorm,), {})(3), -1),
        (convnext.LayerNorm2d(3), 1),
        (nn.Linear(3, 3), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_axis_of_the_channels_is_that_of_the_nearest_class_that_is_known(layer, axis):
    assert channel_axis(layer) == axis


def test_norms_of_timm_are_known_by_the_names_that_they_have():
    layers = pytest.importorskip("timm.layers")
    axes = {name: channel_axis(getattr(layers, name)(8)) for name in ("BatchNormAct2d", "LayerNorm", "LayerNorm2d")}
    assert axes == {"BatchNormAct2d": 1, "LayerNorm": -1, "LayerNorm2d": 1}
    for name in [key for key in CHANNEL_AXIS if isinstance(key, str)]:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), nn.Module)


def test_model_without_norm_or_convolution_is_refused():
    with pytest.raises(ValueError, match="Linear has neither a normalisation layer nor a convolution"):
        Taps(nn.Linear(3, 2))


def test_taking_forgets_so_that_passes_do_not_mix():
    model = nn.Sequential(nn.BatchNorm2d(1)).eval()
    with Taps(model) as taps:
        for value in (1.0, 2.0):
            model(torch.full((2, 1, 2, 2), value))
            assert torch.equal(taps.take()[0], torch.full((2, 1, 4), value))


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_model_is_left_without_hooks(error):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    taps = Taps(model)
    try:
        with taps:
            model(torch.rand(1, 1, 2, 2))
            if error:
                raise error
    except RuntimeError:
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert taps.activations == {}


def test_two_taps_of_two_models_are_apart():
    models = [nn.Sequential(nn.BatchNorm2d(1)).eval() for _ in range(2)]
    with Taps(models[0]) as first, Taps(models[1]) as second:
        models[0](torch.zeros(1, 1, 2, 2))
        models[1](torch.ones(1, 1, 2, 2))
        assert first.take()[0].sum() == 0
        assert second.take()[0].sum() == 4
