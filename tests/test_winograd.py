"""Winograd's convolution against the library's in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from teddy_ray.kernels import winograd
from teddy_ray.kernels.build import can_build, compiler, identity, library
from teddy_ray.kernels.winograd import TRANSFORMED_IN_THE_KERNEL, WinogradConv2d, fits

torch.set_num_threads(1)

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

SHAPES = [
    (2, 32, 32, 8, 8),
    (3, 64, 32, 4, 4),
    (3, 32, 96, 5, 9),  # edges that are no multiple of a tile, and other channels out than in
    (1, 32, 32, 1, 1),
    (2, 32, 32, 2, 3),
    (1, 64, 64, 13, 6),
    (2, 32, 64, 7, 7),
]


def convolution(c, d, bias=False):
    torch.manual_seed(0)
    return nn.Conv2d(c, d, 3, padding=1, bias=bias).requires_grad_(False)


def images(n, c, h, w):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(1))


def distance(x, reference):
    return float((x.double() - reference).norm().detach() / reference.norm().detach())


@pytest.mark.parametrize(("n", "c", "d", "h", "w"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transformed", [True, False])
def test_value_and_gradient_are_those_of_the_convolution(n, c, d, h, w, bias, transformed, monkeypatch):
    monkeypatch.setattr(winograd, "TRANSFORMED_IN_THE_KERNEL", c * d + 1 if transformed else 1)
    direct = convolution(c, d, bias)
    assert fits(direct)
    x = images(n, c, h, w).requires_grad_()
    y = WinogradConv2d(direct)(x)
    gradient = images(n, d, h, w)
    (back,) = torch.autograd.grad(y, x, gradient)
    reference = functional.conv2d(
        x.double(), direct.weight.double(), None if direct.bias is None else direct.bias.double(), padding=1
    )
    (reference_back,) = torch.autograd.grad(reference, x, gradient.double())
    assert y.shape == reference.shape
    assert distance(y, reference) < 2e-6
    assert distance(back, reference_back.double()) < 2e-6


def test_many_filters_are_kept_as_they_are():
    few, many = (WinogradConv2d(convolution(c, c)) for c in (128, 256))
    assert 256**2 >= TRANSFORMED_IN_THE_KERNEL > 128**2
    assert few.packed.numel() == 36 * 128**2
    assert many.packed.numel() == 9 * 256**2
    x = images(2, 256, 4, 4)
    direct = convolution(256, 256)
    reference = functional.conv2d(x.double(), direct.weight.double(), padding=1)
    assert distance(many(x), reference) < 4e-6


@pytest.mark.parametrize("bias", [True, False])
def test_layer_has_all_that_the_convolution_has(bias):
    direct = convolution(32, 64, bias)
    layer = WinogradConv2d(direct)
    assert isinstance(layer, nn.Conv2d)
    assert repr(layer) == repr(direct).replace("Conv2d", "WinogradConv2d")
    assert layer.state_dict().keys() == direct.state_dict().keys()
    assert all(torch.equal(value, direct.state_dict()[key]) for key, value in layer.state_dict().items())
    assert not any(weight.requires_grad for weight in layer.parameters())


def test_result_depends_on_nothing_but_the_image():
    """Not on the batch, the layout, the number of threads, or what ran before: blocks of tiles share no sum."""
    layer, x = WinogradConv2d(convolution(64, 64)), images(30, 64, 8, 8)
    whole = layer(x)
    assert torch.equal(layer(x), whole)
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), whole)
    assert torch.equal(torch.cat([layer(x[:7]), layer(x[7:])]), whole)
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x), whole)
    finally:
        torch.set_num_threads(1)


def test_result_is_channels_last():
    y = WinogradConv2d(convolution(32, 64))(images(2, 32, 6, 6))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 5, padding=1),
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 10, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1).bfloat16(),
        nn.ConvTranspose2d(32, 32, 3, padding=1),
        nn.Linear(32, 32),
    ],
    ids=str,
)
def test_other_layers_do_not_fit(module):
    assert not fits(module)


def test_operator_keeps_torchs_rules():
    layer = WinogradConv2d(convolution(32, 32))
    x = images(2, 32, 4, 4).requires_grad_()
    torch.library.opcheck(winograd._convolve, (x, layer.packed, layer.backward_packed))


def test_library_is_built_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        library.cache_clear()
        library()
    assert [path.suffix for path in (tmp_path / "teddy_ray").iterdir()] == [".so"]
    library.cache_clear()


def test_compiler_that_refuses_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    library.cache_clear()
    identity.cache_clear()
    assert not can_build()
    with pytest.raises(RuntimeError, match=r"false -O3 .*moments.cpp .*winograd.cpp.* failed"):
        library()
    library.cache_clear()
    identity.cache_clear()
    assert not list((tmp_path / "teddy_ray").iterdir())


def test_cache_that_cannot_be_written_is_no_hindrance(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a folder cannot lie in it
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library.cache_clear()
    assert can_build()
    library.cache_clear()
    assert [path.suffix for path in tmp_path.glob("teddy_ray-*/*")] == [".so"]


def test_no_images_give_no_images():
    layer = WinogradConv2d(convolution(32, 64))
    assert layer(images(0, 32, 4, 4)).shape == (0, 64, 4, 4)


def test_other_types_are_refused():
    with pytest.raises(AssertionError):
        WinogradConv2d(convolution(32, 32))(images(1, 32, 4, 4).double())
