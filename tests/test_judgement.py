"""The one rule by which accuracies are called better."""

import statistics
from types import SimpleNamespace

import pytest
from scipy import stats

from teddy_ray.judgement import controls_of, judge


def sample(*accuracies):
    std = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return SimpleNamespace(mean=statistics.fmean(accuracies), std=std, n=len(accuracies))


def test_the_interval_is_that_of_welch():
    first, second = (0.91, 0.93, 0.90), (0.85, 0.88, 0.80, 0.84)
    found = judge(sample(*first), sample(*second), num_test=10_000)
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert found.gain - found.half_width == pytest.approx(interval.low)
    assert found.gain + found.half_width == pytest.approx(interval.high)
    assert found.word == "better"
    assert judge(sample(*second), sample(*first), num_test=10_000).word == "worse"


def test_two_standard_errors_of_three_students_are_not_enough():
    first, second = (0.91, 0.92, 0.93), (0.895, 0.90, 0.905)
    error = (0.01**2 / 3 + 0.005**2 / 3) ** 0.5
    assert statistics.fmean(first) - statistics.fmean(second) > 2 * error
    assert judge(sample(*first), sample(0.88, 0.90, 0.92), num_test=10_000).word == "no better"
    assert judge(sample(0.915, 0.92, 0.955), sample(*second), num_test=10_000).word == "no better"


def test_one_student_allows_no_judgement():
    assert judge(sample(0.9), sample(0.1, 0.2), num_test=100) is None
    assert judge(sample(0.8, 0.9), sample(0.1), num_test=100) is None


@pytest.mark.parametrize(("gain", "word"), [(0.001, "no better"), (0.0, "no better"), (-0.2, "worse"), (0.2, "better")])
def test_without_spread_a_test_image_is_the_least_error(gain, word):
    found = judge(sample(*[0.5 + gain] * 3), sample(0.5, 0.5, 0.5), num_test=360)
    assert found.word == word
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 4) / 360)


def test_controls_have_the_same_labels_and_budget():
    assert [control for control, _ in controls_of("distilled@900")] == ["random_soft@900", "start_soft@900"]
    assert [control for control, _ in controls_of("distilled_hard")] == ["random_hard", "start_hard"]
    assert list(controls_of("random_soft")) == []
