"""Views of a set's images: crop, flip and CutMix box of each, drawn from (seed, set, image, view) alone.

Whoever trains replays the views that were labelled, so only labels are stored. Replayed means the same bits: a view is
made by indexing, single products and single sums, which no batch, number of threads or processor rounds otherwise.
Matrix products would be.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teddy_ray.augment import Boxes, Crops, boxes_of_each
from teddy_ray.formation import enlarge
from teddy_ray.randomness import uniforms

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.intp]


class Readable(Protocol):
    """Images (n c size size) that are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Rows, /) -> Pixels: ...


@dataclass(frozen=True, kw_only=True)
class Views:
    """How the views of a set are drawn.

    seed, set_key: of the recipe, and the fingerprint of the set. ids: of all its images, in order. augmentation: None
    for the images as they are, view for view. cutmix: share of the views that a box of another image is laid into.
    formation: the images hold so many along each side, which the views take in turn.
    """

    seed: int
    set_key: str
    ids: Sequence[str]
    augmentation: Crops | None
    cutmix: float = 0.0
    formation: int = 1

    def boxes(self, rows: Rows, view: int) -> Boxes | None:
        """(n 5): the crops of a view of some images, as `augment` draws them; None for the whole images."""
        if self.augmentation is None:
            return None
        # exp and log differ in their last bit between processors: rounded, boxes hardly ever do
        boxes: Boxes = np.round(boxes_of_each(self.augmentation, self._keys("view", rows, view)) * 2**16) / 2**16
        return boxes

    def mixes(self, rows: Rows, view: int, size: int) -> Mixes | None:
        """The CutMix boxes of a view of some images of so many pixels; None where there are none.

        Yun et al., "CutMix", ICCV 2019, section 3.1, with lambda uniform in [0, 1]: a box of area 1 - lambda around a
        uniform centre, cut at the border, from another image of the set.
        """
        if self.cutmix == 0 or len(self.ids) < 2:
            return None
        mixed, partner, share, row, column = uniforms(self._keys("cutmix", rows, view), 5).T
        others = len(self.ids) - 1
        step = 1 + np.minimum((partner * others).astype(np.intp), others - 1)
        half = size * np.sqrt(1.0 - share) / 2
        edges = [row * size - half, row * size + half, column * size - half, column * size + half]
        box = np.stack([np.floor(np.clip(edge, 0, size)).astype(np.intp) for edge in edges], 1)
        box[mixed >= self.cutmix] = 0
        return Mixes((rows + step) % len(self.ids), box)

    def _keys(self, kind: str, rows: Rows, view: int) -> list[tuple[str | int, ...]]:
        view = operator.index(view)  # a number of NumPy's would be another key
        return [(kind, self.seed, self.set_key, self.ids[row], view) for row in rows]


@dataclass(frozen=True)
class Mixes:
    """What is laid into each of n views. partners: (n,) rows of the set. boxes: (n 4) top, bottom, left, right in
    pixels, empty where nothing is."""

    partners: Rows
    boxes: npt.NDArray[np.intp]

    def shares(self, size: int) -> npt.NDArray[np.float64]:
        """(n,): 1 - lambda, the share of each view's area that is its partner's."""
        top, bottom, left, right = self.boxes.T
        areas: npt.NDArray[np.float64] = (bottom - top) * (right - left) / size**2
        return areas


@dataclass(frozen=True)
class ViewedImages:
    """A set of images, (n c size size), and their views."""

    images: Pixels | Readable
    views: Views

    @property
    def size(self) -> int:
        return int(self.images.shape[-1])

    def mixes(self, rows: Rows, view: int) -> Mixes | None:
        return self.views.mixes(rows, view, self.size)

    def view(self, rows: Rows, view: int, device: torch.device) -> Tensor:
        """A view of the images at `rows`, (n c size size) float32 in [0, 1]: the same bits in every batch."""
        x = self._crops(rows, view, device)
        mixes = self.mixes(rows, view)
        if mixes is None or not len(mixed := np.flatnonzero(mixes.boxes.any(1))):
            return x
        partners = self._crops(mixes.partners[mixed], view, device)
        top, bottom, left, right = torch.from_numpy(mixes.boxes[mixed]).to(device)[:, :, None].unbind(1)
        pixel = torch.arange(self.size, device=device)
        inside = ((pixel >= top) & (pixel < bottom))[:, :, None] & ((pixel >= left) & (pixel < right))[:, None]
        place = torch.from_numpy(mixed).to(device)
        x[place] = torch.where(inside[:, None], partners, x[place])
        return x

    def _crops(self, rows: Rows, view: int, device: torch.device) -> Tensor:
        formation = self.views.formation
        x = enlarge(torch.from_numpy(self.images[rows]).to(device).float(), formation, view % formation**2)
        boxes = self.views.boxes(rows, view)
        if boxes is not None:
            top, left, height, width, mirrored = boxes.T
            vertical, horizontal = (_taps(*side, self.size) for side in ((top, height), (left, width)))
            x = _interpolate(x, vertical, 2)
            x = _interpolate(x, tuple(np.where(mirrored[:, None] > 0, tap[:, ::-1], tap) for tap in horizontal), 3)
        return x * (1 / 255)  # a product: a quotient is computed otherwise on a GPU


Taps = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]


def _taps(start: npt.NDArray[np.float64], extent: npt.NDArray[np.float64], size: int) -> Taps:
    """Bilinear resampling of the interval [start, start + extent] of an axis of `size` pixels to as many, edges
    repeated: (n size) lower pixel, upper pixel, weight of the upper."""
    centres = (np.arange(size) + 0.5) / size
    position = np.clip((start[:, None] + centres * extent[:, None]) * size - 0.5, 0, size - 1)
    low = np.floor(position).astype(np.intp)
    return low, np.minimum(low + 1, size - 1), position - low


def _interpolate(x: Tensor, taps: tuple[npt.NDArray[np.generic], ...], axis: int) -> Tensor:
    """Resample one axis of (n c h w)."""
    shape = (len(x), 1, -1, 1) if axis == 2 else (len(x), 1, 1, -1)
    low, high, weight = (torch.from_numpy(np.ascontiguousarray(tap)).to(x.device).view(shape) for tap in taps)
    of_low, of_high = (1 - weight).float(), weight.float()
    return x.gather(axis, low.expand_as(x)) * of_low + x.gather(axis, high.expand_as(x)) * of_high
