"""The verdict: what a person reads first must follow from the figures."""

from types import SimpleNamespace

import pytest

from teddy_ray.records import Score, tabulate
from teddy_ray.tables import verdict


def summary(distilled, random):
    """Only what a verdict looks at: accuracies per seed."""
    scores = [
        Score(row=row, student="convnet", accuracy=value, labels="soft", split="test", steps=1200, n_counts="seeds")
        for row, values in (("distilled", distilled), ("random_soft", random))
        for value in values
    ]
    rows = tabulate(scores)
    gain = rows["distilled"].mean - rows["random_soft"].mean
    return SimpleNamespace(accuracy=rows, improvement_over_random=gain)


@pytest.mark.parametrize(
    ("distilled", "random", "says"),
    [
        ([0.91, 0.90, 0.92], [0.81, 0.80, 0.82], "+10.0 points"),
        ([0.91, 0.90, 0.92], [0.89, 0.91, 0.93], "no better than the control: two standard errors are"),
        ([0.81, 0.80, 0.82], [0.91, 0.90, 0.92], "worse than the control"),
        ([0.91], [0.90], "One seed allows no judgement"),
    ],
)
def test_verdict_follows_from_the_figures(distilled, random, says):
    assert says in verdict(summary(distilled, random))
    assert "at 1,200 student steps" in verdict(summary(distilled, random))


def test_a_clear_gain_is_not_called_none():
    assert "no better" not in verdict(summary([0.91, 0.90, 0.92], [0.81, 0.80, 0.82]))


def test_without_the_control_nothing_is_claimed():
    text = verdict(SimpleNamespace(accuracy={}, improvement_over_random=None))
    assert "says little" in text
