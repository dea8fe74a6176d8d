"""The students' recipe: schedules, losses, optimisers and averages, by hand in float64; students of real images."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import nn

from teddy_ray import schedules, students
from teddy_ray.labels import Dense
from teddy_ray.pixels import from_pixels
from teddy_ray.recipe import Evaluation, Labels, Steps
from teddy_ray.replay import TrainingSet
from teddy_ray.students import begin, loss_of, train_student
from teddy_ray.training import (
    Batch,
    State,
    accuracy,
    fit,
    logit_error,
    running_average,
    soft_cross_entropy,
    with_hard_labels,
)
from teddy_ray.views import ViewedImages, Views

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

CPU = torch.device("cpu")


def saved(tensors):
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


# -- schedules -----------------------------------------------------------------------------------------------------


def factors(num_steps=1000, **evaluation):
    schedule = schedules.of_students(Evaluation(**evaluation))
    return [schedule(step, num_steps) for step in range(num_steps)]


def test_cosine_falls_to_0_and_half_of_it_to_half():
    whole, half = factors(), factors(schedule="half_cosine")
    np.testing.assert_allclose([whole[step] for step in (0, 250, 500, 750)], [1, (2 + 2**0.5) / 4, 0.5, 0.5 - 2**-1.5])
    assert whole[-1] < 1e-5
    np.testing.assert_allclose(half, factors(2000)[:1000])
    assert 0.5 < half[-1] < 0.501
    for rates in (whole, half):
        assert (np.diff(rates) < 0).all()


def test_steps_multiply_the_rate_from_their_shares_on():
    rates = factors(schedule="steps")
    assert [rates[step] for step in (0, 799, 800, 899, 900, 949, 950, 999)] == [
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.25,
        0.125,
        0.125,
    ]
    rates = factors(10, schedule="steps", steps=Steps(at=(0.5,), factor=0.1))
    assert rates == [1] * 5 + [0.1] * 5


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.55, 0.57, 0.58, 0.95])
def test_step_of_a_share_is_not_missed_by_rounding(share):
    rates = factors(100, schedule="steps", steps=Steps(at=(share,), factor=0.5))
    assert rates.index(0.5) == round(100 * share)


def test_constant_stays():
    assert set(factors(schedule="constant")) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "half_cosine", "steps", "constant"])
def test_warm_up_rises_to_the_peak_from_which_every_schedule_begins(schedule):
    # under a constant gradient Adam moves a parameter by the learning rate, so movements show the schedule
    model = nn.Linear(1, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    positions = []

    def batches(epoch):
        for _ in range(5):
            positions.append(float(model.weight[0].detach()))
            yield Batch(torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64), 1)

    evaluation = Evaluation(schedule=schedule, warmup_epochs=2)
    options = {"key": ("test",), "epochs": 12, "steps_per_epoch": 5, "learning_rate": 1e-7}
    of_recipe = {"schedule": schedules.of_students(evaluation), "warmup_epochs": evaluation.warmup_epochs}
    list(fit(State.begin(model, 0.0), batches, **options, **of_recipe))
    rates = np.diff([*positions, float(model.weight[0].detach())]) / 1e-7
    expected = [*(np.arange(10) + 1) / 10, *factors(50, schedule=schedule)]
    np.testing.assert_allclose(rates, expected, atol=1e-3)


# -- losses --------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    hard = np.eye(4)[[0, 3, 3, 1, 2]]
    mixed = 0.7 * hard + 0.3 * hard[[3, 2, 4, 0, 1]]  # as CutMix makes them
    targets, hard = (torch.from_numpy(one) for one in (random.normal(size=(5, 4)) * 3, mixed))
    return torch.from_numpy(random.normal(size=(5, 4)) * 2).requires_grad_(), Batch(torch.empty(0), targets, 5, hard)


def cross_entropy(z, t):
    z, t = z.detach().numpy(), t.numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return -(t * np.log(p)).sum(1).mean(), (p - t) / len(z)


def squared(z, t):
    difference = z.detach().numpy() - t.numpy()
    return (difference**2).mean(1).mean(), 2 * difference / difference.size


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_logit_error_and_hard_labels_by_hand(batch, weight):
    logits, batch = batch
    loss = loss_of(Evaluation(loss="logit_mse", ce_weight=weight), Labels(temperature=20.0))(logits, batch)
    (soft, d_soft), (hard, d_hard) = squared(logits, batch.targets), cross_entropy(logits, batch.hard)
    np.testing.assert_allclose(loss.item(), soft + weight * hard, rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(gradient, d_soft + weight * d_hard, rtol=1e-10)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_kl_at_a_temperature_and_hard_labels_by_hand(batch, weight):
    logits, batch = batch
    batch = batch._replace(targets=batch.targets.softmax(1))
    loss = loss_of(Evaluation(ce_weight=weight), Labels(temperature=3.0))(logits, batch)
    (soft, d_soft), (hard, d_hard) = cross_entropy(logits / 3, batch.targets), cross_entropy(logits, batch.hard)
    np.testing.assert_allclose(loss.item(), 9 * soft + weight * hard, rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(gradient, 3 * d_soft + weight * d_hard, rtol=1e-10)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_kl_of_logits_is_that_of_their_softmax_at_the_temperature(batch, weight):
    logits, batch = batch
    labels = Labels(temperature=3.0, ensemble="logits")
    loss = loss_of(Evaluation(ce_weight=weight), labels)(logits, batch)
    softened = batch._replace(targets=(batch.targets / 3).softmax(1))
    expected = loss_of(Evaluation(ce_weight=weight), Labels(temperature=3.0))(logits, softened)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"loss": "logit_mse", "ensemble": "logits"}, {"ce_weight": 0.5}], ids=str)
def test_hard_labels_take_cross_entropy_alone(digits, options, monkeypatch):
    images, classes, _ = digits
    seen = []

    def recorded(state, batches, *, loss, **rest):
        seen.append(loss)
        yield from fit(state, batches, loss=loss, **rest)

    monkeypatch.setattr(students, "fit", recorded)
    train_digits_student(images[:20], classes[:20], soft=False, **options)
    assert seen == [soft_cross_entropy]


@pytest.mark.parametrize("loss", [logit_error, with_hard_labels(logit_error, 0.3)])
def test_losses_of_the_parts_of_a_batch_sum_to_that_of_the_whole(batch, loss):
    logits, batch = batch
    parts = [slice(None, None, 2), slice(1, None, 2)]
    shares = [loss(logits[p], Batch(batch.images, batch.targets[p], 5, batch.hard[p])) for p in parts]
    torch.testing.assert_close(sum(shares), loss(logits, batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("loss", "weight"), [("logit_mse", 0.0), ("kl", 0.1)])
def test_loss_of_a_recipe_that_is_not_finite_names_its_epoch(loss, weight):
    model = nn.Linear(3, 2)
    bad = Batch(torch.full((2, 3), 1e38), torch.full((2, 2), 0.5), 2, torch.eye(2))
    of_recipe = loss_of(Evaluation(loss=loss, ce_weight=weight), Labels())
    options = {"key": ("test",), "epochs": 1, "steps_per_epoch": 1, "learning_rate": 1.0}
    with pytest.raises(FloatingPointError, match="epoch 1"):
        list(
            fit(
                State.begin(model, 0.0),
                lambda epoch: [bad._replace(images=bad.images * 1e38)],
                **options,
                loss=of_recipe,
            )
        )


# -- optimisers ----------------------------------------------------------------------------------------------------


def a_batch():
    random = torch.Generator().manual_seed(0)
    x = torch.rand(8, 6, generator=random, dtype=torch.float64)
    return Batch(x, torch.rand(8, 4, generator=random, dtype=torch.float64).softmax(1), 8)


def a_model():
    torch.manual_seed(1)
    return nn.Linear(6, 4).double()


def trained(evaluation, model, epochs=6, batch=None):
    batch = batch or a_batch()
    options = {"key": ("test",), "epochs": epochs, "steps_per_epoch": 1, "learning_rate": evaluation.learning_rate}
    schedule = schedules.of_students(evaluation)
    *_, state = fit(begin(model, evaluation), lambda epoch: [batch], **options, schedule=schedule)
    return state


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_by_hand(momentum):
    evaluation = Evaluation(optimiser="sgd", momentum=momentum, learning_rate=0.3, weight_decay=0.1, schedule="steps")
    model = a_model()
    W, b = (parameter.detach().numpy().copy() for parameter in model.parameters())
    x, t, *_ = (tensor.numpy() for tensor in a_batch()[:2])
    velocity = [np.zeros_like(W), np.zeros_like(b)]
    for step in range(6):
        p = np.exp(x @ W.T + b)
        p /= p.sum(1, keepdims=True)
        gradients = [(p - t).T @ x / 8 + 0.1 * W, (p - t).sum(0) / 8 + 0.1 * b]
        velocity = [momentum * v + g for v, g in zip(velocity, gradients, strict=True)]
        rate = 0.3 * factors(6, schedule="steps")[step]
        W, b = W - rate * velocity[0], b - rate * velocity[1]
    state = trained(evaluation, model)
    np.testing.assert_allclose(state.model.weight.detach(), W, rtol=1e-9)
    np.testing.assert_allclose(state.model.bias.detach(), b, rtol=1e-9)


def test_optimisers_differ():
    sgd, adamw = (trained(Evaluation(optimiser=name), a_model()).model.weight for name in ("sgd", "adamw"))
    assert not torch.allclose(sgd, adamw)


# -- running averages ----------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A model with a BatchNorm, whose statistics are of what the layer before gives."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.body, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.register_buffer("shift", torch.tensor([0.1]))

    def forward(self, x):
        return self.head(self.norm(self.body(x + self.shift)).relu())


def test_average_is_that_of_the_weights_and_statistics_after_every_step():
    model = Normed().double()
    evaluation = Evaluation(ema=0.8, learning_rate=0.05)
    batch, seen = a_batch(), []
    options = {"key": ("test",), "epochs": 5, "steps_per_epoch": 1, "learning_rate": 0.05}
    state = begin(model, evaluation)
    for _ in fit(state, lambda epoch: [batch], **options):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
    expected = {name: value.numpy() for name, value in seen[0].items()}
    for weights in seen[1:]:
        expected = {name: 0.8 * expected[name] + 0.2 * value.numpy() for name, value in weights.items()}
    averaged = state.measured.module.state_dict()
    assert averaged.keys() == expected.keys()
    count = averaged.pop("norm.num_batches_tracked")
    assert count.dtype == torch.int64
    assert 1 <= count <= 5
    for name, value in averaged.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=name)
    assert torch.equal(averaged["shift"], model.shift)
    assert not torch.equal(averaged["head.weight"], model.head.weight)


def test_average_does_not_change_the_training():
    with_one, without = (trained(Evaluation(ema=ema), Normed().double()) for ema in (0.9, 0.0))
    assert with_one.losses == without.losses
    assert all(torch.equal(*pair) for pair in zip(with_one.model.parameters(), without.model.parameters(), strict=True))
    assert without.measured is without.model


def test_statistics_of_the_average_are_nearer_to_those_of_its_weights_than_the_last_ones_are():
    # a body whose bias rises at a constant rate: the true means of what the norm sees are those of the bias
    model = Normed().double()
    model.norm.momentum = 1.0
    average = running_average(model, 0.9)
    x = a_batch().images
    for _ in range(100):
        with torch.no_grad():
            model.body.bias += 0.05
            model(x)
        average.update_parameters(model)
    true = average.module.body(x + model.shift).mean(0)
    torch.testing.assert_close(average.module.norm.running_mean, true)
    assert (model.norm.running_mean - true).abs().min() > 0.3


def test_training_with_an_average_goes_on_from_a_checkpoint():
    evaluation = Evaluation(ema=0.9, optimiser="sgd")
    batch = a_batch()
    options = {"key": ("test",), "epochs": 4, "steps_per_epoch": 1, "learning_rate": 0.05}
    whole = fit(begin(Normed().double(), evaluation), lambda epoch: [batch], **options)
    next(whole), next(whole)
    resumed = begin(Normed().double(), evaluation)
    resumed.restore({name: tensor.clone() for name, tensor in next(whole).tensors().items()})
    *_, expected = whole
    *_, resumed = fit(resumed, lambda epoch: [batch], **options)
    assert saved(expected.tensors()) == saved(resumed.tensors())


# -- whole students ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    images = (bunch.images[:, None] / 16 * 255).round().astype(np.uint8)
    return images[:500], bunch.target[:500].astype(np.int64), (images[500:700], bunch.target[500:700].astype(np.int64))


def train_digits_student(
    images,
    classes,
    architecture="convnet:width=16,depth=2",
    scale=1.0,
    soft=True,
    ensemble="probabilities",
    dtype=torch.float32,
    **options,
):
    """A student of soft labels that are hard, or of logits of that scale."""
    views = Views(seed=0, set_key="", ids=[str(row) for row in range(len(images))], augmentation=None)
    soft = Dense((scale * np.eye(10)[classes][:, None]).astype(np.float16)) if soft else None
    return train_student(
        TrainingSet(ViewedImages(images, views), classes, 10, 1, soft),
        Evaluation(**{"learning_rate": 5e-3, "batch_size": 10} | options),
        Labels(ensemble=ensemble),
        architecture=architecture,
        seed=0,
        epochs=6,
        learning_rate=options.get("learning_rate", 5e-3),
        device=CPU,
        dtype=dtype,
    )


RECIPES = {
    "default": {},
    "edc": {"loss": "logit_mse", "scale": 10.0, "ce_weight": 0.1, "schedule": "steps", "ema": 0.9},
    "rded": {"schedule": "half_cosine", "warmup_epochs": 1},
    "dc": {"optimiser": "sgd", "schedule": "steps", "steps": Steps(at=(0.5,), factor=0.1), "learning_rate": 0.02},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_student_learns_and_comes_out_the_same_twice(digits, recipe):
    images, classes, (test, labels) = digits
    first, second = (train_digits_student(images[:200], classes[:200], **RECIPES[recipe]) for _ in range(2))
    assert accuracy(first, [(from_pixels(test, CPU), torch.from_numpy(labels))]) > 0.6
    assert saved(copy.deepcopy(first).state_dict()) == saved(copy.deepcopy(second).state_dict())


def test_student_in_bf16_keeps_its_weights_in_float32_and_learns_otherwise(digits):
    images, classes, (test, labels) = digits
    full, mixed = (
        train_digits_student(images[:200], classes[:200], dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert {weight.dtype for weight in mixed.parameters()} == {torch.float32}
    assert not torch.equal(*(torch.cat([weight.flatten() for weight in m.parameters()]) for m in (full, mixed)))
    assert accuracy(mixed, [(from_pixels(test, CPU), torch.from_numpy(labels))]) > 0.6


def test_student_is_its_average(digits, monkeypatch):
    images, classes, _ = digits
    begun = []
    monkeypatch.setattr(students, "begin", lambda *arguments: begun.append(begin(*arguments)) or begun[-1])
    trained = [train_digits_student(images[:20], classes[:20], ema=ema) for ema in (0.0, 0.9)]
    assert trained == [begun[0].model, begun[1].average]
    assert int(begun[1].average.n_averaged) == 6 * 2


def test_student_gets_the_hard_labels_of_its_images(digits, monkeypatch):
    images, classes, _ = digits
    seen = []
    monkeypatch.setattr(students, "loss_of", lambda *arguments: partial(recorded, seen))
    train_digits_student(images[:30], classes[:30], scale=5.0)
    assert len(seen) == 6 * 3
    for batch in seen:
        torch.testing.assert_close(batch.targets, 5 * batch.hard)
        assert batch.hard.sum(1).tolist() == [1] * 10


def recorded(seen, logits, batch):
    seen.append(batch)
    return logit_error(logits, batch)


def test_student_trains_where_the_last_batch_holds_one_image(digits):
    images, classes, _ = digits
    # its last stage has 1 x 1 positions here: a BatchNorm has one value per channel in such a batch
    assert train_digits_student(images[:9], classes[:9], "resnet18:width=2", batch_size=4)


def test_student_that_diverges_names_the_epoch(digits):
    images, classes, _ = digits
    with pytest.raises(FloatingPointError, match="epoch"):
        train_digits_student(images[:50], classes[:50], loss="logit_mse", scale=6e4, learning_rate=1e30)
