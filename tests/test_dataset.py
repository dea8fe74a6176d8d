import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from teddy_ray.dataset import FACTS, LabelledImages, check_folder, concatenate, decode, encode, seal, shard_name
from teddy_ray.errors import InputError
from teddy_ray.storage import to_json

CLASSES = ("cat", "dog é")
PER_CLASS, VIEWS, SIZE = 3, 4, 6
DATA = [shard_name(0, 2), shard_name(1, 2)]


def rows(channels=3, first=0, last=2 * PER_CLASS):
    """Some rows of a set of PER_CLASS images of each class."""
    random = np.random.default_rng(7)
    number = 2 * PER_CLASS
    images = random.integers(0, 256, (number, channels, SIZE, SIZE), dtype=np.uint8)
    soft = random.dirichlet([1, 1], (number, VIEWS)).astype(np.float16)
    keep = slice(first, last)
    return LabelledImages(
        ids=[f"{row // PER_CLASS:05d}-{row % PER_CLASS:05d}" for row in range(number)][keep],
        images=images[keep],
        labels=np.repeat(np.arange(2), PER_CLASS)[keep],
        soft_labels=soft[keep],
    )


HALVES = (rows(last=4), rows(first=4))


def publish(folder, parts=HALVES, classes=CLASSES, **facts):
    """A sealed set of one file per part."""
    files = [(shard_name(i, len(parts)), part) for i, part in enumerate(parts)]
    encoded = [(name, part if isinstance(part, bytes) else encode(part, classes)[0]) for name, part in files]
    known = {
        "classes": list(CLASSES),
        "images_per_class": PER_CLASS,
        "image_size": SIZE,
        "channels": 3,
        "views": {"num_views": VIEWS},
    }
    for name, data in seal([*encoded, ("README.md", b"# A card\n\nof several lines\n")], {**known, **facts}):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def folder(tmp_path):
    return publish(tmp_path / "distilled")


def problems(folder):
    with pytest.raises(InputError) as caught:
        check_folder(folder)
    return caught.value.problems


def assert_equal(found, expected):
    assert list(found.ids) == list(expected.ids)
    for name in ("images", "labels", "soft_labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_come_back_as_they_were(channels):
    data, _ = encode(rows(channels), CLASSES)
    found, classes = decode(data)
    assert_equal(found, rows(channels))
    assert classes == CLASSES


def test_one_row_and_one_view_come_back_as_they_were():
    whole = rows(last=1)
    single = replace(whole, soft_labels=whole.soft_labels[:, :1])
    assert_equal(decode(encode(single, CLASSES)[0])[0], single)


def test_equal_rows_are_equal_bytes():
    assert encode(rows(), CLASSES) == encode(rows(), CLASSES)


@pytest.mark.parametrize("name", ["images", "labels", "soft_labels"])
def test_other_rows_are_other_bytes(name):
    changed = getattr(rows(), name).copy()
    changed.flat[-1] = 0 if changed.flat[-1] else 1
    assert encode(replace(rows(), **{name: changed}), CLASSES)[0] != encode(rows(), CLASSES)[0]


def test_images_are_stored_as_png_and_their_bytes_are_counted():
    data, png_bytes = encode(rows(), CLASSES)
    values = pq.read_table(io.BytesIO(data)).column("image").to_pylist()
    assert png_bytes == sum(len(value["bytes"]) for value in values)
    assert {Image.open(io.BytesIO(value["bytes"])).format for value in values} == {"PNG"}
    assert [value["path"] for value in values] == [f"{image_id}.png" for image_id in rows().ids]


def test_files_are_joined_in_order():
    assert_equal(concatenate(HALVES), rows())


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"x": [1]}),
        pq.read_table(io.BytesIO(encode(rows(), CLASSES)[0])).drop_columns("soft_label"),
        pq.read_table(io.BytesIO(encode(rows(), CLASSES)[0])).replace_schema_metadata(None),
    ],
    ids=["other columns", "no soft labels", "no class names"],
)
def test_a_table_of_another_form_is_refused(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    with pytest.raises(ValueError, match="columns id, image, label, soft_label"):
        decode(buffer.getvalue())


def test_hugging_face_datasets_reads_images_class_labels_and_soft_labels(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    datasets = pytest.importorskip("datasets")
    files = [str(folder / name) for name in DATA]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    expected = rows()
    assert isinstance(loaded.features["image"], datasets.Image)
    assert isinstance(loaded.features["label"], datasets.ClassLabel)
    assert loaded.features["label"].names == list(CLASSES)
    assert loaded["id"][:] == list(expected.ids)
    assert loaded["label"][:] == expected.labels.tolist()
    np.testing.assert_array_equal(np.array(loaded["soft_label"][:]), expected.soft_labels.astype(np.float64))
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in loaded["image"]])
    np.testing.assert_array_equal(pixels, expected.images)


