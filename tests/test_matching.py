"""Eq. 7 against an evaluation in float64 from a network's weights, without its modules, taps or moments."""

import numpy as np
import pytest
import torch
from conftest import train_on
from sklearn.datasets import load_digits
from torch.nn import functional

from teddy_ray.augment import apply_boxes, draw_boxes
from teddy_ray.matching import Target, batch_moments, layer_weights, make_targets, member_loss, statistics_loss
from teddy_ray.models import build, freeze
from teddy_ray.moments import class_moments
from teddy_ray.pixels import from_pixels
from teddy_ray.randomness import generator
from teddy_ray.recipe import Augmentation
from teddy_ray.taps import Taps

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

NORMS = ["batch", "instance", "group", "layer", "none"]
WIDTH, NUM_CLASSES = 16, 4
DATA_LABELS = np.repeat(np.arange(NUM_CLASSES), (3, 20, 8, 14))
BATCH_LABELS = np.array([1, 1, 3, 1, 2])
CPU = torch.device("cpu")


def pooled(moments):
    """Of all classes together, by layer."""
    return [layer.pooled() for layer in moments]


def make_model(norm, size=8):
    """A frozen float64 ConvNet of two blocks with random weights and buffers in its norms."""
    model = build(f"convnet:width={WIDTH},depth=2,norm={norm}", num_classes=NUM_CLASSES, channels=1, image_size=size)
    random = generator("weights", norm)
    with torch.no_grad():
        for name, tensor in model.double().state_dict().items():
            if ".features.1." in name or ".features.5." in name:
                tensor.copy_(torch.from_numpy(np.array(random.uniform(0.5, 1.5, tuple(tensor.shape)))))
    return freeze(model)


