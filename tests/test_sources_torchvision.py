"""torchvision's data sets, in tiny copies of their true forms on disk."""

import hashlib
import inspect
import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torchvision.datasets
from pictures import encoded, grey, parts, problems, save, source
from scipy.io import savemat

from teddy_ray.errors import InputError
from teddy_ray.sources.torchvision_sets import FACTS, LEFT_OUT

NUM_TRAIN, NUM_TEST = 10, 3


def level(label):
    """The grey value of every image of a class."""
    return 8 * label + 20


def rows_of(num_classes, num):
    """Labels of `num` images of each class, in turns."""
    return np.tile(np.arange(num_classes), num)


def flat(labels, *shape):
    """One-coloured arrays (n *shape)."""
    return np.broadcast_to(level(labels).reshape(-1, *[1] * len(shape)), (len(labels), *shape)).astype(np.uint8)


def know(monkeypatch, target, attribute, value):
    """torchvision knows the MD5 of the true files; here, that of ours."""
    monkeypatch.setattr(target, attribute, value)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def save_images(folder, form, labels, pattern, names=None):
    """One file per label; gives the files' names. The pattern takes the row, the label and its name."""
    files = [
        pattern.format(row=row, label=label, name=names[label] if names else "") for row, label in enumerate(labels)
    ]
    for file, label in zip(files, labels, strict=True):
        save(folder / file, grey(int(level(label))).convert("RGB"), form)
    return files


