"""The students of the paper's Table 2, as they are for small images: full width, colours and grey."""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torchvision import models as torchvision_models

from teddy_ray.models import ARCHITECTURES, build, outline
from teddy_ray.training import Batch, State, fit

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

STUDENTS = (
    "convnet",
    "resnet18",
    "resnet50",
    "resnet101",
    "densenet121",
    "mobilenet_v2",
    "shufflenet_v2",
    "efficientnet_b0",
)
BASES = {
    "densenet121": ("densenet121", "features.conv0"),
    "mobilenet_v2": ("mobilenet_v2", "features.0.0"),
    "shufflenet_v2": ("shufflenet_v2_x1_0", "conv1.0"),
    "efficientnet_b0": ("efficientnet_b0", "features.0.0"),
}
"""Name of each in torchvision, and its first convolution there."""


@pytest.mark.parametrize(("size", "num_images", "num_steps"), [(32, 8, 3), (64, 4, 3)])
@pytest.mark.parametrize("name", STUDENTS)
def test_student_lowers_the_loss_on_a_batch(name, size, num_images, num_steps):
    random = torch.Generator().manual_seed(0)
    images = torch.rand(num_images, 3, size, size, generator=random)
    batch = Batch(images, one_hot(torch.arange(num_images), 10).float(), num_images)
    model = build(name, num_classes=10, channels=3, image_size=size)
    options = {"key": (name,), "epochs": num_steps, "steps_per_epoch": 1, "learning_rate": 1e-3}
    *_, state = fit(State.begin(model, 0.01), lambda epoch: [batch], **options, schedule=lambda step, num_steps: 1.0)
    assert state.losses[0] > 1.5  # ten classes by chance: 2.3
    assert state.losses[-1] < 0.75 * state.losses[0]


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (9, 3), (28, 1), (32, 3), (64, 1)])
@pytest.mark.parametrize("name", STUDENTS)
def test_output_is_one_logit_per_class(name, size, channels):
    model = outline(name, num_classes=7, channels=channels, image_size=size)
    images = torch.empty(2, channels, size, size, device="meta")
    assert model.train()(images).shape == model.eval()(images).shape == (2, 7)


def last_features(name, size):
    """Height and width of the last feature map."""
    model, seen = outline(name, num_classes=7, channels=3, image_size=size).eval(), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[2:])))
    model(torch.empty(1, 3, size, size, device="meta"))
    return seen[-1]


@pytest.mark.parametrize("name", sorted(set(STUDENTS) - {"convnet"}))
def test_features_of_small_images_keep_positions(name):
    side = 2 if name == "efficientnet_b0" else 4
    assert last_features(name, 32) == (side, side)
    assert last_features(name, 64) == (2 * side, 2 * side)


@pytest.mark.parametrize("name", BASES)
def test_all_but_the_first_convolution_is_as_in_torchvision(name):
    base, stem = BASES[name]
    with torch.device("meta"):
        theirs = torchvision_models.get_model(base, weights=None, num_classes=7).state_dict()
    ours = outline(name, num_classes=7, channels=1, image_size=32).network.state_dict()
    shapes = [{key: tuple(value.shape) for key, value in one.items()} for one in (ours, theirs)]
    assert shapes[0].pop(f"{stem}.weight")[1:] == (1, 3, 3)
    assert shapes[1].pop(f"{stem}.weight")[1] == 3
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", BASES)
def test_first_convolution_gives_as_many_positions_as_pixels_and_keeps_their_scale(name):
    torch.manual_seed(0)
    model = build(name, num_classes=7, channels=3, image_size=32)
    convolution = model.network.get_submodule(BASES[name][1])
    weight = convolution.weight.detach()
    assert convolution(torch.rand(1, 3, 32, 32)).shape[2:] == (32, 32)
    assert weight.std().item() == pytest.approx((2 / (9 * len(weight))) ** 0.5, rel=0.1)


def test_students_of_the_paper_all_have_names_of_their_own():
    assert set(STUDENTS) <= set(ARCHITECTURES)
