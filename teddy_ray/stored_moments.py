"""Moments on the storage, by class range: who needs few of many classes reads those alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from teddy_ray.moments import Moments
from teddy_ray.plan import CLASSES_PER_FILE, ClassRange, Plan
from teddy_ray.statistics import Layout
from teddy_ray.storage import Artifact, Draft, Storage

FIELDS = ("count", "mean", "m2")
FILE, POOLED = "moments.safetensors", "pooled.safetensors"
RANGES_KEPT = 4
"""Class ranges that a reader keeps, or as many as it was asked for at once."""


def to_tensors(moments: Moments) -> dict[str, Tensor]:
    """For a file."""
    return {field: getattr(moments, field) for field in FIELDS}


def to_moments(tensors: Mapping[str, Tensor]) -> Moments:
    """From the tensors of a file."""
    return Moments(*(tensors[field] for field in FIELDS))


def write_chunk(draft: Draft, ranges: Iterable[ClassRange], classes: Tensor, moments: Moments) -> None:
    """The moments of a part of the data, a file for each class range that occurs in it.

    classes: (rows,) in rising order, of the rows of moments.
    """
    for part in ranges:
        bounds = torch.tensor([part.classes.start, part.classes.stop])
        first, stop = torch.searchsorted(classes, bounds).tolist()
        if first < stop:
            own = slice(first, stop)
            draft.write_tensors(_file(part), {"classes": classes[own], **to_tensors(moments.rows(own))})


def merge_chunks(storage: Storage, chunks: Sequence[str], ranges: Iterable[ClassRange]) -> None:
    """Merge chunks in the order given, for some class ranges one after another, and publish those.

    chunks: fingerprints of artifacts that `write_chunk` filled, whose manifests hold their layout.
    """
    artifacts = [storage.open("chunk", chunk) for chunk in chunks]
    num_channels = Layout.from_json(artifacts[0].manifest["layout"]).num_channels
    for part in ranges:
        total = Moments.zeros(len(part.classes), num_channels)
        for artifact in artifacts:
            if _file(part) in artifact.manifest["files"]:
                tensors = artifact.tensors(_file(part))
                total.add(tensors["classes"] - part.classes.start, to_moments(tensors))
        with storage.publish("moments", part.fingerprint) as draft:
            draft.write_tensors(FILE, to_tensors(total))
            draft.write_tensors(POOLED, to_tensors(total.pooled()))


def pool_classes(storage: Storage, ranges: Iterable[ClassRange]) -> Moments:
    """All classes as one: merges what each range came to, in their order."""
    files = (storage.open("moments", part.fingerprint).tensors(POOLED) for part in ranges)
    return reduce(Moments.merge, map(to_moments, files))


def _file(part: ClassRange) -> str:
    return f"classes-{part.classes.start:05d}.safetensors"


class MomentsReader:
    """Reads what the statistics stage published, and keeps the class ranges that it read last."""

    def __init__(self, plan: Plan, storage: Storage) -> None:
        self._storage, self._fingerprint, self._ranges = storage, plan.statistics, plan.class_ranges()
        self._kept: dict[ClassRange, Moments] = {}  # latest last

    @cached_property
    def pooled(self) -> list[dict[str, Moments]]:
        """For each member, by layer, the moments of all data in one row."""
        return self._layout.by_layer(to_moments(self._statistics.tensors(POOLED)))

    def of(self, classes: range) -> list[dict[str, Moments]]:
        """For each member, by layer, the moments of neighbouring classes, one row each."""
        first, stop = classes.start // CLASSES_PER_FILE, -(-classes.stop // CLASSES_PER_FILE)
        parts = [self._read(part) for part in self._ranges[first:stop]]
        for part in list(self._kept)[: -max(RANGES_KEPT, len(parts))]:
            del self._kept[part]
        together = Moments(*(torch.cat([getattr(part, field) for part in parts]) for field in FIELDS))
        offset = first * CLASSES_PER_FILE
        return self._layout.by_layer(together.rows(slice(classes.start - offset, classes.stop - offset)))

    def _read(self, part: ClassRange) -> Moments:
        moments = self._kept.pop(part, None)
        if moments is None:
            moments = to_moments(self._storage.open("moments", part.fingerprint).tensors(FILE))
        self._kept[part] = moments
        return moments

    @cached_property
    def _statistics(self) -> Artifact:
        return self._storage.open("statistics", self._fingerprint)

    @cached_property
    def _layout(self) -> Layout:
        return Layout.from_json(self._statistics.manifest["layout"])
