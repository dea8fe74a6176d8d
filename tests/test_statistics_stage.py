"""The statistics stage on Ray: exact, the same whoever does the work, and resumed after whatever ends it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, Silent, content_hashes, copy_artifacts, open_session, processes, tiny
from torch import nn

from teddy_ray.augment import apply_boxes, boxes_of
from teddy_ray.engine import inspect_machine
from teddy_ray.errors import InputError, StageError
from teddy_ray.frozen import frozen_copy
from teddy_ray.kernels.build import can_build
from teddy_ray.members import load_members
from teddy_ray.randomness import uniforms
from teddy_ray.sources import Source
from teddy_ray.stages import statistics
from teddy_ray.stages.chunks import Chunk, ChunkWorker
from teddy_ray.stages.session import Session
from teddy_ray.statistics import Measurer
from teddy_ray.storage import Storage
from teddy_ray.stored_moments import MomentsReader

CPU = torch.device("cpu")


def session_on(finished: Run, folder: Path, **overrides: Any) -> Session:
    """With the finished run's pool alone."""
    copy_artifacts(finished, "statistics", folder)
    return open_session(tiny(folder, **overrides))


def moments_files(folder: Path) -> dict[str, bytes]:
    return {**content_hashes(folder, "statistics"), **content_hashes(folder, "moments")}


def activations_of(model: nn.Module, source: Source, seed: int) -> dict[str, Any]:
    """By layer the inputs of the norms, (n channels positions), on the views of all training images."""
    frozen, taken = frozen_copy(model, kernels=can_build()), {}  # type: ignore[var-annotated]
    for name, module in frozen.named_modules():
        if "Norm" in type(module).__name__:
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: taken.setdefault(name, []).append(inputs[0].flatten(2).numpy())
            )
    train, augmentation = source.train, tiny(Path()).synthesis.augmentation
    boxes = boxes_of(augmentation, uniforms([("statistics", seed, image_id) for image_id in train.ids], 5))
    pixels = torch.from_numpy(train.read()).float() / 255
    with torch.inference_mode():
        for chunk in range(0, len(train), 25):
            for first in range(chunk, min(chunk + 25, len(train)), 10):
                rows = slice(first, min(first + 10, chunk + 25))
                frozen(apply_boxes(pixels[rows], boxes[rows]))
    return {name: np.concatenate(parts).astype(np.longdouble) for name, parts in taken.items()}


def test_published_moments_equal_a_direct_computation(finished: Run) -> None:
    plan, store = finished.plan, finished.storage
    reader, labels = MomentsReader(plan, store), finished.source.train.labels
    models = load_members(plan, store, plan.members)
    assert len(models) == 4
    for model, own, pooled in zip(models, reader.of(range(10)), reader.pooled, strict=True):
        activations = activations_of(model, finished.source, finished.recipe.seed)
        assert set(own) == set(pooled) == set(activations)
        for layer, x in activations.items():
            for label in range(10):
                values = x[labels == label].transpose(1, 0, 2).reshape(x.shape[1], -1)
                assert_moments(own[layer].mean[label], own[layer].m2[label] / own[layer].count[label], values)
            values = x.transpose(1, 0, 2).reshape(x.shape[1], -1)
            assert_moments(pooled[layer].mean[0], pooled[layer].m2[0] / pooled[layer].count[0], values)


def assert_moments(mean: torch.Tensor, var: torch.Tensor, values: Any) -> None:
    assert (np.abs(mean.numpy() - values.mean(1)) <= 1e-9 * values.std(1)).all()
    np.testing.assert_allclose(var, values.var(1).astype(float), rtol=1e-9)


def test_manifest_counts_each_image_once_and_chunks_are_gone(finished: Run) -> None:
    manifest = finished.storage.open("statistics", finished.plan.statistics).manifest
    assert manifest["num_images"] == manifest["num_decoded"] == len(finished.source.train)
    assert manifest["images_per_s"] > 0
    assert not list((finished.folder / "artifacts" / "chunk").iterdir())


def test_three_workers_and_three_decoders_give_the_bytes_of_one(finished: Run, tmp_path: Path) -> None:
    statistics.run(session_on(finished, tmp_path, statistics__num_workers=3, statistics__decoders=3))
    assert moments_files(tmp_path) == moments_files(finished.folder)


