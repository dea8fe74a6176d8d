"""What the trials of a sweep show: which are worth their cost, which one wins, and which keys matter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from teddy_ray.recipe import Recipe, Sweep
from teddy_ray.sweeps.outcome import Outcome
from teddy_ray.sweeps.space import RANGES, Settings, kind_of, values_of

if TYPE_CHECKING:
    from teddy_ray.summary import Summary

MODES: Mapping[str, str] = {
    "accuracy": "max",
    "improvement": "max",
    "images": "min",
    "bytes": "min",
    "seconds": "min",
}
"""Of each objective: which end is better."""

COSTS = ("images", "bytes", "seconds")
"""What accuracy is weighed against."""

NUM_BINS = 3
LEAST_TRIALS = 8
"""Fewer trials say nothing on which key matters."""


@dataclass(frozen=True)
class Trial:
    """A trial as people know it. outcome: None where it is not over."""

    number: int
    settings: Settings
    outcome: Outcome | None

    @property
    def finished(self) -> bool:
        return self.outcome is not None and self.outcome.state == "finished"

    def metric(self, name: str) -> float:
        """Of a finished trial."""
        assert self.outcome is not None
        value = self.outcome.metrics[name]
        assert value is not None
        return value


def front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The finished trials than which no other is as good in every objective and better in one (Pareto)."""
    finished = [trial for trial in trials if trial.finished]
    points = np.array([[_loss(trial, name) for name in objectives] for trial in finished])
    return [
        trial
        for trial, point in zip(finished, points, strict=True)
        if not any((other <= point).all() and (other < point).any() for other in points)
    ]


def winner(trials: Sequence[Trial], sweep: Sweep) -> Trial | None:
    """The best finished trial by the first objective; among equals by the others, then with fewer bytes, then the
    first. None where none has finished."""
    finished = [trial for trial in trials if trial.finished]
    names = dict.fromkeys((*sweep.objectives, "bytes"))
    return min(finished, key=lambda trial: [_loss(trial, name) for name in names], default=None)


def _loss(trial: Trial, name: str) -> float:
    return trial.metric(name) * (-1 if MODES[name] == "max" else 1)


def importances(trials: Sequence[Trial], sweep: Sweep) -> dict[str, float]:
    """Key -> share of the variance of the first objective that the key explains by itself, from 0 to 1.

    Epsilon squared of a one-way analysis of variance (Kelley, 1935): unlike eta squared, it does not grow with the
    number of groups. Ranges are cut into thirds of equally many trials. Interactions are in no key's share. Keys are
    left out where a group has one trial only, and all of them below LEAST_TRIALS trials.
    """
    finished = [trial for trial in trials if trial.finished]
    if len(finished) < LEAST_TRIALS:
        return {}
    y = np.array([trial.metric(sweep.objectives[0]) for trial in finished])
    total = ((y - y.mean()) ** 2).sum()
    found = {}
    for key, groups in _groups(finished, sweep).items():
        sizes = np.bincount(groups)
        sizes = sizes[sizes > 0]
        if len(sizes) < 2 or sizes.min() < 2 or total == 0:
            continue
        means = np.array([y[groups == group].mean() for group in groups])
        within = ((y - means) ** 2).sum() / (len(y) - len(sizes))
        between = ((means - y.mean()) ** 2).sum()
        found[key] = float(max(0.0, (between - (len(sizes) - 1) * within) / total))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _groups(trials: Sequence[Trial], sweep: Sweep) -> dict[str, np.ndarray[Any, Any]]:
    """Key -> number of each trial's group."""
    groups = {}
    for key, axis in sweep.space.items():
        values = [trial.settings[key] for trial in trials]
        if kind_of(axis) in RANGES:
            ends = np.quantile(values, np.arange(1, NUM_BINS) / NUM_BINS)
            groups[key] = np.searchsorted(ends, values, side="right")
        else:
            groups[key] = np.array([values_of(axis).index(value) for value in values])
    return groups


def main_effects(trials: Sequence[Trial], sweep: Sweep) -> dict[str, list[tuple[str, float, int]]]:
    """Key -> (value, mean of the first objective over the finished trials with it, how many) of its values; keys of
    ranges are left out."""
    finished, found = [trial for trial in trials if trial.finished], dict[str, list[tuple[str, float, int]]]()
    for key, axis in sweep.space.items():
        if kind_of(axis) in RANGES:
            continue
        rows = []
        for value in values_of(axis):
            scores = [trial.metric(sweep.objectives[0]) for trial in finished if trial.settings[key] == value]
            if scores:
                rows.append((text_of(value), float(np.mean(scores)), len(scores)))
        found[key] = rows
    return found


def epochs_saved(trials: Sequence[Trial], recipe: Recipe) -> tuple[int, int]:
    """Epochs of students that were trained, and that all trials which are over would have taken without stopping."""
    evaluation, trained, whole = recipe.evaluation, 0, 0
    for trial in trials:
        if trial.outcome is not None and trial.outcome.state != "failed":
            trained += trial.outcome.epochs
            # the accuracy is the only objective where trials are stopped, so they have no controls
            whole += len(trial.settings.get("evaluation.seeds", evaluation.seeds)) * evaluation.epochs
    return trained, whole


def text_of(value: Any) -> str:
    """A value of a key as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def words_of(settings: Settings) -> str:
    """What a trial is set to, as people read it."""
    return ", ".join(f"{key} {text_of(value)}" for key, value in settings.items())


@dataclass(frozen=True)
class Reading:
    """What a winner reached on the test split."""

    settings: Settings
    accuracy: float


@dataclass(frozen=True)
class Found:
    """All that is shown of a sweep. made: how often each artifact was made by the last command. summary: of the
    winner, once it has been measured on the test split. before: winners that were, by earlier commands."""

    recipe: Recipe
    trials: Sequence[Trial]
    num_trials: int
    made: Mapping[str, int]
    summary: Summary | None
    before: Sequence[Reading] = ()

    @property
    def sweep(self) -> Sweep:
        assert self.recipe.sweep is not None
        return self.recipe.sweep

    @property
    def winner(self) -> Trial | None:
        return winner(self.trials, self.sweep)

    @property
    def weighed(self) -> Sequence[str]:
        """What the front is of: the objectives where there are several, else the one and bytes."""
        objectives = self.sweep.objectives
        return objectives if len(objectives) > 1 else tuple(dict.fromkeys((objectives[0], "bytes")))

    @property
    def front(self) -> list[Trial]:
        return front(self.trials, self.weighed)

    @property
    def earlier(self) -> list[Reading]:
        """Winners before this one."""
        best = self.winner
        return [reading for reading in self.before if best is None or reading.settings != best.settings]

    @property
    def readings(self) -> list[Reading]:
        """Every winner so far that was measured on the test split, the present one last."""
        if self.winner is None or self.summary is None:
            return list(self.before)
        return [*self.earlier, Reading(self.winner.settings, self.summary.accuracy["distilled"].mean)]

    def in_state(self, state: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.outcome is not None and trial.outcome.state == state]
