"""Parquet files: images as encoded bytes, struct<bytes, path> or tensors, labels as integers or class names.

Class names come from the Hugging Face features in the schema, where they are there.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from teddy_ray.errors import InputError, Problem
from teddy_ray.recipe import Data
from teddy_ray.sources.decoding import BadImageError, Raw
from teddy_ray.sources.images import Images, Map, content_hash, unreadable
from teddy_ray.sources.tensors import is_tensor, to_array, type_fault
from teddy_ray.storage import sha256

CACHE_BYTES = 128 * 2**20
"""Row groups that a reader keeps: as many as fit, the last one whatever its size."""


@dataclass(frozen=True)
class _File:
    """What is known of a file without reading its images. groups: number of rows of each row group."""

    problems: list[Problem]
    class_names: tuple[str, ...] | None = None
    labels: pa.ChunkedArray | None = None
    groups: tuple[int, ...] = ()
    content: str = ""


class _Reader:
    """Reads each row group once per call, whatever the order of the rows, and keeps the last ones between calls.

    Rows in a random order touch many row groups, which are read whole: where images are to be read many times in such
    an order, keep them in memory (loader.py).
    """

    def __init__(self, key: str, fs: pafs.FileSystem, paths: list[str], files: list[_File], column: str) -> None:
        self._key, self._fs, self._paths, self._column = key, fs, paths, column
        self._groups = [(file, group) for file, known in enumerate(files) for group in range(len(known.groups))]
        sizes = [size for known in files for size in known.groups]
        self._starts = np.cumsum([0, *sizes])[:-1]
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, rows: npt.NDArray[np.int64], map_: Map) -> Iterator[tuple[npt.NDArray[np.intp], Iterable[Raw]]]:
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(groups, kind="stable")
        for positions in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            if len(positions):
                group = int(groups[positions[0]])
                column, start = self._read_group(group), int(self._starts[group])
                yield positions, (_to_raw(column[int(row) - start]) for row in rows[positions])

    def _read_group(self, group: int) -> pa.ChunkedArray:
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
        file, row_group = self._groups[group]
        try:
            with pq.ParquetFile(self._fs.open_input_file(self._paths[file])) as parquet:
                column = parquet.read_row_group(row_group, columns=[self._column]).column(0)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self._key, self._paths[file], error) from None
        with self._lock:
            self._kept[group] = column
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > CACHE_BYTES:
                self._kept.popitem(last=False)
        return column


def _to_raw(value: Any) -> Raw:
    if not value.is_valid:
        return BadImageError("the row holds no image, but null")
    if is_tensor(value.type):
        return to_array(value)
    data = value.as_py()
    if not isinstance(data, dict):
        return bytes(data)
    if data["bytes"] is None:
        return BadImageError(f"the row holds no bytes, only the path {data.get('path')!r}; store the bytes with it")
    return bytes(data["bytes"])


def open_parquet(key: str, fs: pafs.FileSystem, root: str, names: list[str], data: Data) -> Images:
    """Index Parquet files `names` under `root`. `key` is the recipe's key, for errors."""
    paths = [f"{root}/{name}" if root else name for name in names]
    with ThreadPoolExecutor(16) as threads:
        files = list(threads.map(lambda path: _examine(key, fs, path, data), paths))
    problems = [problem for file in files for problem in file.problems]
    labels = [file.labels for file in files if file.labels is not None]
    named = {file.class_names for file in files if not file.problems}
    if len({str(column.type) for column in labels}) > 1:
        remedy = "should hold integers in every file, or class names in every file"
        problems.append(Problem("data.label_column", data.label_column, remedy))
    if len(named) > 1:
        lists = [list(names or ())[:5] for names in named]
        problems.append(Problem(key, lists, "the files should all name the same classes in the same order"))
    if problems:
        raise InputError(problems)
    column = pa.chunked_array([chunk for label in labels for chunk in label.chunks])
    if len(column) == 0 or column.null_count:
        raise InputError([Problem(key, root or names[0], f"should have rows, each with a {data.label_column!r}")])
    indices, classes = _to_indices(column, named.pop())
    if indices.min() < 0 or indices.max() >= len(classes):
        remedy = f"its labels should lie in 0..{len(classes) - 1}, or be among the class names of the file"
        raise InputError([Problem("data.label_column", data.label_column, remedy)])
    hashes = [f"{name} {file.content}" for name, file in zip(names, files, strict=True)]
    return Images(
        ids=[f"{name}:{row}" for name, label in zip(names, labels, strict=True) for row in range(len(label))],
        labels=indices,
        rows=np.arange(len(indices)),
        classes=classes,
        content=sha256("\n".join([data.image_column, *hashes]).encode()),
        image_size=data.image_size,
        channels=data.channels,
        read_rows=_Reader(key, fs, paths, files, data.image_column),
        key=key,
    )


def _examine(key: str, fs: pafs.FileSystem, path: str, data: Data) -> _File:
    try:
        with pq.ParquetFile(fs.open_input_file(path)) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
            if problems := _column_problems(path, schema, data):
                return _File(problems)
            return _File(
                [],
                _class_names(schema, data.label_column),
                _widen(parquet.read(columns=[data.label_column]).column(0)),
                tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)),
                content_hash(fs, path),
            )
    except (pa.ArrowInvalid, OSError) as error:
        return _File([Problem(key, path, f"should be readable Parquet ({str(error).splitlines()[0]})")])


def _column_problems(path: str, schema: pa.Schema, data: Data) -> list[Problem]:
    problems = []
    for column_key, column in (("data.image_column", data.image_column), ("data.label_column", data.label_column)):
        if column not in schema.names:
            problems.append(
                Problem(column_key, column, f"should be a column of {path}; it has {', '.join(schema.names)}")
            )
    if problems:
        return problems
    image_type, label_type = schema.field(data.image_column).type, schema.field(data.label_column).type
    if is_tensor(image_type):
        fault = type_fault(image_type)
    else:
        is_struct = pa.types.is_struct(image_type) and image_type.get_field_index("bytes") >= 0
        is_bytes = is_struct or pa.types.is_binary(image_type) or pa.types.is_large_binary(image_type)
        fault = None if is_bytes else f"should hold bytes, struct<bytes, path> or uint8 tensors, not {image_type}"
    if fault:
        problems.append(Problem("data.image_column", data.image_column, fault))
    if not (pa.types.is_integer(label_type) or pa.types.is_string(label_type) or pa.types.is_large_string(label_type)):
        problems.append(
            Problem("data.label_column", data.label_column, f"should hold integers or class names, not {label_type}")
        )
    return problems


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """From the metadata that Hugging Face `datasets` writes; None where it is missing or of another form."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"]) or None
    except (KeyError, TypeError, ValueError):
        return None


def _widen(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Integers as int64, strings as string, so that files written by different hands fit together."""
    return column.cast(pa.int64() if pa.types.is_integer(column.type) else pa.string())


def _to_indices(
    column: pa.ChunkedArray, class_names: tuple[str, ...] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if pa.types.is_integer(column.type):
        indices = column.to_numpy().astype(np.int64)
        return indices, class_names or tuple(str(label) for label in range(int(indices.max()) + 1))
    classes = class_names or tuple(sorted(set(pc.unique(column).to_pylist())))
    lookup = {name: index for index, name in enumerate(classes)}
    return np.array([lookup.get(name, -1) for name in column.to_pylist()], dtype=np.int64), classes
