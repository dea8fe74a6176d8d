"""What Ray Tune runs as a trial: it waits for the trial's own work and passes on what it reports.

Tune runs trials in placement groups, which would hold everything that a trial starts; so the work goes into a task
beside it. This module is all that a waiting trial imports, which takes no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teddy_ray.recipe import Recipe
from teddy_ray.sweeps.space import Settings, settings_of

if TYPE_CHECKING:
    from teddy_ray.sweeps.outcome import Outcome
    from teddy_ray.sweeps.trial import Job

POLL_S = 0.5
EPOCH, OUTCOME = "epoch", "outcome"
"""Keys of a result, besides the objectives."""
TRIAL = "trial"
"""Key of a config that holds the number and the settings of a trial."""


def settings_in(config: Mapping[str, Any], recipe: Recipe) -> Settings:
    """The settings of a trial: in its config as they are, or as `tune_domains` draws them."""
    if TRIAL in config:
        settings: Settings = config[TRIAL]["settings"]
        return settings
    return settings_of(recipe, config)


def wait_for_trial(config: Mapping[str, Any], job: Job) -> None:
    """A function trainable."""
    trial = tune.get_context().get_trial_id()
    job.hub.begin(trial)  # again, where its first node is gone
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(_run_trial).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
    task = remote.remote(job, settings_in(config, job.recipe), trial)
    try:
        while not ray.wait([task], timeout=POLL_S)[0]:
            _report(job, trial)
        outcome: Outcome = ray.get(task)
    finally:
        ray.cancel(task, force=True)  # where Tune stops the trial
    _report(job, trial)
    assert job.recipe.sweep is not None
    # those of a failed trial are not to be taken for any good
    metrics: dict[str, Any] = {name: outcome.metrics.get(name, math.nan) for name in job.recipe.sweep.objectives}
    tune.report({**metrics, EPOCH: job.recipe.evaluation.epochs, OUTCOME: outcome.to_dict()})


def _report(job: Job, trial: str) -> None:
    for rung in job.hub.rungs(trial):
        tune.report({"accuracy": rung.accuracy, EPOCH: rung.epoch})


def _run_trial(job: Job, settings: Settings, trial: str) -> Outcome:
    from teddy_ray.sweeps.trial import run_trial

    return run_trial(job, settings, trial)
