"""Users' checkpoints."""

import argparse
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from teddy_ray.errors import InputError
from teddy_ray.models import build
from teddy_ray.weights import load_into, read_weights

KEY = "pool.base.weights"


def model(name="convnet:width=4,depth=2", classes=3, channels=3, seed=0, **rest):
    return build(name, num_classes=classes, channels=channels, image_size=32, seed=seed, **rest)


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def refusal(call, *arguments, **rest):
    with pytest.raises(InputError) as caught:
        call(*arguments, **rest)
    (problem,) = caught.value.problems
    assert problem.key == KEY
    return problem


def load(path, target):
    load_into(target, read_weights(str(path), KEY), key=KEY, uri=str(path))
    return target


SAVED = {
    "bare": lambda state: state,
    "lightning": lambda state: {"state_dict": state, "epoch": 3, "loss": 0.5},
    "tutorial": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}},
    "timm": lambda state: {"model": {"state_dict": state}},
    "parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "both": lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    "both, the other way": lambda state: {"model": {f"module._orig_mod.{name}": state[name] for name in state}},
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("form", SAVED)
def test_state_dict_is_found_however_it_was_saved(tmp_path, form, whole):
    source = model(seed=1)
    torch.save(SAVED[form]((source if whole else source.network).state_dict()), tmp_path / "weights.pth")
    assert same(load(tmp_path / "weights.pth", model()), source)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_safetensors_are_known_by_content_with_hash_and_classes(tmp_path, suffix):
    path, source = tmp_path / f"weights.{suffix}", model(seed=1)
    save_file(source.network.state_dict(), path, metadata={"classes": json.dumps(["cat", "Hund", "鳥"])})
    weights = read_weights(str(path), KEY)
    assert weights.classes == ("cat", "Hund", "鳥")
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(load(path, model()), source)
    assert same(load(f"file://{path}", model()), source)


def test_file_without_class_names_has_none(tmp_path):
    torch.save(model().state_dict(), tmp_path / "w.pth")
    save_file(model().state_dict(), tmp_path / "w.safetensors")
    assert [read_weights(str(tmp_path / name), KEY).classes for name in ("w.pth", "w.safetensors")] == [None, None]


@pytest.mark.parametrize("classes", ["cat, dog", '{"cat": 0}', "[0, 1]"])
def test_class_names_that_are_no_list_of_names_are_refused(tmp_path, classes):
    save_file(model().state_dict(), tmp_path / "w.safetensors", metadata={"classes": classes})
    problem = refusal(read_weights, str(tmp_path / "w.safetensors"), KEY)
    assert problem.remedy == "should name its classes as a JSON list in the metadata `classes`"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", ["torch", "old torch", "pickle"])
def test_payload_of_a_file_is_never_executed(tmp_path, save):
    harm, path = tmp_path / "harm", tmp_path / "weights.safetensors"
    if save == "pickle":
        path.write_bytes(pickle.dumps({"weight": Payload(harm)}))
    else:
        torch.save({"weight": Payload(harm)}, path, _use_new_zipfile_serialization=save == "torch")
    problem = refusal(read_weights, str(path), KEY)
    assert not harm.exists()
    assert problem.remedy.startswith("should be safetensors or a state_dict of tensors, for nothing else is loaded")
    pickle.loads(pickle.dumps(Payload(harm)))  # it would have
    assert harm.exists()


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"args": argparse.Namespace(), "state_dict": {}}, "it holds objects of argparse.Namespace"),
        ({"weight": torch.ones(1), "epoch": 3, "names": ["a"]}, "should hold tensors alone, but has epoch, names"),
        ({3: torch.ones(1)}, "should hold tensors alone, but has 3"),
        (torch.ones(1), "should hold tensors alone, but has Tensor"),
        ([torch.ones(1)], "should hold tensors alone, but has list"),
        (torch.nn.Linear(1, 1), "it holds objects of torch.nn.modules.linear.Linear"),
        ({"weight": np.ones(1, dtype=object)}, "it holds objects of"),
    ],
    ids=str,
)
def test_what_is_no_state_dict_is_refused(tmp_path, saved, told):
    torch.save(saved, tmp_path / "w.pth")
    assert told in refusal(read_weights, str(tmp_path / "w.pth"), KEY).remedy


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"text of some length", bytes(8) + b"{", b"\x02" + bytes(7) + b"{}"]
)
def test_broken_file_is_refused(tmp_path, data):
    (tmp_path / "w").write_bytes(data)
    weights = refusal(lambda: load(tmp_path / "w", model()))
    assert "should be" in weights.remedy


