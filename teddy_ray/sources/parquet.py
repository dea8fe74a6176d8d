"""Parquet files: images as encoded bytes or struct<bytes, path>, labels as integers or class names.

Class names come from the Hugging Face features in the schema, where they are there.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from PIL import Image

from teddy_ray.errors import InputError, Problem
from teddy_ray.recipe import Data
from teddy_ray.sources.images import Images, content_hash, decode
from teddy_ray.storage import sha256


class _Reader:
    """Reads single rows; keeps the row group it read last, since rows are mostly asked for in order."""

    def __init__(self, fs: pafs.FileSystem, paths: list[str], column: str) -> None:
        self._fs, self._paths, self._column = fs, paths, column
        self._starts: npt.NDArray[np.int64] | None = None
        self._groups: list[tuple[int, int]] = []
        self._last: tuple[int, Any] = (-1, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_starts": None, "_groups": [], "_last": (-1, None)}

    def __call__(self, row: int) -> Image.Image:
        if self._starts is None:
            self._index()
        assert self._starts is not None
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if group != self._last[0]:
            file, row_group = self._groups[group]
            with pq.ParquetFile(self._fs.open_input_file(self._paths[file])) as parquet:
                self._last = group, parquet.read_row_group(row_group, columns=[self._column]).column(0)
        value = self._last[1][row - int(self._starts[group])].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise ValueError("the image has no bytes")
        return decode(data)

    def _index(self) -> None:
        starts, total = [], 0
        for file, path in enumerate(self._paths):
            with pq.ParquetFile(self._fs.open_input_file(path)) as parquet:
                for group in range(parquet.num_row_groups):
                    starts.append(total)
                    self._groups.append((file, group))
                    total += parquet.metadata.row_group(group).num_rows
        self._starts = np.array(starts, dtype=np.int64)


def open_parquet(key: str, fs: pafs.FileSystem, root: str, names: list[str], data: Data) -> Images:
    """Index Parquet files `names` under `root`. `key` is the recipe's key, for errors."""
    paths = [f"{root}/{name}" if root else name for name in names]
    problems: list[Problem] = []
    labels: list[pa.ChunkedArray] = []
    named: set[tuple[str, ...] | None] = set()
    for path in paths:
        try:
            with pq.ParquetFile(fs.open_input_file(path)) as parquet:
                schema = parquet.schema_arrow
                if found := _column_problems(path, schema, data):
                    problems += found
                    continue
                named.add(_class_names(schema, data.label_column))
                labels.append(_widen(parquet.read(columns=[data.label_column]).column(0)))
        except (pa.ArrowInvalid, OSError) as error:
            problems.append(Problem(key, path, f"should be readable Parquet ({str(error).splitlines()[0]})"))
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
    hashes = [f"{name} {content_hash(fs, path)}" for name, path in zip(names, paths, strict=True)]
    return Images(
        ids=[f"{name}:{row}" for name, label in zip(names, labels, strict=True) for row in range(len(label))],
        labels=indices,
        rows=np.arange(len(indices)),
        classes=classes,
        content=sha256("\n".join([data.image_column, *hashes]).encode()),
        image_size=data.image_size,
        channels=data.channels,
        read_row=_Reader(fs, paths, data.image_column),
        key=key,
    )


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
    is_struct = pa.types.is_struct(image_type) and image_type.get_field_index("bytes") >= 0
    if not (is_struct or pa.types.is_binary(image_type) or pa.types.is_large_binary(image_type)):
        problems.append(
            Problem(
                "data.image_column", data.image_column, f"should hold bytes or struct<bytes, path>, not {image_type}"
            )
        )
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
