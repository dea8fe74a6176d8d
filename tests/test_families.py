"""Every family of architectures through what a member of the pool goes through: taps, frozen copies, the loss."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from teddy_ray.frozen import frozen_copy
from teddy_ray.kernels.build import can_build
from teddy_ray.kernels.winograd import WinogradConv2d
from teddy_ray.matching import Target, member_loss
from teddy_ray.models import build, freeze, outline
from teddy_ray.taps import Taps

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

SIZES = {"alexnet": 63, "inception_v3": 75, "maxvit_t": 224, "vit_h_14": 28}
"""Smallest sizes above 32 pixels."""

ALL = torchvision_models.list_models(module=torchvision_models)

CHEAP = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
]
"""One of every family, and of those with other layers in them; but maxvit, whose images have 224 pixels at least."""

OWN = ["resnet101", "densenet121", "mobilenet_v2", "shufflenet_v2", "efficientnet_b0"]

TIMM = [
    "test_byobnet",
    "test_convnext",
    "test_convnext2",
    "test_efficientnet",
    "test_efficientnet_gn",
    "test_efficientnet_ln",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "swin_tiny_patch4_window7_224",
    "ghostnet_100",
    "resnetv2_50",
    "densenet121",
    "mixer_s32_224",
    "poolformer_s12",
]


def size_of(name):
    return SIZES.get(name.rpartition("/")[2], 32)


def width(layer):
    """Number of channels that a normalisation layer has, by what it keeps of each."""
    return len(next(tensor for tensor in layer.state_dict().values() if tensor.ndim == 1))


def check_taps(name):
    size = size_of(name)
    model = outline(name, num_classes=5, channels=3, image_size=size).eval()
    with Taps(model) as taps:
        model(torch.zeros(2, 3, size, size, device="meta"))
        taken = taps.take()
    layers = [model.get_submodule(layer) for layer in taps.layers]
    kept = [(2, layer.out_channels if isinstance(layer, nn.Conv2d) else width(layer)) for layer in layers]
    assert [tuple(activation.shape[:2]) for activation in taken] == kept
    leaves = [module for module in model.modules() if "Norm" in type(module).__name__ and not list(module.children())]
    assert {type(module) for module in leaves} <= {type(layer) for layer in layers}


@pytest.mark.parametrize("name", CHEAP)
def test_every_tap_gives_as_many_channels_as_its_layer_has(name):
    check_taps(f"torchvision/{name}")


@pytest.mark.parametrize("name", OWN)
def test_every_tap_of_our_own_gives_as_many_channels_as_its_layer_has(name):
    check_taps(name)


@pytest.mark.parametrize("name", TIMM)
def test_every_tap_of_timm_gives_as_many_channels_as_its_layer_has(name):
    pytest.importorskip("timm")
    check_taps(f"timm/{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*ALL} - {*CHEAP}))
def test_every_tap_of_every_classifier_gives_as_many_channels_as_its_layer_has(name):
    check_taps(f"torchvision/{name}")


TRAINED = [*(f"torchvision/{name}" for name in CHEAP), *OWN, "timm/test_resnet", "timm/test_vit"]


@pytest.fixture(scope="module", params=TRAINED)
def trained(request):
    """A model of every family with statistics of its own, and images for it."""
    if request.param.startswith("timm"):
        pytest.importorskip("timm")
    size = size_of(request.param)
    model = build(request.param, num_classes=5, channels=3, image_size=size)
    images = torch.rand(16, 3, size, size, generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
        if isinstance(module, nn.Linear) and not module.weight.any():  # as transformers begin
            nn.init.normal_(module.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.train()(images)
    return freeze(model), images[:2]


@torch.no_grad()
def test_frozen_copy_agrees_with_its_model(trained):
    model, x = trained
    exact = copy.deepcopy(model).double()
    reference = exact(x.double())
    own = distance(model(x), reference)  # Inception's random weights lose more digits than others
    for kernels in {False, can_build()}:
        assert distance(frozen_copy(model, kernels=kernels)(x), reference) < max(1e-4, 3 * own)
    assert distance(frozen_copy(exact, torch.float64)(x.double()), reference) < 1e-9


def distance(x, reference):
    return float((x - reference).norm() / reference.norm())


def test_loss_runs_and_its_gradient_reaches_the_images(trained):
    model, x = trained
    member = frozen_copy(model, kernels=can_build())
    x = x.clone().requires_grad_()
    with Taps(member) as taps:
        widths = [len(activation[0]) for activation in taken(member, taps, x)]
        target = Target(RM=[torch.zeros(num) for num in widths], RV=[torch.ones(num) for num in widths])
        y = torch.tensor([0, 1])
        statistics, ce = member_loss(member, taps, x, y, [target], u=1.0, weights=[1.0] * len(widths))
    (gradient,) = torch.autograd.grad(statistics + ce, x)
    assert statistics > 0
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


def taken(member, taps, x):
    with torch.no_grad():
        member(x)
    return taps.take()


@pytest.mark.skipif(not can_build(), reason="needs a C++ compiler")
def test_some_families_use_the_kernels():
    model = freeze(build("torchvision/vgg11_bn", num_classes=5, channels=3, image_size=32))
    kinds = [type(module) for module in frozen_copy(model, kernels=True).modules()]
    assert kinds.count(WinogradConv2d) == 7
