"""What a name of a model stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import yaml
from torch import nn

Make = Callable[[int, int, int], nn.Module]
"""(num_classes, channels, image_size) -> network, (n channels size size) -> (n num_classes)."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """How a network of one name is made, and what is known of it.

    make: raises ValueError where it cannot. channels: what the network takes, None where that is what it is built for.
    any_size: whether it takes images of another size than it was built for.
    tried: whether a pass must show that it can do what was asked, for no table knows.
    """

    make: Make
    channels: int | None = None
    any_size: bool
    tried: bool = False


def parse_options(text: str) -> dict[str, str]:
    """`width=32,norm=group` -> {"width": "32", "norm": "group"}."""
    pairs = (pair.partition("=") for pair in text.split(",") if pair)
    return {key: value for key, _, value in pairs}


def parse_value(text: str) -> Any:
    """The value of an option: a number, true or false, or a word. None where it is none of them."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean a or b` for a name that is not among those known, or nothing. Libraries may be left out."""
    full = {one.rpartition("/")[2]: one for one in known}
    close = get_close_matches(name.rpartition("/")[2], full, n=3)
    return f"; did you mean {' or '.join(full[one] for one in close)}?" if close else ""
