"""What the commands print: results and plans as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from teddy_ray.dataset import DISTILLED
from teddy_ray.judgement import controls_of, judge
from teddy_ray.plan import Plan
from teddy_ray.pool_plan import Member
from teddy_ray.progress import duration
from teddy_ray.records import Row
from teddy_ray.rows import ROWS
from teddy_ray.scaling import (
    REST,
    Prediction,
    Rates,
    assumptions,
    left,
    predict,
    published,
    rates_for,
    worker_counts,
)
from teddy_ray.storage import Storage
from teddy_ray.summary import REPORT, Summary
from teddy_ray.work import Phase

TOO_MANY_TO_KEEP = (
    "pool: {:,} bytes of training images are more than pool.keep_bytes and are decoded anew in each epoch; "
    "from Parquet that reads a row group for each image: raise it, or use class folders"
)


def title(row: str) -> str:
    """What a row of the table is called, such as `distilled, 900 epochs (student resnet18)`."""
    name, _, student = row.partition("/")
    kind, _, epochs = name.partition("@")
    budget = f", {int(epochs):,} epochs" if epochs else ""
    return f"{ROWS[kind].title}{budget}" + (f" (student {student})" if student else "")


def verdict(summary: Summary) -> str:
    """What the table says, in two sentences: the distilled set against its controls under equal labels."""
    distilled = summary.accuracy["distilled"]
    parts = []
    for control, opponent in controls_of("distilled"):
        row, is_random = summary.accuracy.get(control), control == "random_soft"
        if row is not None:
            subject = f"Distilled (student {distilled.student})" if is_random else "The synthesis itself"
            steps = f", at {distilled.student_steps:,} student steps" if is_random else ""
            parts.append(f"{subject}: {_lead(distilled, row, opponent + steps, summary.num_test)}")
        elif is_random:
            parts.append(f"Without the control {control} ({opponent}) this says little about distillation.")
    return " ".join(parts)


def _lead(distilled: Row, control: Row, what: str, num_test: int) -> str:
    """By how much the distilled images lead, and whether that shows them to be better."""
    text = f"{100 * (distilled.mean - control.mean):+.1f} points against {what}"
    judgement = judge(distilled, control, num_test=num_test)
    if judgement is None:
        return f"{text}. One student allows no judgement."
    words = {"better": "better", "no better": "not shown to differ", "worse": "worse"}
    return f"{text}: {words[judgement.word]} ({judgement.interval})."


def images_of(row: str, summary: Summary) -> int:
    """How many images a row's students learn from."""
    return summary.num_train if row.startswith("full_data") else summary.images


def results_table(summary: Summary, storage: Storage) -> str:
    """The final table."""
    header = ("", "accuracy", "images", "labels", "student steps", "n", "")
    rows = [
        (
            title(name),
            str(row),
            f"{images_of(name, summary):,}",
            row.labels,
            f"{row.student_steps:,}",
            str(row.n),
            row.n_counts,
        )
        for name, row in summary.accuracy.items()
    ]
    stages = [
        (
            stage,
            f"{facts['seconds']:.1f}",
            f"{facts['worker_seconds']:.1f}",
            "reused" if facts["reused"] else "computed",
        )
        for stage, facts in summary.stages.items()
    ]
    stages.append(("total", f"{sum(facts['seconds'] for facts in summary.stages.values()):.1f}", "", ""))
    first = summary.accuracy["distilled"]
    size = summary.bytes
    return "\n".join(
        [
            "",
            f"{summary.name}: {summary.images} images, {summary.images_per_class} per class.",
            f"Accuracy of {first.student} on the {summary.num_test} images of the test split, after the last epoch;",
            "mean ± standard deviation over n.",
            "",
            align([header, *rows]),
            "",
            verdict(summary),
            "",
            f"bytes: {size['images']:,} as PNG ({size['images_raw']:,} raw pixels), {size['labels']:,} of soft labels, "
            f"{size['stored']:,} as stored" + (f", {size['members']:,} of members" if size["members"] else ""),
            *(f"{name.upper()}: {value:.4f}" for name, value in summary.scores.items() if value is not None),
            f"synthesis: {summary.synthesis['images_steps_per_s']:,.0f} images·steps/s per worker; {summary.device}",
            "",
            align([("stage", "seconds when computed", "worker seconds", "now"), *stages]),
            "",
            f"report: {storage.display(f'runs/{summary.name}/{REPORT}')}",
            f"data:   {storage.display(f'runs/{summary.name}/{DISTILLED}')}",
        ]
    )


