"""A base of the user's: what is accepted, what is said of what is not, and where `generation: auto` goes with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny, train_on
from safetensors.torch import save_file

from teddy_ray.errors import InputError
from teddy_ray.flow import Prepared, prepare
from teddy_ray.given import GIVEN_IMAGES
from teddy_ray.members import load_member
from teddy_ray.models import Classifier
from teddy_ray.pixels import from_pixels
from teddy_ray.sources import open_source
from teddy_ray.storage import Storage

ARCHITECTURE = "convnet:width=16,depth=2"
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def models() -> dict[str, Classifier]:
    """One that is hardly trained, and one that is."""
    train = open_source(tiny(Path("nowhere"), data__limit_per_class=100).data).train
    pixels, labels = train.read(), train.labels
    return {"early": train_on(pixels[:64], labels[:64], (1,))[1], "late": train_on(pixels, labels, (12,))[12]}


def save_weights(model: Classifier, path: Path, form: str, classes: list[str] | None = None) -> None:
    tensors = model.state_dict() if form == "classifier" else model.network.state_dict()
    metadata = {"classes": json.dumps(classes)} if classes else None
    if form == "torch":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def prepared(folder: Path, weights: Path, generation: str = "auto", **base: Any) -> Prepared:
    base = {"weights": str(weights), "classes": "as_data", **base}
    recipe = tiny(
        folder, pool__generation=generation, pool__architectures=[ARCHITECTURE], pool__seeds=[0], pool__base=base
    )
    return prepare(recipe)


@pytest.mark.parametrize(("which", "generation"), [("early", "prior"), ("late", "post")])
@pytest.mark.parametrize("form", ["classifier", "network", "torch"])
def test_auto_measures_the_base_and_says_why(
    models: dict[str, Classifier], tmp_path: Path, which: str, generation: str, form: str
) -> None:
    save_weights(models[which], tmp_path / "weights", form)
    found = prepared(tmp_path / "storage", tmp_path / "weights")
    pool = found.plan.pool_plan
    assert pool.generation == generation
    validation = found.source.validation
    assert len(validation) <= GIVEN_IMAGES
    right = models[which].eval()(from_pixels(validation.read(), torch.device("cpu"))).argmax(1).numpy()
    share = float(np.mean(right == validation.labels))
    assert found.plan.given is not None
    assert found.plan.given.accuracy == pytest.approx(share)
    assert f"the base's validation accuracy of {share:.4f} is " in pool.generation_reason
    assert not (tmp_path / "storage").exists()  # nothing is written yet


def test_a_published_base_is_what_was_given_and_is_not_measured_again(
    models: dict[str, Classifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(models["late"], tmp_path / "weights", "network", CLASSES)
    first = prepared(tmp_path, tmp_path / "weights", classes=None)  # the file names them
    assert first.given is not None
    assert first.given.model is not None
    first.given.publish(first.plan, first.source.validation, first.storage)
    base = first.plan.pool_plan.given_base
    assert base is not None
    published = load_member(first.plan, Storage(str(tmp_path)), base).state_dict()
    ours = models["late"].state_dict()
    assert all(torch.equal(published[name], ours[name]) for name in ours)

    def forbidden(*_: object) -> None:
        raise AssertionError("the base was measured again")

    monkeypatch.setattr("teddy_ray.given.measure", forbidden)
    (tmp_path / "weights").rename(tmp_path / "elsewhere")  # where it lies changes nothing
    again = prepared(tmp_path, tmp_path / "elsewhere", classes=None)
    assert again.plan.stages() == first.plan.stages()
    assert again.plan.given == first.plan.given
    assert again.given == replace(first.given, model=None)


def test_without_auto_nobody_waits_for_a_measurement(models: dict[str, Classifier], tmp_path: Path) -> None:
    save_weights(models["late"], tmp_path / "weights", "network")
    found = prepared(tmp_path, tmp_path / "weights", "post")
    assert found.plan.given is not None
    assert found.plan.given.accuracy is None


def test_other_weights_are_another_pool(models: dict[str, Classifier], tmp_path: Path) -> None:
    plans = []
    for which in ("early", "late"):
        save_weights(models[which], tmp_path / which, "network")
        plans.append(prepared(tmp_path, tmp_path / which, "post").plan)
    assert plans[0].pool != plans[1].pool


def refusal(folder: Path, weights: Path, **base: Any) -> str:
    with pytest.raises(InputError) as error:
        prepared(folder, weights, **base)
    return str(error.value)


def test_permuted_classes_are_named(models: dict[str, Classifier], tmp_path: Path) -> None:
    """The most costly mistake of the field: accuracy halves, and nobody is told."""
    permuted = ["0", "1", "2", "4", "3", *"56789"]
    save_weights(models["late"], tmp_path / "weights", "network", permuted)
    text = refusal(tmp_path, tmp_path / "weights", classes=None)
    assert text.startswith("pool.base.weights: found ['0', '1', '2', '4', '3'")
    assert text.endswith("output 3 is '4', in the data '3'; output 4 is '3', in the data '4'")
    assert refusal(tmp_path, tmp_path / "weights", classes="as_data") == text  # the file knows better


def test_permuted_classes_are_named_where_the_base_is_published_already(
    models: dict[str, Classifier], tmp_path: Path
) -> None:
    save_weights(models["late"], tmp_path / "weights", "network")
    first = prepared(tmp_path, tmp_path / "weights")
    assert first.given is not None
    first.given.publish(first.plan, first.source.validation, first.storage)
    permuted = ["0", "1", "2", "4", "3", *"56789"]
    text = refusal(tmp_path, tmp_path / "weights", classes=permuted)
    assert text.startswith("pool.base.classes: found ['0', '1', '2', '4', '3'")


def test_unnamed_classes_are_asked_for(models: dict[str, Classifier], tmp_path: Path) -> None:
    save_weights(models["late"], tmp_path / "weights", "torch")
    text = refusal(tmp_path, tmp_path / "weights", classes=None)
    assert text.startswith("pool.base.classes: found None; the file names no classes: list those of its outputs")


def test_a_base_of_fewer_classes_is_refused(models: dict[str, Classifier], tmp_path: Path) -> None:
    save_weights(models["late"], tmp_path / "weights", "network", CLASSES[:9])
    text = refusal(tmp_path, tmp_path / "weights", classes=None)
    assert "pool.base.weights: found" in text
    assert "should be the 10 classes of the data, not 9" in text


def test_weights_of_another_shape_are_refused(models: dict[str, Classifier], tmp_path: Path) -> None:
    tensors = models["late"].network.state_dict()
    tensors["classifier.bias"] = torch.zeros(7)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "weights")
    assert "pool.base.weights" in refusal(tmp_path, tmp_path / "weights")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "pool.base.weights: found" in refusal(tmp_path, tmp_path / "nothing")
