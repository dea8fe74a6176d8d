"""Frozen members against the models they are copies of."""

import copy

import pytest
import torch
from torch import nn

from teddy_ray.frozen import FrozenBatchNorm, frozen_copy
from teddy_ray.models import build, freeze
from teddy_ray.taps import Taps

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

NAMES = ["convnet:width=6,depth=2", "resnet18:width=2", "resnet50:width=2"]
SHAPES = {nn.BatchNorm1d: [(7, 5), (7, 5, 4)], nn.BatchNorm2d: [(7, 5, 3, 4)], nn.BatchNorm3d: [(7, 5, 3, 4, 2)]}
KINDS = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]


def settle(model):
    """Draw running statistics, scales and shifts, far from their beginnings of 0 and 1."""
    random = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
    return model


def images(dtype=torch.float32, channels=3):
    return torch.rand(4, channels, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def trained(name):
    return settle(build(name, num_classes=5, channels=3, image_size=8))


# -- one layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("kind", "shape"), KINDS, ids=str)
def test_frozen_norm_is_the_definition_of_a_norm_in_eval_mode(kind, shape, affine):
    norm = settle(kind(5, eps=0.01, affine=affine).double()).eval()
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = FrozenBatchNorm(norm)(x)
    for channel in range(5):
        expected = (x[:, channel] - norm.running_mean[channel]) / (norm.running_var[channel] + 0.01) ** 0.5
        if affine:
            expected = expected * norm.weight[channel] + norm.bias[channel]
        torch.testing.assert_close(y[:, channel], expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(y, norm(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_frozen_norm_computes_in_its_own_type_and_gives_that_of_its_input(dtype):
    norm = FrozenBatchNorm(settle(nn.BatchNorm2d(5)))
    x = images(dtype, channels=5)
    y = norm(x)
    assert y.dtype == dtype
    assert torch.equal(y, norm(x.float()).to(dtype))


def test_frozen_norm_has_nothing_to_train():
    norm = FrozenBatchNorm(nn.BatchNorm2d(5))
    assert list(norm.parameters()) == []
    assert not norm(images(channels=5)).requires_grad


# -- whole models --------------------------------------------------------------------------------------------------


def logits_and_taps(model, x):
    with Taps(model) as taps:
        return [model(x), *taps.take()]


@pytest.mark.parametrize("name", NAMES)
def test_frozen_copy_gives_what_its_model_gives_at_every_tap(name):
    model = trained(name).double()
    expected = logits_and_taps(freeze(copy.deepcopy(model)), images(torch.float64))
    given = logits_and_taps(frozen_copy(model, torch.float64), images(torch.float64))
    torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_images_is_that_of_the_model(name):
    model = trained(name).double()
    gradients = []
    for one in (freeze(copy.deepcopy(model)), frozen_copy(model, torch.float64)):
        x = images(torch.float64).requires_grad_()
        terms = logits_and_taps(one, x)
        gradients += torch.autograd.grad(sum(term.square().mean() for term in terms), x)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_layers_keep_their_names_and_their_order(name):
    model, frozen = freeze(trained(name)), frozen_copy(trained(name), torch.float32)
    assert Taps(frozen).layers == Taps(model).layers
    assert [key for key, _ in frozen.named_modules()] == [key for key, _ in model.named_modules()]
    kinds = {type(frozen.get_submodule(layer)) for layer in Taps(model).layers}
    assert kinds == {FrozenBatchNorm}


def test_the_model_itself_is_left_as_it_was():
    model = trained("resnet18:width=2").train()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    strides = {key: value.stride() for key, value in state.items()}
    frozen = frozen_copy(model, torch.bfloat16)
    frozen(images())
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
        assert (value.dtype, value.stride()) == (state[key].dtype, strides[key])
    ours, theirs = ({tensor.data_ptr() for tensor in one.state_dict().values()} for one in (model, frozen))
    assert not ours & theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_is_in_evaluation_mode_without_gradients_of_weights(dtype):
    frozen = frozen_copy(trained("resnet18:width=2").train(), dtype)
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_copy_in_bf16_keeps_the_maps_in_float32():
    frozen = frozen_copy(trained("resnet18:width=2"), torch.bfloat16)
    exact = frozen_copy(trained("resnet18:width=2"), torch.float32)
    maps = {key for key in frozen.state_dict() if key.endswith((".scale", ".shift"))}
    assert len(maps) == 2 * 20
    exactly = maps | {"mean", "std"}
    for key, value in frozen.state_dict().items():
        assert value.dtype == (torch.float32 if key in exactly else torch.bfloat16)
        if key in exactly:
            assert torch.equal(value, exact.state_dict()[key])
    torch.testing.assert_close(
        frozen(images()).float(), exact(images()), rtol=0, atol=0.05 * float(exact(images()).std())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_keep_their_weights_channels_last(dtype):
    frozen = frozen_copy(trained("resnet18:width=2"), dtype)
    convolutions = [module for module in frozen.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 20
    for convolution in convolutions:
        assert convolution.weight.dtype == dtype
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", ["instance", "group", "layer", "none"])
def test_other_norms_stay_as_they_are(norm):
    model = freeze(trained(f"convnet:width=6,depth=2,norm={norm}"))
    frozen = frozen_copy(model, torch.float32)
    assert [type(module) for module in frozen.modules()] == [type(module) for module in model.modules()]
    expected = logits_and_taps(model, images())
    torch.testing.assert_close(logits_and_taps(frozen, images()), expected, rtol=1e-4, atol=1e-5)


def test_norm_that_does_more_than_its_class_stays_as_it_is():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = settle(nn.Sequential(nn.Conv2d(3, 5, 3), Doubling(5), nn.BatchNorm2d(5)))
    frozen = frozen_copy(model, torch.float32)
    assert [type(module) for module in frozen] == [nn.Conv2d, Doubling, FrozenBatchNorm]
    expected = logits_and_taps(freeze(model), images())
    torch.testing.assert_close(logits_and_taps(frozen, images()), expected, rtol=1e-4, atol=1e-5)


def test_norm_without_running_statistics_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), nn.BatchNorm2d(5))
    frozen = frozen_copy(model, torch.float32)
    assert [type(module) for module in frozen] == [nn.Conv2d, nn.BatchNorm2d, FrozenBatchNorm]
    expected = logits_and_taps(freeze(model), images())
    torch.testing.assert_close(logits_and_taps(frozen, images()), expected, rtol=1e-4, atol=1e-5)
