"""The form in which a labelled set is stored and published: Hugging Face Parquet.

A set is a folder: data/train-*.parquet with the columns id, image (PNG), label (ClassLabel) and, view by view,
soft_label of all classes in float16, or soft_label_classes and soft_label_values of the largest, or none; a card
README.md; and teddy.json with what made it and the hash of every file but the card.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from teddy_ray.labels import Dense, Stored, TopK, join
from teddy_ray.storage import sha256, to_json

FORMAT = 3
DISTILLED = "distilled"
"""Where a run keeps its set."""
FACTS, CARD, MEMBERS = "teddy.json", "README.md", "members"
PARTS = ("data", MEMBERS)
"""Folders of a set whose files are sealed."""
COLUMNS = {"id", "image", "label"}
SOFT, SOFT_CLASSES, SOFT_VALUES = "soft_label", "soft_label_classes", "soft_label_values"


@dataclass(frozen=True)
class LabelledImages:
    """Rows of a labelled set. images: (n c h w) uint8; labels: (n,); soft_labels: None where none are stored."""

    ids: Sequence[str]
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    soft_labels: Stored | None


def encode(rows: LabelledImages, classes: Sequence[str]) -> tuple[bytes, int]:
    """One Parquet file, and how many of its bytes are PNGs. Equal rows give equal bytes."""
    pngs = [to_png(image) for image in rows.images]
    columns = {
        "id": pa.array(rows.ids, pa.string()),
        "image": pa.array(
            [{"bytes": png, "path": f"{image_id}.png"} for png, image_id in zip(pngs, rows.ids, strict=True)],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        ),
        "label": pa.array(rows.labels, pa.int64()),
    }
    features: dict[str, Any] = {
        "id": {"dtype": "string", "_type": "Value"},
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
    }
    for name, values in _soft_columns(rows.soft_labels).items():
        columns[name] = _nested(values)
        value = {"dtype": str(values.dtype), "_type": "Value"}
        features[name] = {"feature": {"feature": value, "_type": "Sequence"}, "_type": "Sequence"}
    table = pa.table(columns)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue(), sum(len(png) for png in pngs)


def decode(data: bytes) -> tuple[LabelledImages, tuple[str, ...]]:
    """The rows of one Parquet file and the class names. Raises ValueError where it is not of this form."""
    table = pq.read_table(io.BytesIO(data))
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    classes = metadata.get("info", {}).get("features", {}).get("label", {}).get("names")
    soft = set(table.column_names) - COLUMNS
    if (
        classes is None
        or not set(table.column_names) >= COLUMNS
        or soft not in ({SOFT}, {SOFT_CLASSES, SOFT_VALUES}, set())
    ):
        raise ValueError(
            f"should have the columns id, image, label, soft labels as {SOFT}, or as {SOFT_CLASSES} and {SOFT_VALUES}, "
            "or none, and the class names in its metadata"
        )
    labels: Stored | None = None
    if SOFT in soft:
        labels = Dense(_unnested(table.column(SOFT)).astype(np.float16))
    elif soft:
        values = _unnested(table.column(SOFT_VALUES)).astype(np.float16)
        labels = TopK(_unnested(table.column(SOFT_CLASSES)), values, len(classes))
    rows = LabelledImages(
        ids=table.column("id").to_pylist(),
        images=np.stack([from_png(value["bytes"]) for value in table.column("image").to_pylist()]),
        labels=table.column("label").to_numpy(),
        soft_labels=labels,
    )
    return rows, tuple(classes)


def _soft_columns(labels: Stored | None) -> dict[str, npt.NDArray[Any]]:
    if labels is None:
        return {}
    if isinstance(labels, Dense):
        return {SOFT: labels.values}
    return {SOFT_CLASSES: labels.classes, SOFT_VALUES: labels.values}


def _nested(values: npt.NDArray[Any]) -> pa.ListArray:
    """(n views k) -> n lists of lists."""
    _, num_views, k = values.shape
    flat = pa.array(values.reshape(-1))
    per_view = pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, k, dtype=np.int32), flat)
    return pa.ListArray.from_arrays(np.arange(0, len(per_view) + 1, num_views, dtype=np.int32), per_view)


def _unnested(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """n lists of lists -> (n views k). Raises ValueError where they are not all of one length."""
    per_image = column.combine_chunks()
    per_view = per_image.flatten()
    for lists in (per_image, per_view):
        lengths = np.unique(lists.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) != 1 or not lengths[0] > 0:
            raise ValueError(
                "a label or a view is missing: every image should have as many views, every view as many values"
            )
    flat = per_view.flatten().to_numpy(zero_copy_only=False)
    shaped: npt.NDArray[Any] = flat.reshape(len(per_image), len(per_view) // len(per_image), -1)
    return shaped


def concatenate(parts: Sequence[LabelledImages]) -> LabelledImages:
    """The rows of several files as one."""
    soft = [part.soft_labels for part in parts if part.soft_labels is not None]
    return LabelledImages(
        ids=[image_id for part in parts for image_id in part.ids],
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        soft_labels=join(soft) if soft else None,
    )


def seal(files: Iterable[tuple[str, bytes]], facts: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Pass the files of a set through, and end with teddy.json, which holds the facts and seals all."""
    sealed = {}
    for name, data in files:
        sealed[name] = {"bytes": len(data), "sha256": sha256(data)}
        yield name, data
    sealed_facts = {**facts, "format": FORMAT, "files": sealed}
    sealed_facts["seal"] = seal_of(sealed_facts)
    yield FACTS, to_json(sealed_facts).encode()


def shard_name(index: int, num: int) -> str:
    """Where the index-th of num Parquet files lies; `datasets` finds the split's name in it."""
    return f"data/train-{index:05d}-of-{num:05d}.parquet"


def seal_of(facts: dict[str, Any]) -> str:
    """The hash of all facts but the seal itself."""
    return sha256(to_json(facts).encode())


def to_png(image: npt.NDArray[np.uint8]) -> bytes:
    """(c h w), of 1 or 3 channels -> a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def from_png(data: bytes) -> npt.NDArray[np.uint8]:
    """A PNG -> (c h w)."""
    array = np.asarray(Image.open(io.BytesIO(data)), dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
