"""Labels through Ray: of the stored images, replayed to the bit, in every form."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import Run, Silent, content_hashes, copy_artifacts, open_session, processes, tiny
from torch import Tensor

import teddy_ray
from teddy_ray.errors import InputError, StageError
from teddy_ray.flow import distill, prepare
from teddy_ray.labels import ensemble
from teddy_ray.members import load_members
from teddy_ray.plan import Plan
from teddy_ray.progress import Progress
from teddy_ray.published import check_set
from teddy_ray.recipe_file import dump_recipe
from teddy_ray.stages import evaluation, labels
from teddy_ray.stages.evaluation import Teacher
from teddy_ray.stages.images import read_set
from teddy_ray.stages.labels import Labeller, read_labelled, views_of
from teddy_ray.stages.machine import _inspect
from teddy_ray.storage import to_json
from teddy_ray.tables import plan_table
from teddy_ray.views import ViewedImages

CPU = torch.device("cpu")
ROWS = np.arange(40)


def teacher(plan: Plan, run: Any) -> Teacher:
    """In this process. run: what holds the plan's storage and source."""
    quiet: Any = Silent()
    return Teacher(plan, run.storage, run.source, _inspect(plan.recipe.evaluation), quiet)


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


def digests(plan: Plan, folder: Path, epochs: range) -> list[str]:
    """Of what teddy_ray.load gives in each epoch, image by image, in a process of its own."""
    code = f"""
import hashlib, sys, teddy_ray
data = teddy_ray.load(sys.argv[1])
for epoch in {list(epochs)}:
    for view, _, _ in data.at(epoch):
        print(hashlib.sha256(view.numpy().tobytes()).hexdigest())
"""
    path = str(folder / "runs" / plan.recipe.name / "distilled")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_labels_are_of_the_stored_images(finished: Run) -> None:
    """Invariant 5: what was labelled is what anybody reads back from the published files."""
    plan, store = finished.plan, finished.storage
    data = teddy_ray.load(str(finished.folder / "runs" / "tiny" / "distilled"))
    pixels = read_set(plan, finished.source, store, plan.distilled, range(40))
    assert np.array_equal(data.training.viewed.images, pixels)
    models = load_members(plan, store, plan.members)
    for epoch in range(1, 7):
        views, targets, _ = data.training.batch(ROWS, epoch, CPU)
        again = ensemble(models, views, plan.recipe.labels.temperature, "probabilities")
        assert (again - targets).abs().max() < 1e-3  # float16


