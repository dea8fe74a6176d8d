"""A distillation from recipe to report: check, plan, run what is missing, publish. The one flow of all entry points."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from ray.exceptions import RayError

from teddy_ray.errors import InputError, Problem, StageError
from teddy_ray.given import GivenBase, read_given
from teddy_ray.members import check_prunable
from teddy_ray.plan import Plan
from teddy_ray.pool_plan import DataFacts
from teddy_ray.progress import Progress
from teddy_ray.publication import check_run_folder, publish_run
from teddy_ray.recipe import Recipe
from teddy_ray.sources import Source, open_source
from teddy_ray.stages.session import Session, check_local_resources
from teddy_ray.storage import Storage
from teddy_ray.summary import Summary, summarise

MOST_VALUES = 2**31 - 1
"""That a list of one Parquet file holds."""


@dataclass(frozen=True)
class Prepared:
    """A recipe whose input has been checked, with its plan."""

    plan: Plan
    source: Source
    storage: Storage
    given: GivenBase | None


def prepare(
    recipe: Recipe,
    say: Callable[[str], None] = lambda text: None,
    source: Source | None = None,
    *,
    split: Literal["test", "validation"] = "test",
    storage: Storage | None = None,
    given: GivenBase | None = None,
) -> Prepared:
    """Check everything that can be known before work starts, and plan. Starts no Ray, writes nothing.

    `say` takes lines for the user, where checking the data lasts or leaves images out. source, storage, given: the
    recipe's data, where it is open already; its storage, where that was checked already; what is known of `pool.base`.
    split: what students are measured on.

    Raises InputError with every problem found.
    """
    problems: list[Problem] = []
    with _collect(problems):
        if storage is None:
            storage = Storage(recipe.storage)
            storage.check_writable()
        if split == "test":  # a trial of a sweep publishes no run
            check_run_folder(storage, recipe.name)
    with _collect(problems):
        source = source or open_source(recipe.data, say)
        problems += _data_problems(recipe, source)
    problems += _architecture_problems(recipe, source)
    if problems or storage is None or source is None:
        raise InputError(problems)
    plan = Plan(recipe, _facts(source), code=_code(recipe), split=split)
    if given is None or (recipe.pool.generation == "auto" and given.facts.accuracy is None):
        given = read_given(plan, source.validation, storage)
    plan = replace(plan, given=given.facts) if given else plan
    if problems := list(_label_problems(plan)):
        raise InputError(problems)
    if not storage.has("pool", plan.pool):
        check_prunable(plan)
    return Prepared(plan, source, storage, given)


def distill(recipe: Recipe, progress: Progress, source: Source | None = None) -> Summary:
    """Run what is missing of a recipe, publish runs/<name>/ and return its summary. source: as `prepare` takes it."""
    prepared = prepare(recipe, progress.say, source)
    plan, storage = prepared.plan, prepared.storage
    if not is_finished(plan, storage):
        check_local_resources(recipe)
    try:
        with contextlib.closing(Session(plan, prepared.source, storage, progress)) as session:
            progress.say(f"pool       {plan.pool_plan.generation}: {plan.pool_plan.generation_reason}")
            reused = run_stages(session, prepared.given)
        summary = summarise(plan, storage, reused=reused)
        publish_run(plan, prepared.source, storage, summary, progress)
        if recipe.logs.tensorboard:
            _write_events(plan, storage)
    finally:
        storage.close_session()
    return summary


def is_finished(plan: Plan, storage: Storage) -> bool:
    """Whether every stage is published."""
    return all(storage.has(stage, fingerprint) for stage, fingerprint in plan.stages().items())


def run_stages(session: Session, given: GivenBase | None) -> list[str]:
    """Run the stages that are not published yet. Returns those that were."""
    plan, storage, progress = session.plan, session.storage, session.progress
    whole, reused = is_finished(plan, storage), []
    for stage, fingerprint in plan.stages().items():
        computed = False
        for _ in session.claims.turns(stage, partial(_missing, storage, stage, fingerprint)):
            if stage == "pool" and given is not None:
                given.publish(plan, session.source.validation, storage)
            _run(session, stage, "run")
            computed = True
        if computed:
            seconds = storage.open(stage, fingerprint).manifest["seconds"]
            progress.say(f"{stage:<10} done in {seconds:.1f} s", stage=stage, seconds=seconds)
            continue
        if stage == "pool" and not whole:
            _run(session, stage, "check")  # what goes on from old members has to know that they are the same
        progress.say(f"{stage:<10} reused ({fingerprint[:8]})", stage=stage)
        reused.append(stage)
    return reused


def _missing(storage: Storage, stage: str, fingerprint: str) -> list[str]:
    return [] if storage.has(stage, fingerprint) else [fingerprint]


def _run(session: Session, stage: str, function: str) -> None:
    # imported when it runs: a run that reuses everything needs neither Ray Train nor Ray Data
    module = importlib.import_module(f"teddy_ray.stages.{stage}")
    try:
        getattr(module, function)(session)
    except RayError as error:
        raise StageError(stage, "Ray", str(error)) from error


def _write_events(plan: Plan, storage: Storage) -> None:
    from teddy_ray.tensorboard import write_events  # a second of imports, for those who ask for it

    for stage in plan.stages():
        write_events(plan, storage, stage)


def _facts(source: Source) -> DataFacts:
    counts = np.bincount(source.train.labels, minlength=len(source.classes))
    return DataFacts(
        classes=source.classes,
        counts=tuple(int(count) for count in counts),
        num_test=len(source.test),
        train=source.train.identity,
        validation=source.validation.identity,
        test=source.test.identity,
        num_skipped=len(source.skipped),
        num_validation=len(source.validation),
    )


def _code(recipe: Recipe) -> dict[str, str]:
    from teddy_ray.models import code_identity

    names = (*recipe.pool.architectures, *recipe.evaluation.students)
    return {name: code for name in names if (code := code_identity(name)) is not None}


@contextlib.contextmanager
def _collect(problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        problems += error.problems


def _data_problems(recipe: Recipe, source: Source) -> list[Problem]:
    """Where the recipe asks for more than the data holds."""
    counts = np.bincount(source.train.labels, minlength=len(source.classes))
    part = recipe.synthesis
    drawn = part.formation**2 if part.start == "real" else 1  # for each image
    draws = part.start == "real" or any(c.startswith("random") for c in recipe.evaluation.controls)
    if draws and counts.min() < part.images_per_class * drawn:
        scarce = source.classes[int(counts.argmin())]
        if counts.min() < drawn:
            remedy = f"needs {drawn} training images of each class; class {scarce!r} has {counts.min()}: lower it"
            return [Problem("synthesis.formation", part.formation, remedy)]
        return [
            Problem(
                "synthesis.images_per_class",
                part.images_per_class,
                f"should be at most {counts.min() // drawn}: class {scarce!r} has {counts.min()} training images"
                + (f", and each starts from {drawn} (synthesis.formation)" if drawn > 1 else "")
                + "; with synthesis.start mosaic or noise and no random controls it may be more",
            )
        ]
    return []


def _label_problems(plan: Plan) -> Iterator[Problem]:
    """Where the recipe asks for labels that the pool or the classes do not allow."""
    labels, num_classes = plan.recipe.labels, len(plan.data.classes)
    if labels.members != "all" and not plan.label_members:
        names = [member.name for member in plan.members]
        remedy = f"chooses none of the pool's members: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        yield Problem("labels.members", labels.members.model_dump(mode="json", exclude_none=True), remedy)
    num_views = 1 if labels.averaged else labels.views
    width = labels.top_k if labels.mode == "top_k" else num_classes
    most = MOST_VALUES // (num_views * width)
    if labels.mode != "none" and min(labels.images_per_file, plan.num_images) > most:
        remedy = f"should be at most {most} with {num_views} views of {width} classes: a Parquet list holds no more"
        yield Problem("labels.images_per_file", labels.images_per_file, remedy)
    if labels.mode == "top_k" and labels.top_k >= num_classes:
        yield Problem("labels.top_k", labels.top_k, f"should be less than the {num_classes} classes; or choose fp16")


def _architecture_problems(recipe: Recipe, source: Source | None) -> list[Problem]:
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from teddy_ray import models
    from teddy_ray.taps import Taps

    problems, pool = [], {}
    data, num_classes = recipe.data, len(source.classes) if source else 2
    lists = {"pool.architectures": recipe.pool.architectures, "evaluation.students": recipe.evaluation.students}
    for key, names in lists.items():
        for name in names:
            try:
                model = models.outline(
                    name, num_classes=num_classes, channels=data.channels, image_size=data.image_size
                )
            except ValueError as error:
                problems.append(Problem(key, name, str(error)))
                continue
            if key == "pool.architectures":
                pool[name] = model
    view_size = recipe.synthesis.curriculum.image_size
    for name, model in pool.items():
        if view_size not in (None, data.image_size) and not models.takes_any_size(name):
            remedy = f"leave it out, or {name} out of pool.architectures: it takes images of data.image_size alone"
            problems.append(Problem("synthesis.curriculum.image_size", view_size, remedy))
        try:
            with Taps(model.eval()) as taps:
                model(torch.zeros(2, data.channels, data.image_size, data.image_size, device=model.mean.device))
                taps.take()
        except ValueError as error:
            problems.append(Problem("pool.architectures", name, str(error)))
            continue
        tapped = [model.get_submodule(layer) for layer in taps.layers]
        if recipe.statistics.source == "buffers" and not all(isinstance(layer, _BatchNorm) for layer in tapped):
            remedy = f"{name} has other layers than BatchNorms to match; set it to moments"
            problems.append(Problem("statistics.source", "buffers", remedy))
    return problems
