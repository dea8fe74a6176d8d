"""Adaptive pooling by matrices is PyTorch's."""

import pytest
import torch
from torch import nn

from teddy_ray.models import build
from teddy_ray.models.pooling import AdaptiveAvgPool2d, by_matrices


@pytest.mark.parametrize("output_size", [7, (6, 6), (3, 5), (None, 2)])
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (4, 9), (13, 32)])
def test_it_is_pytorchs_pooling_with_its_gradient(output_size, size):
    x = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = by_matrices(x, output_size), nn.AdaptiveAvgPool2d(output_size)(x)
    torch.testing.assert_close(ours, theirs)
    weights = torch.rand(ours.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_models_get_it_where_they_pool_to_more_than_one_cell():
    vgg = build("torchvision/vgg11", num_classes=2, channels=3, image_size=32).network
    assert type(vgg.avgpool) is AdaptiveAvgPool2d
    assert vgg.avgpool.output_size == (7, 7)
    resnet = build("torchvision/resnet18", num_classes=2, channels=3, image_size=32).network
    assert type(resnet.avgpool) is nn.AdaptiveAvgPool2d
