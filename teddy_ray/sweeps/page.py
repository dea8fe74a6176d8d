"""What a sweep shows, as a table, as a page that works offline, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from teddy_ray.plots import Axis
from teddy_ray.recipe import Recipe, Sweep
from teddy_ray.recipe_file import dump_recipe
from teddy_ray.report import size
from teddy_ray.summary import REPORT, Summary
from teddy_ray.sweeps.results import (
    COSTS,
    MODES,
    Trial,
    epochs_saved,
    front,
    importances,
    main_effects,
    text_of,
    winner,
)
from teddy_ray.sweeps.space import RANGES, kind_of
from teddy_ray.tables import align

X_TITLES = {
    "images": "images",
    "bytes": "bytes as stored, labels included",
    "seconds": "worker seconds: pool, statistics, synthesis, labels",
}


@dataclass(frozen=True)
class Found:
    """All that is shown of a sweep. made: how often each artifact was made by the last command. summary: of the
    winner, once it has been measured on the test split."""

    recipe: Recipe
    trials: Sequence[Trial]
    num_trials: int
    made: Mapping[str, int]
    summary: Summary | None

    @property
    def sweep(self) -> Sweep:
        assert self.recipe.sweep is not None
        return self.recipe.sweep

    @property
    def winner(self) -> Trial | None:
        return winner(self.trials, self.sweep)

    @property
    def front(self) -> list[Trial]:
        """Of the objectives where there are several, else of accuracy and bytes."""
        objectives = self.sweep.objectives
        return front(self.trials, objectives if len(objectives) > 1 else (objectives[0], "bytes"))

    @property
    def whole_epochs(self) -> int:
        """Of a trial's students."""
        evaluation = self.recipe.evaluation
        rows = 2 if "improvement" in self.sweep.objectives else 1
        return rows * len(evaluation.seeds) * evaluation.epochs

    def in_state(self, state: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.outcome is not None and trial.outcome.state == state]


def to_tree(found: Found) -> dict[str, Any]:
    """sweep.json"""
    best, trained = found.winner, epochs_saved(found.trials, found.whole_epochs)
    kinds = Counter(key.partition("/")[0] for key in found.made)
    times: Counter[str] = Counter()
    for key, number in found.made.items():
        times[key.partition("/")[0]] += number
    return {
        "name": found.recipe.name,
        "sweep": found.sweep.model_dump(mode="json", exclude_none=True),
        "num_trials": found.num_trials,
        "trials": [
            {"number": trial.number, **(trial.outcome.to_dict() if trial.outcome else {"settings": trial.settings})}
            for trial in sorted(found.trials, key=lambda trial: trial.number)
        ],
        "front": [trial.number for trial in found.front],
        "importances": importances(found.trials, found.sweep),
        "student_epochs": {"trained": trained[0], "without_stopping": trained[1]},
        "made": {kind: {"artifacts": kinds[kind], "times": times[kind]} for kind in sorted(kinds)},
        "winner": None
        if best is None
        else {
            "number": best.number,
            "settings": best.settings,
            "validation": best.metric("accuracy"),
            "test": None if found.summary is None else found.summary.accuracy["distilled"].mean,
            "run": None if found.summary is None else found.summary.name,
        },
    }


def to_table(found: Found, display: str) -> str:
    """What the command prints. display: the folder of the sweep."""
    keys = list(found.sweep.space)
    header = ("", *(key.rpartition(".")[2] for key in keys), "validation accuracy", "images", "bytes", "worker s", "")
    marks = _marks(found)
    rows = [
        (f"trial {trial.number}", *(text_of(trial.settings[key]) for key in keys), *_cells(trial), marks[trial.number])
        for trial in _ranked(found)
    ]
    lines = ["", f"{found.recipe.name}: {_state(found)}", "", align([header, *rows]), ""]
    lines += [sentence for sentence in verdicts(found)]
    if failed := found.in_state("failed"):
        lines += ["", *(f"trial {trial.number} failed: {trial.outcome.reason}" for trial in failed if trial.outcome)]
    recipe = [] if found.summary is None else [f"recipe: {display}/winner.yaml"]
    return "\n".join([*lines, "", f"report: {display}/{REPORT}", *recipe])


