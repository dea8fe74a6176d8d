"""Models by name. A name is an architecture with options: `convnet`, `convnet:width=32,norm=group`, `resnet18`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from teddy_ray.randomness import generator


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


class Classifier(nn.Module):
    """A network with its pixel normalisation inside: takes images in [0, 1], gives logits.

    The network may be of another type than the images: they are converted after the normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: float = 0.5, std: float = 0.25) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images - self.mean) / self.std
        logits: Tensor = self.network(normalised.to(next(self.network.parameters()).dtype))
        return logits


def build(name: str, *, num_classes: int, channels: int, image_size: int, seed: int = 0) -> Classifier:
    """Build a model with weights drawn from (name, seed). Raises ValueError for a name that makes no sense."""
    architecture, options = _parse(name)
    module, _, attribute = architecture.builder.partition(":")
    constructor = getattr(importlib.import_module(module), attribute)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator("init", name, seed).integers(2**63)))
        try:
            network = constructor(num_classes, channels, image_size, **architecture.fixed, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return Classifier(network)


def takes_any_size(name: str) -> bool:
    """Whether a model of this name takes images of another size than it was built for."""
    return _parse(name)[0].any_size


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients of weights: how members are used once they are trained."""
    return model.eval().requires_grad_(False)


def _parse(name: str) -> tuple[Architecture, dict[str, Any]]:
    base, _, text = name.partition(":")
    if base not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {base!r}; should be one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[base]
    options = dict(architecture.options)
    for pair in filter(None, text.split(",")):
        key, _, value = pair.partition("=")
        if key not in options:
            raise ValueError(f"unknown option {key!r} of {base}; should be one of {', '.join(options)}")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = None
        if type(parsed) is not type(options[key]) or (isinstance(parsed, int) and parsed < 1):
            raise ValueError(f"{base}: {key}={value!r} should be like {key}={options[key]}")
        options[key] = parsed
    return architecture, options
