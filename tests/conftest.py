"""Fixtures: a small recipe of the digits, one Ray for all tests that can share it, artifacts built once."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from teddy_ray.flow import Prepared, distill, prepare
from teddy_ray.models import Classifier, build
from teddy_ray.pool import Labelled, train
from teddy_ray.pool_plan import Member, Training
from teddy_ray.progress import Progress
from teddy_ray.recipe import Augmentation, Pool, Recipe
from teddy_ray.recipe_file import parse_recipe
from teddy_ray.stages.session import Session
from teddy_ray.storage import Storage
from teddy_ray.summary import Summary
from teddy_ray.training import State

if TYPE_CHECKING:
    from object_store import ObjectStore

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "sklearn:digits", "image_size": 8, "channels": 1, "limit_per_class": 40},
    "pool": {"architectures": ["convnet:width=32"], "seeds": [0, 1], "snapshots": [1, 3], "batch_size": 16},
    "statistics": {"chunk_size": 25, "batch_size": 10},
    "synthesis": {"images_per_class": 4, "steps": 60, "classes_per_unit": 2, "slots_per_unit": 2},
    "labels": {"views": 6, "images_per_file": 16, "batch_size": 8, "precision": "fp32"},
    "evaluation": {"students": ["convnet:width=8"], "seeds": [0, 1], "epochs": 4, "full_data_epochs": 1},
}
"""Ten units, three files of labels, eight students; seconds on one core."""

STAGES = ("pool", "statistics", "synthesis", "labels", "evaluation")

NEEDS = {
    "pool": [],
    "statistics": ["member", "pool"],
    "synthesis": ["member", "pool", "statistics", "moments"],
    "labels": ["member", "pool", "statistics", "moments", "unit", "synthesis"],
    "evaluation": ["member", "pool", "statistics", "moments", "unit", "synthesis", "shard", "labels"],
}
"""The artifacts on which a stage builds."""


def pytest_configure() -> None:
    torch.set_num_threads(1)
    os.environ["HOME"] = tempfile.mkdtemp(prefix="teddy-home-")  # Ray writes a token there
    # for object_store; Ray's workers have the environment that it was started in, and nobody's own is to be used
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HOME"], ignore_errors=True)


def tiny(storage: Path | str, **overrides: Any) -> Recipe:
    """The tiny recipe, with one worker a stage, for it is their start that takes time; overrides name keys with __ for
    the dot, such as synthesis__steps=5."""
    tree: dict[str, Any] = {key: dict(part) if isinstance(part, dict) else part for key, part in TINY.items()}
    for stage in STAGES:
        tree[stage]["num_workers"] = 1
    tree["storage"] = str(storage)
    for key, value in overrides.items():
        section, _, leaf = key.rpartition("__")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return parse_recipe(tree)


def train_on(
    pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], epochs: Sequence[int], *, seed: int = 0, **pool: Any
) -> dict[int, Classifier]:
    """A small ConvNet trained on images (n c h w) of ten classes, as it was after each of the epochs."""
    settings = Pool(**{"batch_size": 32, "learning_rate": 5e-3, "augmentation": Augmentation(flip=False), **pool})
    training = a_training(epochs, seed=seed)
    model = build(
        training.architecture, num_classes=10, channels=pixels.shape[1], image_size=pixels.shape[2], seed=seed
    )
    state = State.begin(model, settings.weight_decay)
    states = train(state, training, in_memory(pixels, labels), settings, num_classes=10, device=torch.device("cpu"))
    return {state.epoch: copy.deepcopy(model) for state in states if state.epoch in epochs}


def a_training(epochs: Sequence[int], *, seed: int = 0, architecture: str = "convnet:width=16,depth=2") -> Training:
    """A trajectory from freshly drawn weights."""
    members = tuple(Member(f"epoch{epoch}", architecture, seed, 0.0, epoch, f"member{epoch}") for epoch in epochs)
    return Training(f"{architecture}/seed{seed}", architecture, seed, None, 0.0, 5e-3, 1, members, "training")


def in_memory(pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> Labelled:
    """Images that are read from an array."""
    return Labelled(lambda parts: (pixels[part] for part in parts), labels)


class Silent:
    """A poster for workers that run in this process."""

    def begin(self, item: str, share: float = 0.0, note: str = "") -> None:
        pass

    def __call__(self, item: str, share: float, note: str = "", **measures: float) -> None:
        pass

    def done(self, item: str, seconds: float) -> None:
        pass


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """One local Ray for every test that ends no node and no driver. Four logical CPUs, however many there are."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local", num_cpus=4, object_store_memory=200_000_000, dashboard_host="127.0.0.1", log_to_driver=False
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_stores() -> Iterator[ObjectStore]:
    """One S3 for all tests, on loopback."""
    from object_store import ObjectStore  # moto, which few tests need

    server = ObjectStore()
    yield server
    server.close()


