"""Whether one mean accuracy is higher than another: the one rule of verdicts and of marked figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

LEVEL = 0.95

CONTROLS: Mapping[str, tuple[str, ...]] = {
    "distilled": ("random_soft", "start_soft"),
    "distilled_hard": ("random_hard", "start_hard"),
    "distilled_plain": ("random_plain",),
}
"""The rows that are treated as a row's distilled images are, labels included: what these have to beat."""

OPPONENTS = {
    "random": "random real images under equal labels",
    "start": "the images that it started from, under equal labels",
}


class Sample(Protocol):
    """n accuracies, as fractions. std is the sample standard deviation, None where n is 1."""

    @property
    def mean(self) -> float: ...
    @property
    def std(self) -> float | None: ...
    @property
    def n(self) -> int: ...


@dataclass(frozen=True)
class Judgement:
    """gain: difference of the means; half_width: of its 95 % interval; fractions.

    no better: not shown to be better, which is not shown to be equal.
    """

    word: Literal["better", "no better", "worse"]
    gain: float
    half_width: float

    @property
    def interval(self) -> str:
        return f"the 95 % interval is ± {100 * self.half_width:.1f} points"


def judge(first: Sample, second: Sample, *, num_test: int) -> Judgement | None:
    """Welch's t-test of two means, two-sided; None where one of them has no spread to tell.

    num_test: test images. One of them is the least that the standard error can be: equal accuracies of a few
    students do not show that there is no error.
    """
    if first.std is None or second.std is None:
        return None
    from scipy.special import stdtrit  # takes a while

    parts = [(sample.std**2 / sample.n, sample.n - 1) for sample in (first, second) if sample.std is not None]
    variance = sum(part for part, _ in parts)
    # Welch and Satterthwaite; without any spread, as if both had the same
    freedom = variance**2 / sum(part**2 / df for part, df in parts) if variance else sum(df for _, df in parts)
    error = max(math.sqrt(variance), 1 / num_test)
    half_width = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    gain = first.mean - second.mean
    return Judgement(
        "better" if gain > half_width else "worse" if gain < -half_width else "no better", gain, half_width
    )


def controls_of(row: str) -> Iterator[tuple[str, str]]:
    """What a row such as distilled@900 has to beat: the names of the controls, with what they are."""
    name, at, epochs = row.partition("@")
    for control in CONTROLS.get(name, ()):
        yield control + at + epochs, OPPONENTS[control.partition("_")[0]]
