"""Methods side by side: every run of a comparison, one after another, and its tables after each of them."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from teddy_ray import flow
from teddy_ray.comparison.page import to_html, to_json_tree, to_markdown
from teddy_ray.comparison.results import DataFacts, ResultTable, result_tables
from teddy_ray.comparison.runs import Layout, merge_problems
from teddy_ray.errors import InputError, Problem, StageError
from teddy_ray.plan import Plan
from teddy_ray.progress import Progress
from teddy_ray.recipe import Data, Recipe
from teddy_ray.sources import Source
from teddy_ray.stages.session import Session, check_local_resources, cluster_address
from teddy_ray.storage import Storage, sha256, to_json
from teddy_ray.summary import read_summary

MARKDOWN, PAGE, TREE = "compare.md", "compare.html", "compare.json"
"""What runs/<name>/ holds."""


@dataclass
class Prepared:
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


def prepare(layout: Layout, progress: Progress) -> Prepared:
    """Check the input of every run. Starts no Ray, writes nothing. Raises InputError with every problem found."""
    storage = Storage(layout.comparison.storage)
    own = list(_folder_problems(storage, f"runs/{layout.comparison.name}"))
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
    return Prepared(layout, storage, plans, sources)


def compare(layout: Layout, progress: Progress) -> str:
    """Run what is missing, write the tables after each run, and return them as Markdown."""
    prepared = prepare(layout, progress)
    summaries = {run.name: summary for run in layout.runs if (summary := _finished(prepared, run)) is not None}
    num = len(layout.runs)
    progress.say(f"{num} runs, {len(summaries)} of them finished; {prepared.storage.display(prepared.folder)}/{PAGE}")
    _make_room(prepared, progress)
    try:
        text = _write(prepared, summaries)
        with _one_ray(prepared, [run for run in layout.runs if run.name not in summaries], progress):
            for index, run in enumerate(layout.runs, start=1):
                if run.name in summaries:
                    continue
                progress.say(f"\nrun {index} of {num}: {run.name}")
                summaries[run.name] = _distill(run, prepared.sources[run.data], progress)
                text = _write(prepared, summaries)
    finally:
        prepared.storage.close_session()
    return text


def _prepare_run(run: Recipe, source: Source | None, progress: Progress) -> tuple[Plan, Source]:
    prepared = flow.prepare(run, progress.say, source)
    plan, storage = prepared.plan, prepared.storage
    if not all(storage.has(stage, fingerprint) for stage, fingerprint in plan.stages().items()):
        check_local_resources(run)
    return plan, prepared.source


def _distill(run: Recipe, source: Source, progress: Progress) -> dict[str, Any]:
    try:
        return flow.distill(run, progress, source).to_dict()
    except StageError as error:
        raise StageError(f"run {run.name}: {error.stage}", error.item, error.reason) from error


def _finished(prepared: Prepared, run: Recipe) -> dict[str, Any] | None:
    """The summary of a run that stands in runs/ as it would come out now."""
    summary = read_summary(prepared.storage, run.name)
    if summary is None:
        return None
    stages = {stage: facts["fingerprint"] for stage, facts in summary["stages"].items()}
    wanted = {key for cell in prepared.layout.cells.values() for owner, key in cell.sources() if owner.name == run.name}
    is_whole = stages == prepared.plans[run.name].stages() and wanted <= summary["accuracy"].keys()
    return summary if is_whole else None


@contextlib.contextmanager
def _one_ray(prepared: Prepared, missing: list[Recipe], progress: Progress) -> Iterator[None]:
    """One Ray of this machine for all runs, for each that starts its own takes seconds. A cluster is joined by each
    run, which asks it for what that run needs."""
    if not missing or any(cluster_address(run) is not None for run in missing):
        yield
        return
    for name in ("ray.train", "ray.data"):  # before Ray starts, which quietens their loggers: they set them up anew
        importlib.import_module(name)
    first = missing[0]
    host = Session(prepared.plans[first.name], prepared.sources[first.data], prepared.storage, progress)
    with contextlib.closing(host):
        host.start()
        yield


def _folder_problems(storage: Storage, folder: str) -> Iterator[Problem]:
    """Where runs/<name> is something that no comparison wrote."""
    is_ours = storage.is_file(f"{folder}/{TREE}") or storage.is_empty(folder)
    if storage.is_file(folder) or (storage.is_folder(folder) and not is_ours):
        remedy = "this is not a comparison of teddy-ray and is left alone; choose another name or storage"
        yield Problem("name", storage.display(folder), remedy)


def _make_room(prepared: Prepared, progress: Progress) -> None:
    """Tables of other runs under this name are kept under a name of their own."""
    storage, folder = prepared.storage, prepared.folder
    if not storage.is_file(f"{folder}/{TREE}"):
        return
    try:
        theirs = json.loads(storage.read(f"{folder}/{TREE}"))["identity"]
    except (ValueError, KeyError, TypeError):
        theirs = "unknown"
    if theirs == prepared.identity:
        return
    names = itertools.chain([f"{folder}~{theirs[:8]}"], (f"{folder}~{theirs[:8]}.{i}" for i in itertools.count(2)))
    kept = next(name for name in names if not storage.is_folder(name))
    storage.move_folder(folder, kept)
    progress.say(f"{storage.display(folder)} held another comparison; it is now {storage.display(kept)}")


def _write(prepared: Prepared, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    storage, folder, layout = prepared.storage, prepared.folder, prepared.layout
    tables = _tables(prepared, summaries)
    text = to_markdown(layout, tables, summaries)
    tree = {"identity": prepared.identity, **to_json_tree(layout, tables, summaries)}
    storage.write(f"{folder}/{TREE}", to_json(tree).encode())  # first: it is what makes the folder ours
    storage.write(f"{folder}/{MARKDOWN}", text.encode())
    storage.write(f"{folder}/{PAGE}", to_html(layout, tables, summaries).encode())
    return text


def _tables(prepared: Prepared, summaries: Mapping[str, Mapping[str, Any]]) -> tuple[ResultTable, ...]:
    facts = {}
    for run in prepared.layout.runs:
        source = prepared.sources[run.data]
        num_train = len(source.train) + len(source.validation)
        facts[run.name] = DataFacts(len(source.classes), num_train, len(source.test), run.data.image_size)
    return result_tables(prepared.layout, summaries, facts)
