import io
import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from teddy_ray.errors import InputError
from teddy_ray.recipe import Data
from teddy_ray.sources import Images, open_source
from teddy_ray.sources.images import split

SIZE = 8


def source(path, **fields):
    return open_source(Data(source=str(path), **{"image_size": SIZE, "channels": 1, **fields}))


def problems(path, **fields):
    with pytest.raises(InputError) as caught:
        source(path, **fields)
    return caught.value.problems


def everything(path, **fields):
    """id -> pixels (c h w) of all parts."""
    opened = source(path, **fields)
    parts = (opened.train, opened.validation, opened.test)
    return {name: pixels for part in parts for name, pixels in zip(part.ids, part.read(), strict=True)}


def grey(value, size=(SIZE, SIZE)):
    return Image.new("L", size, value)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def save(path, image, form="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, form, **options))


# -- digits and splits ---------------------------------------------------------------------------------------------


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
        read_row=grey,
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


# -- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten images."""
    root = tmp_path / "folder"
    for label, name in enumerate(["cat", "dog"]):
        for index in range(10):
            save(root / name / f"{index}.png", grey(100 * label + index))
    return root


def test_classes_are_the_folders_in_order_and_nested_images_belong_to_theirs(folder):
    save(folder / "ant" / "deep" / "deeper" / "x.JPEG", grey(200), "JPEG")
    save(folder / "ant" / "y.webp", grey(200), "WEBP")
    save(folder / "ant" / "z.bmp", grey(200), "BMP")
    opened = source(folder)
    assert opened.classes == ("ant", "cat", "dog")
    pixels = everything(folder)
    assert {"ant/deep/deeper/x.JPEG", "ant/y.webp", "ant/z.bmp", "cat/3.png"} < set(pixels)
    for part in (opened.train, opened.validation, opened.test):
        assert [opened.classes[label] for label in part.labels] == [name.split("/")[0] for name in part.ids]
    assert len(pixels) == 23


def test_each_image_is_read_with_its_own_pixels(folder):
    assert {name: int(pixels.max()) for name, pixels in everything(folder).items()} == {
        f"{name}/{index}.png": 100 * label + index for label, name in enumerate(["cat", "dog"]) for index in range(10)
    }


def test_hidden_files_and_folders_and_other_files_are_left_out(folder):
    before = source(folder)
    save(folder / "cat" / ".thumbnail.png", grey(1))
    save(folder / "cat" / ".cache" / "x.png", grey(1))
    save(folder / ".trash" / "x.png", grey(1))
    (folder / "cat" / "notes.txt").write_text("no image")
    save(folder / "cover.png", grey(1))
    after = source(folder)
    assert after.classes == ("cat", "dog")
    assert after.train.identity == before.train.identity


def halves():
    """An upright image, bright above and dark below."""
    image = grey(0)
    image.paste(255, (0, 0, 8, 4))
    return image


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    return encoded(halves().transpose(Image.Transpose.ROTATE_90), exif=exif)


def wide():
    image = grey(0, (24, 8))
    image.paste(255, (8, 0, 16, 8))
    return encoded(image)


WHITE, RED = np.full((3, 8, 8), 255), np.full((3, 8, 8), [[[254]], [[0]], [[0]]])
TOP = np.repeat([255, 0], 4)[None, :, None] * np.ones((3, 1, 8))
FORMS = {
    "greyscale": (lambda: encoded(grey(255)), WHITE),
    "one bit": (lambda: encoded(grey(255).convert("1")), WHITE),
    "CMYK": (lambda: encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 1)), "JPEG"), RED),
    "RGBA": (lambda: encoded(Image.new("RGBA", (8, 8), (254, 0, 0, 255))), RED),
    "palette": (lambda: encoded(Image.new("RGB", (8, 8), (254, 0, 0)).quantize(4)), RED),
    "large": (lambda: encoded(grey(255, (30, 30))), WHITE),
    "small": (lambda: encoded(grey(255, (2, 2))), WHITE),
    "turned by EXIF": (rotated, TOP),
    "not square": (wide, WHITE),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_of_any_form_become_rgb_of_the_right_size(folder, form):
    make, expected = FORMS[form]
    (folder / "cat" / "3.png").write_bytes(make())
    pixels = everything(folder, channels=3)["cat/3.png"]
    assert pixels.shape == (3, 8, 8)
    np.testing.assert_allclose(pixels.astype(int), expected, atol=3)


def test_colours_become_grey_where_one_channel_is_asked_for(folder):
    save(folder / "cat" / "3.png", Image.new("RGB", (8, 8), (255, 0, 0)))
    pixels = everything(folder)["cat/3.png"]
    assert pixels.shape == (1, 8, 8)
    np.testing.assert_allclose(pixels.astype(int), 0.299 * 255, atol=1)


def test_every_class_folder_without_images_is_named(folder):
    (folder / "empty").mkdir()
    (folder / "noted").mkdir()
    (folder / "noted" / "a.txt").write_text("")
    found = problems(folder)
    assert [problem.value for problem in found] == [str(folder / "empty"), str(folder / "noted")]
    assert all(problem.key.startswith("data.source") and "should hold images" in problem.remedy for problem in found)


