"""The figures of a finished run, read from its artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from teddy_ray.members import WEIGHTS
from teddy_ray.plan import Plan
from teddy_ray.records import Row, Score, tabulate
from teddy_ray.scores import scores
from teddy_ray.storage import Storage
from teddy_ray.work import flops_of_stages

RECIPE, SUMMARY, REPORT = "recipe.yaml", "summary.json", "report.html"
"""What runs/<name>/ holds."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What summary.json holds. Accuracies are fractions; seconds are wall time of the session that did the work,
    worker_seconds the sum over its workers; flops are the operations of that work, as `work.flops_of_stages` counts,
    none where a model cannot be counted.

    bytes: images as PNG and as raw pixels, labels before compression, stored: the Parquet files, members: the weights
    that are published where no labels are. labels: their form; mass_kept is the share of them that is stored.
    """

    name: str
    accuracy: Mapping[str, Row]
    improvement_over_random: float | None
    scores: Mapping[str, float | None]
    stages: Mapping[str, Mapping[str, Any]]
    images: int
    images_per_class: int
    num_classes: int
    num_test: int
    num_train: int
    skipped_images: int
    bytes: Mapping[str, int]
    labels: Mapping[str, Any]
    synthesis: Mapping[str, float]
    flops: Mapping[str, float]
    generation: Mapping[str, str]
    pool: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(plan: Plan, storage: Storage, *, reused: Sequence[str]) -> Summary:
    """Collect the figures of a run whose stages are all published."""
    manifests = {stage: storage.open(stage, fingerprint).manifest for stage, fingerprint in plan.stages().items()}
    rows = tabulate(Score(**score) for score in manifests["evaluation"]["scores"])
    distilled, random = rows["distilled"], rows.get("random_soft")
    data, labels, synthesis = plan.recipe.data, plan.recipe.labels, manifests["synthesis"]
    stored = [storage.open("shard", shard.fingerprint).manifest for shard in plan.shards(plan.labelled(plan.distilled))]
    return Summary(
        name=plan.recipe.name,
        accuracy=rows,
        improvement_over_random=distilled.mean - random.mean if random else None,
        scores=scores(rows),
        stages={
            stage: {
                "seconds": manifest["seconds"],
                "worker_seconds": manifest["worker_seconds"],
                "reused": stage in reused,
                "fingerprint": manifest["fingerprint"],
            }
            for stage, manifest in manifests.items()
        },
        images=plan.num_images,
        images_per_class=plan.recipe.synthesis.images_per_class,
        num_classes=len(plan.data.classes),
        num_test=plan.data.num_test,
        num_train=sum(plan.data.counts),
        skipped_images=plan.data.num_skipped,
        bytes={
            "images": sum(manifest["png_bytes"] for manifest in stored),
            "images_raw": plan.num_images * data.channels * data.image_size**2,
            "labels": plan.label_bytes,
            "stored": sum(file["bytes"] for manifest in stored for file in manifest["files"].values()),
            "members": member_bytes(plan, storage) if labels.mode == "none" else 0,
        },
        labels={
            "mode": labels.mode,
            "views": labels.views if labels.mode != "none" else None,
            "averaged": labels.averaged,
            "members": len(plan.label_members),
            "mass_kept": manifests["labels"]["mass_kept"],
        },
        synthesis={"images_steps_per_s": synthesis["images_steps_per_s"], "units": plan.num_units},
        flops=_flops(plan),
        generation={"chosen": plan.pool_plan.generation, "reason": plan.pool_plan.generation_reason},
        pool=manifests["pool"]["members"],
        versions=synthesis["versions"],
        device=synthesis["device"],
    )


def _flops(plan: Plan) -> dict[str, float]:
    """Empty where a model cannot be counted: its run, which is over, does not fail for that."""
    try:
        return dict(flops_of_stages(plan))
    except Exception:  # noqa: BLE001  # a model of the user's, under PyTorch's counter
        return {}


def member_bytes(plan: Plan, storage: Storage) -> int:
    """Bytes of the weights of the members that label."""
    manifests = (storage.open("member", member.fingerprint).manifest for member in plan.label_members)
    return sum(manifest["files"][WEIGHTS]["bytes"] for manifest in manifests)


def read_summary(storage: Storage, name: str) -> dict[str, Any] | None:
    """The summary of the latest run of that name, if there is one with every figure that this version writes."""
    path = f"runs/{name}/{SUMMARY}"
    if not storage.is_file(path):
        return None
    try:
        found = dict(json.loads(storage.read(path)))
    except (ValueError, TypeError):
        return None
    return found if found.keys() >= {field.name for field in fields(Summary)} else None
