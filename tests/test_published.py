"""What a published set may be wrong in, and how it is named."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_set import CLASSES, DATA, HALVES, assert_equal, publish, rows

from teddy_ray.dataset import FACTS, concatenate, seal_of
from teddy_ray.errors import InputError
from teddy_ray.labels import Dense, TopK
from teddy_ray.published import check_set
from teddy_ray.storage import to_json


@pytest.fixture
def folder(tmp_path):
    return publish(tmp_path / "distilled")


def problems(folder):
    with pytest.raises(InputError) as caught:
        check_set(str(folder))
    return caught.value.problems


# -- published sets ------------------------------------------------------------------------------------------------


def test_a_published_set_passes_and_gives_its_facts(folder):
    facts = check_set(str(folder))
    assert facts["classes"] == list(CLASSES)
    assert set(facts["files"]) == set(DATA)
    assert facts["files"][DATA[0]]["bytes"] == (folder / DATA[0]).stat().st_size


def test_the_card_may_be_edited(folder):
    (folder / "README.md").write_text("another card")
    assert check_set(str(folder))


def test_rows_are_handed_over_in_order(folder):
    parts = []
    check_set(str(folder), parts.append)
    assert [len(part.ids) for part in parts] == [4, 2]
    assert_equal(concatenate(parts), rows())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_of_one_file_passes(tmp_path, channels):
    assert check_set(str(publish(tmp_path, [rows(channels)], channels=channels)))


def test_equal_sets_are_sealed_by_equal_bytes(folder, tmp_path):
    assert (publish(tmp_path / "again") / FACTS).read_bytes() == (folder / FACTS).read_bytes()


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
@pytest.mark.parametrize("place", ["first", "second", "middle", "last but one", "last"])
@pytest.mark.parametrize("name", [*DATA, FACTS])
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
    assert check_set(str(folder))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\n", lambda data: b""])
def test_a_file_of_another_length_is_named(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    assert [problem.key for problem in problems(folder)] == [str(folder / name)]


@pytest.mark.parametrize("name", DATA)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    (problem,) = problems(folder)
    assert problem.key == str(folder / name)
    assert "missing" in problem.remedy


def test_every_file_that_is_wrong_is_named_at_once(folder):
    (folder / DATA[0]).unlink()
    (folder / DATA[1]).write_bytes(b"")
    (folder / "data/extra").write_bytes(b"")
    assert {problem.key for problem in problems(folder)} == {str(folder / name) for name in (*DATA, "data/extra")}


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
    soft = HALVES[0].soft_labels.values.copy()
    soft[2, 1] = value
    return [replace(HALVES[0], soft_labels=Dense(soft)), HALVES[1]]


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
        ({"labels": {"num_views": 5}}, "views per image"),
        ({"labels": {"mode": "top_k"}}, "form of the soft labels"),
        ({"labels": {"mode": "none"}}, "form of the soft labels"),
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


# -- other forms of labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["top_k", "none"])
def test_sets_of_other_forms_pass(tmp_path, form):
    assert check_set(str(publish(tmp_path, [rows(form=form)], labels={"mode": form})))


def test_logits_have_to_be_finite_alone(tmp_path):
    soft = rows().soft_labels.values * np.float16(-30)
    assert check_set(str(publish(tmp_path / "right", [replace(rows(), soft_labels=Dense(soft))], labels=LOGITS)))
    soft[1, 2] = [np.nan, np.inf]
    (problem,) = problems(publish(tmp_path / "wrong", [replace(rows(), soft_labels=Dense(soft))], labels=LOGITS))
    assert "not finite" in problem.key
    assert problem.value == 2


LOGITS = {"ensemble": "logits"}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"classes": 2}, "unknown or repeated classes"),
        ({"values": 1.5}, "outside [0, 1]"),
        ({"values": np.nan}, "do not sum to 1"),
    ],
)
def test_top_classes_that_are_no_labels_are_named(tmp_path, change, finding):
    soft = rows(form="top_k").soft_labels
    classes, values = soft.classes.copy(), soft.values.copy()
    for name, value in change.items():
        {"classes": classes, "values": values}[name][2, 1] = value
    wrong = replace(rows(), soft_labels=TopK(classes, values, 2))
    found = problems(publish(tmp_path, [wrong], labels={"mode": "top_k"}))
    assert any(finding in problem.key for problem in found)


def test_a_set_of_another_format_is_refused(folder):
    facts = json.loads((folder / FACTS).read_text())
    del facts["seal"]
    facts["format"] = 1
    facts["seal"] = seal_of(facts)
    (folder / FACTS).write_text(to_json(facts))
    (problem,) = problems(folder)
    assert (problem.value, "publish the set again" in problem.remedy) == ("format 1", True)


def test_a_set_is_checked_at_a_uri(folder):
    assert check_set(f"file://{folder}")


@pytest.mark.parametrize("name", ["../notes.txt", "/etc/passwd", "data/../../x.parquet", "README.md"])
def test_a_set_that_names_strange_files_is_refused(folder, name):
    facts = json.loads((folder / FACTS).read_text())
    del facts["seal"]
    facts["files"][name] = {"bytes": 0, "sha256": ""}
    facts["seal"] = seal_of(facts)
    (folder / FACTS).write_text(to_json(facts))
    (problem,) = problems(folder)
    assert problem.value == [name]
    assert "do not trust" in problem.remedy


@pytest.mark.parametrize("image_id", ["../../victim", "", ".hidden", "a/b"])
def test_ids_that_would_name_other_files_are_named(tmp_path, image_id):
    ids = [image_id, *rows().ids[1:]]
    (problem,) = problems(publish(tmp_path, [replace(rows(), ids=ids)]))
    assert problem.value == [image_id]
    assert "no names of images" in problem.key


def test_the_set_of_a_run_is_found(tmp_path):
    publish(tmp_path / "runs" / "some" / "distilled")
    assert check_set(str(tmp_path / "runs" / "some"))
