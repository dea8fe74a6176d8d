"""Workers and drivers die: the run goes on or resumes, with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import NEEDS, Run, content_hashes, copy_artifacts, marked_processes, open_session, processes, tiny
from safetensors.torch import load

from teddy_ray.checkpoints import DIGEST
from teddy_ray.errors import InputError, StageError
from teddy_ray.recipe_file import dump_recipe
from teddy_ray.stages import synthesis
from teddy_ray.stages.dispatch import Dispatcher
from teddy_ray.stages.executor import RayExecutor


@dataclass(frozen=True)
class Word:
    """An item of work."""

    name: str


Killer = Callable[[str, int], list[int]]


LONG_UNITS = {"synthesis__steps": 600, "synthesis__images_per_class": 3, "synthesis__slots_per_unit": 1}
"""Fifteen units, five of which may run at the same time; a second or two each."""


def run_synthesis(finished: Run, folder: Path, **overrides: object) -> list[dict[str, Any]]:
    """The stage on the finished run's pool and statistics; gives the units' manifests."""
    copy_artifacts(finished, "synthesis", folder)
    session = open_session(tiny(folder, **LONG_UNITS, **overrides))
    synthesis.run(session)
    return [session.storage.open("unit", unit.fingerprint).manifest for unit in session.plan.units()]


@pytest.mark.slow
def test_three_and_killed_workers_give_the_same_bytes(finished: Run, tmp_path: Path) -> None:
    """Invariant 3: three workers, of which two are killed in mid-unit. What they had done is not done again."""
    three = run_synthesis(finished, tmp_path / "three", synthesis__num_workers=3)
    assert len(three) == 15
    assert len({manifest["worker"] for manifest in three}) == 3  # every worker finished one

    assassin = Assassin(tmp_path / "killed", num_workers=3, kills=2)
    with assassin:
        killed = run_synthesis(finished, tmp_path / "killed", synthesis__num_workers=3, synthesis__checkpoint_s=0.0)
    assert len(assassin.steps) == 2, "units ended before their workers could be killed"
    assert len({manifest["worker"] for manifest in killed}) >= 3  # the killed ones had finished one before
    resumed = {manifest["fingerprint"]: manifest["resumed_at"] for manifest in killed if manifest["resumed_at"]}
    assert resumed
    for steps in assassin.steps:  # of each unit under way at a kill
        assert min(steps.values()) > 0
        # one of them was lost, and went on from where its last checkpoint stood or later
        assert any(resumed.get(unit, 0) >= step for unit, step in steps.items())
    assert not list((tmp_path / "killed" / "artifacts" / ".checkpoints" / "unit").iterdir())
    assert content_hashes(tmp_path / "three", "unit") == content_hashes(tmp_path / "killed", "unit")


class Assassin:
    """Kills workers of the synthesis, each at a moment when all that are left stand in mid-unit and have finished one.

    steps: for each kill, the step of the last checkpoint of every unit under way.
    """

    def __init__(self, folder: Path, num_workers: int, kills: int) -> None:
        self._artifacts, self._num_workers, self._kills = folder / "artifacts", num_workers, kills
        self.steps: list[dict[str, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Assassin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        veterans: set[int] = set()
        while len(self.steps) < self._kills and not self._stop.wait(0.01):
            workers = processes("ray::Synthesiser.optimise")
            done = len(list(self._artifacts.glob("unit/*/manifest.json")))
            if not veterans and done >= 2 * self._num_workers:
                veterans = set(workers)
            at_work = veterans & set(workers)
            steps = self._steps_under_way()
            if at_work and len(workers) >= self._num_workers - len(self.steps) and len(steps) >= len(workers):
                os.kill(at_work.pop(), signal.SIGKILL)
                veterans &= at_work
                self.steps.append(steps)

    def _steps_under_way(self) -> dict[str, int]:
        steps = {}
        for path in self._artifacts.glob(".checkpoints/unit/*.safetensors"):
            try:
                steps[path.stem] = int(load(path.read_bytes()[DIGEST:])["step"])
            except FileNotFoundError:  # its unit ended just now
                continue
        return steps


def test_non_finite_loss_names_unit_step_and_model(finished: Run, tmp_path: Path) -> None:
    """Invariant 8, through Ray: the unit's own failure is not tried again."""
    copy_artifacts(finished, "synthesis", tmp_path)
    session = open_session(tiny(tmp_path, synthesis__ce_weight=1e38, synthesis__learning_rate=1e30))
    with pytest.raises(StageError, match=r"unit classes \d-\d slots \d-\d, step \d+, member convnet:width=32/seed\d"):
        synthesis.run(session)
    assert not (tmp_path / "artifacts" / "synthesis").exists()


