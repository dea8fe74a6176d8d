"""The training loop of bases and students."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from teddy_ray.pool import train_base
from teddy_ray.recipe import Augmentation, Evaluation, Pool
from teddy_ray.students import TrainingSet, train_student
from teddy_ray.training import accuracy, fit

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

CPU = torch.device("cpu")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_one_step_equals_adamw_by_hand(temperature):
    random = np.random.default_rng(0)
    model = nn.Linear(6, 4).double()
    W, b = (parameter.detach().numpy().copy() for parameter in model.parameters())
    x, t = random.random((5, 6)), random.dirichlet(np.ones(4), 5)
    lr, decay = 0.03, 0.2
    losses = []
    fit(
        model,
        lambda epoch: [(torch.from_numpy(x), torch.from_numpy(t))],
        epochs=1,
        steps_per_epoch=1,
        learning_rate=lr,
        weight_decay=decay,
        temperature=temperature,
        on_epoch=lambda epoch, loss: losses.append((epoch, loss)),
    )

    p = np.exp((x @ W.T + b) / temperature)
    p /= p.sum(1, keepdims=True)
    ((epoch, loss),) = losses
    assert epoch == 1
    np.testing.assert_allclose(loss, -(temperature**2) * (t * np.log(p)).sum(1).mean(), rtol=1e-12)
    d_logits = temperature * (p - t) / len(x)
    for parameter, old, gradient in [(model.weight, W, d_logits.T @ x), (model.bias, b, d_logits.sum(0))]:
        # the first moments of Adam, corrected for their bias, are the gradient and its square
        expected = old * (1 - lr * decay) - lr * gradient / (np.sqrt(gradient**2) + 1e-8)
        np.testing.assert_allclose(parameter.detach(), expected, rtol=1e-10)


def test_dropout_follows_the_seed_and_not_what_was_drawn_before():
    x, t = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)), torch.eye(4).repeat(2, 1)

    def trained(seed, before):
        torch.manual_seed(before)
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4))
        nn.init.ones_(model[1].weight), nn.init.zeros_(model[1].bias)
        expected = torch.get_rng_state()
        batch = {"epochs": 3, "steps_per_epoch": 1, "learning_rate": 0.1, "weight_decay": 0.0}
        fit(model, lambda epoch: [(x, t)], seed=seed, **batch)
        assert torch.equal(torch.get_rng_state(), expected)
        return model[1].weight.detach()

    assert torch.equal(trained(5, before=1), trained(5, before=2))
    assert not torch.equal(trained(5, before=1), trained(6, before=1))


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_learning_rate_warms_up_and_falls_to_zero_on_a_cosine(warmup_epochs):
    # under a constant gradient Adam moves a parameter by the learning rate, so movements show the schedule
    model = nn.Linear(1, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    positions = []

    def batches(epoch):
        for _ in range(5):
            positions.append(float(model.weight[0].detach()))
            yield torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)

    options = {"epochs": 10, "steps_per_epoch": 5, "learning_rate": 1e-7, "weight_decay": 0.0}
    fit(model, batches, **options, warmup_epochs=warmup_epochs)
    rates = np.diff([*positions, float(model.weight[0].detach())]) / 1e-7
    warmup = 5 * warmup_epochs
    cosine = [0.5 * (1 + math.cos(math.pi * step / (50 - warmup))) for step in range(50 - warmup)]
    np.testing.assert_allclose(rates, [*(np.arange(warmup) + 1) / max(1, warmup), *cosine], atol=1e-3)
    assert rates[-1] < 0.003


@pytest.mark.parametrize("value", [math.nan, 1e38], ids=["nan", "overflow to infinity"])
def test_loss_that_is_not_finite_names_its_epoch(value):
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]))
    good, bad = torch.ones(2, 3), torch.full((2, 3), value)
    targets = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    finished = []
    with pytest.raises(FloatingPointError, match="epoch 2"):
        fit(
            model,
            lambda epoch: [(good, targets), (bad if epoch == 2 else good, targets)],
            epochs=3,
            steps_per_epoch=2,
            learning_rate=1e-3,
            weight_decay=0.0,
            on_epoch=lambda epoch, loss: finished.append(epoch),
        )
    assert finished == [1]


def test_training_puts_the_model_into_training_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    fit(
        model,
        lambda epoch: [(torch.rand(4, 3) + 5, torch.full((4, 2), 0.5))],
        epochs=1,
        steps_per_epoch=1,
        learning_rate=1e-3,
        weight_decay=0.0,
    )
    assert model[0].running_mean.min() > 0.4


class Pixels(nn.Module):
    """Logits are the image's own pixels; wrong on purpose in training mode."""

    def forward(self, x):
        return -x.flatten(1) if self.training else x.flatten(1)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("training", [True, False])
def test_accuracy_counts_in_evaluation_mode_and_restores_the_mode(batch_size, training):
    model = Pixels().train(training)
    images = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2]].reshape(7, 1, 2, 2)
    labels = torch.tensor([0, 1, 2, 3, 0, 3, 3])
    assert accuracy(model, images, labels, batch_size) == 5 / 7
    assert model.training is training


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    images = (bunch.images[:, None] / 16 * 255).round().astype(np.uint8)
    return images[:500], bunch.target[:500].astype(np.int64), (images[500:700], bunch.target[500:700].astype(np.int64))


def train_digits_base(digits, seed):
    images, labels, validation = digits
    pool = Pool(snapshots=(2, 5), batch_size=32, learning_rate=5e-3, augmentation=Augmentation(flip=False))
    snapshots = {}
    train_base(
        images,
        labels,
        validation,
        pool,
        architecture="convnet:width=16,depth=2",
        seed=seed,
        num_classes=10,
        device=CPU,
        on_snapshot=lambda epoch, model, share: snapshots.update({epoch: (copy.deepcopy(model).state_dict(), share)}),
    )
    return snapshots


def test_base_is_kept_at_its_snapshots_learns_and_comes_out_the_same_twice(digits):
    snapshots, again, other = (train_digits_base(digits, seed) for seed in (0, 0, 1))
    assert list(snapshots) == [2, 5]
    assert snapshots[5][1] > 0.8
    weights = snapshots[5][0]
    assert all(torch.equal(weights[name], again[5][0][name]) for name in weights)
    assert not torch.equal(weights["network.classifier.weight"], snapshots[2][0]["network.classifier.weight"])
    assert not torch.equal(weights["network.classifier.weight"], other[5][0]["network.classifier.weight"])


def train_digits_student(images, labels, test, architecture="convnet:width=16,depth=2", **options):
    boxes = np.tile([0.0, 0.0, 1.0, 1.0, 0.0], (len(images), 1, 1))
    return train_student(
        TrainingSet(images, boxes, np.eye(10)[labels][:, None]),
        test,
        Evaluation(**{"learning_rate": 5e-3, "batch_size": 10} | options),
        architecture=architecture,
        seed=0,
        epochs=6,
        temperature=1.0,
        device=CPU,
    )


def test_student_learns_and_comes_out_the_same_twice(digits):
    images, labels, test = digits
    first, second = (train_digits_student(images[:200], labels[:200], test) for _ in range(2))
    assert first > 0.6
    assert first == second


def test_student_trains_where_the_last_batch_holds_one_image(digits):
    images, labels, test = digits
    # its last stage has 1 x 1 positions here: a BatchNorm has one value per channel in such a batch
    assert 0 <= train_digits_student(images[:9], labels[:9], test, "resnet18:width=2", batch_size=4) <= 1
