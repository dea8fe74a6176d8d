import contextlib
import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest

from teddy_ray.errors import InputError
from teddy_ray.storage import Storage, to_json


@pytest.fixture(params=["path", "URI"])
def root(request, tmp_path):
    folder = tmp_path / "storage"
    return (str(folder) if request.param == "path" else f"file://{folder}"), folder


@pytest.fixture
def storage(root):
    return Storage(root[0])


def put(storage, content=b"payload", fingerprint="f" * 32):
    with storage.publish("unit", fingerprint) as draft:
        draft.write("images/a.bin", content)
        draft.write("z.txt", b"text")
        draft.facts = {"name": "first", "losses": [1.5, 2]}
    return storage.open("unit", fingerprint)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def problem_of(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    (problem,) = caught.value.problems
    return problem


# -- artifacts -----------------------------------------------------------------------------------------------------


def test_a_published_artifact_has_its_files_and_facts(storage, root):
    artifact = put(storage)
    assert artifact.read("images/a.bin") == b"payload"
    assert artifact.read("z.txt") == b"text"
    assert (artifact.manifest["name"], artifact.manifest["losses"]) == ("first", [1.5, 2])
    assert files(root[1]) == {
        f"artifacts/unit/{'f' * 32}/{name}" for name in ("images/a.bin", "z.txt", "manifest.json")
    }


def test_a_manifest_has_stage_fingerprint_and_size_and_hash_of_every_file(storage):
    manifest = put(storage).manifest
    assert (manifest["stage"], manifest["fingerprint"]) == ("unit", "f" * 32)
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in {"images/a.bin": b"payload", "z.txt": b"text"}.items()
    }


def test_sizes_are_those_of_all_files_of_each_artifact(storage):
    assert storage.sizes("unit") == {}
    for fingerprint, content in (("e" * 32, b"longer payload"), ("f" * 32, b"payload")):
        put(storage, content, fingerprint)
    sizes = storage.sizes("unit")
    assert sorted(sizes) == ["e" * 32, "f" * 32]
    manifest = storage.read(f"artifacts/unit/{'f' * 32}/manifest.json")
    assert sizes["f" * 32] == len(b"payload") + len(b"text") + len(manifest)
    assert storage.sizes("shard") == {}


def test_an_artifact_is_there_from_its_publication_on(storage):
    assert not storage.has("unit", "f" * 32)
    with storage.publish("unit", "f" * 32) as draft:
        draft.write("a", b"")
        assert not storage.has("unit", "f" * 32)
    assert storage.has("unit", "f" * 32)
    assert not storage.has("unit", "e" * 32)
    assert not storage.has("shard", "f" * 32)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_draft_whose_block_raises_leaves_nothing(storage, root, error):
    def fail():
        with storage.publish("unit", "f" * 32) as draft:
            draft.write("a", b"half of it")
            raise error

    with pytest.raises(error):
        fail()
    assert not storage.has("unit", "f" * 32)
    assert files(root[1]) == set()
    assert not list(root[1].glob("artifacts/unit/*"))
    assert not list(root[1].glob("artifacts/.staging/*/*/*"))


def test_of_two_publications_of_one_fingerprint_the_first_stays(storage, root):
    with storage.publish("unit", "f" * 32) as slow:
        slow.write("images/a.bin", b"second")
        slow.write("extra", b"")
        put(storage, b"first")
    assert storage.open("unit", "f" * 32).read("images/a.bin") == b"first"
    assert not any("extra" in name for name in files(root[1]))
    assert not list(root[1].glob("artifacts/.staging/*/*/*"))


def test_an_artifact_of_which_only_a_part_is_left_can_be_published_again(storage, root):
    put(storage)
    (root[1] / "artifacts/unit" / ("f" * 32) / "manifest.json").unlink()
    assert not storage.has("unit", "f" * 32)
    put(storage)
    assert storage.has("unit", "f" * 32)


def test_a_discarded_artifact_is_gone_and_may_be_gone_already(storage, root):
    put(storage)
    storage.discard("unit", "f" * 32)
    assert not storage.has("unit", "f" * 32)
    assert not storage.is_folder(f"artifacts/unit/{'f' * 32}")
    storage.discard("unit", "f" * 32)


def test_what_an_interrupted_discard_leaves_is_no_artifact(storage, monkeypatch):
    put(storage)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "delete_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.discard("unit", "f" * 32)
    assert not storage.has("unit", "f" * 32)
    assert storage.published("unit") == set()


def test_a_missing_artifact_is_named(storage):
    problem = problem_of(storage.open, "unit", "e" * 32)
    assert problem.key == "storage"
    assert problem.value.endswith(f"artifacts/unit/{'e' * 32}")
    assert "is gone" in problem.remedy


@pytest.mark.parametrize("content", [b"payloaD", b"", b"payload and more"])
def test_a_file_that_has_changed_is_refused_and_named(storage, root, content):
    artifact = put(storage)
    (root[1] / artifact.path / "images/a.bin").write_bytes(content)
    problem = problem_of(storage.open("unit", "f" * 32).read, "images/a.bin")
    assert problem.key == "storage"
    assert f"unit/{'f' * 32}/images/a.bin" in problem.value
    assert "has changed" in problem.remedy
    assert artifact.read("z.txt") == b"text"


