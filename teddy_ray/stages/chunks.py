"""What a worker of the statistics does: the moments of one chunk of the data at a time."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from teddy_ray.augment import apply_boxes, boxes_of_each
from teddy_ray.device import environment, is_out_of_memory, keep_freed_memory, prepare
from teddy_ray.engine import Machine, check_machine
from teddy_ray.errors import InputError, StageError
from teddy_ray.members import load_members
from teddy_ray.pixels import from_pixels
from teddy_ray.plan import Plan, blocks
from teddy_ray.recipe import Recipe
from teddy_ray.sources import Source
from teddy_ray.sources.loader import Loader
from teddy_ray.stages.board import Poster
from teddy_ray.stages.machine import node_id
from teddy_ray.statistics import Measurer
from teddy_ray.storage import Storage
from teddy_ray.stored_moments import write_chunk


@dataclass(frozen=True)
class Chunk:
    """A stretch of rows of the training data, in its own order.

    The fingerprint covers the environment of the workers too: moments of a chunk that were taken elsewhere, before a
    run was resumed, differ in their low bits.
    """

    rows: range
    fingerprint: str

    @property
    def name(self) -> str:
        return f"rows {self.rows[0]}-{self.rows[-1]}"


class ChunkWorker:
    """Holds the members on its device; takes the moments of one chunk at a time and publishes them.

    Keeps nothing of a chunk: one that is done again counts once.
    """

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        source: ray.ObjectRef[Source],
        machine: Machine,
        kernels: bool,
        poster: Poster,
    ) -> None:
        part, self._plan, self._storage, self._poster = plan.recipe.statistics, plan, storage, poster
        self._device, self._machine, self._kernels = prepare(part.threads, part.gpus_per_worker), machine, kernels
        self._source = source
        keep_freed_memory()

    @cached_property
    def _measurer(self) -> Measurer:
        # made by the first chunk: Ray hides the cause of an error in a constructor
        check_machine(self._device, self._machine, self._plan.recipe.cluster.address)
        models = load_members(self._plan, self._storage, self._plan.members)
        return Measurer(models, self._device, kernels=self._kernels)

    @cached_property
    def _loader(self) -> Loader:
        return Loader(ray.get(self._source).train, max_bytes=0, num_threads=self._plan.recipe.statistics.decoders)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        chunk = Chunk(range(int(batch["start"][0]), int(batch["stop"][0])), str(batch["fingerprint"][0]))
        began, error = time.time(), b""
        try:
            self._measurer, self._loader  # noqa: B018  # loaded before the clock starts
            began = time.time()
            if not self._storage.has("chunk", chunk.fingerprint):  # by a worker that was given up too early
                self._publish(chunk)
        except (InputError, StageError) as own:
            error = pickle.dumps(own)  # in a row, for Ray Data loses the cause of what it wraps on the way
        except Exception:  # noqa: BLE001  # and what is raised counts as a lost worker
            error = pickle.dumps(StageError("statistics", chunk.name, traceback.format_exc()))
        row = {
            "fingerprint": chunk.fingerprint,
            "num_images": len(chunk.rows),
            "began": began,
            "ended": time.time(),
            "error": error,
        }
        return {name: np.array([value], dtype=object) for name, value in row.items()}

    def _publish(self, chunk: Chunk) -> None:
        started, decoded = time.monotonic(), self._loader.num_decoded
        self._poster.begin(chunk.name)
        labels = self._loader.images.labels[chunk.rows.start : chunk.rows.stop]
        classes, rows = (torch.from_numpy(values) for values in np.unique(labels, return_inverse=True))
        try:
            moments, layout = self._measurer.measure(self._batches(chunk, rows.to(self._device)), len(classes))
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                remedy = "out of memory; lower statistics.batch_size, or run fewer workers per node"
                raise StageError("statistics", chunk.name, remedy) from error
            raise
        if len(bad := torch.nonzero(~(moments.mean + moments.m2).isfinite().all(0))):
            member, layer = layout.owner(int(bad[0]))
            item = f"{chunk.name}, member {self._plan.members[member].name}, layer {layer}"
            raise StageError("statistics", item, "its activations are not finite; look at that member's training")
        with self._storage.publish("chunk", chunk.fingerprint) as draft:
            write_chunk(draft, self._plan.class_ranges(), classes, moments)
            draft.facts = {
                "name": chunk.name,
                "layout": layout.members,
                "num_decoded": self._loader.num_decoded - decoded,
                "device": environment(self._device, kernels=self._kernels)["device"],
                "pid": os.getpid(),
                "node": node_id(),
                "seconds": time.monotonic() - started,
            }
        self._poster.done(chunk.name, draft.facts["seconds"])

    def _batches(self, chunk: Chunk, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """On the device, as the members are to see them. labels: of the chunk's rows."""
        started, done = time.monotonic(), 0
        batches = [np.array(rows) for rows in blocks(chunk.rows, self._plan.recipe.statistics.batch_size)]
        for rows, pixels in zip(batches, self._loader.ahead(batches), strict=True):
            ids = [self._loader.images.ids[row] for row in rows]
            yield views_of(self._plan.recipe, ids, from_pixels(pixels, self._device)), labels[done : done + len(rows)]
            done += len(rows)
            self._poster(chunk.name, done / len(chunk.rows), images_per_s=done / (time.monotonic() - started))


def views_of(recipe: Recipe, ids: Sequence[str], images: Tensor) -> Tensor:
    """What is measured of images (n c h w): themselves, or the one view of each that its id draws."""
    if recipe.statistics.view == "plain":
        return images
    keys = (("statistics", recipe.seed, image_id) for image_id in ids)
    return apply_boxes(images, boxes_of_each(recipe.synthesis.augmentation, keys))
