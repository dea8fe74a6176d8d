"""Cells, what follows from them, and published figures: shown beside ours only where the setting is the same."""

import json
from dataclasses import asdict

import pytest
import yaml
from conftest import TINY
from test_report_browser import BROWSER, WIDTHS, look

from teddy_ray.comparison.beside import DataShape
from teddy_ray.comparison.file import load_comparison
from teddy_ray.comparison.page import to_html, to_json_tree, to_markdown
from teddy_ray.comparison.paper import load_paper
from teddy_ray.comparison.results import result_tables
from teddy_ray.comparison.runs import expand
from teddy_ray.records import Score, tabulate
from teddy_ray.rows import ROWS as ROW_KINDS

CIFAR10 = DataShape(num_classes=10, num_train=50_000, num_test=10_000, image_size=32, channels=3)
IMAGENET = DataShape(num_classes=1000, num_train=1_281_167, num_test=50_000, image_size=224, channels=3)
ROWS = [
    {"title": "Teddy", "recipe": "one.yaml", "paper": "teddy_prior"},
    {"title": "random", "recipe": "one.yaml", "row": "random_soft"},
]
BY_IPC = {"title": "by IPC", "columns": {"images_per_class": [1, 10]}}


@pytest.fixture
def lay_out(tmp_path):
    def lay_out(*tables, rows=ROWS, seeds=(0, 1, 2), student="resnet18"):
        recipe = {**TINY, "evaluation": {**TINY["evaluation"], "students": [student], "epochs": 300}}
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe))
        path = tmp_path / "comparison.yaml"
        tree = {"name": "mine", "seeds": list(seeds), "rows": rows, "tables": list(tables)}
        path.write_text(yaml.safe_dump(tree))
        return expand(load_comparison(path), path)

    return lay_out


def summaries(layout, accuracy, *, unfinished=()):
    """Summaries of runs that nobody made, but for some: accuracy(row, run) of every row of ours."""
    found = {}
    for run in layout.runs:
        if run.name in unfinished:
            continue
        wanted = {
            (cell.row, cell.student): accuracy(key, run)
            for cell in layout.cells.values()
            for owner, key in cell.sources()
            if owner.name == run.name
        }
        wanted.setdefault(("distilled", run.evaluation.students[0]), 0.5)
        order = sorted(wanted, key=lambda place: place != ("distilled", run.evaluation.students[0]))
        rows = tabulate(_score(row, student, wanted[row, student], run) for row, student in order)
        found[run.name] = {
            "accuracy": {key: asdict(row) for key, row in rows.items()},
            "num_test": 360,
            "device": "CPU, AVX512",
        }
    return found


def _score(row, student, accuracy, run):
    name, _, epochs = row.partition("@")
    steps = run.synthesis.images_per_class * int(epochs or run.evaluation.epochs)
    kind = ROW_KINDS[name]
    return Score(
        row=row,
        student=student,
        accuracy=accuracy,
        validation=accuracy,
        labels=kind.labels,
        split="test",
        steps=steps if kind.images else 10 * steps,
        n_counts=kind.n_counts,
    )


def close(key, run):
    """Teddy far above random at one image per class, and as good at more."""
    base = 0.8 if run.synthesis.images_per_class == 1 and key.startswith("distilled") else 0.6
    return base + 0.01 * run.seed


def build(layout, found, facts=CIFAR10):
    return result_tables(layout, found, {run.name: facts for run in layout.runs})


# -- cells and what follows ------------------------------------------------------------------------------------------


def test_a_cell_is_the_mean_over_seeds(lay_out):
    layout = lay_out(BY_IPC)
    cell = build(layout, summaries(layout, close))[0].rows[0].cells[0]
    assert cell.accuracies == (0.8, 0.81, 0.8200000000000001)
    assert (cell.mean, cell.std, cell.num_seeds) == (pytest.approx(0.81), pytest.approx(0.01), 3)
    assert (cell.student_steps, cell.labels, cell.split, cell.student) == (300, "soft", "test", "resnet18")
    assert cell.runs == {seed: f"mine-tiny-ipc1-seed{seed}" for seed in range(3)}
    assert str(cell) == "0.8100 ± 0.0100"


def test_unfinished_cells_show_dots_and_say_how_far_they_are(lay_out):
    layout = lay_out(BY_IPC)
    missing = [f"mine-tiny-ipc10-seed{seed}" for seed in range(3)]
    one, ten = build(layout, summaries(layout, close, unfinished=[*missing, "mine-tiny-ipc1-seed2"]))[0].rows[0].cells
    assert (str(one), one.mean) == ("… (2 of 3)", None)
    assert str(ten) == "…"


