"""DD-Ranking's scores against the formulas written out."""

import math

import pytest

from teddy_ray.records import Score, tabulate
from teddy_ray.scores import scores

ACCURACIES = {
    "distilled": 0.5,
    "random_soft": 0.4,
    "distilled_hard": 0.3,
    "full_data": 0.9,
    "distilled_plain": 0.45,
    "random_plain": 0.42,
}


def table(accuracies):
    return tabulate(
        Score(
            row=row,
            student="convnet",
            accuracy=value,
            validation=value,
            labels="soft",
            split="test",
            steps=1,
            n_counts="seeds",
        )
        for row, value in accuracies.items()
    )


def normalised(alpha):
    return (math.e**alpha - math.e**-1) / (math.e - math.e**-1)


def test_scores_follow_their_definitions_on_fractions():
    found = scores(table(ACCURACIES))
    assert found["ior"] == pytest.approx(0.1)
    assert found["hlr"] == pytest.approx(0.6)
    assert found["lrs"] == pytest.approx(normalised(0.5 * 0.1 - 0.5 * 0.6))
    assert found["ars"] == pytest.approx(normalised(0.5 * 0.1 + 0.5 * 0.03))


@pytest.mark.parametrize(
    ("missing", "unknown"),
    [
        ("random_soft", {"ior", "lrs", "ars"}),
        ("distilled_hard", {"hlr", "lrs"}),
        ("full_data", {"hlr", "lrs"}),
        ("distilled_plain", {"ars"}),
        ("random_plain", {"ars"}),
    ],
)
def test_scores_without_their_controls_are_unknown(missing, unknown):
    found = scores(table({row: value for row, value in ACCURACIES.items() if row != missing}))
    assert {name for name, value in found.items() if value is None} == unknown


@pytest.mark.parametrize(("best", "worst", "score"), [(1.0, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_the_robust_score_lies_between_nothing_and_one(best, worst, score):
    rows = {"distilled": best, "random_soft": worst, "distilled_hard": best, "full_data": worst}
    assert scores(table(rows))["lrs"] == pytest.approx(score)
