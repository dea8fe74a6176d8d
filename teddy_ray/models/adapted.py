"""torchvision's networks for small images: a 3x3 convolution of stride 1 in place of their stem's, no max-pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchvision import models


def adapt(
    num_classes: int,
    channels: int,
    image_size: int,
    *,
    base: str,
    stem: str,
    dropped: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The network `base` of torchvision, built with `arguments`, for images of any size.

    stem: its first convolution, which is replaced by one of 3x3, stride 1. dropped: layers that are left out.
    images (n channels size size) -> logits (n num_classes).
    """
    network: nn.Module = models.get_model(base, weights=None, num_classes=num_classes, **(arguments or {}))
    width = network.get_submodule(stem).out_channels
    assert isinstance(width, int)
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # as ResNet's stem
    _replace(network, stem, convolution)
    for name in dropped:
        _replace(network, name, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.AvgPool2d):
            module.ceil_mode = True  # images of few pixels end at 1x1 instead of at nothing
    return network


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
