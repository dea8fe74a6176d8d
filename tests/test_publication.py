"""What stands in runs/<name>/ already, when a run is published there."""

import io
import json
from functools import partial
from types import SimpleNamespace

import pytest

from teddy_ray import publication
from teddy_ray.progress import Progress
from teddy_ray.publication import _make_room
from teddy_ray.storage import Storage


def summary_of(fingerprint):
    return SimpleNamespace(name="a", stages={"evaluation": {"fingerprint": fingerprint}})


@pytest.mark.parametrize(
    ("there", "kept"),
    [
        (json.dumps({"stages": {"evaluation": {"fingerprint": "ours"}}}), None),
        (json.dumps({"stages": {"evaluation": {"fingerprint": "another one"}}}), "a~another "),
        ("{}", "a~unknown"),
        ("3", "a~unknown"),
        ("[]", "a~unknown"),
        ("half of", "a~unknown"),
        (json.dumps({"stages": 3}), "a~unknown"),
    ],
)
def test_a_run_of_another_recipe_is_kept_whatever_its_summary_says(tmp_path, there, kept):
    storage, said = Storage(str(tmp_path)), io.StringIO()
    storage.write("runs/a/summary.json", there.encode())
    _make_room(storage, "runs/a", summary_of("ours"), Progress(said))
    assert storage.read(f"runs/{kept or 'a'}/summary.json") == there.encode()
    assert storage.is_folder("runs/a") == (kept is None)
    assert ("held a run of another recipe; it is now" in said.getvalue()) == (kept is not None)


@pytest.mark.parametrize("damage", ["nothing", "a file is gone", "a file too many"])
def test_a_set_of_the_same_recipe_is_written_again_unless_its_files_are_those_it_names(tmp_path, monkeypatch, damage):
    """Two runs of one recipe that publish at once may delete each other's files before the last says it is whole."""
    storage, names = Storage(str(tmp_path)), ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    written = []

    def files(plan, storage):
        for name in names:
            written.append(name)
            yield name, b"rows"

    facts = {"fingerprints": {"evaluation": "f"}, "license": "", "origin": "", "card": ""}
    monkeypatch.setattr(publication, "_distilled_files", files)
    monkeypatch.setattr(publication, "_facts", lambda *_: facts)
    monkeypatch.setattr(publication, "write_card", lambda *_: "card")
    publish = partial(publication._publish_set, None, storage, "set", None, Progress(io.StringIO()))
    publish()
    storage.write("set/notes.txt", b"mine")
    if damage == "a file is gone":
        storage.delete_file(f"set/{names[0]}")
    elif damage == "a file too many":
        storage.write("set/data/train-00000-of-00001.parquet", b"of another")
    publish()
    assert written == names * (1 if damage == "nothing" else 2)
    assert storage.files("set/data") == [f"set/{name}" for name in names]
    assert storage.read("set/notes.txt") == b"mine"
