"""The pipeline on Ray, once from end to end, and what must hold of its result."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import Run, content_hashes, copy_artifacts, open_session, tiny

from teddy_ray import storage as storage_module
from teddy_ray.augment import apply_boxes
from teddy_ray.dataset import from_png
from teddy_ray.distilled import load
from teddy_ray.exports import export
from teddy_ray.flow import distill, prepare
from teddy_ray.formation import enlarge_all, shrink
from teddy_ray.labels import ensemble
from teddy_ray.matching import make_targets
from teddy_ray.members import load_members
from teddy_ray.moments import Moments, buffer_moments
from teddy_ray.pixels import from_pixels, to_pixels
from teddy_ray.plan import STAGES, Plan
from teddy_ray.progress import Progress
from teddy_ray.published import check_set
from teddy_ray.recipe import Recipe
from teddy_ray.stages import labels, statistics, synthesis
from teddy_ray.stages.images import draw_real, make_start, read_set
from teddy_ray.stages.session import Session
from teddy_ray.summary import summarise
from teddy_ray.taps import Taps


def test_run_folder_is_complete(finished: Run) -> None:
    folder = finished.folder / "runs" / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == [
        "distilled",
        "recipe.yaml",
        "report.html",
        "summary.json",
    ]
    facts = check_set(str(folder / "distilled"))
    assert facts["images_per_class"] == 4


def test_summary_says_what_scripts_rely_on(finished: Run) -> None:
    summary = json.loads((finished.folder / "runs" / "tiny" / "summary.json").read_text())
    rows = ["distilled", "random_soft", "start_soft", "distilled_hard", "random_hard", "full_data"]
    assert set(summary["accuracy"]) == set(rows)
    assert list(finished.summary.accuracy) == rows
    for row in summary["accuracy"].values():
        assert 0 <= row["mean"] <= 1
        assert (row["n"], row["split"], row["student"], row["epoch"]) == (2, "test", "convnet:width=8", "last")
    assert [summary["accuracy"][row]["labels"] for row in ("distilled", "random_soft", "random_hard")] == [
        "soft",
        "soft",
        "hard",
    ]
    assert {stage: facts["reused"] for stage, facts in summary["stages"].items()} == dict.fromkeys(STAGES, False)
    assert summary["images"] == 40
    assert summary["bytes"]["labels"] == 40 * 6 * 10 * 2
    assert summary["labels"] == {"mode": "fp16", "views": 6, "averaged": False, "members": 4, "mass_kept": 1.0}
    rows = {name: row["mean"] for name, row in summary["accuracy"].items()}
    assert summary["scores"]["ior"] == pytest.approx(rows["distilled"] - rows["random_soft"])
    assert summary["scores"]["hlr"] == pytest.approx(rows["full_data"] - rows["distilled_hard"])
    assert summary["scores"]["lrs"] is not None
    assert summary["scores"]["ars"] is None
    assert summary["synthesis"]["images_steps_per_s"] > 0
    assert {"torch", "ray", "teddy_ray"} <= set(summary["versions"])
    assert summary["skipped_images"] == 0
    plan = Plan(finished.recipe, replace(finished.plan.data, num_skipped=3))
    assert summarise(plan, finished.storage, reused=()).skipped_images == 3


def test_progress_names_every_stage(finished: Run) -> None:
    for stage in ("pool", "statistics", "synthesis", "labels", "evaluation"):
        assert f"\n{stage:<10} done in " in "\n" + finished.progress


def test_second_run_computes_nothing(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 6: no stage, no Ray, no weights."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a second run must not come here")

    monkeypatch.setattr(Session, "start", forbidden)
    monkeypatch.setattr(storage_module.Artifact, "tensors", forbidden)
    monkeypatch.setattr(storage_module.Storage, "publish", forbidden)
    before = content_hashes(finished.folder, ".")
    with open(finished.folder / "progress2.txt", "w+") as stream:
        summary = distill(finished.recipe, Progress(stream))
        stream.seek(0)
        text = stream.read()
    assert all(facts["reused"] for facts in summary.stages.values())
    assert text.count("reused") == 5
    assert content_hashes(finished.folder, ".") == before


def test_three_workers_give_the_bytes_of_one(finished: Run, tmp_path: Path) -> None:
    """Invariant 3, units and labels; and neither of them reads the test split."""
    copy_artifacts(finished, "synthesis", tmp_path)
    session = open_session(tiny(tmp_path, synthesis__num_workers=3, labels__num_workers=3))

    def unreadable(rows: Any, map_: Any) -> None:
        raise AssertionError("the test split was read")

    object.__setattr__(session.source.test, "read_rows", unreadable)
    synthesis.run(session)
    labels.run(session)
    assert content_hashes(tmp_path, "unit") == content_hashes(finished.folder, "unit")
    shards = content_hashes(tmp_path, "shard")
    assert len(shards) == 3
    assert shards.items() <= content_hashes(finished.folder, "shard").items()


def test_other_weight_reuses_pool_and_statistics_and_keeps_the_old_run(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "storage")
    recipe = tiny(
        tmp_path / "storage",
        synthesis__ce_weight=0.1,
        synthesis__steps=5,
        evaluation__controls=["random_hard"],
        evaluation__seeds=[0],
        evaluation__epochs=1,
    )
    with open(tmp_path / "progress.txt", "w") as stream:
        summary = distill(recipe, Progress(stream))
    reused = {stage for stage, facts in summary.stages.items() if facts["reused"]}
    assert reused == {"pool", "statistics"}
    kept = [path.name for path in (tmp_path / "storage" / "runs").iterdir() if path.name != "tiny"]
    assert kept == [f"tiny~{finished.plan.evaluation[:8]}"]
    assert summary.accuracy["distilled"].std is None
    assert summary.improvement_over_random is None


def test_larger_ipc_has_the_units_of_the_smaller(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "synthesis", tmp_path)
    synthesis.run(open_session(tiny(tmp_path, synthesis__images_per_class=6)))
    larger = content_hashes(tmp_path, "unit")
    assert content_hashes(finished.folder, "unit").items() < larger.items()
    assert len(larger) == 15 * 2  # images and starts


def test_parts_of_a_set_are_those_of_the_whole(finished: Run) -> None:
    plan = finished.plan
    for images in (plan.distilled, plan.image_set("start"), plan.image_set("random", 0)):
        whole = read_set(plan, finished.source, finished.storage, images, range(40))
        part = read_set(plan, finished.source, finished.storage, images, range(5, 17))
        assert np.array_equal(part, whole[5:17])


def starts(recipe: Recipe) -> dict[tuple[int, int], npt.NDArray[np.uint8]]:
    """What each image (class, slot) of a recipe starts from."""
    prepared = prepare(recipe)
    plan, cpu = prepared.plan, torch.device("cpu")
    models = load_members(plan, prepared.storage, plan.members) if recipe.synthesis.start == "mosaic" else []
    return {
        place: image
        for unit in plan.units()
        for place, image in zip(
            product(unit.classes, unit.slots), make_start(plan, prepared.source.train, unit, models, cpu), strict=True
        )
    }


def test_a_run_keeps_what_its_images_started_from(finished: Run) -> None:
    plan, expected = finished.plan, starts(finished.recipe)
    kept = read_set(plan, finished.source, finished.storage, plan.image_set("start"), range(40))
    assert len(expected) == 40
    assert all(np.array_equal(kept[4 * label + slot], image) for (label, slot), image in expected.items())
    distilled = read_set(plan, finished.source, finished.storage, plan.distilled, range(40))
    change = np.abs(kept.astype(int) - distilled).reshape(40, -1).mean(1)
    assert change.min() > 0  # each image is another than its start


@pytest.mark.parametrize("start", ["real", "mosaic"])
def test_start_of_an_image_depends_on_its_class_and_slot_alone(start: str, finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "synthesis", tmp_path)
    few, many = (
        starts(tiny(tmp_path, synthesis__start=start, **units))
        for units in (
            {"synthesis__images_per_class": 2, "synthesis__slots_per_unit": 1},
            {"synthesis__images_per_class": 5, "synthesis__slots_per_unit": 3, "synthesis__classes_per_unit": 10},
        )
    )
    assert len(few) == 20
    assert len(many) == 50 == len({image.tobytes() for image in many.values()})
    assert all(np.array_equal(image, many[place]) for place, image in few.items())


def test_mosaics_are_of_their_own_class_and_run_through_its_images_again_and_again(
    finished: Run, tmp_path: Path
) -> None:
    copy_artifacts(finished, "synthesis", tmp_path)
    whole = {"crop_scale": [1.0, 1.0], "grid": 2, "candidates": 1}
    views = {"crop_ratio": [1.0, 1.0], "flip": False}
    recipe = tiny(
        tmp_path,
        synthesis__images_per_class=10,
        synthesis__start="mosaic",
        synthesis__mosaic=whole,
        synthesis__augmentation=views,
    )
    train = prepare(recipe).source.train
    assert np.bincount(train.labels).max() < 4 * 10
    box = np.array([[0.0, 0.0, 1.0, 1.0, 0.0]])
    for (label, slot), image in starts(recipe).items():
        order = draw_real(train, label, len(train), "start", recipe.seed)
        taken = train.read(order[np.arange(4 * slot, 4 * slot + 4) % len(order)])
        small = to_pixels(apply_boxes(from_pixels(taken, torch.device("cpu")), box.repeat(4, 0), 4)).numpy()
        above, below = np.concatenate([*small[:2]], axis=2), np.concatenate([*small[2:]], axis=2)
        assert np.array_equal(image, np.concatenate([above, below], axis=1))


def test_mosaics_curriculum_and_priors_make_a_set(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "synthesis", tmp_path)
    recipe = tiny(
        tmp_path,
        synthesis__start="mosaic",
        synthesis__steps=6,
        synthesis__curriculum={"crop_scale": [0.9, 1.0]},
        synthesis__tv_weight=0.01,
        synthesis__l2_weight=0.01,
        synthesis__normalise_layers=True,
    )
    session = open_session(recipe)
    synthesis.run(session)
    units = content_hashes(tmp_path, "unit")
    assert len(units) == 10 * 2  # images and starts
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("artifacts/unit/*/manifest.json")]
    for manifest in manifests:
        losses = np.array(manifest["losses"])
        assert losses[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
        assert (losses[:, 1:] > 0).all()  # statistics, cross-entropy and priors
    assert not (tmp_path / "artifacts" / ".checkpoints").exists()


def test_images_that_hold_four_are_distilled_labelled_published_and_exported(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "synthesis", tmp_path)
    recipe = tiny(
        tmp_path,
        synthesis__formation=2,
        labels__views=8,
        labels__cutmix=0.5,
        evaluation__controls=["random_soft", "start_soft", "distilled_hard"],
        evaluation__epochs=4,
    )
    with open(tmp_path / "progress.txt", "w") as stream:
        summary = distill(recipe, Progress(stream))
    assert {stage: facts["reused"] for stage, facts in summary.stages.items() if stage in ("pool", "statistics")} == {
        "pool": True,
        "statistics": True,
    }
    assert len({row.student_steps for row in summary.accuracy.values()}) == 1  # as many steps on four times the content
    prepared = prepare(recipe)
    plan, storage = prepared.plan, prepared.storage
    everything = range(plan.num_images)
    real = [draw_real(prepared.source.train, label, 4 * 4, "start", recipe.seed) for label in range(10)]
    start = read_set(plan, prepared.source, storage, plan.image_set("start"), everything)
    assert np.array_equal(start, shrink(prepared.source.train.read(np.concatenate(real)), 2))
    distilled = read_set(plan, prepared.source, storage, plan.distilled, everything)
    assert (distilled != start).any((1, 2, 3)).all()

    data = load(str(tmp_path / "runs" / "tiny"))
    models = load_members(plan, storage, plan.label_members)
    for epoch in range(1, 9):
        views, targets = data.training.batch(np.arange(len(data)), epoch, torch.device("cpu"))[:2]
        assert np.abs(targets - ensemble(models, views, 1.0, "probabilities")).max() < 2e-3
    assert "holds 2x2 smaller ones" in (tmp_path / "runs/tiny/distilled/README.md").read_text()
    said = export(str(tmp_path / "runs" / "tiny"), "imagefolder", str(tmp_path / "images"))
    assert said.startswith(f"{tmp_path / 'images'}: 160 images, the 4 that each image holds enlarged")
    pngs = sorted((tmp_path / "images" / "3").iterdir())
    whole = enlarge_all(from_pixels(distilled[12:16], torch.device("cpu")), 2)
    assert np.array_equal(np.stack([from_png(path.read_bytes()) for path in pngs]), to_pixels(whole).numpy())


def test_sre2l_is_a_recipe_of_the_same_engine(finished: Run, tmp_path: Path) -> None:
    """One member, its BatchNorms' buffers, noise, the first layer ten times: no statistics stage, no Ray for it."""
    copy_artifacts(finished, "statistics", tmp_path)
    session = open_session(
        tiny(
            tmp_path,
            statistics__source="buffers",
            statistics__scope="global",
            synthesis__start="noise",
            synthesis__first_layer_factor=10.0,
            synthesis__steps=40,
        )
    )
    statistics.run(session)
    artifact = session.storage.open("statistics", session.plan.statistics)
    assert (artifact.manifest["num_images"], artifact.manifest["files"]) == (0, {})
    synthesis.run(session)
    unit = next(session.plan.units())
    losses = session.storage.open("unit", unit.fingerprint).manifest["losses"]
    assert losses[-1][1] < losses[0][1]
    # the target is what the buffers hold
    models = load_members(session.plan, session.storage, session.plan.members)
    moments = buffer_moments(models[0])
    assert list(moments) == list(Taps(models[0]).layers)
    for layer, target in zip(moments, make_targets_of(moments), strict=True):
        norm = models[0].get_submodule(layer)
        assert torch.equal(target[0], norm.running_mean)
        assert torch.equal(target[1], norm.running_var)


def make_targets_of(moments: dict[str, Moments]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """RM and RV of each layer for a batch of any classes."""
    layers, labels = list(moments.values()), torch.tensor([0, 0, 0])
    (target,) = make_targets(layers, layers, labels, scope="global", blend=0.5, device=torch.device("cpu"))
    return list(zip(target.RM, target.RV, strict=True))


@pytest.mark.slow
def test_noise_start_and_small_resnet_of_another_student_recipe(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "synthesis", tmp_path)
    recipe = tiny(
        tmp_path,
        synthesis__start="noise",
        synthesis__steps=5,
        statistics__scope="blend",
        evaluation__students=["resnet18:width=4"],
        evaluation__controls=[],
        evaluation__epochs=2,
        evaluation__ce_weight=0.1,
        evaluation__optimiser="sgd",
        evaluation__schedule="steps",
        evaluation__warmup_epochs=1,
        evaluation__ema=0.5,
    )
    with open(tmp_path / "progress.txt", "w") as stream:
        summary = distill(recipe, Progress(stream))
    assert list(summary.accuracy) == ["distilled"]
    assert summary.accuracy["distilled"].student == "resnet18:width=4"