def test_the_verdict_is_against_random_under_equal_labels_at_each_column(lay_out):
    layout = lay_out(BY_IPC)
    assert build(layout, summaries(layout, close))[0].verdicts == (
        "Teddy against random real images under equal labels: better with 1 image per class (+20.0 points; 95 % "
        "interval ± 2.3); not shown to be better with 10 images per class (+0.0 points; 95 % interval ± 2.3).",
    )
    worse = summaries(layout, lambda key, run: 0.9 - close(key, run))
    assert "worse with 1 image per class (-20.0 points" in build(layout, worse)[0].verdicts[0]
    assert build(layout, {})[0].verdicts == ("Teddy against random real images under equal labels: not finished.",)


def test_one_seed_allows_no_judgement_and_no_crown(lay_out):
    layout = lay_out(BY_IPC, seeds=[0])
    table = build(layout, summaries(layout, close))[0]
    assert "no judgement from one seed with 1 image per class (+20.0 points)" in table.verdicts[0]
    assert str(table.rows[0].cells[0]) == "0.8000"
    assert not any(cell.leads for row in table.rows for cell in row.cells)


def test_without_its_control_a_row_says_little(lay_out):
    other = {"title": "random", "recipe": "one.yaml", "row": "random_soft", "set": {"labels.views": 5}}
    layout = lay_out(BY_IPC, rows=[ROWS[0], other])
    text = build(layout, {})[0].verdicts[0]
    assert text.startswith("Teddy: no row shows random real images under its labels (row: random_soft)")


def test_a_distilled_row_is_judged_by_what_it_started_from_as_well(lay_out):
    start = {"title": "start", "recipe": "one.yaml", "row": "start_soft"}
    layout = lay_out(BY_IPC, rows=[*ROWS, start])
    found = summaries(layout, lambda key, run: 0.9 + 0.01 * run.seed if key == "start_soft" else close(key, run))
    random, start = build(layout, found)[0].verdicts
    assert random.startswith("Teddy against random real images under equal labels: better with 1 image per class")
    assert start.startswith("Teddy against the images that it started from, under equal labels: worse with 1 image")


def test_a_longer_budget_is_judged_by_its_own_controls_and_never_beats_a_shorter_one(lay_out):
    longer = [{**row, "title": f"{row['title']} long", "row": f"{row.get('row', 'distilled')}@900"} for row in ROWS]
    layout = lay_out(BY_IPC, rows=[*ROWS, *longer])
    found = summaries(layout, lambda key, run: close(key, run) + (0.1 if "@" in key else 0))
    table = build(layout, found)[0]
    assert [row.cells[0].leads for row in table.rows] == [True, False, True, False]
    assert [verdict.partition(" against")[0] for verdict in table.verdicts] == ["Teddy", "Teddy long"]
    assert "better with 1 image per class (+20.0 points" in table.verdicts[1]
    assert table.setting == (
        "Student resnet18. Student steps: 300 or 900 with 1 image per class; 3,000 or 9,000 with 10 images per class."
    )


def test_a_table_names_what_its_columns_do_not_vary(lay_out):
    layout = lay_out(STUDENTS)
    assert build(layout, {})[0].setting == "10 images per class."
    assert build(layout, summaries(layout, close))[0].setting == "10 images per class. Student steps: 3,000."


def test_a_failed_run_stands_in_its_cells_with_its_reason_below(lay_out):
    layout = lay_out(BY_IPC)
    name = "mine-tiny-ipc10-seed2"
    found, failures = summaries(layout, close, unfinished=[name]), {name: "synthesis: loss is nan"}
    table = result_tables(layout, found, {run.name: CIFAR10 for run in layout.runs}, failures)[0]
    assert [str(cell) for cell in table.rows[0].cells] == ["0.8100 ± 0.0100", "failed (2 of 3)"]
    assert table.notes == (f"failed: run {name}: synthesis: loss is nan",)


def test_the_best_is_marked_only_where_it_is_shown_to_be(lay_out):
    layout = lay_out(BY_IPC)
    rows = build(layout, summaries(layout, close))[0].rows
    assert [[cell.leads for cell in row.cells] for row in rows] == [[True, False], [False, False]]
    near = summaries(layout, lambda key, run: (0.62 if key == "distilled" else 0.60) + 0.01 * run.seed)
    assert not any(cell.leads for row in build(layout, near)[0].rows for cell in row.cells)  # t = 2.4 of 2.8


