"""The command line: exit statuses, and messages that name key, value and remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import Run, tiny
from emulated import EmulatedCluster
from PIL import Image

from teddy_ray.cli import main
from teddy_ray.recipe_file import dump_recipe

DIGITS = str(Path(__file__).parent.parent / "pipelines" / "recipes" / "digits.yaml")
Refused = Callable[..., str]


def test_the_command_line_is_there_before_torch_and_ray() -> None:
    code = "import sys, teddy_ray.cli; print([name for name in ('torch', 'ray', 'scipy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs distill on the digits recipe, expects status 2 before any Ray starts, gives what was said."""

    def no_ray(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started for wrong input")

    def run(*overrides: str, storage: str | None = None, recipe: str = DIGITS) -> str:
        monkeypatch.setattr(ray, "init", no_ray)
        flags = [piece for override in overrides for piece in ("--set", override)]
        status = main(["distill", recipe, *flags, "--storage", storage or str(tmp_path / "storage")])
        captured = capfd.readouterr()
        assert status == 2, captured.err
        assert captured.out == ""
        assert not (tmp_path / "storage").exists()
        return captured.err

    return run


@pytest.mark.parametrize(
    ("override", "key", "value", "remedy"),
    [
        ("synthesis.image_per_class=1", "synthesis.image_per_class", "1", "did you mean 'images_per_class'?"),
        ("synthesis.steps=many", "synthesis.steps", "'many'", "should be a valid integer"),
        ("synthesis.images_per_class=0", "synthesis.images_per_class", "0", "should be greater than or equal to 1"),
        ("synthesis.images_per_class=500", "synthesis.images_per_class", "500", "should be at most"),
        ("data.source=nowhere/at/all", "data.source", "nowhere/at/all", "does not exist"),
        ("pool.architectures=[convnett]", "pool.architectures", "convnett", "convnet"),
        ('evaluation.students=["convnet:depth=9"]', "evaluation.students", "convnet:depth=9", "lower the depth"),
        ("synthesis.gpus_per_worker=64", "synthesis.gpus_per_worker", "64", "do not fit on"),
        ("pool.num_workers=4096", "pool.num_workers", "4096", "lower it, or give cluster.address"),
        ("evaluation.students=[resnet19]", "evaluation.students", "resnet19", "unknown architecture"),
        ("labels.members={epochs: [3]}", "labels.members", "[3]", "chooses none of the pool's members"),
        ("labels.mode=fp8", "labels.mode", "'fp8'", "'fp16', 'top_k' or 'none'"),
        ("labels.views=0", "labels.views", "0", "greater than or equal to 1"),
        ("pool.generation=later", "pool.generation", "'later'", "'prior'"),
    ],
)
def test_wrong_input_names_key_value_and_remedy(
    refused: Refused, override: str, key: str, value: str, remedy: str
) -> None:
    message = refused(override)
    assert message.startswith(f"teddy-ray: error: {key}: found ")
    assert value in message
    assert remedy in message


def test_two_wrong_keys_are_both_reported(refused: Refused) -> None:
    message = refused("synthesis.stepps=3", "labels.views=-1")
    assert "synthesis.stepps" in message
    assert "labels.views: found -1" in message


def test_wrong_path_and_wrong_model_are_both_reported(refused: Refused) -> None:
    message = refused("data.source=nowhere", "pool.architectures=[alexnet]")
    assert "data.source: found 'nowhere'" in message
    assert "pool.architectures: found 'alexnet'" in message


def test_small_views_and_a_model_of_one_size_are_named_each(refused: Refused) -> None:
    pool = 'pool.architectures=["resnet18:width=2", "convnet:width=8", "convnet:depth=2"]'
    message = refused("synthesis.curriculum.image_size=6", pool)
    assert message.splitlines() == [
        "teddy-ray: error: synthesis.curriculum.image_size: found 6; "
        f"leave it out, or {name} out of pool.architectures: it takes images of data.image_size alone"
        for name in ("convnet:width=8", "convnet:depth=2")
    ]


def test_buffers_of_other_layers_than_batchnorms_are_named(refused: Refused) -> None:
    pool = 'pool.architectures=["convnet:width=8", "convnet:width=8,norm=group", "convnet:width=8,norm=none"]'
    message = refused("statistics.source=buffers", "statistics.scope=global", pool)
    assert message.splitlines() == [
        "teddy-ray: error: statistics.source: found 'buffers'; "
        f"{name} has other layers than BatchNorms to match; set it to moments"
        for name in ("convnet:width=8,norm=group", "convnet:width=8,norm=none")
    ]


def test_small_views_are_no_reason_to_hide_a_model_that_does_not_exist(refused: Refused) -> None:
    message = refused("synthesis.curriculum.image_size=6", "pool.architectures=[convnet, alexnet]")
    assert "pool.architectures: found 'alexnet'" in message


@pytest.mark.parametrize(
    "overrides",
    [
        ('pool.architectures=["resnet18:width=2"]', "synthesis.curriculum.image_size=6"),
        ("synthesis.curriculum.crop_scale=[0.9, 1]",),
        ("synthesis.start=mosaic", "synthesis.images_per_class=500", "evaluation.controls=[full_data]"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_the_models_and_the_data_allow_is_planned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> None:
    flags = [piece for override in overrides for piece in ("--set", override)]
    assert main(["plan", DIGITS, *flags, "--storage", str(tmp_path)]) == 0
    assert capfd.readouterr().err == ""


def test_more_real_images_than_there_are_name_the_scarcest_class(refused: Refused) -> None:
    message = refused("synthesis.images_per_class=500")
    assert message == (
        "teddy-ray: error: synthesis.images_per_class: found 500; should be at most 125: class '8' has 125 training "
        "images; with synthesis.start mosaic or noise and no random controls it may be more\n"
    )
    message = refused("data.limit_per_class=3", "synthesis.images_per_class=1", "synthesis.formation=2")
    assert "synthesis.formation: found 2; needs 4 training images of each class; class '0' has " in message
    message = refused("synthesis.images_per_class=40", "synthesis.formation=2")
    assert (
        "should be at most 31: class '8' has 125 training images, and each starts from 4 (synthesis.formation)"
        in message
    )


def test_storage_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    message = refused(storage=str(tmp_path / "file" / "below"))
    assert "storage: found" in message
    assert "name a place that can be written" in message


def test_class_folder_without_images(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "images" / "empty").mkdir(parents=True)
    (tmp_path / "images" / "full").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "full" / "one.png")
    message = refused(f"data.source={tmp_path / 'images'}")
    assert str(tmp_path / "images" / "empty") in message
    assert "should hold images" in message


def test_parquet_without_the_named_columns(refused: Refused, tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [b""], "kind": [0]}), tmp_path / "data.parquet")
    message = refused(f"data.source={tmp_path / 'data.parquet'}")
    assert "data.image_column: found 'image'" in message
    assert "data.label_column: found 'label'" in message
    assert "picture, kind" in message


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "runs" / "digits" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    assert main(["distill", DIGITS, "--storage", str(tmp_path)]) == 2
    assert "choose another name or storage" in capfd.readouterr().err
    assert mine.read_text() == "years of work"


def test_cluster_that_is_not_there(tmp_path: Path) -> None:
    """In a process of its own: this one may hold a Ray already."""
    flags = ["--address", "127.0.0.1:1", "--storage", str(tmp_path)]
    command = [sys.executable, "-m", "teddy_ray.cli", "distill", DIGITS, *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert "cluster.address: found '127.0.0.1:1'; should be a running Ray cluster" in result.stderr


def test_recipe_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "no/such/recipe.yaml"]) == 2
    assert "RECIPE: found 'no/such/recipe.yaml'" in capfd.readouterr().err