def test_a_file_that_is_gone_is_refused_and_named(storage, root):
    artifact = put(storage)
    (root[1] / artifact.path / "images/a.bin").unlink()
    assert f"unit/{'f' * 32}/images/a.bin" in problem_of(artifact.read, "images/a.bin").value


@pytest.mark.parametrize("content", [b"", b'{"files": {', b"\xff\xfe"])
def test_a_manifest_that_cannot_be_read_is_refused_and_named(storage, root, content):
    artifact = put(storage)
    (root[1] / artifact.path / "manifest.json").write_bytes(content)
    assert f"unit/{'f' * 32}" in problem_of(storage.open, "unit", "f" * 32).value


def test_tensors_come_back_as_they_were(storage):
    torch = pytest.importorskip("torch")
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1, 255], dtype=torch.uint8)}
    with storage.publish("pool", "f" * 32) as draft:
        draft.write_tensors("weights.safetensors", tensors)
    back = storage.open("pool", "f" * 32).tensors("weights.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)


def test_a_storage_reads_and_writes_after_pickling(storage):
    copy = pickle.loads(pickle.dumps(storage))
    put(copy)
    assert storage.open("unit", "f" * 32).read("z.txt") == b"text"
    assert copy.session == storage.session


# -- sessions ------------------------------------------------------------------------------------------------------


def killed_worker(storage):
    """A draft that nobody finishes."""
    stack = contextlib.ExitStack()
    stack.enter_context(storage.publish("unit", "0" * 32)).write("half", b"")
    return stack


def test_closing_a_session_removes_its_own_drafts_alone(root):
    ours, theirs = Storage(root[0]), Storage(root[0])
    put(ours)
    drafts = [killed_worker(ours), killed_worker(theirs)]
    assert len(list(root[1].rglob("half"))) == 2
    ours.close_session()
    (left,) = root[1].rglob("half")
    assert theirs.session in left.parts
    assert ours.open("unit", "f" * 32).read("z.txt") == b"text"
    theirs.close_session()
    assert not (root[1] / "artifacts/.staging").exists()
    assert ours.has("unit", "f" * 32)
    del drafts


def test_closing_a_session_twice_or_before_it_wrote_is_no_error(storage):
    storage.close_session()
    put(storage)
    storage.close_session()
    storage.close_session()


# -- files of a run ------------------------------------------------------------------------------------------------


def test_a_file_of_a_run_is_replaced_and_nothing_else_is_left(storage, root):
    for content in (b"old and longer", b"new"):
        storage.write("runs/a/summary.json", content)
    assert storage.read("runs/a/summary.json") == b"new"
    assert files(root[1]) == {"runs/a/summary.json"}


def test_a_reader_never_sees_a_part_of_a_file(storage, root, monkeypatch):
    storage.write("runs/a/summary.json", b"old")
    write_bytes = Path.write_bytes

    def full(path, data):
        write_bytes(path, data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        storage.write("runs/a/summary.json", b"new and long")
    assert storage.read("runs/a/summary.json") == b"old"


def test_a_write_that_fails_leaves_no_file_behind(storage, root):
    (root[1] / "runs/a/summary.json").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        storage.write("runs/a/summary.json", b"new")
    storage.close_session()
    assert files(root[1]) == set()


def test_files_and_folders_are_told_apart(storage):
    storage.write("runs/a/x", b"")
    assert (storage.is_file("runs/a/x"), storage.is_folder("runs/a/x")) == (True, False)
    assert (storage.is_file("runs/a"), storage.is_folder("runs/a")) == (False, True)
    assert (storage.is_file("runs/b"), storage.is_folder("runs/b")) == (False, False)


@pytest.mark.parametrize("uri", ["nosuch://bucket/data", "fsspec+nosuch://bucket/data"])
def test_a_uri_of_no_known_file_system_is_refused(uri):
    problem = problem_of(Storage, uri)
    assert (problem.key, problem.value) == ("storage", uri)


def test_a_place_is_displayed_as_its_owner_wrote_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage(".").display("runs/a") == "runs/a"
    assert Storage("there").display("runs/a") == "there/runs/a"
    assert Storage(f"file://{tmp_path}/").display("runs/a") == f"file://{tmp_path}/runs/a"


@pytest.mark.parametrize("place", ["{0}/file/below", "{0}/file", "/proc/nowhere", "file:///proc/nowhere/deep"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").write_bytes(b"")
    uri = place.format(tmp_path)
    problem = problem_of(Storage(uri).check_writable)
    assert (problem.key, problem.value) == ("storage", uri)
    assert "can be written" in problem.remedy


@pytest.mark.parametrize("place", ["", "new", "new/deep/er"])
def test_checking_a_place_leaves_nothing_behind(tmp_path, place):
    Storage(str(tmp_path / place)).check_writable()
    assert os.listdir(tmp_path) == []


# -- JSON ----------------------------------------------------------------------------------------------------------


def test_equal_content_is_equal_json():
    assert to_json({"b": [1, 0.5], "a": "é"}) == to_json(json.loads(to_json({"a": "é", "b": [1, 0.5]})))
    assert to_json({"b": 1, "a": 2}).index('"a"') < to_json({"b": 1, "a": 2}).index('"b"')
    assert to_json({}).endswith("\n")
