"""Data sets on disk for tests: tiny images as files and in Parquet, and what a source makes of them."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from teddy_ray.errors import InputError
from teddy_ray.recipe import Data
from teddy_ray.sources import open_source

SIZE = 8


def source(path, **fields):
    return open_source(Data(source=str(path), **{"image_size": SIZE, "channels": 1, **fields}))


def problems(path, **fields):
    with pytest.raises(InputError) as caught:
        source(path, **fields)
    return caught.value.problems


def parts(opened):
    return opened.train, opened.validation, opened.test


def everything(path, **fields):
    """id -> pixels (c h w) of all parts."""
    opened = source(path, **fields)
    return {name: pixels for part in parts(opened) for name, pixels in zip(part.ids, part.read(), strict=True)}


def labels_by_id(opened):
    return {
        name: opened.classes[label] for part in parts(opened) for name, label in zip(part.ids, part.labels, strict=True)
    }


def unreadable(path, **fields):
    """The problems of reading all images of a source that opens."""
    opened = source(path, **fields)
    with pytest.raises(InputError) as caught:
        [part.read() for part in parts(opened)]
    return caught.value.problems


def grey(value, size=(SIZE, SIZE)):
    return Image.new("L", size, value)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def save(path, image, form="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, form, **options))


def make_folder(root):
    """Two classes of ten images."""
    for label, name in enumerate(["cat", "dog"]):
        for index in range(10):
            save(root / name / f"{index}.png", grey(100 * label + index))
    return root


def write_parquet(path, labels, *, first=0, struct=False, names=None, row_group_size=None, label_type=None, **columns):
    """Rows of grey images of the values first, first + 1, ..."""
    pngs = [encoded(grey((first + row) % 256)) for row in range(len(labels))]
    images = pa.array(pngs, pa.binary())
    if struct:
        images = pa.array([{"bytes": png, "path": None} for png in pngs])
    table = pa.table({"image": images, "label": pa.array(labels, label_type), **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size, compression="none")
