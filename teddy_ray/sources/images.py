"""What every source gives: images that know their ids, labels and content, and are read by row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs

from teddy_ray.errors import InputError, Problem
from teddy_ray.randomness import id_hash
from teddy_ray.sources.decoding import DECODING_VERSION, BadImageError, Raw, decode
from teddy_ray.storage import sha256

BLOCK = 256
"""Images in flight where threads decode."""

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""The built-in `map`, or one that works in threads."""

ReadRows = Callable[[npt.NDArray[np.int64], Map], Iterator[tuple[npt.NDArray[np.intp], Iterable[Raw]]]]
"""Rows of the source -> what it holds of each, in the order that suits the source: (positions among the rows, images)
piece by piece. Must be picklable, since workers read for themselves, and safe to call from several threads."""


@dataclass(frozen=True)
class Images:
    """A labelled collection of images, read when asked.

    ids: stable names, independent of where the data lies. labels: (n,) indices into classes.
    rows: (n,) rows of the source, given to `read_rows`. content: hash of the source's content.
    key: the recipe's key that named the source, for errors.
    """

    ids: Sequence[str]
    labels: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    content: str
    image_size: int
    channels: int
    read_rows: ReadRows
    key: str = "data.source"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> str:
        """Hash of what these images are: content, selection, classes, size; never where they lie or when."""
        selection = "\n".join(self.ids).encode() + self.labels.tobytes()
        facts = (DECODING_VERSION, self.content, sha256(selection), self.classes, self.image_size, self.channels)
        return sha256(repr(facts).encode())

    def select(self, index: npt.NDArray[np.integer]) -> Images:
        """The images at positions `index`, in that order."""
        return replace(self, ids=[self.ids[i] for i in index], labels=self.labels[index], rows=self.rows[index])

    def read(
        self, index: npt.NDArray[np.integer] | None = None, threads: Executor | None = None
    ) -> npt.NDArray[np.uint8]:
        """Decode the images at positions `index` (all without it): (n channels size size) uint8.

        Raises InputError naming the image that cannot be decoded. The calling thread must not be one of `threads`.
        """
        index = np.arange(len(self)) if index is None else index
        out = np.empty((len(index), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        for position, pixels in self.try_read(index, threads):
            if isinstance(pixels, BadImageError):
                remedy = f"this image cannot be decoded ({pixels}); mend or remove it, or see data.on_bad_image"
                raise InputError([Problem(self.key, self.ids[index[position]], remedy)])
            out[position] = pixels
        return out

    def try_read(
        self, index: npt.NDArray[np.integer], threads: Executor | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.uint8] | BadImageError]]:
        """(position in `index`, pixels or why there are none) of each of them, in the order that suits the source."""
        map_ = map if threads is None else _map_in(threads)
        for positions, raws in self.read_rows(self.rows[index], map_):
            yield from zip(positions.tolist(), map_(self._try_decode, raws), strict=True)

    def of_class(self, label: int) -> npt.NDArray[np.intp]:
        """Positions of the images of a class, in order."""
        return np.flatnonzero(self.labels == label)

    def _try_decode(self, raw: Raw) -> npt.NDArray[np.uint8] | BadImageError:
        try:
            return decode(raw, self.image_size, self.channels)
        except BadImageError as bad:
            return bad


def _map_in(threads: Executor) -> Map:
    """Like `map`, with at most BLOCK items taken ahead."""

    def map_(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(items)
        while block := list(islice(iterator, BLOCK)):
            yield from threads.map(function, block)

    return map_


def unreadable(key: str, path: str, error: Exception) -> InputError:
    """The error of a file that the source names but that cannot be read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError([Problem(key, path, f"this file cannot be read ({reason}); put it back, or see to its storage")])


def content_hash(fs: pafs.FileSystem, path: str) -> str:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with fs.open_input_stream(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return f"{size} {digest.hexdigest()}"


def split(images: Images, num: int) -> tuple[Images, Images]:
    """Set `num` images aside, stratified: (the rest, those set aside), both in the old order.

    Each class gives its proportional share, rounded by largest remainder, and of it the images with the
    smallest id hashes: the split follows neither the data's order nor any seed.
    """
    if not len(images):
        return images, images
    counts = np.bincount(images.labels, minlength=len(images.classes))
    exact = counts * num / len(images)
    take = np.floor(exact).astype(int)
    by_remainder = np.argsort(-(exact - take), kind="stable")
    take[by_remainder[: num - take.sum()]] += 1
    aside = np.concatenate([_by_hash(images, label)[: take[label]] for label in range(len(images.classes))])
    mask = np.zeros(len(images), dtype=bool)
    mask[aside] = True
    return images.select(np.flatnonzero(~mask)), images.select(np.flatnonzero(mask))


def limit(images: Images, per_class: int) -> Images:
    """At most so many images of each class, those with the smallest id hashes, in the old order."""
    kept = [_by_hash(images, label)[:per_class] for label in range(len(images.classes))]
    return images.select(np.sort(np.concatenate(kept)))


def keep_classes(images: Images, classes: tuple[str, ...]) -> Images:
    """The images of these classes alone, which become the classes in this order."""
    old_to_new = np.full(len(images.classes), -1, dtype=np.int64)
    for new, name in enumerate(classes):
        old_to_new[images.classes.index(name)] = new
    labels = old_to_new[images.labels]
    kept = images.select(np.flatnonzero(labels >= 0))
    return replace(kept, classes=classes, labels=labels[labels >= 0])


def _by_hash(images: Images, label: int) -> npt.NDArray[np.intp]:
    members = images.of_class(label)
    return members[np.argsort([id_hash(images.ids[i]) for i in members], kind="stable")]
