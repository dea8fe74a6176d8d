"""The report's content, as the HTML that it is; how it looks is test_report_browser.py's."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from conftest import Run, tiny
from PIL import Image
from reports import LONG_NAME, ROWS, STUDENTS, accuracies, many, wide_page

from teddy_ray.gallery import MAX_SIDE, gallery, make_strip
from teddy_ray.plots import Axis, by_student, dots, losses, over_steps
from teddy_ray.report import write_report
from teddy_ray.stages.images import read_set
from teddy_ray.summary import Summary

VOID = {"meta", "img", "input", "br"}


@dataclass
class Page(HTMLParser):
    """What a page is made of."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    headings: list[tuple[int, str]] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag  # every element is closed where it should be

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._open and re.fullmatch("h[1-6]", self._open[-1]):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)
        if {"th", "td"} & set(self._open):
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page._open == []
    return page


def report(finished: Run, summary: Summary | None = None) -> Page:
    return parse(write_report(finished.plan, finished.source, finished.storage, summary or finished.summary))


@pytest.fixture(scope="module")
def page(finished: Run) -> Page:
    return parse((finished.folder / "runs" / "tiny" / "report.html").read_text())


@pytest.fixture(scope="module")
def wide(finished: Run) -> Page:
    return parse(wide_page(finished.plan, many(finished.summary)))


