"""What a sweep shows, as a table, as a page that works offline, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from teddy_ray.recipe_file import dump_recipe
from teddy_ray.report import size
from teddy_ray.summary import REPORT
from teddy_ray.sweeps.plots import charts, parallel
from teddy_ray.sweeps.results import (
    LEAST_TRIALS,
    MODES,
    Found,
    Trial,
    epochs_saved,
    importances,
    main_effects,
    text_of,
    words_of,
)
from teddy_ray.tables import align

FRONT = "none is as good in {} and better in one"


def to_tree(found: Found) -> dict[str, Any]:
    """sweep.json"""
    best = found.winner
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
        **_stopping_tree(found),
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
        "measured_on_test": [asdict(reading) for reading in found.readings],
    }


def _stopping_tree(found: Found) -> dict[str, Any]:
    if found.sweep.stopping is None:
        return {}
    trained, whole = epochs_saved(found.trials, found.recipe)
    return {"student_epochs": {"trained": trained, "without_stopping": whole}}


def to_table(found: Found, display: str) -> str:
    """What the command prints. display: the folder of the sweep."""
    keys = list(found.sweep.space)
    header = ("", *(key.rpartition(".")[2] for key in keys), *_columns(found), "")
    marks = _marks(found)
    rows = [
        (
            f"trial {trial.number}",
            *(text_of(trial.settings[key]) for key in keys),
            *_cells(found, trial),
            marks[trial.number],
        )
        for trial in _ranked(found)
    ]
    lines = ["", f"{found.recipe.name}: {_state(found)}", "", align([header, *rows]), ""]
    lines += [f"front: {FRONT.format(' and '.join(found.weighed))}", ""] if found.front else []
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
    of_best = f"Trial {best.number} wins by {found.sweep.objectives[0]}: {words_of(best.settings)}."
    yield f"{of_best} Validation accuracy {best.metric('accuracy'):.4f}, the best of {len(found.in_state('finished'))}."
    if found.summary is not None:
        test = found.summary.accuracy["distilled"]
        random = found.summary.accuracy.get("random_soft")
        lead = f"; random real images under the same labels {random}" if random else ""
        yield (
            f"On the test split, which winners alone read: {test} (n = {test.n}, {test.student_steps:,} "
            f"student steps){lead}. The best of many is lucky, too: validation promises more than it keeps."
        )
    if found.earlier:
        named = "; ".join(f"{words_of(each.settings)}: {each.accuracy:.4f}" for each in found.earlier)
        yield f"Before trials were added, others won, and were measured on it, too: {named}."
    if shares := importances(found.trials, found.sweep):
        named = ", ".join(f"{key} {share:.2f}" for key, share in shares.items())
        yield f"Share of the variance of {found.sweep.objectives[0]} that a key explains by itself: {named}."
    elif len(found.in_state("finished")) < LEAST_TRIALS:
        yield f"Which keys matter is not told of fewer than {LEAST_TRIALS} finished trials."
    if found.sweep.stopping is not None:
        trained, whole = epochs_saved(found.trials, found.recipe)
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
        charts=list(charts(found)),
        parallel=parallel(found),
        effects=main_effects(found.trials, found.sweep),
        shares=importances(found.trials, found.sweep),
        keys=list(found.sweep.space),
        ranked=_ranked(found),
        marks=_marks(found),
        columns=_columns(found),
        cells=_cells,
        front=FRONT.format(" and ".join(found.weighed)),
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


def _columns(found: Found) -> list[str]:
    """Of what was measured."""
    lead = ["improvement"] if "improvement" in found.sweep.objectives else []
    return ["validation accuracy", *lead, "images", "bytes", "worker s"]


def _cells(found: Found, trial: Trial) -> list[str]:
    """One for each of the columns."""
    outcome, rest = trial.outcome, [""] * (len(_columns(found)) - 1)
    if outcome is None:
        return ["not over", *rest]
    metrics = outcome.metrics
    if outcome.state == "failed":
        return ["failed", *rest]
    if outcome.state == "stopped":
        return [f"{metrics['accuracy']:.4f} after {outcome.epochs} epochs", *rest]
    spread = f" ± {metrics['std']:.4f}" if metrics["std"] is not None else ""
    lead = [f"{trial.metric('improvement'):+.4f}"] if "improvement" in found.sweep.objectives else []
    return [
        f"{metrics['accuracy']:.4f}{spread}",
        *lead,
        f"{metrics['images']:,}",
        f"{metrics['bytes']:,}",
        f"{metrics['seconds']:,.0f}",
    ]


def _marks(found: Found) -> dict[int, str]:
    """What stands behind a trial."""
    ahead, best = {trial.number for trial in found.front}, found.winner
    return {
        trial.number: ", ".join(["winner"] * (trial is best) + ["front"] * (trial.number in ahead))
        for trial in found.trials
    }
