"""The whole pipeline with data and storage on an S3 API of which one request in fifty fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import tiny
from object_store import ObjectStore
from pictures import encoded
from PIL import Image
from sklearn.datasets import load_digits

import teddy_ray
from teddy_ray.errors import StoreError
from teddy_ray.flow import distill, prepare
from teddy_ray.progress import Progress
from teddy_ray.published import check_set
from teddy_ray.recipe import Recipe
from teddy_ray.retries import patience
from teddy_ray.stages.executor import result_of
from teddy_ray.storage import Storage
from teddy_ray.summary import read_summary

CLASSES = [str(digit) for digit in range(10)]


def recipe(place: str) -> Recipe:
    """The smallest run of every stage, on the digits that lie there."""
    return tiny(
        f"{place}/results",
        data__source=f"{place}/digits.parquet",
        pool__seeds=[0],
        pool__snapshots=[1, 2],
        statistics__chunk_size=100,
        synthesis__images_per_class=2,
        synthesis__steps=20,
        synthesis__checkpoint_s=0,
        evaluation__seeds=[0],
        evaluation__epochs=2,
        evaluation__controls=[],
    )


def write_digits(path: Path) -> None:
    """As PNG in Parquet."""
    digits = load_digits()
    images = [encoded(Image.fromarray(np.round(image * 255 / 16).astype(np.uint8))) for image in digits.images]
    table = pa.table({"image": images, "label": [CLASSES[label] for label in digits.target]})
    pq.write_table(table, path, row_group_size=600)


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.slow
def test_the_digits_run_finishes_where_one_request_in_fifty_fails(object_store: ObjectStore, tmp_path: Path) -> None:
    write_digits(tmp_path / "digits.parquet")
    bucket = object_store.make_bucket("digits-run")
    there, here = Storage(bucket), Storage(str(tmp_path))
    there.write("digits.parquet", here.read("digits.parquet"))
    gate = object_store.gate
    gate.every(50)
    one_in_fifty, in_workers = gate.fault, []

    def fault(number: int, method: str, path: str) -> str | None:
        if method == "POST" and "/artifacts/unit/" in path and not in_workers:  # whatever the count hits: one of theirs
            in_workers.append(path)
            return "503"
        return one_in_fifty(number, method, path)

    gate.fault = fault
    with open(os.devnull, "w") as stream:
        summary = distill(recipe(bucket), Progress(stream))

    assert in_workers
    assert len(gate.met) >= gate.num_requests // 50 >= 8
    assert {kind for kind, _, _ in gate.met} == {"500", "503", "dropped", "slow"}
    gate.reset()

    # what is there is whole, and can be used from there
    facts = check_set(f"{bucket}/results/runs/tiny")
    assert facts["classes"] == CLASSES
    assert len(teddy_ray.load(f"{bucket}/results/runs/tiny")) == summary.images == 20
    assert read_summary(Storage(f"{bucket}/results"), "tiny") == json.loads(json.dumps(summary.to_dict()))
    keys = object_store.keys("digits-run")
    assert not [key for key in keys if key.endswith(".safetensors") and ".checkpoints" in key]
    assert not [key for key in keys if ".staging/" in key.removesuffix(".staging/")]

    # every fingerprint is that of the run on disk, and so is the sealed set's: where it lies changes nothing
    assert facts["fingerprints"] == prepare(recipe(str(tmp_path))).plan.stages()


@pytest.mark.usefixtures("shared_ray")
def test_a_store_that_fails_a_worker_is_named_without_the_remote_traceback(object_store: ObjectStore) -> None:
    bucket = object_store.make_bucket("failing-run")
    storage = Storage(bucket)
    object_store.gate.fault = lambda number, method, path: "403"

    def work() -> bytes:
        with patience(0):
            return storage.read("artifacts/x")

    with pytest.raises(StoreError) as caught:
        result_of(ray.remote(num_cpus=0)(work).remote(), "labels", "shard 0")
    told = f"object store: {bucket}/artifacts/x: reading it is refused (When reading information for key 'artifacts/x'"
    assert str(caught.value).startswith(told)
    assert len(str(caught.value).splitlines()) == 1
