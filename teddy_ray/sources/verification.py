"""`data.on_bad_image` with a fraction: every image is decoded once, and those that cannot be are left out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from teddy_ray.errors import InputError, Problem
from teddy_ray.sources.decoding import BadImageError
from teddy_ray.sources.images import Images

BLOCK = 1024
INTERVAL_S = 10.0
NUM_NAMED = 3


def leave_out_bad(images: Images, most: float, say: Callable[[str], None]) -> tuple[Images, tuple[str, ...]]:
    """The images that can be decoded, and the ids of the others.

    Raises InputError where the others are more than the share `most` of all. A file that cannot be read, because its
    storage fails, is an error and no bad image.
    """
    say(f"{images.key}: decoding all {len(images)} images once, for data.on_bad_image is {most}")
    bad: dict[int, BadImageError] = {}
    spoke = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(images), BLOCK):
            index = np.arange(start, min(start + BLOCK, len(images)))
            for position, pixels in images.try_read(index, threads):
                if isinstance(pixels, BadImageError):
                    bad[start + position] = pixels
            if time.monotonic() - spoke >= INTERVAL_S:
                spoke = time.monotonic()
                say(f"{images.key}: {index[-1] + 1}/{len(images)} images decoded")
    if not bad:
        return images, ()
    names = ", ".join(f"{images.ids[i]} ({bad[i]})" for i in sorted(bad)[:NUM_NAMED])
    more = ", ..." if len(bad) > NUM_NAMED else ""
    share = len(bad) / len(images)
    found = f"{len(bad)} of {len(images)} images ({share:.2%}) of {images.key} cannot be decoded: {names}{more}"
    if share > most:
        raise InputError([Problem("data.on_bad_image", most, f"{found}; mend or remove them, or allow a larger share")])
    say(f"{found}; they are left out")
    good = np.setdiff1d(np.arange(len(images)), sorted(bad))
    return images.select(good), tuple(images.ids[i] for i in sorted(bad))
