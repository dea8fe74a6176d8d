"""The trials of a sweep under Ray Tune: sampled, run as many at a time as fit, stopped early, watched."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune import TuneError
from ray.tune.schedulers import ASHAScheduler

from teddy_ray.errors import Problem, StageError
from teddy_ray.progress import Bar, Progress
from teddy_ray.recipe import Recipe, Sweep
from teddy_ray.sweeps.hub import Look
from teddy_ray.sweeps.outcome import Outcome, failed
from teddy_ray.sweeps.results import MODES
from teddy_ray.sweeps.space import Settings, drawn_of, tune_domains
from teddy_ray.sweeps.trainable import EPOCH, OUTCOME, TRIAL, settings_in, wait_for_trial
from teddy_ray.sweeps.trial import Job
from teddy_ray.tensorboard import TENSORBOARD

if TYPE_CHECKING:
    from ray.tune.experiment import Trial
    from ray.tune.search.optuna import OptunaSearch

MAX_FAILURES = 5
"""How often a trial may be lost with its node or its process."""

TRIAL_BYTES = 10**9
"""Memory that a trial is counted with: of its own process and of the one that waits for it. Its workers come beside."""


EVENTS = "events.out.tfevents.*"
"""TensorBoard's files of a trial."""

ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the command line's
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # or it prints what it was asked to do, however quiet it should be
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # rungs report the accuracy alone
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def rungs_of(recipe: Recipe) -> tuple[int, ...]:
    """Epochs after which the first student of a trial is measured: as ASHA compares trials."""
    assert recipe.sweep is not None
    if (stopping := recipe.sweep.stopping) is None:
        return ()
    rungs, epoch = list[int](), stopping.grace_epochs
    while epoch < recipe.evaluation.epochs:
        rungs.append(epoch)
        epoch *= stopping.reduction
    return tuple(rungs)


def tune_trials(
    job: Job,
    settings: Mapping[int, Settings] | None,
    *,
    num_trials: int,
    at_once: int,
    history: Sequence[Outcome],
    begun: Sequence[Settings],
    watcher: Watcher,
) -> None:
    """Run the trials that are missing; the watcher is told of each as it begins and ends.

    settings: of the trials by number; None where Optuna draws them, num_trials more than there are in `history`, and
    those first that had `begun` earlier.
    """
    sweep = job.recipe.sweep
    assert sweep is not None
    os.environ |= ENVIRONMENT
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    trainable = tune.with_resources(
        tune.with_parameters(wait_for_trial, job=job),
        # neither CPUs nor GPUs, which are the workers'
        tune.PlacementGroupFactory([{"memory": min(TRIAL_BYTES, _most_memory())}]),
    )
    drawn = settings is None
    tuner = tune.Tuner(
        trainable,
        param_space=None if settings is None else {TRIAL: tune.grid_search(_configs(settings))},
        tune_config=tune.TuneConfig(
            search_alg=_optuna(job.recipe, history, begun) if drawn else None,
            num_samples=num_trials if drawn else 1,
            scheduler=_scheduler(job.recipe),
            max_concurrent_trials=at_once,
            time_budget_s=sweep.seconds,
            trial_name_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=job.storage.session_folder("tune"),
            storage_filesystem=job.storage.fs,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[*_trackers(job.recipe), watcher],  # what the others wrote of a trial, the watcher keeps
        ),
    )
    try:
        tuner.fit()
    except (TuneError, RayError) as error:
        raise StageError("sweep", "Ray Tune", str(error)) from error
    finally:
        watcher.close()


def _most_memory() -> float:
    """Of a node, in bytes as Ray counts it. No trial is to ask for more and wait for ever."""
    return max(float(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])


def _name(trial: Trial) -> str:
    """What trackers show. Optuna's trials have no number yet."""
    return f"trial-{trial.config[TRIAL]['number'] if TRIAL in trial.config else trial.trial_id}"


def _configs(settings: Mapping[int, Settings]) -> list[dict[str, Any]]:
    return [{"number": number, "settings": dict(own)} for number, own in settings.items()]


def check_packages(sweep: Sweep) -> Iterator[Problem]:
    """Where the sweep needs a package that is not there."""
    from importlib.util import find_spec

    needed = {"sweep.sampler": "optuna"} if sweep.sampler == "optuna" else {}
    needed |= {f"sweep.trackers.{name}": name for name in ("mlflow", "wandb") if getattr(sweep.trackers, name)}
    for key, package in needed.items():
        if find_spec(package) is None:
            yield Problem(key, package, f"needs the package {package}: pip install {package}")
    if sweep.trackers.wandb and "WANDB_API_KEY" not in os.environ and os.environ.get("WANDB_MODE") != "offline":
        yield Problem("sweep.trackers.wandb", sweep.trackers.wandb, "set WANDB_API_KEY, or WANDB_MODE=offline")


def _scheduler(recipe: Recipe) -> ASHAScheduler | None:
    assert recipe.sweep is not None
    if (stopping := recipe.sweep.stopping) is None:
        return None
    return ASHAScheduler(
        time_attr=EPOCH,
        metric="accuracy",
        mode="max",
        max_t=recipe.evaluation.epochs,
        grace_period=stopping.grace_epochs,
        reduction_factor=stopping.reduction,
    )


