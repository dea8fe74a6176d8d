"""Structural pruning, and pruned models without torch-pruning."""

import json
import statistics
import sys

import pytest
import torch
from torch import nn

from teddy_ray.frozen import frozen_copy
from teddy_ray.kernels.build import can_build
from teddy_ray.kernels.winograd import WinogradConv2d
from teddy_ray.matching import Target, member_loss
from teddy_ray.models import Classifier, build
from teddy_ray.pruning import prune, reshape, structure
from teddy_ray.taps import Taps

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

SIZE = 32
PRUNABLE = [
    *(f"convnet:width=32,norm={norm}" for norm in ("batch", "group", "layer", "instance", "none")),
    "resnet18:width=16",
    "resnet50:width=8",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "torchvision/densenet121",
    "torchvision/mobilenet_v2",
    "torchvision/efficientnet_b0",
    pytest.param("torchvision/vgg11_bn", marks=pytest.mark.slow),  # 130 million weights
    "torchvision/convnext_tiny",
    "torchvision/mnasnet0_5",
    "torchvision/mobilenet_v3_small",
    "torchvision/regnet_y_400mf",
    "torchvision/squeezenet1_1",
]
FIXED = {
    "shufflenet_v2": "ShuffleNetV2 cannot be pruned (ZeroDivisionError",
    "torchvision/shufflenet_v2_x0_5": "ShuffleNetV2 cannot be pruned (ZeroDivisionError",
    "torchvision/swin_t": "SwinTransformer cannot be pruned (NotImplementedError: it has attention",
    "torchvision/swin_v2_t": "SwinTransformer cannot be pruned (NotImplementedError: it has attention",
    "torchvision/vit_b_32": "VisionTransformer cannot be pruned (NotImplementedError: it has attention",
}


def fresh(name, seed=0):
    return build(name, num_classes=10, channels=3, image_size=SIZE, seed=seed).eval()


def pruned(name, ratio=0.3):
    return prune(fresh(name), ratio, channels=3, image_size=SIZE)


def images(n=3):
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def widths(model):
    return {name: layer.out_channels for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


@pytest.fixture
def tp():
    return pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_model_is_rebuilt_from_json_and_weights_alone(tp, name, monkeypatch):
    model = pruned(name)
    before, after = widths(fresh(name)), widths(model)
    lost = [1 - after[key] / before[key] for key in before if key != "network.classifier.1"]  # squeezenet's logits
    assert min(lost) >= 0.3 - 1e-9
    assert statistics.median(lost) < (0.51 if "group" in name else 0.4)  # whole channels, of each of eight groups
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    stored = json.loads(json.dumps(structure(model)))
    again = reshape(fresh(name, seed=1), stored, model.state_dict())
    assert structure(again) == stored
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize(("name", "told"), FIXED.items())
def test_model_that_cannot_be_pruned_says_so(tp, name, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        pruned(name)
    assert str(caught.value).startswith(told)
    assert str(caught.value).endswith("; set its ratio to 0 (plain fine-tuning)")


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_channels_that_do_nothing_are_those_that_go(tp, norm):
    """Ten channels of each layer give nothing: pruned to the others, the model must say the same."""
    model = fresh(f"convnet:width=32,norm={norm}")
    idle = torch.randperm(32, generator=torch.Generator().manual_seed(3))[:10]
    with torch.no_grad():
        for layer in model.network.features:
            for weight in layer.parameters():
                weight[idle] = 0
        spatial = model.network.classifier.weight.view(10, 32, -1)
        spatial[:, idle] = 0
    small = prune(model, 0.3, channels=3, image_size=SIZE)
    assert widths(small) == {key: 22 for key in widths(model)}
    torch.testing.assert_close(small(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_pruning_is_the_same_each_time_and_leaves_the_model_as_it_was(tp):
    model = fresh("resnet18:width=16").requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, again = (prune(model, 0.5, channels=3, image_size=SIZE) for _ in range(2))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in first.parameters())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not first.training
    assert prune(model.train(), 0.5, channels=3, image_size=SIZE).training


def test_one_model_after_another_is_pruned_as_if_alone(tp):
    alone = widths(pruned("convnet:width=16,norm=batch"))
    pruned("convnet:width=32,norm=group")
    assert widths(pruned("convnet:width=16,norm=batch")) == alone


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance"])
def test_norms_keep_their_kind(tp, norm):
    model = pruned(f"convnet:width=32,norm={norm}")
    norms = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    expected = {"batch": [], "group": [(8, 16)] * 3, "layer": [(1, 22)] * 3, "instance": [(22, 22)] * 3}
    assert [(layer.num_groups, layer.num_channels) for layer in norms] == expected[norm]


def test_ratio_of_zero_is_a_copy_and_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model = fresh("convnet:width=8")
    copy = pruned("convnet:width=8", 0)
    assert copy.network is not model.network
    assert torch.equal(copy(images()), model(images()))
    assert structure(copy) == structure(model)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    told = "ConvNet cannot be pruned: torch-pruning is not installed; pip install 'torch-pruning>=1.6,<2', or set"
    with pytest.raises(ValueError, match=told.replace("[", r"\[")):
        pruned("convnet:width=8")


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=f"at least 0 and below 1, not {ratio}"):
        pruned("convnet:width=8", ratio)


def test_model_of_nothing_to_leave_out_says_so(tp):
    linear = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 10)))
    with pytest.raises(ValueError, match=r"Sequential cannot be pruned \(nothing of it could be left out\)"):
        prune(linear, 0.5, channels=3, image_size=SIZE)


def test_structure_of_another_architecture_is_refused(tp):
    model = pruned("resnet18:width=16")
    with pytest.raises(ValueError, match="the structure is not one of ConvNet"):
        reshape(fresh("convnet:width=32"), structure(model), model.state_dict())
    weights = fresh("convnet:width=32,depth=2").state_dict()
    with pytest.raises(ValueError, match=r"the structure is not one of ConvNet: (.|\n)*Missing key"):
        reshape(fresh("convnet:width=32"), {}, weights)


@pytest.mark.parametrize("name", ["convnet:width=32", "convnet:width=32,norm=group", "resnet18:width=32"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_pruned_member_is_matched_as_others_are(tp, name, ratio):
    model = pruned(name, ratio).requires_grad_(False)
    x, y = images().requires_grad_(), torch.tensor([0, 1, 2])
    results = []
    for member, kernels in [(model, False), (frozen_copy(model, kernels=can_build()), can_build())]:
        with Taps(member) as taps:
            layers = [member.get_submodule(layer) for layer in taps.layers]
            nums = [len(next(iter(layer.state_dict().values()))) for layer in layers]
            target = Target(RM=[torch.zeros(num) for num in nums], RV=[torch.ones(num) for num in nums])
            terms = member_loss(member, taps, x, y, [target], u=1.0, weights=[1.0] * len(nums), kernels=kernels)
            results += [sum(terms).detach(), torch.autograd.grad(sum(terms), x)[0]]
    torch.testing.assert_close(results[2:], results[:2], rtol=1e-3, atol=1e-4)
    odd = [layer for layer in member.modules() if isinstance(layer, WinogradConv2d) and layer.out_channels % 8]
    assert not odd
