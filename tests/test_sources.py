"""Sources as a whole: splits, selections, identity, reading elsewhere."""

import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from pictures import SIZE, encoded, grey, labels_by_id, make_folder, problems, source, write_parquet

from teddy_ray.sources import Images
from teddy_ray.sources.images import split


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


# -- digits and splits -------------------------------------------------------------------------------------------------


def digits(**fields):
    return source("sklearn:digits", **fields)


def test_the_digits_fall_into_three_disjoint_parts():
    parts = digits()
    ids = [set(part.ids) for part in (parts.train, parts.validation, parts.test)]
    assert [len(part) for part in ids] == [1293, 144, 360]
    assert len(set.union(*ids)) == 1797


def test_the_test_split_of_the_digits_is_stratified():
    parts = digits()
    test = np.bincount(parts.test.labels)
    total = sum(np.bincount(part.labels) for part in (parts.train, parts.validation, parts.test))
    assert np.all(np.abs(test - total * 360 / 1797) < 1)


@pytest.mark.parametrize(
    "fields", [{"validation": 0.4}, {"test_fraction": 0.5}, {"limit_per_class": 9}, {"image_size": 4, "channels": 3}]
)
def test_the_test_split_of_the_digits_is_the_same_in_every_recipe(fields):
    assert digits(**fields).test.ids == digits().test.ids


def test_a_choice_of_classes_leaves_the_test_split_what_it_was():
    parts, chosen = digits(), digits(classes=("7", "3"))
    assert chosen.test.ids == [i for i, label in zip(parts.test.ids, parts.test.labels, strict=True) if label in (3, 7)]


def test_the_digits_are_read_as_pixels_of_the_full_range():
    train = digits().train
    pixels = train.read(np.arange(50))
    assert pixels.shape == (50, 1, 8, 8)
    assert pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_digits_with_a_test_source_are_refused():
    assert [problem.key for problem in problems("sklearn:digits", test_source="elsewhere")] == ["data.test_source"]


def unread(counts, order=None):
    """Images of the given counts per class that nobody reads."""
    labels = np.repeat(np.arange(len(counts)), counts)
    order = np.arange(len(labels)) if order is None else order
    return Images(
        ids=[f"image {i}" for i in order],
        labels=labels[order],
        rows=order,
        classes=tuple(str(label) for label in range(len(counts))),
        content="content",
        image_size=SIZE,
        channels=1,
        read_rows=None,
    )


@pytest.mark.parametrize(
    ("counts", "num", "expected"),
    [
        ([7, 5, 3], 5, [2, 2, 1]),  # 2.33, 1.67, 1
        ([1, 1, 8], 3, [0, 0, 3]),  # 0.3, 0.3, 2.4
        ([6, 3, 1], 6, [4, 2, 0]),  # 3.6, 1.8, 0.6
        ([10, 20, 30], 6, [1, 2, 3]),
        ([4, 4], 8, [4, 4]),
        ([4, 4], 0, [0, 0]),
        ([5, 5], 1, [1, 0]),
    ],
)
def test_a_split_is_stratified_by_largest_remainder(counts, num, expected):
    rest, aside = split(unread(counts), num)
    assert np.bincount(aside.labels, minlength=len(counts)).tolist() == expected
    assert (np.bincount(rest.labels, minlength=len(counts)) + expected).tolist() == counts