def plan_table(
    plan: Plan,
    storage: Storage,
    *,
    workers: Sequence[int] | None = None,
    run: str | None = None,
    teraflops: float | None = None,
) -> str:
    """What distill would do, and how long it takes on so many workers. run, teraflops: as `rates_for` takes them."""
    rates, there = rates_for(plan, storage, run=run, teraflops=teraflops), published(plan, storage)
    work = left(plan, there)
    rows = [
        (stage, fingerprint[:8], _state(stage, fingerprint, there, work), plan.work()[stage])
        for stage, fingerprint in plan.stages().items()
    ]
    recipe, data, models = plan.recipe, plan.data, plan.pool_plan
    num_train = sum(data.counts)
    train_bytes = num_train * recipe.data.channels * recipe.data.image_size**2
    kept = train_bytes if train_bytes <= recipe.pool.keep_bytes else 0
    return "\n".join(
        [
            f"{recipe.name}: {_num(len(data.classes), 'class', 'classes')}; {num_train:,} training, "
            f"{data.num_validation:,} validation and {data.num_test:,} test images",
            f"pool: {models.generation} ({models.generation_reason}); {_num(len(plan.members), 'member')} "
            f"of {_num(len(models.bases), 'base')} and {_num(len(models.finetunings), 'fine-tuning')}",
            f"synthesis: {_num(plan.num_images, 'image')} in {_num(plan.num_units, 'unit')} of at most "
            f"{recipe.synthesis.classes_per_unit} classes x {recipe.synthesis.slots_per_unit} slots",
            f"labels: {_labels(plan)}",
            f"memory per worker: {model_bytes(plan, plan.members):,} bytes of weights (all members, unpruned), "
            f"{kept:,} bytes of training images in the pool stage",
            *([] if kept else [TOO_MANY_TO_KEEP.format(train_bytes)]),
            f"students: {len(plan.students)}",
            "",
            align([("stage", "fingerprint", "", "work"), *rows]),
            "",
            _scaling(plan, rates, work, workers or worker_counts(plan, work))
            if work
            else "Nothing is left to compute.",
        ]
    )


def _state(stage: str, fingerprint: str, there: Collection[str], work: Sequence[Phase]) -> str:
    if fingerprint in there:
        return "reused"
    return "to compute" if any(phase.stage == stage for phase in work) else "to publish"


def _scaling(plan: Plan, rates: Rates, work: Sequence[Phase], workers: Sequence[int]) -> str:
    """Predicted times by number of workers, and what they rest on."""
    found = [predict(plan, rates, number, work) for number in workers]

    def row(name: str, cell: Callable[[Prediction], str]) -> tuple[str, ...]:
        return (name, *("-" if one is None else cell(one) for one in found))

    stages = [*dict.fromkeys(phase.stage for phase in work), REST]
    table = [
        ("predicted time", *(_num(number, "worker") for number in workers)),
        *(row(stage, lambda one, stage=stage: duration(one.wall_s[stage])) for stage in stages),  # type: ignore[misc]
        row("total", lambda one: duration(one.total_s)),
        row("worker hours held", lambda one: f"{one.hours_held:,.2f}"),
        row("worker hours at work", lambda one: f"{one.hours_at_work:,.2f}"),
    ]
    notes = list(assumptions(plan, rates, work))
    if None in found:
        notes.append(f"-: a training takes {plan.recipe.pool.workers_per_base} workers (pool.workers_per_base)")
    return "\n".join([align(table), "", *(f"- {note}" for note in notes)])


def _num(number: int, one: str, many: str | None = None) -> str:
    """`1 unit`, `2 units`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _labels(plan: Plan) -> str:
    labels = plan.recipe.labels
    members = f"{len(plan.label_members)} of {len(plan.members)} members"
    if labels.mode == "none":
        size = model_bytes(plan, plan.label_members)
        return f"none stored; {members}, {size:,} bytes unpruned, are published and label every view as it is seen"
    form = {"fp16": "every class in 16 bits", "top_k": f"the largest {labels.top_k} classes"}[labels.mode]
    views = f"the mean over {labels.views} views" if labels.averaged else f"{labels.views} views"
    controls = len(plan.labelled_controls)
    more = f"; as much for each of {_num(controls, 'labelled set')} of controls" if controls else ""
    return f"{plan.label_bytes:,} bytes before compression: {views} by {members}, {form}{more}"


def model_bytes(plan: Plan, members: Sequence[Member]) -> int:
    """Bytes of the weights of members, before pruning."""
    from teddy_ray import models

    data, total = plan.recipe.data, 0
    for architecture, num in Counter(member.architecture for member in members).items():
        model = models.outline(
            architecture, num_classes=len(plan.data.classes), channels=data.channels, image_size=data.image_size
        )
        total += num * sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return total


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as a table in plain text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
