"""What every source gives: images that know their ids, labels and content, and are read by row."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs
from PIL import Image, ImageOps, UnidentifiedImageError

from teddy_ray.errors import InputError, Problem
from teddy_ray.randomness import id_hash
from teddy_ray.storage import sha256

DECODING_VERSION = 1
"""Raise it when decoding or resizing changes its bytes: nothing old is reused then."""

ReadRow = Callable[[int], Image.Image]
"""Row of the source -> its image. Must be picklable: workers read for themselves."""


@dataclass(frozen=True)
class Images:
    """A labelled collection of images, read when asked.

    ids: stable names, independent of where the data lies. labels: (n,) indices into classes.
    rows: (n,) rows of the source, given to `read_row`. content: hash of the source's bytes.
    key: the recipe's key that named the source, for errors.
    """

    ids: Sequence[str]
    labels: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    content: str
    image_size: int
    channels: int
    read_row: ReadRow
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

    def read(self, index: npt.NDArray[np.integer] | None = None) -> npt.NDArray[np.uint8]:
        """Decode the images at positions `index` (all without it): (n channels size size) uint8.

        Raises InputError naming the image that cannot be decoded.
        """
        index = np.arange(len(self)) if index is None else index
        out = np.empty((len(index), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        for position, i in enumerate(index):
            try:
                out[position] = self._to_array(self.read_row(int(self.rows[i])))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
                remedy = f"this image cannot be decoded ({reason}); mend or remove it"
                raise InputError([Problem(self.key, self.ids[i], remedy)]) from None
        return out

    def of_class(self, label: int) -> npt.NDArray[np.intp]:
        """Positions of the images of a class, in order."""
        return np.flatnonzero(self.labels == label)

    def _to_array(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        image = _to_8_bits(ImageOps.exif_transpose(image)).convert("L" if self.channels == 1 else "RGB")
        if image.size != (self.image_size, self.image_size):
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.BILINEAR)
        array = np.asarray(image, dtype=np.uint8)
        return array[None] if self.channels == 1 else array.transpose(2, 0, 1)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale keeps its high byte; Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its values are neither of 8 nor of 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers; store 8 or 16 bits per channel")
    return image


def decode(data: bytes) -> Image.Image:
    """An image from its encoded bytes."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


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


def _by_hash(images: Images, label: int) -> npt.NDArray[np.intp]:
    members = images.of_class(label)
    return members[np.argsort([id_hash(images.ids[i]) for i in members], kind="stable")]
