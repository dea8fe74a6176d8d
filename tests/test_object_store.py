"""Artifacts, data, sets and weights on an S3 API, and what is done when it fails."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from pictures import labels_by_id, make_folder, problems, source, write_parquet
from published_set import HALVES, assert_equal, publish
from safetensors.torch import save

import teddy_ray
from teddy_ray import checkpoints, retries, storage
from teddy_ray.checkpoints import Checkpoint
from teddy_ray.cli import main
from teddy_ray.errors import InputError, StoreError
from teddy_ray.exports import export
from teddy_ray.published import check_set
from teddy_ray.retries import patience
from teddy_ray.storage import Storage
from teddy_ray.weights import read_weights

UNIT = "f" * 32
FOLDER = f"artifacts/unit/{UNIT}"
names = (f"bucket-{number}" for number in itertools.count())


@pytest.fixture
def bucket(object_store):
    """The URI of an empty bucket."""
    return object_store.make_bucket(next(names))


@pytest.fixture
def keys(object_store, bucket):
    return lambda: object_store.keys(bucket.removeprefix("s3://"))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def gate(object_store):
    return object_store.gate


def as_in_a_worker(value):
    """Pickled once, Arrow's S3 tries by itself three times and not for six seconds."""
    return pickle.loads(pickle.dumps(value))


def put(place, content=b"payload", fingerprint=UNIT):
    with place.publish("unit", fingerprint) as draft:
        draft.write("images/a.bin", content)
        draft.write("z.txt", b"text of " + content)
        draft.facts = {"losses": [1.5, 2]}
    return place.open("unit", fingerprint)