@pytest.mark.parametrize("uri", ["nowhere/w.pth", "nothing://w.pth", "."])
def test_file_that_is_not_there_is_refused(uri):
    problem = refusal(read_weights, uri, KEY)
    assert problem.value == uri
    assert problem.remedy.startswith("should be a file of weights that can be read (")


def test_misfits_are_named_with_their_shapes(tmp_path):
    state = dict(model(classes=10).network.state_dict())
    for layer in (1, 5):
        for name in ("weight", "bias"):
            state[f"other.{layer}.{name}"] = state.pop(f"features.{layer}.{name}")
    torch.save(state, tmp_path / "w.pth")
    problem = refusal(load, tmp_path / "w.pth", model())
    assert problem.remedy == (
        "should be weights of this ConvNet, with this number of classes ("
        "missing: features.1.bias, features.1.weight, features.5.bias and 1 more; "
        "unexpected: other.1.bias, other.1.weight, other.5.bias and 1 more; "
        "of another shape: classifier.weight (10, 256) where (3, 256) is needed, "
        "classifier.bias (10,) where (3,) is needed)"
    )


def test_counts_of_batches_and_pixels_may_be_missing(tmp_path):
    source = model(seed=1)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k and k not in ("mean", "std")}
    torch.save(state, tmp_path / "w.pth")
    assert same(load(tmp_path / "w.pth", model()), source)


@pytest.mark.parametrize(("mean", "stored"), [([0.5, 0.25, 0.75], [0.5, 0.25, 0.75]), (0.25, 0.25), (0.25, [0.25])])
def test_pixels_are_normalised_as_the_file_says(tmp_path, mean, stored):
    source = model(seed=1, mean=mean)
    torch.save({**source.state_dict(), "mean": torch.tensor(stored)}, tmp_path / "w.pth")
    assert same(load(tmp_path / "w.pth", model()), source)


def test_weights_in_half_precision_are_loaded_as_the_model_has_them(tmp_path):
    source = model(seed=1)
    torch.save(source.half().state_dict(), tmp_path / "w.pth")
    assert same(load(tmp_path / "w.pth", model()), source.float())


def test_heads_that_are_for_training_alone_may_be_there(tmp_path):
    source = model("torchvision/googlenet", seed=1)
    extra = {"aux1.conv.weight": torch.ones(2), "aux2.fc.bias": torch.ones(2)}
    torch.save({**source.network.state_dict(), **extra}, tmp_path / "w.pth")
    assert same(load(tmp_path / "w.pth", model("torchvision/googlenet")), source)
    torch.save({**source.network.state_dict(), "aux3.weight": torch.ones(2)}, tmp_path / "w.pth")
    told = "(unexpected: aux3.weight)"
    assert told in refusal(load, tmp_path / "w.pth", model("torchvision/googlenet")).remedy


def test_old_names_in_files_of_torchvision_are_known(tmp_path):
    source = model("torchvision/densenet121", seed=1)
    old = {}
    for name, value in source.network.state_dict().items():
        for layer in ("norm1", "norm2", "conv1", "conv2"):
            if "denselayer" in name:
                name = name.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}.")
        old[name] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "w.pth")
    assert same(load(tmp_path / "w.pth", model("torchvision/densenet121")), source)
