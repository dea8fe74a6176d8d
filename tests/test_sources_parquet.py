"""Parquet files."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, everything, grey, labels_by_id, problems, source, unreadable, write_parquet
from pyarrow.fs import LocalFileSystem

from teddy_ray.errors import InputError
from teddy_ray.recipe import Data
from teddy_ray.sources import parquet


@pytest.mark.parametrize("struct", [False, True], ids=["bytes", "struct"])
@pytest.mark.parametrize("row_group_size", [None, 4])
def test_rows_of_several_files_and_row_groups_are_read_each_with_its_own_pixels(tmp_path, struct, row_group_size):
    write_parquet(tmp_path / "b.parquet", ["x", "y"] * 5, struct=struct, row_group_size=row_group_size)
    write_parquet(tmp_path / "sub/a.parquet", ["y"] * 7, first=100, struct=struct, row_group_size=row_group_size)
    assert {name: int(pixels.max()) for name, pixels in everything(tmp_path).items()} == {
        **{f"b.parquet:{row}": row for row in range(10)},
        **{f"sub/a.parquet:{row}": 100 + row for row in range(7)},
    }


def test_string_labels_are_class_names_in_sorted_order(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["b", "a", "c"] * 5)
    opened = source(tmp_path)
    assert opened.classes == ("a", "b", "c")
    assert labels_by_id(opened) == {f"a.parquet:{row}": "bac"[row % 3] for row in range(15)}


@pytest.mark.parametrize("label_type", [pa.int64(), pa.uint8()])
def test_integer_labels_take_their_names_from_the_features(tmp_path, label_type):
    write_parquet(tmp_path / "a.parquet", [1, 0] * 8, names=["zebra", "ant"], label_type=label_type)
    opened = source(tmp_path)
    assert opened.classes == ("zebra", "ant")
    assert labels_by_id(opened) == {f"a.parquet:{row}": ["ant", "zebra"][row % 2] for row in range(16)}


def test_integer_labels_without_features_are_named_by_number(tmp_path):
    write_parquet(tmp_path / "a.parquet", [2, 0, 1] * 8)
    assert source(tmp_path).classes == ("0", "1", "2")


def test_one_file_is_a_source_too(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", "b"] * 8)
    assert labels_by_id(source(tmp_path / "a.parquet")) == labels_by_id(source(tmp_path))


def test_missing_columns_are_both_named_with_those_that_are_there(tmp_path):
    pq.write_table(pa.table({"picture": [b""], "kind": [1]}), tmp_path / "a.parquet")
    found = problems(tmp_path)
    assert [(problem.key, problem.value) for problem in found] == [
        ("data.image_column", "image"),
        ("data.label_column", "label"),
    ]
    assert all("a.parquet" in problem.remedy and "picture, kind" in problem.remedy for problem in found)


def test_columns_of_the_wrong_type_are_both_named(tmp_path):
    pq.write_table(pa.table({"image": ["a.png"], "label": [0.5]}), tmp_path / "a.parquet")
    found = {problem.key: problem.remedy for problem in problems(tmp_path)}
    assert set(found) == {"data.image_column", "data.label_column"}
    assert "not string" in found["data.image_column"]
    assert "not double" in found["data.label_column"]


@pytest.mark.parametrize("labels", [[-1, 0], [0, 2]], ids=["negative", "too large"])
def test_labels_outside_the_classes_are_refused(tmp_path, labels):
    write_parquet(tmp_path / "a.parquet", labels * 8, names=["a", "b"])
    (problem,) = problems(tmp_path)
    assert problem.key == "data.label_column"
    assert "0..1" in problem.remedy


@pytest.mark.parametrize("labels", [[], [None, "a"]], ids=["no rows", "no label"])
def test_rows_without_labels_are_refused(tmp_path, labels):
    write_parquet(tmp_path / "a.parquet", labels, label_type=pa.string())
    assert [problem.key for problem in problems(tmp_path)] == ["data.source"]


def test_files_whose_labels_are_of_different_types_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [0, 1] * 8)
    write_parquet(tmp_path / "b.parquet", ["a", "b"] * 8)
    assert problems(tmp_path)


@pytest.mark.parametrize("metadata", ["{broken", "[]", '{"info": null}'])
def test_features_that_cannot_be_read_are_refused_or_ignored(tmp_path, metadata):
    table = pa.table({"image": [encoded(grey(0))] * 16, "label": [0, 1] * 8})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
    try:
        opened = source(tmp_path)
    except InputError:
        return
    assert opened.classes == ("0", "1")


def test_a_corrupt_file_is_named(tmp_path):
    write_parquet(tmp_path / "good.parquet", ["a", "b"] * 8)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nonsense PAR1")
    (problem,) = problems(tmp_path)
    assert problem.key == "data.source"
    assert "bad.parquet" in str(problem)


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK and then nonsense")
    (problem,) = problems(tmp_path / "images.zip")
    assert (problem.key, problem.value) == ("data.source", str(tmp_path / "images.zip"))


@pytest.mark.parametrize("content", [b"nonsense", None])
def test_a_corrupt_image_is_named_by_file_and_row(tmp_path, content):
    write_parquet(tmp_path / "a.parquet", ["x"] * 9)
    images = [encoded(grey(0)) for _ in range(9)]
    images[6] = content
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "label": ["x"] * 9}), tmp_path / "b.parquet")
    assert [problem.value for problem in unreadable(tmp_path)] == ["b.parquet:6"]


def test_files_that_name_other_classes_are_refused(tmp_path):
    write_parquet(tmp_path / "data/a.parquet", [0, 1] * 8, names=["cat", "dog"])
    write_parquet(tmp_path / "data/b.parquet", [0, 1] * 8, names=["dog", "cat"])
    (problem,) = problems(tmp_path / "data")
    assert "same classes in the same order" in problem.remedy


@pytest.mark.parametrize("rest", ["-00000-of-00001", "_0", "0", ""])
def test_a_folder_of_splits_gives_each_key_its_own(tmp_path, rest):
    train, test = f"data/train{rest}.parquet", f"data/test{rest}.parquet"
    write_parquet(tmp_path / train, [0, 1] * 8)
    write_parquet(tmp_path / test, [0, 1] * 3, first=100)
    parts = source(tmp_path, test_source=str(tmp_path))
    assert (len(parts.train) + len(parts.validation), len(parts.test)) == (16, 6)
    assert {name.split(":")[0] for name in parts.train.ids} == {train}
    assert {name.split(":")[0] for name in parts.test.ids} == {test}
    assert {name.split(":")[0] for name in source(tmp_path).test.ids} == {train}


def test_an_image_that_is_a_path_alone_is_named_by_file_and_row(tmp_path):
    images = [{"bytes": encoded(grey(0)), "path": None}] * 8 + [{"bytes": None, "path": "x.png"}]
    pq.write_table(pa.table({"image": images, "label": ["x"] * 9}), tmp_path / "a.parquet")
    (problem,) = unreadable(tmp_path)
    assert (problem.key, problem.value) == ("data.source", "a.parquet:8")
    assert "the row holds no bytes, only the path 'x.png'; store the bytes with it" in problem.remedy


def test_a_struct_of_paths_alone_is_refused_when_opened(tmp_path):
    pq.write_table(pa.table({"image": [{"path": "x.png"}] * 9, "label": ["x"] * 9}), tmp_path / "a.parquet")
    (problem,) = problems(tmp_path)
    assert problem.key == "data.image_column"
    assert "should hold bytes, struct<bytes, path> or uint8 tensors, not struct<path: string>" in problem.remedy


# -- tensors -------------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 4), np.uint8)
LAYOUTS = {  # name: (stored, as (n c h w) of 3 channels)
    "h w": (PIXELS[..., 0], np.repeat(PIXELS[:, None, :, :, 0], 3, 1)),
    "h w 1": (PIXELS[..., :1], np.repeat(PIXELS[:, None, :, :, 0], 3, 1)),
    "h w 3": (PIXELS[..., :3], PIXELS[..., :3].transpose(0, 3, 1, 2)),
    "1 h w": (PIXELS[..., 0][:, None], np.repeat(PIXELS[:, None, :, :, 0], 3, 1)),
    "3 h w": (PIXELS[..., :3].transpose(0, 3, 1, 2), PIXELS[..., :3].transpose(0, 3, 1, 2)),
    "4 h w": (
        np.concatenate([PIXELS[..., :3], np.full((20, 8, 8, 1), 255, np.uint8)], -1).transpose(0, 3, 1, 2),
        PIXELS[..., :3].transpose(0, 3, 1, 2),
    ),
}


def fixed_tensors(array):
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(array))


def nested_lists(array):
    type_ = pa.uint8() if array.dtype == np.uint8 else pa.float32()
    for _ in array.shape[1:]:
        type_ = pa.list_(type_)
    return pa.array(array.tolist(), type_)


def write_tensors(path, images):
    pq.write_table(pa.table({"image": images, "label": ["a", "b"] * 10}), path / "a.parquet", row_group_size=6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("store", [fixed_tensors, nested_lists])
def test_tensors_are_images_in_the_layout_their_shape_tells(tmp_path, store, layout):
    stored, expected = LAYOUTS[layout]
    write_tensors(tmp_path, store(stored))
    pixels = everything(tmp_path, channels=3)
    for row in range(20):
        np.testing.assert_array_equal(pixels[f"a.parquet:{row}"], expected[row])


TENSORS_OF_DATASETS = """
import sys
import numpy as np
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features
pixels = np.load(sys.argv[1] + "/pixels.npy")
for name, images, kind in (
    ("hwc", pixels, Array3D((8, 8, 3), "uint8")),
    ("hw", pixels[..., 0], Array2D((8, 8), "uint8")),
):
    features = Features({"image": kind, "label": ClassLabel(names=["a", "b"])})
    rows = {"image": list(images), "label": [0, 1] * 10}
    Dataset.from_dict(rows, features=features).to_parquet(f"{sys.argv[1]}/{name}.parquet")
