"""Images decoded in threads, a few batches ahead of who works on them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from teddy_ray.augment import Boxes, boxes_of
from teddy_ray.randomness import uniforms
from teddy_ray.recipe import Augmentation
from teddy_ray.sources import Images


class Batch(NamedTuple):
    """Some rows of the data. pixels: (n c h w) uint8; boxes: (n 5), None where images are taken as they are."""

    rows: range
    pixels: npt.NDArray[np.uint8]
    boxes: Boxes | None


@dataclass
class Decoder:
    """Decodes batches of images. num_decoded: images so far.

    augmentation: of which each image's one view is drawn, from `key` and its id alone; None for none.
    """

    images: Images
    key: tuple[str | int, ...] = ()
    augmentation: Augmentation | None = None
    num_decoded: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def batches(self, rows: range, batch_size: int, threads: int) -> Iterator[Batch]:
        """In order. At most threads + 1 batches are held beside the one that was given out last."""
        waiting: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decoder")
        try:
            for first in range(rows.start, rows.stop, batch_size):
                waiting.append(pool.submit(self._decode, range(first, min(first + batch_size, rows.stop))))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, rows: range) -> Batch:
        pixels = self.images.read(np.arange(rows.start, rows.stop))
        with self._lock:
            self.num_decoded += len(pixels)
        boxes = None
        if self.augmentation is not None:
            boxes = boxes_of(self.augmentation, uniforms([(*self.key, self.images.ids[row]) for row in rows], 5))
        return Batch(rows, pixels, boxes)
