"""Cells, what follows from them, and published figures: shown beside ours only where the setting is the same."""

import json

import pytest
import yaml
from conftest import TINY

from teddy_ray.comparison.file import load_comparison
from teddy_ray.comparison.page import to_html, to_json_tree, to_markdown
from teddy_ray.comparison.paper import load_paper
from teddy_ray.comparison.results import DataFacts, result_tables
from teddy_ray.comparison.runs import expand

CIFAR10 = DataFacts(num_classes=10, num_train=50_000, num_test=10_000, image_size=32)
IMAGENET = DataFacts(num_classes=1000, num_train=1_281_167, num_test=50_000, image_size=224)
ROWS = [
    {"title": "Teddy", "recipe": "one.yaml", "paper": "teddy_prior"},
    {"title": "random", "recipe": "one.yaml", "row": "random_soft"},
]
BY_IPC = {"title": "by IPC", "columns": {"images_per_class": [1, 10]}}


@pytest.fixture
def lay_out(tmp_path):
    def lay_out(*tables, rows=ROWS, seeds=(0, 1, 2), student="resnet18"):
        recipe = {**TINY, "evaluation": {**TINY["evaluation"], "students": [student]}}
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe))
        path = tmp_path / "comparison.yaml"
        tree = {"name": "mine", "seeds": list(seeds), "rows": rows, "tables": list(tables)}
        path.write_text(yaml.safe_dump(tree))
        return expand(load_comparison(path), path)

    return lay_out


def summaries(layout, accuracy, *, unfinished=()):
    """Fake summaries of all runs but some: accuracy(row, run) of every row of ours."""
    found = {}
    for run in layout.runs:
        if run.name in unfinished:
            continue
        rows = {}
        for cell in layout.cells.values():
            for owner, key in cell.sources():
                if owner is run:
                    ipc = run.synthesis.images_per_class
                    labels = "hard" if key.startswith("random_hard") else "soft"
                    row = {"mean": accuracy(key, run), "labels": labels, "split": "test", "student_steps": 300 * ipc}
                    rows[key] = row
        found[run.name] = {"accuracy": rows, "num_test": 360, "device": "CPU, AVX512"}
    return found


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
    assert (cell.steps, cell.labels, cell.split, cell.student) == (300, "soft", "test", "resnet18")
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
        "Teddy against random real images under equal labels: better with 1 image per class (+20.0 points, two "
        "standard errors 1.6); no better with 10 images per class (+0.0 points, two standard errors 1.6).",
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


def test_the_best_is_marked_only_where_it_leads_by_two_standard_errors(lay_out):
    layout = lay_out(BY_IPC)
    rows = build(layout, summaries(layout, close))[0].rows
    assert [[cell.leads for cell in row.cells] for row in rows] == [[True, False], [False, False]]


def test_the_whole_training_set_is_no_contestant(lay_out):
    whole = {"title": "all images", "recipe": "one.yaml", "row": "full_data"}
    layout = lay_out(BY_IPC, rows=[*ROWS, whole])
    found = summaries(layout, lambda key, run: 0.99 if key == "full_data" else close(key, run))
    rows = build(layout, found)[0].rows
    assert [row.cells[0].leads for row in rows] == [True, False, False]


def test_a_row_that_a_finished_run_does_not_have_is_said_to_be_missing(lay_out):
    layout = lay_out(BY_IPC)
    found = summaries(layout, close)
    for summary in found.values():
        del summary["accuracy"]["random_soft"]
    table = build(layout, found)[0]
    assert str(table.rows[1].cells[0]) == "not measured"
    assert "not finished" in table.verdicts[0]


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
    ],
)
def test_other_data_gets_no_figures_and_the_table_says_why(lay_out, change, reason):
    rows = [*ROWS, {"title": "SRe2L", "recipe": "one.yaml", "paper": "sre2l"}]
    rows[2]["set"] = {"labels.views": 4}
    layout = lay_out({**PAPER, "paper": {"dataset": "cifar10"}}, rows=rows)
    same = build(layout, {}, CIFAR10)[0]
    assert beside(same)[2] == ["0.272 (published)", "0.475 (published)"]
    other = build(layout, {}, DataFacts(**{**vars(CIFAR10), **change}))[0]
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
    assert "students of 4 epochs" in table.notes[2]


def test_where_columns_are_students_figures_are_of_these_alone(lay_out):
    table = build(lay_out(STUDENTS), {}, IMAGENET)[0]
    assert beside(table)[0] == ["0.390 (paper)", "0.341 (paper)", None, None]
    rows = {
        row.title: (row.setting, [str(figure) if figure else None for figure in row.cells])
        for row in (table.paper_rows)
    }
    assert rows["SRe2L"] == ("soft labels", ["0.284 (paper)", "0.213 (paper)", None, None])
    assert "TESLA" not in rows  # its figures are of a ConvNet


def test_the_figures_of_the_paper():
    paper = load_paper()
    students = {each.student for method in paper.methods.values() for each in method.figures}
    assert students == set(paper.students)
    for method in paper.methods.values():
        places = [(each.dataset, each.student) for each in method.figures]
        assert len(set(places)) == len(places)
        assert {dataset for dataset, _ in places} <= set(paper.datasets)
    table2 = [
        paper.figure(m, "imagenet1k", 10, "torchvision/resnet101") for m in ("teddy_prior", "teddy_post", "sre2l")
    ]
    assert [figure.accuracy for figure in table2] == [0.403, 0.400, 0.309]
    assert paper.figure("teddy_post", "tiny_imagenet", 100, "resnet18").accuracy == 0.514
    assert paper.figure("teddy_prior", "tiny_imagenet", 10, "resnet18") is None
    assert paper.figure("ftd", "tiny_imagenet", 50, "convnet:width=128,norm=instance").accuracy == 0.315


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
    }
