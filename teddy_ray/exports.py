"""`teddy-ray export`: a published set in the form that other loaders want, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from teddy_ray.dataset import CARD, FACTS, LabelledImages, to_png
from teddy_ray.errors import InputError, Problem
from teddy_ray.formation import Pixels, enlarge
from teddy_ray.published import check_set, set_path
from teddy_ray.storage import Storage

UPLOADS = 16
"""At once; twice as many files are held in memory, which may be large."""


def export(run: str, form: Literal["imagefolder", "parquet"], destination: str) -> str:
    """Write the set of a run, or a published set, to a folder that is empty or not there, and say what was written.

    imagefolder: destination/<class>/<id>.png, as torchvision's ImageFolder and `datasets` read it, without soft labels;
    of a set with `synthesis.formation`, one for each image within an image.
    parquet: the set as it was published. run, destination: paths or URIs. Raises InputError where something is wrong
    with either, after every check of the set that `teddy-ray check` makes.
    """
    path = set_path(run)
    target = Storage(destination)
    if target.is_file("") or (target.is_folder("") and not target.is_empty("")):
        raise InputError([Problem("DEST", destination, "should be a folder that is empty or not there yet")])
    parts: list[LabelledImages] = []
    facts = check_set(path, parts.append if form == "imagefolder" else lambda rows: None)
    if form == "parquet":
        names = [*facts["files"], *([CARD] if Storage(path).is_file(CARD) else []), FACTS]
        _write(target, ((name, Storage(path).read(name)) for name in names))
        return f"{destination}: the set as it was published, {len(names)} files"
    classes, formation = facts["classes"], facts["views"]["formation"]
    bad = [name for name in classes if "/" in name or "\0" in name or name in ("", ".", "..")]
    if bad:
        remedy = "these class names cannot name folders; export it with --format parquet"
        raise InputError([Problem("--format", "imagefolder", f"{remedy}: {', '.join(map(repr, bad[:10]))}")])
    _write(target, _image_files(parts, classes, formation))
    order = "" if sorted(classes) == classes else "; ImageFolder sorts classes, so its indices are not those of the set"
    num = sum(len(part.ids) for part in parts)
    held = f", the {formation**2} that each image holds enlarged" if formation > 1 else ""
    return f"{destination}: {num * formation**2} images{held}, without soft labels{order}"


def _image_files(parts: Iterable[LabelledImages], classes: list[str], formation: int) -> Iterator[tuple[str, bytes]]:
    for part in parts:
        for image_id, image, label in zip(part.ids, part.images, part.labels, strict=True):
            for name, whole in _wholes(image_id, image, formation):
                yield f"{classes[label]}/{name}.png", to_png(whole)


def _wholes(image_id: str, image: Pixels, formation: int) -> Iterator[tuple[str, Pixels]]:
    """The images that a stored one holds, enlarged and rounded, and their names."""
    x = torch.from_numpy(image)[None].float()
    for index in range(formation**2):
        name = f"{image_id}-{index}" if formation > 1 else image_id
        yield name, enlarge(x, formation, index)[0].round().byte().numpy()


def _upload(target: Storage, files: Iterator[tuple[str, bytes]]) -> None:
    waiting: deque[Future[None]] = deque()
    last = next(files)
    with ThreadPoolExecutor(UPLOADS) as threads:  # each write waits for the store
        for file in files:
            waiting.append(threads.submit(target.write, *last))
            last = file
            if len(waiting) == 2 * UPLOADS:
                waiting.popleft().result()
        for upload in waiting:
            upload.result()
    target.write(*last)


def _write(target: Storage, files: Iterable[tuple[str, bytes]]) -> None:
    """Locally the folder appears when it is whole; elsewhere file by file, the last one last."""
    if not target.is_local:
        _upload(target, iter(files))
        return
    folder = Path(target.root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, data in files:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(data)
        draft.chmod(0o755)  # mkdtemp's folders are private
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