def verdicts(found: Found) -> Iterator[str]:
    """What the trials say, in sentences."""
    best = found.winner
    if best is None:
        yield "No trial has finished: there is no winner."
        return
    of_best = f"Trial {best.number} wins by {found.sweep.objectives[0]}: {_settings(best)}."
    yield f"{of_best} Validation accuracy {best.metric('accuracy'):.4f}, the best of {len(found.in_state('finished'))}."
    if found.summary is not None:
        test = found.summary.accuracy["distilled"]
        random = found.summary.accuracy.get("random_soft")
        lead = f"; random real images under the same labels {random}" if random else ""
        yield (
            f"On the test split, read once and by the winner alone: {test} (n = {test.n}, {test.student_steps:,} "
            f"student steps){lead}. The best of many is lucky, too: validation promises more than it keeps."
        )
    if shares := importances(found.trials, found.sweep):
        named = ", ".join(f"{key} {share:.2f}" for key, share in shares.items())
        yield f"Share of the variance of {found.sweep.objectives[0]} that a key explains by itself: {named}."
    if found.sweep.stopping is not None:
        trained, whole = epochs_saved(found.trials, found.whole_epochs)
        yield f"Early stopping: {trained:,} student epochs instead of {whole:,} ({1 - trained / whole:.0%} saved)."


