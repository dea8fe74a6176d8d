"""The form in which a labelled set is stored and published: Hugging Face Parquet, and how it is checked.

A set is a folder: data/train-*.parquet with columns id, image (PNG), label (ClassLabel) and soft_label
(views x classes, float16), a card README.md, and teddy.json with what made it and the hash of every file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from teddy_ray.errors import InputError, Problem
from teddy_ray.storage import sha256, to_json

FORMAT = 1
FACTS = "teddy.json"


@dataclass(frozen=True)
class LabelledImages:
    """Rows of a labelled set. images: (n c h w) uint8; labels: (n,); soft_labels: (n views classes) float16."""

    ids: Sequence[str]
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    soft_labels: npt.NDArray[np.float16]


def encode(rows: LabelledImages, classes: Sequence[str]) -> tuple[bytes, int]:
    """One Parquet file, and how many of its bytes are PNGs. Equal rows give equal bytes."""
    pngs = [_to_png(image) for image in rows.images]
    _, num_views, num_classes = rows.soft_labels.shape
    values = pa.array(rows.soft_labels.reshape(-1), pa.float16())
    per_view = pa.ListArray.from_arrays(np.arange(0, len(values) + 1, num_classes, dtype=np.int32), values)
    per_image = pa.ListArray.from_arrays(np.arange(0, len(per_view) + 1, num_views, dtype=np.int32), per_view)
    table = pa.table(
        {
            "id": pa.array(rows.ids, pa.string()),
            "image": pa.array(
                [{"bytes": png, "path": f"{image_id}.png"} for png, image_id in zip(pngs, rows.ids, strict=True)],
                pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            ),
            "label": pa.array(rows.labels, pa.int64()),
            "soft_label": per_image,
        }
    )
    features = {
        "id": {"dtype": "string", "_type": "Value"},
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
        "soft_label": {
            "feature": {"feature": {"dtype": "float16", "_type": "Value"}, "_type": "Sequence"},
            "_type": "Sequence",
        },
    }
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue(), sum(len(png) for png in pngs)


def decode(data: bytes) -> tuple[LabelledImages, tuple[str, ...]]:
    """The rows of one Parquet file and the class names. Raises ValueError where it is not of this form."""
    table = pq.read_table(io.BytesIO(data))
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    classes = metadata.get("info", {}).get("features", {}).get("label", {}).get("names")
    if classes is None or set(table.column_names) != {"id", "image", "label", "soft_label"}:
        raise ValueError("should have the columns id, image, label, soft_label and the class names in its metadata")
    images = np.stack([_from_png(value["bytes"]) for value in table.column("image").to_pylist()])
    soft = table.column("soft_label").combine_chunks()
    flat = soft.values.values.to_numpy(zero_copy_only=False).astype(np.float16)
    num_views = len(soft.values) // len(soft)
    rows = LabelledImages(
        ids=table.column("id").to_pylist(),
        images=images,
        labels=table.column("label").to_numpy(),
        soft_labels=flat.reshape(len(soft), num_views, -1),
    )
    return rows, tuple(classes)


def concatenate(parts: Sequence[LabelledImages]) -> LabelledImages:
    """The rows of several files as one."""
    return LabelledImages(
        ids=[image_id for part in parts for image_id in part.ids],
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        soft_labels=np.concatenate([part.soft_labels for part in parts]),
    )


def seal(files: Iterable[tuple[str, bytes]], facts: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Pass the files of a set through, and end with teddy.json, which holds the facts and seals all."""
    sealed = {}
    for name, data in files:
        sealed[name] = {"bytes": len(data), "sha256": sha256(data)}
        yield name, data
    sealed_facts = {**facts, "format": FORMAT, "files": sealed}
    sealed_facts["seal"] = _hash(sealed_facts)
    yield FACTS, to_json(sealed_facts).encode()


def shard_name(index: int, num: int) -> str:
    """Where the index-th of num Parquet files lies; `datasets` finds the split's name in it."""
    return f"data/train-{index:05d}-of-{num:05d}.parquet"


