import io
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from published_set import CLASSES, assert_equal, rows

from teddy_ray.dataset import concatenate, decode, encode

# -- files ---------------------------------------------------------------------------------------------------------


FORMS = ["fp16", "top_k", "none"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_rows_come_back_as_they_were(channels, form):
    data, _ = encode(rows(channels, form=form), CLASSES)
    found, classes = decode(data)
    assert_equal(found, rows(channels, form=form))
    assert classes == CLASSES


@pytest.mark.parametrize("form", FORMS)
def test_one_row_and_one_view_come_back_as_they_were(form):
    single = rows(last=1, form=form, num_views=1)
    assert_equal(decode(encode(single, CLASSES)[0])[0], single)


def test_equal_rows_are_equal_bytes():
    assert encode(rows(), CLASSES) == encode(rows(), CLASSES)


@pytest.mark.parametrize("name", ["images", "labels"])
def test_other_rows_are_other_bytes(name):
    changed = getattr(rows(), name).copy()
    changed.flat[-1] = 0 if changed.flat[-1] else 1
    assert encode(replace(rows(), **{name: changed}), CLASSES)[0] != encode(rows(), CLASSES)[0]


@pytest.mark.parametrize("form", ["fp16", "top_k"])
def test_other_labels_are_other_bytes(form):
    changed = rows(form=form)
    changed.soft_labels.values[-1, -1, -1] += 0.25
    assert encode(changed, CLASSES)[0] != encode(rows(form=form), CLASSES)[0]


def test_images_are_stored_as_png_and_their_bytes_are_counted():
    data, png_bytes = encode(rows(), CLASSES)
    values = pq.read_table(io.BytesIO(data)).column("image").to_pylist()
    assert png_bytes == sum(len(value["bytes"]) for value in values)
    assert {Image.open(io.BytesIO(value["bytes"])).format for value in values} == {"PNG"}
    assert [value["path"] for value in values] == [f"{image_id}.png" for image_id in rows().ids]


@pytest.mark.parametrize("form", FORMS)
def test_files_are_joined_in_order(form):
    assert_equal(concatenate([rows(last=4, form=form), rows(first=4, form=form)]), rows(form=form))


WHOLE = pq.read_table(io.BytesIO(encode(rows(), CLASSES)[0]))


def file_of(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"x": [1]}),
        WHOLE.drop_columns("label"),
        WHOLE.append_column("more", WHOLE["id"]),
        pq.read_table(io.BytesIO(encode(rows(form="top_k"), CLASSES)[0])).drop_columns("soft_label_classes"),
        WHOLE.replace_schema_metadata(None),
    ],
    ids=["other columns", "no labels", "a column more", "half of the soft labels", "no class names"],
)
def test_a_table_of_another_form_is_refused(table):
    with pytest.raises(ValueError, match="columns id, image, label, soft labels"):
        decode(file_of(table))


@pytest.mark.parametrize("lost", ["a view", "a class", "all"])
def test_a_missing_view_or_class_is_refused(lost):
    labels = WHOLE["soft_label"].to_pylist()
    if lost == "a view":
        labels[2].pop()
    elif lost == "a class":
        labels[2][1].pop()
    else:
        labels = [[] for _ in labels]
    values = pa.array(labels, WHOLE.schema.field("soft_label").type)
    table = WHOLE.set_column(WHOLE.schema.get_field_index("soft_label"), "soft_label", values)
    with pytest.raises(ValueError, match="a label or a view is missing"):
        decode(file_of(table))
