"""Formation: a stored image as a grid of smaller ones, each of which is enlarged to a whole image before a model sees
it: more content in equal bytes (IDC, Kim et al., "Dataset Condensation via Efficient Synthetic-Data
Parameterization", ICML 2022, section 3.2, which enlarges bilinearly).

Enlarged is by cubic convolution (Keys, 1981; a = -0.75, as PyTorch's `interpolate` has it), edges repeated, and cut to
the range of pixels. Parts are counted row by row.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]

A = -0.75


def shrink(real: Pixels, formation: int) -> Pixels:
    """Images with so many real ones along each side: (n * formation^2, c, h, w) -> (n c h w), each part of a square of
    pixels their rounded mean."""
    if formation == 1:
        return real
    num, channels, height, width = real.shape
    f, cells = formation, formation**2
    squares = real.reshape(num, channels, height // f, f, width // f, f).astype(np.int64).sum((3, 5))
    small = ((2 * squares + cells) // (2 * cells)).astype(np.uint8)
    grid = small.reshape(num // cells, f, f, channels, height // f, width // f)
    return np.ascontiguousarray(grid.transpose(0, 3, 1, 4, 2, 5)).reshape(-1, channels, height, width)


def enlarge_all(S: Tensor, formation: int) -> Tensor:
    """All parts of images, image by image: (n c h w) -> (n * formation^2, c, h, w) in [0, 1], differentiable.

    As matrix products, whose backward is deterministic on every device.
    """
    if formation == 1:
        return S
    f, (_, _, height, width) = formation, S.shape
    grid = S.unflatten(3, (f, width // f)).unflatten(2, (f, height // f))  # n, c, row, height, column, width
    parts = grid.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    rows, columns = (_matrix(size // f, size, S.dtype, S.device) for size in (height, width))
    enlarged: Tensor = rows @ parts @ columns.T
    return enlarged.clamp(0, 1)


def enlarge(x: Tensor, formation: int, part: int) -> Tensor:
    """One part of each image, (n c h w) -> (n c h w), of values from 0 to 255.

    By indexing, single products and single sums: the same bits in every batch and on every processor.
    """
    if formation == 1:
        return x
    (row, column), (height, width) = divmod(part, formation), (size // formation for size in x.shape[2:])
    small = x[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
    for axis in (2, 3):
        pixels, weights = _taps(small.shape[axis], x.shape[axis])
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        terms = [
            small.index_select(axis, torch.from_numpy(pixels[:, tap]).to(x.device))
            * torch.from_numpy(weights[:, tap]).to(x).view(shape)
            for tap in range(4)
        ]
        small = terms[0] + terms[1] + terms[2] + terms[3]
    return small.clamp(0, 255)


def _taps(size: int, new_size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Cubic convolution of an axis of `size` pixels to `new_size`: (new_size 4) pixels and their weights."""
    position = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(position)
    offsets = np.arange(-1, 3)
    distance = np.abs(position[:, None] - first[:, None] - offsets)
    near = ((A + 2) * distance - (A + 3)) * distance * distance + 1
    far = ((A * distance - 5 * A) * distance + 8 * A) * distance - 4 * A
    pixels = np.clip(first[:, None] + offsets, 0, size - 1).astype(np.intp)
    return pixels, np.where(distance <= 1, near, far)


@functools.cache
def _matrix(size: int, new_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same as a (new_size size) matrix."""
    pixels, weights = _taps(size, new_size)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size)[:, None], pixels), weights)
    return torch.from_numpy(matrix).to(device, dtype)
