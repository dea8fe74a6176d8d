"""Methods side by side: every run of a comparison, one after another, and its tables after each of them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from teddy_ray import flow
from teddy_ray.comparison.beside import DataShape
from teddy_ray.comparison.checks import data_problems
from teddy_ray.comparison.page import to_html, to_json_tree, to_markdown
from teddy_ray.comparison.results import result_tables
from teddy_ray.comparison.runs import Layout, merge_problems
from teddy_ray.errors import InputError, Problem, StageError
from teddy_ray.plan import Plan
from teddy_ray.progress import Progress
from teddy_ray.publication import check_run_folder, identity_of, move_aside
from teddy_ray.recipe import Data, Recipe
from teddy_ray.sources import Source
from teddy_ray.stages.session import Session, check_local_resources, cluster_address
from teddy_ray.storage import Storage, sha256, to_json
from teddy_ray.summary import read_summary

MARKDOWN, PAGE, TREE = "compare.md", "compare.html", "compare.json"
"""What runs/<name>/ holds."""


@dataclass
class Checked:
    """A comparison whose input has been checked."""

    layout: Layout
    storage: Storage
    plans: Mapping[str, Plan]
    sources: Mapping[Data, Source]

    @property
    def folder(self) -> str:
        return f"runs/{self.layout.comparison.name}"

    @property
    def identity(self) -> str:
        """Of all that the runs evaluate."""
        return sha256("".join(plan.evaluation for plan in self.plans.values()).encode())[:32]


def prepare(layout: Layout, progress: Progress) -> Checked:
    """Check the input of every run. Starts no Ray, writes nothing. Raises InputError with every problem found."""
    storage = Storage(layout.comparison.storage)
    own: list[Problem] = []
    try:
        check_run_folder(storage, layout.comparison.name, mark=TREE, what="comparison")
    except InputError as error:
        own += error.problems
    problems: dict[str, list[Problem]] = {}
    plans: dict[str, Plan] = {}
    sources: dict[Data, Source] = {}
    for run in layout.runs:
        found = problems.setdefault(run.name.removesuffix(f"-seed{run.seed}"), [])
        try:
            plan, source = _prepare_run(run, sources.get(run.data), progress)
        except InputError as error:
            found += error.problems
            continue
        plans[run.name], sources[run.data] = plan, source
    if own or any(problems.values()):
        raise InputError([*own, *merge_problems(problems)])
    if unequal := list(data_problems(layout, plans)):
        raise InputError(unequal)
    return Checked(layout, storage, plans, sources)


def compare(layout: Layout, progress: Progress) -> tuple[str, Mapping[str, str]]:
    """Run what is missing, and write the tables after each run. Returns them as Markdown, and why which runs failed."""
    checked = prepare(layout, progress)
    summaries = {run.name: summary for run in layout.runs if (summary := _finished(checked, run)) is not None}
    failures: dict[str, str] = {}
    num = len(layout.runs)
    progress.say(f"{num} runs, {len(summaries)} of them finished; {checked.storage.display(checked.folder)}/{PAGE}")
    _make_room(checked, progress)
    try:
        text = _write(checked, summaries, failures)
        with _one_ray(checked, [run for run in layout.runs if run.name not in summaries], progress):
            for index, run in enumerate(layout.runs, start=1):
                if run.name in summaries:
                    continue
                progress.say(f"\nrun {index} of {num}: {run.name}")
                try:
                    summaries[run.name] = flow.distill(run, progress, checked.sources[run.data]).to_dict()
                except (StageError, InputError) as error:  # the others may be finished all the same
                    failures[run.name] = "; ".join(str(error).splitlines())
                    progress.say(f"failed: run {run.name}: {failures[run.name]}")
                text = _write(checked, summaries, failures)
    finally:
        checked.storage.close_session()
    return text, failures


def _prepare_run(run: Recipe, source: Source | None, progress: Progress) -> tuple[Plan, Source]:
    prepared = flow.prepare(run, progress.say, source)
    if not flow.is_finished(prepared.plan, prepared.storage):
        check_local_resources(run)
    return prepared.plan, prepared.source


def _finished(checked: Checked, run: Recipe) -> dict[str, Any] | None:
    """The summary of a run that stands in runs/ as it would come out now."""
    summary = read_summary(checked.storage, run.name)
    if summary is None:
        return None
    stages = {stage: facts["fingerprint"] for stage, facts in summary["stages"].items()}
    wanted = {key for cell in checked.layout.cells.values() for owner, key in cell.sources() if owner.name == run.name}
    is_whole = stages == checked.plans[run.name].stages() and wanted <= summary["accuracy"].keys()
    return summary if is_whole else None


@contextlib.contextmanager
def _one_ray(checked: Checked, missing: list[Recipe], progress: Progress) -> Iterator[None]:
    """One Ray of this machine for all runs, for each that starts its own takes seconds. A cluster is joined by each
    run, which asks it for what that run needs. A run whose stages are all stored needs no Ray to be published."""
    missing = [run for run in missing if not flow.is_finished(checked.plans[run.name], checked.storage)]
    if not missing or any(cluster_address(run) is not None for run in missing):
        yield
        return
    for name in ("ray.train", "ray.data"):  # before Ray starts, which quietens their loggers: they set them up anew
        importlib.import_module(name)
    first = missing[0]
    host = Session(checked.plans[first.name], checked.sources[first.data], checked.storage, progress)
    with contextlib.closing(host):
        host.start()
        yield


def _make_room(checked: Checked, progress: Progress) -> None:
    """Tables of other runs under this name are kept under a name of their own."""
    theirs = identity_of(checked.storage, f"{checked.folder}/{TREE}")
    if theirs not in (None, checked.identity):
        move_aside(checked.storage, checked.folder, theirs, what="another comparison", progress=progress)


def _write(checked: Checked, summaries: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str]) -> str:
    storage, folder, layout = checked.storage, checked.folder, checked.layout
    tables = result_tables(layout, summaries, {run.name: _shape(checked, run) for run in layout.runs}, failures)
    text = to_markdown(layout, tables, summaries, failures)
    tree = {"identity": checked.identity, **to_json_tree(layout, tables, summaries, failures)}
    storage.write(f"{folder}/{TREE}", to_json(tree).encode())  # first: it is what makes the folder ours
    storage.write(f"{folder}/{MARKDOWN}", text.encode())
    storage.write(f"{folder}/{PAGE}", to_html(layout, tables, summaries, failures).encode())
    return text


def _shape(checked: Checked, run: Recipe) -> DataShape:
    source, data = checked.sources[run.data], run.data
    num_train = len(source.train) + len(source.validation)
    return DataShape(len(source.classes), num_train, len(source.test), data.image_size, data.channels)
