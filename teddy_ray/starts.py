"""What the optimisation of S starts from, where it is not plain real images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from teddy_ray.augment import Boxes, apply_boxes, draw_boxes
from teddy_ray.pixels import from_pixels, to_pixels
from teddy_ray.randomness import generator
from teddy_ray.recipe import Augmentation, Mosaic

Pixels = npt.NDArray[np.uint8]

BATCH_SIZE = 200
"""Candidates scored at once."""


def noise_start(num: int, channels: int, image_size: int, key: Sequence[str | int]) -> Pixels:
    """Grey images with Gaussian noise, (num channels image_size image_size)."""
    noise = generator("noise", *key).normal(0.5, 0.25, (num, channels, image_size, image_size))
    return (noise.clip(0, 1) * 255).round().astype(np.uint8)


def mosaic_start(
    real: Pixels,
    label: int,
    models: Sequence[nn.Module],
    part: Mosaic,
    augmentation: Augmentation,
    *,
    keys: Sequence[Sequence[str | int]],
    device: torch.device,
) -> Pixels:
    """Mosaics of one class: at each place of the grid, the candidate patch that the models find likeliest.

    real: (images * places * candidates, c, h, w), the images that patches are cut from, place by place; keys: one per
    mosaic, from which its crops come. Scored by the mean cross-entropy of the models on the patch at full size, as in
    RDED (Sun et al., "On the Diversity and Realism of Distilled Dataset", CVPR 2024). Returns (images c h w).
    """
    crops = augmentation.model_copy(update={"crop_scale": part.crop_scale})
    places, size = part.grid**2, real.shape[-1]
    boxes = np.concatenate([draw_boxes(crops, generator("mosaic", *key), places * part.candidates) for key in keys])
    x = from_pixels(real, device)
    best = _scores(models, x, boxes, label).view(-1, part.candidates).argmin(1).cpu()
    chosen = torch.arange(len(best)) * part.candidates + best
    patches = apply_boxes(x[chosen.to(device)], _rows(boxes, chosen), size // part.grid)
    grid = patches.unflatten(0, (len(keys), part.grid, part.grid))  # image, row, column, c, height, width
    mosaics = grid.permute(0, 3, 1, 4, 2, 5).reshape(len(keys), -1, size, size)
    return to_pixels(mosaics).cpu().numpy()


@torch.inference_mode()
def _scores(models: Sequence[nn.Module], x: Tensor, boxes: Boxes, label: int) -> Tensor:
    """The models' mean cross-entropy on the view of each image, (n,)."""
    scores = []
    for first in range(0, len(x), BATCH_SIZE):
        views = apply_boxes(x[first : first + BATCH_SIZE], boxes[first : first + BATCH_SIZE])
        y = torch.full((len(views),), label, device=x.device)
        each = [functional.cross_entropy(model(views), y, reduction="none") for model in models]
        scores.append(torch.stack(each).mean(0))
    return torch.cat(scores)


def _rows(boxes: Boxes, index: Tensor) -> Boxes:
    rows: Boxes = boxes[index.numpy()]
    return rows