def pickled(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


def cifar(name, folder, train, test, meta, label_key, names_key):
    def write(root, monkeypatch):
        cls = getattr(torchvision.datasets, name)
        labels = rows_of(3, NUM_TRAIN)
        for part, file in zip(np.array_split(labels, len(train)), train, strict=True):
            pickled(root / folder / file, {"data": flat(part, 3072), label_key: part.tolist()})
        labels = rows_of(3, NUM_TEST)
        pickled(root / folder / test, {"data": flat(labels, 3072), label_key: labels.tolist()})
        pickled(root / folder / meta, {names_key: ["ant", "bee", "cow"]})
        know(monkeypatch, cls, "train_list", [[file, md5(root / folder / file)] for file in train])
        know(monkeypatch, cls, "test_list", [[test, md5(root / folder / test)]])
        know(monkeypatch, cls, "meta", {"filename": meta, "key": names_key, "md5": md5(root / folder / meta)})
        return ("ant", "bee", "cow")

    return write


def idx(path, array):
    """Yann LeCun's format: zero, type (8: bytes), number of dimensions; sizes; the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">I", 8 * 256 + array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def mnist(name):
    def write(root, monkeypatch):
        for split, num in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
            labels = rows_of(10, num)
            idx(root / name / f"raw/{split}-images-idx3-ubyte", flat(labels, 28, 28))
            idx(root / name / f"raw/{split}-labels-idx1-ubyte", labels)
        return tuple(getattr(torchvision.datasets, name).classes)

    return write


def emnist(root, monkeypatch):
    """Letters count from 1; torchvision calls 0 N/A."""
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        labels = rows_of(26, num)
        idx(root / f"EMNIST/raw/emnist-letters-{split}-images-idx3-ubyte", flat(labels, 28, 28))
        idx(root / f"EMNIST/raw/emnist-letters-{split}-labels-idx1-ubyte", labels + 1)
    return tuple("abcdefghijklmnopqrstuvwxyz")


def svhn(root, monkeypatch):
    """A zero's label is 10."""
    known = {}
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        labels, path = rows_of(10, num), root / f"{split}_32x32.mat"
        images = flat(labels, 32, 32, 3).transpose(1, 2, 3, 0)
        savemat(path, {"X": images, "y": np.where(labels == 0, 10, labels)[:, None]})
        known[split] = ["", path.name, md5(path)]
    know(monkeypatch, torchvision.datasets.SVHN, "split_list", known)
    return tuple("0123456789")


def stl10(root, monkeypatch):
    """Labels count from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("ant\nbee\n")
    (folder / "unlabeled_X.bin").write_bytes(b"")
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        labels = rows_of(2, num)
        (folder / f"{split}_X.bin").write_bytes(flat(labels, 3, 96, 96).tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    files = {"train_list": ("train_X.bin", "train_y.bin", "unlabeled_X.bin"), "test_list": ("test_X.bin", "test_y.bin")}
    for attribute, names in files.items():
        known = [[file, md5(folder / file)] for file in names]
        know(monkeypatch, torchvision.datasets.STL10, attribute, known)
    return ("ant", "bee")


def gtsrb(root, monkeypatch):
    folder = root / "gtsrb"
    save_images(folder / "GTSRB/Training", "PPM", rows_of(2, NUM_TRAIN), "{label:05d}/{row}.ppm")
    labels = rows_of(2, NUM_TEST)
    names = save_images(folder / "GTSRB/Final_Test/Images", "PPM", labels, "{row}.ppm")
    lines = [f"{name};8;{label}" for name, label in zip(names, labels, strict=True)]
    (folder / "GT-final_test.csv").write_text("\n".join(["Filename;Width;ClassId", *lines]))
    return ("0", "1")


def food101(root, monkeypatch):
    folder, classes = root / "food-101", ("pie", "soup")
    (folder / "meta").mkdir(parents=True)
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        files = save_images(folder / "images", "JPEG", rows_of(2, num), f"{{name}}/{split}{{row}}.jpg", classes)
        listed = {name: [file[:-4] for file in files if file.startswith(name)] for name in classes}
        (folder / f"meta/{split}.json").write_text(json.dumps(listed))
    return classes


def flowers102(root, monkeypatch):
    folder, labels = root / "flowers-102", np.r_[rows_of(2, NUM_TRAIN), rows_of(2, NUM_TEST)]
    save_images(folder / "jpg", "JPEG", np.r_[0, labels], "image_{row:05d}.jpg")  # which count from 1
    numbers, num_train = np.arange(1, len(labels) + 1), 2 * NUM_TRAIN
    savemat(folder / "imagelabels.mat", {"labels": labels + 1})
    savemat(folder / "setid.mat", {"trnid": numbers[:num_train], "valid": [], "tstid": numbers[num_train:]})
    known = {"label": "imagelabels.mat", "setid": "setid.mat"}
    known = {key: (file, md5(folder / file)) for key, file in known.items()}
    know(monkeypatch, torchvision.datasets.Flowers102, "_file_dict", known)
    return ("pink primrose", "hard-leaved pocket orchid")


def pets(root, monkeypatch):
    folder = root / "oxford-iiit-pet"
    for split, num in (("trainval", NUM_TRAIN), ("test", NUM_TEST)):
        labels = rows_of(2, num)
        files = save_images(folder / "images", "JPEG", labels, f"{{name}}_{num}{{row:03d}}.jpg", ("red_fox", "sea_fox"))
        lines = [f"{file[:-4]} {label + 1} 1 1" for file, label in zip(files, labels, strict=True)]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / f"annotations/{split}.txt").write_text("\n".join(lines))
    return ("Red Fox", "Sea Fox")


def dtd(root, monkeypatch):
    folder, classes = root / "dtd/dtd", ("banded", "dotted")
    (folder / "labels").mkdir(parents=True)
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        files = save_images(folder / "images", "JPEG", rows_of(2, num), f"{{name}}/{split}{{row}}.jpg", classes)
        (folder / f"labels/{split}1.txt").write_text("\n".join(files))
    return classes


def eurosat(root, monkeypatch):
    names = ("Forest", "River")
    save_images(root / "eurosat/2750", "JPEG", rows_of(2, NUM_TRAIN), "{name}/{row}.jpg", names)
    return names


def aircraft(root, monkeypatch):
    folder, names = root / "fgvc-aircraft-2013b/data", ("707-320", "Cessna 172")
    for split, num in (("trainval", NUM_TRAIN), ("test", NUM_TEST)):
        labels = rows_of(2, num)
        files = save_images(folder / "images", "JPEG", labels, f"{split}{{row}}.jpg")
        lines = [f"{file[:-4]} {names[label]}" for file, label in zip(files, labels, strict=True)]
        (folder / f"images_variant_{split}.txt").write_text("\n".join(lines))
    (folder / "variants.txt").write_text("\n".join(names))
    return names


def cars(root, monkeypatch):
    folder, names = root / "stanford_cars", ("Audi A4", "BMW X3")
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    files = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        labels = rows_of(2, num)
        images = save_images(folder / f"cars_{split}", "JPEG", labels, "{row:05d}.jpg")
        listed = [(file, label + 1) for file, label in zip(images, labels, strict=True)]
        savemat(folder / files[split], {"annotations": np.array(listed, dtype=[("fname", object), ("class", object)])})
    return names


def splits_of_folders(root, names, train, test, suffix):
    for split, num in ((train, NUM_TRAIN), (test, NUM_TEST)):
        save_images(root / split, "JPEG", rows_of(2, num), f"{{name}}/{{row}}.{suffix}", names)


def country211(root, monkeypatch):
    splits_of_folders(root / "country211", ("AD", "AE"), "train", "test", "jpg")
    return ("AD", "AE")


def imagenette(root, monkeypatch):
    splits_of_folders(root / "imagenette2", ("n01440764", "n02979186"), "train", "val", "jpeg")
    return ("tench, Tinca tinca", "cassette player")


BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
WRITERS = {
    "CIFAR10": cifar("CIFAR10", "cifar-10-batches-py", BATCHES, "test_batch", "batches.meta", "labels", "label_names"),
    "CIFAR100": cifar("CIFAR100", "cifar-100-python", ["train"], "test", "meta", "fine_labels", "fine_label_names"),
    **{name: mnist(name) for name in ("MNIST", "FashionMNIST", "KMNIST")},
    "EMNIST": emnist,
    "SVHN": svhn,
    "STL10": stl10,
    "GTSRB": gtsrb,
    "Food101": food101,
    "Flowers102": flowers102,
    "OxfordIIITPet": pets,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "FGVCAircraft": aircraft,
    "StanfordCars": cars,
    "Country211": country211,
    "Imagenette": imagenette,
}


def uri(name, root):
    return f"torchvision:{name}{',split=letters' if name == 'EMNIST' else ''}:{root}"


def fields(name, classes):
    """Of data sets that always have all their classes, those that the copy holds."""
    return {"classes": classes} if name in ("GTSRB", "Flowers102") else {}


def test_every_data_set_of_the_table_is_tested():
    assert set(WRITERS) == set(FACTS)


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_is_read_with_its_classes_and_its_own_test_split(name, tmp_path, monkeypatch):
    classes = WRITERS[name](tmp_path, monkeypatch)
    opened = source(uri(name, tmp_path), **fields(name, classes))
    assert opened.classes == classes
    num_test = len(classes) * (NUM_TEST if FACTS[name].test else NUM_TRAIN // 5)
    assert len(opened.test) == num_test
    num_all = sum(len(part) for part in parts(opened))
    assert num_all == len(classes) * NUM_TRAIN + (num_test if FACTS[name].test else 0)
    for part in parts(opened):
        assert set(part.labels) == set(range(len(classes)))
        expected = np.broadcast_to(level(part.labels)[:, None, None, None], (len(part), 1, 8, 8))
        np.testing.assert_allclose(part.read().astype(int), expected, atol=2)
    assert len({name for part in parts(opened) for name in part.ids}) == num_all


@pytest.mark.parametrize("name", ["MNIST", "DTD"])
def test_identity_is_of_the_content_and_not_of_the_place(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path / "a", monkeypatch)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = [part.identity for part in parts(source(uri(name, tmp_path / "a")))]
    assert before == [part.identity for part in parts(source(uri(name, tmp_path / "b")))]
    changed = {"MNIST": "MNIST/raw/train-images-idx3-ubyte", "DTD": "dtd/dtd/images/banded/train0.jpg"}[name]
    content = bytearray((tmp_path / "b" / changed).read_bytes())
    content[-3] ^= 1
    (tmp_path / "b" / changed).write_bytes(content)
    assert before[0] != source(uri(name, tmp_path / "b")).train.identity


@pytest.mark.parametrize("name", ["MNIST", "DTD"])
def test_images_read_the_same_after_pickling(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    train = source(uri(name, tmp_path)).train
    index = np.array([3, 0, 7])
    expected = train.read(index)
    packed = pickle.dumps(train)
    assert len(packed) < 20_000  # no pixels: workers read for themselves
    np.testing.assert_array_equal(pickle.loads(packed).read(index), expected)


def test_files_that_change_after_they_were_indexed_are_found(tmp_path, monkeypatch):
    WRITERS["MNIST"](tmp_path, monkeypatch)
    train = source(uri("MNIST", tmp_path)).train
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match="its files have changed since the run began"):
        train.read()


# -- what is refused -----------------------------------------------------------------------------------------------


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_a_tampered_pickle_is_an_error_and_does_not_run(name, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    WRITERS[name](tmp_path / "data", monkeypatch)
    files = sorted(path for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert len(files) == {"CIFAR10": 7, "CIFAR100": 3}[name]
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps({**pickle.loads(whole), "more": Payload(ran)}))
        (problem,) = problems(uri(name, tmp_path / "data"))
        assert not ran.exists(), path
        assert (problem.key, problem.value) == ("data.source", str(tmp_path / "data"))
        assert f"holds no whole copy of the training split of {name} (Dataset" in problem.remedy
        assert "download=True) in Python, or name another folder" in problem.remedy
        pickle.loads(path.read_bytes())  # the payload is a real one
        ran.rmdir()
        path.write_bytes(whole)
    source(uri(name, tmp_path / "data"))


@pytest.mark.parametrize("name", ["MNIST", "KMNIST", "EMNIST"])
def test_the_pickles_of_an_old_torchvision_are_refused(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    old = tmp_path / name / "processed/training.pt"
    pickled(old, "anything")
    (problem,) = problems(uri(name, tmp_path))
    assert (problem.key, problem.value) == ("data.source", str(old))
    assert "a pickle from an old torchvision is not loaded; remove it" in problem.remedy


def test_torchvision_unpickles_nothing_but_what_is_accounted_for():
    """A guard against another torchvision: CIFAR's pickles are compared with an MD5, MNIST's are refused above."""
    pickles = ("pickle.load", "torch.load", "np.load", "allow_pickle")
    loading = {
        name
        for name in FACTS
        if any(word in inspect.getsource(inspect.getmodule(getattr(torchvision.datasets, name))) for word in pickles)
    }
    assert loading == {"CIFAR10", "CIFAR100"} | {name for name, facts in FACTS.items() if facts.pickles}


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_without_the_data_set_is_named_with_what_to_do(name, tmp_path):
    (problem,) = problems(uri(name, tmp_path))
    assert (problem.key, problem.value) == ("data.source", str(tmp_path))
    assert f"holds no whole copy of the training split of {name} (" in problem.remedy
    do = "put its files there" if name == "StanfordCars" else f"run torchvision.datasets.{name}('{tmp_path}', "
    assert do in problem.remedy
    assert list(tmp_path.iterdir()) == []


DAMAGES = {
    "MNIST": lambda root: (root / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"half"),
    "KMNIST": lambda root: idx(root / "KMNIST/raw/t10k-labels-idx1-ubyte", rows_of(10, 1)),
    "SVHN": lambda root: (root / "test_32x32.mat").write_bytes(b"half"),
    "Food101": lambda root: (root / "food-101/meta/test.json").write_text("{"),
    "GTSRB": lambda root: (root / "gtsrb/GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;99"),
    "StanfordCars": lambda root: (root / "stanford_cars/cars_test_annos_withlabels.mat").write_bytes(b"half"),
    "Country211": lambda root: shutil.rmtree(root / "country211/test/AE"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_copy_is_named(name, tmp_path, monkeypatch):
    classes = WRITERS[name](tmp_path, monkeypatch)
    DAMAGES[name](tmp_path)
    (problem,) = problems(uri(name, tmp_path), **fields(name, classes))
    assert (problem.key, problem.value) == ("data.source", str(tmp_path))
    assert f"holds no whole copy of the test split of {name} (" in problem.remedy


def test_an_image_that_is_listed_and_not_there_is_named(tmp_path, monkeypatch):
    WRITERS["DTD"](tmp_path, monkeypatch)
    missing = tmp_path / "dtd/dtd/images/banded/train0.jpg"
    missing.unlink()
    (problem,) = problems(uri("DTD", tmp_path))
    assert (problem.key, problem.value) == ("data.source", str(missing))
    assert "this file cannot be read" in problem.remedy


@pytest.mark.parametrize(
    ("uri", "value", "remedy"),
    [
        ("torchvision:MNIST", "torchvision:MNIST", "torchvision:<Name>:<folder>, such as torchvision:MNIST:/data"),
        ("torchvision::/data", "torchvision::/data", "torchvision:<Name>:<folder>"),
        ("torchvision:NoSuchSet:/data", "NoSuchSet", "name one of CIFAR10, CIFAR100, MNIST"),
        ("torchvision:ImageNet:/data", "ImageNet", "data.source <folder>/train and data.test_source <folder>/val"),
        ("torchvision:MNIST:s3://bucket/data", "s3://bucket/data", "torchvision reads local folders alone"),
        ("torchvision:EMNIST,split=runes:/data", "split=runes", "options of EMNIST: split: balanced, byclass"),
        ("torchvision:MNIST,size=2:/data", "size=2", "options of MNIST: none"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(uri, value, remedy):
    (problem,) = problems(uri)
    assert (problem.key, problem.value) == ("data.source", value)
    assert remedy in problem.remedy


def test_what_is_left_out_exists():
    assert all(hasattr(torchvision.datasets, name) and name not in FACTS for name in LEFT_OUT)


def test_a_test_source_beside_an_own_test_split_is_refused(tmp_path, monkeypatch):
    WRITERS["MNIST"](tmp_path, monkeypatch)
    (problem,) = problems(uri("MNIST", tmp_path), test_source=str(tmp_path))
    assert problem.key == "data.test_source"
    assert "leave it out" in problem.remedy
    assert "has its own test split" in problem.remedy


@pytest.mark.parametrize("test_source", ["torchvision:MNIST:/data", "sklearn:digits"])
def test_a_data_set_with_a_test_split_is_no_test_source(tmp_path, test_source):
    save(tmp_path / "a/x.png", grey(0))
    (problem,) = problems(tmp_path, test_source=test_source)
    assert (problem.key, problem.value) == ("data.test_source", test_source)
    assert "name a folder of class folders or Parquet" in problem.remedy


def test_eurosat_takes_a_test_source(tmp_path, monkeypatch):
    WRITERS["EuroSAT"](tmp_path, monkeypatch)
    for name in ("Forest", "River"):
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "x.png").write_bytes(encoded(grey(0)))
    opened = source(uri("EuroSAT", tmp_path), test_source=str(tmp_path / "test"))
    assert len(opened.test) == 2
    assert len(opened.train) + len(opened.validation) == 2 * NUM_TRAIN