def decode(uri: str | None) -> np.ndarray:
    kind, data = (uri or "").split(",")
    assert kind in ("data:image/png;base64", "data:image/webp;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


@pytest.mark.parametrize("which", ["page", "wide"])
def test_the_page_is_one_file_that_fetches_nothing(which: str, request: pytest.FixtureRequest) -> None:
    parsed: Page = request.getfixturevalue(which)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attributes.items():
            assert name not in ("href", "xlink:href", "srcset", "onclick")
            assert "http" not in (value or "")[:200]
        if "src" in attributes:
            assert (attributes["src"] or "").startswith("data:image/")


@pytest.mark.parametrize("which", ["page", "wide"])
def test_headings_stand_in_order_and_tables_have_scopes(which: str, request: pytest.FixtureRequest) -> None:
    parsed: Page = request.getfixturevalue(which)
    levels = [level for level, _ in parsed.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    assert all(text.strip() for _, text in parsed.headings)
    assert {attributes.get("scope") for attributes in parsed.all("th")} == {"row", "col"}
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["for"] for attributes in parsed.all("label") if "for" in attributes} == set(ids)


def test_sections_say_what_a_reader_looks_for(page: Page, finished: Run) -> None:
    assert [text for level, text in page.headings if level < 3] == [
        f"tiny: {finished.summary.num_train} training images distilled to 40",
        "The images",
        "What they are worth",
        "How to load them",
        "What they cost",
        "The loss",
        "The pool",
        "How they were made",
    ]
    before_images = page.text[: page.text.index("The images")]
    assert "points against random real images under equal labels" in before_images  # the verdict leads
    for words in ('load_dataset("./distilled"', 'teddy_ray.load("distilled")', "teddy-ray check", "torch", "n = 2"):
        assert words in page.text
    for name, row in finished.summary.accuracy.items():
        assert page.text.count(str(row)) >= 2, name  # in the plot and in the table


def test_each_class_has_three_strips_with_each_distilled_image_below_its_start(page: Page, finished: Run) -> None:
    images = page.all("img")
    classes = finished.plan.data.classes
    assert [image["alt"] for image in images] == [
        f"4 {what} of class {name}"
        for name in classes
        for what in ("real training images", "starting images (real images)", "distilled images")
    ]
    assert [text for level, text in page.headings if level == 3 and text != "Scores"] == list(classes)
    starts = read_set(finished.plan, finished.source, finished.storage, finished.plan.image_set("start"), range(40))
    distilled = read_set(finished.plan, finished.source, finished.storage, finished.plan.distilled, range(40))
    for label in range(10):
        real = finished.source.train.read(finished.source.train.of_class(label)[:4])
        for index, rows in enumerate((real, starts[4 * label :], distilled[4 * label :])):
            strip = decode(images[3 * label + index]["src"])
            assert strip.shape == (8, 4 * 8 + 3, 4)
            for slot in range(4):
                tile = strip[:, 9 * slot : 9 * slot + 8]
                assert (tile[..., 3] == 255).all()
                assert np.array_equal(tile[..., 0], rows[slot, 0])


def test_starts_are_called_what_they_are(finished: Run) -> None:
    for start, words in (("noise", "began with (noise, not real images)"), ("mosaic", "mosaics of patches")):
        plan = replace(finished.plan, recipe=tiny(finished.folder, synthesis__start=start))
        assert words in " ".join(parse(wide_page(plan, finished.summary)).text.split())


def test_strips_keep_their_places_and_large_images_are_scaled_down() -> None:
    rng = np.random.default_rng(0)
    few = make_strip("real", "", rng.integers(0, 255, (2, 1, 8, 8), dtype=np.uint8), 5)
    strip = decode(few.uri)
    assert (few.num, strip.shape) == (2, (8, 5 * 9 - 1, 4))
    assert not strip[:, 17:, 3].any()  # places without an image are see-through
    large = decode(make_strip("real", "", rng.integers(0, 255, (3, 3, 224, 224), dtype=np.uint8), 3).uri)
    assert large.shape == (MAX_SIDE, 3 * MAX_SIDE + 2 * (MAX_SIDE // 16), 4)
    assert not large[:, MAX_SIDE : MAX_SIDE + MAX_SIDE // 16, 3].any()


def test_a_page_of_large_images_stays_small(finished: Run) -> None:
    page = wide_page(finished.plan, many(finished.summary))  # 540 images of noise, which compresses worst
    assert len(page) < 10_000_000


def test_at_most_so_many_classes_and_images_are_shown(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teddy_ray.gallery.MAX_CLASSES", 3)
    monkeypatch.setattr("teddy_ray.gallery.MAX_PER_CLASS", 2)
    shown = gallery(finished.plan, finished.source, finished.storage)
    assert [(part.name, part.num) for part in shown] == [(name, 2) for name in finished.plan.data.classes[:3]]
    text = " ".join(report(finished).text.split())
    assert "The first 3 of 10 classes are shown." in text
    assert "The first 2 of 4 images per class are shown." in text


def test_a_reused_stage_keeps_its_cost_and_says_so(finished: Run) -> None:
    stages = {stage: {**facts, "reused": stage == "pool"} for stage, facts in finished.summary.stages.items()}
    page = report(finished, replace(finished.summary, stages=stages))
    states = Counter(cell for cell in page.cells if cell.startswith(("reused", "computed")))
    assert states == {"reused, as computed before": 1, "computed now": 4}
    assert f"{stages['pool']['seconds']:,.1f}" in page.cells
    assert "4 of 5 computed" in page.cells


def test_stored_bytes_are_those_of_the_stages_own_files(page: Page, finished: Run) -> None:
    artifacts = finished.folder / "artifacts"
    written = sum(file.stat().st_size for file in artifacts.glob("unit/*/*") if file.is_file())
    assert f"{written / 1000:.3g} kB" in page.cells[page.cells.index("synthesis") :][:4]


def test_scores_are_shown_where_their_controls_were_run(finished: Run, page: Page) -> None:
    assert "Scores" in page.text
    none = replace(finished.summary, scores=dict.fromkeys(("ior", "hlr", "lrs", "ars")))
    assert "Scores" not in report(finished, none).text
    scores = {"ior": 0.0312, "hlr": None, "lrs": 0.41, "ars": None}
    cells = parse(wide_page(finished.plan, replace(many(finished.summary), scores=scores))).cells
    assert cells[cells.index("IOR") + 1] == "+0.0312"
    assert cells[cells.index("LRS") + 1] == "0.4100"
    assert "HLR" not in cells


def test_many_students_rows_and_budgets_all_find_their_place(wide: Page) -> None:
    text = " ".join(wide.text.split())
    for heading in ("Accuracy over student steps", "Across student architectures"):
        assert (3, heading) in wide.headings
    groups = [title for level, title in wide.headings if level == 3 and title.startswith("Student ")]
    assert groups == [f"Student {student}, {steps} steps" for student in STUDENTS for steps in ("12,000", "48,000")]
    for row in accuracies().values():
        assert text.count(str(row)) >= 3  # plot, table across architectures, table of all
    assert text.count(LONG_NAME) == 20


def test_rows_are_compared_within_a_student_and_a_budget() -> None:
    rows = accuracies()
    plot = dots(by_student(rows))
    assert len(plot.groups) == len(STUDENTS) * 2
    for group in plot.groups:
        assert len(group.dots) == len(ROWS)
        assert len({dot.row.student for dot in group.dots}) == 1
        assert [dot.x for dot in group.dots if dot.leads] == [group.guide]
        assert all(0 <= dot.low <= dot.x <= dot.high <= 100 for dot in group.dots)


def test_one_student_and_one_budget_need_no_headings_and_no_steps() -> None:
    students = by_student(accuracies(students=STUDENTS[:1], budgets=(300,)))
    assert [group.title for group in dots(students).groups] == [""]
    assert over_steps(students) == []


def test_a_perfect_accuracy_and_equal_ones_fit_on_the_axis() -> None:
    rows = {name: replace(row, mean=1.0, std=0.0) for name, row in accuracies(STUDENTS[:1], budgets=(300,)).items()}
    plot = dots(by_student(rows))
    assert (plot.axis.low, plot.axis.high) == (0.995, 1.0)
    assert {dot.x for dot in plot.groups[0].dots} == {100.0}
    assert len(plot.axis.ticks) >= 2


def test_accuracy_over_steps_rises_where_accuracies_do() -> None:
    charts = over_steps(by_student(accuracies()))
    assert [chart.title for chart in charts] == list(STUDENTS)
    for chart in charts:
        assert [len(curve.points) for curve in chart.curves] == [2] * len(ROWS)
        assert all(left.x < right.x and left.y < right.y for curve in chart.curves for left, right in [curve.points])
        assert len({curve.style for curve in chart.curves}) == len(ROWS)


def test_losses_have_a_panel_for_each_term_in_use() -> None:
    steps = np.arange(1, 6)
    small = np.stack([steps, 5.0 - steps / 2, np.ones(5), np.zeros(5)], axis=1)
    charts = losses(["a", "b"], [small, small + np.array([0, 1, 0, 0])])
    assert [chart.title for chart in charts] == ["distance to the statistics of the real data", "u · cross-entropy"]
    assert [curve.title for curve in charts[0].curves] == ["a", "b", "mean of the units"]
    assert (charts[0].y.low, charts[0].y.log) == (0, False)
    with_priors = losses(["a"], [small + np.array([0, 0, 0, 0.1])])
    assert with_priors[-1].title == "priors"
    assert [curve.title for curve in with_priors[0].curves] == ["a"]
    steep = small * [1, 0, 1, 1] + np.array([0, 1, 0, 0]) * np.array([[900, 90, 30, 9, 3]]).T
    assert losses(["a"], [steep])[0].title.endswith("logarithmic")


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis(0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis(0.93, 0.98), ["0.93", "0.94", "0.95", "0.96", "0.97", "0.98"]),
        (Axis(0, 1050, num_ticks=4), ["0", "500", "1,000"]),
        (Axis(0.8, 120, log=True), ["1", "3", "10", "30", "100"]),
    ],
)
def test_ticks_are_round(axis: Axis, labels: list[str]) -> None:
    assert [label for _, label in axis.ticks] == labels
    assert all(0 <= at <= 100 for at, _ in axis.ticks)
