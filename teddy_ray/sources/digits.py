"""scikit-learn's 1,797 handwritten digits of 8x8 pixels (Alpaydin & Kaynak, UCI, CC BY 4.0): the embedded default."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from teddy_ray.sources.decoding import Raw
from teddy_ray.sources.images import Images, Map, split
from teddy_ray.storage import sha256

NUM_TEST = 360


@cache
def _pixels() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # here, for it takes a second

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def _read_rows(rows: npt.NDArray[np.int64], map_: Map) -> Iterator[tuple[npt.NDArray[np.intp], Iterable[Raw]]]:
    yield np.arange(len(rows)), _pixels()[0][rows]


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
        read_rows=_read_rows,
    )
    return split(everything, NUM_TEST)