def check_folder(folder: Path) -> dict[str, Any]:
    """Check a published set: every byte, the counts, the class names, the pixels, the labels. Returns its facts.

    Raises InputError with every problem found.
    """
    facts = _read_facts(folder)
    problems = []
    for name, sealed in facts["files"].items():
        problems += _check_bytes(folder / name, sealed)
    for path in sorted(folder.glob("data/*")):
        if path.relative_to(folder).as_posix() not in facts["files"]:
            problems.append(
                Problem(str(path), "a file that was not published", "remove it: loaders would read it as data")
            )
    if not problems:
        problems = _check_rows(folder, facts)
    if problems:
        raise InputError(problems)
    return facts


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    if not path.is_file():
        raise InputError([Problem("PATH", str(folder), f"should be a distilled data set, a folder with {FACTS} in it")])
    try:
        text = path.read_bytes().decode()
        facts = json.loads(text)
        whole = to_json(facts) == text and facts["seal"] == _hash({key: facts[key] for key in facts if key != "seal"})
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(
            [Problem(str(path), "content that does not match its own seal", "restore the file as it was published")]
        )
    return dict(facts)


def _check_bytes(path: Path, sealed: dict[str, Any]) -> list[Problem]:
    if not path.is_file():
        return [Problem(str(path), None, "this file is missing; restore it")]
    data = path.read_bytes()
    if (found := sha256(data)) != sealed["sha256"]:
        size = f"{len(data)} bytes" if len(data) != sealed["bytes"] else "the published size"
        return [
            Problem(
                str(path),
                f"sha256 {found[:16]}..., {size}",
                f"the hash should be {sealed['sha256'][:16]}...; restore the file",
            )
        ]
    return []


def _check_rows(folder: Path, facts: dict[str, Any]) -> list[Problem]:
    problems = []
    ids: list[str] = []
    counts = np.zeros(len(facts["classes"]), dtype=int)
    for name in (name for name in facts["files"] if name.endswith(".parquet")):
        try:
            rows, classes = decode((folder / name).read_bytes())
        except ValueError as error:  # pyarrow's errors are of this kind too
            problems.append(
                Problem(str(folder / name), str(error).splitlines()[0], "restore the file as it was published")
            )
            continue
        ids += rows.ids
        known = (rows.labels >= 0) & (rows.labels < len(counts))
        counts += np.bincount(rows.labels[known], minlength=len(counts))
        expected = (facts["channels"], facts["image_size"], facts["image_size"])
        sums = rows.soft_labels.astype(np.float64).sum(2)
        findings = {
            "class names": (list(classes), facts["classes"]),
            "labels outside the classes": (int((~known).sum()), 0),
            "shape of an image": (rows.images.shape[1:], expected),
            "views per image": (rows.soft_labels.shape[1], facts["views"]["num_views"]),
            "soft labels outside [0, 1]": (int(((rows.soft_labels < 0) | (rows.soft_labels > 1)).sum()), 0),
            "soft labels that do not sum to 1 within 1 %": (int((~(np.abs(sums - 1) < 0.01)).sum()), 0),
        }
        problems += [
            Problem(f"{folder / name}, {what}", found, f"should be {right!r}")
            for what, (found, right) in findings.items()
            if found != right
        ]
    if len(set(ids)) < len(ids):
        problems.append(
            Problem(str(folder), f"{len(ids) - len(set(ids))} image ids twice", "each id should stand once")
        )
    if set(counts) != {facts["images_per_class"]}:
        problems.append(
            Problem(str(folder), counts.tolist(), f"should hold {facts['images_per_class']} images of each class")
        )
    return problems


def _hash(facts: dict[str, Any]) -> str:
    return sha256(to_json(facts).encode())


def _to_png(image: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _from_png(data: bytes) -> npt.NDArray[np.uint8]:
    array = np.asarray(Image.open(io.BytesIO(data)), dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
