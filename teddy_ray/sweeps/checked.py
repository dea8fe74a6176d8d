"""A sweep whose input has been checked: what every trial comes to, and which of them are over already."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from teddy_ray import flow
from teddy_ray.errors import InputError, Problem
from teddy_ray.given import GivenBase
from teddy_ray.plan import Plan
from teddy_ray.progress import Progress
from teddy_ray.publication import check_run_folder, identity_of
from teddy_ray.recipe import Data, Recipe, Sweep, result_fields
from teddy_ray.recipe_file import set_key
from teddy_ray.sources import Source, open_source
from teddy_ray.storage import Storage, sha256, to_json
from teddy_ray.sweeps.outcome import Ledger, Outcome, key_of, measure
from teddy_ray.sweeps.results import Reading, Trial
from teddy_ray.sweeps.space import Settings, drawn_of, ends, enumerated, merged, sweep_of, trial_recipe, with_settings

TREE = "sweep.json"
"""By which the folder of a sweep is known."""


@dataclass
class Checked:
    """plans: of the trials that are known, by number; where Optuna draws them, of the ends of the space.

    settings: of the trials by number; None where Optuna draws them. done: those that are over.
    """

    recipe: Recipe
    storage: Storage
    sources: Mapping[Data, Source]
    plans: Mapping[int, Plan]
    settings: Mapping[int, Settings] | None
    given: GivenBase | None
    done: dict[int, Trial] = field(default_factory=dict)

    @property
    def sweep(self) -> Sweep:
        return sweep_of(self.recipe)

    @property
    def folder(self) -> str:
        return f"runs/{self.recipe.name}"

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.storage, self.folder)

    @property
    def num_trials(self) -> int:
        return self.sweep.trials or 0 if self.settings is None else len(self.settings)

    @cached_property
    def measured(self) -> list[Reading]:
        """Winners that earlier commands measured on the test split."""
        if identity_of(self.storage, f"{self.folder}/{TREE}") != self.identity:
            return []
        tree = json.loads(self.storage.read(f"{self.folder}/{TREE}"))
        return [Reading(**reading) for reading in tree.get("measured_on_test", [])]

    @property
    def first(self) -> tuple[Plan, Source]:
        """Of any of the trials."""
        return next(iter(self.plans.values())), next(iter(self.sources.values()))

    @property
    def identity(self) -> str:
        """Of what the trials are made of and measured by; other values of the same keys make it no other sweep."""
        sweep = self.sweep
        fields = result_fields(trial_recipe(self.recipe, {}, "sweep"))
        for key in sweep.space:
            set_key(fields, key, None)
        measured = [sweep.objectives, sweep.stopping and sweep.stopping.model_dump(mode="json")]
        images = [(plan.data.train, plan.data.validation) for plan in self.plans.values()]
        return sha256(to_json([fields, sorted(sweep.space), measured, min(images)]).encode())[:32]

    def plan(self, settings: Settings) -> Plan:
        """Of a trial with these settings."""
        recipe = trial_recipe(self.recipe, settings, f"{self.recipe.name}-trial")
        source = self.sources.get(recipe.data)
        return flow.prepare(recipe, source=source, split="validation", storage=self.storage, given=self.given).plan


def prepare(recipe: Recipe, progress: Progress) -> Checked:
    """Check the input of every trial, and find those that are over. Starts no Ray, writes nothing.

    Raises InputError with every problem found.
    """
    from teddy_ray.sweeps.tuning import check_packages

    sweep = sweep_of(recipe)
    if problems := list(check_packages(sweep)):
        raise InputError(problems)
    drawn = sweep.sampler == "optuna"
    tried = dict(enumerate(ends(recipe) if drawn else enumerated(recipe), start=1))
    storage = Storage(recipe.storage)
    with _collect(problems):
        storage.check_writable()
        check_run_folder(storage, recipe.name, mark=TREE, what="sweep")
    with _collect(problems):
        check_run_folder(storage, winner_name(recipe))
    sources, plans, found, given = dict[Data, Source](), dict[int, Plan](), list[Problem](), None
    for number, settings in tried.items():
        with _collect(found):
            own = trial_recipe(recipe, settings, f"{recipe.name}-trial-{number}")
            if own.data not in sources:
                sources[own.data] = open_source(own.data, progress.say)
            source = sources[own.data]
            prepared = flow.prepare(own, progress.say, source, split="validation", storage=storage, given=given)
            plans[number], given = prepared.plan, prepared.given or given
            # any of them may win, and be run with all students and controls
            whole = with_settings(recipe, settings).model_copy(update={"name": winner_name(recipe)})
            flow.prepare(whole, source=source, storage=storage, given=given)
    if len({plan.data.validation for plan in plans.values()}) > 1:
        remedy = "leave out the keys of data that change which images trials are measured on"
        found.append(Problem("sweep.space", [key for key in sweep.space if key.startswith("data.")], remedy))
    if problems := [*problems, *merged(found, len(tried))]:
        raise InputError(problems)
    checked = Checked(recipe, storage, sources, plans, None if drawn else tried, given)
    checked.done = _done(checked)
    return checked


def preview(recipe: Recipe, progress: Progress) -> str:
    """What a sweep comes to, in a line; Optuna's is known when it has drawn. Raises InputError as `prepare` does."""
    checked = prepare(recipe, progress)
    line = f"sweep: {checked.num_trials} trials, {len(checked.done)} of them over"
    if checked.settings is None:
        return f"{line}; what is made for them follows from what Optuna draws"
    plans = list(checked.plans.values())
    work = {
        "pools": {plan.pool for plan in plans},
        "statistics": {plan.statistics for plan in plans},
        "labelled sets": {plan.stages()["labels"] for plan in plans},
        "units": {unit.fingerprint for plan in plans for unit in plan.units()},
        "students": {run.fingerprint for plan in plans for run in plan.students},
    }
    return f"{line}; all together: {', '.join(f'{len(keys):,} {kind}' for kind, keys in work.items())}"


