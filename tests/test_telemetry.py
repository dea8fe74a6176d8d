"""What a run tells of itself besides its results: metrics, structured logs, TensorBoard files."""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import Run, copy_artifacts, tiny
from emulated import driver
from tensorboardX.proto.event_pb2 import Event

from teddy_ray.recipe_file import dump_recipe
from teddy_ray.stages import board
from teddy_ray.stages.board import Board, Post
from teddy_ray.storage import Storage
from teddy_ray.tensorboard import write_events


class Series:
    """Takes what Ray's metrics would export."""

    values: dict[tuple[str, str], float]

    def __init__(self, name: str, description: str, tags: tuple[str, ...]) -> None:
        self._name = name

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.values[self._name, tags["stage"]] += value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self._name, tags["stage"]] = value


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    monkeypatch.setattr(Series, "values", defaultdict(float), raising=False)
    monkeypatch.setattr(board, "Counter", Series)
    monkeypatch.setattr(board, "Gauge", Series)
    return Series.values


def test_work_that_is_done_again_is_counted(exported: dict[tuple[str, str], float]) -> None:
    """A unit lost at 0.6 goes on from 0.5, is lost at 0.9, begins anew; another is never lost."""
    posts = board._Posts()
    for share in (0.0, 0.3, 0.6, 0.5, 0.7, 0.9, 0.0, 1.0):
        posts.post("synthesis", "unit", Post(share, "", {}))
        posts.post("synthesis", "other", Post(share if share in (0.0, 0.3) else 0.3, "", {}))
        posts.read("synthesis", [])  # forgets what it shows, not how far things had come
        posts.post("synthesis", "third", Post(0.1, "", {}))
    posts.lost("synthesis", 2)
    posts.lost("synthesis", 0)
    posts.done("synthesis", "unit")
    posts.post("synthesis", "unit", Post(0.0, "", {}))  # another plan's, of the same name
    assert exported["teddy_items_repeated", "synthesis"] == pytest.approx(0.1 + 0.9 + 0.3)
    assert exported["teddy_items_lost", "synthesis"] == 2
    assert exported["teddy_items_done", "synthesis"] == 1


def test_measures_are_exported_as_the_progress_shows_them(exported: dict[tuple[str, str], float]) -> None:
    posts = board._Posts()
    posts.post("synthesis", "a", Post(0.5, "", {"images_steps_per_s": 100.0, "statistics": 3.0}))
    posts.post("synthesis", "b", Post(0.5, "", {"images_steps_per_s": 50.0, "statistics": 4.0}))
    share, note = posts.read("synthesis", ["a", "b"])
    assert (share, note) == (1.0, "150 images·steps/s, statistics 3.50")
    assert exported["teddy_images_steps_per_s", "synthesis"] == 150
    assert exported["teddy_statistics", "synthesis"] == 3.5


def test_what_runs_no_longer_has_no_rate_and_what_is_done_is_done(
    exported: dict[tuple[str, str], float],
) -> None:
    posts = board._Posts()
    posts.post("pool", "training", Post(0.6, "epoch 3", {"loss": 1.5}))
    assert posts.read("pool", ["training"]) == (0.6, "loss 1.50")
    posts.done("pool", "training")
    assert posts.read("pool", ["training"]) == (1.0, "")
    assert exported["teddy_loss", "pool"] == 0


def test_ray_s_prometheus_endpoint_tells_them(shared_ray: None) -> None:
    here = Board()
    poster = here.poster("synthesis")
    poster.begin("unit a")
    poster("unit a", 0.5, images_steps_per_s=123.0, cross_entropy=0.25)
    here.lost("synthesis", 3)
    here.read("synthesis", ["unit a"])
    poster.done("unit a", 1.0)
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    expected = {"items_done": 1, "items_lost": 3, "images_steps_per_s": 123, "cross_entropy": 0.25}
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(url, timeout=10) as reply:
            text = reply.read().decode()
        lines = re.findall(r"^ray_teddy_(\w+?)(?:_total)?\{([^}]*)\} (\S+)$", text, re.MULTILINE)
        found = {name: float(value) for name, tags, value in lines if 'stage="synthesis"' in tags}
        if expected.items() <= found.items():
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


@pytest.mark.slow
def test_logs_in_json_name_stage_item_and_node(finished: Run, tmp_path: Path) -> None:
    """On standard error, and in the workers' own files, which a cluster's log collector reads."""
    copy_artifacts(finished, "synthesis", tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny(tmp_path, logs={"form": "json"})))
    script = str(Path(__file__).parent / "run_stage.py")
    folder = tempfile.mkdtemp(prefix="ray-")  # not below tmp_path: sockets' paths are to be short
    with driver(script, "synthesis", str(recipe), env={"RAY_TMPDIR": folder}) as program:
        assert program.finish() == 0, program.text
    lines = [json.loads(line) for line in program.lines]
    assert lines[0]["message"].startswith("starting Ray on this machine")
    progress = [line for line in lines if line.get("stage") == "synthesis"]
    assert progress[0]["done"] == 0
    assert progress[0]["total"] == 10
    records = [
        json.loads(line)
        for path in Path(folder).rglob("worker-*.err")
        for line in path.read_text().splitlines()
        if '"stage"' in line
    ]
    done = [record for record in records if record["message"] == "done"]
    assert {record["item"] for record in done} == {unit.name for unit in finished.plan.units()}
    assert all(record["stage"] == "synthesis" and record["node_id"] and record["seconds"] > 0 for record in done)
    assert sum(record["message"] == "begins" for record in records) == len(done)


def events_in(path: Path) -> Iterator[Event]:
    """Of a file of TensorBoard's: records of a length, its checksum, the event, its checksum."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def curves_in(folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(folder, tag) -> (step, value) of each scalar."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for path in folder.rglob("events.*"):
        for event in events_in(path):
            for value in event.summary.value:
                curves[path.parent.name, value.tag].append((event.step, value.simple_value))
    return curves


def test_tensorboard_files_hold_the_curves_of_every_stage(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / "artifacts", tmp_path / "artifacts")
    storage, plan = Storage(str(tmp_path)), replace(finished.plan, recipe=finished.recipe)
    folder = tmp_path / "runs" / "tiny" / "tensorboard"
    for stage in plan.stages():
        write_events(plan, storage, stage)
        write_events(plan, storage, stage)  # in place of the first
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation", "pool", "synthesis"]

    units: dict[str, Any] = {
        unit.name.replace(" ", "_"): storage.open("unit", unit.fingerprint).manifest["losses"] for unit in plan.units()
    }
    curves = curves_in(folder / "synthesis")
    assert {name for name, _ in curves} == set(units)
    for (name, tag), points in curves.items():
        column = ["synthesis/statistics", "synthesis/cross_entropy", "synthesis/priors"].index(tag) + 1
        assert points == [(row[0], pytest.approx(row[column], rel=1e-6)) for row in units[name]]

    training = plan.pool_plan.bases[0]
    manifests = [storage.open("member", member.fingerprint).manifest for member in training.members]
    pool = curves_in(folder / "pool")
    name = next(name for name, tag in pool if name.endswith("seed0"))
    assert pool[name, "pool/validation_accuracy"] == [
        (member.epoch, pytest.approx(manifest["validation_accuracy"]))
        for member, manifest in zip(training.members, manifests, strict=True)
    ]
    assert pool[name, "pool/loss"] == [
        (epoch, pytest.approx(loss)) for epoch, loss in enumerate(manifests[-1]["losses"], start=1)
    ]
    assert len({name for name, _ in curves_in(folder / "evaluation")}) == len(plan.students)