"""


@pytest.fixture(scope="module")
def tensors_of_datasets(tmp_path_factory):
    """Written by Hugging Face `datasets` in a process of its own, for it registers its types with Arrow."""
    folder = tmp_path_factory.mktemp("datasets")
    np.save(folder / "pixels.npy", PIXELS[..., :3])
    environment = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TENSORS_OF_DATASETS, str(folder)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return folder


@pytest.mark.parametrize("registered", [False, True], ids=["without datasets", "with datasets"])
def test_tensors_of_hugging_face_datasets_are_images(tensors_of_datasets, registered):
    code = f"""
import sys
import numpy as np
{"import datasets" if registered else ""}
from pictures import everything, labels_by_id, source
pixels = np.load(sys.argv[1] + "/pixels.npy")
for name, channels in (("hwc", 3), ("hw", 1)):
    path = f"{{sys.argv[1]}}/{{name}}.parquet"
    assert source(path).classes == ("a", "b")
    for row, image in ((int(id_.split(":")[1]), image) for id_, image in everything(path, channels=channels).items()):
        np.testing.assert_array_equal(image, pixels[row].transpose(2, 0, 1)[:channels])
assert ("datasets" in sys.modules) == {registered}
"""
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
    command = [sys.executable, "-c", code, str(tensors_of_datasets)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("images", "remedy"),
    [
        (fixed_tensors(np.zeros((20, 8, 8, 3), np.float32)), "tensors should be of uint8, not float"),
        (nested_lists(np.zeros((20, 8, 8, 3), np.float32)), "tensors should be of uint8, not float"),
        (pa.array([[1, 2]] * 20, pa.list_(pa.uint8())), "tensors should have 2 or 3 dimensions, not 1"),
        (nested_lists(np.zeros((20, 1, 8, 8, 3), np.uint8)), "tensors should have 2 or 3 dimensions, not 4"),
        (fixed_tensors(np.zeros((20, 3, 8, 3), np.uint8)), "(3, 8, 3) may be (h w c) as well as (c h w)"),
        (fixed_tensors(np.zeros((20, 8, 8, 2), np.uint8)), "(8, 8, 2) is neither (h w) nor (h w c) nor (c h w)"),
        (
            pa.FixedShapeTensorArray.from_numpy_ndarray(PIXELS.transpose(0, 3, 1, 2)),
            "should be stored in the order of their dimensions, not permuted by [1, 2, 0]",
        ),
    ],
    ids=["floats", "lists of floats", "one dimension", "four dimensions", "ambiguous", "two channels", "permuted"],
)
def test_tensors_of_which_the_type_says_that_they_are_no_images_are_refused_when_opened(tmp_path, images, remedy):
    write_tensors(tmp_path, images)
    (problem,) = problems(tmp_path)
    assert (problem.key, problem.value) == ("data.image_column", "image")
    assert remedy in problem.remedy


GOOD = np.zeros((8, 8, 3), np.uint8).tolist()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "the row holds no image, but null"),
        ([], "of different lengths"),
        ([[[1, 2, 3]], [[1, 2, 3], [1, 2, 3]]], "the rows of its tensor are of different lengths"),
        ([[[1, 2, None]] * 8] * 8, "values of its tensor are missing"),
        (np.zeros((3, 8, 3), np.uint8).tolist(), "(3, 8, 3) may be (h w c) as well as (c h w)"),
        (np.zeros((8, 8, 2), np.uint8).tolist(), "(8, 8, 2) is neither"),
    ],
    ids=["null", "empty", "ragged", "holes", "ambiguous", "two channels"],
)
def test_a_list_that_is_no_image_is_named_by_file_and_row(tmp_path, image, reason):
    images = [GOOD] * 20
    images[11] = image
    write_tensors(tmp_path, pa.array(images, pa.list_(pa.list_(pa.list_(pa.uint8())))))
    (problem,) = unreadable(tmp_path, channels=3)
    assert (problem.key, problem.value) == ("data.source", "a.parquet:11")
    assert reason in problem.remedy


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Every row group that is read."""
    found, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kwargs: found.append(i) or read(self, i, **kwargs)
    )
    return found


