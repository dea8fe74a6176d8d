"""The optimisation of one unit on digits, in this process."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from teddy_ray.errors import StageError
from teddy_ray.matching import make_targets, member_loss
from teddy_ray.models import freeze
from teddy_ray.moments import class_moments
from teddy_ray.pixels import from_pixels, to_pixels
from teddy_ray.pool import train_base
from teddy_ray.recipe import Augmentation, Data, Pool, Recipe, Statistics, Synthesis
from teddy_ray.synthesis import Member, noise_start, optimise_unit
from teddy_ray.taps import Taps

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

CPU = torch.device("cpu")
LABELS = np.repeat(np.array([2, 5, 7]), 4)
IDENTITY = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)


def make_recipe(seed=0, scope="subset", **synthesis):
    return Recipe(
        name="test",
        seed=seed,
        data=Data(source="sklearn:digits", image_size=8, channels=1),
        statistics=Statistics(scope=scope),
        synthesis=Synthesis(**{"steps": 6, "models_per_step": 2} | synthesis),
    )


@pytest.fixture(scope="module")
def members():
    """Three snapshots of a ConvNet trained on digits, with the moments of the digits at their taps."""
    bunch = load_digits()
    pixels, labels = (bunch.images[:, None] / 16 * 255).round().astype(np.uint8), bunch.target.astype(np.int64)
    pool = []

    def keep(epoch, model, accuracy):
        model = freeze(copy.deepcopy(model))
        with torch.inference_mode(), Taps(model) as taps:
            model(from_pixels(pixels, CPU))
            moments = {
                layer: class_moments(activation, torch.from_numpy(labels), 10)
                for layer, activation in zip(taps.layers, taps.take(), strict=True)
            }
        pool.append(Member(f"epoch {epoch}", model, moments))

    train_base(
        pixels[:600],
        labels[:600],
        (pixels[600:700], labels[600:700]),
        Pool(snapshots=(2, 5, 10), batch_size=32, learning_rate=5e-3, augmentation=Augmentation(flip=False)),
        architecture="convnet:width=16,depth=2",
        seed=0,
        num_classes=10,
        device=CPU,
        on_snapshot=keep,
    )
    return pool


@pytest.fixture(scope="module")
def start():
    return noise_start(len(LABELS), 1, 8, ("start",))


def optimise(start, members, recipe, key="unit A", labels=LABELS, **options):
    return optimise_unit(start, labels, members, recipe, key=key, device=CPU, **options)


def both(result):
    return result.images.tobytes(), result.losses.tobytes()


def terms(member, images, labels, recipe):
    """Statistics and u CE of one member on images as they are."""
    synthesis = recipe.synthesis
    with Taps(member.model) as taps:
        moments = [member.moments[layer] for layer in taps.layers]
        targets = make_targets(moments, labels, scope=recipe.statistics.scope, blend=0.5, device=CPU)
        return member_loss(
            member.model,
            taps,
            images,
            labels,
            targets,
            u=synthesis.ce_weight,
            first_layer_factor=synthesis.first_layer_factor,
        )


@pytest.mark.parametrize("scope", ["subset", "global", "blend"])
def test_same_unit_gives_the_same_bytes(scope, members, start):
    recipe = make_recipe(scope=scope)
    result = optimise(start, members, recipe)
    assert result.images.dtype == np.uint8
    assert result.images.shape == start.shape
    assert result.losses.shape == (6, 2)
    assert np.isfinite(result.losses).all()
    assert both(optimise(start, members, recipe)) == both(result)


def test_unit_depends_on_nothing_that_ran_before(members, start):
    recipe = make_recipe()
    alone = both(optimise(start, members, recipe))
    torch.manual_seed(99)
    optimise(start[::-1].copy(), members, make_recipe(models_per_step=3), key="unit B")
    given = start.copy()
    assert both(optimise(given, members, recipe)) == alone
    assert np.array_equal(given, start)


@pytest.mark.parametrize("change", [{"key": "unit B"}, {"seed": 1}], ids=["key", "seed"])
@pytest.mark.parametrize("drawn", ["views", "members"])
def test_another_key_or_seed_draws_other_views_and_members(drawn, change, members, start):
    pool = members[:1] if drawn == "views" else members
    augmentation = Augmentation() if drawn == "views" else IDENTITY
    first, other = (
        optimise(start, pool, make_recipe(**options, augmentation=augmentation, models_per_step=1), key=key)
        for options, key in [({}, "unit A"), ({"seed": change.get("seed", 0)}, change.get("key", "unit A"))]
    )
    assert (other.losses != first.losses).any()
    assert other.images.tobytes() != first.images.tobytes()


def test_steps_draw_views_anew(members, start):
    # a rate so low that only the views move the losses
    result = optimise(start, members[:1], make_recipe(learning_rate=1e-9, models_per_step=1))
    assert len(np.unique(result.losses[:, 0])) == 6


def count_passes(members):
    """Copies of the members that log their name at each forward pass."""
    log, copies = [], []
    for member in members:
        model = copy.deepcopy(member.model)
        model.register_forward_hook(lambda module, inputs, output, name=member.name: log.append(name))
        copies.append(Member(member.name, model, member.moments))
    return copies, log


@pytest.mark.parametrize("num_drawn", [1, 2, 3])
def test_members_are_drawn_without_replacement_at_each_step(num_drawn, members, start):
    counted, log = count_passes(members)
    optimise(start, counted, make_recipe(steps=12, models_per_step=num_drawn))
    assert len(log) == 12 * num_drawn
    steps = [log[i : i + num_drawn] for i in range(0, len(log), num_drawn)]
    assert all(len(set(drawn)) == num_drawn for drawn in steps)
    assert len(set(log)) == 3
    assert len({tuple(drawn) for drawn in steps}) > 1


def test_moments_are_taken_by_name_of_layer_not_by_order(members, start):
    assert len(members[0].moments) > 1
    shuffled = [Member(m.name, m.model, dict(reversed(m.moments.items()))) for m in members]
    assert both(optimise(start, shuffled, make_recipe())) == both(optimise(start, members, make_recipe()))


def test_first_step_is_adams_on_the_mean_over_the_drawn_members(members, start):
    recipe = make_recipe(steps=1, models_per_step=3, augmentation=IDENTITY, ce_weight=0.5, first_layer_factor=4.0)
    result = optimise(start, members, recipe)
    S = (torch.from_numpy(start).float() / 255).requires_grad_()
    losses = torch.stack([torch.stack(terms(m, S, torch.from_numpy(LABELS), recipe)) for m in members]).mean(0)
    np.testing.assert_allclose(result.losses[0], losses.detach(), rtol=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), S)
    # the first step of Adam has the length of the learning rate wherever the gradient is well above its epsilon
    moved = (S - recipe.synthesis.learning_rate * gradient.sign()).detach().clamp(0, 1) * 255
    clear = gradient.abs() > 1e-5
    assert clear.float().mean() > 0.9
    assert (torch.from_numpy(result.images) - moved).abs()[clear].max() < 0.51


def test_steps_grow_short_towards_the_end(members, start):
    # at a constant rate of Adam the loss would keep moving
    losses = optimise(start, members[:1], make_recipe(steps=80, models_per_step=1, augmentation=IDENTITY)).losses
    moves = np.abs(np.diff(losses.sum(1)))
    assert moves[-5:].max() < 0.01 * moves[:5].max()


@pytest.mark.parametrize("beginning", ["noise", "real"])
def test_loss_of_a_fixed_batch_falls(beginning, members, start):
    digits = load_digits()
    real = np.stack([digits.images[digits.target == label][:4] for label in (2, 5, 7)]).reshape(-1, 1, 8, 8)
    images = start if beginning == "noise" else (real / 16 * 255).round().astype(np.uint8)
    recipe = make_recipe(steps=80, models_per_step=3, augmentation=IDENTITY)
    result = optimise(images, members, recipe)
    before, after = (
        sum(float(sum(terms(m, from_pixels(x, CPU), torch.from_numpy(LABELS), recipe))) for m in members)
        for x in (images, result.images)
    )
    assert after < 0.6 * before
    assert result.losses[-1].sum() < 0.6 * result.losses[0].sum()


def test_progress_is_told_up_to_the_last_step(members, start):
    told = []
    result = optimise(start, members, make_recipe(steps=30), on_progress=lambda *news: told.append(news))
    assert told[-1][0] == 30
    assert [step for step, _ in told] == sorted({step for step, _ in told})
    for step, loss in told:
        assert loss == pytest.approx(result.losses[step - 1].sum(), rel=1e-5)


def spoil(members, at, where, value):
    """Copies of the members of which one gives something not finite in the pool's `at`-th forward pass."""
    log, copies = [], []

    def before(name):
        def hook(module, inputs):
            log.append(name)
            return (inputs[0] * value,) if where == "activations" and len(log) == at + 1 else None

        return hook

    def after(module, inputs, output):
        return output * value if where == "logits" and len(log) == at + 1 else None

    for member in members:
        model = copy.deepcopy(member.model)
        model.register_forward_pre_hook(before(member.name))
        model.register_forward_hook(after)
        copies.append(Member(member.name, model, member.moments))
    return copies, log


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["activations", "logits"])
@pytest.mark.parametrize("draw", [0, 27, 49, 50, 75])
def test_loss_that_is_not_finite_stops_the_unit_and_names_step_and_member(draw, where, value, members, start):
    # two members a step: one of them good, so that a mean or a maximum could hide the other
    spoilt, log = spoil(members, draw, where, value)
    finished = []
    with pytest.raises(StageError) as caught:
        optimise(start, spoilt, make_recipe(steps=38), key="unit A", on_progress=lambda *news: finished.append(news))
    error = caught.value
    assert error.stage == "synthesis"
    assert error.item == f"unit unit A, step {draw // 2}, member {log[draw]}"
    assert "not finite" in error.reason
    assert all(step <= draw // 2 for step, _ in finished)


def test_statistics_that_are_not_finite_stop_the_unit_though_the_cross_entropy_is(members, start):
    counted, log = count_passes(members)
    name = members[2].name
    moments = {layer: replace(m, mean=m.mean * math.nan) for layer, m in members[2].moments.items()}
    counted[2] = replace(counted[2], moments=moments)
    with pytest.raises(StageError) as caught:
        optimise(start, counted, make_recipe(steps=38, models_per_step=1))
    assert caught.value.item == f"unit unit A, step {log.index(name)}, member {name}"


def test_last_step_that_spoils_the_pixels_is_not_published(members, start):
    # sqrt at 0: a finite loss with a gradient that is not, after which no further loss would tell
    model = copy.deepcopy(members[0].model)
    model.register_forward_hook(lambda module, inputs, output: output + (output * 0).sqrt())
    with pytest.raises(StageError, match="unit unit A, step 0, member epoch 2"):
        optimise(start, [replace(members[0], model=model)], make_recipe(steps=1, models_per_step=1))


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_starts_grey_and_follows_its_key(channels):
    noise = noise_start(50, channels, 16, (0, "unit A"))
    assert noise.dtype == np.uint8
    assert noise.shape == (50, channels, 16, 16)
    inside = noise[(noise > 0) & (noise < 255)]
    assert abs(inside.mean() - 127.5) < 2
    assert abs(np.quantile(noise, 0.8413) - 255 * 0.75) < 3  # one standard deviation above the mean
    assert np.array_equal(noise, noise_start(50, channels, 16, (0, "unit A")))
    for key in [(1, "unit A"), (0, "unit B")]:
        assert not np.array_equal(noise, noise_start(50, channels, 16, key))


def test_pixels_of_8_bits_survive_the_way_there_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    images = from_pixels(pixels, CPU)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert np.array_equal(to_pixels(images).numpy(), pixels)


def test_pixels_are_rounded_to_the_nearest():
    images = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0])
    assert to_pixels(images).tolist() == [0, 0, 1, 255, 255]
