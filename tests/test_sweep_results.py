"""What the trials of a sweep show: front, winner, importances; and how that is told."""

import json
from dataclasses import asdict, replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from conftest import TINY

from teddy_ray.recipe import Recipe
from teddy_ray.recipe_file import parse_recipe
from teddy_ray.storage import Storage
from teddy_ray.sweeps.outcome import Ledger, Outcome
from teddy_ray.sweeps.page import to_html, to_table, to_tree, verdicts
from teddy_ray.sweeps.results import Found, Reading, Trial, epochs_saved, front, importances, main_effects, winner

IPC, WEIGHT = "synthesis.images_per_class", "synthesis.ce_weight"


def swept(**sweep: Any) -> Recipe:
    space = {IPC: {"grid": [1, 5]}, WEIGHT: {"grid": [0.1, 0.3, 1.0]}}
    return parse_recipe({**TINY, "sweep": {"space": space, **sweep}})


def trial(number: int, accuracy: float, num_bytes: int = 100, settings: Any = None, **metrics: float) -> Trial:
    values = {"accuracy": accuracy, "bytes": num_bytes, "images": 10, "seconds": 1.0, "std": None, **metrics}
    own = settings or {IPC: 1, WEIGHT: 0.1}
    return Trial(number, own, Outcome(key=str(number), settings=own, state="finished", metrics=values, epochs=8))


def stopped(number: int, accuracy: float, epochs: int) -> Trial:
    own = {IPC: 1, WEIGHT: 0.1}
    metrics = {"accuracy": accuracy}
    return Trial(number, own, Outcome(key=str(number), settings=own, state="stopped", metrics=metrics, epochs=epochs))


def test_the_front_is_what_no_other_trial_is_at_least_as_good_as_in_all() -> None:
    trials = [trial(1, 0.5, 10), trial(2, 0.5, 20), trial(3, 0.7, 20), trial(4, 0.6, 30), trial(5, 0.9, 90)]
    assert [each.number for each in front(trials, ("accuracy", "bytes"))] == [1, 3, 5]
    assert [each.number for each in front([*trials, stopped(6, 1.0, 1)], ("accuracy",))] == [5]


def test_the_front_of_random_points_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    points = rng.integers(0, 6, (60, 2))
    trials = [trial(i, float(x), int(y)) for i, (x, y) in enumerate(points)]
    beaten = [any(a >= x and b <= y and (a > x or b < y) for a, b in points) for x, y in points]
    assert [each.number for each in front(trials, ("accuracy", "bytes"))] == [i for i, b in enumerate(beaten) if not b]


def test_the_winner_is_the_best_by_the_first_objective_then_the_cheaper_one() -> None:
    sweep = swept().sweep
    assert sweep is not None
    best = winner([trial(1, 0.7, 20), trial(2, 0.9, 90), trial(3, 0.9, 80), stopped(4, 0.99, 1)], sweep)
    assert best is not None
    assert best.number == 3
    cheapest = swept(objectives=["bytes", "accuracy"]).sweep
    assert cheapest is not None
    best = winner([trial(1, 0.5, 20), trial(2, 0.9, 20), trial(3, 0.9, 80)], cheapest)
    assert best is not None
    assert best.number == 2
    assert winner([stopped(1, 0.9, 2)], sweep) is None


def a_grid(noise: float = 0.0) -> list[Trial]:
    """Twelve trials in which the weight makes the difference."""
    rng = np.random.default_rng(1)
    trials = []
    for repeat in range(2):
        for ipc in (1, 5):
            for place, weight in enumerate((0.1, 0.3, 1.0)):
                accuracy = 0.5 + 0.1 * place + noise * rng.normal()
                trials.append(trial(len(trials), accuracy, settings={IPC: ipc, WEIGHT: weight}, n=repeat))
    return trials


def test_importance_is_the_share_of_the_variance() -> None:
    """Against an analysis of variance by hand, in float64."""
    sweep, trials = swept().sweep, a_grid(0.05)
    assert sweep is not None
    y = np.array([each.metric("accuracy") for each in trials])
    groups = [y[[each.settings[WEIGHT] == weight for each in trials]] for weight in (0.1, 0.3, 1.0)]
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    total = float(((y - y.mean()) ** 2).sum())
    expected = ((total - within) - 2 * within / (12 - 3)) / total
    found = importances(trials, sweep)
    assert list(found) == [WEIGHT, IPC]
    assert found[WEIGHT] == pytest.approx(expected)
    assert importances(a_grid(), sweep)[WEIGHT] == pytest.approx(1.0)
    assert importances(a_grid(), sweep)[IPC] == 0.0


def test_too_few_trials_show_no_importance() -> None:
    sweep = swept().sweep
    assert sweep is not None
    assert importances(a_grid(0.1)[:7], sweep) == {}
    alone = [trial(i, i / 10, settings={IPC: 5 if i else 1, WEIGHT: 0.1}) for i in range(9)]
    assert importances(alone, sweep) == {}  # one value has a single trial, the other key a single value


