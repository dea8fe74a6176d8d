"""What a recipe may not say at the same time, though each key by itself is right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from teddy_ray.errors import Problem
from teddy_ray.recipe import Recipe


def contradictions(recipe: Recipe) -> Iterable[Problem]:
    """What no single field's type can say."""
    augmentations = {
        "pool.augmentation": recipe.pool.augmentation,
        "synthesis.augmentation": recipe.synthesis.augmentation,
        "labels.augmentation": recipe.labels.augmentation,
    }
    scales: dict[str, tuple[float, float] | None] = {
        "synthesis.mosaic.crop_scale": recipe.synthesis.mosaic.crop_scale,
        "synthesis.curriculum.crop_scale": recipe.synthesis.curriculum.crop_scale,
    }
    for key, augmentation in augmentations.items():
        scales[f"{key}.crop_scale"] = augmentation.crop_scale
        if augmentation.crop_ratio[0] > augmentation.crop_ratio[1]:
            yield Problem(f"{key}.crop_ratio", list(augmentation.crop_ratio), "should be [low, high] with low <= high")
    for key, scale in scales.items():
        if scale is not None and not scale[0] <= scale[1] <= 1:
            yield Problem(key, list(scale), "should be [low, high] with low <= high <= 1")
    if recipe.statistics.source == "buffers" and recipe.statistics.scope != "global":
        remedy = "should be global where statistics.source is buffers: they know no classes"
        yield Problem("statistics.scope", recipe.statistics.scope, remedy)
    size, grid = recipe.data.image_size, recipe.synthesis.mosaic.grid
    if recipe.synthesis.start == "mosaic" and size % grid:
        yield Problem("synthesis.mosaic.grid", grid, f"should divide data.image_size, {size}")
    yield from _formation_contradictions(recipe)
    view_size = recipe.synthesis.curriculum.image_size
    if view_size is not None and view_size > size:
        yield Problem("synthesis.curriculum.image_size", view_size, f"should be at most data.image_size, {size}")
    for stage in ("pool", "statistics", "synthesis", "labels", "evaluation"):
        gpus = getattr(recipe, stage).gpus_per_worker
        if gpus > 1 and gpus != int(gpus):
            yield Problem(f"{stage}.gpus_per_worker", gpus, "should be a share below 1 or a whole number")
    if list(recipe.pool.snapshots) != sorted(set(recipe.pool.snapshots)):
        yield Problem("pool.snapshots", list(recipe.pool.snapshots), "should be epochs in rising order, each once")
    lists: dict[str, tuple[Any, ...]] = {
        "pool.seeds": recipe.pool.seeds,
        "pool.architectures": recipe.pool.architectures,
        "evaluation.seeds": recipe.evaluation.seeds,
        "evaluation.students": recipe.evaluation.students,
        "evaluation.controls": recipe.evaluation.controls,
        "data.classes": recipe.data.classes or (),
        "evaluation.learning_rate": _as_tuple(recipe.evaluation.learning_rate),
    }
    for key, values in lists.items():
        if len(set(values)) < len(values):
            yield Problem(key, list(values), "should name each only once")
    if "://" in (recipe.cluster.address or ""):  # Ray Client, which runs neither Ray Train nor Ray Data
        remedy = (
            "should be host:port of the cluster, given on one of its nodes (ray start --address=host:port --num-cpus=0 "
            "makes this machine one); from elsewhere submit a job: ray job submit --address http://host:8265 "
            "--working-dir . -- python pipelines/distill.py RECIPE"
        )
        yield Problem("cluster.address", recipe.cluster.address, remedy)
    yield from _pool_contradictions(recipe)
    yield from _label_contradictions(recipe)
    yield from _student_contradictions(recipe)


def _as_tuple(rates: float | tuple[float, ...]) -> tuple[float, ...]:
    return rates if isinstance(rates, tuple) else (rates,)


