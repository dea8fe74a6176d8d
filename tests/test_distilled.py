"""What others read: `teddy_ray.load`, Hugging Face's `datasets`, torchvision's ImageFolder."""

import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published_set import CLASSES, DATA, SIZE, VIEWS, publish, rows
from torch.utils.data import DataLoader

import teddy_ray
from teddy_ray.errors import InputError
from teddy_ray.exports import export

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return publish(tmp_path / "runs" / "some" / "distilled")


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- teddy_ray.load ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fp16", "top_k"])
def test_a_set_is_its_labelled_views(tmp_path, form):
    data = teddy_ray.load(str(publish(tmp_path, [rows(form=form)], labels={"mode": form})))
    stored = rows(form=form)
    assert (len(data), data.classes, data.num_views, data.temperature) == (6, CLASSES, VIEWS, 2.0)
    assert repr(data.at(3)) == "DistilledSet(6 images of 2 classes, 4 views, epoch 3)"
    for epoch in (1, 2, VIEWS, VIEWS + 1, 50):
        view = (epoch - 1) % VIEWS
        expected = stored.soft_labels.of(np.arange(6), view)
        for index, (x, target, label) in enumerate(data.at(epoch)):
            assert x.shape == (3, SIZE, SIZE)
            assert x.dtype == target.dtype == torch.float32
            assert np.array_equal(target, expected[index])
            assert label == stored.labels[index]
            whole = data.training.viewed.view(np.arange(6), view, CPU)
            assert x.numpy().tobytes() == whole[index].numpy().tobytes()


def test_an_epoch_is_the_same_in_any_batches_and_worker_processes(folder):
    data = teddy_ray.load(str(folder)).at(3)
    whole = [torch.stack([data[i][part] for i in range(6)]) for part in (0, 1)]
    for options in ({"batch_size": 6}, {"batch_size": 4}, {"batch_size": 1, "num_workers": 2}):
        batches = list(DataLoader(data, **options))
        for part in (0, 1):
            found = torch.cat([batch[part] for batch in batches])
            assert found.numpy().tobytes() == whole[part].numpy().tobytes()
        assert torch.cat([batch[2] for batch in batches]).tolist() == [0, 0, 0, 1, 1, 1]


def test_one_label_per_image_serves_an_endless_number_of_views(tmp_path):
    facts = {"num_views": 1, "averaged": True}
    data = teddy_ray.load(str(publish(tmp_path, [rows(num_views=1)], labels=facts)))
    assert data.num_views is None
    first, later = data[0], data.at(1000)[0]
    assert torch.equal(first[1], later[1])
    assert not torch.equal(first[0], later[0])


def test_indices_are_those_of_a_sequence(folder):
    data = teddy_ray.load(str(folder))
    assert torch.equal(data[-1][0], data[5][0])
    for index in (6, -7):
        with pytest.raises(IndexError):
            data[index]
    with pytest.raises(ValueError, match="epochs count from 1, not 0"):
        data.at(0)


def test_a_uri_is_read_too(folder):
    assert len(teddy_ray.load(f"file://{folder}")) == 6


@pytest.mark.parametrize("what", ["nothing there", "cut short"])
def test_what_is_wrong_is_named(folder, what):
    path = str(folder)
    if what == "cut short":
        (folder / DATA[0]).write_bytes((folder / DATA[0]).read_bytes()[:-9])
    else:
        path += "/elsewhere"
    with pytest.raises(InputError, match="restore the file" if what == "cut short" else r"with teddy\.json in it"):
        teddy_ray.load(path)


OTHERS = (
    "ray",
    "pydantic",
    "yaml",
    "safetensors",
    "sklearn",
    "scipy",
    "tqdm",
    "matplotlib",
    "datasets",
    "timm",
)


def test_loading_needs_torch_torchvision_and_pyarrow_alone(folder):
    code = f"""
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys({OTHERS!r}))  # cannot be imported
import teddy_ray
print(len(teddy_ray.load({str(folder)!r})[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


def test_another_process_sees_the_same_pixels(folder):
    code = f"""
import hashlib, teddy_ray
data = teddy_ray.load({str(folder)!r}).at(7)
print(hashlib.sha256(b"".join(data[i][0].numpy().tobytes() for i in range(6))).hexdigest())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    data = teddy_ray.load(str(folder)).at(7)
    views = data.training.viewed.view(np.arange(6), data.training.view_of(7), CPU)
    assert done.stdout.strip() == hashlib.sha256(views.numpy().tobytes()).hexdigest()


# -- other loaders -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face's `datasets`, which keeps to itself."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return importlib.import_module("datasets")


@pytest.mark.parametrize("form", ["fp16", "top_k"])
def test_hugging_face_datasets_reads_images_class_labels_and_soft_labels(hub, tmp_path, form):
    parts = [rows(last=4, form=form), rows(first=4, form=form)]
    folder = publish(tmp_path / "distilled", parts, labels={"mode": form})
    files, expected = [str(folder / name) for name in DATA], rows(form=form)
    loaded = hub.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features["image"], hub.Image)
    assert isinstance(loaded.features["label"], hub.ClassLabel)
    assert loaded.features["label"].names == list(CLASSES)
    assert loaded["id"][:] == list(expected.ids)
    assert loaded["label"][:] == expected.labels.tolist()
    if form == "fp16":
        assert np.array_equal(np.array(loaded["soft_label"][:]), expected.soft_labels.values.astype(np.float64))
    else:
        assert np.array_equal(np.array(loaded["soft_label_classes"][:]), expected.soft_labels.classes)
        assert np.array_equal(np.array(loaded["soft_label_values"][:]), expected.soft_labels.values.astype(np.float64))
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in loaded["image"]])
    assert np.array_equal(pixels, expected.images)