def _optuna(recipe: Recipe, history: Sequence[Outcome], begun: Sequence[Settings]) -> OptunaSearch:
    """Optuna's sampler as it would be after the trials that are over."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep = recipe.sweep
    assert sweep is not None
    space = OptunaSearch.convert_search_space(tune_domains(recipe))
    several = len(sweep.objectives) > 1
    direction = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
    directions = [direction[MODES[name]] for name in sweep.objectives]
    store = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=store, study_name=recipe.name, directions=directions)
    for outcome in history:
        values = [value for name in sweep.objectives if (value := outcome.metrics.get(name)) is not None]
        if len(values) == len(sweep.objectives):  # a trial that failed has none
            params = drawn_of(recipe, outcome.settings)
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=values))
    for params in filter(None, (drawn_of(recipe, settings) for settings in begun)):
        study.enqueue_trial(params)
    return OptunaSearch(
        space=space,
        metric=list(sweep.objectives) if several else sweep.objectives[0],
        mode=[MODES[name] for name in sweep.objectives] if several else MODES[sweep.objectives[0]],
        # another seed after each trial: the same one would draw the first trials again
        sampler=optuna.samplers.TPESampler(seed=(sweep.seed + 1000003 * len(history)) % 2**32),
        storage=store,
        study_name=recipe.name,
    )


def _trackers(recipe: Recipe) -> list[tune.Callback]:
    assert recipe.sweep is not None
    wanted, callbacks = recipe.sweep.trackers, list[tune.Callback]()
    if wanted.tensorboard:
        from ray.tune.logger import TBXLoggerCallback

        callbacks.append(TBXLoggerCallback())
    if wanted.mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks.append(MLflowLoggerCallback(tracking_uri=wanted.mlflow, experiment_name=recipe.name))
    if wanted.wandb:
        from ray.air.integrations.wandb import WandbLoggerCallback

        # Ray's own folder, which goes with its session, would take the runs of WANDB_MODE=offline along
        folder = os.environ.get("WANDB_DIR", str(Path.cwd()))
        callbacks.append(WandbLoggerCallback(project=wanted.wandb, group=recipe.name, dir=folder))
    return callbacks


class Watcher(tune.Callback):
    """Follows the trials on the driver: their progress, and what comes of them.

    num_done: trials that were over before. numbers: for trials that are drawn. on_begin, on_outcome: told of each
    trial, by its number. on_step: called many times a second.
    """

    def __init__(
        self,
        job: Job,
        progress: Progress,
        bar: Bar,
        num_done: int,
        numbers: Iterator[int],
        on_begin: Callable[[int, Settings], None],
        on_outcome: Callable[[int, Outcome], None],
        on_step: Callable[[], object],
    ) -> None:
        self._job, self._progress, self._bar = job, progress, bar
        self._num_done, self._free = num_done, numbers
        self._on_begin, self._on_outcome, self._on_step = on_begin, on_outcome, on_step
        self._numbers: dict[str, int] = {}
        self._running: dict[str, Trial] = {}
        self._over: set[str] = set()
        self.made: Mapping[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of what it runs, which nobody reads

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Of a trial that is restarted, too."""
        self._running[trial.trial_id] = trial
        if trial.trial_id not in self._numbers:
            number = trial.config[TRIAL]["number"] if TRIAL in trial.config else next(self._free)
            self._numbers[trial.trial_id] = number
            self._on_begin(number, settings_in(trial.config, self._job.recipe))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Of a rung, or of the end."""
        if OUTCOME in result and trial.trial_id not in self._over:
            self._end(trial, Outcome(**result[OUTCOME]))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Of one that was stopped, too."""
        result = trial.last_result
        if trial.trial_id not in self._over and EPOCH in (result or {}):
            outcome = Outcome(
                key="",
                settings=settings_in(trial.config, self._job.recipe),
                state="stopped",
                metrics={"accuracy": result["accuracy"]},
                epochs=result[EPOCH],
            )
            self._end(trial, outcome)
        self._forget(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Of one that was lost too often."""
        if trial.trial_id not in self._over:
            reason = f"was lost {trial.num_failures} times; the last time: {trial.get_error()}"
            self._end(trial, failed("", settings_in(trial.config, self._job.recipe), "; ".join(reason.splitlines())))
        self._forget(trial)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Of one that was lost and begins again."""
        self._progress.say(f"trial {self._numbers.get(trial.trial_id, '?')}: lost, begins again from its artifacts")
        self._forget(trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Many times a second."""
        self._on_step()
        self.show()

    def close(self) -> None:
        """Tune tells nothing of trials that it ends because time is up."""
        for trial in list(self._running.values()):
            self._forget(trial)

    def show(self) -> None:
        """What trials said, and how far they are."""
        look: Look = self._job.hub.look()
        self.made = look.made
        for line in look.lines:
            text = " ".join(line.text.split())
            self._progress.say(f"trial {self._numbers.get(line.trial, '?')}: {text}", trial=line.trial, **line.facts)
        running = {trial: share for trial, share in look.shares.items() if trial not in self._over}
        notes = [f"trial {self._numbers[trial]}: {note}" for trial, (_, note) in running.items()]
        over = len(self._over)
        done = self._num_done + over + sum(share for share, _ in running.values())
        # the first trials make what the others find, a pool, say; after them, trials come in waves of those at once
        self._bar.update(done, "; ".join(notes), paced=over if over > len(self._running) else min(over, 1))

    def _end(self, trial: Trial, outcome: Outcome) -> None:
        self.show()
        self._over.add(trial.trial_id)
        self._on_outcome(self._numbers[trial.trial_id], outcome)

    def _forget(self, trial: Trial) -> None:
        self._job.hub.forget(trial.trial_id)
        self._running.pop(trial.trial_id, None)
        number, storage = self._numbers.get(trial.trial_id), self._job.storage
        for path in Path(trial.local_path or "").glob(EVENTS):
            target = f"runs/{self._job.recipe.name}/{TENSORBOARD}/trial-{number}/{path.name}"
            storage.write(target, path.read_bytes())
