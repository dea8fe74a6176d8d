"""The report's gallery: per class a strip of real images, one of starts, and one of what became of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from teddy_ray.dataset import decode
from teddy_ray.plan import Plan
from teddy_ray.sources import Source
from teddy_ray.stages.images import read_set
from teddy_ray.storage import Storage

MAX_CLASSES, MAX_PER_CLASS = 20, 10
LOSSLESS_SIDE, MAX_SIDE = 64, 128
"""Larger images than LOSSLESS_SIDE are shown at MAX_SIDE pixels at most, as WebP: 600 of them are a few megabytes."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Strip:
    """Images side by side, at equal distances in every strip of the class, as a data URI."""

    title: str
    description: str
    num: int
    uri: str


@dataclass(frozen=True)
class ShownClass:
    """A class of the gallery; num: images that its longest strip has room for."""

    name: str
    num: int
    strips: Sequence[Strip]


def gallery(plan: Plan, source: Source, storage: Storage) -> list[ShownClass]:
    """The first MAX_CLASSES classes. The distilled images are read back as published, each below its own start."""
    per_class = plan.recipe.synthesis.images_per_class
    num, num_classes = min(per_class, MAX_PER_CLASS), min(len(plan.data.classes), MAX_CLASSES)
    starts = read_set(plan, source, storage, plan.image_set("start"), range(num_classes * per_class))
    distilled = _read_published(plan, storage, num_classes, num)
    kind = {"real": "real images", "mosaic": "mosaics", "noise": "noise"}[plan.recipe.synthesis.start]
    shown = []
    for label in range(num_classes):
        name = plan.data.classes[label]
        real = source.train.read(source.train.of_class(label)[:num])
        start = starts[label * per_class :][:num]
        strips = [
            make_strip(title, f"{len(images)} {what} of class {name}", images, num)
            for title, what, images in (
                ("real", "real training images", real),
                ("start", f"starting images ({kind})", start),
                ("distilled", "distilled images", distilled[label]),
            )
        ]
        shown.append(ShownClass(name, num, strips))
    return shown


def _read_published(plan: Plan, storage: Storage, num_classes: int, num: int) -> list[Pixels]:
    """The first images of the first classes, (num c h w) each; one file at a time, for labels are large."""
    per_class = plan.recipe.synthesis.images_per_class
    found: list[list[Pixels]] = [[] for _ in range(num_classes)]
    for shard in plan.shards(plan.labelled(plan.distilled)):
        if shard.rows.start >= num_classes * per_class:
            break
        images = decode(storage.open("shard", shard.fingerprint).read("rows.parquet"))[0].images
        for row, image in zip(shard.rows, images, strict=True):
            label, slot = divmod(row, per_class)
            if label < num_classes and slot < num:
                found[label].append(image)
    return [np.stack(images) for images in found]


def make_strip(title: str, description: str, images: Pixels, num: int) -> Strip:
    """Of (n c h w), with transparent gaps, and transparent places up to `num`."""
    tiles = [_tile(image) for image in images]
    height, width = tiles[0].shape[:2]
    gap = max(1, width // 16)
    strip = np.zeros((height, num * (width + gap) - gap, 4), dtype=np.uint8)
    for index, tile in enumerate(tiles):
        left = index * (width + gap)
        strip[:, left : left + width, :3] = tile
        strip[:, left : left + width, 3] = 255
    form, options = ("PNG", {}) if width <= LOSSLESS_SIDE else ("WEBP", {"quality": 85})
    buffer = io.BytesIO()
    Image.fromarray(strip, "RGBA").save(buffer, form, **options)
    uri = f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Strip(title, description, len(images), uri)


def _tile(image: Pixels) -> Pixels:
    """(c h w) -> (h w 3), scaled down where it is large."""
    _, height, width = image.shape
    pixels = np.broadcast_to(image.transpose(1, 2, 0), (height, width, 3))
    if width <= LOSSLESS_SIDE:
        return pixels
    side = min(width, MAX_SIDE)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), Image.Resampling.LANCZOS))
