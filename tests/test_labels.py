"""Soft labels: the ensemble's mean, its stored forms, and their replay to students."""

import numpy as np
import pytest
import torch

from teddy_ray import students
from teddy_ray.labels import Dense, TopK, ensemble, join, label_views, store
from teddy_ray.models import build, freeze
from teddy_ray.recipe import Augmentation, Evaluation, Labels
from teddy_ray.replay import Ensemble, TrainingSet
from teddy_ray.students import train_student
from teddy_ray.views import ViewedImages, Views

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

IDS = [f"{label:05d}-{slot:05d}" for label in range(3) for slot in range(2)]
ROWS = np.arange(len(IDS))
CPU = torch.device("cpu")


def pixels():
    return np.random.default_rng(0).integers(0, 256, (len(IDS), 1, 8, 8), dtype=np.uint8)


def viewed(cutmix=0.0):
    return ViewedImages(pixels(), Views(seed=3, set_key="a set", ids=IDS, augmentation=Augmentation(), cutmix=cutmix))


def models():
    pair = [
        freeze(build("convnet:width=4,depth=2", num_classes=3, channels=1, image_size=8, seed=seed)) for seed in (0, 1)
    ]
    with torch.no_grad():
        for model in pair:
            model.network.classifier.weight *= 60  # so that means of logits and of probabilities differ
    return pair


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# -- the ensemble --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_labels_are_the_mean_of_the_members_probabilities_or_logits(temperature):
    pair, x = models(), viewed().view(ROWS, 0, CPU)
    probabilities = ensemble(pair, x, temperature, "probabilities").numpy()
    logits = ensemble(pair, x, temperature, "logits").numpy()
    reference = [model.double()(x.double()).detach().numpy() for model in pair]
    mean = sum(softmax(z / temperature) for z in reference) / 2
    assert np.abs(softmax(sum(reference) / 2 / temperature) - mean).max() > 0.01
    np.testing.assert_allclose(probabilities, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logits, sum(reference) / 2, rtol=1e-4, atol=1e-4)


def test_views_are_labelled_one_by_one_or_averaged():
    labels = torch.rand(5, 3, 4)
    told = []
    each = label_views(lambda view: labels[:, view], 3, averaged=False, on_view=told.append)
    assert torch.equal(each, labels)
    assert told == [1, 2, 3]
    mean = label_views(lambda view: labels[:, view], 3, averaged=True)
    np.testing.assert_allclose(mean.numpy(), labels.double().mean(1, keepdim=True).numpy(), rtol=1e-6)


# -- forms ---------------------------------------------------------------------------------------------------------


def distributions(num=7, views=3, classes=6):
    return torch.from_numpy(np.random.default_rng(1).dirichlet([0.3] * classes, (num, views)).astype(np.float32))


def test_whole_labels_are_stored_to_sixteen_bits():
    labels = distributions()
    stored = store(labels, None)
    assert isinstance(stored, Dense)
    assert (stored.num_views, stored.num_classes, stored.mass_kept) == (3, 6, 1.0)
    for view in range(3):
        np.testing.assert_allclose(stored.of(ROWS, view), labels[: len(ROWS), view], rtol=1e-3, atol=1e-6)


