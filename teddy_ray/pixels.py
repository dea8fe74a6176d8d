"""Images as they are stored, 8 bits per channel, and as models see them, floats in [0, 1]."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 8 bits."""
    return (images.detach() * 255).round().clamp(0, 255).to(torch.uint8)


def from_pixels(pixels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """(n c h w) uint8 -> float32 in [0, 1] on the device."""
    return torch.from_numpy(np.array(pixels)).to(device).float() / 255
