"""A function of the user's that builds a network: `my.nets:make`, `my.nets:make:width=3`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from teddy_ray.models.blueprint import Blueprint, parse_options, parse_value

_FORM = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)(:(?P<options>.*))?")


def is_one(name: str) -> bool:
    """Whether a name is of the form <module>:<function>[:options]."""
    return _FORM.fullmatch(name) is not None


def find(name: str) -> Blueprint:
    """The function, which is called with num_classes, channels, image_size and the options, all by keyword.

    Raises ValueError where it cannot be imported.
    """
    module, attribute, text = _parse(name)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        place = "install it, or run in the folder that it lies in"
        raise ValueError(f"cannot import {module!r} ({error}); {place}") from None
    except AttributeError as error:
        raise ValueError(f"{module} has no function {attribute!r} ({error})") from None
    except Exception as error:
        raise ValueError(f"importing {module!r} raised {_told(error)}") from error
    if not callable(function):
        raise ValueError(f"{attribute!r} of {module} should be a function, not {function!r}")
    options = {key: parse_value(value) for key, value in parse_options(text).items()}
    return Blueprint(make=functools.partial(_make, function, options), any_size=False, tried=True)


def code_identity(name: str) -> str | None:
    """SHA-256, in hexadecimal, of the function's module; of all Python files below it where that is a package.

    None where no such module is found.
    """
    try:
        spec = importlib.util.find_spec(_parse(name)[0])
    except ImportError:
        return None
    if spec is None or spec.origin is None:
        return None
    files = [Path(spec.origin)]
    if spec.submodule_search_locations:
        files = [path for folder in spec.submodule_search_locations for path in sorted(Path(folder).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _parse(name: str) -> tuple[str, str, str]:
    found = _FORM.fullmatch(name)
    assert found is not None
    return found["module"], found["function"], found["options"] or ""


def _make(function: Any, options: Mapping[str, Any], num_classes: int, channels: int, image_size: int) -> nn.Module:
    try:
        network = function(num_classes=num_classes, channels=channels, image_size=image_size, **options)
    except Exception as error:
        raise ValueError(f"the function raised {_told(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"the function should return a torch.nn.Module, not {type(network).__name__}")
    return network


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