def test_all_loaders_give_the_same_pixels_and_classes(hub, folder, tmp_path):
    from torchvision.datasets import ImageFolder

    export(str(folder.parent), "imagefolder", str(tmp_path / "images"))
    ours = teddy_ray.load(str(folder))
    theirs = hub.load_dataset("parquet", data_files=[str(folder / name) for name in DATA], split="train")
    images = ImageFolder(str(tmp_path / "images"))
    assert images.classes == theirs.features["label"].names == list(ours.classes)
    assert [label for _, label in images] == theirs["label"][:] == ours.training.labels.tolist()
    for index, pixels in enumerate(ours.training.viewed.images.transpose(0, 2, 3, 1)):
        assert np.array_equal(np.asarray(images[index][0]), pixels)
        assert np.array_equal(np.asarray(theirs[index]["image"]), pixels)


# -- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["distilled", "."])
def test_a_set_is_exported_as_it_was_published(folder, tmp_path, name):
    target = tmp_path / "elsewhere" / "copy"
    assert "4 files" in export(str(folder.parent / name), "parquet", str(target))
    assert files_of(target) == files_of(folder)
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_an_export_goes_into_an_empty_folder_and_over_nothing(folder, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    export(str(folder), "imagefolder", str(target))
    before = files_of(target)
    assert sorted(before) == sorted(f"{CLASSES[i // 3]}/{i // 3:05d}-{i % 3:05d}.png" for i in range(6))
    with pytest.raises(InputError, match=r"DEST: found .* should be a folder that is empty or not there yet"):
        export(str(folder), "parquet", str(target))
    assert files_of(target) == before


def test_an_export_to_a_uri_is_the_same(folder, tmp_path):
    export(str(folder), "parquet", f"file://{tmp_path}/copy")
    assert files_of(tmp_path / "copy") == files_of(folder)


def test_classes_whose_order_changes_are_told(tmp_path):
    classes = ("dog", "cat")
    folder = publish(tmp_path / "set", [rows()], classes, known_classes=classes)
    assert "its indices are not those of the set" in export(str(folder), "imagefolder", str(tmp_path / "out"))


def test_classes_that_are_no_names_of_folders_are_refused(tmp_path):
    classes = ("a/b", "c")
    folder = publish(tmp_path / "set", [rows()], classes, known_classes=classes)
    with pytest.raises(InputError, match="cannot name folders; export it with --format parquet: 'a/b'"):
        export(str(folder), "imagefolder", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_broken_set_is_not_exported(folder, tmp_path):
    (folder / DATA[0]).write_bytes(b"")
    with pytest.raises(InputError, match="restore the file"):
        export(str(folder), "parquet", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# -- the example ---------------------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[1] / "pipelines" / "train_from_distilled.py"


def test_the_example_trains_in_a_clean_process(folder, tmp_path):
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({OTHERS!r}))
sys.argv = ["train_from_distilled.py", {str(folder)!r}, "2"]
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["epoch 1", "epoch 2"]


def test_the_readme_shows_the_example_as_it_is():
    code = EXAMPLE.read_text().split('"""', 2)[2].strip()
    assert code in (EXAMPLE.parents[1] / "README.md").read_text()
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 20


# -- sets without stored labels ------------------------------------------------------------------------------------


def member(**changes):
    facts = {"file": "members/00000.safetensors", "architecture": "convnet:width=4,depth=1", "structure": None}
    return {**facts, "code": None, "mean": 0.5, "std": 0.25, **changes}


def publish_without_labels(folder, **changes):
    from safetensors.torch import save

    from teddy_ray.models import build
    from teddy_ray.pruning import structure

    model = build("convnet:width=4,depth=1", num_classes=2, channels=3, image_size=SIZE)
    facts = member(structure=structure(model), **changes)
    weights = [("members/00000.safetensors", save(model.state_dict()))]
    return publish(folder, [rows(form="none")], labels={"mode": "none"}, members=[facts], more=weights), model.eval()


def test_a_set_without_labels_asks_its_members(tmp_path):
    folder, model = publish_without_labels(tmp_path)
    data = teddy_ray.load(str(folder))
    x, target, _ = data.at(9)[2]
    with torch.no_grad():
        torch.testing.assert_close(target, (model(x[None]) / 2).softmax(1)[0])
    assert data.num_views is None


def test_logits_are_given_as_probabilities_at_the_temperature(tmp_path):
    logits = rows()
    logits.soft_labels.values[...] *= 30
    data = teddy_ray.load(str(publish(tmp_path, [logits], labels={"ensemble": "logits"})))
    expected = torch.from_numpy(logits.soft_labels.of(np.arange(6), 0) / 2).softmax(1)
    torch.testing.assert_close(torch.stack([target for _, target, _ in data]), expected)


def test_code_of_others_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "nets_of_a_stranger.py").write_text("raise SystemExit('this ran')")
    monkeypatch.syspath_prepend(tmp_path)
    folder, _ = publish_without_labels(tmp_path / "set", architecture="nets_of_a_stranger:make")
    with pytest.raises(InputError, match=r"architecture of members/00000\.safetensors: .*trust_code=True"):
        teddy_ray.load(str(folder))
    with pytest.raises(InputError, match=r"cannot be built .its code has changed since the set was made"):
        teddy_ray.load(str(folder), trust_code=True)


def test_an_architecture_that_nobody_knows_is_named(tmp_path):
    folder, _ = publish_without_labels(tmp_path, architecture="resnet19")
    with pytest.raises(InputError, match=r"'resnet19'; cannot be built .unknown architecture"):
        teddy_ray.load(str(folder))