def test_damaged_weights_stop_the_run_and_are_named(finished: Run, tmp_path: Path) -> None:
    copy_artifacts(finished, "synthesis", tmp_path)
    weights = next((tmp_path / "artifacts" / "member").glob("*/weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"weights.safetensors'; the file has changed since; delete its folder"):
        synthesis.run(open_session(tiny(tmp_path)))


def test_more_workers_than_the_cluster_holds_end_all_the_same(shared_ray: None) -> None:
    """Two workers of three CPUs on four: the second can start only when the first is let go."""

    class Echo:
        def say(self, item: str) -> str:
            return item

    actor = ray.remote(num_cpus=3)(Echo)
    executor = RayExecutor[Word](actor.remote, lambda worker, word: worker.say.remote(word.name))
    dispatcher = Dispatcher[Word]("test", executor, num_workers=lambda: 2)
    words = [Word("a"), Word("b"), Word("c")]
    assert {result for _, result in dispatcher.run(words)} == {"a", "b", "c"}


def test_errors_of_the_work_are_told_from_lost_workers(shared_ray: None) -> None:
    """Not tried again, and with the item and the remote traceback."""

    class Broken:
        def work(self, item: str) -> None:
            raise OSError(28, "No space left on device")

    actor = ray.remote(num_cpus=1)(Broken)
    executor = RayExecutor[Word](actor.remote, lambda worker, word: worker.work.remote(word.name))
    dispatcher = Dispatcher[Word]("test", executor, num_workers=lambda: 1)
    with pytest.raises(StageError, match=r"(?s)^test: a: .*in work.*No space left on device"):
        list(dispatcher.run([Word("a")]))


def test_memory_that_runs_out_is_one_of_the_errors_of_the_work(shared_ray: None) -> None:
    """As it is on a GPU, where the worker lives on."""

    class Greedy:
        def work(self, item: str) -> None:
            raise torch.OutOfMemoryError("tried to allocate 90 GiB")

    actor = ray.remote(num_cpus=1)(Greedy)
    executor = RayExecutor[Word](actor.remote, lambda worker, word: worker.work.remote(word.name))
    dispatcher = Dispatcher[Word]("test", executor, num_workers=lambda: 1, memory_remedy="lower it")
    with pytest.raises(StageError, match=r"^test: a: out of memory; lower it \(tried to allocate 90 GiB\)$"):
        list(dispatcher.run([Word("a")]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "title"),
    [("pool", "ray::RayTrainWorker"), ("labels", "ray::Labeller.label"), ("evaluation", "ray::Teacher")],
)
def test_other_stages_survive_a_killed_worker(
    finished: Run, tmp_path: Path, killer: Killer, stage: str, title: str
) -> None:
    copy_artifacts(finished, stage, tmp_path)
    session = open_session(tiny(tmp_path, **{f"{stage}__num_workers": 3}))
    killed = killer(title, 1)
    import_module(f"teddy_ray.stages.{stage}").run(session)
    assert len(killed) == 1
    for kind in ("member", "shard"):
        made = content_hashes(tmp_path, kind)
        assert made.items() <= content_hashes(finished.folder, kind).items()


WORKERS = {
    "pool": "ray::RayTrainWorker",
    "statistics": "ray::MapWorker",
    "synthesis": "ray::Synthesiser",
    "labels": "ray::Labeller",
    "evaluation": "ray::Teacher",
}
"""Titles of the processes that do a stage's work."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "how"), [("synthesis", signal.SIGTERM), *((stage, signal.SIGINT) for stage in NEEDS)]
)
def test_an_interrupt_ends_cleanly_and_resumes(finished: Run, tmp_path: Path, stage: str, how: signal.Signals) -> None:
    """A driver of its own with a Ray of its own: ended within 20 s, nothing half published, no process left."""
    copy_artifacts(finished, stage, tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump_recipe(tiny(tmp_path, **{f"{stage}__num_workers": "auto"})))
    command = [sys.executable, "-m", "teddy_ray.cli", "distill", str(tmp_path / "tiny.yaml")]
    mark = f"TEDDY_TEST={uuid.uuid4().hex}"
    environment = {**os.environ, **dict([mark.split("=")])}
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    assert driver.stderr is not None
    for line in driver.stderr:
        if line.startswith(f"{stage} ") and "0.0/" in line:
            break
    deadline = time.monotonic() + 60
    while not set(processes(WORKERS[stage])) & set(marked_processes(mark)):
        assert time.monotonic() < deadline, "no worker of the stage came up"
        time.sleep(0.02)
    started = time.monotonic()
    if how == signal.SIGINT:
        os.killpg(driver.pid, how)  # as a terminal does
    else:
        driver.send_signal(how)
    message = driver.stderr.read()
    assert driver.wait() == 130, message
    assert time.monotonic() - started < 20
    assert "this resumes: teddy-ray distill" in message
    assert not list((tmp_path / "artifacts").glob(f"{stage}/{getattr(finished.plan, stage)}"))
    assert not (tmp_path / "artifacts" / ".staging").exists()
    for manifest_folder in (tmp_path / "artifacts").glob("*/*"):
        assert (manifest_folder / "manifest.json").is_file()
    deadline = time.monotonic() + 10
    while left := marked_processes(mark):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.2)

    import_module(f"teddy_ray.stages.{stage}").run(open_session(tiny(tmp_path)))
    for kind in ("member", "statistics", "moments", "unit", "shard"):
        made = content_hashes(tmp_path, kind)
        assert made.items() <= content_hashes(finished.folder, kind).items()
