"""What stands in runs/<name>/ already, when a run is published there."""

import io
import json
from types import SimpleNamespace

import pytest

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