@pytest.fixture
def chunks_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a look at them."""
    monkeypatch.setattr(Storage, "discard", lambda *_: None)


def chunks_in(folder: Path) -> dict[str, Any]:
    """Manifests of the chunks, by fingerprint."""
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("artifacts/chunk/*/manifest.json")}


def test_killed_worker_costs_the_chunk_in_its_hands_alone(finished: Run, tmp_path: Path, chunks_stay: None) -> None:
    session = session_on(finished, tmp_path, statistics__num_workers=2, statistics__decoders=2)
    seen: list[dict[str, Any]] = []
    over = threading.Event()

    def kill_one() -> None:
        while not over.wait(0.005):
            done = chunks_in_progress(tmp_path)
            workers = processes("ray::MapWorker")
            veterans = {manifest["pid"] for manifest in done.values()} & set(workers)
            if len(done) >= 3 and veterans:
                os.kill(veterans.pop(), signal.SIGKILL)
                seen.append(done)
                return

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    try:
        statistics.run(session)
    finally:
        over.set()
        thread.join()
    (before,) = seen
    after = chunks_in(tmp_path)
    assert len(before) < len(after) == 15
    assert {name: after[name] for name in before} == before  # what was finished stayed
    assert sum(manifest["num_decoded"] for manifest in after.values()) == len(session.source.train)
    assert moments_files(tmp_path) == moments_files(finished.folder)


def chunks_in_progress(folder: Path) -> dict[str, Any]:
    try:
        return chunks_in(folder)
    except OSError:  # one that is being published
        return {}


@pytest.mark.slow
def test_interrupted_run_goes_on_with_the_chunks_that_are_finished(
    finished: Run, tmp_path: Path, chunks_stay: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_on(finished, tmp_path)
    rows = statistics._rows

    def interrupted(dataset: Any) -> Iterator[dict[str, Any]]:
        for num, row in enumerate(rows(dataset)):
            if num == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(statistics, "_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        statistics.run(session)
    monkeypatch.setattr(statistics, "_rows", rows)
    before = chunks_in(tmp_path)
    assert 3 <= len(before) < 15
    assert not (tmp_path / "artifacts" / "statistics").exists()
    statistics.run(open_session(tiny(tmp_path, statistics__num_workers=2)))
    after = chunks_in(tmp_path)
    assert {name: after[name] for name in before} == before
    assert moments_files(tmp_path) == moments_files(finished.folder)


@pytest.fixture
def worker(finished: Run, tmp_path: Path) -> ChunkWorker:
    """One in this process, with a chunk's worth of work."""
    session = session_on(finished, tmp_path)
    machine = inspect_machine(CPU)
    return ChunkWorker(
        session.plan,
        session.storage,
        session.source_ref,
        machine,
        machine.kernels,
        Silent(),  # type: ignore[arg-type]
    )


ITEM = {"fingerprint": np.array(["some"]), "start": np.array([50]), "stop": np.array([75])}


def test_chunk_done_again_is_left_as_it_is(worker: ChunkWorker) -> None:
    first = worker(ITEM)
    assert (first["num_images"][0], worker._loader.num_decoded) == (25, 25)
    assert worker(ITEM)["num_images"][0] == 25
    assert worker._loader.num_decoded == 25


def test_plain_view_is_the_image_as_it_is(finished: Run, tmp_path: Path) -> None:
    session = session_on(finished, tmp_path, statistics__view="plain")
    machine = inspect_machine(CPU)
    worker = ChunkWorker(
        session.plan,
        session.storage,
        session.source_ref,
        machine,
        False,
        Silent(),  # type: ignore[arg-type]
    )
    chunk = Chunk(range(50, 75), "some")
    views = torch.cat([x for x, _ in worker._batches(chunk, torch.zeros(25))])
    assert torch.equal(views, torch.from_numpy(session.source.train.read(np.arange(50, 75))).float() / 255)


def test_activations_that_are_not_finite_are_named(worker: ChunkWorker) -> None:
    plan = worker._plan
    models = load_members(plan, worker._storage, plan.members)
    norms = [name for name, module in models[2].named_modules() if isinstance(module, nn.BatchNorm2d)]
    models[2].get_submodule(norms[0]).weight.data[3] = torch.inf
    worker.__dict__["_measurer"] = Measurer(models, CPU, kernels=False)
    with pytest.raises(StageError) as caught:
        raise pickle.loads(worker(ITEM)["error"][0])
    assert caught.value.item == f"rows 50-74, member {plan.members[2].name}, layer {norms[1]}"
    assert caught.value.reason.startswith("its activations are not finite")
    assert not worker._storage.has("chunk", "some")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("tried to allocate 90 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_too_little_memory_is_told_with_what_to_do(error: Exception, worker: ChunkWorker) -> None:
    class Greedy:
        def measure(self, *_: Any) -> None:
            raise error

    worker.__dict__["_measurer"] = Greedy()
    with pytest.raises(StageError, match=r"^statistics: rows 50-74: out of memory; lower statistics.batch_size"):
        raise pickle.loads(worker(ITEM)["error"][0])


def test_worker_on_another_kind_of_machine_refuses(worker: ChunkWorker) -> None:
    worker._machine = replace(worker._machine, kernels=not worker._machine.kernels)
    with pytest.raises(InputError, match="has nodes of different kinds"):
        raise pickle.loads(worker(ITEM)["error"][0])


def test_error_of_an_image_comes_as_it_is(finished: Run, tmp_path: Path) -> None:
    session = session_on(finished, tmp_path)

    def unreadable(rows: np.ndarray, map_: object) -> Iterator[tuple[np.ndarray, list[object]]]:
        yield np.arange(len(rows)), [b"no image"] * len(rows)

    object.__setattr__(session.source.train, "read_rows", unreadable)
    with pytest.raises(InputError, match=r"digits/\d+'; this image cannot be decoded"):
        statistics.run(session)


@pytest.mark.parametrize(
    ("num_workers", "size", "num_left", "worth"),
    [
        (3, 3, 1000, False),  # nobody came
        (2, 3, 1000, False),
        (3, 2, 24, False),  # saves 12 - 8 = 4 rounds of a chunk, which is what is lost
        (3, 2, 30, True),
        (64, 1, 5, True),
        (64, 1, 4, False),
    ],
)
def test_a_round_is_cut_short_only_where_more_workers_make_up_for_it(
    num_workers: int, size: int, num_left: int, worth: bool
) -> None:
    assert statistics._is_worth_more(num_workers, size, num_left) is worth
