"""A small published set of random pixels, for tests of reading and checking."""

import numpy as np

from teddy_ray.dataset import LabelledImages, encode, seal, shard_name
from teddy_ray.labels import Dense, TopK

CLASSES = ("cat", "dog é")
PER_CLASS, VIEWS, SIZE = 3, 4, 6
DATA = [shard_name(0, 2), shard_name(1, 2)]
NUM = 2 * PER_CLASS
LABELS = {
    "mode": "fp16",
    "num_views": VIEWS,
    "averaged": False,
    "ensemble": "probabilities",
    "temperature": 2.0,
    "top_k": 1,
}


def soft_labels(form="fp16", num_views=VIEWS):
    """Of every image and view, in one of the forms of `labels.mode`."""
    probabilities = np.random.default_rng(8).dirichlet([1, 1], (NUM, num_views)).astype(np.float16)
    if form == "fp16":
        return Dense(probabilities)
    if form == "top_k":
        best = probabilities.argmax(2)[..., None]
        return TopK(best.astype(np.uint8), np.take_along_axis(probabilities, best, 2), 2)
    return None


def part_of(soft, keep):
    """The labels of some images."""
    if isinstance(soft, Dense):
        return Dense(soft.values[keep])
    return soft and TopK(soft.classes[keep], soft.values[keep], soft.num_classes)


def rows(channels=3, first=0, last=NUM, form="fp16", num_views=VIEWS):
    """Some rows of a set of PER_CLASS images of each class."""
    images = np.random.default_rng(7).integers(0, 256, (NUM, channels, SIZE, SIZE), dtype=np.uint8)
    keep = slice(first, last)
    return LabelledImages(
        ids=[f"{row // PER_CLASS:05d}-{row % PER_CLASS:05d}" for row in range(NUM)][keep],
        images=images[keep],
        labels=np.repeat(np.arange(2), PER_CLASS)[keep],
        soft_labels=part_of(soft_labels(form, num_views), keep),
    )


HALVES = (rows(last=4), rows(first=4))


def publish(folder, parts=HALVES, classes=CLASSES, labels=None, views=None, known_classes=CLASSES, more=(), **facts):
    """A sealed set of one file per part."""
    files = [(shard_name(i, len(parts)), part) for i, part in enumerate(parts)]
    encoded = [(name, part if isinstance(part, bytes) else encode(part, classes)[0]) for name, part in files]
    known = {
        "classes": list(known_classes),
        "images_per_class": PER_CLASS,
        "image_size": SIZE,
        "channels": 3,
        "labels": {**LABELS, **(labels or {})},
        "views": {
            "seed": 3,
            "set_key": "a set",
            "augmentation": {"crop_scale": [0.5, 1.0], "crop_ratio": [0.75, 1.25], "flip": True},
            "cutmix": 0.0,
            "formation": 1,
            **(views or {}),
        },
        "members": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("# A card\n\nof several lines\n")
    for name, data in seal([*encoded, *more], {**known, **facts}):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def assert_equal(found, expected):
    """The same rows, to the bit."""
    assert list(found.ids) == list(expected.ids)
    assert type(found.soft_labels) is type(expected.soft_labels)
    pairs = [(found.images, expected.images), (found.labels, expected.labels)]
    for name in ("values", "classes"):
        if hasattr(expected.soft_labels, name):
            pairs.append((getattr(found.soft_labels, name), getattr(expected.soft_labels, name)))
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