def test_of_the_largest_classes_the_rest_is_spread_evenly():
    labels = distributions()
    stored = store(labels, 2)
    assert isinstance(stored, TopK)
    kept = 0.0
    for view in range(3):
        found = stored.of(ROWS, view)
        for row, label in zip(ROWS, labels[:, view].numpy(), strict=False):
            order = np.argsort(-label)
            np.testing.assert_allclose(found[row][order[:2]], label[order[:2]], rtol=1e-3)
            rest = (1 - label[order[:2]].sum()) / 4
            np.testing.assert_allclose(found[row][order[2:]], rest, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
        kept += np.sort(labels[:, view].numpy(), 1)[:, -2:].sum()
    assert abs(stored.mass_kept - kept / 21) < 1e-3


def test_equal_probabilities_keep_the_first_classes():
    stored = store(torch.full((1, 1, 5), 0.2), 2)
    assert stored.classes.tolist() == [[[0, 1]]]


@pytest.mark.parametrize(("num_classes", "dtype"), [(256, np.uint8), (257, np.uint16), (70_000, np.uint32)])
def test_classes_are_numbered_in_as_few_bytes_as_they_need(num_classes, dtype):
    labels = torch.zeros(1, 1, num_classes)
    labels[..., -1] = 1.0
    stored = store(labels, 1)
    assert stored.classes.dtype == dtype
    assert stored.classes.item() == num_classes - 1


@pytest.mark.parametrize("top_k", [None, 2])
def test_stretches_of_labels_are_joined(top_k):
    labels = distributions()
    whole, parts = store(labels, top_k), [store(part, top_k) for part in labels.split([2, 4, 1])]
    for view in range(3):
        assert np.array_equal(join(parts).of(np.arange(7), view), whole.of(np.arange(7), view))


# -- what students learn from --------------------------------------------------------------------------------------


def training(soft, *, cutmix=0.0, num_views=4):
    return TrainingSet(viewed(cutmix), np.array([0, 0, 1, 1, 2, 2]), 3, num_views, soft)


def telling(num_views=4):
    """Labels that tell image and view."""
    return Dense(np.arange(len(IDS) * num_views * 3, dtype=np.float16).reshape(len(IDS), num_views, 3))


def test_an_epoch_takes_the_views_in_turn_with_their_labels():
    data = training(telling())
    for epoch, view in [(1, 0), (2, 1), (4, 3), (5, 0), (300, 3), (301, 0)]:
        x, targets, hard = data.batch(ROWS, epoch, CPU)
        assert torch.equal(x, viewed().view(ROWS, view, CPU))
        assert np.array_equal(targets, data.soft.values[:, view])
        assert hard.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]


def test_one_label_per_image_serves_every_view():
    data = training(telling(1), num_views=None)
    for epoch in (1, 2, 77):
        x, targets, _ = data.batch(ROWS, epoch, CPU)
        assert torch.equal(x, viewed().view(ROWS, epoch - 1, CPU))
        assert np.array_equal(targets, data.soft.values[:, 0])


def test_an_ensemble_labels_what_is_seen():
    pair = models()
    data = training(Ensemble(pair, 2.0), num_views=None)
    x, targets, _ = data.batch(ROWS, 9, CPU)
    assert torch.equal(targets, ensemble(pair, x, 2.0, "probabilities"))


def test_hard_labels_of_mixed_views_are_mixed_by_area():
    data = training(None, cutmix=1.0)
    _, targets, hard = data.batch(ROWS, 2, CPU)
    mixes = data.viewed.mixes(ROWS, 1)
    expected = np.zeros((6, 3))
    for row in ROWS:
        share = mixes.shares(8)[row]
        expected[row, data.labels[row]] += 1 - share
        expected[row, data.labels[mixes.partners[row]]] += share
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    assert torch.equal(targets, hard)


def test_student_sees_the_labelled_views_each_with_its_own_label(monkeypatch):
    data, seen = training(telling()), {}

    def record(state, batches, **options):
        assert options["loss"].keywords == {"temperature": 2.5}
        assert options["epochs"] * options["steps_per_epoch"] == sum(len(list(batches(e))) for e in range(1, 7))
        for epoch in range(1, 7):
            x, y = (torch.cat(parts) for parts in list(zip(*batches(epoch), strict=True))[:2])
            seen[epoch] = {tuple(target.tolist()): view for view, target in zip(x, y, strict=True)}
        return ()

    monkeypatch.setattr(students, "fit", record)
    train_student(
        data,
        Evaluation(batch_size=4),
        Labels(temperature=2.5),
        architecture="convnet:width=2,depth=1",
        seed=0,
        epochs=6,
        learning_rate=1e-3,
        device=CPU,
    )
    for epoch in range(1, 7):
        view = (epoch - 1) % 4
        labelled = viewed().view(ROWS, view, CPU)
        assert len(seen[epoch]) == len(IDS)
        for row in ROWS:
            bits = seen[epoch][tuple(data.soft.values[row, view].tolist())].numpy().tobytes()
            assert bits == labelled[row].numpy().tobytes()
