"""Images for training loops: kept in memory where they fit, and batches made ready ahead of their use."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from teddy_ray.sources.images import Images

Index = npt.NDArray[np.integer[Any]]
Pixels = npt.NDArray[np.uint8]


class Loader:
    """Reads images by position, with threads.

    A set that takes no more than `max_bytes` as 8-bit pixels is decoded whole at the first use and kept; of a larger
    one every call decodes what it is asked for. The pixels are the same. Close it, or use it in a with statement.
    """

    def __init__(self, images: Images, max_bytes: int, num_threads: int) -> None:
        self._images = images
        self._threads = ThreadPoolExecutor(num_threads)
        self._lock = threading.Lock()
        self._kept: Pixels | None = None
        self.num_bytes = len(images) * images.channels * images.image_size**2
        self.keeps = self.num_bytes <= max_bytes

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, after what they are at."""
        self._threads.shutdown(cancel_futures=True)

    def read(self, index: Index) -> Pixels:
        """(n c h w) uint8. Raises InputError naming an image that cannot be decoded."""
        if not self.keeps:
            return self._images.read(index, self._threads)
        with self._lock:
            if self._kept is None:
                self._kept = self._images.read(threads=self._threads)
        return self._kept[index]

    def ahead(self, indices: Iterable[Index], depth: int = 1) -> Iterator[Pixels]:
        """`read` of each index in order; a background thread reads the next `depth` ones meanwhile.

        Indices are taken in the caller's thread, `depth` ahead. What a read raises comes where its batch would have.
        """
        waiting: deque[Future[Pixels]] = deque()
        background = ThreadPoolExecutor(1)
        try:
            for index in indices:
                waiting.append(background.submit(self.read, index))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            background.shutdown(cancel_futures=True)
