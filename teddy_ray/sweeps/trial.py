"""A trial: an ordinary run up to its students, which shares the cluster and the storage with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from teddy_ray.recipe import Data, Recipe
from teddy_ray.storage import Storage
from teddy_ray.sweeps.hub import Hub
from teddy_ray.sweeps.space import Settings, trial_recipe

if TYPE_CHECKING:  # not torch, for whoever waits for a trial
    from teddy_ray.given import GivenBase
    from teddy_ray.sources import Source
    from teddy_ray.sweeps.outcome import Outcome


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep have in common.

    recipe: with its sweep. sources: the data in the object store, by the recipe's part. rungs: epochs after which the
    first student is measured, none without early stopping.
    """

    recipe: Recipe
    sources: Mapping[Data, ray.ObjectRef[Source]]
    storage: Storage
    given: GivenBase | None
    rungs: tuple[int, ...]
    hub: Hub


def run_trial(job: Job, settings: Settings, trial: str) -> Outcome:
    """Run what is missing of a trial and measure what came of it. trial: its id.

    What its settings are to blame for is its outcome; what is raised may go another time.
    """
    from teddy_ray import flow
    from teddy_ray.errors import InputError, StageError, StoreError
    from teddy_ray.sources import open_source
    from teddy_ray.stages.session import Session
    from teddy_ray.sweeps.hub import RungsOf, Shared, TrialProgress
    from teddy_ray.sweeps.outcome import failed, key_of, measure

    assert job.recipe.sweep is not None
    progress, key = TrialProgress(job.hub, trial), ""
    try:
        recipe = trial_recipe(job.recipe, settings, f"{job.recipe.name}-trial-{trial}")
        reference = job.sources.get(recipe.data)
        source = ray.get(reference) if reference is not None else open_source(recipe.data, progress.say)
        prepared = flow.prepare(recipe, progress.say, source, split="validation", storage=job.storage, given=job.given)
        key = key_of(prepared.plan, job.recipe.sweep)
        session = Session(
            prepared.plan,
            source,
            job.storage,
            progress,
            claims=Shared(job.hub, trial),
            probes=RungsOf(job.hub, trial, job.rungs) if job.rungs else None,
            at_work=job.hub.num_at_work,
        )
        if reference is not None:
            session.source_ref = reference
        flow.run_stages(session, prepared.given)
        return measure(prepared.plan, job.storage, job.recipe.sweep, settings)
    except StoreError:
        raise
    except (InputError, StageError) as error:
        return failed(key, settings, "; ".join(str(error).splitlines()))
