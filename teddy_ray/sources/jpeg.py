"""Plain JPEGs by torchvision's decoder: the pixels that Pillow gives, in a third of the time.

Most of it without Python's lock, so that threads that decode do not hold up those that compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

START, SCAN = b"\xff\xd8\xff", 0xDA
FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of the frames that are decoded here: baseline, extended and progressive, in Huffman's code."""
PLAIN = (*FRAMES, 0xC4, 0xDB, 0xDD, 0xE0, 0xE2, 0xED, 0xFE)
"""Markers of what may stand before the scan: tables, JFIF, colour profiles, captions, comments; not Exif or Adobe's."""


def decode_plain(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8] | None:
    """(h w) or (h w 3) of a greyscale or colour JPEG of 8 bits without Exif.

    None for all else, and for a file that is damaged or larger: whoever knows all formats has to say what it is.
    """
    frame = _frame(data)
    if frame is None:
        return None
    height, width, components = frame
    if components not in (1, 3) or height * width > max_pixels:
        return None
    decode = _decoder()
    if decode is None:
        return None
    try:
        pixels = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), "GRAY" if components == 1 else "RGB")
    except RuntimeError:
        return None
    array: npt.NDArray[np.uint8] = pixels.numpy()
    return array[0] if components == 1 else array.transpose(1, 2, 0)


@functools.cache
def _decoder() -> Callable[[Tensor, str], Tensor] | None:
    """torchvision's, imported with the first JPEG: it takes seconds, which sources without one are spared.

    None where there is none; Pillow then decodes all.
    """
    try:
        from torchvision.io import decode_jpeg
    except ImportError:  # torchvision 0.29 says that it will go
        return None
    decode: Callable[[Tensor, str], Tensor] = decode_jpeg
    return decode


def _frame(data: bytes) -> tuple[int, int, int] | None:
    """Height, width and components by the header of a plain JPEG, None for another (ITU-T T.81, annex B)."""
    if not data.startswith(START):
        return None
    position, frame = 2, None
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == SCAN:
            return frame
        if marker not in PLAIN:
            return None  # may be turned, or of other colours, or coded arithmetically, losslessly, in layers
        if marker in FRAMES:
            if data[position + 4] != 8 or frame is not None:
                return None
            height, width = (int.from_bytes(data[position + i : position + i + 2]) for i in (5, 7))
            frame = height, width, data[position + 9]
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return None
