"""The data card of a distilled set, as the Hugging Face hub shows it."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from teddy_ray.plan import Plan
from teddy_ray.summary import Summary
from teddy_ray.tables import images_of, title, verdict


def write_card(plan: Plan, summary: Summary) -> str:
    """README.md with its YAML header. Says nothing of where or when, so that equal sets have equal cards."""
    environment = Environment(loader=PackageLoader("teddy_ray"), undefined=StrictUndefined, autoescape=False)  # noqa: S701 - Markdown
    environment.globals.update(title=title, images_of=images_of)
    template = environment.get_template("card.md")
    return template.render(plan=plan, recipe=plan.recipe, summary=summary, verdict=verdict(summary)) + "\n"
