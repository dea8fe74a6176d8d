"""Images for loops over a data set: kept in memory where they fit, and batches made ready ahead of their use."""

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
    """Reads images by position, with threads. num_decoded: images so far.

    A set that takes no more than `max_bytes` as 8-bit pixels is decoded whole at the first use and kept; of a larger
    one every call decodes what it is asked for. The pixels are the same. Close it, or use it in a with statement.
    """

    def __init__(self, images: Images, max_bytes: int, num_threads: int) -> None:
        self.images, self.num_decoded = images, 0
        self._num_threads, self._threads = num_threads, ThreadPoolExecutor(num_threads, thread_name_prefix="loader")
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
            return self._decode(index, self._threads)
        with self._lock:
            if self._kept is None:
                self._kept = self.images.read(threads=self._threads)
                self.num_decoded += len(self.images)
        return self._kept[index]

    def ahead(self, indices: Iterable[Index]) -> Iterator[Pixels]:
        """`read` of each index in order, each decoded by one thread while the caller works on those before.

        No more batches wait than there are threads. Indices are taken in the caller's thread. What a read raises comes
        where its batch would have.
        """
        if self.keeps:
            yield from map(self.read, indices)
            return
        waiting: deque[Future[Pixels]] = deque()
        try:
            for index in indices:
                waiting.append(self._threads.submit(self._decode, index))
                if len(waiting) > self._num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _decode(self, index: Index, threads: ThreadPoolExecutor | None = None) -> Pixels:
        pixels = self.images.read(index, threads)
        with self._lock:
            self.num_decoded += len(pixels)
        return pixels