def test_rows_in_any_order_read_each_row_group_once_per_call(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    write_parquet(tmp_path / "a.parquet", ["a"] * 60, row_group_size=5)
    images = parquet.open_parquet("data.source", LocalFileSystem(), str(tmp_path), ["a.parquet"], Data(source=""))
    index = np.random.default_rng(0).permutation(np.repeat(np.arange(60), 2))
    pixels = images.read(index)
    assert pixels[:, 0, 0, 0].tolist() == index.tolist()
    assert sorted(reads) == list(range(12))
    images.read(index[:0])
    assert len(reads) == 12


def test_row_groups_are_kept_between_calls_as_far_as_they_fit(tmp_path, reads, monkeypatch):
    write_parquet(tmp_path / "a.parquet", ["a"] * 60, row_group_size=20)
    images = parquet.open_parquet("data.source", LocalFileSystem(), str(tmp_path), ["a.parquet"], Data(source=""))
    images.read()
    images.read()
    assert reads == [0, 1, 2]
    reads.clear()
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    images = pickle.loads(pickle.dumps(images))
    for row in (3, 4, 5, 23, 24):  # the last one is kept whatever its size
        images.read(np.array([row]))
    assert reads == [0, 1]
    size = images.read_rows._read_group(0).nbytes
    monkeypatch.setattr(parquet, "CACHE_BYTES", int(2.5 * size))
    reads.clear()
    images = pickle.loads(pickle.dumps(images))
    for row in (0, 20, 0, 40, 0, 20):  # groups 0 1 0 2 0 1: group 1 has gone when it is asked for again
        images.read(np.array([row]))
    assert reads == [0, 1, 2, 1]


def test_several_threads_read_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "CACHE_BYTES", 500)
    write_parquet(tmp_path / "a.parquet", ["a"] * 100, row_group_size=7)
    images = parquet.open_parquet("data.source", LocalFileSystem(), str(tmp_path), ["a.parquet"], Data(source=""))
    orders = [np.random.default_rng(seed).permutation(100) for seed in range(40)]
    with ThreadPoolExecutor(8) as outer, ThreadPoolExecutor(4) as inner:
        for order, pixels in zip(orders, outer.map(lambda order: images.read(order, inner), orders), strict=True):
            assert pixels[:, 0, 0, 0].tolist() == order.tolist()


def test_a_file_that_has_gone_is_an_error_and_no_bad_image(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"] * 20)
    train = source(tmp_path).train
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(InputError) as caught:
        list(train.try_read(np.arange(2)))
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("data.source", str(tmp_path / "a.parquet"))
    assert "this file cannot be read" in problem.remedy
