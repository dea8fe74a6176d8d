"""Data sources: scikit-learn's digits, torchvision's data sets, and on any file system that pyarrow opens folders of
class folders and Parquet."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from teddy_ray.errors import InputError, Problem, StoreError
from teddy_ray.recipe import Data
from teddy_ray.sources.digits import open_digits
from teddy_ray.sources.folder import open_folder
from teddy_ray.sources.images import Images, keep_classes, limit, split
from teddy_ray.sources.parquet import open_parquet
from teddy_ray.sources.torchvision_sets import PREFIX as TORCHVISION
from teddy_ray.sources.torchvision_sets import open_torchvision
from teddy_ray.sources.verification import leave_out_bad
from teddy_ray.stores import open_uri

__all__ = ["Images", "Source", "open_source"]

DIGITS = "sklearn:digits"


@dataclass(frozen=True)
class Source:
    """A data set in its three disjoint parts. `validation` is the part of the training data left out of training.

    skipped: ids of the images that could not be decoded and are in no part, where `data.on_bad_image` allows some.
    """

    train: Images
    validation: Images
    test: Images
    skipped: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def open_source(data: Data, say: Callable[[str], None] = lambda text: None) -> Source:
    """Index a data set and split it. `say` takes lines for the user: of work that lasts, of images left out.

    Raises InputError where it is missing, empty or not of a known form.
    """
    training, test = _open_both(data)
    skipped: tuple[str, ...] = ()
    if data.on_bad_image != "error":
        training, skipped = leave_out_bad(training, data.on_bad_image, say)
        if test is not None:
            test, more = leave_out_bad(test, data.on_bad_image, say)
            skipped += more
    if test is None:
        training, test = split(training, _share(data.test_fraction, training))
    if data.classes is not None:
        if unknown := [name for name in data.classes if name not in training.classes]:
            remedy = f"should be classes of the data: {', '.join(training.classes[:20])}"
            raise InputError([Problem("data.classes", unknown, remedy)])
        training, test = keep_classes(training, data.classes), keep_classes(test, data.classes)
    if data.limit_per_class is not None:
        training = limit(training, data.limit_per_class)
    source = Source(*split(training, _share(data.validation, training)), test, skipped)
    _check_parts(source)
    return source


def _open_both(data: Data) -> tuple[Images, Images | None]:
    """Training images, and test images where they are not to be split off."""
    own_test: Images | None = None
    if data.source == DIGITS:
        training, own_test = open_digits(data.image_size, data.channels)
    elif data.source.startswith(TORCHVISION):
        training, own_test = open_torchvision(data.source, data)
    else:
        training = _open("data.source", data.source, data)
    if data.test_source is None:
        return training, own_test
    if own_test is not None:
        remedy = f"leave it out: {data.source} has its own test split"
        raise InputError([Problem("data.test_source", data.test_source, remedy)])
    if data.test_source == DIGITS or data.test_source.startswith(TORCHVISION):
        remedy = "name a folder of class folders or Parquet; this one brings a test split with it, as data.source"
        raise InputError([Problem("data.test_source", data.test_source, remedy)])
    test = _open("data.test_source", data.test_source, data)
    if test.content == training.content:
        remedy = "holds the very images of data.source; name others, or leave it out"
        raise InputError([Problem("data.test_source", data.test_source, remedy)])
    if test.classes != training.classes:
        remedy = f"should have the classes of data.source, {list(training.classes[:5])} ..."
        raise InputError([Problem("data.test_source", list(test.classes[:5]), remedy)])
    return training, test


def _open(key: str, uri: str, data: Data) -> Images:
    try:
        fs, path = open_uri(uri, key)
        return _open_path(key, uri, fs, path, data)
    except InputError:
        raise
    except (ValueError, OSError, pa.ArrowNotImplementedError, StoreError) as error:
        if isinstance(error, StoreError) and not error.is_final:  # nothing is wrong with what was asked for
            raise
        raise InputError(
            [Problem(key, uri, f"name {DIGITS}, {TORCHVISION}<Name>:<folder>, a folder or a Parquet file ({error})")]
        ) from None


def _open_path(key: str, uri: str, fs: pafs.FileSystem, path: str, data: Data) -> Images:
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        others = f"{DIGITS} or {TORCHVISION}<Name>:<folder>"
        remedy = f"does not exist; name a folder of class folders or a Parquet file, by path or URI, {others}"
        raise InputError([Problem(key, uri, remedy)])
    if info.type == pafs.FileType.File:
        folder, _, name = path.rpartition("/")
        return open_parquet(key, fs, folder, [name], data)
    listing = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    names = sorted(
        entry.path[len(path) :].lstrip("/")
        for entry in listing
        if entry.type == pafs.FileType.File and entry.path.endswith(".parquet")
    )
    if names:
        return open_parquet(key, fs, path, _of_split(key, uri, names), data)
    return open_folder(key, fs, path, data)


def _of_split(key: str, uri: str, names: list[str]) -> list[str]:
    """Of a folder in Hugging Face's layout (train-*, test-*, validation-*), the files of the split that `key` means."""
    splits: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r"(train|test|validation|val)(?![A-Za-z])", name.rsplit("/", 1)[-1])
        splits.setdefault(match.group(1) if match else "", []).append(name)
    if len(splits) == 1:
        return names
    wanted = ("train",) if key == "data.source" else ("test", "validation", "val")
    for split_name in wanted:
        if split_name in splits:
            return splits[split_name]
    remedy = f"holds files of several splits, none named {' or '.join(wanted)}; name one file instead"
    raise InputError([Problem(key, uri, remedy)])


def _share(share: float, images: Images) -> int:
    return math.ceil(round(share * len(images), 9))  # 0.07 of 100 is 7, not the 7.000000000000001 of floats


def _check_parts(source: Source) -> None:
    counts = np.bincount(source.train.labels, minlength=len(source.classes))
    if missing := [name for name, count in zip(source.classes, counts, strict=True) if count == 0]:
        raise InputError(
            [
                Problem(
                    "data.source",
                    missing[:10],
                    "these classes have no image left to train on; add images or leave them out with data.classes",
                )
            ]
        )
    for key, images in (("data.validation", source.validation), ("data.test_fraction", source.test)):
        if not len(images):
            raise InputError([Problem(key, 0, "no image falls into this part; add images or raise the share")])