def test_the_whole_training_set_is_no_contestant(lay_out):
    whole = {"title": "all images", "recipe": "one.yaml", "row": "full_data"}
    layout = lay_out(BY_IPC, rows=[*ROWS, whole])
    found = summaries(layout, lambda key, run: 0.99 if key == "full_data" else close(key, run))
    rows = build(layout, found)[0].rows
    assert [row.cells[0].leads for row in rows] == [True, False, False]


# -- beside the paper ------------------------------------------------------------------------------------------------

PAPER = {**BY_IPC, "columns": {"images_per_class": [10, 50]}}
STUDENTS = {
    "title": "by student",
    "columns": {"students": ["torchvision/resnet50", "torchvision/resnet18", "resnet18", "torchvision/vgg11"]},
    "set": {"synthesis.images_per_class": 10},
    "paper": {"dataset": "imagenet1k"},
}


def beside(table):
    return [[str(cell.paper) if cell.paper else None for cell in row.cells] for row in table.rows]


def test_figures_stand_beside_equal_settings_alone(lay_out):
    layout = lay_out({**PAPER, "paper": {"dataset": "imagenet1k"}}, student="torchvision/resnet18")
    assert beside(build(layout, {}, IMAGENET)[0]) == [["0.341 (paper)", "0.525 (paper)"], [None, None]]


def test_another_student_gets_no_figure(lay_out):
    layout = lay_out({**PAPER, "paper": {"dataset": "imagenet1k"}}, student="resnet18")
    assert beside(build(layout, {}, IMAGENET)[0]) == [[None, None], [None, None]]


def test_other_images_per_class_get_no_figure(lay_out):
    table = {**PAPER, "columns": {"images_per_class": [1, 20]}, "paper": {"dataset": "imagenet1k"}}
    built = build(lay_out(table, student="torchvision/resnet18"), {}, IMAGENET)[0]
    assert beside(built) == [[None, None], [None, None]]
    assert built.paper_rows == ()
    assert built.notes == ("There are no figures of the paper on ImageNet-1K for these images per class and students.",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_train": 5_000}, "5,000 training images instead of 50,000"),
        ({"num_classes": 3}, "3 classes instead of 10"),
        ({"num_test": 360}, "360 test images instead of 10,000"),
        ({"image_size": 8}, "8 pixels a side instead of 32"),
        ({"channels": 1}, "1 channels instead of 3"),
    ],
)
def test_other_data_gets_no_figures_and_the_table_says_why(lay_out, change, reason):
    rows = [*ROWS, {"title": "SRe2L", "recipe": "one.yaml", "paper": "sre2l"}]
    rows[2]["set"] = {"labels.views": 4}
    layout = lay_out({**PAPER, "paper": {"dataset": "cifar10"}}, rows=rows)
    same = build(layout, {}, CIFAR10)[0]
    assert beside(same)[2] == ["0.272 (published)", "0.475 (published)"]
    other = build(layout, {}, DataShape(**{**vars(CIFAR10), **change}))[0]
    assert beside(other) == [[None, None]] * 3
    assert other.paper_rows == ()
    assert other.notes == (f"The paper's figures are left out: the data is not CIFAR-10: {reason}.",)


def test_without_a_word_of_the_paper_nothing_of_it_is_shown(lay_out):
    table = build(lay_out(PAPER, student="torchvision/resnet18"), {}, IMAGENET)[0]
    assert beside(table) == [[None, None], [None, None]]
    assert (table.paper_rows, table.notes) == ((), ())


def test_methods_that_no_row_runs_appear_with_published_figures_alone(lay_out):
    table = build(lay_out({**PAPER, "paper": {"dataset": "cifar10"}}), {})[0]
    rows = {row.title: (row.setting, [str(figure) for figure in row.cells]) for row in table.paper_rows}
    assert list(rows) == ["SRe2L", "DC", "DSA", "DM", "IDM", "MTT", "FTD", "TESLA"]
    assert rows["DC"] == ("ConvNet-3, hard labels", ["0.449 (paper)", "0.539 (paper)"])
    assert rows["TESLA"] == ("ConvNet-3, hard labels", ["0.664 (paper)", "0.726 (paper)"])
    assert rows["SRe2L"] == ("ResNet-18, soft labels", ["0.272 (published)", "0.475 (published)"])
    first = table.notes[0]
    assert first.startswith("(paper): not measured here but published in Yu, Liu, Ye, Wang:")
    assert "(DC, DSA, DM, IDM, MTT, FTD, TESLA: hard labels, 1,000 epochs in batches of 256)" in first
    assert "SRe2L" not in first
    assert table.notes[1].startswith("(published): not measured here but published elsewhere")
    assert "students of 300 epochs" in table.notes[2]


