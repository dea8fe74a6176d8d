"""The verdict: what a person reads first must follow from the figures."""

from types import SimpleNamespace

import pytest

from teddy_ray.records import Score, tabulate
from teddy_ray.tables import verdict


def summary(distilled, random):
    """Only what a verdict looks at: accuracies per seed."""
    scores = [
        Score(
            row=row,
            student="convnet",
            accuracy=value,
            validation=value,
            labels="soft",
            split="test",
            steps=1200,
            n_counts="seeds",
        )
        for row, values in (("distilled", distilled), ("random_soft", random))
        for value in values
    ]
    rows = tabulate(scores)
    gain = rows["distilled"].mean - rows["random_soft"].mean
    return SimpleNamespace(accuracy=rows, improvement_over_random=gain, num_test=360)


@pytest.mark.parametrize(
    ("distilled", "random", "says"),
    [
        ([0.91, 0.90, 0.92], [0.81, 0.80, 0.82], "+10.0 points"),
        ([0.91, 0.90, 0.92], [0.89, 0.91, 0.93], ": not shown to differ ("),
        ([0.81, 0.80, 0.82], [0.91, 0.90, 0.92], "labels, at 1,200 student steps: worse ("),
        ([0.92, 0.90, 0.91], [0.895, 0.90, 0.89], "the 95 % interval is ±"),
        ([0.91], [0.90], "One student allows no judgement."),
    ],
)
def test_verdict_follows_from_the_figures(distilled, random, says):
    assert says in verdict(summary(distilled, random))
    assert "at 1,200 student steps" in verdict(summary(distilled, random))


def test_a_clear_gain_is_not_called_none():
    assert "not shown" not in verdict(summary([0.91, 0.90, 0.92], [0.81, 0.80, 0.82]))


def test_without_the_control_nothing_is_claimed():
    alone = summary([0.91], [0.90])
    del alone.accuracy["random_soft"]
    assert "says little" in verdict(alone)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (
            [0.81, 0.80, 0.82],
            "itself: +10.0 points against the images that it started from, under equal labels: better (the 95 %",
        ),
        ([0.91, 0.92, 0.90], ": not shown to differ ("),
        ([0.95, 0.96, 0.94], "worse"),
    ],
)
def test_the_synthesis_is_judged_by_what_it_started_from(start, says):
    found = summary([0.91, 0.90, 0.92], [0.81, 0.80, 0.82])
    found.accuracy["start_soft"] = summary(start, [0.5]).accuracy["distilled"]
    text = verdict(found)
    assert "+10.0 points against random real images under equal labels, at 1,200 student steps: better (the" in text
    assert says in text