@pytest.mark.parametrize("num", [1, 13, 40, 77])
def test_a_split_is_exact_and_disjoint_and_keeps_the_order(num):
    images = unread([11, 29, 37])
    rest, aside = split(images, num)
    assert len(aside) == num
    assert sorted([*rest.rows, *aside.rows]) == list(range(77))
    assert np.all(np.diff(aside.rows) > 0)
    assert np.all(np.diff(rest.rows) > 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_does_not_follow_the_order_of_the_data(seed):
    counts = [11, 29, 37]
    order = np.random.default_rng(seed).permutation(sum(counts))
    assert set(split(unread(counts), 20)[1].ids) == set(split(unread(counts, order), 20)[1].ids)


def test_a_split_is_not_the_first_or_last_images():
    aside = split(unread([100]), 30)[1].rows
    assert not set(aside) <= set(range(50))
    assert not set(aside) <= set(range(50, 100))


@pytest.mark.parametrize(("share", "expected"), [(0.07, 7), (0.1, 10), (0.2, 20), (0.301, 31)])
def test_a_share_that_comes_out_even_is_not_rounded_up(tmp_path, share, expected):
    write_parquet(tmp_path / "a.parquet", ["a"] * 100)
    assert len(source(tmp_path, test_fraction=share).test) == expected


# -- selections --------------------------------------------------------------------------------------------------------


def test_classes_are_chosen_and_ordered(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", "b", "c", "d"] * 8)
    chosen = source(tmp_path, classes=("d", "b"))
    assert chosen.classes == ("d", "b")
    assert set(chosen.train.labels) == {0, 1}
    assert labels_by_id(chosen) == {f"a.parquet:{row}": "abcd"[row % 4] for row in range(32) if row % 4 in (1, 3)}


def test_every_unknown_class_is_named(folder):
    (problem,) = problems(folder, classes=("dog", "cow", "pig"))
    assert (problem.key, problem.value) == ("data.classes", ["cow", "pig"])
    assert "cat, dog" in problem.remedy


def test_a_limit_keeps_so_many_training_images_of_each_class_and_all_test_images(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"] * 60 + ["b"] * 40 + ["c"] * 5)
    whole, few, fewer = source(tmp_path), source(tmp_path, limit_per_class=20), source(tmp_path, limit_per_class=10)

    def training(opened):
        return np.bincount(np.concatenate([opened.train.labels, opened.validation.labels])).tolist()

    assert training(few) == [20, 20, 4]
    assert training(fewer) == [10, 10, 4]
    assert few.test.ids == whole.test.ids
    assert {*fewer.train.ids, *fewer.validation.ids} < {*few.train.ids, *few.validation.ids}


def test_a_class_with_nothing_left_to_train_on_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [0, 2] * 20)
    (problem,) = problems(tmp_path)
    assert (problem.key, problem.value) == ("data.source", ["1"])


def test_a_test_source_is_the_test_split_and_leaves_the_source_whole(tmp_path):
    write_parquet(tmp_path / "train/a.parquet", ["a", "b"] * 10)
    write_parquet(tmp_path / "test/t.parquet", ["b", "a"] * 3)
    opened = source(tmp_path / "train", test_source=str(tmp_path / "test"))
    assert opened.test.ids == [f"t.parquet:{row}" for row in range(6)]
    assert opened.test.labels.tolist() == [1, 0] * 3
    assert len(opened.train) + len(opened.validation) == 20


@pytest.mark.parametrize("labels", [["a", "c"], ["a", "a"], ["a", "b", "c"]])
def test_a_test_source_of_other_classes_is_refused(tmp_path, labels):
    write_parquet(tmp_path / "train/a.parquet", ["a", "b"] * 10)
    write_parquet(tmp_path / "test/t.parquet", labels * 10)
    (problem,) = problems(tmp_path / "train", test_source=str(tmp_path / "test"))
    assert problem.key == "data.test_source"
    assert "['a', 'b']" in problem.remedy


def test_a_missing_test_source_is_named_by_its_own_key(folder, tmp_path):
    (problem,) = problems(folder, test_source=str(tmp_path / "missing"))
    assert (problem.key, problem.value) == ("data.test_source", str(tmp_path / "missing"))


# -- identity ----------------------------------------------------------------------------------------------------------


def identities(path, **fields):
    opened = source(path, **fields)
    return [part.identity for part in (opened.train, opened.validation, opened.test)]


@pytest.fixture(params=["folder", "parquet"])
def data(request, tmp_path):
    """A data set, and a function that changes one byte of it."""
    if request.param == "folder":
        path = request.getfixturevalue("folder")
        changed = path / "dog" / "7.png"
    else:
        path, changed = tmp_path / "parquet", tmp_path / "parquet/a.parquet"
        write_parquet(changed, ["a", "b"] * 10, row_group_size=4)

    def touch():
        content = bytearray(changed.read_bytes())
        content[content.rfind(b"IDAT") + 6] ^= 1
        changed.write_bytes(content)

    return path, touch


def test_identity_is_of_the_content_and_not_of_the_place_or_time(data, tmp_path):
    path, _ = data
    copy = tmp_path / "elsewhere/copy"
    shutil.copytree(path, copy)
    for file in copy.rglob("*.*"):
        os.utime(file, (1, 1))
    assert identities(path) == identities(copy) == identities(f"file://{copy}") == identities(f"{copy}/")


def test_the_three_parts_have_identities_of_their_own(data):
    assert len(set(identities(data[0]))) == 3


def test_identity_changes_with_a_single_byte(data):
    path, touch = data
    before = identities(path)
    touch()
    after = identities(path)
    assert not set(before) & set(after)


@pytest.mark.parametrize(
    "fields", [{"image_size": 9}, {"channels": 3}, {"validation": 0.3}, {"test_fraction": 0.4}, {"limit_per_class": 5}]
)
def test_identity_of_the_training_images_changes_with(data, fields):
    assert identities(data[0])[0] != identities(data[0], **fields)[0]


def test_identity_changes_with_the_name_of_an_image(folder):
    before = identities(folder)
    (folder / "cat" / "3.png").rename(folder / "cat" / "03.png")
    assert not set(before) & set(identities(folder))


def test_identity_changes_with_the_class_of_an_image(folder):
    before = identities(folder)
    (folder / "cat" / "3.png").rename(folder / "dog" / "33.png")
    assert not set(before) & set(identities(folder))


def test_identity_changes_with_the_choice_and_order_of_classes(folder):
    choices = [None, ("cat",), ("dog",), ("dog", "cat")]
    assert len({identities(folder, classes=classes)[0] for classes in choices}) == len(choices)
    assert identities(folder, classes=("cat", "dog")) == identities(folder)


def test_identity_changes_with_the_columns(tmp_path):
    others = {"other_label": ["a", "a", "b", "b"] * 5, "other_image": [encoded(grey(255))] * 20}
    write_parquet(tmp_path / "a.parquet", ["a", "b"] * 10, **others)
    columns = [{}, {"label_column": "other_label"}, {"image_column": "other_image"}]
    assert len({identities(tmp_path, **fields)[0] for fields in columns}) == len(columns)


def test_identity_changes_with_the_labels_alone():
    images = unread([5, 5])
    assert replace(images, labels=images.labels[::-1]).identity != images.identity


def test_identity_of_a_selection_is_of_its_images_and_their_order():
    images = unread([5, 5])
    indices = ([0, 1, 2], [0, 1, 3], [2, 1, 0], [0, 1])
    assert len({images.select(np.array(index)).identity for index in indices}) == 4
    assert replace(images).identity == images.identity


# -- reading elsewhere -------------------------------------------------------------------------------------------------


def test_images_of_a_folder_and_of_parquet_read_the_same_after_pickling(data):
    train = source(data[0]).train
    before = train.read()
    copy = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(copy.read(), before)
    assert copy.identity == train.identity


def test_digits_read_the_same_after_pickling():
    test = digits().test
    copy = pickle.loads(pickle.dumps(test))
    np.testing.assert_array_equal(copy.read(), test.read())


def test_a_selection_reads_its_own_images_in_its_order(data):
    train = source(data[0]).train
    index = np.array([5, 0, 7, 5])
    np.testing.assert_array_equal(train.select(index).read(), train.read()[index])
    np.testing.assert_array_equal(train.read(index), train.read()[index])


def test_a_test_source_of_the_training_images_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [0, 1] * 8)
    (problem,) = problems(tmp_path / "a.parquet", test_source=str(tmp_path / "a.parquet"))
    assert problem.key == "data.test_source"
    assert "the very images of data.source" in problem.remedy


# -- object stores -------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket():
    """A store in memory, by URI; puts a folder there."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")

    def put(folder):
        memory.put(str(folder), "/bucket/data", recursive=True)
        return "fsspec+memory:///bucket/data"

    yield put
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("on_bad_image", ["error", 0.1])
def test_folders_and_parquet_at_a_uri_are_what_they_are_on_disk(data, bucket, on_bad_image):
    path, _ = data
    uri = bucket(path)
    assert identities(uri, on_bad_image=on_bad_image) == identities(path)
    here, there = source(path).train, source(uri).train
    np.testing.assert_array_equal(there.read(), here.read())
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(there)).read(), here.read())


def test_what_is_missing_in_a_store_is_named(bucket, folder):
    bucket(folder)
    (problem,) = problems("fsspec+memory:///bucket/nothing")
    assert (problem.key, problem.value) == ("data.source", "fsspec+memory:///bucket/nothing")
    assert "does not exist" in problem.remedy
