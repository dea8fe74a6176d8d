"""A published set: whether every byte, count, class name, pixel and label is as it was published."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from teddy_ray.dataset import CARD, DISTILLED, FACTS, FORMAT, LabelledImages, decode, seal_of
from teddy_ray.errors import InputError, Problem
from teddy_ray.labels import Dense, TopK
from teddy_ray.storage import Storage, sha256, to_json
from teddy_ray.stores import join

FILE = re.compile(r"data/train-\d{5}-of-\d{5}\.parquet|members/\d{5}\.safetensors")
IMAGE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESTORE = "restore the file as it was published"


def check_set(path: str, keep: Callable[[LabelledImages], None] = lambda rows: None) -> dict[str, Any]:
    """Check the published set, or that of the run, at a path or URI; return its facts, the content of teddy.json.

    keep: given the rows of each sound file, in order. Raises InputError with every problem found.
    """
    folder = Storage(set_path(path))
    facts = _read_facts(folder)
    rows = _Rows(folder, facts, keep)
    problems = [problem for name, sealed in facts["files"].items() for problem in _check_file(rows, name, sealed)]
    for name in folder.files("data"):
        if name not in facts["files"]:
            remedy = "remove it: loaders would read it as data"
            problems.append(Problem(folder.display(name), "a file that was not published", remedy))
    if problems := problems or rows.check_whole():
        raise InputError(problems)
    return facts


def set_path(path: str) -> str:
    """The set at a path or URI, or that of the run there."""
    inside = join(path, DISTILLED)
    return inside if Storage(path).is_file(f"{DISTILLED}/{FACTS}") else path


def card_is_published(path: str, facts: dict[str, Any]) -> bool:
    """Whether the card is the one that was published. It is not sealed, for cards are edited."""
    folder = Storage(set_path(path))
    return folder.is_file(CARD) and sha256(folder.read(CARD)) == facts["card"]


def _read_facts(folder: Storage) -> dict[str, Any]:
    if not folder.is_file(FACTS):
        raise InputError([Problem("PATH", folder.uri, f"should be a distilled data set, a folder with {FACTS} in it")])
    path = folder.display(FACTS)
    try:
        text = folder.read(FACTS).decode()
        facts = json.loads(text)
        whole = to_json(facts) == text and facts["seal"] == seal_of({k: facts[k] for k in facts if k != "seal"})
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError([Problem(path, "content that does not match its own seal", RESTORE)])
    if strange := [name for name in facts["files"] if not FILE.fullmatch(name)]:
        raise InputError([Problem(path, strange[:10], "names files that no set has; do not trust this one")])
    if facts["format"] != FORMAT:
        remedy = f"this version of teddy_ray reads format {FORMAT}; publish the set again with it"
        raise InputError([Problem(path, f"format {facts['format']}", remedy)])
    return dict(facts)


def _check_file(rows: _Rows, name: str, sealed: dict[str, Any]) -> list[Problem]:
    path = rows.folder.display(name)
    if not rows.folder.is_file(name):
        return [Problem(path, None, "this file is missing; restore it")]
    data = rows.folder.read(name)
    if (found := sha256(data)) != sealed["sha256"]:
        size = f"{len(data)} bytes" if len(data) != sealed["bytes"] else "the published size"
        remedy = f"the hash should be {sealed['sha256'][:16]}... of {sealed['bytes']} bytes; restore the file"
        return [Problem(path, f"sha256 {found[:16]}..., {size}", remedy)]
    return rows.check(name, data) if name.endswith(".parquet") else []


class _Rows:
    """The rows of a set, file by file."""

    def __init__(self, folder: Storage, facts: dict[str, Any], keep: Callable[[LabelledImages], None]) -> None:
        self.folder, self._facts, self._keep = folder, facts, keep
        self._ids: list[str] = []
        self._counts = np.zeros(len(facts["classes"]), dtype=int)

    def check(self, name: str, data: bytes) -> list[Problem]:
        """What is wrong with the rows of a file whose bytes are right."""
        path, facts = self.folder.display(name), self._facts
        try:
            rows, classes = decode(data)
        except ValueError as error:  # pyarrow's errors are of this kind too
            return [Problem(path, str(error).splitlines()[0], RESTORE)]
        self._ids += rows.ids
        known = (rows.labels >= 0) & (rows.labels < len(self._counts))
        self._counts += np.bincount(rows.labels[known], minlength=len(self._counts))
        findings = {
            "ids that are no names of images": ([x for x in rows.ids if not IMAGE_ID.fullmatch(x)][:10], []),
            "class names": (list(classes), facts["classes"]),
            "labels outside the classes": (int((~known).sum()), 0),
            "shape of an image": (rows.images.shape[1:], (facts["channels"], facts["image_size"], facts["image_size"])),
            **_label_findings(rows, facts["labels"], len(facts["classes"])),
        }
        problems = [
            Problem(f"{path}, {what}", found, f"should be {right!r}")
            for what, (found, right) in findings.items()
            if found != right
        ]
        if not problems:
            self._keep(rows)
        return problems

    def check_whole(self) -> list[Problem]:
        """What is wrong with the files taken together."""
        problems, where = [], self.folder.uri
        if (num_twice := len(self._ids) - len(set(self._ids))) > 0:
            problems.append(Problem(where, f"{num_twice} image ids twice", "each id should stand once"))
        per_class = self._facts["images_per_class"]
        if set(self._counts) != {per_class}:
            remedy = f"should hold {per_class} images of each class"
            problems.append(Problem(where, self._counts.tolist(), remedy))
        return problems


def _label_findings(rows: LabelledImages, facts: dict[str, Any], num_classes: int) -> dict[str, tuple[Any, Any]]:
    """What was found and what is right, of the soft labels."""
    soft = rows.soft_labels
    form = {Dense: "fp16", TopK: "top_k", type(None): "none"}[type(soft)]
    findings: dict[str, tuple[Any, Any]] = {"form of the soft labels": (form, facts["mode"])}
    if soft is None or form != facts["mode"]:
        return findings
    findings["views per image"] = (soft.num_views, facts["num_views"])
    if isinstance(soft, Dense):
        findings["classes per soft label"] = (soft.num_classes, num_classes)
        if facts["ensemble"] == "logits":
            findings["soft labels that are not finite"] = (int((~np.isfinite(soft.values)).sum()), 0)
            return findings
        short = False
    else:
        findings["classes per soft label"] = (soft.values.shape[2], facts["top_k"])
        ordered = np.sort(soft.classes.astype(np.int64), 2)
        unknown = (ordered[..., -1] >= num_classes) | (np.diff(ordered, axis=2) == 0).any(2)
        findings["soft labels of unknown or repeated classes"] = (int(unknown.sum()), 0)
        short = True  # the rest of 1 belongs to the classes left out
    values = soft.values.astype(np.float64)
    sums = values.sum(2)
    right = (sums < 1.01) & (sums > 0) if short else np.abs(sums - 1) < 0.01
    findings["soft labels outside [0, 1]"] = (int(((values < 0) | (values > 1)).sum()), 0)
    findings["soft labels that do not sum to 1 within 1 %"] = (int((~right).sum()), 0)
    return findings
