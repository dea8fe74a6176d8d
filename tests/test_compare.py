"""teddy-ray compare: what runs, what is reused, what stands there when it ends early, what is left alone."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from conftest import TINY

from teddy_ray import flow
from teddy_ray.cli import main
from teddy_ray.errors import InputError, Problem, StageError
from teddy_ray.storage import Storage
from teddy_ray.summary import Summary

ROWS = [
    {"title": "Teddy", "recipe": "one.yaml"},
    {"title": "random", "recipe": "one.yaml", "row": "random_soft"},
]
TABLES = [{"title": "by IPC", "columns": {"images_per_class": [1, 2]}}]


@pytest.fixture
def file(tmp_path):
    """A comparison of two rows at two numbers of images, one seed: two runs."""
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(TINY))
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "seeds": [0], "rows": ROWS, "tables": TABLES}))
    return path


@pytest.fixture
def storage(tmp_path):
    return tmp_path / "storage"


@pytest.fixture
def distilled(monkeypatch):
    """Instead of distilling: writes the summary of a run. Gives the names of what ran; a run named in `ends` raises."""
    state = SimpleNamespace(names=[], ends={})

    def distill(recipe, progress, source=None):
        state.names.append(recipe.name)
        if recipe.name in state.ends:
            raise state.ends[recipe.name]
        prepared = flow.prepare(recipe, source=source)
        rows = ["distilled", *recipe.evaluation.controls]
        row = {"mean": 0.5, "labels": "soft", "split": "test", "student_steps": 40}
        tree = {field.name: None for field in fields(Summary)} | {
            "accuracy": dict.fromkeys(rows, row),
            "stages": {stage: {"fingerprint": each} for stage, each in prepared.plan.stages().items()},
            "num_test": 360,
            "device": "CPU",
        }
        prepared.storage.write(f"runs/{recipe.name}/recipe.yaml", b"")
        prepared.storage.write(f"runs/{recipe.name}/summary.json", json.dumps(tree).encode())
        prepared.storage.close_session()
        return SimpleNamespace(to_dict=lambda: tree)

    monkeypatch.setattr(flow, "distill", distill)
    monkeypatch.setattr(
        "teddy_ray.comparison.compare.Session", lambda *_: SimpleNamespace(start=lambda: None, close=lambda: None)
    )
    return state


def tree(storage, name="mine"):
    return json.loads((storage / "runs" / name / "compare.json").read_text())


def run(file, storage, *more):
    return main(["compare", str(file), "--storage", str(storage), *more])


def test_it_runs_each_recipe_once_and_a_second_time_none(file, storage, distilled, capfd):
    assert run(file, storage) == 0
    assert distilled.names == ["mine-tiny-ipc1-seed0", "mine-tiny-ipc2-seed0"]
    captured = capfd.readouterr()
    assert "run 2 of 2: mine-tiny-ipc2-seed0" in captured.err
    assert "| Teddy (soft labels) | 0.5000 (n = 1; 40 steps) | 0.5000 (n = 1; 40 steps) |" in captured.out
    assert captured.out.strip() == (storage / "runs/mine/compare.md").read_text().strip()
    assert run(file, storage) == 0
    assert len(distilled.names) == 2
    assert "2 runs, 2 of them finished" in capfd.readouterr().err
    assert sorted(os.listdir(storage / "runs")) == ["mine", "mine-tiny-ipc1-seed0", "mine-tiny-ipc2-seed0"]
    assert sorted(os.listdir(storage / "runs/mine")) == ["compare.html", "compare.json", "compare.md"]
    assert not list((storage / "artifacts").glob(".staging/*")) if (storage / "artifacts").exists() else True


def test_a_summary_of_other_settings_is_no_finished_run(file, storage, distilled):
    assert run(file, storage) == 0
    assert run(file, storage, "--set", "synthesis.steps=3") == 0
    assert len(distilled.names) == 4


def test_an_interrupt_leaves_the_tables_so_far_and_the_same_command_goes_on(file, storage, distilled, capfd):
    distilled.ends["mine-tiny-ipc2-seed0"] = KeyboardInterrupt()
    assert run(file, storage) == 130
    said = capfd.readouterr().err
    assert f"this resumes: teddy-ray compare {file} --storage {storage}" in said
    text = (storage / "runs/mine/compare.md").read_text()
    assert "1 of 2 runs are finished" in text
    assert "| Teddy (soft labels) | 0.5000 (n = 1; 40 steps) | … |" in text
    assert "not finished" in (storage / "runs/mine/compare.html").read_text()
    del distilled.ends["mine-tiny-ipc2-seed0"]
    distilled.names.clear()
    assert run(file, storage) == 0
    assert distilled.names == ["mine-tiny-ipc2-seed0"]
    assert "…" not in (storage / "runs/mine/compare.md").read_text()


def test_a_failing_run_is_named_and_the_others_go_on(file, storage, distilled, capfd):
    distilled.ends["mine-tiny-ipc1-seed0"] = StageError("synthesis", "classes 0-1", "loss is nan")
    assert run(file, storage) == 1
    captured = capfd.readouterr()
    assert (
        "teddy-ray: failed: compare: 1 of 2 runs: run mine-tiny-ipc1-seed0: synthesis: classes 0-1: loss is nan\n"
        in captured.err
    )
    assert "this resumes: teddy-ray compare" in captured.err
    assert distilled.names == ["mine-tiny-ipc1-seed0", "mine-tiny-ipc2-seed0"]
    text = (storage / "runs/mine/compare.md").read_text()
    assert captured.out.strip() == text.strip()
    assert "1 of 2 runs are finished, 1 failed" in text
    assert "| Teddy (soft labels) | failed | 0.5000 (n = 1; 40 steps) |" in text
    reason = "failed: run mine-tiny-ipc1-seed0: synthesis: classes 0-1: loss is nan"
    assert text.splitlines().count(reason) == 1
    assert "mine-tiny-ipc1-seed0, failed: synthesis" in (storage / "runs/mine/compare.html").read_text()
    assert [each["failed"] for each in tree(storage)["runs"]] == ["synthesis: classes 0-1: loss is nan", None]
    distilled.ends.clear()
    distilled.names.clear()
    assert run(file, storage) == 0
    assert distilled.names == ["mine-tiny-ipc1-seed0"]
    assert "failed" not in (storage / "runs/mine/compare.md").read_text()


def test_input_that_turns_out_wrong_in_a_run_is_told_with_its_name(file, storage, distilled, capfd):
    distilled.ends["mine-tiny-ipc2-seed0"] = InputError([Problem("pool.num_workers", 9, "fits on no node")])
    assert run(file, storage) == 1
    assert "run mine-tiny-ipc2-seed0: pool.num_workers: found 9; fits on no node" in capfd.readouterr().err


def test_tables_of_unequal_data_are_refused_before_the_first_run(file, storage, distilled, capfd):
    rows = [*ROWS, {"title": "fewer", "recipe": "one.yaml", "set": {"data.limit_per_class": 20}}]
    file.write_text(yaml.safe_dump({"name": "mine", "seeds": [0], "rows": rows, "tables": TABLES}))
    assert run(file, storage) == 2
    said = capfd.readouterr().err
    assert said.startswith("teddy-ray: error: tables.0: found ['fewer']; rows of a table should have the same training")
    assert distilled.names == []
    assert not storage.exists()


def test_a_run_whose_stages_are_stored_needs_no_ray(file, storage, distilled, monkeypatch):
    monkeypatch.setattr("teddy_ray.comparison.compare.Session", lambda *_: pytest.fail("a session was made"))
    monkeypatch.setattr(Storage, "has", lambda *_: True)
    assert run(file, storage) == 0
    assert len(distilled.names) == 2


def test_all_recipes_are_checked_before_the_first_runs(file, storage, distilled, tmp_path, capfd):
    scarce = [{"title": "by IPC", "columns": {"images_per_class": [1, 500]}}]
    file.write_text(yaml.safe_dump({"name": "mine", "seeds": [0, 1], "rows": ROWS, "tables": scarce}))
    assert run(file, storage) == 2
    assert distilled.names == []
    assert not storage.exists()
    assert capfd.readouterr().err == (
        "teddy-ray: error: mine-tiny-ipc500: synthesis.images_per_class: found 500; should be at most 36: class '0' "
        "has 36 training images; with synthesis.start mosaic or noise and no random controls it may be more\n"
    )
    assert run(file, storage, "--set", "data.source=nowhere") == 2
    message = capfd.readouterr().err
    assert message.count("data.source: found 'nowhere'") == 1


def test_wrong_input_ends_before_ray(file, storage, monkeypatch, capfd):
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started for wrong input"))
    assert run(file, storage, "--set", "synthesis.stepps=3") == 2
    assert "synthesis.stepps: found 3; unknown key; did you mean 'steps'?" in capfd.readouterr().err
    assert run(file, storage, "--set", "synthesis.gpus_per_worker=64") == 2
    assert "synthesis.gpus_per_worker: found 64" in capfd.readouterr().err
    assert run("none.yaml", storage) == 2
    assert not storage.exists()


def test_a_folder_of_somebody_elses_is_left_alone(file, storage, distilled, capfd):
    mine = storage / "runs/mine/thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    assert run(file, storage) == 2
    assert "this is not a comparison of teddy-ray and is left alone; choose another name" in capfd.readouterr().err
    assert os.listdir(mine.parent) == ["thesis.tex"]
    assert distilled.names == []


def test_a_comparison_of_other_runs_under_the_name_is_kept(file, storage, distilled, capfd):
    assert run(file, storage) == 0
    before = tree(storage)
    assert run(file, storage, "--set", "evaluation.epochs=5") == 0
    kept = f"mine~{before['identity'][:8]}"
    assert f"held another comparison; it is now {storage}/runs/{kept}" in capfd.readouterr().err
    assert tree(storage, kept) == before
    assert tree(storage)["identity"] != before["identity"]


def test_the_entry_point_for_jobs_is_the_same_command(file, storage):
    script = Path(__file__).parent.parent / "pipelines" / "compare.py"
    command = [sys.executable, str(script), str(file), "--set", "seed=-1", "--storage", str(storage)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--set seed: found '-1'; leave it out" in done.stderr


@pytest.mark.slow
def test_two_methods_at_two_numbers_of_images(shared_ray, file, storage, capfd):
    """End to end; the runs share pool and statistics, and the report of each stands where the page links to."""
    stages = ("pool", "statistics", "synthesis", "labels", "evaluation")
    small = ["evaluation.epochs=2", "pool.seeds=[0]", "pool.snapshots=[1]", "synthesis.steps=5"]
    settings = [*small, *(f"{stage}.num_workers=1" for stage in stages)]
    flags = [piece for setting in settings for piece in ("--set", setting)]
    assert run(file, storage, *flags) == 0
    captured = capfd.readouterr()
    assert "run 2 of 2: mine-tiny-ipc2-seed0" in captured.err
    assert captured.err.count("pool       reused") == 1
    (table,) = tree(storage)["tables"]
    for row in table["rows"]:
        for cell, ipc in zip(row["cells"], (1, 2), strict=True):
            assert 0 <= cell["mean"] <= 1
            assert (cell["n"], cell["student"], cell["labels"]) == (1, "convnet:width=8", "soft")
            assert cell["runs"] == [f"mine-tiny-ipc{ipc}-seed0"]
            assert (storage / "runs" / cell["runs"][0] / "report.html").is_file()
    summary = json.loads((storage / "runs/mine-tiny-ipc1-seed0/summary.json").read_text())
    assert table["rows"][0]["cells"][0]["mean"] == summary["accuracy"]["distilled"]["mean"]
    before = (storage / "runs/mine-tiny-ipc1-seed0/report.html").stat().st_mtime_ns
    assert run(file, storage, *flags) == 0
    assert "2 runs, 2 of them finished" in capfd.readouterr().err
    assert (storage / "runs/mine-tiny-ipc1-seed0/report.html").stat().st_mtime_ns == before
