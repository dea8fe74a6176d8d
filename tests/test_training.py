"""The training loop of bases and students. What students make of it is in test_students.py."""

import copy
import math
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.datasets import load_digits
from torch import nn

from teddy_ray.training import Batch, State, accuracy, cut_into_batches, fit, soft_cross_entropy

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_one_step_equals_adamw_by_hand(temperature):
    random = np.random.default_rng(0)
    model = nn.Linear(6, 4).double()
    W, b = (parameter.detach().numpy().copy() for parameter in model.parameters())
    x, t = random.random((5, 6)), random.dirichlet(np.ones(4), 5)
    lr, decay = 0.03, 0.2
    states = fit(
        State.begin(model, decay),
        lambda epoch: [Batch(torch.from_numpy(x), torch.from_numpy(t), len(x))],
        key=("test",),
        epochs=1,
        steps_per_epoch=1,
        learning_rate=lr,
        loss=partial(soft_cross_entropy, temperature=temperature),
    )
    losses = [(state.epoch, state.losses[-1]) for state in states]

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


def test_dropout_follows_the_key_and_not_what_was_drawn_before():
    x, t = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)), torch.eye(4).repeat(2, 1)

    def trained(key, before):
        torch.manual_seed(before)
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4))
        nn.init.ones_(model[1].weight), nn.init.zeros_(model[1].bias)
        expected = torch.get_rng_state()
        options = {"key": (key,), "epochs": 3, "steps_per_epoch": 1, "learning_rate": 0.1}
        list(fit(State.begin(model, 0.0), lambda epoch: [Batch(x, t, len(x))], **options))
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
            yield Batch(torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64), 1)

    options = {"key": ("test",), "epochs": 10, "steps_per_epoch": 5, "learning_rate": 1e-7}
    list(fit(State.begin(model, 0.0), batches, **options, warmup_epochs=warmup_epochs))
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
    states = fit(
        State.begin(model, 0.0),
        lambda epoch: [Batch(good, targets, 2), Batch(bad if epoch == 2 else good, targets, 2)],
        key=("test",),
        epochs=3,
        steps_per_epoch=2,
        learning_rate=1e-3,
    )
    assert next(states).epoch == 1
    with pytest.raises(FloatingPointError, match="epoch 2"):
        next(states)


def test_training_puts_the_model_into_training_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    options = {"key": ("test",), "epochs": 1, "steps_per_epoch": 1, "learning_rate": 1e-3}
    list(
        fit(State.begin(model, 0.0), lambda epoch: [Batch(torch.rand(4, 3) + 5, torch.full((4, 2), 0.5), 4)], **options)
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
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    assert accuracy(model, batches) == 5 / 7
    assert model.training is training


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    images = (bunch.images[:, None] / 16 * 255).round().astype(np.uint8)
    return images[:500], bunch.target[:500].astype(np.int64)


class Dropping(nn.Module):
    """A model that draws, with a BatchNorm: everything that a resumed training has to find as it was."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.body(x))


def fit_digits(digits, state, epochs, dtype=torch.float32):
    images, labels = torch.from_numpy(digits[0]).float() / 255, torch.eye(10)[torch.from_numpy(digits[1])]
    rows = np.arange(len(images))

    def batches(epoch):
        for part in cut_into_batches(np.roll(rows, epoch), 100):
            yield Batch(images[part], labels[part], len(part))

    # the schedule is that of five epochs, however many are run here
    states = fit(
        state,
        batches,
        key=("test",),
        epochs=5,
        steps_per_epoch=5,
        learning_rate=1e-2,
        warmup_epochs=1,
        dtype=dtype,
    )
    return list(islice(states, epochs))[-1]


def fresh():
    torch.manual_seed(3)
    return State.begin(Dropping(), 0.1)


def bytes_of(state):
    return save({name: tensor.contiguous() for name, tensor in state.tensors().items()})


def test_a_training_that_goes_on_from_a_checkpoint_ends_in_the_same_bits(digits):
    whole = fit_digits(digits, fresh(), 5)
    begun = load(bytes_of(fit_digits(digits, fresh(), 2)))
    torch.manual_seed(99)  # another process
    resumed = State.begin(Dropping(), 0.1)
    resumed.restore(begun)
    assert resumed.epoch == 2
    resumed = fit_digits(digits, resumed, 3)
    assert (resumed.epoch, resumed.losses) == (5, whole.losses)
    assert bytes_of(resumed) == bytes_of(whole)


def test_trainings_are_channels_last_and_so_are_their_optimisers_after_a_checkpoint():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 2))
    state, resumed = (State.begin(copy.deepcopy(model), 0.01) for _ in range(2))
    state.model(torch.rand(2, 3, 8, 8)).sum().backward()
    state.optimiser.step()
    resumed.restore({name: tensor.contiguous() for name, tensor in state.tensors().items()})
    assert state.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not state.model[0].weight.is_contiguous()
    for one in (state, resumed):
        for weight in one.model.parameters():
            for name in ("exp_avg", "exp_avg_sq"):
                assert one.optimiser.state[weight][name].stride() == weight.stride()


@pytest.mark.parametrize("channels", [2, 7, 15, 16])
def test_gradients_of_strided_1x1_convolutions_are_right_however_few_their_channels(channels):
    """Channels-last, 7 end the process on a CPU with AVX2, and 15 are beyond the edge with AVX-512."""
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 4, 1, stride=2), nn.Flatten())
    exact = copy.deepcopy(model).double()
    state = State.begin(model, 0.0)
    seen = []
    model[1].register_forward_pre_hook(lambda module, images: seen.append(images[0]))
    images = torch.rand(25, 3, 8, 8)
    state.model(images).square().sum().backward()
    exact(images.double()).square().sum().backward()
    assert seen[0].is_contiguous() == (channels < 16)
    for weight, reference in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(weight.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)


def test_autocast_computes_products_in_bfloat16_and_keeps_weights(digits):
    full, mixed = fit_digits(digits, fresh(), 5), fit_digits(digits, fresh(), 5, dtype=torch.bfloat16)
    assert mixed.losses != full.losses
    assert mixed.losses == pytest.approx(full.losses, rel=0.1)
    assert {parameter.dtype for parameter in mixed.model.parameters()} == {torch.float32}
