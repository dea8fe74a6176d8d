"""report.html: one file that works offline, with the images, the accuracies, the losses and the cost of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from teddy_ray.gallery import LOSSLESS_SIDE, MAX_SIDE, ShownClass, gallery
from teddy_ray.plan import Plan
from teddy_ray.plots import Chart, by_student, dots, losses, over_steps
from teddy_ray.recipe_file import dump_recipe
from teddy_ray.sources import Source
from teddy_ray.storage import Storage
from teddy_ray.summary import Summary
from teddy_ray.tables import images_of, title, verdict

MAX_CURVES = 40

SCORES = {
    "ior": ("IOR", "improvement over random: accuracy of distilled − of random real images, under the same labels"),
    "hlr": (
        "HLR",
        "hard-label recovery: accuracy of the whole training set − of distilled, hard labels; less is better",
    ),
    "lrs": (
        "LRS",
        "label-robust score: (exp(a) − 1/e) / (e − 1/e) of a = (IOR − HLR) / 2; 0.269 where a = 0",
    ),
    "ars": ("ARS", "augmentation-robust score: the same of a = the mean of IOR with and without augmentation"),
}
"""Short name and definition, which are those of DD-Ranking."""

DIFFERENCES = ("ior", "hlr")
"""Scores that may be below 0."""


def write_report(plan: Plan, source: Source, storage: Storage, summary: Summary) -> str:
    """The page."""
    return render(
        plan,
        summary,
        shown=gallery(plan, source, storage),
        loss_charts=_loss_charts(plan, storage),
        stage_bytes=_stage_bytes(plan, storage),
    )


def render(
    plan: Plan,
    summary: Summary,
    *,
    shown: Sequence[ShownClass],
    loss_charts: Sequence[Chart],
    stage_bytes: Mapping[str, int],
) -> str:
    """The page, of what was read for it."""
    environment = Environment(
        loader=PackageLoader("teddy_ray"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(title=title, images_of=images_of, size=size)
    students = by_student(summary.accuracy)
    side = plan.recipe.data.image_size
    return environment.get_template("report.html").render(
        plan=plan,
        summary=summary,
        verdict=verdict(summary),
        gallery=shown,
        scaled_to=min(side, MAX_SIDE) if side > LOSSLESS_SIDE else None,
        students=students,
        dots=dots(students),
        step_charts=over_steps(students),
        loss_charts=loss_charts,
        max_curves=MAX_CURVES,
        scores=_scores(summary),
        stage_bytes=stage_bytes,
        set_bytes=list(_set_bytes(plan, summary)),
        recipe=dump_recipe(plan.recipe),
    )


def _loss_charts(plan: Plan, storage: Storage) -> list[Chart]:
    units = list(islice(plan.units(), MAX_CURVES))
    manifests = [storage.open("unit", unit.fingerprint).manifest for unit in units]
    return losses([unit.name for unit in units], [np.array(manifest["losses"]) for manifest in manifests])


def _stage_bytes(plan: Plan, storage: Storage) -> dict[str, int]:
    """What each stage has published, in bytes as stored."""
    sizes: dict[str, Mapping[str, int]] = {}
    totals = {}
    for stage, artifacts in _artifacts(plan):
        totals[stage] = 0
        for kind, fingerprint in artifacts:
            if kind not in sizes:
                sizes[kind] = storage.sizes(kind)
            totals[stage] += sizes[kind].get(fingerprint, 0)
    return totals


def _artifacts(plan: Plan) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each stage with its artifacts: (kind, fingerprint)."""
    controls = [shard for labelled in plan.labelled_controls for shard in plan.shards(labelled)]
    yield "pool", [("member", member.fingerprint) for member in plan.members]
    yield "statistics", [("moments", part.fingerprint) for part in plan.class_ranges()]
    yield "synthesis", [("unit", unit.fingerprint) for unit in plan.units()]
    yield "labels", [("shard", shard.fingerprint) for shard in plan.shards(plan.labelled(plan.distilled))]
    yield "evaluation", [("shard", shard.fingerprint) for shard in controls]


def _scores(summary: Summary) -> list[tuple[str, str, str]]:
    """(name, value, what it is) of the scores whose controls were run."""
    shown = []
    for name, value in summary.scores.items():
        if value is not None:
            short, meaning = SCORES[name]
            shown.append((short, f"{value:+.4f}" if name in DIFFERENCES else f"{value:.4f}", meaning))
    return shown


def _set_bytes(plan: Plan, summary: Summary) -> Iterator[tuple[str, int]]:
    """What the distilled set is made of, and its bytes."""
    sizes, labels = summary.bytes, summary.labels
    yield "images as PNG", sizes["images"]
    yield "images as raw pixels", sizes["images_raw"]
    if labels["mode"] == "fp16":
        yield "soft labels, every class in float16", sizes["labels"]
    elif labels["mode"] == "top_k":
        kept = f"which hold {labels['mass_kept']:.4f} of the probability in the mean"
        yield f"soft labels, the {plan.recipe.labels.top_k} largest of each in float16, {kept}", sizes["labels"]
    yield "Parquet files as stored", sizes["stored"]
    if sizes["members"]:
        yield f"weights of the {labels['members']} model(s) that label, for no soft labels are stored", sizes["members"]


def size(num_bytes: float) -> str:
    """Bytes as a person reads them, such as 45.3 kB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
