"""Optional priors on the synthetic images themselves: those of DeepInversion (Yin et al., CVPR 2020), as plain sums."""

from __future__ import annotations

from torch import Tensor


def prior(images: Tensor, tv_weight: float, l2_weight: float) -> Tensor:
    """The mean over images of tv_weight * total variation + l2_weight * squared distance from grey. A scalar.

    images: (n c h w) in [0, 1]. Total variation is the sum of absolute differences of neighbouring pixels.
    """
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().sum((1, 2, 3))
    right = (images[..., 1:] - images[..., :-1]).abs().sum((1, 2, 3))
    grey = (images - 0.5).square().sum((1, 2, 3))
    return (tv_weight * (down + right) + l2_weight * grey).mean()
