"""Architectures of this package, for small images: `convnet`, `convnet:width=32,norm=group`, `resnet18`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from teddy_ray.models.blueprint import Blueprint, parse_options, parse_value


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Facts about one architecture.

    builder: "module:attribute", called with (num_classes, channels, image_size, **fixed, **options).
    options: what a name may set, with the defaults. fixed: what it may not.
    any_size: whether a model takes images of another size than it was built for.
    """

    builder: str
    options: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    any_size: bool


_CONVNET = "teddy_ray.models.convnet:ConvNet"
_RESNET = "teddy_ray.models.resnet:ResNet"
_ADAPTED = "teddy_ray.models.adapted:adapt"


def _resnet(block: str, layers: tuple[int, ...]) -> Architecture:
    fixed = {"block": block, "layers": layers}
    return Architecture(builder=_RESNET, options={"width": 64}, fixed=fixed, any_size=True)


def _adapted(base: str, stem: str, **rest: Any) -> Architecture:
    return Architecture(builder=_ADAPTED, options={}, fixed={"base": base, "stem": stem, **rest}, any_size=True)


# (expansion, channels, blocks, stride) of each stage, as the paper's but for the second one's stride, which is 2
# there: so CIFAR's images end at 4x4 (github.com/kuangliu/pytorch-cifar, models/mobilenetv2.py)
_MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

ARCHITECTURES = {
    "convnet": Architecture(
        builder=_CONVNET, options={"width": 128, "growth": 1, "depth": 3, "norm": "batch"}, any_size=False
    ),
    "resnet18": _resnet("basic", (2, 2, 2, 2)),
    "resnet34": _resnet("basic", (3, 4, 6, 3)),
    "resnet50": _resnet("bottleneck", (3, 4, 6, 3)),
    "resnet101": _resnet("bottleneck", (3, 4, 23, 3)),
    # stems and strides as in github.com/kuangliu/pytorch-cifar: images of 32x32 end at 4x4, EfficientNet's at 2x2
    "densenet121": _adapted("densenet121", "features.conv0", dropped=("features.pool0",)),
    "mobilenet_v2": _adapted("mobilenet_v2", "features.0.0", arguments={"inverted_residual_setting": _MOBILENET_V2}),
    "shufflenet_v2": _adapted("shufflenet_v2_x1_0", "conv1.0", dropped=("maxpool",)),
    "efficientnet_b0": _adapted("efficientnet_b0", "features.0.0"),
}


def find(base: str, text: str) -> Blueprint:
    """The architecture `base` with the options in `text`. Raises ValueError for options that make no sense."""
    architecture = ARCHITECTURES[base]
    options = dict(architecture.options)
    for key, given in parse_options(text).items():
        if key not in options:
            known = f"should be one of {', '.join(options)}" if options else f"{base} has no options"
            raise ValueError(f"unknown option {key!r} of {base}; {known}")
        value = parse_value(given)
        if type(value) is not type(options[key]) or (isinstance(value, int) and value < 1):
            raise ValueError(f"{base}: {key}={given!r} should be like {key}={options[key]}")
        options[key] = value
    make = functools.partial(_make, architecture, options)
    return Blueprint(make=make, any_size=architecture.any_size)


def _make(
    architecture: Architecture, options: Mapping[str, Any], num_classes: int, channels: int, image_size: int
) -> nn.Module:
    module, _, attribute = architecture.builder.partition(":")
    constructor = getattr(importlib.import_module(module), attribute)
    network: nn.Module = constructor(num_classes, channels, image_size, **architecture.fixed, **options)
    return network
