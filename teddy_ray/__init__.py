"""teddy_ray: distil an image classification data set into a few images per class, on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teddy_ray.distilled import DistilledSet

__version__ = "0.1.0"


def load(path: str, *, trust_code: bool = False) -> DistilledSet:
    """A published set at a path or URI as a PyTorch data set of (view, soft label, class): see `DistilledSet`."""
    from teddy_ray import distilled  # here, for `import teddy_ray` alone needs no torch

    return distilled.load(path, trust_code=trust_code)
