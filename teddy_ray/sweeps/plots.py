"""The plots of a sweep as geometry, in per cent of their boxes; templates/sweep.html draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from teddy_ray.plots import Axis
from teddy_ray.sweeps.results import COSTS, Found, front, text_of, words_of
from teddy_ray.sweeps.space import RANGES, kind_of

X_TITLES = {
    "images": "images",
    "bytes": "bytes as stored, labels included",
    "seconds": "worker seconds: pool, statistics, synthesis, labels",
}


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


def charts(found: Found) -> Iterator[Scatter]:
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
                f"trial {trial.number}: {trial.metric('accuracy'):.4f}; {words_of(trial.settings)}",
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


def parallel(found: Found) -> Parallel | None:
    """A line for each finished trial; None where there are fewer than two."""
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
        lines.append(
            (points, style, f"trial {trial.number}: {trial.metric('accuracy'):.4f}; {words_of(trial.settings)}")
        )
    return Parallel(axes, sorted(lines, key=lambda line: ("all", "front", "winner").index(line[1])))


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))
