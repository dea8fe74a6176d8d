"""The operator A: a random resized crop and flip per image, as two interpolation matrices.

Matrix products, unlike a gather, have a deterministic backward on every device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teddy_ray.recipe import Augmentation

Array = npt.NDArray[np.float64]
Boxes = Array
"""(n 5): top, left, height, width as shares of the image, and 1 where the image is mirrored."""


def draw_boxes(augmentation: Augmentation, random: np.random.Generator, num: int) -> Boxes:
    """Draw the views of `num` images. A longer draw starts with the shorter one."""
    uniform = random.random((num, 5))
    area = _between(uniform[:, 0], *augmentation.crop_scale)
    # of the ratios, those at which a box of this area fits into the image
    lowest, highest = (np.log(ratio) for ratio in augmentation.crop_ratio)
    lowest = np.maximum(lowest, np.log(area))
    highest = np.maximum(lowest, np.minimum(highest, -np.log(area)))
    ratio = np.exp(_between(uniform[:, 1], lowest, highest))
    height = np.minimum(np.sqrt(area / ratio), 1.0)
    width = np.minimum(np.sqrt(area * ratio), 1.0)
    top = uniform[:, 2] * (1.0 - height)
    left = uniform[:, 3] * (1.0 - width)
    mirrored = (uniform[:, 4] < 0.5) & augmentation.flip
    return np.stack([top, left, height, width, mirrored.astype(np.float64)], axis=1)


def apply_boxes(images: Tensor, boxes: Boxes) -> Tensor:
    """Crop each image to its box, mirror it if told, and scale it back bilinearly.

    images: (n c h w); boxes: (n 5). Returns (n c h w), differentiable in the images.
    """
    n, _, height, width = images.shape
    assert boxes.shape == (n, 5), (boxes.shape, n)
    rows = _interpolation(boxes[:, 0], boxes[:, 2], height)
    columns = _interpolation(boxes[:, 1], boxes[:, 3], width)
    columns = np.where(boxes[:, 4, None, None] > 0, columns[:, ::-1], columns)
    row_matrix = torch.from_numpy(rows).to(images)[:, None]  # n 1 h h
    column_matrix = torch.from_numpy(columns).to(images)[:, None]  # n 1 w w
    return row_matrix @ images @ column_matrix.transpose(-1, -2)


def _interpolation(start: Array, extent: Array, size: int) -> Array:
    """(n size size) matrices that resample the interval [start, start + extent] to `size` pixels, edges repeated."""
    centres = (np.arange(size) + 0.5) / size
    position = (start[:, None] + centres * extent[:, None]) * size - 0.5
    position = np.clip(position, 0, size - 1)
    return np.maximum(1.0 - np.abs(position[:, :, None] - np.arange(size)), 0.0)


def _between(uniform: Array, low: Array | float, high: Array | float) -> Array:
    return low + uniform * (high - low)
