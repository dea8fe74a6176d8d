"""Folders of class folders."""

import pytest
from pictures import encoded, everything, grey, make_folder, problems, save, source, unreadable


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


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


@pytest.mark.parametrize("content", [b"", b"no image at all", encoded(grey(0))[:48]], ids=["empty", "text", "cut"])
def test_an_image_that_cannot_be_decoded_is_named_when_read(folder, content):
    (folder / "cat" / "3.png").write_bytes(content)
    (problem,) = unreadable(folder)
    assert problem.value == "cat/3.png"
    assert "cannot be decoded" in problem.remedy
