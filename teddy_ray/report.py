"""report.html: one file that works offline, with the images, the curves, the table and the recipe of a run."""

from __future__ import annotations

import base64
import io
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from teddy_ray.dataset import concatenate, decode
from teddy_ray.plan import Plan
from teddy_ray.recipe_file import dump_recipe
from teddy_ray.sources import Source
from teddy_ray.storage import Storage
from teddy_ray.summary import Summary
from teddy_ray.tables import images_of, title, verdict

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # its first run says it builds a cache

MAX_CLASSES, MAX_PER_CLASS, MAX_CURVES = 20, 10, 12
INK = "#010203"
"""Stands for the page's text colour in plots, and is replaced by currentColor: readable in light and dark."""


def write_report(plan: Plan, source: Source, storage: Storage, summary: Summary) -> str:
    """The page. Shows at most MAX_CLASSES classes and MAX_CURVES units, and says so."""
    environment = Environment(loader=PackageLoader("teddy_ray"), undefined=StrictUndefined, autoescape=True)
    environment.globals.update(title=title, images_of=images_of)
    return environment.get_template("report.html").render(
        plan=plan,
        summary=summary,
        verdict=verdict(summary),
        gallery=_gallery(plan, source, storage),
        accuracy_plot=_plot_accuracy(summary),
        loss_plot=_plot_losses(plan, storage),
        max_curves=MAX_CURVES,
        recipe=dump_recipe(plan.recipe),
    )


def _gallery(plan: Plan, source: Source, storage: Storage) -> list[dict[str, Any]]:
    """Per class a strip of real images and one of the distilled ones, read back as published."""
    per_class = plan.recipe.synthesis.images_per_class
    shown = min(per_class, MAX_PER_CLASS)
    num_classes = min(len(plan.data.classes), MAX_CLASSES)
    last_row = num_classes * per_class
    shards = [shard for shard in plan.shards(plan.labelled(plan.distilled)) if shard.rows.start < last_row]
    rows = concatenate([decode(storage.open("shard", shard.fingerprint).read("rows.parquet"))[0] for shard in shards])
    gallery = []
    for label in range(num_classes):
        real = source.train.read(source.train.of_class(label)[:shown])
        distilled = rows.images[rows.labels == label][:shown]
        gallery.append(
            {
                "name": plan.data.classes[label],
                "real": _strip(real),
                "distilled": _strip(distilled),
                "num": shown,
                "num_real": len(real),
            }
        )
    return gallery


def _strip(images: npt.NDArray[np.uint8]) -> str:
    """(n c h w) as one PNG, side by side with a transparent gap, as a data URI."""
    n, _, height, width = images.shape
    gap = max(1, width // 16)
    strip = np.zeros((height, n * (width + gap) - gap, 4), dtype=np.uint8)
    for index, image in enumerate(images):
        left = index * (width + gap)
        strip[:, left : left + width, :3] = np.broadcast_to(image.transpose(1, 2, 0), (height, width, 3))
        strip[:, left : left + width, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(strip, "RGBA").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plot_accuracy(summary: Summary) -> str:
    names = list(summary.accuracy)[::-1]
    rows = [summary.accuracy[name] for name in names]
    figure, axes = _figure(height=0.7 + 0.45 * len(rows))
    colours = ["#c2410c" if name.startswith("distilled") else "#64748b" for name in names]
    axes.barh(
        range(len(rows)),
        [row.mean for row in rows],
        xerr=[row.std or 0 for row in rows],
        color=colours,
        ecolor=INK,
        capsize=4,
    )
    axes.set_yticks(range(len(rows)), [title(name) for name in names])
    lowest = min(row.mean - (row.std or 0) for row in rows)
    axes.set_xlim(max(0.0, np.floor(lowest * 10 - 0.5) / 10), 1.0)
    axes.set_xlabel(
        "accuracy on the test split (the axis does not start at 0)"
        if axes.get_xlim()[0] > 0
        else "accuracy on the test split"
    )
    return _svg(figure)


def _plot_losses(plan: Plan, storage: Storage) -> str:
    figure, axes = _figure(height=3.2)
    for index, unit in enumerate(plan.units()):
        if index == MAX_CURVES:
            break
        steps, statistics, ce, _ = np.array(storage.open("unit", unit.fingerprint).manifest["losses"]).T
        colour = f"C{index}"
        axes.plot(steps, statistics, color=colour, label=unit.name)
        axes.plot(steps, ce, color=colour, linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("loss: statistics (line), u CE (dots)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=INK, fontsize="small")
    return _svg(figure)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours: dict[Any, Any] = {
        key: INK for key in ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    }
    with rc_context({**colours, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # text stays text, in the page's own font; a fixed salt gives equal figures equal bytes
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "teddy_ray", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
