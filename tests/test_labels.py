"""Views and soft labels depend on (seed, set, image id, view) alone, and students replay what was labelled."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from teddy_ray import students
from teddy_ray.augment import apply_boxes
from teddy_ray.labels import Views, label_views
from teddy_ray.models import build, freeze
from teddy_ray.pixels import from_pixels
from teddy_ray.recipe import Augmentation, Evaluation
from teddy_ray.students import TrainingSet, train_student

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

VIEWS = Views(seed=3, set_key="a set", augmentation=Augmentation(), num_views=4)
IDS = [f"{label:05d}-{slot:05d}" for label in range(3) for slot in range(2)]
CPU = torch.device("cpu")


def pixels(num):
    return np.random.default_rng(0).integers(0, 256, (num, 1, 8, 8), dtype=np.uint8)


def test_boxes_of_an_image_follow_its_id_whichever_others_are_asked_for():
    together = dict(zip(IDS, VIEWS.boxes(IDS), strict=True))
    for order in (IDS[::-1], IDS[2:5], [IDS[4], IDS[0]], [IDS[3]]):
        for image_id, boxes in zip(order, VIEWS.boxes(order), strict=True):
            assert np.array_equal(boxes, together[image_id])


def test_boxes_are_apart_for_every_image_and_view():
    boxes = VIEWS.boxes(IDS)
    assert boxes.shape == (len(IDS), 4, 5)
    assert len(np.unique(boxes[..., :4].reshape(-1, 4), axis=0)) == len(IDS) * 4


def test_more_views_extend_fewer():
    more = dataclasses.replace(VIEWS, num_views=9)
    assert np.array_equal(more.boxes(IDS)[:, :4], VIEWS.boxes(IDS))


@pytest.mark.parametrize("change", [{"seed": 4}, {"set_key": "another set"}], ids=str)
def test_another_seed_or_set_has_other_boxes(change):
    other = dataclasses.replace(VIEWS, **change)
    assert not (other.boxes(IDS) == VIEWS.boxes(IDS))[..., :4].all(-1).any()


def test_boxes_stay_the_same_whatever_was_drawn_before():
    expected = VIEWS.boxes(IDS)
    np.random.seed(1)
    torch.manual_seed(1)
    dataclasses.replace(VIEWS, set_key="another set").boxes(IDS)
    assert np.array_equal(VIEWS.boxes(IDS), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_labels_are_the_mean_of_the_members_probabilities(temperature):
    models = [
        freeze(build("convnet:width=4,depth=2", num_classes=3, channels=1, image_size=8, seed=seed)) for seed in (0, 1)
    ]
    with torch.no_grad():
        for model in models:
            model.network.classifier.weight *= 60  # so that a mean of logits would differ
    images = torch.from_numpy(pixels(len(IDS))).float() / 255
    boxes = VIEWS.boxes(IDS)
    labels = label_views(models, images, boxes, temperature)
    assert labels.dtype == np.float16
    assert labels.shape == (len(IDS), 4, 3)
    for view in range(4):
        logits = [model.double()(apply_boxes(images.double(), boxes[:, view])).numpy() for model in models]
        exponentials = [np.exp(z / temperature) for z in logits]
        mean = sum(e / e.sum(1, keepdims=True) for e in exponentials) / 2
        of_mean_logits = np.exp(sum(logits) / 2 / temperature)
        assert np.abs(of_mean_logits / of_mean_logits.sum(1, keepdims=True) - mean).max() > 0.01
        np.testing.assert_allclose(labels[:, view], mean, rtol=1e-3, atol=1e-6)
        for model in models:
            model.float()


def test_labels_of_an_image_stay_the_same_in_another_order():
    # logits of a weighted sum of pixels: no batch changes how it is summed
    class Sums(nn.Module):
        def forward(self, x):
            return torch.stack([(x * weight).sum((1, 2, 3)) for weight in (0.1, 0.2, 0.3)], 1)

    images = torch.from_numpy(pixels(len(IDS))).float() / 255
    labels = label_views([Sums()], images, VIEWS.boxes(IDS), 1.0)
    order = [5, 2, 0, 1]
    again = label_views([Sums()], images[order], VIEWS.boxes([IDS[i] for i in order]), 1.0)
    np.testing.assert_allclose(again, labels[order], rtol=1e-3)


def test_epoch_takes_the_views_in_turn_with_their_labels():
    boxes = np.random.default_rng(0).random((5, 3, 5))
    targets = np.random.default_rng(1).random((5, 3, 2))
    training = TrainingSet(pixels(5), boxes, targets)
    for epoch, view in [(1, 0), (2, 1), (3, 2), (4, 0), (300, 2), (301, 0)]:
        epoch_boxes, epoch_targets = training.view(epoch)
        assert np.array_equal(epoch_boxes, boxes[:, view])
        assert np.array_equal(epoch_targets, targets[:, view])


def test_epoch_of_hard_labels_takes_the_views_in_turn_with_the_same_labels():
    boxes = np.random.default_rng(0).random((5, 3, 5))
    targets = np.eye(5)[:, None]
    training = TrainingSet(pixels(5), boxes, targets)
    for epoch, view in [(1, 0), (3, 2), (4, 0)]:
        epoch_boxes, epoch_targets = training.view(epoch)
        assert np.array_equal(epoch_boxes, boxes[:, view])
        assert np.array_equal(epoch_targets, targets[:, 0])


def test_student_sees_the_labelled_views_each_with_its_own_label(monkeypatch):
    images, boxes = pixels(len(IDS)), VIEWS.boxes(IDS)
    # a label that tells image and view
    targets = np.arange(len(IDS) * 4 * 2, dtype=np.float16).reshape(len(IDS), 4, 2)
    seen = {}

    def record(state, batches, **options):
        assert options["temperature"] == 2.5
        assert options["epochs"] * options["steps_per_epoch"] == sum(len(list(batches(e))) for e in range(1, 7))
        for epoch in range(1, 7):
            x, y = (torch.cat(parts) for parts in list(zip(*batches(epoch), strict=True))[:2])
            seen[epoch] = {tuple(target.tolist()): view for view, target in zip(x, y, strict=True)}

        return ()

    monkeypatch.setattr(students, "fit", record)
    train_student(
        TrainingSet(images, boxes, targets),
        (images, np.zeros(len(IDS), dtype=np.int64)),
        Evaluation(batch_size=4),
        architecture="convnet:width=2,depth=1",
        seed=0,
        epochs=6,
        temperature=2.5,
        device=CPU,
    )
    for epoch in range(1, 7):
        view = (epoch - 1) % 4
        labelled = apply_boxes(from_pixels(images, CPU), boxes[:, view])
        assert len(seen[epoch]) == len(IDS)
        for i in range(len(IDS)):
            torch.testing.assert_close(seen[epoch][tuple(targets[i, view].tolist())], labelled[i])
