"""scikit-learn's 1,797 handwritten digits of 8x8 pixels (Alpaydin & Kaynak, UCI, CC BY 4.0): the embedded default."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from teddy_ray.sources.images import Images, split
from teddy_ray.storage import sha256

NUM_TEST = 360


@cache
def _pixels() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # here, for it takes a second

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def _read_row(row: int) -> Image.Image:
    return Image.fromarray(_pixels()[0][row])


def open_digits(image_size: int, channels: int) -> tuple[Images, Images]:
    """Training and test images; the test split of 360 is the same in every recipe."""
    pixels, labels = _pixels()
    everything = Images(
        ids=[f"digits/{row:04d}" for row in range(len(labels))],
        labels=labels,
        rows=np.arange(len(labels)),
        classes=tuple(str(digit) for digit in range(10)),
        content=sha256(pixels.tobytes()),
        image_size=image_size,
        channels=channels,
        read_row=_read_row,
    )
    return split(everything, NUM_TEST)
