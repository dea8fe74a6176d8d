"""Architectures of this package: `convnet`, `convnet:width=32,norm=group`, `resnet18`."""

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


def _resnet(block: str, layers: tuple[int, ...]) -> Architecture:
    fixed = {"block": block, "layers": layers}
    return Architecture(builder=_RESNET, options={"width": 64}, fixed=fixed, any_size=True)


ARCHITECTURES = {
    "convnet": Architecture(builder=_CONVNET, options={"width": 128, "depth": 3, "norm": "batch"}, any_size=False),
    "resnet18": _resnet("basic", (2, 2, 2, 2)),
    "resnet34": _resnet("basic", (3, 4, 6, 3)),
    "resnet50": _resnet("bottleneck", (3, 4, 6, 3)),
}


def find(base: str, text: str) -> Blueprint:
    """The architecture `base` with the options in `text`. Raises ValueError for options that make no sense."""
    architecture = ARCHITECTURES[base]
    options = dict(architecture.options)
    for key, given in parse_options(text).items():
        if key not in options:
            raise ValueError(f"unknown option {key!r} of {base}; should be one of {', '.join(options)}")
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
