"""data.on_bad_image: images that cannot be decoded, left out up to a stated share."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny
from pictures import encoded, grey, make_folder, parts, problems, source, unreadable, write_parquet

from teddy_ray.cli import main
from teddy_ray.errors import InputError
from teddy_ray.flow import prepare
from teddy_ray.recipe import Data
from teddy_ray.sources import open_source, verification

BAD = ["cat/3.png", "dog/7.png"]


@pytest.fixture
def folder(tmp_path):
    """Two of twenty images are none."""
    root = make_folder(tmp_path / "folder")
    for name in BAD:
        (root / name).write_bytes(b"no image")
    return root


def opened(path, **fields):
    """The source, and what was said."""
    said = []
    data = Data(source=str(path), **{"image_size": 8, "channels": 1, **fields})
    return open_source(data, said.append), said


def test_by_default_the_first_bad_image_is_an_error_with_file_and_remedy(folder):
    (problem,) = unreadable(folder)
    assert problem.key == "data.source"
    assert problem.value in BAD
    assert "mend or remove it, or see data.on_bad_image" in problem.remedy


def test_bad_images_up_to_the_fraction_are_left_out_and_counted_and_named(folder):
    found, said = opened(folder, on_bad_image=0.1)
    assert found.skipped == tuple(BAD)
    assert sum(len(part) for part in parts(found)) == 18
    assert not {name for part in parts(found) for name in part.ids} & set(BAD)
    for part in parts(found):
        assert len(part.read()) == len(part)
    assert said[0] == "data.source: decoding all 20 images once, for data.on_bad_image is 0.1"
    assert said[1].startswith("2 of 20 images (10.00%) of data.source cannot be decoded: cat/3.png (of none of the")
    assert said[1].endswith("; they are left out")


def test_more_than_the_fraction_is_an_error_with_count_share_and_names(folder):
    (problem,) = problems(folder, on_bad_image=0.0999)
    assert (problem.key, problem.value) == ("data.on_bad_image", 0.0999)
    assert problem.remedy.startswith("2 of 20 images (10.00%) of data.source cannot be decoded: cat/3.png (")
    assert "dog/7.png (" in problem.remedy
    assert problem.remedy.endswith("mend or remove them, or allow a larger share")


def test_no_more_than_three_are_named(folder):
    for index in range(6):
        (folder / "cat" / f"{index}.png").write_bytes(b"")
    found, said = opened(folder, on_bad_image=0.5)
    assert len(found.skipped) == 7
    assert said[1].count(".png") == 3
    assert ", ...; they are left out" in said[1]


def test_the_split_is_that_of_a_source_without_the_bad_images(folder, tmp_path):
    """Shares are of the images that are left."""
    found, _ = opened(folder, on_bad_image=0.1)
    for name in BAD:
        (folder / name).unlink()
    without = source(folder)
    assert [part.ids for part in parts(found)] == [part.ids for part in parts(without)]


def test_what_is_left_out_enters_the_identity(folder):
    def identity():
        return opened(folder, on_bad_image=0.2)[0].train.identity

    before = identity()
    (folder / "cat" / "4.png").write_bytes(b"no image either")
    assert identity() != before


def test_a_source_without_bad_images_is_what_it_is_without_the_key(tmp_path):
    root = make_folder(tmp_path / "folder")
    found, said = opened(root, on_bad_image=0.01)
    assert found.skipped == ()
    assert len(said) == 1
    assert [part.identity for part in parts(found)] == [part.identity for part in parts(source(root))]


def test_the_test_source_has_a_share_of_its_own(folder, tmp_path):
    write_parquet(tmp_path / "good/a.parquet", ["cat", "dog"] * 100)
    images = [encoded(grey(row)) for row in range(20)]
    images[4] = b"no image"
    pq.write_table(pa.table({"image": images, "label": ["cat", "dog"] * 10}), tmp_path / "test.parquet")
    fields = {"test_source": str(tmp_path / "test.parquet")}
    (problem,) = problems(tmp_path / "good", on_bad_image=0.04, **fields)  # 1 of 20, though 1 of 220 in all
    assert "1 of 20 images (5.00%) of data.test_source" in problem.remedy
    found, _ = opened(tmp_path / "good", on_bad_image=0.05, **fields)
    assert found.skipped == ("test.parquet:4",)
    assert len(found.test) == 19
    assert np.bincount(found.test.labels).tolist() == [9, 10]


def test_a_file_that_cannot_be_read_is_no_bad_image(folder, monkeypatch):
    """Storage that fails must not thin out the data."""
    read = verification.Images.try_read

    def vanish(self, index, threads=None):
        (folder / "cat" / "5.png").unlink()
        return read(self, index, threads)

    monkeypatch.setattr(verification.Images, "try_read", vanish)
    with pytest.raises(InputError, match="this file cannot be read") as caught:
        opened(folder, on_bad_image=0.9)
    assert caught.value.problems[0].value.endswith("cat/5.png")


def test_long_checks_say_how_far_they_are(folder, monkeypatch):
    monkeypatch.setattr(verification, "BLOCK", 8)
    monkeypatch.setattr(verification, "INTERVAL_S", 0)
    found, said = opened(folder, on_bad_image=0.1)
    assert found.skipped == tuple(BAD)
    assert said[1:4] == [f"data.source: {done}/20 images decoded" for done in (8, 16, 20)]


def test_a_class_of_which_nothing_is_left_is_named(folder):
    for path in (folder / "cat").iterdir():
        path.write_bytes(b"")
    (problem,) = problems(folder, on_bad_image=0.6)
    assert (problem.key, problem.value) == ("data.source", ["cat"])


def test_the_plan_knows_the_number_and_the_user_is_told(folder, tmp_path):
    data = {"source": str(folder), "image_size": 8, "channels": 1, "on_bad_image": 0.1}
    recipe = tiny(tmp_path / "storage", data=data, synthesis__images_per_class=1, synthesis__slots_per_unit=1)
    said = []
    assert prepare(recipe, said.append).plan.data.num_skipped == 2
    assert "2 of 20 images" in said[1]


def test_the_plan_command_says_what_is_left_out(folder, tmp_path, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{{name: x, data: {{source: {folder}, image_size: 8, on_bad_image: 0.1}}}}")
    assert main(["plan", str(recipe), "--storage", str(tmp_path), "--set", "synthesis.images_per_class=1"]) == 0
    assert "2 of 20 images (10.00%) of data.source cannot be decoded" in capfd.readouterr().err


@pytest.mark.parametrize("value", [0, 1.0, 1.5, "skip"])
def test_other_values_are_refused(tmp_path, value):
    with pytest.raises(InputError) as caught:
        tiny(tmp_path, data={"source": "sklearn:digits", "on_bad_image": value})
    assert [problem.key for problem in caught.value.problems] == ["data.on_bad_image"]
    assert "should be 'error', or should be" in caught.value.problems[0].remedy
