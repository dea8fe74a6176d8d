import dataclasses
import math

import pytest

from teddy_ray.records import Row, Score, tabulate
from teddy_ray.rows import ROWS

SCORE = {
    "row": "distilled",
    "student": "convnet",
    "accuracy": 0.5,
    "validation": 0.6,
    "labels": "soft",
    "split": "test",
    "steps": 120,
    "n_counts": "student seeds on one set",
}
ROW = {
    "mean": 0.5,
    "std": None,
    "n": 1,
    "n_counts": "student seeds",
    "labels": "soft",
    "split": "test",
    "student": "convnet",
    "student_steps": 120,
    "validation": 0.6,
}


def scores(accuracies, **changes):
    return [Score(**{**SCORE, "accuracy": accuracy, **changes}) for accuracy in accuracies]


@pytest.mark.parametrize("missing", SCORE)
def test_a_score_cannot_be_built_without(missing):
    with pytest.raises(TypeError, match=missing):
        Score(**{key: value for key, value in SCORE.items() if key != missing})


@pytest.mark.parametrize("missing", ROW)
def test_a_row_cannot_be_built_without(missing):
    with pytest.raises(TypeError, match=missing):
        Row(**{key: value for key, value in ROW.items() if key != missing})


def test_a_row_says_split_labels_student_steps_draws_and_that_the_last_epoch_counts():
    row = dataclasses.asdict(tabulate(scores([0.25, 0.5]))["distilled"])
    expected = {
        "n": 2,
        "n_counts": "student seeds on one set",
        "labels": "soft",
        "split": "test",
        "student": "convnet",
        "student_steps": 120,
        "epoch": "last",
    }
    assert expected.items() <= row.items()


def test_mean_and_sample_standard_deviation():
    accuracies = [0.9, 0.8, 0.85, 0.65]
    mean = sum(accuracies) / 4
    row = tabulate(scores(accuracies))["distilled"]
    assert row.mean == pytest.approx(mean, rel=1e-12)
    assert row.std == pytest.approx(math.sqrt(sum((a - mean) ** 2 for a in accuracies) / 3), rel=1e-12)
    assert row.n == 4


def test_one_student_has_no_standard_deviation():
    row = tabulate(scores([0.75]))["distilled"]
    assert row.std is None
    assert str(row) == "0.7500"


def test_a_row_reads_as_mean_and_standard_deviation():
    assert str(tabulate(scores([0.5, 0.5]))["distilled"]) == "0.5000 ± 0.0000"


def test_what_n_counts_is_said_by_the_scores():
    assert tabulate(scores([0.1, 0.2], n_counts="draws"))["distilled"].n_counts == "draws"


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ("distilled", "student seeds on one set"),
        ("start_soft", "student seeds on one set"),
        ("random_soft", "random draws, one student each"),
        ("random_hard", "random draws, one student each"),
        ("full_data", "student seeds"),
    ],
)
def test_every_row_of_the_table_knows_what_its_n_counts(row, counts):
    assert ROWS[row].n_counts == counts


def test_further_students_have_rows_of_their_own():
    table = tabulate(
        [*scores([0.5, 0.7]), *scores([0.1], row="full_data"), *scores([0.2, 0.4], student="resnet18")],
    )
    assert {name: row.student for name, row in table.items()} == {
        "distilled": "convnet",
        "full_data": "convnet",
        "distilled/resnet18": "resnet18",
    }
    assert table["distilled"].mean == pytest.approx(0.6)
    assert table["distilled/resnet18"].mean == pytest.approx(0.3)


@pytest.mark.parametrize("change", [{"labels": "hard"}, {"split": "validation"}, {"steps": 7}])
def test_scores_under_unlike_conditions_are_never_averaged(change):
    with pytest.raises(AssertionError):
        tabulate([*scores([0.5]), *scores([0.6], **change)])
