"""Speed and memory of the statistics stage: `make bench`, or with `--data train.parquet` on images of one's own.

Four untrained members with drawn BatchNorm buffers. Side by side, in rounds: decoding alone (one thread), forward
passes and moments on decoded images (one thread), the whole stage (workers of one thread for each of the two, start-up
left out), and four passes of the stage with one member each. Then the stage's peak memory on few and on many images.
"""

from __future__ import annotations

import argparse
import io
import logging
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from torch import nn

from teddy_ray import device
from teddy_ray.engine import inspect_machine
from teddy_ray.flow import prepare
from teddy_ray.members import load_members, publish_member
from teddy_ray.models import build
from teddy_ray.pixels import from_pixels
from teddy_ray.plan import blocks
from teddy_ray.progress import Progress
from teddy_ray.recipe import Recipe
from teddy_ray.recipe_file import parse_recipe
from teddy_ray.sources.loader import Loader
from teddy_ray.stages import statistics as stage
from teddy_ray.stages.session import Session
from teddy_ray.statistics import Measurer

NUM_CLASSES, FEW, MANY = 10, 10_000, 50_000
POOLS = {"convnet": ["convnet:width=32"], "mixed": ["convnet:width=32", "resnet18:width=16"]}
"""Architectures of the four members."""


def write_images(path: Path, num: int) -> None:
    """A Parquet file of JPEGs of 32x32 that compress as photographs do: smooth, with some noise."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(num):
        coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=92)
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": index % NUM_CLASSES})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5000)


def recipe_of(
    data: str, storage: Path, architectures: list[str], num_images: int, workers: int, members: int
) -> Recipe:
    """A pool of so many members on so many images, as many of each class."""
    snapshots = list(range(1, members // len(architectures) + 1))
    return parse_recipe(
        {
            "name": "statistics",
            "storage": str(storage),
            "data": {
                "source": data,
                "test_fraction": 0.0002,
                "validation": 0.0002,
                "limit_per_class": num_images // NUM_CLASSES,
            },
            "pool": {"architectures": architectures, "snapshots": snapshots},
            "statistics": {"num_workers": workers},
            "evaluation": {"controls": []},
        }
    )


def session_of(recipe: Recipe) -> Session:
    """With an untrained pool published."""
    prepared = prepare(recipe)
    session = Session(prepared.plan, prepared.source, prepared.storage, Progress())
    for member in session.plan.members:
        if not session.storage.has("member", member.fingerprint):
            model = untrained(member.architecture, member.epoch)
            publish_member(session.storage, session.plan, member, model, accuracy=0.0, check_accuracy=0.0, facts={})
    return session


def untrained(architecture: str, seed: int) -> nn.Module:
    """With BatchNorm buffers that are not those of a new layer."""
    model = build(architecture, num_classes=NUM_CLASSES, channels=3, image_size=32, seed=seed)
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=random) * 0.1
            module.running_var = torch.rand(module.num_features, generator=random) + 0.5
    return model


def run_stage(session: Session) -> dict[str, Any]:
    """The manifest of the statistics, taken anew."""
    for kind in ("statistics", "moments", "chunk"):
        shutil.rmtree(Path(session.storage.root) / "artifacts" / kind, ignore_errors=True)
    stage.run(session)
    return dict(session.storage.open("statistics", session.plan.statistics).manifest)


def decode_rate(session: Session) -> tuple[float, list[npt.NDArray[np.uint8]]]:
    """Images per second of one decoding thread, and the batches."""
    images = session.source.train
    started = time.perf_counter()
    with Loader(images, max_bytes=0, num_threads=1) as loader:
        batches = list(loader.ahead(map(np.array, blocks(len(images), session.recipe.statistics.batch_size))))
    return len(images) / (time.perf_counter() - started), batches


def forward_rate(session: Session, measurer: Measurer, batches: list[npt.NDArray[np.uint8]]) -> float:
    """Images per second of forward passes and moments of all members on decoded images."""
    cpu, labels, ids = torch.device("cpu"), torch.from_numpy(session.source.train.labels), session.source.train.ids

    def stream() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        done = 0
        for batch in batches:
            rows = slice(done, done := done + len(batch))
            yield stage.views_of(session.recipe, ids[rows], from_pixels(batch, cpu)), labels[rows]

    started = time.perf_counter()
    measurer.measure(stream(), NUM_CLASSES)
    return len(labels) / (time.perf_counter() - started)


def measure_rates(data: str, folder: Path, pool: str, num_images: int, workers: int, rounds: int) -> None:
    """Prints a row."""
    session = session_of(recipe_of(data, folder, POOLS[pool], num_images, workers, 4))
    singles = [
        session_of(recipe_of(data, folder / f"single-{index}", [member.architecture], num_images, workers, 1))
        for index, member in enumerate(session.plan.members)
    ]
    cpu = device.prepare(1, 0)
    models = load_members(session.plan, session.storage, session.plan.members)
    measurer = Measurer(models, cpu, kernels=inspect_machine(cpu).kernels)
    results = []
    for _ in range(rounds):
        decoding, batches = decode_rate(session)
        forward = forward_rate(session, measurer, batches)
        manifest = run_stage(session)
        assert manifest["num_decoded"] == manifest["num_images"] == len(session.source.train)
        four = sum(single["num_images"] / single["images_per_s"] for single in map(run_stage, singles))
        results.append((decoding, forward, manifest["images_per_s"], len(session.source.train) / four))
    decoding, forward, together, separate = (statistics.median(column) for column in zip(*results, strict=True))
    share = statistics.median(row[2] / min(row[:2]) for row in results)
    gain = statistics.median(row[2] / row[3] for row in results)
    print(
        f"| {pool}, {workers} worker(s) | {decoding:,.0f} | {forward:,.0f} | {together:,.0f} | {share:.0%} "
        f"| {separate:,.0f} | {gain:.2f} |",
        flush=True,
    )


class Watch:
    """The highest peak (VmHWM) of any worker of the stage, in MB, while entered."""

    def __init__(self) -> None:
        self.peak_mb, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._over.wait(0.05):
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    if (entry / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                        status = (entry / "status").read_text()
                        self.peak_mb = max(self.peak_mb, float(status.split("VmHWM:")[1].split()[0]) / 1e3)
                except (OSError, IndexError):
                    continue


def measure_memory(data: str, folder: Path, pool: str, workers: int) -> None:
    """Prints a line."""
    peaks = []
    for num_images in (FEW, MANY):
        with Watch() as watch:
            run_stage(session_of(recipe_of(data, folder, POOLS[pool], num_images, workers, 4)))
        peaks.append(watch.peak_mb)
    few, many = peaks
    growth = f"{few:,.0f} MB at {FEW:,} images, {many:,.0f} MB at {MANY:,}: {many / few - 1:+.1%}"
    print(f"\npeak of a worker, {pool}: {growth}")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="Parquet with columns image and label, ten classes; without it one is made up")
    parser.add_argument("--images", type=int, default=FEW)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--pool", choices=POOLS, nargs="+", default=list(POOLS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave out the second part")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    device.keep_freed_memory()  # as the workers do
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        data = arguments.data or str(folder / "images.parquet")
        if arguments.data is None:
            write_images(folder / "images.parquet", arguments.images if arguments.no_memory else MANY + 100)
        ray.init(address="local", num_cpus=4, object_store_memory=200_000_000, log_to_driver=False)
        print(
            f"{device.describe(device.prepare(1, 0))}, torch {torch.__version__}, {arguments.images:,} images; ", end=""
        )
        print(f"images/s, median of {arguments.rounds} rounds\n")
        columns = ["pool", "decoding", "forward", "stage", "of the smaller", "four passes", "stage / four passes"]
        print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
        for pool in arguments.pool:
            for workers in arguments.workers:
                measure_rates(data, folder / pool, pool, arguments.images, workers, arguments.rounds)
        if not arguments.no_memory:
            measure_memory(data, folder / "memory", arguments.pool[0], arguments.workers[0])
    finally:
        ray.shutdown()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
