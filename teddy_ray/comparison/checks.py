"""What makes the cells of a table comparable: the same data, and the same student or images per class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from teddy_ray.comparison.runs import Layout
from teddy_ray.errors import Problem
from teddy_ray.plan import Plan


def data_problems(layout: Layout, plans: Mapping[str, Plan]) -> Iterator[Problem]:
    """Tables whose rows learn from, or are tested on, other images. plans: of all runs, by name."""
    for t in range(len(layout.comparison.tables)):
        rows = {
            method.title: [_data(plans[run.name]) for run in layout.of(t, r)[0].runs]
            for r, method in enumerate(layout.comparison.rows)
        }
        first = next(iter(rows))
        if others := [title for title, data in rows.items() if data != rows[first]]:
            remedy = (
                f"rows of a table should have the same training and test images, size and channels as its first, "
                f"{first!r}: give these rows the same data, or write a comparison of their own for them"
            )
            yield Problem(f"tables.{t}", others, remedy)


def _data(plan: Plan) -> tuple[str | int, ...]:
    return plan.data.train, plan.data.test, plan.recipe.data.image_size, plan.recipe.data.channels