def test_where_columns_are_students_figures_are_of_these_alone(lay_out):
    table = build(lay_out(STUDENTS), {}, IMAGENET)[0]
    assert beside(table)[0] == ["0.390 (paper)", "0.341 (paper)", None, None]
    rows = {
        row.title: (row.setting, [str(figure) if figure else None for figure in row.cells])
        for row in (table.paper_rows)
    }
    assert rows["SRe2L"] == ("soft labels", ["0.284 (paper)", "0.213 (published)", None, None])
    assert "TESLA" not in rows  # its figures are of a ConvNet


def test_the_figures_of_the_paper():
    paper = load_paper()
    students = {each.student for method in paper.methods.values() for each in method.figures}
    assert students == set(paper.students)
    for method in paper.methods.values():
        places = [(each.dataset, each.student) for each in method.figures]
        assert len(set(places)) == len(places)
        assert {dataset for dataset, _ in places} <= set(paper.datasets)
    table2 = {
        student: tuple(
            figure.accuracy
            for method in ("teddy_prior", "teddy_post", "sre2l")
            if (figure := paper.figure(method, "imagenet1k", 10, student)) and figure.source == "Table 2"
        )
        for student in paper.students
    }
    assert {student: figures for student, figures in table2.items() if figures} == {
        "torchvision/resnet50": (0.390, 0.379, 0.284),
        "torchvision/resnet101": (0.403, 0.400, 0.309),
        "torchvision/densenet121": (0.343, 0.330, 0.215),
        "torchvision/mobilenet_v2": (0.234, 0.205, 0.102),
        "ShuffleNetV2": (0.385, 0.400, 0.291),
        "torchvision/efficientnet_b0": (0.292, 0.273, 0.161),
    }
    table1 = {
        (name, figures.dataset): figures.accuracy
        for name in ("teddy_prior", "teddy_post")
        for figures in paper.methods[name].figures
        if figures.source == "Table 1"
    }
    assert table1 == {
        ("teddy_prior", "imagenet1k"): {10: 0.341, 50: 0.525, 100: 0.565},
        ("teddy_prior", "tiny_imagenet"): {50: 0.452, 100: 0.520},
        ("teddy_post", "imagenet1k"): {10: 0.327, 50: 0.525, 100: 0.562},
        ("teddy_post", "tiny_imagenet"): {50: 0.445, 100: 0.514},
    }
    assert paper.figure("teddy_prior", "tiny_imagenet", 10, "resnet18") is None
    assert paper.figure("ftd", "tiny_imagenet", 50, "convnet:width=128,norm=instance").accuracy == 0.315


def test_figures_stand_beside_rows_of_the_same_images_and_labels_alone(lay_out):
    rows = [
        {"title": "hard", "recipe": "one.yaml", "row": "distilled_hard", "paper": "teddy_prior"},
        {"title": "matching", "recipe": "one.yaml", "paper": "dc"},
        {"title": "random, soft", "recipe": "one.yaml", "row": "random_soft", "paper": "random_hard"},
        {"title": "random, hard", "recipe": "one.yaml", "row": "random_hard", "paper": "random_hard"},
        {"title": "longer", "recipe": "one.yaml", "row": "distilled@900", "paper": "teddy_prior"},
    ]
    layout = lay_out({**PAPER, "paper": {"dataset": "imagenet1k"}}, rows=rows, student="torchvision/resnet18")
    table = build(layout, {}, IMAGENET)[0]
    none = [None, None]
    random, teddy = ["0.068 (published)", "0.320 (published)"], ["0.341 (paper)", "0.525 (paper)"]
    assert beside(table) == [none, none, none, random, teddy]
    assert "random real images" not in [row.title for row in table.paper_rows]
    assert "students of 300 or 900 epochs" in table.notes[-1]


def test_what_is_not_known_of_figures_is_said(lay_out):
    layout = lay_out({**PAPER, "paper": {"dataset": "imagenet1k"}}, student="torchvision/resnet18")
    table = build(layout, {}, IMAGENET)[0]
    settings = {row.title: row.setting for row in table.paper_rows}
    assert settings["TESLA"] == "ConvNet-3, hard labels, image size not known here"
    assert "are the same, but for what rows say of themselves." in table.notes[-1]


def test_the_epochs_are_those_of_the_table(lay_out):
    tables = [{**PAPER, "title": str(epochs), "set": {"evaluation.epochs": epochs}} for epochs in (300, 900)]
    layout = lay_out(*({**table, "paper": {"dataset": "cifar10"}} for table in tables))
    notes = [table.notes[-1] for table in build(layout, {})]
    assert "students of 300 epochs" in notes[0]
    assert "students of 900 epochs" in notes[1]


