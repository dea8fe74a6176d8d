"""Every classifier of torchvision: `torchvision/densenet121`. What is to be known of them, by family, is in a table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from teddy_ray.models.blueprint import Blueprint, suggestion

CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is to be known of a family.

    smallest: the smallest image, in pixels. multiple: sizes are to be a multiple of it. sized: the arguments that build
    a model for one size; without them it takes any. arguments: what else to build with.
    """

    smallest: int = 1
    multiple: int = 1
    sized: Callable[[int], Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _patches(size: int) -> Facts:
    return Facts(smallest=size, multiple=size, sized=lambda size: {"image_size": size})


# Tuples in training otherwise, and a start that takes minutes. torchvision's own weights of these two are for pixels
# with mean and std 0.5: it converts ImageNet's inside (transform_input), which is not done here.
_ONE_HEAD = {"aux_logits": False, "init_weights": False}

FACTS: Mapping[str, Facts] = {
    "alexnet": Facts(smallest=63),
    "convnext": Facts(smallest=32),
    "densenet": Facts(smallest=29),
    "googlenet": Facts(smallest=15, arguments=_ONE_HEAD),
    "inception": Facts(smallest=75, arguments=_ONE_HEAD),
    "maxvit": Facts(smallest=224, multiple=224, sized=lambda size: {"input_size": (size, size)}),
    "squeezenet1_0": Facts(smallest=21),
    "squeezenet1_1": Facts(smallest=17),
    "swin_transformer": Facts(smallest=4),
    "vgg": Facts(smallest=32),
    "vit_b_16": _patches(16),
    "vit_b_32": _patches(32),
    "vit_h_14": _patches(14),
    "vit_l_16": _patches(16),
    "vit_l_32": _patches(32),
}
"""By name, or by family: the module of torchvision.models. Sizes found by trying. Others take any size."""


def names() -> list[str]:
    """`torchvision/<name>` of every classifier."""
    from torchvision import models

    return [f"torchvision/{name}" for name in models.list_models(module=models)]


def find(name: str) -> Blueprint:
    """The classifier `torchvision/<name>`. Raises ValueError where there is none."""
    from torchvision import models

    known = names()
    if name not in known:
        raise ValueError(
            f"unknown architecture {name!r}; should be a classifier of torchvision{suggestion(name, known)}"
        )
    name = name.partition("/")[2]
    family = models.get_model_builder(name).__module__.rpartition(".")[2]
    facts = FACTS.get(name) or FACTS.get(family) or Facts()
    return Blueprint(make=functools.partial(_make, name, facts), channels=CHANNELS, any_size=facts.sized is None)


def _make(name: str, facts: Facts, num_classes: int, channels: int, image_size: int) -> nn.Module:
    from torchvision import models

    if image_size < facts.smallest:
        raise ValueError(f"takes images of at least {facts.smallest} pixels, not of {image_size}")
    if image_size % facts.multiple:
        raise ValueError(f"takes images of {facts.smallest} pixels or a multiple of it, not of {image_size}")
    arguments = {**facts.arguments, **(facts.sized(image_size) if facts.sized else {})}
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **arguments)
    return network
