"""Data sets as torchvision keeps them on disk: `torchvision:<Name>[,option=value]:<folder>`, never downloaded.

Nothing unverified is unpickled. CIFAR's files are pickles; torchvision compares each of them with the MD5 it knows
before it loads any. Data sets of which that cannot be said are left out.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs

from teddy_ray.errors import InputError, Problem
from teddy_ray.recipe import Data
from teddy_ray.sources.folder import index_files
from teddy_ray.sources.images import Images, Map, keep_classes
from teddy_ray.storage import sha256

PREFIX = "torchvision:"
GRAMMAR = re.compile(r"torchvision:(?P<name>\w+)(?P<options>(,\w+=[^,:]*)*):(?P<root>.+)")
KEY = "data.source"

Listing = Callable[[Any], Iterable[tuple[Any, Any]]]


def _by_loader(dataset: Any) -> Iterator[tuple[Any, Any]]:
    """For classes that take a loader: with `str` as the loader, an image is its path."""
    for row in range(len(dataset)):
        yield dataset[row]


def _by_samples(dataset: Any) -> Iterable[tuple[Any, Any]]:
    return dataset._samples  # type: ignore[no-any-return]


def _by_lists(dataset: Any) -> Iterable[tuple[Any, Any]]:
    return zip(dataset._images, dataset._labels, strict=True)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How to open one of torchvision's classes.

    train, test: arguments that select the split; test is None where the data set has none.
    arguments: further ones. options: what the name may set: option -> values, the first being the default.
    classes: class names where the object has none. nameless: of its class names, those that stand for nothing.
    labels: attribute with the labels of a data set that is held in memory. listing: for one that lies in image files,
    what gives (path, label) of each.
    pickles: files, under the root, that torchvision would load although it cannot know them; their presence is refused.
    downloads: whether torchvision can still fetch it.
    """

    train: Mapping[str, Any]
    test: Mapping[str, Any] | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    nameless: tuple[str, ...] = ()
    labels: str = ""
    listing: Listing | None = None
    pickles: str = ""
    downloads: bool = True


_FLAG: Any = {"train": {"train": True}, "test": {"train": False}}
_SPLIT: Any = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAINVAL: Any = {"train": {"split": "trainval"}, "test": {"split": "test"}}
_FILES: Any = {"arguments": {"loader": str}, "listing": _by_loader}
_DIGITS = tuple(str(digit) for digit in range(10))


def _mnist(name: str, **facts: Any) -> Facts:
    # an old torchvision's processed/*.pt, which new ones still prefer where they find them
    return Facts(**_FLAG, labels="targets", pickles=f"{name}/processed/*.pt", **facts)


FACTS = {
    "CIFAR10": Facts(**_FLAG, labels="targets"),
    "CIFAR100": Facts(**_FLAG, labels="targets"),
    "MNIST": _mnist("MNIST"),
    "FashionMNIST": _mnist("FashionMNIST"),
    "KMNIST": _mnist("KMNIST"),
    "EMNIST": _mnist(
        "EMNIST",
        options={"split": ("balanced", "byclass", "bymerge", "letters", "digits", "mnist")},
        nameless=("N/A",),
    ),
    "SVHN": Facts(**_SPLIT, labels="labels", classes=_DIGITS),
    "STL10": Facts(**_SPLIT, labels="labels"),
    "GTSRB": Facts(**_SPLIT, listing=_by_samples, classes=tuple(str(sign) for sign in range(43))),
    "Food101": Facts(**_SPLIT, **_FILES),
    "Flowers102": Facts(**_SPLIT, **_FILES),
    "OxfordIIITPet": Facts(**_TRAINVAL, listing=_by_lists),
    "DTD": Facts(**_SPLIT, **_FILES),
    "EuroSAT": Facts(train={}, test=None, **_FILES),
    "FGVCAircraft": Facts(**_TRAINVAL, **_FILES, options={"annotation_level": ("variant", "family", "manufacturer")}),
    "StanfordCars": Facts(**_SPLIT, **_FILES, downloads=False),
    "Country211": Facts(**_SPLIT, **_FILES),
    "Imagenette": Facts(
        train={"split": "train"}, test={"split": "val"}, **_FILES, options={"size": ("full", "320px", "160px")}
    ),
}
"""What is opened. SVHN, Flowers102 and StanfordCars need scipy, which scikit-learn brings."""

LEFT_OUT = {
    "ImageNet": "torchvision keeps its class names in a pickle of the user's; name its class folders instead, "
    "data.source <folder>/train and data.test_source <folder>/val",
}