def upload(place, folder):
    """Every file of a local folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place.write(path.relative_to(folder).as_posix(), path.read_bytes())


def first(number, kind, method, part):
    """A fault that the first `number` requests of a method meet whose path has a part."""
    left = itertools.count(1)
    return lambda _, method_, path: kind if method_ == method and part in path and next(left) <= number else None


# -- artifacts -----------------------------------------------------------------------------------------------------


def test_files_of_an_artifact_are_named_by_their_content(bucket, keys):
    artifact = put(Storage(f"{bucket}/deep/er"))
    by_content = {
        name: hashlib.sha256(content).hexdigest()[:16]
        for name, content in {"a.bin": b"payload", "z.txt": b"text of payload"}.items()
    }
    paths = [f"images/{by_content['a.bin']}-a.bin", f"{by_content['z.txt']}-z.txt"]
    assert keys() == sorted(f"deep/er/{FOLDER}/{name}" for name in [*paths, "manifest.json"])
    assert [entry["path"] for entry in artifact.manifest["files"].values()] == paths
    assert (artifact.read("images/a.bin"), artifact.read("z.txt")) == (b"payload", b"text of payload")


def test_artifacts_are_listed_measured_and_discarded(bucket):
    place = Storage(f"{bucket}/x")
    assert (place.published("unit"), place.sizes("unit"), place.has("unit", UNIT)) == (set(), {}, False)
    put(place)
    put(place, b"more", "e" * 32)
    assert place.published("unit") == {UNIT, "e" * 32}
    manifest = place.read(f"{FOLDER}/manifest.json")
    assert place.sizes("unit")[UNIT] == len(b"payload") + len(b"text of payload") + len(manifest)
    place.discard("unit", UNIT)
    place.discard("unit", UNIT)
    assert place.published("unit") == {"e" * 32}
    assert not place.is_folder(FOLDER)
    place.delete_folder("artifacts/none")
    place.delete_file("artifacts/none")


def test_an_artifact_that_was_copied_elsewhere_is_read_there(bucket, keys, tmp_path):
    place, local = Storage(bucket), Storage(str(tmp_path))
    put(place)
    for key in keys():
        local.write(key, place.read(key))
    assert local.open("unit", UNIT).read("images/a.bin") == b"payload"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_two_that_publish_the_same_artifact_at_once_leave_one_that_is_whole(bucket, monkeypatch, moment):
    """The other one publishes all of its own between our files and our manifest: before and after we look for one."""
    ours, theirs = Storage(bucket), Storage(bucket)
    is_file = Storage.is_file
    looks = itertools.count(1)

    def interrupted(self, path):
        if self is not ours or next(looks) < 2:  # the first look is before any file is written
            return is_file(self, path)
        if moment == "before":
            put(theirs, b"their payload")
        found = is_file(self, path)
        if moment == "after":
            put(theirs, b"their payload")
        return found

    monkeypatch.setattr(Storage, "is_file", interrupted)
    artifact = put(ours, b"our payload")
    expected = b"their payload" if moment == "before" else b"our payload"
    assert artifact.read("images/a.bin") == expected
    assert artifact.read("z.txt") == b"text of " + expected


@pytest.mark.parametrize("moment", ["first file", "last file", "manifest"])
@pytest.mark.parametrize("ending", ["discard", "end of a discard"])
def test_what_is_discarded_while_it_is_published_is_whole_or_not_there(bucket, monkeypatch, moment, ending):
    """Another run discards the artifact before we write that file. The end: it had seen an older manifest."""
    ours, theirs = Storage(bucket), Storage(bucket)
    part = {"first file": "a.bin", "last file": "z.txt", "manifest": "manifest.json"}[moment]
    write, met = Storage.write, []

    def interrupted(self, path, data):
        if path.endswith(part) and not met:
            met.append(path)
            theirs.discard("unit", UNIT) if ending == "discard" else theirs.delete_folder(FOLDER)
        write(self, path, data)

    monkeypatch.setattr(Storage, "write", interrupted)
    artifact = put(ours)
    assert met
    assert (artifact.read("images/a.bin"), artifact.read("z.txt")) == (b"payload", b"text of payload")


def test_what_is_uploaded_now_is_not_discarded(bucket, keys):
    place = Storage(bucket)
    place.write(f"{FOLDER}/images/123-a.bin", b"1")
    Storage(bucket).discard("unit", UNIT)
    assert keys() == [f"{FOLDER}/images/123-a.bin"]


def test_of_two_publications_the_first_stays(bucket, keys):
    put(Storage(bucket), b"first")
    before = keys()
    assert put(Storage(bucket), b"second").read("images/a.bin") == b"first"
    assert keys() == before


# -- files and folders ---------------------------------------------------------------------------------------------


def test_folders_are_what_keys_make_them(bucket, keys):
    place = Storage(f"{bucket}/x")
    assert not place.is_folder("")
    place.write("runs/a/summary.json", b"1")
    place.write("runs/a/distilled/data", b"2")
    assert keys() == ["x/runs/a/distilled/data", "x/runs/a/summary.json"]
    assert (place.is_file("runs/a/summary.json"), place.is_folder("runs/a/summary.json")) == (True, False)
    assert (place.is_file("runs/a"), place.is_folder("runs/a"), place.is_empty("runs/a")) == (False, True, False)
    assert (place.is_folder("runs"), place.is_folder("runs/b"), place.is_empty("runs/b")) == (True, False, False)
    assert place.files("runs/a") == ["runs/a/summary.json"]
    assert place.files("runs/b") == []
    place.move_folder("runs/a", "runs/b")
    assert (place.read("runs/b/summary.json"), place.read("runs/b/distilled/data")) == (b"1", b"2")
    assert not place.is_folder("runs/a")
    place.delete_file("runs/b/summary.json")
    place.delete_file("runs/b/distilled/data")
    place.delete_folder("runs/b/distilled")
    assert place.is_empty("runs/b")


@pytest.mark.parametrize("fails", [None, "PUT", "DELETE"])
def test_a_folder_that_is_moved_is_never_whole_at_one_place_before_it_is_at_the_other(bucket, gate, fails):
    place, marks = Storage(bucket), ["distilled/teddy.json", "summary.json"]
    for name in (*marks, "distilled/data/0", "distilled/data/1", "recipe.yaml"):
        place.write(f"runs/a/{name}", name.encode())
    asked = []

    def fault(number, method, path):
        if method not in ("GET", "HEAD"):
            asked.append((method, path.partition("/runs/")[2]))
        return "403" if method == fails and path.endswith("teddy.json") else None

    gate.fault = fault
    with pytest.raises(StoreError, match="is refused") if fails else nullcontext():
        place.move_folder("runs/a", "runs/b", marks=marks)
    gate.reset()
    copied = [path for method, path in asked if method == "PUT" and path.startswith("b/")]
    deleted = [path for method, path in asked if method == "DELETE" and path.startswith("a/")]
    assert set(copied[:3]) == {"b/recipe.yaml", "b/distilled/data/0", "b/distilled/data/1"}
    assert place.is_file("runs/a/distilled/teddy.json") == (fails is not None)
    assert place.is_file("runs/b/summary.json") == (fails != "PUT")
    if not fails:
        assert set(deleted[:2]) == {f"a/{name}" for name in marks}
        assert {name: place.read(f"runs/b/{name}") for name in marks} == {name: name.encode() for name in marks}
        assert not place.is_folder("runs/a")


def test_a_session_leaves_nothing(bucket, keys):
    place = Storage(f"{bucket}/x")
    put(place)
    place.fs.create_dir(place.session_folder("train"), recursive=True)
    with place.fs.open_output_stream(f"{place.session_folder('train')}/state") as stream:
        stream.write(b"Ray Train's")
    place.close_session()
    place.close_session()
    assert not any(place.session in key for key in keys())
    assert place.has("unit", UNIT)


def test_part_of_a_file_and_parts_of_a_large_one(bucket, gate):
    place, content = Storage(bucket), np.random.default_rng(0).bytes(9_000_000)
    place.write("large", content)
    gate.reset()
    assert place.read("large", 64) == content[:64]
    assert place.read("large") == content
    assert gate.num_requests == 4  # a look at it and the bytes, each time
    with place.fs.open_input_stream(f"{place.root}/large") as stream:
        assert b"".join(iter(lambda: stream.read(1_000_000), b"")) == content
    with place.fs.open_input_file(f"{place.root}/large") as file:
        file.seek(8_999_990)
        assert file.read(100) == content[-10:]
        assert file.read_at(5, 3) == content[3:8]


def test_a_file_that_is_not_written_whole_leaves_the_old_one(bucket, keys):
    place = Storage(bucket)
    place.write("x", b"old")
    for path in ("x", "y"):
        with pytest.raises(TypeError):
            place.write(path, None)
    assert place.read("x") == b"old"
    assert keys() == ["x"]


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), [("500", "POST"), ("dropped", "GET"), ("503", "HEAD"), ("slow", "PUT")])
def test_what_fails_for_a_while_is_tried_again(bucket, gate, quick, kind, method):
    place = as_in_a_worker(Storage(bucket))
    gate.fault = first(4, kind, method, "")  # more often than Arrow tries
    assert put(place).read("images/a.bin") == b"payload"
    assert place.published("unit") == {UNIT}
    assert [met[0] for met in gate.met] == [kind] * (3 if kind == "slow" else 4)


def test_a_file_whose_reading_fails_in_the_middle_is_read_on(bucket, gate, quick):
    place, content = as_in_a_worker(Storage(bucket)), bytes(range(256)) * 100
    place.write("file", content)
    with place.fs.open_input_file(f"{place.root}/file") as file:
        head = file.read(1000)
        gate.fault = first(4, "dropped", "GET", "file")
        assert head + file.read() == content
    assert len(gate.met) == 4


def test_what_fails_for_good_is_named(bucket, gate, quick):
    place = as_in_a_worker(Storage(f"{bucket}/x"))
    artifact = put(place)
    gate.fault = lambda number, method, path: "500"
    with patience(0.3), pytest.raises(StoreError) as caught:
        artifact.read("z.txt")
    where = f"{bucket}/x/{FOLDER}/{artifact.manifest['files']['z.txt']['path']}"
    assert str(caught.value).startswith(f"object store: {where}: reading it failed ")
    assert str(caught.value).endswith(
        "AWS Error UNKNOWN (HTTP status 500) during HeadObject operation: No response body."
    )
    with (
        patience(0),
        pytest.raises(StoreError, match=f"{bucket}/x/runs/a: writing it failed once, .* INTERNAL_FAILURE"),
    ):
        place.write("runs/a", b"")
    with patience(0), pytest.raises(StoreError, match=f"{bucket}/x/artifacts/unit: listing it failed"):
        place.published("unit")
    with patience(0), pytest.raises(StoreError, match=f"{bucket}/x/artifacts/unit.*: looking it up failed"):
        place.has("unit", UNIT)


def test_an_artifact_whose_publication_fails_is_not_there(bucket, gate):
    place = as_in_a_worker(Storage(bucket))
    gate.fault = lambda number, method, path: "500" if "z.txt" in path else None
    with patience(0), pytest.raises(StoreError, match=r"z\.txt: writing it failed"):
        put(place)
    gate.reset()
    assert not place.has("unit", UNIT)
    assert put(place).read("z.txt") == b"text of payload"


def test_a_checkpoint_that_cannot_be_saved_or_dropped_is_left_and_told(bucket, gate, monkeypatch, caplog):
    monkeypatch.setattr(checkpoints, "_told", set())
    monkeypatch.setattr(checkpoints, "SAVE_PATIENCE_S", 0)
    checkpoint = Checkpoint(as_in_a_worker(Storage(bucket)), "unit", UNIT, {})
    checkpoint.save({"step": torch.tensor(1)})
    gate.fault = lambda number, method, path: "503"
    checkpoint.save({"step": torch.tensor(2)})
    assert 0 < len(gate.met) <= 3
    checkpoint.drop()
    gate.fault = lambda number, method, path: "403"
    checkpoint.save({"step": torch.tensor(2)})
    checkpoint.save({"step": torch.tensor(3)})
    gate.reset()
    assert checkpoint.load()["step"] == 1
    words = [("saving", "writing it failed"), ("deleting", "deleting it failed"), ("saving", "writing it is refused")]
    for message, (doing, why) in zip(caplog.messages, words, strict=True):
        assert message.startswith(
            f"{doing} a checkpoint failed, and the work goes on without it: artifacts/.checkpoints/"
        )
        assert f"object store: {bucket}/artifacts/.checkpoints/unit/{UNIT}.safetensors: {why}" in message


def test_a_session_is_closed_without_its_store(bucket, gate, monkeypatch):
    monkeypatch.setattr(storage, "CHECK_PATIENCE_S", 0)
    gate.fault = lambda number, method, path: "503"
    as_in_a_worker(Storage(bucket)).close_session()
    assert gate.met


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_place_that_can_be_written_is_left_as_it_is(bucket, keys):
    Storage(bucket).check_writable()
    assert keys() == []
    Storage(f"{bucket}/x").check_writable()
    assert keys() == ["x/"]  # Arrow keeps a folder from which the last file goes


@pytest.mark.parametrize(("place", "reason"), [("{0}", "ACCESS_DENIED"), ("s3://no-such-bucket/x", "NO_SUCH_BUCKET")])
def test_a_place_that_is_denied_or_not_there_is_wrong_input_at_once(bucket, gate, place, reason):
    if reason == "ACCESS_DENIED":
        gate.fault = lambda number, method, path: "403"
    uri, before = place.format(bucket), gate.num_requests
    with pytest.raises(InputError) as caught:
        Storage(uri).check_writable()
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("storage", uri)
    assert problem.remedy.startswith("name a place that can be written (object store: s3://")
    assert reason in problem.remedy
    assert gate.num_requests == before + 1


# -- data, sets, weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_data_in_a_bucket_is_what_it_is_on_disk(bucket, gate, tmp_path, form):
    make_folder(tmp_path / "data") if form == "folder" else write_parquet(tmp_path / "data" / "a.parquet", [0, 1] * 20)
    upload(Storage(f"{bucket}/d"), tmp_path / "data")
    expected, found = source(tmp_path / "data"), source(f"{bucket}/d")
    assert found.train.identity == expected.train.identity
    assert labels_by_id(found) == labels_by_id(expected)
    gate.every(5)
    np.testing.assert_array_equal(as_in_a_worker(found.train).read(), expected.train.read())
    assert gate.met


def test_data_that_is_denied_or_not_there_is_wrong_input(bucket, gate):
    (problem,) = problems(f"{bucket}/nothing")
    assert "does not exist" in problem.remedy
    gate.fault = lambda number, method, path: "403"
    (problem,) = problems(f"{bucket}/d")
    assert (problem.key, problem.value) == ("data.source", f"{bucket}/d")
    assert "ACCESS_DENIED" in problem.remedy


def test_a_store_that_fails_while_input_is_opened_is_no_wrong_input(bucket, gate):
    gate.fault = lambda number, method, path: "500"
    with patience(0), pytest.raises(StoreError, match="d: looking it up failed once"):
        source(f"{bucket}/d")
    with patience(0), pytest.raises(StoreError, match=r"w\.safetensors: reading it failed once"):
        read_weights(f"{bucket}/w.safetensors", "pool.base")


def test_an_image_whose_store_fails_for_good_ends_the_work_as_a_failure(bucket, gate, tmp_path):
    make_folder(tmp_path / "data")
    upload(Storage(f"{bucket}/d"), tmp_path / "data")
    train = as_in_a_worker(source(f"{bucket}/d").train)
    gate.fault = lambda number, method, path: "500"
    with patience(0), pytest.raises(StoreError, match=f"{bucket}/d/.*: reading it failed"):
        train.read(np.arange(1))


def test_a_set_is_checked_loaded_and_exported(bucket, gate, tmp_path, capsys):
    folder = publish(tmp_path / "set", card="")
    upload(Storage(f"{bucket}/run/distilled"), folder)
    for path in (f"{bucket}/run", f"{bucket}/run/distilled"):
        files = []
        assert check_set(path, files.append) == check_set(str(folder))
        for found, expected in zip(files, HALVES, strict=True):
            assert_equal(found, expected)
    assert main(["check", f"{bucket}/run"]) == 0
    assert "every byte of them is as published" in capsys.readouterr().out
    ours, theirs = teddy_ray.load(f"{bucket}/run"), teddy_ray.load(str(folder))
    assert torch.equal(ours[0][0], theirs[0][0])
    assert export(f"{bucket}/run", "imagefolder", f"{bucket}/images").startswith(f"{bucket}/images: 6 images")
    written = []
    gate.fault = lambda number, method, path: written.append(path) if method == "PUT" else None
    export(f"{bucket}/run", "parquet", f"{bucket}/copy")
    assert len(set(written)) == 4
    assert written[-1].endswith("/copy/teddy.json")
    assert check_set(f"{bucket}/copy") == check_set(str(folder))
    with pytest.raises(InputError, match="a folder that is empty or not there"):
        export(f"{bucket}/run", "parquet", f"{bucket}/copy")


def test_weights_are_read_from_a_bucket(bucket, gate):
    Storage(bucket).write("w.safetensors", save({"a": torch.arange(3.0)}))
    assert read_weights(f"{bucket}/w.safetensors", "pool.base").tensors["a"].tolist() == [0, 1, 2]
    gate.fault = lambda number, method, path: "403"
    with pytest.raises(InputError, match=r"pool\.base: .*should be a file of weights .*ACCESS_DENIED"):
        read_weights(f"{bucket}/w.safetensors", "pool.base")


def test_the_command_says_what_failed(bucket, gate, tmp_path, capsys):
    upload(Storage(f"{bucket}/run/distilled"), publish(tmp_path / "set"))
    gate.fault = lambda number, method, path: "403" if method == "GET" and "train-" in path else None
    assert main(["check", f"{bucket}/run"]) == 1
    error = capsys.readouterr().err
    path = f"{bucket}/run/distilled/data/train-00000-of-00002.parquet"
    assert f"teddy-ray: failed: object store: {path}: reading it is refused" in error
    assert "Traceback" not in error