def test_plan_before_and_after_a_run(finished: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(dump_recipe(tiny(tmp_path / "empty")))
    assert main(["plan", str(recipe)]) == 0
    fresh = capfd.readouterr().out
    assert fresh.count("ASSUMED (uncalibrated: no run named tiny is in this storage). To measure: run the") == 1
    assert "40 images in 10 units" in fresh
    assert main(["plan", str(recipe), "--storage", str(finished.folder), "--set", "synthesis.steps=61"]) == 0
    measured = capfd.readouterr().out
    assert measured.count("reused") == 2
    assert "rates: measured by the run tiny (" in measured
    assert "uncalibrated" not in measured
    flags = ["--set", "synthesis.steps=61", "--workers", "1,3", "--teraflops", "0.5"]
    assert main(["plan", str(recipe), "--storage", str(finished.folder), *flags]) == 0
    told = capfd.readouterr().out
    assert "1 worker  3 workers" in told
    assert "0.5 TFLOP/s per CPU thread" in told
    assert main(["plan", str(recipe), "--rates", "nobody"]) == 2
    assert "--rates: found 'nobody'; should be the name of a finished run" in capfd.readouterr().err


def test_check_says_what_is_there(finished: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(finished.folder / "runs" / "tiny" / "distilled")]) == 0
    assert "40 images of 10 classes, 6 labelled views each" in capfd.readouterr().out


