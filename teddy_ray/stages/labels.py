"""Stage 4, on Ray actors: the ensemble's soft label of every view of the stored 8-bit images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from teddy_ray.dataset import LabelledImages, concatenate, decode, encode
from teddy_ray.device import describe, prepare
from teddy_ray.engine import DTYPES, Machine, check_machine, choose_kernels, choose_precision
from teddy_ray.errors import StageError
from teddy_ray.frozen import frozen_copy
from teddy_ray.image_sets import ImageSet, LabelledSet, Shard
from teddy_ray.labels import Stored, ensemble, join, label_views, store
from teddy_ray.members import load_members
from teddy_ray.plan import Plan
from teddy_ray.sources import Source
from teddy_ray.stages.board import Poster
from teddy_ray.stages.crew import work_off
from teddy_ray.stages.images import read_set
from teddy_ray.stages.machine import machine_of, node_id
from teddy_ray.stages.session import Session
from teddy_ray.storage import Storage
from teddy_ray.views import Pixels, Rows, ViewedImages, Views


def run(session: Session) -> None:
    """Label the distilled set."""
    label_sets(session, [session.plan.labelled(session.plan.distilled)], "labels")


def label_sets(session: Session, sets: Sequence[LabelledSet], title: str) -> None:
    """Label the shards that are not there yet, then publish each set's list of shards. title: for the progress."""
    started = time.monotonic()
    plan, storage, part = session.plan, session.storage, session.recipe.labels
    sets_of = {shard: labelled for labelled in sets for shard in plan.shards(labelled)}
    shards = {shard.fingerprint: shard for shard in sets_of}
    for missing in session.claims.turns("shard", lambda: storage.missing("shard", shards)):
        session.start()
        machine = machine_of(part, "labels")
        precision = choose_precision(part.precision, machine.fast_bf16)
        kernels = choose_kernels("labels.kernels", part.kernels, precision, machine)
        work_off(
            session,
            "labels",
            part,
            [shards[fingerprint] for fingerprint in missing],
            at_once=len(missing),
            worker=Labeller,
            settings=(plan, storage, session.source_ref, machine, precision, kernels, session.board.poster("labels")),
            call=lambda worker, shard: worker.label.remote(shard, sets_of[shard]),
            memory_remedy="lower labels.batch_size or labels.images_per_file, or run fewer workers per node",
            title=title,
            what="files to label",
        )
    for labelled in sets:
        if storage.has("labels", labelled.fingerprint):
            continue
        manifests = [storage.open("shard", shard.fingerprint).manifest for shard in plan.shards(labelled)]
        with storage.publish("labels", labelled.fingerprint) as draft:
            draft.facts = {
                "set": labelled.name,
                "shards": [shard.fingerprint for shard in plan.shards(labelled)],
                "mass_kept": float(np.mean([manifest["mass_kept"] for manifest in manifests])),
                "seconds": time.monotonic() - started,
                "worker_seconds": sum(manifest["seconds"] for manifest in manifests),
            }


def read_labelled(storage: Storage, labelled: LabelledSet) -> LabelledImages:
    """A labelled set, read back as it was published."""
    shards = storage.open("labels", labelled.fingerprint).manifest["shards"]
    return concatenate([decode(storage.open("shard", shard).read("rows.parquet"))[0] for shard in shards])


def views_of(plan: Plan, images: ImageSet, *, plain: bool = False, rows: range | None = None) -> Views:
    """How the views of a set, or of some of its rows, are drawn. CutMix needs the whole set."""
    labels, ids = plan.recipe.labels, plan.image_ids
    assert rows is None or len(rows) == len(ids) or plain or labels.cutmix == 0
    return Views(
        seed=plan.recipe.seed,
        set_key=images.fingerprint,
        ids=ids if rows is None else ids[rows.start : rows.stop],
        augmentation=None if plain else labels.augmentation,
        cutmix=0.0 if plain else labels.cutmix,
        formation=images.formation,
    )