@pytest.fixture
def object_store(object_stores: ObjectStore) -> Iterator[ObjectStore]:
    """It, without faults and with its counters at 0."""
    object_stores.gate.reset()
    yield object_stores
    object_stores.gate.reset()


class Run:
    """A finished run of the tiny recipe with one worker per stage."""

    def __init__(self, recipe: Recipe, prepared: Prepared, summary: Summary, folder: Path, progress: str) -> None:
        self.recipe, self.plan, self.source = recipe, prepared.plan, prepared.source
        self.storage, self.summary, self.folder, self.progress = prepared.storage, summary, folder, progress


@pytest.fixture(scope="session")
def finished(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole pipeline once. Tests read it or copy its artifacts, and never write to it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny(folder)
    with open(folder / "progress.txt", "w+") as stream:
        summary = distill(recipe, Progress(stream))
        stream.seek(0)
        text = stream.read()
    return Run(recipe, prepare(recipe), summary, folder, text)


def copy_artifacts(finished: Run, stage: str, target: Path) -> None:
    """What `stage` builds on, from the finished run."""
    (target / "artifacts").mkdir(parents=True)
    for kind in NEEDS[stage]:
        shutil.copytree(finished.folder / "artifacts" / kind, target / "artifacts" / kind)


def open_session(recipe: Recipe) -> Session:
    """A session on the shared Ray, for running a single stage."""
    prepared = prepare(recipe)
    return Session(prepared.plan, prepared.source, prepared.storage, Progress(open(os.devnull, "w")))


def content_hashes(folder: Path, kind: str) -> dict[str, bytes]:
    """Bytes of every file of a kind of artifact but its manifest, which holds times."""
    root = folder / "artifacts" / kind
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.fixture
def bucket() -> Storage:
    """A store that is no local file system."""
    pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    memory = MemoryFileSystem()
    memory.store, memory.pseudo_dirs = {}, [""]
    storage = Storage("elsewhere")
    storage.fs, storage.root, storage.is_local = PyFileSystem(FSSpecHandler(memory)), "/bucket", False
    return storage


def processes(title: str) -> list[int]:
    """Ids of processes of this test run whose command line starts so."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                ours = os.environ["HOME"].encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if ours and command.startswith(title):
                found.append(int(entry.name))
    return found


def marked_processes(mark: str) -> list[int]:
    """Ids of the processes that inherited an environment with this mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if mark.encode() in environment:
                found.append(int(entry.name))
    return found


@pytest.fixture
def killer() -> Iterator[Callable[[str, int], list[int]]]:
    """Starts a thread that kills the first `times` processes of a title, one after another; gives their ids."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def start(title: str, times: int) -> list[int]:
        killed: list[int] = []

        def watch() -> None:
            while len(killed) < times and not stop.is_set():
                for pid in processes(title):
                    if pid not in killed and len(killed) < times:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                        break
                time.sleep(0.02)

        threads.append(threading.Thread(target=watch, daemon=True))
        threads[-1].start()
        return killed

    yield start
    stop.set()
    for thread in threads:
        thread.join()
