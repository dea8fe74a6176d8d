"""The pool on Ray Train: what it publishes, what a lost worker costs, and what stops a run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, content_hashes, copy_artifacts, open_session, processes, tiny
from safetensors.torch import load

from teddy_ray.checkpoints import DIGEST
from teddy_ray.errors import InputError
from teddy_ray.flow import distill
from teddy_ray.members import check_rows, load_members
from teddy_ray.pixels import from_pixels
from teddy_ray.progress import Progress
from teddy_ray.recipe import Recipe
from teddy_ray.stages import pool
from teddy_ray.stages.desk import _Desk
from teddy_ray.stages.session import Session

WORKER = "ray::RayTrainWorker"


def run_pool(recipe: Recipe) -> tuple[Session, list[dict[str, Any]]]:
    """The stage; gives the members' manifests too."""
    session = open_session(recipe)
    pool.run(session)
    return session, [
        dict(session.storage.open("member", member.fingerprint).manifest) for member in session.plan.members
    ]


def test_the_manifest_says_what_a_member_is(finished: Run) -> None:
    plan, storage = finished.plan, finished.storage
    listed = storage.open("pool", plan.pool).manifest
    assert finished.summary.generation == {"chosen": "prior", "reason": "the recipe asks for it"}
    assert [(member["seed"], member["epoch"]) for member in listed["members"]] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    for member, entry in zip(plan.members, listed["members"], strict=True):
        manifest = storage.open("member", member.fingerprint).manifest
        assert manifest["classes"] == [str(digit) for digit in range(10)]
        assert manifest["data"] == finished.source.train.identity
        assert (manifest["architecture"], manifest["ratio"]) == ("convnet:width=32", 0.0)
        assert entry["weights_sha256"] == manifest["files"]["weights.safetensors"]["sha256"]
    # the accuracy is that of the weights that lie there, on the validation part
    pixels, labels = finished.source.validation.read(), torch.from_numpy(finished.source.validation.labels)
    for model, entry in zip(load_members(plan, storage, plan.members), listed["members"], strict=True):
        right = model(from_pixels(pixels, torch.device("cpu"))).argmax(1) == labels
        assert float(right.float().mean()) == pytest.approx(entry["validation_accuracy"])
    assert listed["members"][1]["validation_accuracy"] > 0.5


@pytest.fixture
def kill_in_epoch() -> Iterator[Any]:
    """Starts a thread that kills one worker when the training of every checkpoint has so many epochs behind it."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def start(folder: Path, epoch: int, num_trainings: int) -> dict[str, int]:
        """Gives the epochs at that moment, by training, once it has."""
        seen: dict[str, int] = {}

        def watch() -> None:
            while not stop.is_set():
                epochs = {path.stem: epochs_in(path) for path in folder.glob("artifacts/.checkpoints/training/*")}
                if len(epochs) == num_trainings and min(epochs.values()) >= epoch:
                    os.kill(processes(WORKER)[-1], signal.SIGKILL)
                    seen.update(epochs)
                    return
                time.sleep(0.02)

        threads.append(threading.Thread(target=watch, daemon=True))
        threads[-1].start()
        return seen

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def epochs_in(path: Path) -> int:
    """Epochs done, by a training's checkpoint."""
    try:
        return len(load(path.read_bytes()[DIGEST:])["losses"])
    except FileNotFoundError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize(("workers_per_base", "num_trainings"), [(1, 2), (2, 1)], ids=["alone", "shared"])
def test_a_killed_worker_costs_an_epoch_at_most(
    shared_ray: None, tmp_path: Path, kill_in_epoch: Any, workers_per_base: int, num_trainings: int
) -> None:
    """Of each training in its worker group; and the members come out the same."""
    changes: dict[str, Any] = {
        "pool__architectures": ["convnet:width=16"],
        "pool__seeds": list(range(num_trainings)),
        "pool__snapshots": [2, 8],
        "pool__batch_size": 4,
        "pool__num_workers": 2,
        "pool__workers_per_base": workers_per_base,
    }
    _, unharmed = run_pool(tiny(tmp_path / "unharmed", **changes))
    assert {manifest["resumed_at"] for manifest in unharmed} == {0}
    seen = kill_in_epoch(tmp_path / "killed", 3, num_trainings)
    session, manifests = run_pool(tiny(tmp_path / "killed", **changes))
    assert seen, "no worker was killed"
    resumed = {}
    for training in session.plan.pool_plan.bases:
        last = session.storage.open("member", training.members[-1].fingerprint).manifest
        assert len(last["losses"]) == 8
        resumed[training.fingerprint] = last["resumed_at"]
    # another worker may have come to its end before Ray Train stopped it; the killed one's training went on
    assert max(resumed.values()) >= 3
    assert all(epoch == 0 or epoch >= seen[training] for training, epoch in resumed.items())
    assert content_hashes(tmp_path / "killed", "member") == content_hashes(tmp_path / "unharmed", "member")
    assert not list((tmp_path / "killed").glob("artifacts/.checkpoints/training/*"))
    assert manifests[-1]["validation_accuracy"] > 0.6