def winner_name(recipe: Recipe) -> str:
    """What the run of the winner is called."""
    return f"{recipe.name}-winner"


def in_order(plans: Mapping[int, Plan]) -> list[int]:
    """Numbers of trials as they should begin: of each pool one, then of each another; so pools are made at a time."""
    places: dict[str, list[int]] = {}
    for number, plan in plans.items():
        places.setdefault(plan.pool, []).append(number)
    rounds = itertools.zip_longest(*places.values())
    return [number for of_pools in rounds for number in of_pools if number is not None]


def free_numbers(trials: Collection[int]) -> Iterator[int]:
    """Numbers that no trial has."""
    taken = set(trials)
    return (number for number in itertools.count(1) if number not in taken)


def _done(checked: Checked) -> dict[int, Trial]:
    """Trials that are over, by their ledger or, whatever sweep or run made them, by their artifacts."""
    entries, sweep, done = checked.ledger.read(), checked.sweep, dict[int, Trial]()
    if checked.settings is None:
        for number, outcome in entries:
            if drawn_of(checked.recipe, outcome.settings) is not None and _is_of(checked, outcome):
                own = number if number not in done else next(free_numbers(done))  # the space was another in between
                done[own] = Trial(own, outcome.settings, outcome)
        return done
    known = {outcome.key: outcome for _, outcome in entries}
    for number, plan in checked.plans.items():
        settings = checked.settings[number]
        found = known.get(key_of(plan, sweep))
        if found is None and flow.is_finished(plan, checked.storage):
            found = measure(plan, checked.storage, sweep, settings)
        if found is not None:
            done[number] = Trial(number, settings, found)
    return done


def _is_of(checked: Checked, outcome: Outcome) -> bool:
    """Whether a trial of the recipe as it is now would come out so; it may have been edited since."""
    try:
        return key_of(checked.plan(outcome.settings), checked.sweep) == outcome.key
    except InputError:
        return False


@contextlib.contextmanager
def _collect(problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        problems += error.problems