def test_a_source_that_is_not_there_is_refused(tmp_path):
    (problem,) = problems(tmp_path / "missing")
    assert (problem.key, problem.value) == ("data.source", str(tmp_path / "missing"))
    assert "does not exist" in problem.remedy


def test_an_empty_folder_is_refused(tmp_path):
    (problem,) = problems(tmp_path)
    assert (problem.key, problem.value) == ("data.source", str(tmp_path))
    assert "one folder per class" in problem.remedy


@pytest.mark.parametrize("uri", ["nosuch://bucket/data", "fsspec+nosuch://bucket/data", "s3x:///"])
def test_a_uri_of_no_known_file_system_is_refused(uri):
    (problem,) = problems(uri)
    assert (problem.key, problem.value) == ("data.source", uri)


@pytest.mark.parametrize("content", [b"", b"no image at all", encoded(halves())[:48]], ids=["empty", "text", "cut"])
def test_an_image_that_cannot_be_decoded_is_named_when_read(folder, content):
    (folder / "cat" / "3.png").write_bytes(content)
    with pytest.raises(InputError) as caught:
        everything(folder)
    (problem,) = caught.value.problems
    assert problem.value == "cat/3.png"
    assert "cannot be decoded" in problem.remedy


# -- Parquet -------------------------------------------------------------------------------------------------------


def write_parquet(path, labels, *, first=0, struct=False, names=None, row_group_size=None, label_type=None, **columns):
    """Rows of grey images of the values first, first + 1, ..."""
    pngs = [encoded(grey((first + row) % 256)) for row in range(len(labels))]
    images = pa.array(pngs, pa.binary())
    if struct:
        images = pa.array([{"bytes": png, "path": None} for png in pngs])
    table = pa.table({"image": images, "label": pa.array(labels, label_type), **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size, compression="none")


@pytest.mark.parametrize("struct", [False, True], ids=["bytes", "struct"])
@pytest.mark.parametrize("row_group_size", [None, 4])
def test_rows_of_several_files_and_row_groups_are_read_each_with_its_own_pixels(tmp_path, struct, row_group_size):
    write_parquet(tmp_path / "b.parquet", ["x", "y"] * 5, struct=struct, row_group_size=row_group_size)
    write_parquet(tmp_path / "sub/a.parquet", ["y"] * 7, first=100, struct=struct, row_group_size=row_group_size)
    assert {name: int(pixels.max()) for name, pixels in everything(tmp_path).items()} == {
        **{f"b.parquet:{row}": row for row in range(10)},
        **{f"sub/a.parquet:{row}": 100 + row for row in range(7)},
    }


def labels_by_id(opened):
    parts = (opened.train, opened.validation, opened.test)
    return {name: opened.classes[label] for part in parts for name, label in zip(part.ids, part.labels, strict=True)}


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
    with pytest.raises(InputError) as caught:
        everything(tmp_path)
    assert [problem.value for problem in caught.value.problems] == ["b.parquet:6"]


# -- selections ----------------------------------------------------------------------------------------------------


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


# -- identity ------------------------------------------------------------------------------------------------------


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


# -- reading elsewhere ---------------------------------------------------------------------------------------------


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


def test_files_that_name_other_classes_are_refused(tmp_path):
    write_parquet(tmp_path / "data/a.parquet", [0, 1] * 8, names=["cat", "dog"])
    write_parquet(tmp_path / "data/b.parquet", [0, 1] * 8, names=["dog", "cat"])
    (problem,) = problems(tmp_path / "data")
    assert "same classes in the same order" in problem.remedy


def test_a_folder_of_splits_gives_each_key_its_own(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [0, 1] * 8)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [0, 1] * 3, first=100)
    parts = source(tmp_path, test_source=str(tmp_path))
    assert (len(parts.train) + len(parts.validation), len(parts.test)) == (16, 6)
    assert {name.split("-")[0] for name in parts.train.ids} == {"data/train"}
    assert {name.split("-")[0] for name in parts.test.ids} == {"data/test"}
    assert {name.split("-")[0] for name in source(tmp_path).test.ids} == {"data/train"}


def test_a_test_source_of_the_training_images_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [0, 1] * 8)
    (problem,) = problems(tmp_path / "a.parquet", test_source=str(tmp_path / "a.parquet"))
    assert problem.key == "data.test_source"
    assert "the very images of data.source" in problem.remedy


def test_16_bit_images_keep_their_high_byte(tmp_path):
    for row in range(20):
        values = np.full((SIZE, SIZE), 3000 * row, dtype=np.uint16)
        save(tmp_path / "data" / "ab"[row % 2] / f"{row:02d}.png", Image.fromarray(values))
    pixels = everything(tmp_path / "data")
    assert [int(pixels[name].max()) for name in sorted(pixels, key=lambda name: name[2:])] == [
        3000 * row >> 8 for row in range(20)
    ]