# -- published sets ------------------------------------------------------------------------------------------------


def test_a_published_set_passes_and_gives_its_facts(folder):
    facts = check_folder(folder)
    assert facts["classes"] == list(CLASSES)
    assert set(facts["files"]) == {*DATA, "README.md"}
    assert facts["files"]["README.md"]["bytes"] == (folder / "README.md").stat().st_size


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_of_one_file_passes(tmp_path, channels):
    assert check_folder(publish(tmp_path, [rows(channels)], channels=channels))


def test_equal_sets_are_sealed_by_equal_bytes(folder, tmp_path):
    assert (publish(tmp_path / "again") / FACTS).read_bytes() == (folder / FACTS).read_bytes()


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
@pytest.mark.parametrize("place", ["first", "second", "middle", "last but one", "last"])
@pytest.mark.parametrize("name", [*DATA, "README.md", FACTS])
def test_any_changed_byte_is_named_by_its_file(folder, name, place, bit):
    content = bytearray((folder / name).read_bytes())
    where = {"first": 0, "second": 1, "middle": len(content) // 2, "last but one": -2, "last": -1}[place]
    content[where] ^= bit
    (folder / name).write_bytes(content)
    assert [problem.key for problem in problems(folder)] == [str(folder / name)]


def test_every_byte_of_the_facts_is_sealed(folder):
    path = folder / FACTS
    content = path.read_bytes()
    for where in range(len(content)):
        path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
        assert [problem.key for problem in problems(folder)] == [str(path)]
    path.write_bytes(content)
    assert check_folder(folder)


@pytest.mark.parametrize("name", [*DATA, "README.md"])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\n", lambda data: b""])
def test_a_file_of_another_length_is_named(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    assert [problem.key for problem in problems(folder)] == [str(folder / name)]


@pytest.mark.parametrize("name", [*DATA, "README.md"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    (problem,) = problems(folder)
    assert problem.key == str(folder / name)
    assert "missing" in problem.remedy


def test_every_file_that_is_wrong_is_named_at_once(folder):
    (folder / DATA[0]).unlink()
    (folder / "README.md").write_bytes(b"")
    (folder / "data/extra").write_bytes(b"")
    assert {problem.key for problem in problems(folder)} == {
        str(folder / name) for name in (DATA[0], "README.md", "data/extra")
    }


@pytest.mark.parametrize("name", ["data/train-00002-of-00003.parquet", "data/.hidden", "data/notes.txt"])
def test_a_file_beside_the_data_is_named(folder, name):
    (folder / name).write_bytes((folder / DATA[0]).read_bytes())
    (problem,) = problems(folder)
    assert problem.key == str(folder / name)
    assert "remove it" in problem.remedy


@pytest.mark.parametrize("make", ["missing", "empty", "file"])
def test_what_is_no_set_is_refused(tmp_path, make):
    path = tmp_path / "set"
    if make == "empty":
        path.mkdir()
    elif make == "file":
        path.write_bytes(b"")
    (problem,) = problems(path)
    assert (problem.key, problem.value) == ("PATH", str(path))


@pytest.mark.parametrize("content", ["", "{}", "[]", "3", '{"seal": "x"}', "null"])
def test_facts_without_a_seal_are_refused(folder, content):
    (folder / FACTS).write_text(content)
    assert [problem.key for problem in problems(folder)] == [str(folder / FACTS)]


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: to_json({**json.loads(text), "images_per_class": 4}),
        lambda text: json.dumps(json.loads(text)),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + " ",
    ],
    ids=["other facts", "other layout", "other line ends", "a space more"],
)
def test_facts_written_anew_without_a_new_seal_are_refused(folder, rewrite):
    content = rewrite((folder / FACTS).read_bytes().decode())
    (folder / FACTS).write_bytes(content.encode())
    assert [problem.key for problem in problems(folder)] == [str(folder / FACTS)]


# -- sets that are sealed, but wrong -------------------------------------------------------------------------------


def with_soft(value):
    soft = HALVES[0].soft_labels.copy()
    soft[2, 1] = value
    return [replace(HALVES[0], soft_labels=soft), HALVES[1]]


@pytest.mark.parametrize(
    ("value", "finding", "count"),
    [
        ([0.5, 0.4], "do not sum to 1", 1),
        ([np.nan, np.nan], "do not sum to 1", 1),
        ([np.nan, 1.0], "do not sum to 1", 1),
        ([-0.25, 1.25], "outside [0, 1]", 2),
        ([np.inf, 0.0], "outside [0, 1]", 1),
    ],
)
def test_soft_labels_that_are_no_distribution_are_named(tmp_path, value, finding, count):
    found = {problem.key: problem.value for problem in problems(publish(tmp_path, with_soft(value)))}
    (key,) = [key for key in found if finding in key]
    assert key.startswith(str(tmp_path / DATA[0]))
    assert found[key] == count


@pytest.mark.parametrize("classes", [("dog é", "cat"), ("cat",), ("cat", "dog é", "eel")])
def test_other_class_names_are_named(tmp_path, classes):
    found = problems(publish(tmp_path, classes=classes))
    assert [(problem.key, problem.value) for problem in found] == [
        (f"{tmp_path / name}, class names", list(classes)) for name in DATA
    ]


def test_a_class_with_too_few_images_is_named(tmp_path):
    (problem,) = problems(publish(tmp_path, [HALVES[0]]))
    assert (problem.key, problem.value) == (str(tmp_path), [3, 1])
    assert "3 images of each class" in problem.remedy


def test_wrongly_counted_labels_are_named(tmp_path):
    labels = np.array([0, 0, 0, 0])
    (problem,) = problems(publish(tmp_path, [replace(HALVES[0], labels=labels), HALVES[1]]))
    assert (problem.key, problem.value) == (str(tmp_path), [4, 2])


def test_an_image_that_stands_twice_is_named(tmp_path):
    ids = ["00000-00000"] * 2
    (problem,) = problems(publish(tmp_path, [HALVES[0], replace(HALVES[1], ids=ids)]))
    assert problem.key == str(tmp_path)
    assert "2 image ids twice" in problem.value


@pytest.mark.parametrize(
    ("facts", "finding"),
    [
        ({"image_size": 7}, "shape of an image"),
        ({"channels": 1}, "shape of an image"),
        ({"views": {"num_views": 5}}, "views per image"),
    ],
)
def test_images_and_views_unlike_the_facts_are_named(tmp_path, facts, finding):
    found = problems(publish(tmp_path, **facts))
    assert [problem.key for problem in found] == [f"{tmp_path / name}, {finding}" for name in DATA]


@pytest.mark.parametrize("label", [2, -1])
def test_labels_outside_the_classes_are_named(tmp_path, label):
    labels = np.array([0, 0, 0, label])
    found = problems(publish(tmp_path, [replace(HALVES[0], labels=labels), HALVES[1]]))
    assert any(str(tmp_path / DATA[0]) in problem.key for problem in found)


def other_form():
    buffer = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"no Parquet at all", other_form()], ids=["not Parquet", "other columns"])
def test_a_sealed_file_of_another_form_is_named(tmp_path, content):
    found = problems(publish(tmp_path, [content, HALVES[1]]))
    assert any(str(tmp_path / DATA[0]) in problem.key for problem in found)