POST: dict[str, Any] = {
    "pool__generation": "post",
    "pool__num_workers": 2,
    "pool__seeds": [0],
    "pool__post": {"ratios": [0.0, 0.25, 0.5], "epochs": 2, "learning_rate": 1e-3},
    "synthesis__steps": 5,
    "evaluation__controls": [],
    "evaluation__epochs": 1,
}


def test_a_post_pool_is_pruned_and_fine_tuned(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "statistics", tmp_path)
    session, manifests = run_pool(tiny(tmp_path, **POST))
    plan, storage = session.plan, session.storage
    (base,) = plan.pool_plan.bases
    assert base.members[-1].name == "convnet:width=32/seed0/epoch3"  # trained before, by the prior pool
    parameters = [manifest["parameters"] for manifest in manifests]
    assert parameters[0] > 1.5 * parameters[1] > 2 * parameters[2]
    assert [manifest["ratio"] for manifest in manifests] == [0.0, 0.25, 0.5]
    models = load_members(plan, storage, plan.members)
    weights = [sum(weight.numel() for weight in model.parameters()) for model in models]
    assert weights == parameters
    trained = load_members(plan, storage, base.members)[-1].state_dict()
    assert not torch.equal(models[0].state_dict()["network.classifier.bias"], trained["network.classifier.bias"])
    accuracies = [manifest["validation_accuracy"] for manifest in manifests]
    assert accuracies[0] > 0.7
    assert min(accuracies) > 0.4  # a random one has 0.1
    assert content_hashes(tmp_path, "member").keys() > content_hashes(finished.folder, "member").keys()


@pytest.mark.slow
def test_the_rest_of_the_pipeline_takes_a_post_pool(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "statistics", tmp_path)
    with open(os.devnull, "w") as stream:
        summary = distill(tiny(tmp_path, **POST), Progress(stream))
    assert summary.generation["chosen"] == "post"
    assert [member["ratio"] for member in summary.pool] == [0.0, 0.25, 0.5]
    parameters = [member["parameters"] for member in summary.pool]
    assert parameters[0] > 1.5 * parameters[1] > 2 * parameters[2]
    assert "pruned" in (tmp_path / "runs" / "tiny" / "report.html").read_text()


def edit_manifest(folder: Path, **facts: Any) -> Path:
    """Writes other facts into the manifest of a member, as another tool might have."""
    path = sorted(folder.glob("artifacts/member/*/manifest.json"))[0]
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, **facts}))
    return path


def test_a_member_that_is_less_often_right_than_it_was_stops_the_run(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "statistics", tmp_path)
    session = open_session(tiny(tmp_path))
    pool.check(session)  # as they are, all is well
    edit_manifest(tmp_path, check_accuracy=0.0)
    with pytest.raises(InputError, match=r"(?s)member convnet.*, accuracy: found 0\.\d+; its manifest says 0.0000 on"):
        pool.check(session)


def test_a_member_of_other_classes_stops_the_run(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "statistics", tmp_path)
    edit_manifest(tmp_path, classes=["0", "1", "3", "2", *"456789"])
    with pytest.raises(InputError, match=r"output 2 is '3', in the data '2'; output 3 is '2', in the data '3'$"):
        pool.check(open_session(tiny(tmp_path)))


def test_rows_of_the_check_are_spread_over_the_validation_part() -> None:
    assert np.array_equal(check_rows(5), np.arange(5))
    rows = check_rows(10_000)
    assert len(rows) == 200
    assert (rows[0], rows[-1]) == (0, 9_999)
    assert set(np.diff(rows)) <= {50, 51}


def test_the_desk_hands_out_every_training_once_whoever_is_lost() -> None:
    desk = _Desk(5)
    desk.reserve("a", 2)
    assert desk.num_left() == 3  # those of a run that has yet to come up are spoken for
    desk.reserve("b", 1)
    assert [desk.take("a"), desk.take("b"), desk.take("a"), desk.take("a")] == [0, 2, 1, 3]
    desk.put_back("a", finished=[0])
    assert desk.take("a") == -1  # a worker that is given up but still alive
    assert desk.num_left() == 3
    assert [desk.take("b") for _ in range(4)] == [1, 3, 4, -1]

    desk.put_back("b", finished=[1, 2, 3, 4])
    assert desk.num_left() == 0


def test_trainings_reserved_and_never_begun_are_put_back() -> None:
    desk = _Desk(3)
    desk.reserve("a", 3)
    assert desk.take("a") == 0
    desk.put_back("a", finished=[])
    assert desk.num_left() == 3