def test_students_see_the_labelled_pixels_to_the_bit_in_any_process(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 4: what the labelling stage shows the members, what a student's epoch sees, and what others load."""
    copy_artifacts(finished, "labels", tmp_path)
    recipe = tiny(tmp_path, labels__cutmix=0.5, labels__views=3, labels__batch_size=7, labels__images_per_file=11)
    prepared = prepare(recipe)
    plan = prepared.plan
    part = recipe.labels
    quiet: Any = Silent()
    worker = Labeller(plan, prepared.storage, prepared.source, _inspect(part), "fp32", False, quiet)
    shown: list[Tensor] = []

    def record(models: object, views: Tensor, *rest: object) -> Tensor:
        shown.append(views)
        return torch.full((len(views), 10), 0.1)

    labelled = plan.labelled(plan.distilled)
    with monkeypatch.context() as patched:
        patched.setattr(labels, "ensemble", record)
        viewed_by_members = [torch.empty(40, 1, 8, 8) for _ in range(3)]
        for shard in plan.shards(labelled):
            worker.label(shard, labelled)
            for first in range(shard.rows.start, shard.rows.stop, part.batch_size):
                for view in range(3):
                    batch = shown.pop(0)
                    viewed_by_members[view][first : first + len(batch)] = batch
    assert not shown
    labels.run(open_session(recipe))  # publishes the list of the shards that are there
    run = next(run for run in plan.students if run.row == "distilled")
    training = teacher(plan, prepared).training_set(run)
    order = np.random.default_rng(0).permutation(40)
    for epoch in range(1, 5):
        seen = torch.empty(40, 1, 8, 8)
        for rows in np.array_split(order, 9):
            seen[rows] = training.batch(rows, epoch, CPU).views
        assert digest(seen) == digest(viewed_by_members[(epoch - 1) % 3])
    mixed = [training.viewed.mixes(ROWS, view) for view in range(3)]
    assert any((mixes.boxes != 0).any() for mixes in mixed if mixes)


def test_a_published_epoch_is_what_students_saw_in_another_process(finished: Run) -> None:
    plan = finished.plan
    run = next(run for run in plan.students if run.row == "distilled")
    training = teacher(plan, finished).training_set(run)
    ours = [digest(view) for epoch in (1, 2, 4) for view in training.batch(ROWS, epoch, CPU).views]
    theirs = digests(plan, finished.folder, range(1, 5))
    assert [theirs[40 * (epoch - 1) + row] for epoch in (1, 2, 4) for row in range(40)] == ours


def test_the_published_folder_is_a_data_set_of_the_hub(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = importlib.import_module("datasets")
    folder = finished.folder / "runs" / "tiny" / "distilled"
    theirs = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    ours = teddy_ray.load(str(folder)).training
    assert theirs["label"][:] == ours.labels.tolist()
    assert np.array_equal(np.stack([np.asarray(image) for image in theirs["image"]]), ours.viewed.images[:, 0])
    assert np.array(theirs["soft_label"][:]).shape == (40, 6, 10)


def test_views_of_a_part_are_those_of_the_whole(finished: Run) -> None:
    plan = finished.plan
    pixels = read_set(plan, finished.source, finished.storage, plan.distilled, range(40))
    whole = ViewedImages(pixels, views_of(plan, plan.distilled)).view(ROWS, 2, CPU)
    part = ViewedImages(pixels[10:20], views_of(plan, plan.distilled, rows=range(10, 20)))
    assert digest(part.view(np.arange(10), 2, CPU)) == digest(whole[10:20])


FORMS: dict[str, dict[str, Any]] = {
    "top_k": {"labels__mode": "top_k", "labels__top_k": 2},
    "averaged": {"labels__averaged": True},
    "none": {"labels__mode": "none", "labels__members": {"epochs": [3], "seeds": [1]}},
    "logits": {"labels__ensemble": "logits"},
    "cutmix, top_k": {"labels__cutmix": 1.0, "labels__mode": "top_k", "labels__top_k": 1},
}


QUICK = ("cutmix, top_k",)
"""Stored ones of views that are mixed."""


@pytest.mark.parametrize(
    "form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_every_form_of_labels_makes_a_set_that_students_and_others_read(
    finished: Run, tmp_path: Path, form: str
) -> None:
    copy_artifacts(finished, "labels", tmp_path)
    recipe = tiny(
        tmp_path, **FORMS[form], evaluation__seeds=[0], evaluation__controls=["random_soft"], evaluation__epochs=8
    )
    with open(tmp_path / "progress.txt", "w") as stream:
        summary = distill(recipe, Progress(stream))
    plan = prepare(recipe).plan
    folder = tmp_path / "runs" / "tiny" / "distilled"
    facts = check_set(str(folder))
    assert facts["labels"]["mode"] == recipe.labels.mode == summary.labels["mode"]
    assert summary.bytes["labels"] == plan.label_bytes
    assert (summary.bytes["members"] > 0) == (form == "none")
    assert 0.1 < summary.labels["mass_kept"] <= 1
    assert (summary.labels["mass_kept"] < 1) == ("top_k" in form)
    # what others load is what our students learnt from
    prepared = prepare(recipe)
    run = next(run for run in plan.students if run.row == "distilled")
    ours = teacher(plan, prepared).training_set(run)
    theirs = teddy_ray.load(str(folder)).training
    for epoch in (1, 6, 7, 8):
        for mine, their in zip(ours.batch(ROWS, epoch, CPU), theirs.batch(ROWS, epoch, CPU), strict=True):
            torch.testing.assert_close(their, mine, rtol=1e-4, atol=1e-5)
    if form == "none":
        assert sorted(path.name for path in (folder / "members").iterdir()) == ["00000.safetensors"]


def test_averaged_labels_are_the_mean_of_those_of_the_views(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "labels", tmp_path)
    session = open_session(tiny(tmp_path, labels__averaged=True))
    labels.run(session)
    found = read_labelled(session.storage, session.plan.labelled(session.plan.distilled)).soft_labels
    each = read_labelled(finished.storage, finished.plan.labelled(finished.plan.distilled)).soft_labels
    assert found is not None
    assert each is not None
    mean = sum(each.of(ROWS, view) for view in range(6)) / 6
    np.testing.assert_allclose(found.of(ROWS, 0), mean, atol=1e-3)


def test_members_are_those_of_the_list(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "labels", tmp_path)
    session = open_session(tiny(tmp_path, labels__members={"epochs": [1]}))
    plan = session.plan
    labels.run(session)
    found = read_labelled(session.storage, plan.labelled(plan.distilled))
    weak = [member for member in plan.members if member.epoch == 1]
    views = ViewedImages(found.images, views_of(plan, plan.distilled)).view(ROWS, 3, CPU)
    again = ensemble(load_members(plan, session.storage, weak), views, 1.0, "probabilities")
    assert len(weak) == 2
    assert found.soft_labels is not None
    np.testing.assert_allclose(found.soft_labels.of(ROWS, 3), again, atol=1e-3)


@pytest.mark.parametrize(
    ("labels_", "message"),
    [
        ({"members": {"epochs": [2]}}, "labels.members: found .*chooses none of the pool's members: .*epoch1"),
        ({"mode": "top_k", "top_k": 10}, "labels.top_k: found 10; should be less than the 10 classes"),
        ({"views": 20_000_000}, "labels.images_per_file: found 16; should be at most 10 with 20000000 views of 10"),
    ],
)
def test_labels_that_cannot_be_are_named_before_work_starts(tmp_path: Path, labels_: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(tiny(tmp_path, **{f"labels__{key}": value for key, value in labels_.items()}))


@pytest.mark.parametrize(
    ("labels_", "line"),
    [
        ({}, "labels: 4,800 bytes before compression: 6 views by 4 of 4 members, every class in 16 bits; as much"),
        ({"averaged": True}, "labels: 800 bytes before compression: the mean over 6 views by 4 of 4 members"),
        (
            {"mode": "top_k", "top_k": 2},
            "labels: 1,440 bytes before compression: 6 views by 4 of 4 members, the larg",
        ),
        ({"mode": "none", "members": {"seeds": [0]}}, "labels: none stored; 2 of 4 members, "),
    ],
)
def test_plan_tells_the_bytes_of_labels(tmp_path: Path, labels_: Any, line: str) -> None:
    prepared = prepare(tiny(tmp_path, **{f"labels__{key}": value for key, value in labels_.items()}))
    assert line in plan_table(prepared.plan, prepared.storage)


# -- students ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_the_students_that_are_left(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "evaluation", tmp_path)
    longer = {"evaluation__epochs": 60}
    joined = tiny(tmp_path, **longer, cluster__address=ray.get_runtime_context().gcs_address)
    (tmp_path / "tiny.yaml").write_text(dump_recipe(joined))
    command = [sys.executable, "-m", "teddy_ray.cli", "distill", str(tmp_path / "tiny.yaml")]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def manifests() -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in tmp_path.glob("artifacts/student/*/manifest.json")}

    deadline = time.monotonic() + 120
    while len(manifests()) < 3:
        assert driver.poll() is None
        assert time.monotonic() < deadline, "no student ended"
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    while processes("ray::Teacher"):  # Ray ends what its driver left
        time.sleep(0.05)
    done, session = manifests(), open_session(tiny(tmp_path, **longer))
    plan = session.plan
    assert 3 <= len(done) < len(plan.students)
    assert not session.storage.has("evaluation", plan.evaluation)
    evaluation.run(session)
    assert done.items() <= manifests().items()  # not trained again: a manifest holds its seconds
    assert set(manifests()) == {run.fingerprint for run in plan.students}


@pytest.mark.slow
def test_every_control_budget_and_rate_makes_rows(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "evaluation", tmp_path)
    recipe = tiny(
        tmp_path,
        evaluation__controls=[
            *["random_soft", "random_hard", "start_soft", "start_hard", "distilled_hard", "distilled_plain"],
            *["random_plain", "full_data"],
        ],
        evaluation__seeds=[0],
        evaluation__epochs=2,
        evaluation__longer_epochs=[3],
        evaluation__learning_rate=[1e-6, 5e-3],
    )
    with open(tmp_path / "progress.txt", "w") as stream:
        summary = distill(recipe, Progress(stream))
    small = ["distilled", "random_soft", "start_soft", "distilled_hard", "random_hard", "start_hard"]
    plain = ["distilled_plain", "random_plain"]
    assert set(summary.accuracy) == {*small, *plain, "full_data", *(f"{row}@3" for row in (*small, *plain))}
    assert summary.accuracy["distilled@3"].student_steps == 1.5 * summary.accuracy["distilled"].student_steps
    assert None not in summary.scores.values()
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("artifacts/student/*/manifest.json")]
    assert 5e-3 in {manifest["learning_rate"] for manifest in manifests} <= {1e-6, 5e-3}
    page = (tmp_path / "runs" / "tiny" / "report.html").read_text()
    assert "images before synthesis" in page


def test_the_search_for_a_rate_reads_the_validation_part_alone(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_artifacts(finished, "evaluation", tmp_path)
    recipe = tiny(tmp_path, evaluation__learning_rate=[1e-3, 2e-3], evaluation__epochs=1)
    prepared = prepare(recipe)
    measured: list[tuple[int, float]] = []
    scores = iter([0.7, 0.4, 0.9])

    def measure(model: object, data: object, rows: Any, device: object) -> float:
        measured.append((len(rows), next(scores)))
        return measured[-1][1]

    monkeypatch.setattr(evaluation, "measure", measure)
    run = prepared.plan.students[0]
    teacher(prepared.plan, prepared).train(run)
    num_validation, num_test = len(prepared.source.validation), len(prepared.source.test)
    assert measured == [(num_validation, 0.7), (num_validation, 0.4), (num_test, 0.9)]
    manifest = prepared.storage.open("student", run.fingerprint).manifest
    assert (manifest["learning_rate"], manifest["accuracy"]) == (1e-3, 0.9)


def test_hashes_of_labelled_sets_do_not_depend_on_the_number_of_workers(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "labels", tmp_path)
    session = open_session(tiny(tmp_path, labels__cutmix=1.0))
    labels.run(session)
    copy_artifacts(finished, "labels", tmp_path / "two")
    labels.run(open_session(tiny(tmp_path / "two", labels__cutmix=1.0, labels__num_workers=3)))
    assert content_hashes(tmp_path, "shard") == content_hashes(tmp_path / "two", "shard")


def test_rates_that_diverge_are_left_out_of_the_search(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "evaluation", tmp_path)

    def train(rates: Any) -> Any:
        recipe = tiny(tmp_path, evaluation__learning_rate=rates, evaluation__epochs=2, evaluation__optimiser="sgd")
        prepared = prepare(recipe)
        run = prepared.plan.students[0]
        teacher(prepared.plan, prepared).train(run)
        return prepared.storage.open("student", run.fingerprint).manifest["learning_rate"]

    assert train([1e30, 1e-2]) == 1e-2
    with pytest.raises(StageError, match=r"distilled convnet:width=8 seed 0: .*at any of evaluation.learning_rate"):
        train([1e30, 1e35])


def test_the_whole_training_set_may_be_decoded_as_it_is_needed(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "evaluation", tmp_path)
    found = []
    for keep in (0, 2**30):
        prepared = prepare(tiny(tmp_path, evaluation__keep_bytes=keep))
        run = next(run for run in prepared.plan.students if run.row == "full_data")
        training = teacher(prepared.plan, prepared).training_set(run)
        assert isinstance(training.viewed.images, np.ndarray) == (keep > 0)
        found.append(training.batch(np.array([7, 3, 300]), 5, CPU))
    for kept, decoded in zip(*found, strict=True):
        assert torch.equal(kept, decoded)


def test_labels_that_are_not_finite_name_the_member(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "labels", tmp_path)
    prepared = prepare(tiny(tmp_path))
    plan = prepared.plan
    quiet: Any = Silent()
    worker = Labeller(plan, prepared.storage, prepared.source, _inspect(plan.recipe.labels), "fp32", False, quiet)
    with torch.no_grad():
        next(worker._models[2].parameters()).fill_(float("nan"))
    labelled = plan.labelled(plan.distilled)
    with pytest.raises(StageError, match=rf"labels: distilled rows 0-15: .* {plan.members[2].name} are not finite"):
        worker.label(plan.shards(labelled)[0], labelled)
    assert not list((tmp_path / "artifacts").glob("shard/*"))


def test_members_label_in_bf16_nearly_as_in_fp32(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "labels", tmp_path)
    prepared = prepare(tiny(tmp_path, labels__precision="bf16"))
    plan = prepared.plan
    labels.label_sets(open_session(prepared.plan.recipe), [plan.labelled(plan.distilled)], "labels")
    before, after = (
        read_labelled(run.storage, run.plan.labelled(run.plan.distilled)).soft_labels for run in (finished, prepared)
    )
    assert before is not None
    assert after is not None
    difference = np.abs(before.of(ROWS, 0) - after.of(ROWS, 0))
    assert 0 < difference.max() < 0.03


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_students_train_in_the_precision_of_the_recipe(finished: Run, tmp_path: Path, precision: str) -> None:
    copy_artifacts(finished, "evaluation", tmp_path)
    prepared = prepare(tiny(tmp_path, evaluation__precision=precision))
    run = prepared.plan.students[0]
    seen: list[torch.dtype] = []

    def record(module: torch.nn.Module, inputs: object, output: Any) -> None:
        if isinstance(module, torch.nn.Conv2d):
            seen.append(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        teacher(prepared.plan, prepared).train(run)
    finally:
        hook.remove()
    assert (torch.bfloat16 in seen) == (precision == "bf16")
    assert prepared.storage.open("student", run.fingerprint).manifest["precision"] == precision


# -- publication ---------------------------------------------------------------------------------------------------


def publish(recipe: Any, folder: Path) -> str:
    with open(folder / "progress.txt", "w+") as stream:
        distill(recipe, Progress(stream))
        stream.seek(0)
        return stream.read()


def test_another_licence_publishes_the_set_again_and_leaves_the_users_files(finished: Run, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(finished.folder, storage)
    folder = storage / "runs" / "tiny" / "distilled"
    (folder / "notes.txt").write_text("mine")
    publish(tiny(storage, data__license="cc-by-4.0"), tmp_path)
    assert 'license: "cc-by-4.0"' in (folder / "README.md").read_text()
    assert check_set(str(folder))["license"] == "cc-by-4.0"
    (folder / "README.md").write_text("a card of mine")
    said = publish(tiny(storage, data__license="mit"), tmp_path)
    assert "README.md was edited and is left as it is" in said
    assert check_set(str(folder.parent))["license"] == "mit"
    assert [(folder / name).read_text() for name in ("README.md", "notes.txt")] == ["a card of mine", "mine"]


@pytest.mark.parametrize("left", ["an older format", "half a set"])
def test_what_is_no_set_of_today_is_published_again(finished: Run, tmp_path: Path, left: str) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(finished.folder, storage)
    folder = storage / "runs" / "tiny" / "distilled"
    facts = json.loads((folder / "teddy.json").read_text())
    (folder / "data" / "old.parquet").write_bytes(b"of another publication")
    if left == "half a set":
        (folder / "teddy.json").unlink()
    else:
        (folder / "teddy.json").write_text(to_json({**facts, "format": 1}))
    publish(finished.recipe.model_copy(update={"storage": str(storage)}), tmp_path)
    assert check_set(str(folder)) == facts