# -- pages -----------------------------------------------------------------------------------------------------------


def test_the_markdown(lay_out):
    layout = lay_out({**PAPER, "paper": {"dataset": "cifar10"}}, rows=[{**ROWS[0], "title": "A|B"}, ROWS[1]])
    found = summaries(layout, close, unfinished=["mine-tiny-ipc50-seed2"])
    lines = to_markdown(layout, build(layout, found), found).splitlines()
    assert lines[0] == "# mine"
    assert "**5 of 6 runs are finished; … stands where runs are not.**" in lines
    assert "|  | 10 images per class | 50 images per class |" in lines
    assert "| A\\|B (soft labels) | 0.6100 ± 0.0100 (n = 3; 3,000 steps) | … (2 of 3) |" in lines
    assert "| *DM* (ConvNet-3, hard labels) | *0.489 (paper)* | *0.630 (paper)* |" in lines
    assert any("test split (360 images)" in line for line in lines)
    assert any("n counts seeds of a whole recipe (0, 1, 2)" in line for line in lines)
    assert "- Measured on CPU, AVX512." in lines


def test_a_finished_comparison_does_not_call_itself_partial(lay_out):
    layout = lay_out(BY_IPC)
    found = summaries(layout, close)
    text = to_markdown(layout, build(layout, found), found)
    assert "runs are finished" not in text
    assert "**0.8100 ± 0.0100** (n = 3; 300 steps)" in text


def test_the_page_links_to_the_reports_and_escapes_titles(lay_out):
    layout = lay_out(
        {**PAPER, "paper": {"dataset": "imagenet1k"}},
        student="torchvision/resnet18",
        rows=[{**ROWS[0], "title": "<b>Teddy</b>"}, ROWS[1]],
    )
    found = summaries(layout, close, unfinished=["mine-tiny-ipc50-seed2"])
    page = to_html(layout, build(layout, found, IMAGENET), found)
    assert '<a href="../mine-tiny-ipc10-seed0/report.html">0</a>' in page
    assert "&lt;b&gt;Teddy&lt;/b&gt;" in page
    assert "<b>Teddy" not in page
    assert '<span class="published">0.341 (paper)</span>' in page
    assert "mine-tiny-ipc50-seed2, not finished" in page
    assert "n 3 · 3,000 steps" in page
    assert "http" not in page.replace("http-equiv", "")  # offline


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_can_be_read_on_a_phone_and_a_desk(lay_out, tmp_path, dark):
    students = {**STUDENTS, "columns": {"students": ["torchvision/resnet50", "convnet:width=128,norm=instance"]}}
    by_ipc = {**PAPER, "columns": {"images_per_class": [1, 10, 50, 100]}, "paper": {"dataset": "imagenet1k"}}
    rows = [*ROWS, {**ROWS[1], "title": "start with Pseudopseudohypoparathyroidism", "row": "start_soft"}]
    layout = lay_out(by_ipc, students, rows=rows, student="torchvision/resnet18")
    name = "mine-tiny-ipc50-seed2"
    found, failures = summaries(layout, close, unfinished=[name]), {name: "evaluation: loss is nan"}
    tables = result_tables(layout, found, {run.name: IMAGENET for run in layout.runs}, failures)
    seen = look(to_html(layout, tables, found, failures), tmp_path, dark=dark)
    assert sorted(seen) == sorted(WIDTHS)
    for width, measures in seen.items():
        assert measures["dark"] is dark
        assert measures["across"] <= width  # it does not scroll sideways
        assert measures["fetched"] == []
        assert len(measures["texts"]) > 60
        assert [text["text"] for text in measures["texts"] if text["contrast"] < 4.5] == []
        assert [text["text"] for text in measures["texts"] if text["size"] < 12] == []
        assert max(measures["tall"]) < 180  # no column is squeezed to a word a line


def test_the_json_holds_the_accuracy_of_each_seed(lay_out):
    layout = lay_out({**PAPER, "paper": {"dataset": "imagenet1k"}}, student="torchvision/resnet18")
    found = summaries(layout, close)
    tree = json.loads(json.dumps(to_json_tree(layout, build(layout, found, IMAGENET), found)))
    cell = tree["tables"][0]["rows"][0]["cells"][0]
    assert cell["accuracies"] == [0.6, 0.61, 0.62]
    assert (cell["n"], cell["student_steps"], cell["finished"]) == (3, 3000, True)
    assert cell["paper"] == {
        "accuracy": 0.341,
        "method": "teddy_prior",
        "source": "Table 1",
        "student": "torchvision/resnet18",
        "note": "",
    }
