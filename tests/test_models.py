"""Models by name."""

import pytest
import torch
from torch import nn

from teddy_ray.models import ARCHITECTURES, Classifier, build, freeze, takes_any_size
from teddy_ray.models.resnet import BLOCKS

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

SMALL = {
    name: f"{name}:width={8 if name == 'convnet' else 2}" if "width" in architecture.options else name
    for name, architecture in ARCHITECTURES.items()
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", SMALL.values())
def test_output_is_one_logit_per_class(name, size, channels):
    model = freeze(build(name, num_classes=7, channels=channels, image_size=size))
    logits = model(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_options_are_set_and_defaults_kept():
    model = build("convnet:width=12,depth=2,norm=instance", num_classes=2, channels=1, image_size=8)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert [module.out_channels for module in convolutions] == [12, 12]
    assert [(module.num_groups, module.num_channels) for module in norms] == [(12, 12)] * 2
    default = build("convnet", num_classes=2, channels=1, image_size=8)
    norms = [module for module in default.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [module.num_features for module in norms] == [128] * 3


def test_convnet_grows_from_block_to_block():
    model = build("convnet:width=4,growth=2", num_classes=2, channels=3, image_size=16)
    assert [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)] == [4, 8, 16]
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 2)


@pytest.mark.parametrize(("norm", "width", "num_groups"), [("instance", 12, 12), ("group", 16, 8), ("layer", 12, 1)])
def test_a_norm_of_each_image_is_a_norm_of_groups_of_channels(norm, width, num_groups):
    model = build(f"convnet:width={width},depth=2,norm={norm}", num_classes=2, channels=1, image_size=8)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert [(module.num_groups, module.num_channels) for module in norms] == [(num_groups, width)] * 2
    x = torch.rand(3, width, 4, 4) * 5 + 2
    groups = norms[0](x).reshape(3, num_groups, -1)
    torch.testing.assert_close(groups.mean(2), torch.zeros(3, num_groups), rtol=0, atol=1e-5)
    torch.testing.assert_close(groups.var(2, correction=0), torch.ones(3, num_groups), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "block", "num_blocks"),
    [
        ("resnet18", "basic", 8),
        ("resnet34", "basic", 16),
        ("resnet50", "bottleneck", 16),
        ("resnet101", "bottleneck", 33),
    ],
)
def test_resnets_have_the_blocks_of_their_names(name, block, num_blocks):
    model = build(SMALL[name], num_classes=2, channels=3, image_size=8)
    assert sum(isinstance(module, BLOCKS[block]) for module in model.modules()) == num_blocks


def test_pixels_are_normalised_inside():
    model = freeze(build("convnet:width=4,depth=1", num_classes=2, channels=1, image_size=4))
    x = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(model(x), model.network((x - 0.5) / 0.25))


class Seen(nn.Module):
    """A network that keeps what it was given."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x):
        self.given = x
        return x * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_network_gets_its_own_type_and_pixels_are_normalised_in_theirs(dtype):
    # 8-bit pixels are too fine for bfloat16: normalised in it, other numbers would come out
    x = (torch.arange(256.0) / 255).reshape(1, 1, 16, 16)
    model = Classifier(Seen(dtype), mean=0.4375, std=0.3125).to(dtype)
    logits = model(x)
    assert model.network.given.dtype == logits.dtype == dtype
    assert torch.equal(model.network.given, ((x - 0.4375) / 0.3125).to(dtype))


SIZES = (4, 8, 11, 16)


@pytest.mark.parametrize("name", SMALL.values())
def test_model_takes_images_of_any_size_where_it_says_so(name):
    model = freeze(build(name, num_classes=7, channels=3, image_size=16))

    def takes(size):
        try:
            return model(torch.rand(2, 3, size, size)).shape == (2, 7)
        except RuntimeError:
            return False

    assert [size for size in SIZES if takes(size)] == (list(SIZES) if takes_any_size(name) else [16])


@pytest.mark.parametrize("name", ["convnext", "convnet:wide=8"])
def test_size_of_a_model_of_no_name_is_not_told(name):
    with pytest.raises(ValueError, match="should be one of"):
        takes_any_size(name)


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("convnext", 8, ["'convnext'", "convnet", "resnet18", "resnet34", "resnet50", "efficientnet_b0"]),
        ("", 8, ["''", "convnet"]),
        ("convnet:wide=8", 8, ["'wide'", "convnet", "width", "growth", "depth", "norm"]),
        ("resnet18:norm=group", 8, ["'norm'", "resnet18", "width"]),
        ("resnet18:layers=2", 8, ["'layers'", "width"]),
        ("densenet121:width=8", 8, ["'width'", "densenet121 has no options"]),
        ("convnet:width=big", 8, ["width='big'", "width=128"]),
        ("convnet:width=1.5", 8, ["width='1.5'", "width=128"]),
        ("convnet:width=0", 8, ["width='0'", "width=128"]),
        ("convnet:width=-4", 8, ["width='-4'", "width=128"]),
        ("convnet:width=true", 8, ["width='true'", "width=128"]),
        ("convnet:width=", 8, ["width=''", "width=128"]),
        ("convnet:width", 8, ["width", "width=128"]),
        ("convnet:width=[8,9]", 8, ["width='[8'", "width=128"]),
        ("convnet:width=8,norm=3", 8, ["norm='3'", "norm=batch"]),
        ("convnet:norm=weight", 8, ["convnet:norm=weight", "batch, instance, group, layer, none"]),
        ("convnet:depth=4", 8, ["convnet:depth=4", "16 pixels"]),
        ("convnet", 4, ["convnet", "8 pixels"]),
    ],
)
def test_name_that_makes_no_sense_says_what_would(name, size, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared below
        build(name, num_classes=2, channels=1, image_size=size)
    assert [words for words in told if words not in str(caught.value)] == []


def weights(name, seed):
    return build(name, num_classes=3, channels=1, image_size=8, seed=seed).state_dict()


@pytest.mark.parametrize("name", SMALL.values())
def test_weights_follow_name_and_seed(name):
    torch.manual_seed(1)
    first = weights(name, 5)
    torch.manual_seed(2)
    again, other = weights(name, 5), weights(name, 6)
    drawn = [key for key, value in first.items() if value.ndim > 1]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    weights("convnet:width=4", 9)
    assert torch.equal(torch.rand(4), expected)


def test_frozen_model_has_no_gradients_and_keeps_its_buffers():
    model = freeze(build("convnet:width=4,depth=1", num_classes=2, channels=1, image_size=4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(3, 1, 4, 4, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