def _formation_contradictions(recipe: Recipe) -> Iterable[Problem]:
    formation, size, labels = recipe.synthesis.formation, recipe.data.image_size, recipe.labels
    if formation == 1:
        return
    if size % formation:
        yield Problem("synthesis.formation", formation, f"should divide data.image_size, {size}")
    if recipe.synthesis.start == "mosaic" and recipe.synthesis.mosaic.grid != formation:
        remedy = f"should be synthesis.formation, {formation}: a patch for each of the images in one"
        yield Problem("synthesis.mosaic.grid", recipe.synthesis.mosaic.grid, remedy)
    if labels.averaged:
        yield Problem("labels.averaged", True, "should be false with synthesis.formation: one label for several images")
    if labels.mode != "none" and labels.views % formation**2:
        remedy = f"should be a multiple of {formation**2}: views take the images in one in turn (synthesis.formation)"
        yield Problem("labels.views", labels.views, remedy)
    if recipe.evaluation.epochs < formation**2:
        remedy = f"should be at least {formation**2}: an epoch sees one of the images in each (synthesis.formation)"
        yield Problem("evaluation.epochs", recipe.evaluation.epochs, remedy)
    if "distilled_plain" in recipe.evaluation.controls:
        remedy = "should be without distilled_plain, which sees one view of each image; synthesis.formation needs more"
        yield Problem("evaluation.controls", list(recipe.evaluation.controls), remedy)


def _pool_contradictions(recipe: Recipe) -> Iterable[Problem]:
    pool = recipe.pool
    num_bases = len(pool.architectures) * len(pool.seeds)
    sizes = {
        "prior": (num_bases * len(pool.snapshots), "snapshots"),
        "post": (num_bases * len(pool.post.ratios), "ratios"),
    }
    possible = [sizes[pool.generation]] if pool.generation != "auto" else list(sizes.values())
    num_members, what = min(possible)
    if recipe.synthesis.models_per_step > num_members:
        remedy = f"should be at most {num_members}, the members of the pool (architectures x seeds x {what})"
        yield Problem("synthesis.models_per_step", recipe.synthesis.models_per_step, remedy)
    if pool.base.weights is not None and len(pool.architectures) > 1:
        remedy = "should be the one architecture of pool.base.weights"
        yield Problem("pool.architectures", list(pool.architectures), remedy)
    if pool.num_workers != "auto" and pool.num_workers % pool.workers_per_base:
        remedy = f"should be a multiple of pool.workers_per_base, {pool.workers_per_base}"
        yield Problem("pool.num_workers", pool.num_workers, remedy)
    if pool.batch_size < 2 * pool.workers_per_base and pool.workers_per_base > 1:
        remedy = f"should be at least {2 * pool.workers_per_base}, two images for each of pool.workers_per_base"
        yield Problem("pool.batch_size", pool.batch_size, remedy)


def _label_contradictions(recipe: Recipe) -> Iterable[Problem]:
    labels, evaluation = recipe.labels, recipe.evaluation
    if labels.mode == "top_k" and labels.ensemble == "logits":
        yield Problem("labels.mode", "top_k", "should be fp16 or none with labels.ensemble logits: logits have no rest")
    if labels.averaged and labels.mode == "none":
        yield Problem("labels.averaged", True, "should be false with labels.mode none, which stores no label")
    if labels.averaged and labels.cutmix > 0:
        yield Problem("labels.cutmix", labels.cutmix, "should be 0 with labels.averaged: partners change with the view")
    budgets = [evaluation.epochs, *evaluation.longer_epochs]
    if budgets != sorted(set(budgets)):
        remedy = f"should rise, from more than evaluation.epochs, {evaluation.epochs}"
        yield Problem("evaluation.longer_epochs", list(evaluation.longer_epochs), remedy)
    if evaluation.loss == "logit_mse" and labels.ensemble != "logits":
        yield Problem("evaluation.loss", "logit_mse", "needs labels.ensemble logits; set that, or this to kl")


def _student_contradictions(recipe: Recipe) -> Iterable[Problem]:
    students = recipe.evaluation
    if list(students.steps.at) != sorted(set(students.steps.at)):
        yield Problem("evaluation.steps.at", list(students.steps.at), "should be shares in rising order, each once")
    epochs = {"epochs": students.epochs}
    if "full_data" in students.controls:
        epochs["full_data_epochs"] = students.full_data_epochs
    shortest = min(epochs, key=lambda key: epochs[key])
    if students.warmup_epochs >= epochs[shortest]:
        remedy = f"should be below evaluation.{shortest}, {epochs[shortest]}"
        yield Problem("evaluation.warmup_epochs", students.warmup_epochs, remedy)
