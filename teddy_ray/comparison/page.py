"""The tables of a comparison as Markdown, as a page that works offline, and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from teddy_ray.comparison.paper import Figure
from teddy_ray.comparison.results import NONE, Result, ResultRow, ResultTable
from teddy_ray.comparison.runs import Layout
from teddy_ray.summary import REPORT

Summaries = Mapping[str, Mapping[str, Any]]


def facts(layout: Layout, summaries: Summaries) -> Iterator[str]:
    """What has to be known to read the numbers."""
    comparison = layout.comparison
    tests = sorted({f"{summary['num_test']:,}" for summary in summaries.values()})
    of_images = f" ({' or '.join(tests)} images)" if tests else ""
    yield (
        f"Accuracy, a fraction, on the test split{of_images}, which nothing but the evaluation reads, after the "
        "students' last epoch; mean ± sample standard deviation over n. Steps are the optimiser steps of each student."
    )
    each = comparison.students_per_seed
    trained = "one student" if each == 1 else f"the mean of {each} students, on as many random draws,"
    yield (
        f"n counts seeds of a whole recipe ({', '.join(map(str, comparison.seeds))}): each draws its own starts, runs "
        f"its own synthesis, labels its own views, draws its own random real images, and gives {trained} per cell. "
        "The pool of a recipe is the same for all seeds."
    )
    yield (
        "Better and worse: by Welch's t-test, where the 95 % interval of the difference leaves out 0. Bold: what is "
        "better than every other row with as many student steps in its column, those of the whole training set aside."
    )
    if devices := sorted({summary["device"] for summary in summaries.values()}):
        yield f"Measured on {'; '.join(devices)}."


def progress(layout: Layout, summaries: Summaries, failures: Mapping[str, str] = NONE) -> str | None:
    """How much of it is there, until all is."""
    done, num = len(summaries), len(layout.runs)
    if done == num:
        return None
    failed = f", {len(failures)} failed" if failures else ""
    return f"{done} of {num} runs are finished{failed}; … stands where runs are not."


def to_markdown(
    layout: Layout, tables: Sequence[ResultTable], summaries: Summaries, failures: Mapping[str, str] = NONE
) -> str:
    """compare.md"""
    lines = [f"# {layout.comparison.name}", ""]
    if partial := progress(layout, summaries, failures):
        lines += [f"**{partial}**", ""]
    lines += [f"- {fact}" for fact in facts(layout, summaries)]
    for table in tables:
        lines += ["", f"## {table.table.title}", "", table.setting, ""]
        lines += [f"- {verdict}" for verdict in table.verdicts]
        lines += ["", _line(["", *table.columns]), _line(["---"] * (len(table.columns) + 1))]
        lines += [_line([_title(row), *map(_cell, row.cells)]) for row in table.rows]
        lines += [_line([f"*{row.title}* ({row.setting})", *map(_paper_cell, row.cells)]) for row in table.paper_rows]
        for note in table.notes:
            lines += ["", note]
    return "\n".join(lines) + "\n"


def to_html(
    layout: Layout, tables: Sequence[ResultTable], summaries: Summaries, failures: Mapping[str, str] = NONE
) -> str:
    """compare.html: one file, with links to the reports of the runs beside it."""
    environment = Environment(loader=PackageLoader("teddy_ray"), undefined=StrictUndefined, autoescape=True)
    environment.filters["breakable"] = _breakable
    return environment.get_template("compare.html").render(
        comparison=layout.comparison,
        facts=list(facts(layout, summaries)),
        partial=progress(layout, summaries, failures),
        tables=tables,
        failures=failures,
        runs=[(run, summaries.get(run.name)) for run in layout.runs],
        report=REPORT,
    )


def to_json_tree(
    layout: Layout, tables: Sequence[ResultTable], summaries: Summaries, failures: Mapping[str, str] = NONE
) -> dict[str, Any]:
    """What compare.json holds: every figure, the accuracies of each seed included."""
    return {
        "name": layout.comparison.name,
        "seeds": list(layout.comparison.seeds),
        "runs": [
            {"name": run.name, "finished": run.name in summaries, "failed": failures.get(run.name)}
            for run in layout.runs
        ],
        "devices": sorted({summary["device"] for summary in summaries.values()}),
        "tables": [
            {
                "title": table.table.title,
                "setting": table.setting,
                "columns": list(table.columns),
                "rows": [
                    {**row.method.model_dump(mode="json"), "cells": [_cell_tree(cell) for cell in row.cells]}
                    for row in table.rows
                ],
                "paper_rows": [asdict(row) for row in table.paper_rows],
                "verdicts": list(table.verdicts),
                "notes": list(table.notes),
            }
            for table in tables
        ],
    }


def _breakable(name: str) -> Markup:
    """A student's name, which may be broken into lines at its punctuation."""
    return Markup(re.sub("([/,:])", r"\1<wbr>", str(escape(name))))  # noqa: S704 - escaped


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _title(row: ResultRow) -> str:
    """With the labels, where they are known and the title does not name them."""
    labels = f"{row.labels} labels"
    return f"{row.method.title} ({labels})" if row.labels and labels not in row.method.title else row.method.title


def _cell(cell: Result) -> str:
    text = f"**{cell}**" if cell.leads else str(cell)
    if cell.mean is not None:
        text += f" (n = {cell.num_seeds}; {cell.student_steps:,} steps)"
    return f"{text}; *{cell.paper}*" if cell.paper else text


def _paper_cell(figure: Figure | None) -> str:
    return f"*{figure}*" if figure else ""


def _cell_tree(cell: Result) -> dict[str, Any]:
    more = {"mean": cell.mean, "std": cell.std, "n": len(cell.accuracies), "finished": cell.finished}
    return {**asdict(cell), **more, "runs": list(cell.runs.values())}
