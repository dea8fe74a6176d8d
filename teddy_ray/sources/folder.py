"""A folder of class folders, as torchvision's ImageFolder reads it: <root>/<class name>/**/<image>."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow.fs as pafs
from PIL import Image

from teddy_ray.errors import InputError, Problem
from teddy_ray.sources.images import Images, content_hash, decode
from teddy_ray.storage import sha256

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def _read_file(fs: pafs.FileSystem, root: str, names: list[str], row: int) -> Image.Image:
    with fs.open_input_stream(f"{root}/{names[row]}") as stream:
        return decode(stream.read())


def open_folder(key: str, fs: pafs.FileSystem, root: str, image_size: int, channels: int) -> Images:
    """Index the folder; classes are its folders in sorted order. `key` is the recipe's key, for errors."""
    listing = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    relative = {info.path[len(root) :].lstrip("/"): info for info in listing}
    classes = sorted(
        name
        for name, info in relative.items()
        if info.type == pafs.FileType.Directory and "/" not in name and name[0] != "."
    )
    if not classes:
        raise InputError([Problem(key, root, "should hold one folder per class, with images inside")])
    names = sorted(
        name
        for name, info in relative.items()
        if info.type == pafs.FileType.File
        and "/" in name
        and f".{name.rsplit('.', 1)[-1].lower()}" in SUFFIXES
        and not any(piece.startswith(".") for piece in name.split("/"))
    )
    class_index = {name: index for index, name in enumerate(classes)}
    labels = np.array([class_index[name.split("/", 1)[0]] for name in names], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        raise InputError(
            Problem(
                f"{key} ({name})",
                f"{root}/{name}",
                f"should hold images ({', '.join(sorted(SUFFIXES))}); add some or remove the folder",
            )
            for name in empty
        )
    with ThreadPoolExecutor(16) as threads:
        hashes = list(threads.map(lambda name: content_hash(fs, f"{root}/{name}"), names))
    lines = "\n".join(f"{name} {content}" for name, content in zip(names, hashes, strict=True))
    return Images(
        ids=names,
        labels=labels,
        rows=np.arange(len(names)),
        classes=tuple(classes),
        content=sha256(lines.encode()),
        image_size=image_size,
        channels=channels,
        read_row=partial(_read_file, fs, root, names),
        key=key,
    )
