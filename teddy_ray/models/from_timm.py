"""Every model of timm, which is an optional extra: `timm/resnet18d`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn

from teddy_ray.models.blueprint import Blueprint, suggestion


def names() -> list[str]:
    """`timm/<name>` of every model, none without the package."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        return []
    return [f"timm/{name}" for name in timm.list_models()]


def find(name: str) -> Blueprint:
    """The model `timm/<name>`. Raises ValueError where there is none, or no timm."""
    timm = _timm(name)
    known = names()
    if name not in known:
        raise ValueError(f"unknown architecture {name!r}; should be a model of timm{suggestion(name, known)}")
    bare = name.partition("/")[2]
    facts = timm.get_pretrained_cfg(bare)
    sized = bool(facts and facts.fixed_input_size)
    return Blueprint(make=functools.partial(_make, bare, sized), any_size=not sized, tried=True)


def _make(name: str, sized: bool, num_classes: int, channels: int, image_size: int) -> nn.Module:
    size = {"img_size": image_size} if sized else {}
    timm = _timm(name)
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, in_chans=channels, **size
        )
    except Exception as error:  # each model has its own
        raise ValueError(f"timm raised {type(error).__name__}: {error}") from error
    return network


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise ValueError(f"{name}: timm is not installed; pip install 'timm>=1.0,<2'") from None