def to_html(found: Found) -> str:
    """report.html"""
    environment = Environment(
        loader=PackageLoader("teddy_ray"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(text_of=text_of, size=size)
    winning = found.winner
    return environment.get_template("sweep.html").render(
        found=found,
        state=_state(found),
        verdicts=list(verdicts(found)),
        charts=list(_charts(found)),
        parallel=_parallel(found),
        effects=main_effects(found.trials, found.sweep),
        shares=importances(found.trials, found.sweep),
        keys=list(found.sweep.space),
        ranked=_ranked(found),
        marks=_marks(found),
        cells=_cells,
        winner=winning,
        winner_run=None if found.summary is None else f"../{found.summary.name}/{REPORT}",
        report=REPORT,
        recipe=dump_recipe(found.recipe),
    )


# -- rows --------------------------------------------------------------------------------------------------------------


def _state(found: Found) -> str:
    finished, stopped, failed = (len(found.in_state(state)) for state in ("finished", "stopped", "failed"))
    parts = [f"{finished} of {found.num_trials} trials finished"]
    parts += [f"{stopped} stopped early"] if stopped else []
    parts += [f"{failed} failed"] if failed else []
    return ", ".join(parts)


def _settings(trial: Trial) -> str:
    return ", ".join(f"{key} {text_of(value)}" for key, value in trial.settings.items())


def _ranked(found: Found) -> list[Trial]:
    """Finished trials, the best first; then those stopped, those that failed, those that are not over."""

    def rank(trial: Trial) -> tuple[int, float]:
        if trial.outcome is None:
            return 3, trial.number
        if trial.outcome.state == "failed":
            return 2, trial.number
        first = found.sweep.objectives[0] if trial.finished else "accuracy"
        value = trial.outcome.metrics[first] or 0.0
        return 0 if trial.finished else 1, -value if MODES[first] == "max" else value

    return sorted(found.trials, key=rank)


def _cells(trial: Trial) -> tuple[str, str, str, str]:
    """Accuracy, images, bytes, seconds."""
    if trial.outcome is None:
        return "not over", "", "", ""
    metrics = trial.outcome.metrics
    if trial.outcome.state == "failed":
        return "failed", "", "", ""
    if trial.outcome.state == "stopped":
        return f"{metrics['accuracy']:.4f} after {trial.outcome.epochs} epochs", "", "", ""
    spread = f" ± {metrics['std']:.4f}" if metrics["std"] is not None else ""
    return (
        f"{metrics['accuracy']:.4f}{spread}",
        f"{metrics['images']:,}",
        f"{metrics['bytes']:,}",
        f"{metrics['seconds']:,.0f}",
    )


def _marks(found: Found) -> dict[int, str]:
    """What stands behind a trial."""
    ahead, best = {trial.number for trial in found.front}, found.winner
    return {
        trial.number: "winner"
        if best is not None and trial.number == best.number
        else "front"
        if trial.number in ahead
        else ""
        for trial in found.trials
    }


# -- plots, in per cent of their boxes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """A trial in a plot. style: all, front or winner."""

    x: float
    y: float
    style: str
    title: str


@dataclass(frozen=True)
class Scatter:
    """Accuracy against a cost. line: the corners of the front."""

    title: str
    x_title: str
    x: Axis
    y: Axis
    spots: Sequence[Spot]
    line: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Upright:
    """An axis of the parallel coordinates."""

    title: str
    x: float
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Parallel:
    """A line per trial through all its settings to its accuracy. lines: points, style, title."""

    axes: Sequence[Upright]
    lines: Sequence[tuple[Sequence[tuple[float, float]], str, str]]


def _charts(found: Found) -> Iterator[Scatter]:
    """Accuracy against every cost in which trials differ, each with its own front."""
    trials, best = found.in_state("finished"), found.winner
    if len(trials) < 2:
        return
    y = _axis([trial.metric("accuracy") for trial in trials], log=False)
    for cost in COSTS:
        values = [trial.metric(cost) for trial in trials]
        if max(values) == min(values):
            continue
        log = max(values) > 5 * min(values)
        x = _axis(values, log=log)
        ahead = sorted(front(trials, ("accuracy", cost)), key=lambda trial: trial.metric(cost))
        numbers = {trial.number for trial in ahead}
        spots = [
            Spot(
                x.at(trial.metric(cost)),
                y.at(trial.metric("accuracy")),
                "winner" if trial is best else "front" if trial.number in numbers else "all",
                f"trial {trial.number}: {trial.metric('accuracy'):.4f}; {_settings(trial)}",
            )
            for trial in trials
        ]
        order = ("all", "front", "winner")
        corners = [(x.at(trial.metric(cost)), y.at(trial.metric("accuracy"))) for trial in ahead]
        steps = [point for a, b in pairwise(corners) for point in (a, (b[0], a[1]))]
        title = X_TITLES[cost] + (", logarithmic" if log else "")
        yield Scatter(
            f"Validation accuracy against {cost}",
            title,
            x,
            y,
            sorted(spots, key=lambda spot: order.index(spot.style)),
            [*steps, *corners[-1:]],
        )


def _axis(values: Sequence[float], *, log: bool) -> Axis:
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.2, high * 1.2, num_ticks=4, log=True)
    margin = 0.07 * (high - low) or 0.01 * abs(high) or 1.0
    return Axis(low - margin, high + margin, num_ticks=4)


def _parallel(found: Found) -> Parallel | None:
    trials, space = found.in_state("finished"), found.sweep.space
    if len(trials) < 2:
        return None
    accuracies = _axis([trial.metric("accuracy") for trial in trials], log=False)
    places = [round(100 * i / len(space), 2) for i in range(len(space) + 1)]
    axes, heights = [], list[list[float]]()
    for key, place in zip(space, places, strict=False):
        values = [trial.settings[key] for trial in trials]
        if kind_of(space[key]) in RANGES:
            own = _axis(values, log=kind_of(space[key]) == "log_uniform")
            heights.append([own.at(value) for value in values])
            axes.append(Upright(key, place, own.ticks))
        else:
            texts = list(dict.fromkeys(text_of(value) for value in sorted(values, key=_order)))
            at = {text: 100 * (i + 0.5) / len(texts) for i, text in enumerate(texts)}
            heights.append([at[text_of(value)] for value in values])
            axes.append(Upright(key, place, [(height, text) for text, height in at.items()]))
    heights.append([accuracies.at(trial.metric("accuracy")) for trial in trials])
    axes.append(Upright("validation accuracy", 100.0, accuracies.ticks))
    best, ahead = found.winner, {trial.number for trial in found.front}
    lines = []
    for i, trial in enumerate(trials):
        style = "winner" if trial is best else "front" if trial.number in ahead else "all"
        points = [(place, height[i]) for place, height in zip(places, heights, strict=True)]
        lines.append((points, style, f"trial {trial.number}: {trial.metric('accuracy'):.4f}; {_settings(trial)}"))
    return Parallel(axes, sorted(lines, key=lambda line: ("all", "front", "winner").index(line[1])))


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))
