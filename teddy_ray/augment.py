"""The operator A: a random resized crop and flip per image, as two interpolation matrices.

Matrix products, unlike a gather, have a deterministic backward on every device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teddy_ray.randomness import uniforms

if TYPE_CHECKING:
    from teddy_ray.recipe import Augmentation, Synthesis

Array = npt.NDArray[np.float64]
Boxes = Array
"""(n 5): top, left, height, width as shares of the image, and 1 where the image is mirrored."""


class Crops(Protocol):
    """How crops are drawn: `recipe.Augmentation`, or what a published set says of it."""

    @property
    def crop_scale(self) -> tuple[float, float]: ...

    @property
    def crop_ratio(self) -> tuple[float, float]: ...

    @property
    def flip(self) -> bool: ...


def draw_boxes(augmentation: Crops, random: np.random.Generator, num: int) -> Boxes:
    """Draw the views of `num` images. A longer draw starts with the shorter one."""
    return boxes_of(augmentation, random.random((num, 5)))


def boxes_of_each(augmentation: Crops, keys: Iterable[tuple[str | int, ...]]) -> Boxes:
    """One view for each key, and from it alone."""
    return boxes_of(augmentation, uniforms(keys, 5))


def boxes_of(augmentation: Crops, uniform: Array) -> Boxes:
    """The views that draws (n 5) from [0, 1) stand for."""
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


def apply_boxes(images: Tensor, boxes: Boxes, size: int | None = None) -> Tensor:
    """Crop each image to its box, mirror it if told, and scale it bilinearly to its old size, or to `size` pixels.

    images: (n c h w); boxes: (n 5). Returns (n c h w) or (n c size size), differentiable in the images.
    """
    n, _, height, width = images.shape
    assert boxes.shape == (n, 5), (boxes.shape, n)
    # the matrices are made on the device, of few numbers
    top, left, box_height, box_width, mirrored = torch.from_numpy(boxes).to(images.device, non_blocking=True).T
    rows = _interpolation(top, box_height, height, size or height)
    columns = _interpolation(left, box_width, width, size or width)
    columns = torch.where(mirrored[:, None, None] > 0, columns.flip(1), columns)
    row_matrix, column_matrix = (matrix[:, None].to(images.dtype) for matrix in (rows, columns))
    return row_matrix @ images @ column_matrix.transpose(-1, -2)


def views_of_step(part: Synthesis, step: int) -> tuple[Augmentation, int | None]:
    """A of a step under the curriculum: how boxes are drawn, and the size of the views, None for the images' own.

    The crop scale moves linearly (Yin & Shen, "Dataset Distillation via Curriculum Data Synthesis in Large Data Era",
    2023, move its lower end so).
    """
    curriculum = part.curriculum
    num_steps = round(curriculum.share * part.steps)
    if step >= num_steps:
        return part.augmentation, None
    done = step / num_steps
    augmentation = part.augmentation
    if curriculum.crop_scale is not None:
        low, high = (
            first + (last - first) * done
            for first, last in zip(curriculum.crop_scale, augmentation.crop_scale, strict=True)
        )
        augmentation = augmentation.model_copy(update={"crop_scale": (low, high)})
    return augmentation, curriculum.image_size


def _interpolation(start: Tensor, extent: Tensor, size: int, new_size: int) -> Tensor:
    """(n new_size size) matrices that resample the interval [start, start + extent], edges repeated, in float64.

    Where pixels become fewer, each new one is a mean over all that it covers.
    """
    pixels = torch.arange(max(size, new_size), dtype=start.dtype, device=start.device)
    centres = (pixels[:new_size] + 0.5) / new_size
    position = (start[:, None] + centres * extent[:, None]) * size - 0.5
    position = position.clamp(0, size - 1)
    reach = (extent * size / new_size).clamp(min=1.0)[:, None, None]
    weights = (1.0 - (position[:, :, None] - pixels[:size]).abs() / reach).clamp(min=0.0)
    return weights / weights.sum(2, keepdim=True)


def _between(uniform: Array, low: Array | float, high: Array | float) -> Array:
    return low + uniform * (high - low)