class Labeller:
    """Holds the members on its device; labels one shard at a time and publishes it."""

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        source: Source,
        machine: Machine,
        precision: str,
        kernels: bool,
        poster: Poster,
    ) -> None:
        part = plan.recipe.labels
        self._plan, self._storage, self._source, self._poster = plan, storage, source, poster
        self._device = prepare(part.threads, part.gpus_per_worker)
        self._machine, self._precision, self._kernels = machine, precision, kernels
        self._whole: tuple[str, Pixels] = ("", np.empty(0, np.uint8))  # the last set that was read whole

    @cached_property
    def _models(self) -> list[nn.Module]:
        # loaded by the first shard: Ray hides the cause of an error in a constructor
        return label_models(self._plan, self._storage, self._device, DTYPES[self._precision], kernels=self._kernels)

    def label(self, shard: Shard, labelled: LabelledSet) -> None:
        started = time.monotonic()
        if self._storage.has("shard", shard.fingerprint):  # by a worker that was given up too early
            return
        check_machine(self._device, self._machine, self._plan.recipe.cluster.address)
        self._poster.begin(shard.name)
        plan, part = self._plan, self._plan.recipe.labels
        # a CutMix partner may be any image of the set
        read = range(plan.num_images) if part.cutmix > 0 and not labelled.plain else shard.rows
        images = self._images(labelled.images, read)
        viewed = ViewedImages(images, views_of(plan, labelled.images, plain=labelled.plain, rows=read))
        inside = np.arange(shard.rows.start, shard.rows.stop) - read.start
        soft = self._labels(viewed, inside, shard, labelled) if part.mode != "none" else None
        rows = LabelledImages(
            ids=list(plan.image_ids[shard.rows.start : shard.rows.stop]),
            images=images[inside],
            labels=np.array(plan.image_labels(shard.rows), dtype=np.int64),
            soft_labels=soft,
        )
        with self._storage.publish("shard", shard.fingerprint) as draft:
            data, png_bytes = encode(rows, plan.data.classes)
            draft.write("rows.parquet", data)
            draft.facts = {
                "name": shard.name,
                "node": node_id(),
                "png_bytes": png_bytes,
                "mass_kept": soft.mass_kept if soft else 1.0,
                "precision": self._precision,
                "device": describe(self._device),
                "seconds": time.monotonic() - started,
            }
        self._poster.done(shard.name, draft.facts["seconds"])

    def _images(self, images: ImageSet, rows: range) -> Pixels:
        if len(rows) < self._plan.num_images:
            return read_set(self._plan, self._source, self._storage, images, rows)
        if self._whole[0] != images.fingerprint:
            self._whole = (images.fingerprint, read_set(self._plan, self._source, self._storage, images, rows))
        return self._whole[1]

    def _labels(self, viewed: ViewedImages, rows: Rows, shard: Shard, labelled: LabelledSet) -> Stored:
        part = self._plan.recipe.labels
        num_views = 1 if labelled.plain else part.views
        batches = []
        for first in range(0, len(rows), part.batch_size):
            batch = rows[first : first + part.batch_size]

            def label(view: int, batch: Rows = batch) -> Tensor:
                views = viewed.view(batch, view, self._device)
                labels = ensemble(self._models, views, part.temperature, part.ensemble).cpu()
                if not labels.half().isfinite().all():
                    raise StageError("labels", shard.name, self._reason(views))
                return labels

            def report(num_done: int, first: int = first, num: int = len(batch)) -> None:
                share = (first + num * num_done / num_views) / len(rows)
                self._poster(shard.name, share, f"{first} of {len(rows)} images")

            labels = label_views(label, num_views, averaged=part.averaged, on_view=report)
            batches.append(store(labels, part.top_k if part.mode == "top_k" else None))
        return join(batches)

    def _reason(self, views: Tensor) -> str:
        """Why labels of views are not finite numbers of 16 bits."""
        for member, model in zip(self._plan.label_members, self._models, strict=True):
            if not ensemble([model], views, 1.0, "logits").isfinite().all():
                return f"the logits of member {member.name} are not finite; leave it out by labels.members"
        return "logits are too large for 16 bits; set labels.ensemble to probabilities"


def label_models(
    plan: Plan, storage: Storage, device: torch.device, dtype: torch.dtype = torch.float32, *, kernels: bool = False
) -> list[nn.Module]:
    """The members that label, made ready for many passes. dtype, kernels: what they compute in and how."""
    models = load_members(plan, storage, plan.label_members)
    return [frozen_copy(model, dtype, kernels=kernels).to(device) for model in models]