def test_check_refuses_a_changed_byte(finished: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "distilled"
    shutil.copytree(finished.folder / "runs" / "tiny" / "distilled", folder)
    for file in [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]:
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        file.write_bytes(changed)
        assert main(["check", str(folder)]) == 2
        assert file.name in capfd.readouterr().err
        file.write_bytes(whole)
    assert main(["check", str(folder)]) == 0
    assert "card" not in capfd.readouterr().out
    (folder / "README.md").write_text("edited")
    assert main(["check", str(folder)]) == 0
    assert "The card README.md is not the published one" in capfd.readouterr().out


def test_job_entry_point_is_the_same_command(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "pipelines" / "distill.py"
    command = [sys.executable, str(script), DIGITS, "--set", "seed=-1", "--storage", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "seed: found -1" in result.stderr


@pytest.mark.slow
def test_cluster_without_gpus_or_autoscaler_refuses_at_once(tmp_path: Path) -> None:
    """A Ray cluster that runs elsewhere: what it lacks is an error, never a wait for ever."""
    cluster = EmulatedCluster(num_nodes=1)
    try:
        flags = ["--set", "synthesis.gpus_per_worker=1", "--address", cluster.address, "--storage", str(tmp_path)]
        command = [sys.executable, "-m", "teddy_ray.cli", "distill", DIGITS, *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    finally:
        cluster.close()
    assert result.returncode == 2, result.stderr
    assert "synthesis.gpus_per_worker: found 1" in result.stderr


def test_export_writes_class_folders(finished: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = str(finished.folder / "runs" / "tiny")
    assert main(["export", run, "--format", "imagefolder", str(tmp_path / "images")]) == 0
    assert "40 images, without soft labels" in capfd.readouterr().out
    assert len(list((tmp_path / "images").glob("[0-9]/*.png"))) == 40
    assert main(["export", run, "--format", "imagefolder", str(tmp_path / "images")]) == 2
    assert "DEST" in capfd.readouterr().err
    assert main(["export", str(tmp_path), "--format", "parquet", str(tmp_path / "set")]) == 2
    assert "should be a distilled data set" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["check", "export"])
def test_a_file_cut_short_is_named_with_status_2(
    finished: Run, tmp_path: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "distilled"
    shutil.copytree(finished.folder / "runs" / "tiny" / "distilled", folder)
    file = next((folder / "data").iterdir())
    file.write_bytes(file.read_bytes()[:-20])
    more = ["--format", "parquet", str(tmp_path / "copy")] if command == "export" else []
    assert main([command, str(folder), *more]) == 2
    message = capfd.readouterr().err
    assert str(file) in message
    assert "restore the file" in message
