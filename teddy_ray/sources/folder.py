"""A folder of class folders, as torchvision's ImageFolder reads it: <root>/<class name>/**/<image>."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs

from teddy_ray.errors import InputError, Problem
from teddy_ray.recipe import Data
from teddy_ray.sources.images import Images, Map, content_hash, unreadable
from teddy_ray.storage import sha256

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


@dataclass(frozen=True)
class _Files:
    """Reads image files by their place among `names`."""

    key: str
    fs: pafs.FileSystem
    root: str
    names: list[str]

    def __call__(
        self, rows: npt.NDArray[np.int64], map_: Map
    ) -> Iterator[tuple[npt.NDArray[np.intp], Iterable[bytes]]]:
        yield np.arange(len(rows)), map_(self._read, rows)

    def _read(self, row: int) -> bytes:
        path = f"{self.root}/{self.names[row]}"
        try:
            with self.fs.open_input_file(path) as file:
                return bytes(file.read())
        except OSError as error:
            raise unreadable(self.key, path, error) from None

    def content(self) -> str:
        """Hash of the files' names and bytes."""
        with ThreadPoolExecutor(16) as threads:
            hashes = list(threads.map(self._hash, self.names))
        return sha256("\n".join(f"{name} {hash_}" for name, hash_ in zip(self.names, hashes, strict=True)).encode())

    def _hash(self, name: str) -> str:
        path = f"{self.root}/{name}"
        try:
            return content_hash(self.fs, path)
        except OSError as error:
            raise unreadable(self.key, path, error) from None


def index_files(
    key: str,
    fs: pafs.FileSystem,
    root: str,
    names: list[str],
    labels: npt.NDArray[np.int64],
    classes: tuple[str, ...],
    data: Data,
) -> Images:
    """Image files `names` under `root` with their labels. `key` is the recipe's key, for errors."""
    files = _Files(key, fs, root, names)
    return Images(
        ids=names,
        labels=labels,
        rows=np.arange(len(names)),
        classes=classes,
        content=files.content(),
        image_size=data.image_size,
        channels=data.channels,
        read_rows=files,
        key=key,
    )


def open_folder(key: str, fs: pafs.FileSystem, root: str, data: Data) -> Images:
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
    return index_files(key, fs, root, names, labels, tuple(classes), data)