@dataclass(frozen=True)
class _Place:
    """One split of a data set on disk, in a form that can be sent and compared."""

    name: str
    root: str
    options: tuple[tuple[str, str], ...]
    is_test: bool

    def open(self) -> Any:
        """torchvision's object. Raises InputError where the files are missing, or not what torchvision knows."""
        import torchvision.datasets  # here, for it takes seconds

        facts = FACTS[self.name]
        if facts.pickles and (found := sorted(Path(self.root).glob(facts.pickles))):
            remedy = "a pickle from an old torchvision is not loaded; remove it, and keep the files in raw/"
            raise InputError([Problem(KEY, str(found[0]), remedy)])
        split = facts.test if self.is_test else facts.train
        try:
            return getattr(torchvision.datasets, self.name)(
                self.root, **(split or {}), **facts.arguments, **dict(self.options)
            )
        except Exception as error:  # noqa: BLE001 - parsers of many formats raise whatever a broken file leads them to
            raise self.damaged(str(error).split(". ")[0] or type(error).__name__) from None

    def damaged(self, reason: str) -> InputError:
        arguments = "".join(f"{key}={value!r}, " for key, value in self.options)
        command = f"torchvision.datasets.{self.name}({self.root!r}, {arguments}download=True)"
        how = f"run {command} in Python" if FACTS[self.name].downloads else "put its files there"
        split = "test" if self.is_test else "training"
        remedy = f"holds no whole copy of the {split} split of {self.name} ({reason}); {how}, or name another folder"
        return InputError([Problem(KEY, self.root, remedy)])

    def classes(self, dataset: Any) -> tuple[str, ...]:
        names = FACTS[self.name].classes or getattr(dataset, "classes", None)
        if names is None:
            raise self.damaged("its class names are missing")
        return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)


def open_torchvision(uri: str, data: Data) -> tuple[Images, Images | None]:
    """Training and test images; no test images where the data set has no test split of its own."""
    match = GRAMMAR.fullmatch(uri)
    if match is None:
        raise InputError(
            [Problem(KEY, uri, "write it as torchvision:<Name>:<folder>, such as torchvision:MNIST:/data")]
        )
    name, root = match["name"], match["root"]
    if name not in FACTS:
        remedy = LEFT_OUT.get(name, f"name one of {', '.join(FACTS)}, or a folder of class folders")
        raise InputError([Problem(KEY, name, remedy)])
    if "://" in root:
        remedy = "torchvision reads local folders alone; copy it to one, or name class folders or Parquet at a URI"
        raise InputError([Problem(KEY, root, remedy)])
    root, options = os.path.abspath(os.path.expanduser(root)), _options(name, match["options"])
    train = _index(_Place(name, root, options, is_test=False), data)
    if FACTS[name].test is None:
        return train, None
    place = _Place(name, root, options, is_test=True)
    test = _index(place, data)
    if test.classes != train.classes:
        raise place.damaged("its classes differ from those of the training split")
    return train, test


def _options(name: str, text: str) -> tuple[tuple[str, str], ...]:
    allowed = FACTS[name].options
    options = {key: values[0] for key, values in allowed.items()}
    for setting in filter(None, text.split(",")):
        key, _, value = setting.partition("=")
        if value not in allowed.get(key, ()):
            valid = "; ".join(f"{key}: {', '.join(values)}" for key, values in allowed.items()) or "none"
            raise InputError([Problem(KEY, setting, f"options of {name}: {valid}")])
        options[key] = value
    return tuple(options.items())


def _index(place: _Place, data: Data) -> Images:
    facts, dataset = FACTS[place.name], place.open()
    classes = place.classes(dataset)
    if facts.listing is not None:
        listed = list(facts.listing(dataset))
        names = [Path(os.path.relpath(path, place.root)).as_posix() for path, _ in listed]
        labels = np.array([label for _, label in listed], dtype=np.int64)
        images = index_files(KEY, pafs.LocalFileSystem(), place.root, names, labels, classes, data)
    else:
        labels = np.asarray(getattr(dataset, facts.labels), dtype=np.int64)
        split = "test" if place.is_test else "train"
        content = _content(dataset)
        images = Images(
            ids=[f"{place.name}/{split}/{row:07d}" for row in range(len(dataset))],
            labels=labels,
            rows=np.arange(len(dataset)),
            classes=classes,
            content=content,
            image_size=data.image_size,
            channels=data.channels,
            read_rows=_InMemory(place, content),
        )
    if not 0 < len(labels) == len(dataset) or labels.min() < 0 or labels.max() >= len(classes):
        raise place.damaged("it is empty, or its labels do not fit")
    return keep_classes(images, tuple(name for name in classes if name not in facts.nameless))


def _content(dataset: Any) -> str:
    pixels = np.asarray(dataset.data)
    return sha256(repr(pixels.shape).encode() + pixels.tobytes())


@dataclass(frozen=True)
class _InMemory:
    """Reads a data set that torchvision holds in memory; every process loads it once, when it first reads of it."""

    place: _Place
    content: str

    def __call__(
        self, rows: npt.NDArray[np.int64], map_: Map
    ) -> Iterator[tuple[npt.NDArray[np.intp], Iterable[npt.NDArray[np.uint8]]]]:
        with _lock:
            dataset = _load(self.place, self.content)
        yield np.arange(len(rows)), (np.asarray(dataset[int(row)][0]) for row in rows)


_lock = threading.Lock()


@lru_cache(maxsize=2)
def _load(place: _Place, content: str) -> Any:
    dataset = place.open()
    if _content(dataset) != content:
        raise place.damaged("its files have changed since the run began")
    return dataset
