"""The data card of a distilled set, as the Hugging Face hub shows it."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from teddy_ray.plan import Plan
from teddy_ray.summary import Summary
from teddy_ray.tables import images_of, title, verdict

QUANTITIES = {"probabilities": "the mean softmax(logits / {tau})", "logits": "the mean logits, for tau = {tau},"}
"""What a soft label is, by `labels.ensemble`."""


def write_card(plan: Plan, summary: Summary) -> str:
    """README.md with its YAML header. Says nothing of where or when, so that equal sets have equal cards."""
    environment = Environment(loader=PackageLoader("teddy_ray"), undefined=StrictUndefined, autoescape=False)  # noqa: S701 - Markdown
    environment.globals.update(title=title, images_of=images_of)
    template = environment.get_template("card.md")
    labels = plan.recipe.labels
    text = template.render(
        plan=plan,
        recipe=plan.recipe,
        summary=summary,
        verdict=verdict(summary),
        views=f"the mean over {labels.views} views" if labels.averaged else f"{labels.views} views",
        ensemble=f"{QUANTITIES[labels.ensemble].format(tau=labels.temperature)} of {summary.labels['members']} models",
    )
    return text + "\n"
