"""A sweep: the trials that are missing, what they show, and the winner on the test split."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from dataclasses import replace

import ray

from teddy_ray import flow
from teddy_ray.progress import Progress
from teddy_ray.publication import identity_of, move_aside
from teddy_ray.recipe import Recipe
from teddy_ray.recipe_file import dump_recipe
from teddy_ray.stages.session import Session, check_local_resources
from teddy_ray.storage import to_json
from teddy_ray.summary import REPORT, Summary
from teddy_ray.sweeps.checked import TREE, Checked, free_numbers, in_order, prepare, winner_name
from teddy_ray.sweeps.hub import Hub
from teddy_ray.sweeps.outcome import Outcome, key_of
from teddy_ray.sweeps.page import to_html, to_table, to_tree
from teddy_ray.sweeps.results import Found, Trial, text_of, winner
from teddy_ray.sweeps.space import Settings, drawn_of, with_settings
from teddy_ray.sweeps.trial import Job

WINNER = "winner.yaml"

MOST_AT_ONCE = 8
"""Trials, each of which has processes of its own besides its workers."""


def sweep(recipe: Recipe, progress: Progress) -> tuple[str, Mapping[int, str]]:
    """Run the trials that are missing, publish what they show, evaluate the winner on the test split.

    Returns the table, and why which trials failed.
    """
    checked = prepare(recipe, progress)
    storage, trials = checked.storage, dict(checked.done)
    missing = checked.num_trials - len(trials)
    if missing > 0:
        for plan in checked.plans.values():
            check_local_resources(plan.recipe)
    _make_room(checked, progress)
    _write(checked, trials, {}, None)  # before the ledger: a folder without it is not ours to go on with
    for trial in trials.values():
        if trial.outcome is not None:
            checked.ledger.write(trial.number, trial.outcome)
    progress.say(f"{checked.num_trials} trials, {len(trials)} of them over")
    progress.say(f"report: {storage.display(checked.folder)}/{REPORT}")
    made: Mapping[str, int] = {}
    try:
        with contextlib.closing(Session(*checked.first, storage, progress)) as host:
            if missing > 0:
                made = _run(checked, trials, host, progress)
                _write(checked, trials, made, None)
            over = sum(trial.outcome is not None for trial in trials.values())
            summary = None
            if over == checked.num_trials:
                summary = _evaluate(checked, winner(_in_order(trials), checked.sweep), progress)
            else:
                progress.say(f"{over} of {checked.num_trials} trials are over; the winner is known when all are")
        found = _write(checked, trials, made, summary)
    finally:
        storage.close_session()
    failed = {trial.number: trial.outcome.reason for trial in found.in_state("failed") if trial.outcome}
    return to_table(found, storage.display(checked.folder)), failed


def _run(checked: Checked, trials: dict[int, Trial], host: Session, progress: Progress) -> Mapping[str, int]:
    """Run the trials that are missing. Returns how often each artifact was made."""
    for name in ("ray.train", "ray.data"):  # before Ray starts, which quietens their loggers: they set them up anew
        importlib.import_module(name)
    from teddy_ray.sweeps.tuning import Watcher, rungs_of, tune_trials

    recipe, storage, ledger, settings = checked.recipe, checked.storage, checked.ledger, checked.settings
    history = [trial.outcome for trial in trials.values() if trial.outcome is not None]
    if settings is not None:
        order = in_order({number: plan for number, plan in checked.plans.items() if number not in trials})
        settings = {number: settings[number] for number in order}
    for plan in checked.plans.values():
        if checked.given is not None and not storage.has("pool", plan.pool):
            checked.given.publish(plan, checked.first[1].validation, storage)
    host.start()
    fit, wanted = max(1, host.nodes.room(recipe.synthesis)), checked.sweep.at_once
    given = None if checked.given is None else replace(checked.given, model=None)  # it is published
    sources = {data: ray.put(source) for data, source in checked.sources.items()}
    job = Job(recipe, sources, storage, given, rungs_of(recipe), Hub.open())

    def begin(number: int, own: Settings) -> None:
        trials[number] = Trial(number, own, None)
        if settings is None:
            ledger.begin(number, own)
        progress.say(f"trial {number} begins: {', '.join(f'{key} {text_of(value)}' for key, value in own.items())}")

    def end(number: int, outcome: Outcome) -> None:
        if not outcome.key and outcome.state == "stopped":
            outcome = replace(outcome, key=key_of(checked.plan(outcome.settings), checked.sweep))
        trials[number] = Trial(number, outcome.settings, outcome)
        ledger.write(number, outcome)
        progress.say(f"trial {number} {_came_out(outcome)}", state=outcome.state, **outcome.metrics)
        _write(checked, trials, watcher.made, None)

    with (
        # the trials ask no autoscaler: each would take back what another had asked for
        host.hiring(recipe.synthesis, at_most=sum(plan.num_units for plan in checked.plans.values())) as hiring,
        progress.stage("sweep", checked.num_trials, "trials") as bar,
    ):
        watcher = Watcher(job, progress, bar, len(history), free_numbers(trials), begin, end, on_step=hiring)
        tune_trials(
            job,
            settings,
            num_trials=checked.num_trials - len(history),
            at_once=(MOST_AT_ONCE if hiring.scales else min(fit, MOST_AT_ONCE)) if wanted == "auto" else wanted,
            history=history,
            begun=[own for own in ledger.begun() if drawn_of(recipe, own) is not None] if settings is None else [],
            watcher=watcher,
        )
        watcher.show()
    return watcher.made


def _evaluate(checked: Checked, best: Trial | None, progress: Progress) -> Summary | None:
    """Run the winner's recipe as any other run: with all students and controls, on the test split."""
    if best is None:
        return None
    recipe = with_settings(checked.recipe, best.settings)
    recipe = recipe.model_copy(update={"name": winner_name(recipe), "sweep": None})
    checked.storage.write(f"{checked.folder}/{WINNER}", dump_recipe(recipe).encode())
    progress.say(f"trial {best.number} wins; its recipe is measured on the test split now")
    return flow.distill(recipe, progress, checked.sources.get(recipe.data))


def _came_out(outcome: Outcome) -> str:
    metrics = outcome.metrics
    if outcome.state == "finished":
        return f"finished: validation accuracy {metrics['accuracy']:.4f}, {metrics['images']:,} images"
    if outcome.state == "stopped":
        return f"stopped early: validation accuracy {metrics['accuracy']:.4f} after {outcome.epochs} epochs"
    return f"failed: {outcome.reason}"


def _make_room(checked: Checked, progress: Progress) -> None:
    """What stands there of another sweep is kept under a name of its own."""
    theirs = identity_of(checked.storage, f"{checked.folder}/{TREE}")
    if theirs not in (None, checked.identity):
        move_aside(checked.storage, checked.folder, theirs, marks=[TREE], what="another sweep", progress=progress)


def _in_order(trials: Mapping[int, Trial]) -> list[Trial]:
    return [trials[number] for number in sorted(trials)]


def _write(checked: Checked, trials: Mapping[int, Trial], made: Mapping[str, int], summary: Summary | None) -> Found:
    storage, folder = checked.storage, checked.folder
    found = Found(checked.recipe, _in_order(trials), checked.num_trials, made, summary, checked.measured)
    # first: it is what makes the folder ours
    storage.write(f"{folder}/{TREE}", to_json({"identity": checked.identity, **to_tree(found)}).encode())
    storage.write(f"{folder}/{REPORT}", to_html(found).encode())
    return found
