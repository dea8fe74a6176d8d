"""Stage 4, on Ray actors: the ensemble's soft label of every view of the stored 8-bit images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import ray
from torch import nn

from teddy_ray.dataset import LabelledImages, concatenate, decode, encode
from teddy_ray.device import prepare
from teddy_ray.labels import Views, label_views
from teddy_ray.members import load_members
from teddy_ray.pixels import from_pixels
from teddy_ray.plan import ImageSet, Plan, Shard
from teddy_ray.sources import Source
from teddy_ray.stages.board import Poster
from teddy_ray.stages.dispatch import Dispatcher
from teddy_ray.stages.executor import RayExecutor
from teddy_ray.stages.images import read_set
from teddy_ray.stages.session import Session
from teddy_ray.storage import Storage


def run(session: Session) -> None:
    """Label the distilled set."""
    label_sets(session, [session.plan.distilled], "labels")


def label_sets(session: Session, sets: Sequence[ImageSet], title: str) -> None:
    """Label the shards that are not there yet, then publish each set's list of shards. title: for the progress."""
    started = time.monotonic()
    plan, storage, part = session.plan, session.storage, session.recipe.labels
    shards = {shard: images for images in sets for shard in plan.shards(images)}
    missing = [shard for shard in shards if not storage.has("shard", shard.fingerprint)]
    if missing:
        session.start()
        settings = (plan, storage, session.source_ref, session.board.poster())
        actor = ray.remote(num_cpus=part.threads, num_gpus=part.gpus_per_worker)(Labeller)
        dispatcher = Dispatcher[Shard](
            "labels",
            RayExecutor(
                lambda: actor.remote(*settings), lambda worker, shard: worker.label.remote(shard, shards[shard])
            ),
            num_workers=session.workers(part, at_most=len(missing)),
            memory_remedy="lower labels.batch_size or labels.images_per_file, or run fewer workers per node",
        )
        with session.progress.stage(title, len(missing), "files to label") as bar:
            for _ in dispatcher.run(missing, session.board.shown_on(bar)):
                pass
    for images in sets:
        manifests = [storage.open("shard", shard.fingerprint).manifest for shard in plan.shards(images)]
        with storage.publish("labels", images.labelled) as draft:
            draft.facts = {
                "set": images.name,
                "shards": [shard.fingerprint for shard in plan.shards(images)],
                "seconds": time.monotonic() - started,
                "worker_seconds": sum(manifest["seconds"] for manifest in manifests),
            }


def read_labelled(storage: Storage, images: ImageSet) -> LabelledImages:
    """A labelled set, read back as it was published."""
    shards = storage.open("labels", images.labelled).manifest["shards"]
    return concatenate([decode(storage.open("shard", shard).read("rows.parquet"))[0] for shard in shards])


def views_of(plan: Plan, images: ImageSet) -> Views:
    """How the views of a set are drawn."""
    labels = plan.recipe.labels
    return Views(
        seed=plan.recipe.seed, set_key=images.fingerprint, augmentation=labels.augmentation, num_views=labels.views
    )


class Labeller:
    """Holds the members on its device; labels one shard at a time and publishes it."""

    def __init__(self, plan: Plan, storage: Storage, source: Source, poster: Poster) -> None:
        part = plan.recipe.labels
        self._plan, self._storage, self._source, self._poster = plan, storage, source, poster
        self._device = prepare(part.threads, part.gpus_per_worker)

    @cached_property
    def _models(self) -> list[nn.Module]:
        # loaded by the first shard: Ray hides the cause of an error in a constructor
        return [model.to(self._device) for model in load_members(self._plan, self._storage, self._plan.members)]

    def label(self, shard: Shard, images: ImageSet) -> None:
        started = time.monotonic()
        plan, part = self._plan, self._plan.recipe.labels
        views = views_of(plan, images)
        pixels = read_set(plan, self._source, self._storage, images, shard.rows)
        soft = []
        for first in range(shard.rows.start, shard.rows.stop, part.batch_size):
            rows = range(first, min(first + part.batch_size, shard.rows.stop))
            x = from_pixels(pixels[first - shard.rows.start :][: len(rows)], self._device)
            done = first - shard.rows.start

            def report(num_views: int, done: int = done, num: int = len(rows)) -> None:
                share = (done + num * num_views / part.views) / len(shard.rows)
                self._poster(shard.name, share, f"{done} of {len(shard.rows)} images")

            boxes = views.boxes(plan.image_ids(rows))
            soft.append(label_views(self._models, x, boxes, part.temperature, report))
        rows = shard.rows
        labelled = LabelledImages(
            ids=plan.image_ids(rows),
            images=pixels,
            labels=np.array(plan.image_labels(rows), dtype=np.int64),
            soft_labels=np.concatenate(soft),
        )
        with self._storage.publish("shard", shard.fingerprint) as draft:
            data, png_bytes = encode(labelled, plan.data.classes)
            draft.write("rows.parquet", data)
            draft.facts = {"name": shard.name, "png_bytes": png_bytes, "seconds": time.monotonic() - started}