def test_ranges_are_cut_into_thirds() -> None:
    recipe = parse_recipe({**TINY, "sweep": {"space": {WEIGHT: {"uniform": [0, 1]}}, "sampler": "random", "trials": 9}})
    trials = [trial(i, 0.1 * (i // 3), settings={WEIGHT: i / 10}) for i in range(9)]
    assert recipe.sweep is not None
    assert importances(trials, recipe.sweep) == {WEIGHT: pytest.approx(1.0)}


def test_main_effects_are_means_over_the_trials_of_a_value() -> None:
    sweep = swept().sweep
    assert sweep is not None
    effects = main_effects(a_grid(), sweep)
    assert effects[WEIGHT] == [
        ("0.1", pytest.approx(0.5), 4),
        ("0.3", pytest.approx(0.6), 4),
        ("1", pytest.approx(0.7), 4),
    ]
    assert effects[IPC] == [("1", pytest.approx(0.6), 6), ("5", pytest.approx(0.6), 6)]


def test_epochs_that_early_stopping_saves() -> None:
    trials, recipe = [trial(1, 0.9), stopped(2, 0.5, 2), stopped(3, 0.6, 4)], swept()
    whole = len(recipe.evaluation.seeds) * recipe.evaluation.epochs
    assert epochs_saved(trials, recipe) == (14, 3 * whole)
    one_student = [replace(each, settings={**each.settings, "evaluation.seeds": [0]}) for each in trials[:1]]
    assert epochs_saved(one_student, recipe) == (8, recipe.evaluation.epochs)


def found_of(trials: list[Trial], **sweep: Any) -> Found:
    return Found(swept(**sweep), trials, 13, {"unit/a": 1, "unit/b": 1, "pool/c": 1}, None)


def test_the_table_ranks_and_marks() -> None:
    trials = [*a_grid(0.05), stopped(12, 0.3, 2)]
    text = to_table(found_of(trials), "runs/tiny")
    rows = [line for line in text.splitlines() if line.startswith("trial")]
    best = max(trials[:12], key=lambda each: each.metric("accuracy"))
    assert rows[0].startswith(f"trial {best.number} ")
    assert rows[0].endswith("winner, front")
    assert "0.3000 after 2 epochs" in rows[-1]
    assert "12 of 13 trials finished, 1 stopped early" in text
    assert f"Trial {best.number} wins by accuracy" in text


def test_a_sweep_by_improvement_shows_it() -> None:
    trials = [trial(1, 0.5, improvement=-0.01), trial(2, 0.4, improvement=0.02)]
    found = found_of(trials, objectives=["improvement"])
    first, second = (line for line in to_table(found, "runs/tiny").splitlines() if line.startswith("trial"))
    assert "+0.0200" in first
    assert first.startswith("trial 2 ")
    assert "-0.0100" in second
    assert "+0.0200" in to_html(found)
    assert "fewer than 8 finished trials" in " ".join(verdicts(found))


def test_every_winner_that_read_the_test_split_is_told() -> None:
    trials = a_grid(0.05)
    best = max(trials, key=lambda each: each.metric("accuracy"))
    before = [Reading({IPC: 1, WEIGHT: 7.0}, 0.25), Reading(best.settings, 0.75)]
    found = replace(found_of(trials), before=before)
    assert found.earlier == before[:1]
    assert to_tree(found)["measured_on_test"] == [asdict(reading) for reading in before]
    assert "others won" in " ".join(verdicts(found))
    assert "0.7500" not in " ".join(verdicts(found))


def test_json_holds_every_trial_and_what_was_made() -> None:
    tree = json.loads(json.dumps(to_tree(found_of([*a_grid(0.05), stopped(12, 0.3, 2)], stopping={"grace_epochs": 2}))))
    assert [each["number"] for each in tree["trials"]] == list(range(13))
    assert tree["trials"][12]["state"] == "stopped"
    assert tree["made"] == {"pool": {"artifacts": 1, "times": 1}, "unit": {"artifacts": 2, "times": 2}}
    assert tree["student_epochs"] == {
        "trained": 12 * 8 + 2,
        "without_stopping": 13 * len(swept().evaluation.seeds) * swept().evaluation.epochs,
    }
    assert tree["winner"]["validation"] == max(each["metrics"]["accuracy"] for each in tree["trials"])


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_draws_every_finished_trial_in_each_plot() -> None:
    trials = a_grid(0.05)
    for i, each in enumerate(trials):
        assert each.outcome is not None
        each.outcome.metrics.update(bytes=1000 * (i + 1), seconds=10.0 + i, images=10 * each.settings[IPC])  # type: ignore[attr-defined]
    tags = _Tags(to_html(found_of([*trials, stopped(12, 0.3, 2)]))).found
    circles = [attributes["class"] for tag, attributes in tags if tag == "circle"]
    assert len(circles) == 3 * 12
    assert circles.count("winner") == 3
    lines = [attributes["class"] for tag, attributes in tags if tag == "polyline"]
    assert len([style for style in lines if style != "edge"]) == 12
    assert not [attributes for tag, attributes in tags if tag in ("script", "link", "img")]


def test_a_sweep_without_finished_trials_has_a_page_too() -> None:
    found = found_of([stopped(1, 0.3, 2)])
    assert "there is no winner" in to_html(found)
    assert to_tree(found)["winner"] is None


def test_the_ledger_keeps_what_is_over_and_forgets_what_had_begun(tmp_path: Any) -> None:
    ledger = Ledger(Storage(str(tmp_path)), "runs/tiny")
    done = trial(1, 0.5).outcome
    assert done is not None
    ledger.begin(1, done.settings)
    ledger.begin(2, {IPC: 5, WEIGHT: 0.3})
    ledger.write(1, done)
    assert ledger.read() == [(1, done)]
    assert ledger.begun() == [{IPC: 5, WEIGHT: 0.3}]
    ledger.write(3, Outcome(key="2", settings={}, state="failed", metrics={}, epochs=0, reason="a loss"))
    (tmp_path / "runs/tiny/trials/other.json").write_text("{}")
    (tmp_path / "runs/tiny/trials/broken.json").write_text("{")
    ledger.write(12, done)  # drawn again
    assert ledger.read() == [(1, done), (12, done)]