def forward(model, norm, images):
    """Logits (n classes) and what is tapped (n channels positions), by the definition of each layer."""
    weights = model.state_dict()
    x, tapped = (images - 0.5) / 0.25, []
    for block in range(2):
        convolution, normalisation = (f"network.features.{4 * block + offset}" for offset in (0, 1))
        x = functional.conv2d(x, weights[f"{convolution}.weight"], weights[f"{convolution}.bias"], padding=1)
        tapped.append(x.flatten(2))
        if norm != "none":
            if norm == "batch":
                mean, var = (weights[f"{normalisation}.running_{kind}"][:, None, None] for kind in ("mean", "var"))
            else:
                num_groups = {"instance": WIDTH, "group": 8, "layer": 1}[norm]
                groups = x.reshape(len(x), num_groups, -1)
                mean, var = (
                    moment.repeat_interleave(WIDTH // num_groups, 1)[:, :, None, None]
                    for moment in (groups.mean(2), ((groups - groups.mean(2, keepdim=True)) ** 2).mean(2))
                )
            scale, shift = (weights[f"{normalisation}.{kind}"][:, None, None] for kind in ("weight", "bias"))
            x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
        x = x.clamp(min=0)
        x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.flatten(1) @ weights["network.classifier.weight"].T + weights["network.classifier.bias"], tapped


def mixed(activation, shares):
    """Mean and variance (channels,) of data activations where class c weighs shares[c], image by image."""
    weights = [shares[label] / np.sum(label == DATA_LABELS) for label in DATA_LABELS]
    x = activation.numpy()
    mean = sum(weight * image.mean(1) for weight, image in zip(weights, x, strict=True))
    var = sum(weight * ((image - mean[:, None]) ** 2).mean(1) for weight, image in zip(weights, x, strict=True))
    return mean, var


def statistics(tapped, shares, data, factor):
    """The sum over layers of Eq. 7."""
    total = 0.0
    for layer, (activation, data_activation) in enumerate(zip(tapped, data, strict=True)):
        x = activation.numpy().transpose(1, 0, 2).reshape(WIDTH, -1)
        mean = x.sum(1) / x.shape[1]
        var = ((x - mean[:, None]) ** 2).sum(1) / x.shape[1]
        RM, RV = mixed(data_activation, shares)
        distance = np.sqrt(np.sum((mean - RM) ** 2)) + np.sqrt(np.sum((var - RV) ** 2))
        total += (factor if layer == 0 else 1.0) * distance
    return total


def cross_entropy(logits, labels):
    exponentials = np.exp(logits.numpy())
    return np.mean([-np.log(row[label] / row.sum()) for row, label in zip(exponentials, labels, strict=True)])


def shares_of(labels):
    return np.bincount(labels, minlength=NUM_CLASSES) / len(labels)


@pytest.fixture(scope="module")
def data():
    """Real and synthetic images. Classes differ in brightness, so that targets of another mixture would show."""
    random = np.random.default_rng(0)
    real = random.random((len(DATA_LABELS), 1, 8, 8)) * (0.4 + 0.2 * DATA_LABELS[:, None, None, None])
    return torch.from_numpy(real), torch.from_numpy(random.random((len(BATCH_LABELS), 1, 8, 8)))


@pytest.mark.parametrize("factor", [1.0, 10.0])
@pytest.mark.parametrize("norm", NORMS)
def test_member_loss_equals_a_hand_written_evaluation(norm, factor, data):
    real, synthetic = data
    model = make_model(norm)
    _, data_tapped = forward(model, norm, real)
    logits, tapped = forward(model, norm, synthetic)
    shares = shares_of(BATCH_LABELS)
    RM, RV = zip(*[map(torch.from_numpy, mixed(layer, shares)) for layer in data_tapped], strict=True)
    with Taps(model) as taps:
        loss, ce = member_loss(
            model, taps, synthetic, torch.from_numpy(BATCH_LABELS), [Target(RM, RV)], u=0.7, weights=[factor, 1.0]
        )
    np.testing.assert_allclose(float(loss), statistics(tapped, shares, data_tapped, factor), rtol=1e-12)
    np.testing.assert_allclose(float(ce), 0.7 * cross_entropy(logits, BATCH_LABELS), rtol=1e-12)


@pytest.mark.parametrize("scope", ["subset", "global", "blend"])
@pytest.mark.parametrize("norm", NORMS)
def test_loss_of_a_scope_equals_a_hand_written_evaluation(norm, scope, data):
    real, synthetic = data
    model, blend = make_model(norm), 0.3
    _, data_tapped = forward(model, norm, real)
    _, tapped = forward(model, norm, synthetic)
    in_batch, in_data = (
        statistics(tapped, shares_of(labels), data_tapped, 2.0) for labels in (BATCH_LABELS, DATA_LABELS)
    )
    expected = {"subset": in_batch, "global": in_data, "blend": (1 - blend) * in_batch + blend * in_data}[scope]
    # far enough apart that no scope could pass for another
    assert abs(in_batch / in_data - 1) > 0.01

    labels = torch.from_numpy(BATCH_LABELS)
    with Taps(model) as taps:
        model(real)
        moments = [class_moments(layer, torch.from_numpy(DATA_LABELS), NUM_CLASSES) for layer in taps.take()]
        targets = make_targets(moments, pooled(moments), labels, scope=scope, blend=blend, device=CPU)
        loss, _ = member_loss(model, taps, synthetic, labels, targets, u=1.0, weights=[2.0, 1.0])
    np.testing.assert_allclose(float(loss), expected, rtol=1e-6)  # targets are float32


@pytest.mark.parametrize("scope", ["subset", "global"])
def test_targets_are_the_mixture_of_the_scope(scope, data):
    real, _ = data
    model = make_model("batch")
    _, data_tapped = forward(model, "batch", real)
    moments = [class_moments(layer, torch.from_numpy(DATA_LABELS), NUM_CLASSES) for layer in data_tapped]
    (target,) = make_targets(
        moments, pooled(moments), torch.from_numpy(BATCH_LABELS), scope=scope, blend=0.5, device=CPU
    )
    shares = shares_of({"subset": BATCH_LABELS, "global": DATA_LABELS}[scope])
    assert target.weight == 1
    for layer in range(2):
        RM, RV = mixed(data_tapped[layer], shares)
        np.testing.assert_allclose(target.RM[layer], RM, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(target.RV[layer], RV, rtol=1e-6)


def test_blend_weighs_losses_and_leaves_targets_apart(data):
    real, _ = data
    model = make_model("batch")
    _, data_tapped = forward(model, "batch", real)
    moments = [class_moments(layer, torch.from_numpy(DATA_LABELS), NUM_CLASSES) for layer in data_tapped]
    labels = torch.from_numpy(BATCH_LABELS)
    subset, whole, *blended = (
        target
        for scope in ("subset", "global", "blend")
        for target in make_targets(moments, pooled(moments), labels, scope=scope, blend=0.3, device=CPU)
    )
    assert [target.weight for target in blended] == [0.7, 0.3]
    for target, alone in zip(blended, (subset, whole), strict=True):
        assert all(map(torch.equal, [*target.RM, *target.RV], [*alone.RM, *alone.RV]))


def test_subset_of_a_class_without_data_is_refused():
    moments = [class_moments(torch.rand(4, 2, 3), torch.tensor([0, 0, 2, 2]), 3)]
    with pytest.raises(ValueError, match=r"\[1\]"):
        make_targets(moments, pooled(moments), torch.tensor([0, 1]), scope="subset", blend=0.5, device=CPU)


def test_distance_of_moments_that_match_is_zero():
    x = torch.rand(6, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = x.mean((0, 2))
    var = ((x - mean[:, None]) ** 2).mean((0, 2))
    assert float(statistics_loss([x], [Target([mean], [var])], [1.0])) < 1e-14


# -- weights of layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 1.0, 10.0])
def test_weight_of_a_layer_is_1_but_for_the_first(factor):
    weights = layer_weights([4, 9, 25], first_layer_factor=factor, normalise=False)
    assert weights == [factor, 1.0, 1.0]


@pytest.mark.parametrize("factor", [0.0, 1.0, 10.0])
def test_normalised_weight_is_divided_by_the_root_of_the_channels(factor):
    weights = layer_weights([4, 9, 25], first_layer_factor=factor, normalise=True)
    assert weights == pytest.approx([factor / 2, 1 / 3, 1 / 5], rel=1e-15)


def test_each_layer_has_its_own_weight():
    generator = torch.Generator().manual_seed(0)
    activations = [torch.rand(6, num, 5, dtype=torch.float64, generator=generator) for num in (2, 3, 4)]
    target = Target(*[[torch.rand(num, dtype=torch.float64) for num in (2, 3, 4)] for _ in range(2)])
    alone = [float(statistics_loss(activations, [target], np.eye(3)[layer])) for layer in range(3)]
    together = float(statistics_loss(activations, [target], [2.0, 3.0, 5.0]))
    assert together == pytest.approx(2 * alone[0] + 3 * alone[1] + 5 * alone[2], rel=1e-14)
    assert min(alone) > 0


def test_normalised_loss_does_not_grow_with_the_width():
    # a network whose every channel stands there k times is no further from its targets
    x = torch.rand(6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    RM, RV = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    losses = []
    for times in (1, 3, 16):
        (weight,) = layer_weights([4 * times], first_layer_factor=1.0, normalise=True)
        target = Target([RM.repeat(times)], [RV.repeat(times)])
        losses.append(float(statistics_loss([x.repeat(1, times, 1)], [target], [weight])))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-14)


# -- number formats ------------------------------------------------------------------------------------------------


def test_activations_in_bf16_are_averaged_in_float32():
    # bfloat16 has 1, 1 + 1/128 and 1 + 2/128, but nothing between; a sum in it stalls at 256 times its terms
    random = np.random.default_rng(0)
    x = torch.from_numpy(1 + random.choice(3, (64, 2, 1024), p=[0.5, 0.3, 0.2]) / 128).bfloat16()
    values = x.double().numpy().transpose(1, 0, 2).reshape(2, -1)
    mu, var = batch_moments(x, torch.ones(2))
    assert mu.dtype == var.dtype == torch.float32
    np.testing.assert_allclose(mu, values.mean(1), rtol=1e-6)
    np.testing.assert_allclose(var, values.var(1), rtol=1e-4)


def test_moments_of_a_finer_type_keep_it():
    mu, var = batch_moments(torch.rand(4, 2, 9, dtype=torch.float64), torch.zeros(2))
    assert mu.dtype == var.dtype == torch.float64


def test_loss_of_a_model_in_bf16_is_float32_and_near_that_in_float32(data):
    real, synthetic = (images.float() for images in data)
    model, labels = make_model("batch").float(), torch.from_numpy(BATCH_LABELS)
    with torch.no_grad(), Taps(model) as taps:
        model(real)
        moments = [class_moments(layer, torch.from_numpy(DATA_LABELS), NUM_CLASSES) for layer in taps.take()]
    targets = make_targets(moments, pooled(moments), labels, scope="subset", blend=0.5, device=CPU)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        with Taps(model.to(dtype)) as taps:
            losses[dtype] = member_loss(model, taps, synthetic, labels, targets, u=1.0, weights=[1.0, 1.0])
    assert all(term.dtype == torch.float32 for term in losses[torch.bfloat16])
    assert losses[torch.bfloat16] != losses[torch.float32]
    torch.testing.assert_close(losses[torch.bfloat16], losses[torch.float32], rtol=0.03, atol=0)


# -- targets on real images ----------------------------------------------------------------------------------------

PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
PER_CLASS = 20


@pytest.fixture(scope="module")
def digits():
    """What a trained model is tapped for on all digits, (n channels positions) by layer, and the labels (n,)."""
    bunch = load_digits()
    pixels, labels = (bunch.images[:, None] / 16 * 255).round().astype(np.uint8), bunch.target.astype(np.int64)
    model = freeze(train_on(pixels[:600], labels[:600], (4,))[4])
    with torch.inference_mode(), Taps(model) as taps:
        model(from_pixels(pixels, CPU))
        return taps.take(), labels


@pytest.fixture(scope="module")
def digits_moments(digits):
    """The moments of the digits by layer, taken in chunks as the stage does."""
    activations, labels = digits
    merged = []
    for activation in activations:
        chunks = zip(activation.split(500), torch.from_numpy(labels).split(500), strict=True)
        first, *others = [class_moments(x, y, 10) for x, y in chunks]
        for other in others:
            first = first.merge(other)
        merged.append(first)
    return merged


@pytest.mark.parametrize("draw", range(5))
@pytest.mark.parametrize("pair", PAIRS)
def test_real_batch_is_nearer_to_its_subset_than_to_all_classes(pair, draw, digits, digits_moments):
    activations, labels = digits
    random = generator("draw", draw)  # neighbours in the data are by one hand
    rows = np.concatenate([random.permutation(np.flatnonzero(labels == label))[:PER_CLASS] for label in pair])
    batch = [activation[rows] for activation in activations]
    loss = {}
    for scope in ("subset", "global"):
        targets = make_targets(
            digits_moments, pooled(digits_moments), torch.from_numpy(labels[rows]), scope=scope, blend=0.5, device=CPU
        )
        loss[scope] = float(statistics_loss(batch, targets, [1.0, 1.0]))
    assert loss["subset"] < loss["global"]


@pytest.mark.parametrize("pair", PAIRS)
def test_mixture_of_a_pair_equals_the_moments_of_its_images_together(pair, digits, digits_moments):
    activations, labels = digits
    rows = np.flatnonzero(np.isin(labels, pair))
    shares = torch.from_numpy(np.bincount(labels[rows], minlength=10) / len(rows))
    for activation, moments in zip(activations, digits_moments, strict=True):
        x = activation[rows].double().numpy().transpose(1, 0, 2).reshape(16, -1)
        mean, var = x.mean(1), x.var(1)
        mu, sigma_squared = (moment.numpy() for moment in moments.mixture(shares))
        assert (np.abs(mu - mean) / np.sqrt(var)).max() < 1e-9
        np.testing.assert_allclose(sigma_squared, var, rtol=1e-9)


# -- gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_of_the_images_equals_finite_differences(norm, data):
    real, _ = data
    model = make_model(norm, size=4)
    labels = torch.tensor([1, 3, 1])
    random = generator("images")
    images = torch.from_numpy(random.random((3, 1, 4, 4)))
    boxes = draw_boxes(Augmentation(), random, 3)
    with Taps(model) as taps:
        model(real[..., :4, :4])
        moments = [class_moments(layer, torch.from_numpy(DATA_LABELS), NUM_CLASSES) for layer in taps.take()]
        targets = make_targets(moments, pooled(moments), labels, scope="blend", blend=0.4, device=CPU)

        def loss(x):
            return sum(member_loss(model, taps, apply_boxes(x, boxes), labels, targets, u=0.5, weights=[3.0, 1.0]))

        (gradient,) = torch.autograd.grad(loss(images.requires_grad_()), images)
        step = 1e-6
        differences = torch.zeros_like(images)
        with torch.no_grad():
            for index in np.ndindex(*images.shape):
                moved = torch.zeros_like(images)
                moved[index] = step
                differences[index] = (loss(images + moved) - loss(images - moved)) / (2 * step)
    np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("off", [0.0, 2.0])
def test_moments_of_a_batch_keep_their_digits_where_the_mean_is_large(off, compiling, monkeypatch):
    """Both forms. The compiled one sums around a mean that is near, here up to two sigma away."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    random = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(50, 3, 400, generator=random)
    mu, var = batch_moments(x, torch.full((3,), 1000.0 + off))
    exact = x.double()
    torch.testing.assert_close(mu.double(), exact.mean((0, 2)), rtol=0, atol=1e-4)  # of sigma
    torch.testing.assert_close(var.double(), exact.var((0, 2), correction=0), rtol=1e-4, atol=0)
